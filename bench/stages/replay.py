"""Stage 3: both drivers in a CUDA graph, a thousand replays, every bit the same; alone and beside a busy stream."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from csm_runtime.graphs import FrameGraph, Pool
from stages import models
from stages.common import Stage

REPLAYS = 1000
_WATCHED = 4
"""Results that a replay is compared by: codes, logits, the backbone's stream, its newest keys."""


def run(stage: Stage) -> None:
    """bf16 at one row and four, int8 at one."""
    size = models.TINY if stage.rehearse else models.REAL
    build = functools.cache(lambda fmt: models.build(size, fmt, stage.device))
    for fmt, batch in (("bfloat16", 1), ("int8", 1), ("bfloat16", 4))[: 1 if stage.rehearse else 3]:
        for driver in models.DRIVERS:
            frame = functools.cache(lambda f=fmt, b=batch, d=driver: models.Frame(build(f), b, d))
            for beside in (False, True):
                name = f"{fmt} batch {batch} {driver} {'beside a busy stream' if beside else 'alone'}"
                stage.measure(name, lambda make=frame, busy=beside: _replayed(stage, make(), busy))


def _results(frame: models.Frame) -> tuple[Tensor, ...]:
    keys = frame.state.all_keys[:, :, :, frame.model.size.context]
    found = (frame.codes, frame.logits, frame.stream, keys)
    assert len(found) == _WATCHED
    return found


def _replayed(stage: Stage, frame: models.Frame, beside: bool) -> dict[str, Any]:
    """How many replays differ from the first in any bit: none may."""

    def work() -> None:
        frame.depth()
        frame.stack()

    replays = 2 if stage.rehearse else REPLAYS
    if stage.rehearse:
        again = work
    else:
        graph = FrameGraph(work, Pool(stage.device))
        if graph.failure is not None:
            raise RuntimeError(f"capture failed: {graph.failure}")
        again = graph.replay
    again()
    first = [result.clone() for result in _results(frame)]
    different = torch.zeros(_WATCHED, dtype=torch.int64, device=stage.device)
    busy = None if stage.rehearse or not beside else torch.ones(16 << 20, device=stage.device)
    other = None if busy is None else torch.cuda.Stream(stage.device)
    for _ in range(replays):
        if other is not None:
            # Its launches stay ahead of the replays without piling up without end: it waits for the last one.
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                for _ in range(60):
                    busy.mul_(1.0)
        again()
        # Bits, not values: a NaN that stays the same is no difference, minus zero is one.
        differ = [(_bits(new) != _bits(old)).any() for new, old in zip(_results(frame), first)]
        different += torch.stack(differ)
    counts = dict(zip(("codes", "logits", "stream", "keys"), different.tolist()))
    frame.check_flags()
    assert not any(counts.values()), f"of {replays} replays so many differ from the first: {counts}"
    assert float(first[1].abs().max()) > 0, "the logits are all zero: nothing ran"
    return {"replays": replays, "different": counts, "graph": not stage.rehearse}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
