"""Programs that run side by side under the interpreter: order, deadlocks, failures, and what is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from csm_kernels._target import interpreting, tl, triton
from kernels import interpreter

if interpreting():
    from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(not interpreting(), reason="about Triton's interpreter")


class Buffers(NamedTuple):
    """Where the kernel below works."""

    ticket: Tensor
    order: Tensor


class Sizes(NamedTuple):
    """What is known when it compiles."""

    TURNS: int
    LANES: int


@triton.jit
def _take_tickets(buffers, sizes: tl.constexpr):
    """Every turn of every program takes a ticket and writes down which program holds it."""
    axes = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    lane = tl.arange(0, sizes.LANES)
    for _ in range(sizes.TURNS):
        ticket = tl.atomic_add(buffers.ticket, 1)
        tl.store(buffers.order + ticket * sizes.LANES + lane, axes)


@triton.jit
def _pass_along(flag_ptr, out_ptr):
    """The last program waits for nobody, every other one for its successor."""
    pid, last = tl.program_id(0), tl.num_programs(0) - 1
    while (pid < last) & (tl.atomic_add(flag_ptr + pid + 1, 0) == 0):
        pass
    tl.store(out_ptr + pid, 1 + tl.load(out_ptr + pid + 1, mask=pid < last, other=0))
    tl.atomic_xchg(flag_ptr + pid, 1)


@triton.jit
def _compare_and_swap(lock_ptr, count_ptr):
    """Counts without an atomic addition, inside a lock."""
    while tl.atomic_cas(lock_ptr, 0, 1) != 0:
        pass
    seen = tl.load(count_ptr)
    tl.atomic_add(lock_ptr, 0)  # a chance for others to come in between
    tl.store(count_ptr, seen + 1)
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def _wait_for_what_never_comes(flag_ptr):
    while (tl.program_id(0) > 0) & (tl.atomic_add(flag_ptr, 0) == 0):
        pass


@triton.jit
def _one_fails(ticket_ptr, FAILING: tl.constexpr):
    for _ in range(5):
        tl.atomic_add(ticket_ptr, 1)
        tl.static_assert(tl.program_id(0).handle.data[0] != FAILING, "this one fails")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def holders(seed: int, grid: tuple[int, ...], turns: int = 4) -> tuple[list[int], list[int]]:
    programs = torch.Size(grid).numel()
    ticket, order = torch.zeros(1, dtype=torch.int32), torch.full((programs * turns, 4), -1, dtype=torch.int32)
    with interpreter.concurrent(seed) as run:
        _take_tickets[grid](Buffers(ticket, order), Sizes(turns, 4))
    assert ticket.item() == programs * turns
    assert torch.equal(order, order[:, :1].expand_as(order))
    return order[:, 0].tolist(), run.switches


@pytest.mark.parametrize("grid", [(1,), (5,), (3, 2), (2, 3, 2)])
def test_every_program_runs_and_knows_its_place(grid: tuple[int, ...]) -> None:
    order, switches = holders(0, grid)
    programs = torch.Size(grid).numel()
    assert sorted(order) == sorted(list(range(programs)) * 4)
    assert switches == [programs * 4]


def test_the_seed_decides_the_order() -> None:
    orders = [tuple(holders(seed, (3,))[0]) for seed in range(8)]
    assert orders == [tuple(holders(seed, (3,))[0]) for seed in range(8)]
    assert len(set(orders)) == 8
    assert all(list(order) != sorted(order) for order in orders), "programs ran one after the other"


def test_programs_wait_for_each_other() -> None:
    for seed in range(4):
        flag, out = torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
        with interpreter.concurrent(seed):
            _pass_along[(6,)](flag, out)
        assert out.tolist() == [6, 5, 4, 3, 2, 1]


def test_compare_and_swap_is_a_turning_point_too() -> None:
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with interpreter.concurrent(0) as run:
        _compare_and_swap[(6,)](lock, count)
    assert count.item() == 6
    assert run.switches[0] > 18, "nobody ever found the lock taken"


def test_every_launch_of_a_block_has_its_own_order() -> None:
    orders, ticket = [], torch.zeros(1, dtype=torch.int32)
    with interpreter.concurrent(3) as run:
        for _ in range(3):
            order = torch.zeros(12, 1, dtype=torch.int32)
            _take_tickets[(3,)](Buffers(ticket.zero_(), order), Sizes(4, 1))
            orders.append(tuple(order[:, 0].tolist()))
    assert run.switches == [12, 12, 12]
    assert len(set(orders)) == 3


def test_a_deadlock_is_reported() -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    with interpreter.concurrent(0, limit=200) as run:
        with pytest.raises(interpreter.Deadlock, match=r"200 atomic operations; still running: programs .1, 0, 0., .2"):
            _wait_for_what_never_comes[(3,)](flag)
        _wait_for_what_never_comes[(3,)](flag.fill_(1))
    assert run.switches == [201, 3]


def test_what_a_program_raises_reaches_the_caller() -> None:
    ticket = torch.zeros(1, dtype=torch.int32)
    with interpreter.concurrent(0), pytest.raises(InterpreterError, match="this one fails"):
        _one_fails[(4,)](ticket, FAILING=2)
    assert 1 <= ticket.item() < 20


def test_nothing_stays_patched() -> None:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    def patched() -> tuple[object, ...]:
        return GridExecutor.__call__, InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    before = patched()
    with pytest.raises(KeyError), interpreter.concurrent(0):
        assert all(now is not then for now, then in zip(patched(), before))
        raise KeyError
    assert patched() == before
    out = torch.zeros(12, 1, dtype=torch.int32)
    _take_tickets[(3,)](Buffers(torch.zeros(1, dtype=torch.int32), out), Sizes(4, 1))
    assert out[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
