"""Batching: frames per second of all slots together and what each utterance waits, against calls one after another.

    python bench/batching.py --size small --slots 1 2 4 8

Every round speaks the same utterances, greedily and to a fixed number of frames, with each number of slots and by
``generate()`` one after another, interleaved, and medians are reported: the speed of a shared machine moves from minute to
minute. All utterances are there at the start, so that the waiting is that of a burst.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from e2e import SIZES, build

from csm_runtime import accelerate
from csm_runtime.compiling import Progress
from csm_runtime.doctor import machine

FRAME_SECONDS = 0.08


def prompts(count: int, length: int) -> list[dict[str, Any]]:
    """Text prompts of about ``length`` positions, none as long as the next."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 256, (1, max(1, length - n)), generator=generator)} for n in range(count)]


def one_after_another(model: Any, calls: list[dict[str, Any]]) -> dict[str, float]:
    """``generate()`` call by call, as they would queue for the model."""
    start, ends, frames = time.perf_counter(), [], 0
    for call in calls:
        frames += model.generate(**call).shape[1]
        ends.append(time.perf_counter() - start)
    return figures(ends[-1], frames, ends, [])


def batched(batcher: Any, calls: list[dict[str, Any]]) -> dict[str, float]:
    """All of them through a batcher."""
    start = time.perf_counter()
    utterances = [batcher.submit(**call) for call in calls]
    frames = sum(len(one.result()) for one in utterances)
    took = time.perf_counter() - start
    ends = [one.ended_at - one.queued_at for one in utterances]
    firsts = [one.first_frame_at - one.queued_at for one in utterances]
    return figures(took, frames, ends, firsts) | {
        "speaking_seconds": statistics.median(one.ended_at - one.started_at for one in utterances)
    }


def one_call(generate: Any, calls: list[dict[str, Any]]) -> dict[str, float]:
    """All of them as rows of one batch, padded on the left."""
    prompts = [call["input_ids"][0] for call in calls]
    width = max(map(len, prompts))
    pad = [torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in prompts]
    mask = [torch.nn.functional.pad(torch.ones_like(ids), (width - len(ids), 0)) for ids in prompts]
    batch = {**calls[0], "input_ids": torch.stack(pad), "attention_mask": torch.stack(mask)}
    start = time.perf_counter()
    made = generate(**batch)
    took = time.perf_counter() - start
    return figures(took, made.shape[0] * made.shape[1], [took] * len(calls), [])


def figures(took: float, frames: int, ends: list[float], firsts: list[float]) -> dict[str, float]:
    """Of one round."""
    row = {
        "frames_per_second": frames / took,
        "seconds_to_the_end": statistics.median(ends),
        "most_seconds_to_the_end": max(ends),
    }
    return row | ({"seconds_to_the_first_frame": statistics.median(firsts)} if firsts else {})


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "1b"], default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--precision", default="stock")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--utterances", type=int, default=16)
    parser.add_argument("--frames", type=int, default=25, help="of every utterance")
    parser.add_argument("--prompt", type=int, default=60, help="text positions of the longest prompt")
    parser.add_argument(
        "--one-call", action="store_true", help="all of them as rows of one batch as well, and by stock"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--positions", type=int, default=512, help="of the KV buffers")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON, default bench/results/batching-SIZE-DTYPE-DEVICE.json"
    )
    args = parser.parse_args(argv)
    model = build(args.size, getattr(torch, args.dtype))
    model.config.codebook_eos_token_id = -1  # to the last frame
    accelerate(model, precision=args.precision, max_positions=args.positions)
    drawn = {"max_new_tokens": args.frames, "do_sample": False, "depth_decoder_do_sample": False}
    calls = [{**prompt, **drawn} for prompt in prompts(args.utterances, args.prompt)]
    names = ["generate", *(["one call", "stock call"] if args.one_call else []), *map(str, args.slots)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    bar = Progress(args.rounds * len(rounds), "rounds", True)
    for number in range(args.rounds + 1):  # the first warms up
        some = calls if number else calls[:2]
        for name, made in rounds.items():
            if name == "generate":
                row = one_after_another(model, some)
            elif name == "one call":
                row = one_call(model.generate, calls)  # of few rows it would not warm up
            elif name == "stock call":
                row = one_call(functools.partial(type(model).generate, model), some)
            else:
                with model.acceleration.batcher(slots=int(name), queue=len(calls)) as batcher:
                    row = batched(batcher, some)
            if number:
                made.append(row)
                bar.advance(name)
    bar.close()
    rows = {
        name: {key: statistics.median(row[key] for row in made) for key in made[0]} for name, made in rounds.items()
    }
    report = model.acceleration.report()
    result = {
        "machine": machine(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "mode": report.mode,
        "kv_bytes": report.kv_bytes,
        "real_time_frames_per_second": 1 / FRAME_SECONDS,
        "rows": rows,
        "ratio_to_generate": {
            name: row["frames_per_second"] / rows["generate"]["frames_per_second"] for name, row in rows.items()
        },
        "guard": report.guard["counters"],
        "faults": dict(report.metrics["faults"]),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = args.out or Path(__file__).parent / "results" / f"batching-{args.size}-{args.dtype}-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'slots':<10} {'frames/s':>9} {'ratio':>6} {'first frame':>12} {'end, median':>12} {'end, most':>10}")
    for name, row in rows.items():
        first = f"{row['seconds_to_the_first_frame']:.2f} s" if "seconds_to_the_first_frame" in row else "-"
        print(
            f"{name:<10} {row['frames_per_second']:>9.1f} {result['ratio_to_generate'][name]:>6.2f} {first:>12} "
            f"{row['seconds_to_the_end']:>10.2f} s {row['most_seconds_to_the_end']:>8.2f} s"
        )
    print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
