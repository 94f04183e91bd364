"""Triton 3.6's CPU interpreter: repairs, applied once when kernels run interpreted, and programs that run side by side.

- numpy from 2.4 on refuses ``int(np.array([3]))``, which every ``range(0, argument)`` needs.
- fp32 to bf16 truncates where a GPU rounds to nearest even, fp32 to fp8 is off by one code: torch casts instead.
- ``tl.dot`` multiplies the raw bits of bf16: widened first.
- Programs run one after the other, so one that waits for another waits for ever: :func:`concurrent` interleaves them.
- Every launch, and every call of one jitted function by another, looks through all of ``triton.language`` for what is to be
  replaced, a third of a test's time: replaced once, and for good, since such a process compiles nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import math
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from csm_kernels._target import interpreting
from csm_kernels._tiles import override_tiles


def large_tiles(op: str, **sizes: int) -> contextlib.AbstractContextManager[None]:
    """Tiles so large that few programs are left, which is what interpreting one costs; compiled they would be absurd."""
    return override_tiles(op, **sizes) if interpreting() else contextlib.nullcontext()


def repair() -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    floats = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }
    stored_as_bits = (tl.bfloat16, tl.float8e4nv, tl.float8e5, tl.float16)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.float64}
    host = {1: np.uint8, 2: np.int16, 4: np.float32, 8: np.float64}

    def cast(data: Any, source: Any, target: Any) -> Any:
        raw = np.ascontiguousarray(data)
        value = torch.from_numpy(raw.view(host[raw.itemsize])).view(floats[source]).to(floats[target])
        value = value.view(bits[value.element_size()]) if target in stored_as_bits else value
        return value.numpy().view(interpreter._get_np_dtype(target)).reshape(np.shape(data))

    stock_cast, stock_float, stock_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    stock_patch = interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if a in floats and b in floats:
            return handle(cast(source.data, a, b), b)
        if a == tl.bfloat16:
            return handle(cast(source.data, a, tl.float32).astype(interpreter._get_np_dtype(target)), b)
        if b == tl.bfloat16:
            return handle(cast(source.data.astype(np.float32), tl.float32, b), b)
        return stock_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if a in floats and b in floats:
            return handle(cast(source.data, a, b), b)
        return stock_float(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        def wide(x: Any) -> Any:
            kind = x.dtype.scalar
            narrow = kind in (tl.bfloat16, tl.float8e4nv, tl.float8e5)
            return handle(cast(x.data, kind, tl.float32), tl.float32) if narrow else x

        return stock_dot(self, wide(a), wide(b), c, precision, imprecise)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing_to_restore = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda kernel: nothing_to_restore


class Deadlock(RuntimeError):
    """The programs of a launch went on taking turns beyond the limit: one waits for what never comes."""


class _Unwind(BaseException):
    """Ends a program whose launch has failed elsewhere; no kernel's ``except Exception`` stops it."""


class Turns:
    """The programs of one launch as threads under a baton: whoever holds it runs, all others sleep.

    A thread starts when its program is first chosen, so a kernel without atomics has one at a time.

    Args:
        programs: place in the grid, and what runs there.
        take: called with a program's index whenever it has been handed the baton.
        seed: chooses the order.
        limit: turns after which this is a deadlock.
    """

    def __init__(
        self,
        programs: list[tuple[tuple[int, int, int], Callable[[], None]]],
        take: Callable[[int], None],
        seed: int,
        limit: int,
    ) -> None:
        self.programs = programs
        self.take = take
        self.limit = limit
        self.switches = 0
        self.failure: BaseException | None = None
        self._random = random.Random(seed)
        self._waiting = list(range(len(programs)))
        self._looked: set[int] = set()
        self._idle: set[int] = set()
        self._holder = -1
        self._turns = [threading.Semaphore(0) for _ in programs]
        self._threads: list[threading.Thread | None] = [None] * len(programs)
        self._finished = threading.Event()

    def run(self) -> None:
        """Run every program to its end; raise what the first of them to fail raised."""
        try:
            self._pass_on()
            self._finished.wait()
        except BaseException as error:  # the caller was interrupted: the programs end at their next turn
            self.failure = self.failure or error
            self._finished.wait()
        for thread in self._threads:
            if thread is not None:
                thread.join()
        if self.failure is not None:
            raise self.failure

    def look(self) -> None:
        """The holder is about to read an atomic: if it has seen what is there, others go on until somebody changes it."""
        me = self._holder
        if me in self._looked:
            self._idle.add(me)
        self.switch()
        self._idle.discard(me)
        self._looked.add(me)

    def change(self) -> None:
        """The holder has changed an atomic: whoever waits may look again."""
        self._looked.clear()
        self._idle.clear()
        self.switch()

    def switch(self) -> None:
        """A random program goes on, perhaps the same."""
        self.switches += 1
        if self.switches > self.limit and self.failure is None:
            waiting = ", ".join(str(self.programs[i][0]) for i in self._waiting)
            self.failure = Deadlock(f"no end after {self.limit} atomic operations; still running: programs {waiting}")
        me = self._holder
        if self.failure is None and self._pass_on() != me:
            self._turns[me].acquire()
            self._take(me)
        if self.failure is not None:
            raise _Unwind

    def _pass_on(self) -> int:
        chosen = self._random.choice([i for i in self._waiting if i not in self._idle] or self._waiting)
        if self._threads[chosen] is None:
            context = contextvars.copy_context()  # numpy's error state lives there
            name = f"program {self.programs[chosen][0]}"
            thread = threading.Thread(target=context.run, args=(self._program, chosen), name=name, daemon=True)
            self._threads[chosen] = thread
            thread.start()
        if chosen != self._holder:
            self._turns[chosen].release()
        return chosen

    def _take(self, me: int) -> None:
        self._holder = me
        self.take(me)

    def _program(self, me: int) -> None:
        self._turns[me].acquire()
        self._take(me)
        try:
            if self.failure is None:
                self.programs[me][1]()
        except _Unwind:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        self._waiting.remove(me)
        self._idle.discard(me)
        if self.failure is not None:  # those that have not started never do
            self._waiting = [i for i in self._waiting if self._threads[i] is not None]
        if self._waiting:
            self._pass_on()
        else:
            self._finished.set()


class _Recorder:
    """Stands in for a kernel in the interpreter's loop over the grid; runs all programs at the last of them."""

    def __init__(self, kernel: Callable[..., None], run: Callable[[list[Any]], None]) -> None:
        self.__name__ = kernel.__name__
        self.__globals__ = kernel.__globals__
        self.__signature__ = inspect.signature(kernel)
        self._kernel = kernel
        self._run = run
        self._programs: list[tuple[tuple[int, int, int], Callable[[], None]]] = []

    def __call__(self, **arguments: Any) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self._programs.append((interpreter_builder.grid_idx, lambda: self._kernel(**arguments)))
        if len(self._programs) == math.prod(interpreter_builder.grid_dim):
            self._run(self._programs)


class Run:
    """What happened in a :func:`concurrent` block."""

    def __init__(self) -> None:
        self.switches: list[int] = []
        """Per launch, how many atomic operations there were: after each of them the baton may have moved."""


@contextlib.contextmanager
def concurrent(seed: int, limit: int = 200_000) -> Iterator[Run]:
    """Inside this block the programs of a launch run interleaved: at each atomic operation a random one goes on.

    Exactly one program runs at a time. The order is the same for the same seed, launches and arguments; every launch has
    an order of its own. Plain loads and stores are no turning points: a program that does no atomic operation runs in one
    piece, and memory is sequentially consistent, so what is found is missing and wrong waiting, not a missing release.
    One block at a time, interpreted kernels only.

    Args:
        seed: chooses the order.
        limit: atomic operations after which a launch is taken for a deadlock; the default takes about a minute.

    Yields:
        The counts, per launch.

    Raises:
        Deadlock: in the launching call, when a launch goes beyond the limit.
        triton.runtime.errors.InterpreterError: what a program raised, as without this block.
    """
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    stock_call, stock_rmw, stock_cas = executor.__call__, builder.create_atomic_rmw, builder.create_atomic_cas
    run, active = Run(), []

    def run_programs(programs: list[Any]) -> None:
        def take(program: int) -> None:
            interpreter.interpreter_builder.set_grid_idx(*programs[program][0])

        launch = Turns(programs, take, hash((seed, len(run.switches))), limit)
        active.append(launch)
        try:
            launch.run()
        finally:
            active.pop()
            run.switches.append(launch.switches)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        self.fn = _Recorder(self.fn, run_programs)
        try:
            stock_call(self, *args, **kwargs)
        except InterpreterError as error:
            if isinstance(error.__cause__, Deadlock):
                raise error.__cause__ from None
            raise

    def rmw(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        looks = operation == interpreter._ir.ATOMIC_OP.ADD and not np.any(value.data)
        if active and looks:
            active[-1].look()
        result = stock_rmw(self, operation, pointer, value, *rest)
        if active and not looks:
            active[-1].change()
        return result

    def cas(self: Any, *args: Any) -> Any:
        result = stock_cas(self, *args)
        if active:
            active[-1].change()
        return result

    executor.__call__ = call
    builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
    try:
        yield run
    finally:
        executor.__call__ = stock_call
        builder.create_atomic_rmw, builder.create_atomic_cas = stock_rmw, stock_cas
