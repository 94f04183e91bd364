"""Stage 6: ``generate`` end to end. Stock eager, stock with static cache and compile, stock ops in one CUDA graph, ours.

"Stock ops in one CUDA graph" is the engine's mode ``library``: the whole depth loop and the backbone step as library
calls in a graph per frame, which is what a port of that idea without kernels of its own reaches.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from csm_runtime import accelerate
from csm_runtime.demo import FrameClock
from csm_runtime.engine import MODES
from csm_runtime.small_model import build_small_csm
from stages.common import Stage

FRAME_MS = 80.0
_GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


def build(stage: Stage) -> Any:
    """CSM-1B's shapes with random weights in bf16; in a rehearsal a model that the interpreter can run."""
    if stage.rehearse:
        return build_small_csm(0, layers=1, hidden=256, depth_layers=1, depth_hidden=64, codebooks=3, positions=128)
    import e2e

    return e2e.build("1b", torch.bfloat16).to(stage.device)


def fast_mode(stage: Stage) -> str:
    """Ours: the fused kernels in a graph, interpreted as plain launches."""
    return "kernels" if stage.rehearse else "graph"


def prompt(stage: Stage, rows: int = 1) -> Tensor:
    """Text of ordinary tokens."""
    count = 6 if stage.rehearse else 100
    ids = torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(1))
    return ids.repeat(rows, 1).to(stage.device)


def run(stage: Stage) -> None:
    """What the bars need first, what takes longest last; every way on the same weights and prompt."""
    model = build(stage)
    stage.measure("stock eager", lambda: _timed(stage, model, 1, frames=6))
    for name, mode, precision, rows in (
        ("ours, bfloat16", fast_mode(stage), "stock", 1),
        ("stock ops in a CUDA graph", "eager" if stage.rehearse else "library", "stock", 1),
        ("ours, int8", fast_mode(stage), "int8", 1),
        ("ours, bfloat16, batch 16", fast_mode(stage), "stock", 16),
        ("ours, int8, batch 16", fast_mode(stage), "int8", 16),
    ):
        if stage.rehearse and rows > 1:
            continue
        stage.measure(name, lambda m=mode, p=precision, r=rows: _accelerated(stage, model, m, p, r))
    if not stage.rehearse:  # compiling takes longer than the whole rehearsal; bench/e2e.py measures it on a CPU
        import e2e

        stage.measure("stock static cache + compile", lambda: _timed(stage, e2e.with_static_cache(model), 1))


def _accelerated(stage: Stage, model: Any, mode: str, precision: str, rows: int) -> dict[str, Any]:
    """One of our modes; the stock model is given back afterwards."""
    if mode not in MODES:
        raise ValueError(f"this build has no mode {mode!r}, only {MODES}")
    start = time.perf_counter()
    capacity = 64 if stage.rehearse else None
    accelerate(model, mode=mode, precision=precision, batch_sizes=(rows,), max_positions=capacity, progress=False)
    took = time.perf_counter() - start
    try:
        found = _timed(stage, model, rows)
        report = model.acceleration.report()
        other = {name: report.metrics[name] for name in ("faults", "stock_reasons") if report.metrics[name]}
        # A mode that falls back runs slower: its time would be no one's, and the bar over it too easy.
        if report.mode != mode or report.notes or other:
            raise RuntimeError(f"mode {mode!r} was asked for, {report.mode!r} ran: {report.notes}, {other}")
        found |= {"mode": report.mode, "frames_equal_to_stock": _equal(stage, found["codes"])}
        return found | {"accelerate_seconds": None if stage.rehearse else took}
    finally:
        model.acceleration.restore()


def _timed(stage: Stage, model: Any, rows: int, frames: int = 24) -> dict[str, Any]:
    """Median milliseconds from frame to frame, greedy; the first run makes what is made lazily and is not counted."""
    frames = 2 if stage.rehearse else frames
    ids = prompt(stage, rows)
    between, first, codes = [], [], None
    for turn in range(1 if stage.rehearse else 3):
        clock = FrameClock()
        codes = model.generate(ids, max_new_tokens=frames, streamer=clock, **_GREEDY)
        if turn or stage.rehearse:
            first.append(clock.seconds[0])
            between += [b - a for a, b in zip(clock.seconds, clock.seconds[1:])]
    assert codes is not None and between, "speech ended before the second frame"
    ms = None if stage.rehearse else 1e3 * statistics.median(between)
    return {
        "rows": rows,
        "frames": codes.shape[1],
        "ms_per_frame": ms,
        "first_frame_ms": None if stage.rehearse else 1e3 * statistics.median(first),
        "times_real_time": None if ms is None else FRAME_MS * rows / ms,
        "codes": codes[0, :6].tolist(),
    }


def _equal(stage: Stage, codes: list[list[int]]) -> int | None:
    """Frames of the first few until one is not stock's: rounding may turn a greedy choice, in bf16 sooner or later."""
    stock = (stage.get("stock eager") or {}).get("codes")
    if stock is None:
        return None
    same = [one == two for one, two in zip(codes, stock)]
    return same.index(False) if False in same else len(same)
