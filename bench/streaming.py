"""Streams: milliseconds per frame with the codec in them, by chunk size, and the codec's share.

    python bench/streaming.py --size 1b --dtype bfloat16 --precision int4

The guard verifies. Chunk sizes are interleaved; medians over rounds. A frame lasts 80 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bandwidth import streaming_bandwidth
from e2e import FRAME_MS, SIZES, build

from csm_runtime import accelerate
from csm_runtime.doctor import machine
from csm_runtime.streaming import RowSound


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "1b"], default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--precision", default="stock")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    model = accelerate(build(args.size, getattr(torch, args.dtype)), precision=args.precision)
    handle = model.acceleration
    ids = torch.randint(0, 256, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    add, most = RowSound.add, model.config.codec_config.codebook_size - 1
    RowSound.add = lambda self, codes: add(self, codes.clamp(max=most))  # random weights say more than the codec has
    greedy = {"max_new_tokens": args.frames, "do_sample": False, "depth_decoder_do_sample": False}
    rows: dict[int, dict[str, list[float]]] = {size: {} for size in args.chunks}
    bandwidths = []
    for number in range(args.rounds + 1):
        for size in args.chunks:
            bandwidths.append(streaming_bandwidth(torch.device("cpu")))
            handle.metrics.reset_times()
            chunks = list(handle.stream(input_ids=ids, chunk_frames=size, **greedy))
            later = chunks[1:]
            if not number:
                continue
            row: dict[str, Any] = rows[size]
            whole = (later[-1].made_after - chunks[0].made_after) / sum(chunk.frames for chunk in later)
            codec = sum(chunk.codec_seconds for chunk in later) / sum(chunk.frames for chunk in later)
            for name, seconds in (
                ("ms_per_frame", whole),
                ("codec_ms_per_frame", codec),
                ("frame_ms", statistics.median(handle.metrics.times("frame"))),
                ("first_audio_ms", chunks[0].made_after),
            ):
                row.setdefault(name, []).append(seconds * 1e3)
    result = {
        "machine": machine(),
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "streaming_gb_per_s": statistics.median(bandwidths),
        "chunks": {
            size: {name: statistics.median(values) for name, values in row.items()} for size, row in rows.items()
        },
    }
    print(
        f"streaming {result['streaming_gb_per_s']:.1f} GB/s\nframes per chunk   ms per frame   of it codec   real-time factor"
    )
    for size, row in result["chunks"].items():
        whole = row["ms_per_frame"]
        print(f"{size:>16} {whole:>14.1f} {row['codec_ms_per_frame']:>13.1f} {whole / FRAME_MS:>18.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
