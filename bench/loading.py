"""Time to the first frame and peak memory of a fresh process: from_pretrained() and accelerate() against load().

    python bench/loading.py --size small
    python bench/loading.py --size 1b --precision stock int4 --json bench/results/loading-1b-cpu.json

The checkpoint, random weights in bf16, is written once to a temporary folder. Every run is a process of its own, started
once before with the same arguments and not counted, so that torch.compile's cache and the page cache are warm; rounds are
interleaved. Time counts from the start of the process (imports included) to the first frame of ``generate()``, 100 text
positions, greedy. ``VmHWM`` is the highest resident memory, mapped files included; ``own`` the highest that was not backed
by a file, looked at every 5 ms. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

VARIANTS = ("from_pretrained", "load", "load in the background")
FIGURES = ("imports", "returned", "first_frame", "peak_mb", "own_mb", "after_mb")


def status() -> dict[str, float]:
    """MB of this process by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith("kB"))
    return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines}


def age() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class FirstFrame:
    """A streamer that notes when the first frame came."""

    def __init__(self) -> None:
        self.puts, self.at = 0, 0.0

    def put(self, _: Any) -> None:
        """The prompt, then each frame."""
        self.puts += 1
        if self.puts == 2:
            self.at = age()

    def end(self) -> None:
        """Nothing to do."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One start of one variant, in this process."""
    own, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            own[0] = max(own[0], status()["RssAnon"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    import torch

    from csm_runtime import accelerate
    from csm_runtime.checkpoints import load_model
    from csm_runtime.loading import load

    imports = age()
    options: dict[str, Any] = {"precision": args.precision[0], "progress": False}
    if args.run == "from_pretrained":
        model = load_model(args.folder)
        accelerate(model, drop_originals=args.precision[0] != "stock", **options)
    else:
        model = load(args.folder, background=args.run == "load in the background", **options)
    returned = age()
    first = FirstFrame()
    ids = torch.randint(0, 200, (1, 100), generator=torch.Generator().manual_seed(0))
    codes = model.generate(ids, max_new_tokens=3, do_sample=False, depth_decoder_do_sample=False, streamer=first)
    over.set()
    watcher.join()
    now = status()
    return {
        **{"imports": imports, "returned": returned, "first_frame": first.at},
        **{"peak_mb": now["VmHWM"], "own_mb": max(own[0], now["RssAnon"]), "after_mb": now["VmRSS"]},
        "setup_seconds": dict(model.acceleration.metrics.setup_seconds),
        "codes": codes.tolist(),
        "mode": model.acceleration.mode,
        "notes": list(model.acceleration.notes),
    }


def save(size: str, folder: str) -> None:
    """Write the checkpoint."""
    import torch
    from e2e import build

    build(size, torch.bfloat16).save_pretrained(folder)


def start(*arguments: str) -> str:
    """This script in a process of its own; what it printed last."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "small", "1b"), default="small")
    parser.add_argument("--precision", nargs="+", default=["stock", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoint is, or is to be written and kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.save:
        save(args.size, args.folder)
        return 0
    if args.run:
        print(json.dumps(run(args)))
        return 0
    from csm_runtime.doctor import machine

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or f"{temporary}/model"
        if not Path(folder, "config.json").is_file():
            start("--save", "--size", args.size, "--folder", folder)
        size_mb = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(args.rounds + 1):
            for precision in args.precision:
                for variant in VARIANTS:
                    one = json.loads(start("--run", variant, "--folder", folder, "--precision", precision))
                    if number:
                        runs.setdefault((precision, variant), []).append(one)
    rows = []
    for (precision, variant), made in runs.items():
        row: dict[str, Any] = {"precision": precision, "variant": variant, "mode": made[0]["mode"]}
        row |= {name: statistics.median(one[name] for one in made) for name in FIGURES}
        row["first_frame_range"] = [f(one["first_frame"] for one in made) for f in (min, max)]
        row["same_codes"] = all(one["codes"] == runs[precision, VARIANTS[0]][0]["codes"] for one in made)
        row["setup_seconds"], row["notes"] = made[-1]["setup_seconds"], made[-1]["notes"]
        rows.append(row)
    result = {"machine": machine(), "size": args.size, "checkpoint_mb": size_mb, "rounds": args.rounds, "rows": rows}
    print(f"{args.size}, checkpoint of {size_mb:.0f} MB, medians of {args.rounds}")
    print(
        f"{'precision':10}{'variant':24}{'imports s':>10}{'returns s':>10}{'1st frame s':>12}{'peak MB':>9}{'own MB':>8}"
    )
    for row in rows:
        print(
            f"{row['precision']:10}{row['variant']:24}{row['imports']:10.2f}{row['returned']:10.2f}"
            f"{row['first_frame']:12.2f}{row['peak_mb']:9.0f}{row['own_mb']:8.0f}"
            f"{'' if row['same_codes'] else '  OTHER CODES'}"
        )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return 0 if all(row["same_codes"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
