"""Stage 5: GB/s of every phase and ms of every frame; both drivers, all formats, batch 1, 4 and 16.

A phase is timed alone, all its launches of a frame in one graph: the depth decoder's small matrices are then in the
second-level cache, as most of them are in a frame, its large ones are not, for together they are larger than it. At one
row it is timed in its place as well: what the frame takes less without it, which counts what overlaps only once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from csm_kernels.depth.kernel import Launch, depth_launches, layer_launches, run_launches
from csm_kernels.quant import format_of
from stages import models
from stages.common import Stage, gb_per_s, ratio


def run(stage: Stage) -> None:
    """Whole frames first, batch 1 before the others: a time-out takes the least important."""
    size = models.TINY if stage.rehearse else models.REAL
    build = functools.cache(lambda fmt: models.build(size, fmt, stage.device))
    stream = (stage.earlier(1).get("summary") or {}).get("stream_gb_per_s")
    stage.put("stream_gb_per_s", stream)
    batches = (1, 2) if stage.rehearse else models.BATCHES
    for batch in batches:
        for fmt in models.FORMATS:
            if stage.rehearse and batch > 1 and fmt not in ("bfloat16", "int4"):
                continue
            for driver in models.DRIVERS:
                name = f"{fmt} batch {batch} {driver}"
                stage.measure(name, lambda f=fmt, b=batch, d=driver: _frame(stage, build(f), b, d, stream))
    for batch in batches:
        for fmt in models.FORMATS:
            if stage.rehearse and (batch > 1 or fmt in ("fp8", "int4")):
                continue
            name = f"{fmt} batch {batch} phases"
            stage.measure(name, lambda f=fmt, b=batch: _phases(stage, build(f), b, stream))


def _frame(stage: Stage, model: models.Model, batch: int, driver: str, stream: float | None) -> dict[str, Any]:
    """A frame as the runtime runs it, and its two stacks alone, against the time its bytes need at stream bandwidth."""
    frame = models.Frame(model, batch, driver)
    sizes = models.frame_bytes(model)
    found: dict[str, Any] = {"format": fmt_of(model), "batch": batch, "driver": driver, "bytes": sum(sizes.values())}
    for name, work, size in (
        ("frame", frame.frame, found["bytes"]),
        ("depth", frame.depth, sizes["depth"]),
        ("backbone", frame.stack, sizes["backbone"]),
    ):
        frame.rewind()
        took = stage.timed(work)
        floor = None if stream is None else size / stream / 1e6
        found |= {f"{name}_ms": took["ms"], f"{name}_floor_ms": floor, f"{name}_share": ratio(floor, took["ms"])}
        found |= {f"{name}_how": took["how"]} | ({f"{name}_why": took["why"]} if "why" in took else {})
    frame.check_flags()
    found["times_real_time"] = None if found["frame_ms"] is None else 80.0 * batch / found["frame_ms"]
    return found


def fmt_of(model: models.Model) -> str:
    """The format of the model's matrices, as the tile table names it."""
    return format_of(model.weights.depth.stack.qkv)


def _phases(stage: Stage, model: models.Model, batch: int, stream: float | None) -> dict[str, Any]:
    """A line per phase of the launches driver, backbone and depth decoder."""
    frame = models.Frame(model, batch, "launches")
    layers = range(model.size.backbone.layers)

    def depth() -> Iterator[Launch]:
        return depth_launches(frame.depth_plan, frame.depth_args, batch, 0)

    def backbone() -> Iterator[Launch]:
        plan, given = frame.stack_plan, frame.stack_args
        return (launch for l in layers for launch in layer_launches(plan, given, batch, batch, 2, l, 0))

    lines = []
    for stack, plan, launches, packed in (
        ("depth", frame.depth_plan, depth, model.weights.depth),
        ("backbone", frame.stack_plan, backbone, model.weights.backbone),
    ):
        per_launch = models.phase_bytes(packed)
        whole = _picked(stage, plan, launches, lambda _: True) if batch == 1 else None
        for phase in dict.fromkeys(launch[0] for launch in launches()):
            count = sum(launch[0] == phase for launch in launches())
            size = per_launch.get(phase, 0) * count or _cached_bytes(frame, stack, phase) * count
            alone = _picked(stage, plan, launches, lambda name, p=phase: name == p)
            rest = _picked(stage, plan, launches, lambda name, p=phase: name != p) if batch == 1 else None
            speed = gb_per_s(size, alone) if size else None
            line = {"stack": stack, "phase": phase, "launches": count, "bytes": size, "ms": alone, "gb_per_s": speed}
            line["share_of_stream"] = ratio(speed, stream)
            if whole is not None and rest is not None:
                line["ms_in_frame"] = whole - rest
                within = gb_per_s(size, whole - rest) if size and whole > rest else None
                line |= {"gb_per_s_in_frame": within, "share_of_stream_in_frame": ratio(within, stream)}
            lines.append(line)
    return {"format": fmt_of(model), "batch": batch, "rows": lines}


def _picked(stage: Stage, plan: Any, launches: Callable[[], Iterator[Launch]], keep: Callable[[str], bool]) -> Any:
    """Milliseconds of some of the launches of a frame."""
    return stage.timed(lambda: run_launches(plan, (x for x in launches() if keep(x[0]))), seconds=0.05)["ms"]


def _cached_bytes(frame: models.Frame, stack: str, phase: str) -> int:
    """Keys and values that one launch of the backbone's attention reads; the depth decoder's are next to nothing."""
    if stack != "backbone" or phase != "attend":
        return 0
    shape, context = frame.model.size.backbone, frame.model.size.context
    return 2 * frame.batch * shape.groups * shape.dim * context * frame.state.all_keys.element_size()


def compared(pieces: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, dict[str, Any]]]]:
    """Format, batch and both drivers' results, where both were measured as graphs."""
    for fmt in models.FORMATS:
        for batch in models.BATCHES:
            both = {driver: pieces.get(f"{fmt} batch {batch} {driver}") for driver in models.DRIVERS}
            if all(one and one.get("frame_ms") for one in both.values()):
                yield fmt, batch, both


def sizes_of(size: models.Size, fmt: str, batch: int, stack: str) -> dict[str, Any]:
    """The sizes by which ``csm_kernels.depth.plan`` asks the tile table."""
    shape = size.depth if stack == "depth" else size.backbone
    return {"D": shape.width, "L": shape.layers, "B": batch, "qkv": fmt, "gate_up": fmt}
