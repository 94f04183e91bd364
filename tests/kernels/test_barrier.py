"""The grid barrier: programs exchange values with their neighbours, with a right barrier and with broken ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from csm_kernels._target import interpreting
from csm_kernels.depth.barrier import GRID, GRID_PTX, NO_SYNC, PDL
from kernels import interpreter
from kernels.cases_barrier import litmus
from kernels.simulator import simulating

ROUNDS = 6
SEEDS = range(16)
PROGRAMS = (2, 3, 5)
ABORTED = 1 << 30
PLENTY = 100_000

on_a_gpu = pytest.mark.skipif(
    interpreting() or simulating() or not torch.cuda.is_available(), reason="needs a CUDA device"
)
interpreted = pytest.mark.skipif(not interpreting(), reason="interleaves programs under Triton's interpreter")


def run(programs: int, seed: int, limit: int = PLENTY, **broken: int) -> tuple[bool, int, int, int]:
    """Whether an exchange was right; the counter, the error word and the atomic operations after it."""
    state = litmus.prepare(programs, 1, "cpu")
    truth = litmus.expected(state, ROUNDS)
    with interpreter.concurrent(seed, limit=10_000) as found:
        values = litmus.exchange(state, ROUNDS, GRID, limit=limit, warps=1, **broken)
    (operations,) = found.switches
    return (torch.equal(values, truth), *state.sync.tolist(), operations)


@interpreted
@pytest.mark.parametrize("programs", (1, *PROGRAMS))
def test_neighbours_see_each_other(programs: int) -> None:
    for seed in SEEDS:
        right, counter, error, operations = run(programs, seed)
        assert (right, counter, error) == (True, programs * ROUNDS, 0), f"seed {seed}"
        assert operations >= 2 * programs * ROUNDS


def test_every_value_depends_on_every_round(device: torch.device) -> None:
    """The exchange would be no test if a stale neighbour could go unnoticed."""
    state = litmus.prepare(5, 1, device)
    truth = litmus.expected(state, ROUNDS)
    assert not torch.equal(truth, litmus.expected(state, ROUNDS - 1))
    for values in (state.values[0], litmus.expected(state, 1)):
        assert len(values.unique()) > 0.95 * values.numel()
    stale: list[Callable[[Tensor], Tensor]] = [lambda values: values.roll(1, 0), lambda values: values.roll(-1, 0)]
    for shift in stale:
        changed = state.values.clone()
        changed[0, 2] = shift(state.values[0])[2]
        assert not torch.equal(litmus.expected(litmus.Exchange(changed, state.sync), 1), litmus.expected(state, 1))


@interpreted
@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("short", [PLENTY, 1], ids=["no wait", "one short"])
def test_a_wait_that_is_too_short_is_caught(programs: int, short: int) -> None:
    results = [run(programs, seed, short=short) for seed in SEEDS]
    assert any(not right for right, *_ in results)
    assert all(error == 0 for _, _, error, _ in results)


@interpreted
@pytest.mark.parametrize("broken", [{"absent": 1}, {"short": -1}], ids=["absent", "one too many"])
@pytest.mark.parametrize("programs", PROGRAMS)
def test_a_grid_that_would_hang_ends(programs: int, broken: dict[str, int]) -> None:
    for seed, limit in zip(SEEDS[:8], itertools.cycle((1, 2, 7, 20))):
        _, counter, error, operations = run(programs, seed, limit, **broken)
        arrivals = (programs - ("absent" in broken)) * ROUNDS
        assert error == 1
        assert ABORTED <= counter <= ABORTED + arrivals
        # Until the first gives up everyone looks `limit` times at most, afterwards once per wait.
        assert limit < operations <= arrivals + programs * (limit + 2) + programs * ROUNDS


@interpreted
@pytest.mark.parametrize("programs", PROGRAMS)
def test_an_impatient_wait_says_so(programs: int) -> None:
    """Nothing is wrong but the limit: one look is too few; after a vain look it takes a change to be asked again."""
    for seed in SEEDS[:4]:
        _, counter, error, _ = run(programs, seed, limit=1)
        assert error == 1 and counter >= ABORTED
    for seed in SEEDS:
        right, counter, error, _ = run(programs, seed, limit=programs + 1)
        assert right and error == 0 and counter < ABORTED


@on_a_gpu
@pytest.mark.parametrize("warps", [1, 4, 8, 16])
@pytest.mark.parametrize("sync", [NO_SYNC, GRID, GRID_PTX, PDL])
def test_on_a_gpu(device: torch.device, sync: int, warps: int) -> None:
    if sync == PDL and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    assert litmus.measure(programs, 500, sync, warps, device)[0]


@on_a_gpu
@pytest.mark.parametrize("sync", [GRID, GRID_PTX])
@pytest.mark.parametrize("broken", [{"absent": 1}, {"short": -1}], ids=["absent", "one too many"])
def test_a_grid_that_would_hang_ends_on_a_gpu(device: torch.device, sync: int, broken: dict[str, int]) -> None:
    state = litmus.prepare(4, 4, device)
    litmus.exchange(state, ROUNDS, sync, limit=1000, **broken)
    counter, error = state.sync.tolist()
    assert error == 1 and counter >= ABORTED
