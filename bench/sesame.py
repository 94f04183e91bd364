"""Sesame's stack: ``generate_frame`` of the stock model and under ``accelerate()``, interleaved in one process.

    python bench/sesame.py --size 1b --precision exact int8 int4

Models of the structure of Sesame's repository around torchtune (the extra ``sesame``), real shapes, random weights, bf16. Every
round makes the same frames with each; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bandwidth import streaming_bandwidth

from csm_runtime import accelerate
from csm_runtime.compiling import Progress
from csm_runtime.doctor import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import sesame_models


def speak(model: Any, length: int, frames: int) -> tuple[float, list[float]]:
    """Seconds to the first frame behind a prompt of text, and of every later one."""
    config = model.config
    tokens = torch.zeros(1, length, config.audio_num_codebooks + 1, dtype=torch.long)
    tokens[..., -1] = torch.arange(length) % config.text_vocab_size
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[..., -1] = True
    positions, times = torch.arange(length)[None], []
    with torch.inference_mode():
        model.reset_caches()
        for _ in range(frames):
            start = time.perf_counter()
            frame = model.generate_frame(tokens, mask, positions, 0.9, 50)
            times.append(time.perf_counter() - start)
            nothing = torch.zeros(1, 1, dtype=torch.long)
            tokens = torch.cat([frame, nothing], dim=1).unsqueeze(1)
            mask = torch.cat([torch.ones_like(frame).bool(), nothing.bool()], dim=1).unsqueeze(1)
            positions = positions[:, -1:] + 1
    return times[0], times[1:]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=sorted(sesame_models.PRESETS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--precision", nargs="+", default=["exact", "int8", "int4"])
    parser.add_argument("--frames", type=int, default=100, help="per run")
    parser.add_argument("--stock-frames", type=int, default=12, help="per run of the stock model")
    parser.add_argument("--prompt", type=int, default=200, help="text positions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--positions", type=int, default=512, help="of the KV buffer")
    parser.add_argument("--out", type=Path, default=None, help="default bench/results/sesame-SIZE-DTYPE-cpu.json")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)

    def made() -> Any:
        model = sesame_models.build(args.size, dtype=dtype)
        model.setup_caches(1)
        return model

    models = {"stock": made()}
    for precision in args.precision:
        models[precision] = accelerate(made(), precision=precision, max_positions=args.positions)
    rows: dict[str, dict[str, list[float]]] = {name: {"first": [], "frame": []} for name in models}
    speeds = []
    bar = Progress(args.rounds * len(models), "rounds", True)
    for number in range(args.rounds + 1):
        speeds.append(streaming_bandwidth(torch.device("cpu")))
        for name, model in models.items():
            count = args.stock_frames if name == "stock" else args.frames
            first, later = speak(model, args.prompt, count if number else 4)
            if number:  # the first round warms up
                rows[name]["first"].append(first)
                rows[name]["frame"].append(statistics.median(later))
                bar.advance(name)
    bar.close()
    medians = {name: {key: 1e3 * statistics.median(found) for key, found in row.items()} for name, row in rows.items()}
    result = {
        "machine": machine(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "streaming_gb_per_s": [min(speeds), max(speeds)],
        "ms": medians,
        "ratio": {name: medians["stock"]["frame"] / row["frame"] for name, row in medians.items()},
        "counters": {
            name: model.acceleration.metrics.snapshot()["counters"] for name, model in models.items() if name != "stock"
        },
    }
    out = args.out or Path(__file__).parent / "results" / f"sesame-{args.size}-{args.dtype}-cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"{'':<8} {'first frame':>12} {'ms per frame':>13} {'ratio':>6}")
    for name, row in medians.items():
        print(f"{name:<8} {row['first']:>12.0f} {row['frame']:>13.1f} {result['ratio'][name]:>6.1f}")
    print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
