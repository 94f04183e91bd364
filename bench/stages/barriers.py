"""Stage 2: a million grid barriers without an error, and a grid too large to be resident, which must be refused."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from csm_kernels._target import interpreting
from csm_kernels.depth.barrier import GRID, GRID_PTX
from stages import models
from stages.common import Stage
from stages.constants import WARPS

BARRIERS = 1_000_000
"""In all, over both formulations and all numbers of warps."""
_ROUNDS = 2000
"""Of one launch: the expected values are computed on the host, round by round."""


def run(stage: Stage) -> None:
    """The litmus test alone and beside a busy stream, then the oversized grid, which might hang."""
    if importlib.util.find_spec("litmus") is None:
        raise RuntimeError("bench/litmus.py is missing: it has the litmus test of the grid barrier")
    for sync in (GRID,) if interpreting() else (GRID, GRID_PTX):
        for warps in WARPS:
            stage.measure(f"litmus sync {sync} {warps} warps", lambda s=sync, w=warps: _litmus(stage, s, w))
    stage.measure("oversized grid", lambda: _oversized(stage))
    stage.put("barriers", sum((stage.get(name) or {}).get("barriers", 0) for name in _names()))


def _names() -> list[str]:
    return [f"litmus sync {sync} {warps} warps" for sync in (GRID, GRID_PTX) for warps in WARPS]


@functools.cache
def _truth(programs: int, warps: int, rounds: int) -> Tensor:
    import litmus

    return litmus.expected(litmus.prepare(programs, warps, "cpu"), rounds)


def _litmus(stage: Stage, sync: int, warps: int) -> dict[str, Any]:
    """Neighbours exchange values; whatever is read a round too early or too late shows in the outcome."""
    import litmus

    programs = 1 if stage.rehearse else torch.cuda.get_device_properties(stage.device).multi_processor_count
    rounds = 5 if stage.rehearse else _ROUNDS
    launches = 2 if stage.rehearse else -(-BARRIERS // (2 * len(WARPS) * rounds))
    truth = _truth(programs, warps, rounds).to(stage.device)
    busy = None if stage.rehearse else torch.ones(64 << 20, device=stage.device)
    other = None if stage.rehearse else torch.cuda.Stream(stage.device)
    wrong = 0
    for launch in range(launches):
        state = litmus.prepare(programs, warps, stage.device)
        if other is not None and launch % 2:
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                for _ in range(20):
                    busy.mul_(1.0)
        values = litmus.exchange(state, rounds, sync, warps=warps)
        wrong += int((values != truth).sum())
        assert state.sync.tolist() == [programs * rounds, 0], f"counter and error word are {state.sync.tolist()}"
    assert wrong == 0, f"{wrong} values were wrong after {launches} launches"
    return {"programs": programs, "barriers": launches * rounds, "launches": launches, "errors": wrong}


def _oversized(stage: Stage) -> dict[str, Any]:
    """The litmus kernel and the depth decoder's own, each with more programs than fit: an error, and the device lives."""
    if stage.rehearse:
        return {"checked": False, "why": "the interpreter knows no cooperative launch"}
    import litmus

    programs = 64 * torch.cuda.get_device_properties(stage.device).multi_processor_count
    frame = models.Frame(models.build(models.TINY, "bfloat16", stage.device), 1, "persistent")
    frame.depth_plan = frame.depth_plan._replace(programs=programs)
    state = litmus.prepare(programs, 8, stage.device)
    messages = {}
    for name, launch in (
        ("litmus", lambda: litmus.exchange(state, 2, GRID_PTX, warps=8)),
        ("depth decoder", frame.depth),
    ):
        try:
            launch()
            torch.cuda.synchronize()
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            raise AssertionError(f"{programs} programs of the {name} kernel were launched: the grid is not cooperative")
    assert float(torch.ones(1000, device=stage.device).sum()) == 1000, "the device does not compute any more"
    return {"checked": True, "programs": programs, "errors": messages}
