"""Proves and measures the kernels on the GPU there is: one command, resumable by stage, in calls of nine minutes.

    python bench/campaign.py                    everything; run it again and it goes on where it was stopped
    python bench/campaign.py --stages 1 5       some stages
    python bench/campaign.py --rehearse         small shapes under Triton's interpreter, no GPU, no times

Stages: 0 compile ahead, 1 constants of the device, 2 barrier litmus, 3 replays bit for bit, 4 against fp64, 5 GB/s per
phase and ms per frame, 6 end to end, 7 memory and cold start, 8 the kernels' own tests, 9 the training step. Each runs in
a process of its own under a time limit and writes what it finds as it finds it, so that a hang costs one stage at most.
Afterwards the faster driver of every format and batch is stored in ``csm_kernels/tiles``. A first GPU run has not been
made yet.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT / "bench"), str(ROOT)) if path not in sys.path]

import torch  # noqa: E402
from stages import show, verdicts  # noqa: E402
from stages.common import Stage, fingerprint, read_json, write_json  # noqa: E402


class Spec(NamedTuple):
    """A stage: its file in ``stages``, and the most seconds it may take."""

    number: int
    module: str
    limit: float
    interpreted: bool = True
    """Whether a rehearsal sets ``TRITON_INTERPRET``."""


STAGES = (
    Spec(0, "compiling", 110, interpreted=False),
    Spec(1, "constants", 40),
    Spec(2, "barriers", 45),
    Spec(3, "replay", 60),
    Spec(4, "correctness", 70),
    Spec(5, "speed", 110),
    Spec(6, "end_to_end", 130),
    Spec(7, "start", 100),
    Spec(8, "kernel_tests", 150),
    Spec(9, "training", 100),
)
PROOFS = frozenset({2, 3, 4})
"""Stages without which no driver becomes the default."""
BUDGET = 530.0
_LEAST = 5.0
"""Seconds below which a stage is not begun."""


def run_stage(spec: Spec, journal: Path, rehearse: bool, limit: float) -> int:
    """One stage in this process; 1 where pieces failed."""
    stage = Stage(journal, rehearse=rehearse, limit=limit)
    # A stage that hangs is killed from outside, after a limit that imports count in: by then it has said where it hangs.
    faulthandler.dump_traceback_later(0.75 * limit)
    with stage.prepared():
        importlib.import_module(f"stages.{spec.module}").run(stage)
    faulthandler.cancel_dump_traceback_later()
    for name, message in stage.failed.items():
        print(f"{name}: {message}", file=sys.stderr)
    return 1 if stage.failed else 0


def command(spec: Spec, journal: Path, rehearse: bool, limit: float) -> list[str]:
    """How a stage is started."""
    own = [sys.executable, str(Path(__file__).resolve()), "--stage", str(spec.number), "--journal", str(journal)]
    return [*own, "--limit", f"{limit:.1f}", *(["--rehearse"] if rehearse else [])]


def environment(spec: Spec, state: Path, rehearse: bool) -> dict[str, str]:
    """The package from this checkout, caches beside the journals, and the interpreter where that is asked for."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(state / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(state / "inductor"),
        "CSM_KERNELS_CACHE": str(state / "csm"),
    }
    found.pop("TRITON_INTERPRET", None)
    return found | ({"TRITON_INTERPRET": "1"} if rehearse and spec.interpreted else {})


def attempt(spec: Spec, state: Path, rehearse: bool, left: float) -> dict[str, Any]:
    """Run one stage in its own process; its journal with status, seconds and, where it failed, a message."""
    journal, log = state / f"stage-{spec.number}.json", state / f"stage-{spec.number}.log"
    limit = min(spec.limit if not rehearse else 3 * spec.limit, left)
    start, source = time.monotonic(), fingerprint()
    with log.open("w") as out:
        process = subprocess.Popen(
            command(spec, journal, rehearse, limit),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(spec, state, rehearse),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    found = {"pieces": {}, "errors": {}, **read_json(journal), "stage": spec.number, "name": spec.module}
    found |= {"seconds": time.monotonic() - start, "rehearsal": rehearse, "source": source}
    tail = log.read_text(errors="replace").strip().splitlines()[-3:]
    if code is None:
        found |= {"status": "timed out", "message": f"stopped after {limit:.0f} s", "stacks": stacks(log)}
    elif code == 0:
        found |= {"status": "done", "message": ""}
    else:
        found |= {"status": "failed", "message": f"exit code {code}: {' / '.join(tail)}"[-600:]}
    write_json(journal, found)
    return found


def stacks(log: Path) -> list[str]:
    """What every thread of a stage was doing shortly before it was stopped, without this machine's folders."""
    _, mark, dump = log.read_text(errors="replace").partition("Timeout (")
    lines = (mark + dump).replace(f"{ROOT}{os.sep}", "").replace(f"{sys.prefix}{os.sep}", "").splitlines()
    return lines[:200]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a stage and whatever it has started: they share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process in a driver call may take its time to die
        process.wait(10)


def kept(spec: Spec, state: Path, rehearse: bool) -> dict[str, Any] | None:
    """A stage's journal where it is of the same sources; others are removed."""
    path = state / f"stage-{spec.number}.json"
    found = read_json(path)
    if found and (found.get("source"), found.get("rehearsal")) == (fingerprint(), rehearse):
        return found
    path.unlink(missing_ok=True)
    return None


def campaign(args: argparse.Namespace, device: str, state: Path) -> dict[str, Any]:
    """Run what has been asked for and is not done yet; the whole result, earlier stages included."""
    end = time.monotonic() + args.budget
    if args.fresh:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    stages: list[dict[str, Any]] = []
    stored: list[Path] = []
    for spec in STAGES:
        found = kept(spec, state, args.rehearse)
        left = end - time.monotonic()
        if spec.number in args.stages and (found or {}).get("status") != "done":
            if left >= _LEAST:
                print(f"stage {spec.number} {spec.module} ...", file=sys.stderr, flush=True)
                found = attempt(spec, state, args.rehearse, left)
                print(
                    f"  {found['status']} in {found['seconds']:.0f} s {found['message']}", file=sys.stderr, flush=True
                )
            elif found is None:
                found = {"stage": spec.number, "name": spec.module, "pieces": {}, "errors": {}}
                found |= {"status": "skipped for budget"}
        if found is not None:
            stages.append({"status": "interrupted", "stage": spec.number, "name": spec.module, **found})
        if spec.number == 5 and found is not None:
            stored = pick_drivers(stages, device, state, args.rehearse)
    pieces = {stage["stage"]: stage["pieces"] for stage in stages}
    bars = [] if args.rehearse else [bar._asdict() for bar in verdicts.bars(pieces)]
    return {
        **machine(device, args.rehearse),
        "bars": bars,
        "drivers_stored": [str(path.relative_to(ROOT)) for path in stored],
        "stages": stages,
    }


def pick_drivers(stages: list[dict[str, Any]], device: str, state: Path, rehearse: bool) -> list[Path]:
    """Store the faster driver of every format and batch, so that the stages that follow run with it.

    Only what has been proved is chosen: stages 2 to 4 are done. A rehearsal tries the writing and reading elsewhere.
    """
    if rehearse:
        with tempfile.TemporaryDirectory(dir=state) as folder:
            verdicts.check_table(Path(folder) / "tiles")
        return []
    unproved = PROOFS - {stage["stage"] for stage in stages if stage["status"] == "done"}
    if unproved:
        print(f"no driver is stored: stages {sorted(unproved)} are not done", file=sys.stderr)
        return []
    pieces = next(stage["pieces"] for stage in stages if stage["stage"] == 5)
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    return verdicts.store(verdicts.choices(pieces, device, when))


def machine(device: str, rehearse: bool) -> dict[str, Any]:
    """What the results were made on and with."""
    return {
        "device": device,
        "rehearsal": rehearse,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if not rehearse
        else None,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "source": fingerprint(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*words: str) -> str | None:
    """What a program prints, None where there is none or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; 1 where a stage is not done or a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = [spec.number for spec in STAGES]
    parser.add_argument("--rehearse", action="store_true", help="small shapes under the interpreter, nothing is timed")
    parser.add_argument("--stages", type=int, nargs="+", choices=numbers, default=numbers)
    parser.add_argument("--out", type=Path, help="JSON file, default bench/results/campaign-DEVICE.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything, default %(default)s")
    parser.add_argument(
        "--state", type=Path, help="folder of the stages' journals, default .benchmarks/campaign-DEVICE"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs have found")
    for name, kind in (("--stage", int), ("--journal", Path), ("--limit", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage is not None:
        (spec,) = (spec for spec in STAGES if spec.number == args.stage)
        return run_stage(spec, args.journal, args.rehearse, args.limit)
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU; --rehearse runs every stage small under Triton's interpreter")
    device = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    stem = f"campaign-{device.lower().replace(' ', '-')}"
    aside = Path(tempfile.gettempdir()) / "csm-kernels"  # nothing that a rehearsal gives belongs among results
    state = args.state or (aside / stem if args.rehearse else ROOT / ".benchmarks" / stem)
    out = args.out or (aside if args.rehearse else ROOT / "bench" / "results") / f"{stem}.json"
    result = campaign(args, device, state)
    write_json(out, result)
    text = show.table(result)
    print(text)
    speeds = next((stage["pieces"] for stage in result["stages"] if stage["stage"] == 5), {})
    drawn = not args.rehearse and show.plot(speeds, device, out.with_suffix(".png"))
    print(f"written to {out}" + (f" and {out.with_suffix('.png').name}" if drawn else ""))
    asked = [stage["status"] for stage in result["stages"] if stage["stage"] in args.stages]
    missed = any(bar["passed"] is False for bar in result["bars"])
    return 1 if missed or len(asked) < len(args.stages) or set(asked) - {"done"} else 0


if __name__ == "__main__":
    raise SystemExit(main())
