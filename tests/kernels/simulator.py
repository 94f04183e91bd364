"""ttsem with programs side by side, which tells waiting from racing.

ttsem itself runs one program after the other and takes every address that one program writes and another one reads for a
race: a grid barrier means nothing to it, and a bounded wait gives up. :func:`side_by_side` interleaves the programs of a
launch as ``interpreter.concurrent`` does and lets ttsem compare only accesses that nothing orders.

What orders is what orders on a GPU, program by program: a release publishes what its program did before its last
``debug_barrier``, for before that its other threads may not have stored yet; an acquire takes effect at the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kernels.interpreter import Turns

_ACQUIRE, _RELEASE, _BOTH = 2, 3, 4  # Triton's MemSemantic


def simulating() -> bool:
    """Whether ttsem runs the kernels, as in ``make race-check``."""
    return "ttsem" in sys.modules


class _Part(NamedTuple):
    """What a program did between two of its barriers; stands where ttsem's log names the program."""

    place: tuple[int, int, int]
    program: int
    clock: tuple[int, ...]
    """Of every program, up to which of its parts this one knows everything; of its own, which one it is."""

    def before(self, other: _Part) -> bool:
        """Whether this part is over, for all to see, when the other begins."""
        return self.clock[self.program] <= other.clock[self.program]


class _Order:
    """Who knows what of whom: vector clocks."""

    def __init__(self, programs: int) -> None:
        self.known = [[0] * programs for _ in range(programs)]
        self.acquired = [[0] * programs for _ in range(programs)]
        self.published = [[0] * programs for _ in range(programs)]
        self.released: dict[int, list[int]] = {}
        """By address, what an acquire there brings."""
        for program in range(programs):
            self.barrier(program)

    def barrier(self, program: int) -> None:
        """Its threads have waited for each other: what one acquired all know, and what any stored one can release."""
        self.known[program] = _join(self.known[program], self.acquired[program])
        self.published[program] = list(self.known[program])
        self.known[program][program] += 1

    def atomic(self, program: int, addresses: list[int], order: int) -> None:
        """It has done an atomic operation; a relaxed one carries on what was released there before."""
        for address in addresses:
            there = self.released.get(address, [0] * len(self.known))
            if order in (_ACQUIRE, _BOTH):
                self.acquired[program] = _join(self.acquired[program], there)
            if order in (_RELEASE, _BOTH):
                self.released[address] = _join(there, self.published[program])


def _join(one: list[int], other: list[int]) -> list[int]:
    return [max(pair) for pair in zip(one, other)]


class _Launch:
    """One launch: the turns of its programs and the order of what they do."""

    def __init__(self, interp: Any, function: str, arguments: list[Any], seed: int, limit: int) -> None:
        from ttsem.interp import grid_order

        self.interp = interp
        self.places = list(grid_order(interp.num_programs))
        self.order = _Order(len(self.places))
        self.holder = -1
        body = interp.module.funcs[function].regions[0]

        def program() -> None:
            interp.scopes = []
            interp.run_region(body, list(arguments))

        self.turns = Turns([(place, program) for place in self.places], self.take, seed, limit)

    def take(self, program: int) -> None:
        self.holder = program
        place = self.places[program]
        self.interp.program_id = place
        self.interp.memory.agent = _Part(place, program, tuple(self.order.known[program]))

    def barrier(self) -> None:
        self.order.barrier(self.holder)
        self.take(self.holder)

    def atomic(self, addresses: list[int], order: int) -> None:
        self.order.atomic(self.holder, addresses, order)
        self.turns.switch()


@contextlib.contextmanager
def side_by_side(seed: int, limit: int = 200_000) -> Iterator[None]:
    """Inside this block ttsem runs the programs of a launch interleaved and knows acquire, release and grid barriers.

    A race is reported as always, by a ``KernelFault`` in the launching call, and whether two accesses race depends on the
    schedule only as far as the schedule changes what a program does or whose release it sees.

    Args:
        seed: chooses the order of every launch.
        limit: atomic operations after which a launch is taken for a deadlock, which ttsem reports as ``Unjudged``.
    """
    from ttsem import pidraces
    from ttsem.interp import Interp
    from ttsem.ops import OPS

    stock_grid, stock_race, stock_ops = Interp.run_grid, pidraces.find_race, dict(OPS)
    active: list[_Launch] = []

    def run_grid(self: Any, function: str, arguments: list[Any]) -> None:
        active.append(_Launch(self, function, arguments, seed, limit))
        try:
            active[-1].turns.run()
        finally:
            active.pop()

    def atomic(name: str) -> Callable[[Any, Any, list[Any]], list[Any]]:
        def operation(interp: Any, op: Any, args: list[Any]) -> list[Any]:
            result = stock_ops[name](interp, op, args)
            addresses = np.asarray(args[0], dtype=np.int64).reshape(-1)
            if name == "tt.atomic_rmw" and len(args) > 2:
                addresses = addresses[np.broadcast_to(np.asarray(args[2], bool), np.shape(args[0])).reshape(-1)]
            active[-1].atomic(addresses.tolist(), int(op.attrs["sem"]))
            return result

        return operation

    def barrier(interp: Any, op: Any, args: list[Any]) -> list[Any]:
        active[-1].barrier()
        return stock_ops[op.name](interp, op, args)

    def find_race(log: list[Any] | None) -> Any:
        parts: dict[_Part, list[Any]] = {}
        for part, *rest in log or ():
            parts.setdefault(part, []).append((part.place, *rest))
        for one, other in itertools.combinations(parts, 2):
            if one.program != other.program and not one.before(other) and not other.before(one):
                race = stock_race(parts[one] + parts[other])
                if race is not None:
                    return race
        return None

    Interp.run_grid, pidraces.find_race = run_grid, find_race
    OPS.update({name: atomic(name) for name in ("tt.atomic_rmw", "tt.atomic_cas")})
    OPS.update({name: barrier for name in ("ttg.barrier", "gpu.barrier")})
    try:
        yield
    finally:
        Interp.run_grid, pidraces.find_race = stock_grid, stock_race
        OPS.clear()
        OPS.update(stock_ops)
