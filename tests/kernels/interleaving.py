"""Programs of one launch, interleaved: the interpreter runs them one after another, so a grid barrier would spin for ever.

Inside :func:`concurrent` every program is a thread, one of them runs at a time, and at every atomic the baton moves to a
random one, though not to one that would look at the same counter again in vain. A missing or weak barrier then reads what
nobody has written yet, in some schedules; a wrong target hangs, which is reported. What this cannot see, because it is
sequentially consistent: a missing ``debug_barrier``, a wrong ``sem`` or ``scope``, programs that are not resident together.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl  # the interpreter looks for it in the module of what it runs

_here = threading.local()
"""``index`` in the grid, ``number`` and ``baton`` of the program this thread runs."""


class Deadlock(RuntimeError):
    """More switches than a launch that makes progress would need."""


class _Baton:
    """Says which of ``count`` programs runs."""

    def __init__(self, count: int, seed: int, limit: int) -> None:
        self._turns = [threading.Semaphore(0) for _ in range(count)]
        self._alive = set(range(count))
        self._looked: set[int] = set()
        self._spinning: set[int] = set()
        self._random = random.Random(seed)
        self._limit = limit
        self.switches = 0
        self.error: BaseException | None = None
        self.done = threading.Event()

    def start(self) -> None:
        """Let one program run."""
        self._turns[self._pick()].release()

    def _pick(self) -> int:
        """Any program but those that would look again at what they have looked at; those only if no other is left."""
        return self._random.choice(sorted(self._alive - self._spinning or self._alive))

    def look(self, me: int) -> None:
        """Before a program reads an atomic."""
        if me in self._looked:
            self._spinning.add(me)
        self.switch(me)
        self._spinning.discard(me)
        self._looked.add(me)

    def change(self, me: int) -> None:
        """After a program has changed an atomic: all others may look again."""
        self._looked.clear()
        self._spinning.clear()
        self.switch(me)

    def wait(self, me: int) -> None:
        """Until it is this program's first turn."""
        self._turns[me].acquire()

    def switch(self, me: int) -> None:
        """Hand the baton on, perhaps to oneself."""
        self.switches += 1
        if self.switches > self._limit and self.error is None:
            self.error = Deadlock(f"{self.switches} switches, programs still running: {sorted(self._alive)}")
        if self.error is None:
            chosen = self._pick()
            if chosen != me:
                self._turns[chosen].release()
                self._turns[me].acquire()
        if self.error is not None:
            raise self.error

    def finish(self, me: int) -> None:
        """This program has ended; so do all others if it failed, each in its turn."""
        self._alive.discard(me)
        self._spinning.discard(me)
        if self._alive:
            self.start()
        else:
            self.done.set()


class Run:
    """What happened inside :func:`concurrent`: ``switches`` of every launch."""

    def __init__(self) -> None:
        self.switches: list[int] = []


def _install(interpreter: Any) -> None:
    """Program numbers by thread, and a switch at every atomic; harmless outside of :func:`concurrent`."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "interleaved", False):
        return

    def program_id(self: Any, axis: int) -> Any:
        index = getattr(_here, "index", None) or self.grid_idx
        return interpreter.TensorHandle(np.array([index[axis]], dtype=np.int32), tl.int32)

    stock_rmw, stock_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    add = interpreter._ir.ATOMIC_OP.ADD

    def atomic_rmw(self: Any, op: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        baton = getattr(_here, "baton", None)
        looks = op == add and not np.any(value.data)
        if baton is not None and looks:
            baton.look(_here.number)
        result = stock_rmw(self, op, pointer, value, *rest)
        if baton is not None and not looks:
            baton.change(_here.number)
        return result

    def atomic_cas(self: Any, *args: Any) -> Any:
        result = stock_cas(self, *args)
        if getattr(_here, "baton", None) is not None:
            _here.baton.change(_here.number)
        return result

    builder.create_get_program_id = program_id
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas
    builder.interleaved = True


def _run(real: Callable[..., Any], calls: list[tuple[tuple[int, ...], dict[str, Any]]], seed: int, limit: int) -> int:
    baton = _Baton(len(calls), seed, limit)

    def program(number: int) -> None:
        index, arguments = calls[number]
        _here.index, _here.number, _here.baton = index, number, baton
        baton.wait(number)
        try:
            if baton.error is None:
                real(**arguments)
        except BaseException as error:
            baton.error = baton.error or error
        finally:
            baton.finish(number)

    threads = [threading.Thread(target=program, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    baton.start()
    baton.done.wait()
    for thread in threads:
        thread.join()
    if baton.error is not None:
        raise baton.error
    return baton.switches


@contextlib.contextmanager
def concurrent(seed: int, limit: int = 500_000) -> Iterator[Run]:
    """Inside this block the programs of every launch are interleaved, the same way for the same ``seed``.

    Args:
        seed: picks the schedule.
        limit: switches after which a launch counts as hung.

    Yields:
        A :class:`Run`.

    Raises:
        Deadlock: a launch needed more than ``limit`` switches. Whatever a program raises is raised too.
    """
    from triton.runtime import interpreter

    _install(interpreter)
    executor = interpreter.GridExecutor
    stock = executor.__call__
    run = Run()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        real, calls = self.fn, []

        def collect(**arguments: Any) -> None:
            # The executor calls its function once per program: all are collected, then run, before it copies results.
            shared = interpreter.interpreter_builder
            calls.append((tuple(shared.grid_idx), arguments))
            if len(calls) == int(np.prod(shared.grid_dim)):
                run.switches.append(_run(real, calls, seed, limit))

        collect.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
        collect.__name__ = real.__name__
        self.fn = collect
        try:
            return stock(self, *args, **kwargs)
        except interpreter.InterpreterError as error:  # it wraps whatever a program raises
            raise error.__cause__ or error from None
        finally:
            self.fn = real

    executor.__call__ = launch
    try:
        yield run
    finally:
        executor.__call__ = stock
