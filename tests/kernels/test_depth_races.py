"""The persistent depth kernel under ttsem: no race with its barriers, a race with any of them taken out."""

from __future__ import annotations

import pytest
import torch

from csm_kernels._target import tl, triton
from csm_kernels.depth import phases
from csm_kernels.depth.barrier import GRID, NO_SYNC
from kernels.depth_models import TINY, depth_model, few_programs, inputs
from kernels.simulator import side_by_side, simulating
from kernels.test_barrier_races import races
from kernels.test_depth import Step

pytestmark = pytest.mark.skipif(not simulating(), reason="runs under ttsem: make race-check")

SMALL = TINY._replace(layers=1)


def step_of(batch: int = 1, table: bool = True, persistent: bool = True) -> Step:
    packed = depth_model(SMALL, codebooks=3, table=table)
    with few_programs(16):
        given = inputs(packed, batch)
        return Step(packed, given, persistent=persistent, programs=3, device=torch.device("cpu"))


@pytest.mark.parametrize(("batch", "table"), [(1, True), (2, False)], ids=["fused", "batch without table"])
@pytest.mark.parametrize("seed", range(2))
def test_a_frame_has_no_race(batch: int, table: bool, seed: int) -> None:
    step = step_of(batch, table)
    assert step.plan.sync == GRID
    with side_by_side(seed):
        assert not races(step.run)
    assert step.workspace.buffers.sync.tolist()[1] == 0, "no wait gave up"
    assert torch.isfinite(step.logits).all()


def test_a_frame_without_barriers_has_one() -> None:
    step = step_of()
    step.plan = step.plan._replace(sync=NO_SYNC)
    with side_by_side(0):
        assert races(step.run)


def test_launches_have_none() -> None:
    step = step_of(persistent=False)
    step.plan = step.plan._replace(sync=NO_SYNC)
    assert not races(step.run)


@triton.jit
def weak_layer_kernel(
    a,
    s: tl.constexpr,
    QKV: tl.constexpr,
    O: tl.constexpr,
    GATE_UP: tl.constexpr,
    DOWN: tl.constexpr,
    SKIPPED: tl.constexpr,
    SYNC: tl.constexpr,
):
    """One layer of pass 2, with one of its waits left out."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    phases.qkv(pid, programs, 1, 1, 2, 0, 0, a, s, QKV, 0, 100000, SYNC)
    phases.attend_project(
        pid, programs, 1, 1, 2, 0, a, s, O, 0 if SKIPPED == 1 else programs, 100000, SYNC
    )  # fmt: skip
    phases.gate_up(pid, programs, 1, 1, 0, a, s, GATE_UP, 0 if SKIPPED == 2 else 2 * programs, 100000, SYNC)
    phases.down(pid, programs, 1, 1, 0, a, s, DOWN, 0 if SKIPPED == 3 else 3 * programs, 100000, SYNC)


@pytest.mark.parametrize("skipped", [0, 1, 2, 3], ids=["none", "attention", "gate and up", "down"])
def test_one_barrier_taken_out_is_a_race(skipped: int) -> None:

    def races_with(seed: int) -> bool:
        step = step_of()
        step.workspace.whole.zero_()
        step.workspace.buffers.stream.normal_(generator=torch.Generator().manual_seed(seed))  # zeros would hide a race
        sizes, t = step.plan.sizes._replace(FUSE_DRAW=False), step.plan.tiles
        arguments = (step.pointers, sizes, t.qkv, t.o, t.gate_up, t.down, skipped, GRID)
        with side_by_side(seed):
            return races(weak_layer_kernel[(3,)], *arguments, num_warps=4)

    # A program that happens to look when all have arrived is in order after all: a few schedules are tried.
    assert any(races_with(seed) for seed in range(16)) == (skipped > 0)
