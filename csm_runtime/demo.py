"""The demo: one sentence in a reference's voice, by stock and by accelerated generation, timed frame by frame."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_runtime import checkpoints, speech
from csm_runtime.accelerate import accelerate
from csm_runtime.compiling import Progress
from csm_runtime.doctor import machine
from csm_runtime.extras import need
from csm_runtime.tuning import AUTO

REAL_TIME_MS = 1000 / speech.FRAME_RATE
"""Milliseconds of audio in a frame: the time a frame may take in real time."""

WARM_UP_FRAMES = 4


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does; the fields are the options of ``csm-accelerate demo``."""

    model: str = checkpoints.SMALL
    text: str = "Hello from two processor cores, spoken a frame at a time."
    speaker: int = 0
    speech: str | None = None
    reference: str | None = None
    transcript: str | None = None
    frames: int = 50
    repeats: int = 3
    precision: str = "stock"
    dtype: str = "auto"
    device: str = "auto"
    sample: bool = False
    seed: int = 0
    out: str = "demo_out"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("frames", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.speaker < 0:
            raise ValueError(f"speaker must be 0 or more, got {self.speaker}")
        if not self.text.strip():
            raise ValueError("text is empty; give a sentence to say")


class FrameClock:
    """A streamer for ``generate`` that notes when each frame arrives.

    Attributes:
        seconds: of each frame's arrival, counted from the construction of the clock.
    """

    def __init__(self, on_frame: Callable[[], None] | None = None) -> None:
        self._start = time.perf_counter()
        self._on_frame = on_frame
        self._prompt_seen = False
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first, or a frame."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.seconds.append(time.perf_counter() - self._start)
        if self._on_frame is not None:
            self._on_frame()

    def end(self) -> None:
        """Nothing is held back, so nothing is left to do."""


@dataclass(frozen=True)
class Run:
    """One call of ``generate``: its codes ``[frames, codebooks]``, its audio ``[S]``, and times in seconds."""

    codes: Tensor
    audio: Tensor
    arrivals: list[float]
    """When each frame arrived after the call."""
    total: float
    """The whole call: reading the reference, the prompt, the frames and the codec."""

    @property
    def frame_seconds(self) -> list[float]:
        """Time between frames; the first frame, which waits for the prompt, is left out unless it is the only one."""
        later = [b - a for a, b in zip(self.arrivals, self.arrivals[1:])]
        return later or self.arrivals[:1]

    @property
    def real_time_factor(self) -> float:
        """Seconds of computing per second of audio."""
        return self.total * speech.FRAME_RATE / len(self.arrivals)


def run_once(generate: Callable[..., Any], inputs: dict[str, Any], on_frame: Callable[[], None] | None = None) -> Run:
    """Call ``generate`` for one row, with audio, and time it."""
    clock = FrameClock(on_frame)
    start = time.perf_counter()
    out = generate(**inputs, streamer=clock, output_audio=True, return_dict_in_generate=True)
    total = time.perf_counter() - start
    return Run(out.sequences[0].cpu(), out.audio[0].cpu(), clock.seconds, total)


def first_difference(ours: Tensor, theirs: Tensor) -> int | None:
    """The first frame, from 0, in which two ``[frames, codebooks]`` differ, a missing one included; or None."""
    both = min(len(ours), len(theirs))
    differs = (ours[:both] != theirs[:both]).any(-1).nonzero()
    if len(differs):
        return int(differs[0])
    return None if len(ours) == len(theirs) else both


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over the runs of one side, in the units the names say.

    A frame's time is its median over the runs, so that another process's moment on the processor does not count, and
    what the same frame costs every time does.
    """
    per_frame = [statistics.median(times) for times in zip(*(run.frame_seconds for run in runs))]
    return {
        "frames": len(runs[0].arrivals),
        "frames_per_second": len(per_frame) / sum(per_frame),
        "ms_per_frame": 1000 * statistics.median(per_frame),
        "real_time_factor": statistics.median(run.real_time_factor for run in runs),
        "time_to_first_frame_ms": 1000 * statistics.median(run.arrivals[0] for run in runs),
        "total_seconds": statistics.median(run.total for run in runs),
        "per_frame_ms": [1000 * seconds for seconds in per_frame],
    }


def sampling(sample: bool, temperature: float = 0.9, top_k: int = 50) -> dict[str, Any]:
    """Arguments of ``generate`` for both decoders: greedy, or sampled alike."""
    if not sample:
        return {"do_sample": False, "depth_decoder_do_sample": False}
    plain = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    return plain | {f"depth_decoder_{name}": value for name, value in plain.items()}


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run the demo: writes ``speech.wav``, ``metrics.json`` and ``frames.png``, prints one table, returns the metrics.

    Raises:
        ValueError, OSError, ImportError: bad options, files that are not there, packages that are missing.
    """
    for module in ("soundfile", "matplotlib"):
        need(module)
    reference = speech.find_reference(options.speech, options.reference, options.transcript)
    print(f'reference: {reference.path.name}, "{reference.transcript}"')
    turns = [reference.turn(options.speaker), speech.Turn(options.speaker, options.text)]
    print(f"loading model {options.model!r} ...", flush=True)
    model, processor = checkpoints.load(options.model, dtype=options.dtype, device=options.device, seed=options.seed)
    inputs = checkpoints.prepare_inputs(model, processor, speech.conversation(turns))
    start = time.perf_counter()
    calibration = [inputs] if options.precision == AUTO else None
    model = accelerate(model, precision=options.precision, progress=options.progress, calibration=calibration)
    setup = time.perf_counter() - start
    print(f"set-up (packing, compiling, self-test) took {setup:.1f} s; the compiler's cache makes the next one quicker")
    stock, fast = _measure(model, inputs, options)
    metrics = _metrics(model, options, stock, fast, setup)
    _write(Path(options.out), metrics, fast[-1].audio)
    show(metrics)
    return metrics


def _measure(model: Any, inputs: dict[str, Any], options: DemoOptions) -> tuple[list[Run], list[Run]]:
    """Both sides, warmed up, then turn by turn, so that a machine that slows down slows both."""
    wanted = {**inputs, **sampling(options.sample), "max_new_tokens": options.frames}
    seed = {"seed": options.seed} if options.sample else {}

    def stock(on_frame: Callable[[], None] | None = None, **changed: Any) -> Run:
        torch.manual_seed(options.seed)
        return run_once(lambda **kw: type(model).generate(model, **kw), {**wanted, **changed}, on_frame)

    def fast(on_frame: Callable[[], None] | None = None, **changed: Any) -> Run:
        return run_once(model.generate, {**wanted, **seed, **changed}, on_frame)

    few = min(WARM_UP_FRAMES, options.frames)
    bar = Progress(2 * (few + options.repeats * options.frames), "generating", options.progress)
    runs: dict[str, list[Run]] = {"stock": [], "accelerated": []}
    try:
        for name, side in (("stock", stock), ("accelerated", fast)):
            side(partial(bar.advance, f"{name}, warming up"), max_new_tokens=few)
        for _ in range(options.repeats):
            for name, side in (("stock", stock), ("accelerated", fast)):
                runs[name].append(side(partial(bar.advance, name)))
    finally:
        bar.close()
    return runs["stock"], runs["accelerated"]


def _metrics(
    model: Any, options: DemoOptions, stock: Sequence[Run], fast: Sequence[Run], setup: float
) -> dict[str, Any]:
    """Everything the table and the JSON show."""
    ours, theirs = summarize(fast), summarize(stock)
    differing = [i for i in (first_difference(a.codes, b.codes) for a, b in zip(fast, stock)) if i is not None]
    report = model.acceleration.report()
    return {
        "options": asdict(options),
        "machine": machine(),
        "device": report.device,
        "dtype": report.dtype,
        "mode": report.mode,
        "setup_seconds": setup,
        "stock": theirs,
        "accelerated": ours,
        "ratio": ours["frames_per_second"] / theirs["frames_per_second"],
        "tokens_equal": None if options.sample else not differing,
        "first_differing_frame": None if options.sample or not differing else min(differing),
        "report": report.to_dict(),
    }


def _write(out: Path, metrics: dict[str, Any], audio: Tensor) -> None:
    out.mkdir(parents=True, exist_ok=True)
    speech.write_wav(out / "speech.wav", audio)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    plot(metrics, out / "frames.png")


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Draw milliseconds of each frame, stock and accelerated, against real time, as PNG."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tops = [REAL_TIME_MS]
    for name, colour in (("stock", "tab:gray"), ("accelerated", "tab:blue")):
        times = metrics[name]["per_frame_ms"]
        label = f"{name}: {metrics[name]['ms_per_frame']:.0f} ms, {metrics[name]['frames_per_second']:.1f} frames/s"
        axes.plot(range(1, len(times) + 1), times, ".-", color=colour, label=label)
        tops.append(max(times))
    axes.axhline(REAL_TIME_MS, color="tab:red", linestyle="--", label=f"real time: {REAL_TIME_MS:.0f} ms")
    if max(tops) > 10 * metrics["accelerated"]["ms_per_frame"]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(tops))
    axes.set_xlabel("frame (80 ms of speech each)")
    axes.set_ylabel("milliseconds per frame")
    axes.set_title(_title(metrics))
    axes.legend()
    figure.savefig(path, dpi=120)


def _title(metrics: dict[str, Any]) -> str:
    options = metrics["options"]
    return (
        f"model {options['model']}, {metrics['device']}, {metrics['dtype']}, precision {options['precision']}, "
        f"mode {metrics['mode']}"
    )


def rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table: what, stock, accelerated."""
    stock, fast = metrics["stock"], metrics["accelerated"]
    equal, at = metrics["tokens_equal"], metrics["first_differing_frame"]
    verdict = {True: "yes", False: f"no, from frame {at}", None: "not compared (sampled)"}[equal]
    return [
        ("frames per second", f"{stock['frames_per_second']:.1f}", f"{fast['frames_per_second']:.1f}"),
        ("ratio to stock", "1.00", f"{metrics['ratio']:.2f}"),
        (
            "real-time factor (compute s per audio s)",
            f"{stock['real_time_factor']:.2f}",
            f"{fast['real_time_factor']:.2f}",
        ),
        (
            "time to first frame, ms",
            f"{stock['time_to_first_frame_ms']:.0f}",
            f"{fast['time_to_first_frame_ms']:.0f}",
        ),
        ("tokens equal to stock's", "", verdict),
    ]


def show(metrics: dict[str, Any]) -> None:
    """Print the table, with rich where it is installed, then what is to be known about it and where the files are."""
    title, table = _title(metrics), rows(metrics)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for what, stock, fast in (("", "stock", "accelerated"), *table):
            print(f"{what:<42} {stock:>12} {fast:>24}")
    else:
        drawn = Table(title=title)
        drawn.add_column("")
        drawn.add_column("stock", justify="right")
        drawn.add_column("accelerated", justify="right")
        for row in table:
            drawn.add_row(*row)
        console = Console()
        (console if console.is_terminal else Console(width=100)).print(drawn)
    options, report = metrics["options"], metrics["report"]
    print(
        f"medians of {options['repeats']} runs of {metrics['accelerated']['frames']} frames, real time is 12.5 frames/s"
    )
    for note in report["notes"]:
        print(f"note: {note}")
    for reason in report["metrics"]["stock_reasons"]:
        print(f"note: the accelerated side took the stock path: {reason}")
    out = Path(options["out"])
    print(f"wrote {out / 'speech.wav'}, {out / 'metrics.json'} and {out / 'frames.png'}")
    if options["model"] == checkpoints.SMALL:
        print("the small model is untrained: the times are real, the sound is noise; --model sesame/csm-1b speaks")
