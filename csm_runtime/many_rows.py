"""A call of more rows than the largest bucket: every row is an utterance, and gets a slot as one falls free.

The slots are those of a batcher, and so are faults and the guard, but the thread is the caller's, who holds the model's lock
for the whole call, and what comes out is one batch, as the stock loop makes it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csm_runtime.adapters import hf_call
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.decode_loop import fill_cache
from csm_runtime.engine import BUCKETS
from csm_runtime.generate import Prepared, Seeds
from csm_runtime.guard import FAST, STOCK
from csm_runtime.kv import bytes_of
from csm_runtime.slots import Slots, Speaking

if TYPE_CHECKING:
    from csm_runtime.accelerate import Acceleration

logger = logging.getLogger("csm_runtime")

_SHARE = 0.5
"""Of the memory that is free, for the buffers of the slots: prompts and the codec want some as well."""
_QUICK = ("native", "eager")
"""Modes in which a batch size is there at once; in others one that nobody has used is compiled or captured first."""


def slots_that_fit(handle: Acceleration, sizes: Sequence[int] = BUCKETS) -> int | None:
    """The largest of some bucket sizes for whose buffers there is room, or None.

    More rows make more frames per second at every size that was measured, and nobody listens to a call before its end.
    """
    engine, free = handle._engine, math.inf
    try:
        reading = None if handle.memory.source is None else handle.memory.source.probe()
        if reading is not None:
            free = _SHARE * (reading.free + reading.reclaimable)
    except Exception as error:  # a device that cannot be looked at: a lack of memory will show
        logger.debug("memory cannot be looked at: %s", error)
    for size in sorted(sizes, reverse=True):
        if engine.holds(size) or bytes_of(engine.spec, size, engine.capacity, engine.kv_dtype) <= free:
            return size
    return None


class _Row:
    """A row of the call, as the slots see it."""

    done = False
    heard = False

    def __init__(
        self, number: int, call: Prepared, seeds: Seeds, started: float, first: Callable[[float], None]
    ) -> None:
        self.number, self.call, self.seeds, self.queued_at = number, call, seeds, started
        self.first_frame_at: float | None = None
        self.frames: list[Tensor] = []
        """``[1, codebooks]`` int64 each, on the model's device."""
        self.complete = False
        self.error: BaseException | None = None
        self.since = 0
        """Frames that were there when it got its slot."""
        self.left_at = -math.inf
        """Frames that the slots had made when its last one was there."""
        self._first = first

    def take(self, frame: Tensor) -> None:
        """A frame of it is there."""
        if self.first_frame_at is None:
            self.first_frame_at = time.perf_counter()
            self._first(self.first_frame_at)

    def finish(self, codes: Tensor) -> None:
        """All of it is there."""
        self.complete = True

    def fail(self, error: BaseException) -> None:
        """It will not be there."""
        self.error = error


class ManyRows:
    """The frames of one call, whose rows take turns in the slots.

    A row's codes are those of a call on it alone, with its seed and utterance number and without its padding on the left. The
    stock loop ends when the last row does; what it fills the others up with is made here as well: pads, or, where the
    generation config has no ``eos_token_id``, what a row goes on to say behind the end of its speech.

    Args:
        handle: of the accelerated model.
        call: as the stock ``generate`` has prepared it.
        seeds: of its noise, fitted to its rows.
        whole: False where nobody asks for what lies behind the end of a row's speech, as the codec does not.
    """

    def __init__(self, handle: Acceleration, call: Prepared, seeds: Seeds, whole: bool) -> None:
        self._handle, self._model, self._metrics = handle, handle._model, handle.metrics
        self._call, self._request, self._whole = call, call.request, whole
        self._start, self._on_stock, self._begun = time.perf_counter(), False, False
        self._rows = [
            _Row(
                n,
                call._replace(request=hf_call.row_of(self._model, call.request, n)),
                seeds.of_row(n),
                self._start,
                self._first,
            )
            for n in range(call.request.input_ids.shape[0])
        ]
        self._waiting: deque[_Row] = deque()
        self._most = slots_that_fit(handle) or 1
        self._slots = Slots(handle, self._most, self._next, self._join, at_once=True)
        self._unfit: set[int] = set()

    def run(self) -> Tensor:
        """Make them: ``[N, frames, codebooks]`` int64 on the model's device.

        Raises:
            Interrupted: fallback is forbidden.
            Exception: what the stock model says of a row that the fast path could not speak.
        """
        handle, request, rows = self._handle, self._request, self._rows
        try:
            self._speak(rows)
            longest = max(len(row.frames) for row in rows)
            if not request.pads_finished_rows:
                self._speak([row for row in rows if self._goes_on(row, longest)])
        finally:
            self._slots.vacate()
            self._slots.disown()
        made = torch.full(
            (len(rows), longest, handle._spec.codebooks),
            request.pad_token,
            dtype=torch.int64,
            device=request.input_ids.device,
        )
        for row in rows:
            made[row.number, : len(row.frames)] = torch.cat(row.frames)
        if not self._on_stock:
            self._metrics.count("generate.fast" if handle.guard.rung == FAST else "generate.rung")
        if request.return_dict:
            fill_cache(request, self._keys_and_values(made), self._metrics)
        return made

    # ------------------------------------------------------------------------------------------------------- inside

    def _goes_on(self, row: _Row, longest: int) -> bool:
        """Whether a row is to speak on behind its end; it is prepared for that then."""
        if len(row.frames) == longest:
            return False
        end = self._request.eos_token
        if not self._whole and bool((row.frames[-1] == end).all()):  # the codec takes nothing from here on
            return False
        row.call = row.call._replace(request=replace(row.call.request, eos_token=-1, max_frames=longest))
        row.complete = False
        return True

    def _speak(self, rows: list[_Row]) -> None:
        """Until all of these are complete."""
        slots, guard = self._slots, self._handle.guard
        self._waiting = deque(rows)
        while not all(row.complete for row in rows):
            if guard.rung == STOCK:
                slots.vacate()
                self._waiting = deque(row for row in rows if not row.complete)
                self._rest_on_stock(self._waiting.popleft())
                continue
            there = {row.number for row in rows if row.complete}
            self._resize()
            doubtful = slots.turn()
            if doubtful:
                self._take_back(doubtful)
            for row in rows:
                if row.complete and row.number not in there:
                    row.left_at = slots.frames
                elif row.error is not None:
                    self._refused(row, row.error)

    def _resize(self) -> None:
        """As few slots as those who are left need: one that nobody speaks in costs what the others cost."""
        handle, slots = self._handle, self._slots
        left = min(self._most, len(slots.speaking) + len(self._waiting))
        for size in BUCKETS[: BUCKETS.index(self._most) + 1]:
            if size < left or size in self._unfit:
                continue
            if size == slots.count:
                return
            quick = size in handle._warm or handle._engine.mode in _QUICK
            if (size == self._most or quick and slots_that_fit(handle, [size])) and slots.resize(size):
                return
            self._unfit.add(size)

    def _next(self) -> _Row | None:
        return self._waiting.popleft() if self._waiting else None

    def _join(self, row: _Row) -> Speaking:
        row.since = len(row.frames)
        return Speaking(row, row.call, row.frames)

    def _first(self, at: float) -> None:
        if not self._begun:
            self._begun = True
            self._metrics.observe("first_frame", at - self._start)

    def _take_back(self, doubtful: int) -> None:
        """Rows that have left since the last good frame make theirs again, before those that still wait."""
        good = self._slots.frames + 1 - doubtful  # the frame at which it was found was not counted
        for row in reversed(self._rows):
            lost = row.left_at - good
            if row.complete and lost > 0:
                del row.frames[max(row.since, len(row.frames) - int(lost)) :]
                row.complete, row.left_at = False, -math.inf
                self._waiting.appendleft(row)

    def _refused(self, row: _Row, error: BaseException) -> None:
        """A row whose prompt the fast path cannot take is spoken by the stock model, which may say why not."""
        if self._handle.guard.fallback == "forbid":
            raise error
        what = f"a row's prompt failed: {type(error).__name__}: {error}"
        if self._metrics.fault(what):
            logger.warning("row %d goes on the stock path: %s", row.number, what, exc_info=error)
        row.error = None
        self._rest_on_stock(row)

    def _rest_on_stock(self, row: _Row) -> None:
        if not self._on_stock:
            self._on_stock = True
            self._handle._went_stock("a fault of the fast path")
        while not row.complete:
            codes = self._slots.rest_on_stock(Speaking(row, row.call, row.frames))
            row.frames[:] = codes.split(1)
            # Behind its end a row may say the end again, where the stock loop stops.
            row.complete = row.call.request.eos_token >= 0 or len(row.frames) == row.call.request.max_frames
        row.left_at = -math.inf

    def _keys_and_values(self, made: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """By layer, of all positions but the last frame's, as the stock loop leaves them: by one more pass, in groups.

        The slots' own are overwritten by the next row, and hold neither padding nor the pads of rows that have ended.
        """
        handle, model, step = self._handle, self._model, BUCKETS[-1]
        passes = handle._passes if handle.guard.rung == FAST else Passes(model, False, self._metrics)
        x, mask, positions = hf_call.prompt_with_frames(model, self._request, made[:, :-1])
        positions = positions.expand(len(made), -1)
        groups = []
        for start in range(0, len(made), step):
            part = slice(start, start + step)
            groups.append(passes.prefill(x[part], None if mask is None else mask[part], positions[part]).layers)
        for layer in zip(*groups):
            keys, values = zip(*layer)
            yield torch.cat(keys), torch.cat(values)
