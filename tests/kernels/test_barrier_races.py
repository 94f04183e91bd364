"""The grid barrier under ttsem: it orders what its programs do, and a weakened one is a race. Part of ``make race-check``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from csm_kernels._target import tl, triton
from csm_kernels.depth.barrier import GRID, NO_SYNC
from kernels.cases_barrier import litmus
from kernels.simulator import side_by_side, simulating

ROUNDS = 4
SEEDS = range(8)
PLENTY = 100_000

pytestmark = pytest.mark.skipif(not simulating(), reason="runs under ttsem: make race-check")


def races(call: Callable[..., object], *args: Any, **kwargs: Any) -> bool:
    """Whether ttsem reports a race in a launch; its exception is a class of ``__main__`` there, so known by its name."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        if type(error).__name__ != "KernelFault" or error.fault.kind != "race":
            raise
        return True
    return False


def run(device: torch.device, programs: int, **broken: int) -> None:
    state = litmus.prepare(programs, 1, device)
    truth = litmus.expected(state, ROUNDS)
    values = litmus.exchange(state, ROUNDS, GRID, limit=PLENTY, warps=1, **broken)
    assert torch.equal(values, truth)
    assert state.sync.tolist() == [programs * ROUNDS, 0]


@pytest.mark.parametrize("programs", [2, 3, 5])
def test_the_barrier_orders_everything(device: torch.device, programs: int) -> None:
    for seed in SEEDS:
        with side_by_side(seed):
            run(device, programs)


@pytest.mark.parametrize("programs", [2, 3, 5])
@pytest.mark.parametrize("short", [PLENTY, 1], ids=["no wait", "one short"])
def test_a_wait_that_is_too_short_is_a_race(device: torch.device, programs: int, short: int) -> None:
    """In most orders: in the others every program happens to look when all have arrived, which orders them after all."""
    found = []
    for seed in SEEDS:
        with side_by_side(seed):
            found.append(races(run, device, programs, short=short))
    assert sum(found) > len(SEEDS) / 2


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_launch_without_barriers_is_a_race(device: torch.device, interleaved: bool) -> None:
    state = litmus.prepare(3, 1, device)
    launch = litmus._exchange_kernel[(3,)]
    with side_by_side(0) if interleaved else contextlib.nullcontext():
        assert races(launch, *state, 0, ROUNDS, PLENTY, NO_SYNC, litmus.LANES, num_warps=1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_launch_per_round_is_none(device: torch.device, interleaved: bool) -> None:
    """What ttsem can say by itself about phases: no two programs of one phase touch what one of them writes."""
    state = litmus.prepare(3, 1, device)
    truth = litmus.expected(state, ROUNDS)
    with side_by_side(0) if interleaved else contextlib.nullcontext():
        assert torch.equal(litmus.exchange(state, ROUNDS, NO_SYNC, warps=1), truth)


@triton.jit
def _hand_over(value_ptr, flag_ptr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr, FENCES: tl.constexpr):
    lane = tl.arange(0, 64)
    if tl.program_id(0) == 0:
        tl.store(value_ptr + lane, lane + 1)
        if FENCES:
            tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem=RELEASE, scope="gpu")
    else:
        while tl.atomic_add(flag_ptr, 0, sem=ACQUIRE, scope="gpu") == 0:
            pass
        if FENCES:
            tl.debug_barrier()
        tl.store(value_ptr + 64 + lane, tl.load(value_ptr + lane))


@pytest.mark.parametrize(
    ("release", "acquire", "fences", "ordered"),
    [
        ("release", "acquire", True, True),
        ("acq_rel", "acq_rel", True, True),
        ("relaxed", "acquire", True, False),
        ("release", "relaxed", True, False),
        ("release", "acquire", False, False),
    ],
)
def test_only_a_release_and_an_acquire_order(
    device: torch.device, release: str, acquire: str, fences: bool, ordered: bool
) -> None:
    """The values would be right every time: only the order tells."""
    for seed in range(3):
        values = torch.zeros(128, dtype=torch.int32, device=device)
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        with side_by_side(seed):
            assert races(_hand_over[(2,)], values, flag, release, acquire, fences) != ordered
        assert not ordered or values[64:].tolist() == list(range(1, 65))
