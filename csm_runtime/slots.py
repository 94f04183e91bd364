"""Rows of one engine that utterances join and leave between frames, for whoever holds the model's lock.

Neither a join nor a leave compiles or captures anything: a slot is a row of buffers that stay where they are, and what
differs between utterances lies in tensors. A batcher has its frames made here one turn at a time (``batching.py``), a call of
more rows than the largest bucket all of them (``many_rows.py``).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from csm_runtime import ladder
from csm_runtime.adapters.hf_passes import Prefilled
from csm_runtime.calls import Call
from csm_runtime.checks import Sample
from csm_runtime.decode_loop import FrameFault, breach_of, evidence_of, looked
from csm_runtime.engine import bucket_for
from csm_runtime.generate import Seeds
from csm_runtime.guard import FAST, STOCK, Breach, Interrupted, Watch
from csm_runtime.kv import Fault
from csm_runtime.ladder import Seat
from csm_runtime.memory import is_out_of_memory
from csm_runtime.streaming import StreamClosed

if TYPE_CHECKING:
    from csm_runtime.accelerate import Acceleration

logger = logging.getLogger("csm_runtime")

_FRAMES_WITH_ROOM = 128
"""Memory that runs out again within so many frames of making room is a breach: ten seconds of speech."""
_RATE_SECONDS = 10.0
"""What frames per second look back on."""


class Speaker(Protocol):
    """Whose codes a slot makes: an utterance of a batcher, or a row of a call."""

    seeds: Seeds
    queued_at: float
    first_frame_at: float | None
    """``time.perf_counter()``; set by :meth:`take`."""

    @property
    def done(self) -> bool:
        """Whether nobody wants any more of it."""
        ...

    @property
    def heard(self) -> bool:
        """Whether a frame that it has taken cannot be taken back."""
        ...

    def take(self, frame: Tensor) -> None:
        """A frame ``[codebooks]`` of it is there, on the CPU."""
        ...

    def finish(self, codes: Tensor) -> None:
        """All of it is there, ``[F, codebooks]`` on the CPU."""
        ...

    def fail(self, error: BaseException) -> None:
        """It will not be there."""
        ...


@dataclass
class Speaking:
    """An utterance in its slot."""

    utterance: Speaker
    call: Call
    frames: list[Tensor] = field(default_factory=list)
    """``[1, codebooks]`` int64 each, on the model's device."""
    row: int = -1
    watch: Watch | None = None
    length: int = 0
    """The next free slot of its row's cache."""
    loaded: bool = False
    """Whether its row stands behind its latest frame; False before its prefill, and after a fault."""
    since: int = 0
    """Frames that were there when its row was loaded: those after them are of the steps in use."""


def _put_to(utterance: Speaker) -> Callable[[Tensor], None]:
    """Passes frames of the stock path on, for as long as anybody wants them."""

    def put(frame: Tensor) -> None:
        if utterance.done:
            raise StreamClosed
        utterance.take(frame)

    return put


class Slots:
    """Makes the frames of several utterances, all slots at once; whoever calls holds the model's lock, in ``plain_mode``.

    Each utterance is verified by the guard as a call of its own, within one budget.

    Args:
        handle: of the accelerated model.
        count: slots, 1 to 16; buffers and steps are those of the next bucket.
        waiting: the next one that wants a slot, or None; asked where there is one.
        join: its call as the stock ``generate`` has prepared it, and the frames that it has already; None where it needs no
            slot any more. What it raises, the utterance fails with.
        at_once: give all free slots before a frame. Otherwise it is one, while others speak: a prompt keeps them waiting.

    Attributes:
        frames: turns that made a frame, so far.
    """

    def __init__(
        self,
        handle: Acceleration,
        count: int,
        waiting: Callable[[], Any],
        join: Callable[[Any], Speaking | None],
        at_once: bool = False,
    ) -> None:
        size = bucket_for(count)
        assert size is not None
        self._model, self._handle, self._metrics = handle._model, handle, handle.metrics
        self._bucket, self._waiting, self._prepare, self._at_once = size, waiting, join, at_once
        self._rows: list[Speaking | None] = [None] * count
        self._seat: Seat | None = None
        self._runner: Any = None
        self._under: tuple[str, int] | None = None
        """The guard's rung and the handle's revision that the seat is of."""
        self.frames, self._roomed_at, self._doubtful = 0, -_FRAMES_WITH_ROOM, 0
        self._rates: deque[tuple[float, int]] = deque(maxlen=1024)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._rows)

    @property
    def speaking(self) -> list[Speaking]:
        """Those who have a slot."""
        return [one for one in self._rows if one is not None]

    @property
    def frames_per_second(self) -> float:
        """Of all slots together, over the last ten seconds."""
        now = time.perf_counter()
        rates = [(at, count) for at, count in list(self._rates) if now - at <= _RATE_SECONDS]
        span = now - rates[0][0] if rates else 0.0
        return sum(count for _, count in rates[1:]) / span if span > 0 else 0.0

    def warm_up(self) -> None:
        """Have everything compiled before the first utterance comes; what fails fails again with it, and is handled there."""
        try:
            self._seated()
        except Exception as error:
            logger.debug("the slots are not ready yet: %s", error)

    def turn(self) -> int:
        """One frame of all slots, and whatever comes before and after it.

        Returns:
            How many of the latest frames are in doubt, after a failed verification: those who speak make them again.

        Raises:
            Interrupted: fallback is forbidden.
        """
        handle, self._doubtful = self._handle, 0
        for one in self.speaking:
            if one.utterance.done:
                self._leave(one)
        self._admit()
        if not self.speaking:
            return 0
        rung, stumbled = handle.guard.rung, None
        if rung == STOCK:
            if self._runner is not None and self._runner.dropped:
                self.disown()
            self._finish_on_stock(self.speaking[0])
            return 0
        try:
            with handle.memory.frame():
                self._frame()
        except Interrupted:
            raise
        except Exception as error:
            stumbled = self._stumbled(error)
        if stumbled is None:
            handle.memory.between_frames()
        elif handle.guard.rung == rung:  # else its calibration has gone down already
            self._recover(*stumbled)
        return self._doubtful

    def fail(self, error: BaseException) -> None:
        """Tell everybody who speaks."""
        self._unseat()
        for one in self.speaking:
            self._fail(one, error)

    def resize(self, count: int) -> bool:
        """Go on in another number of slots, in buffers of another bucket; those who speak do not notice.

        Returns:
            False where that does not work: they go through the prefill again then, for the slots that there are.
        """
        handle, speaking, under, old = self._handle, self.speaking, self._under, self._runner
        size, runner = bucket_for(count), None
        assert size is not None and size != self._bucket and len(speaking) <= count
        if under is None or not any(one.loaded for one in speaking):
            self._unseat()
            self.disown()
        else:
            try:
                seat = handle._seat_in_force(size)
                if under != (handle.guard.rung, handle._revision):
                    raise RuntimeError("the engine is another one since")
                runner = seat.engine.own_runner(size)
                seat.engine.make_ready(runner)
                self._move(seat, runner, old)
            except BaseException as error:
                if runner is not None:
                    seat.engine.disown(runner)
                self._unseat()
                if isinstance(error, Interrupted) or not isinstance(error, Exception):
                    raise
                what = f"{count} slots instead of {self.count} do not work: {type(error).__name__}: {error}"
                if self._metrics.fault(what):
                    logger.warning(what, exc_info=True)
                return False
            seat.engine.disown(old)
            self._seat, self._runner = seat, runner
        self._bucket, self._rows = size, [*speaking, *[None] * (count - len(speaking))]
        for row, one in enumerate(speaking):
            one.row = row
        return True

    def _move(self, seat: Seat, runner: Any, old: Any) -> None:
        """Those who speak to the first rows of another runner."""
        state = runner.state
        state.clear()
        for row, one in enumerate(self.speaking):
            if not one.loaded:
                continue
            state.copy_row(row, old.state, one.row, one.length)
            for ours, theirs in zip((runner.params, runner.depth_params), (old.params, old.depth_params)):
                for mine, other in zip(ours, theirs):
                    mine[row].copy_(other[one.row])
            request = one.call.request
            state.set_end(request.eos_token, request.judged, 0)
            watch = self._handle._watch(seat, runner, request, one.since, row)
            if one.watch is not None and watch is not None:
                one.watch.checks = watch.checks

    def vacate(self) -> None:
        """Everybody leaves, as far as they are."""
        self._unseat()
        for one in self.speaking:
            self._leave(one)

    def disown(self) -> None:
        """Give the engine its buffers back; the next turn takes them again."""
        if self._seat is not None and self._runner is not None:
            self._seat.engine.disown(self._runner)
        self._seat = self._runner = None

    # ------------------------------------------------------------------------------------------------------ joining

    def _admit(self) -> None:
        """Utterances to free slots: one where others speak, as many as there are slots where nobody does."""
        several = self._at_once or not self.speaking
        for row in range(len(self._rows)):
            if self._rows[row] is not None:
                continue
            utterance = self._waiting()
            if utterance is None:
                return
            self._join(utterance, row)
            if not several or self._rows[row] is None:  # the stock path has spoken it: others have waited long enough
                return

    def _join(self, utterance: Speaker, row: int) -> None:
        self._metrics.count("batch.joined")
        self._handle.memory.between_calls()
        try:
            one = self._prepare(utterance)
        except Exception as error:
            self._metrics.count("batch.left")
            utterance.fail(error)
            return
        if one is None:
            self._metrics.count("batch.left")
        else:
            self._rows[row], one.row = one, row

    def _seated(self) -> tuple[Seat, Any]:
        """What frames are made with, and the runner whose rows are the slots; where either is new, nobody is loaded."""
        handle, seat, runner = self._handle, self._seat, self._runner
        valid = runner is not None and runner.ready and not runner.dropped
        if seat is not None and valid and self._under == (handle.guard.rung, handle._revision):
            seat.engine.plain = ladder.plain_parts(handle.guard.rung)  # a replay of an incident sets it to its own
            return seat, runner
        self._unseat()
        seat = handle._seat_in_force(self._bucket)
        if runner is None or runner.dropped or self._seat is None or seat.engine is not self._seat.engine:
            self.disown()
            runner = seat.engine.own_runner(self._bucket)
        self._seat, self._runner = seat, runner
        seat.engine.make_ready(runner)
        runner.state.clear()
        self._under = handle.guard.rung, handle._revision
        return seat, runner

    def _unseat(self) -> None:
        """Before the next frame everybody goes through the prefill again, with the frames that are there."""
        self._under = None
        for one in self.speaking:
            one.loaded, one.watch = False, None

    def _prefilled(self, seat: Seat) -> list[tuple[Speaking, Prefilled, Tensor | None, Tensor]]:
        """The prompts and frames of those who are not loaded; one that cannot be encoded is its caller's alone."""
        out = []
        for one in self.speaking:
            if one.loaded:
                continue
            start = time.perf_counter()
            try:
                handle = self._handle
                known = handle.guard.rung == FAST
                prompt = handle._prompts.prefill(seat.passes, one.call.request, self._made(one), known)
                if not bool(prompt.filled.hidden.isfinite().all()):  # in the batch it would be everybody's fault
                    raise ArithmeticError("the prompt's hidden state is NaN or infinite; look at input_values")
                out.append((one, prompt.filled, prompt.mask, prompt.positions[:, -1]))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._fail(one, error)
            self._metrics.observe("prefill", time.perf_counter() - start)
        return out

    def _made(self, one: Speaking) -> Tensor:
        """``[1, n, codebooks]``, the frames so far."""
        none = one.call.request.input_ids.new_zeros(1, 0, self._handle._spec.codebooks)
        return torch.stack(one.frames, dim=1) if one.frames else none

    def _load(
        self, seat: Seat, runner: Any, one: Speaking, prompt: Prefilled, mask: Tensor | None, last: Tensor
    ) -> None:
        """Everything that the frames of a row read set to an utterance's values."""
        handle, state, request, made = self._handle, runner.state, one.call.request, len(one.frames)
        one.length = state.load_row(one.row, prompt.layers, prompt.hidden, mask, last, made)
        state.set_end(request.eos_token, request.judged, 0)  # a pad for idle rows, that every table has
        row = slice(one.row, one.row + 1)
        handle._set_drawing(runner, row, row, request, one.utterance.seeds)
        one.watch = handle._watch(seat, runner, request, made, one.row)
        one.loaded, one.since = True, made

    # -------------------------------------------------------------------------------------------------- one frame

    def _frame(self) -> None:
        start = time.perf_counter()
        seat, runner = self._seated()
        engine, state = seat.engine, runner.state
        prompts = self._prefilled(seat)
        going = [one for one in self.speaking if one.loaded]
        if not going and not prompts:
            return

        def load() -> None:
            for prompt in prompts:
                self._load(seat, runner, *prompt)

        if going:
            state.park()
            state.filled = max(one.length for one in going)
        engine.next_frame(runner, first=not going, between=load if prompts else None)
        for one in going:
            one.length += 1
        speaking = self.speaking
        codes = state.codes.clone()
        samples = self._samples(engine, runner, speaking)
        ended, fault = state.ended.tolist(), int(state.faults)
        if fault:
            for one in speaking:
                if one.watch is not None:
                    one.watch.kept.append(samples[one.row])
            raise FrameFault(Fault(fault))
        self._deliver(speaking, codes, samples, ended)
        self._metrics.observe("batch.frame", time.perf_counter() - start)

    def _samples(self, engine: Any, runner: Any, speaking: list[Speaking]) -> dict[int, Sample]:
        """What the guard may want of the frame just made, by row."""
        if all(one.watch is None for one in speaking):
            return {}
        trace = engine.trace(runner, runner.state.rows)
        alive = torch.ones(1, dtype=torch.bool, device=trace.codes.device)
        out = {}
        for one in speaking:
            row = slice(one.row, one.row + 1)
            parts = (trace.hidden[row], trace.codes[row], trace.first_logits[row], trace.logits[row])
            out[one.row] = Sample(len(one.frames), *parts, alive)
        return out

    def _deliver(self, speaking: list[Speaking], codes: Tensor, samples: dict[int, Sample], ended: list[bool]) -> None:
        """Hand each its frame, once the guard has seen those of all; those whose speech has ended leave."""
        found: list[tuple[Speaking, Breach]] = []
        for one in speaking:
            one.frames.append(codes[one.row : one.row + 1])
            if one.watch is not None:
                one.watch.share = 1 / len(speaking)
                watch = one.watch
                breach, one.watch = looked(watch, samples[one.row], one.frames, self._metrics)
                if breach is not None:
                    found.append((one, breach))
        if found:
            self._take_back(speaking, found)
            return
        self.frames += 1
        self._rates.append((time.perf_counter(), len(speaking)))
        self._metrics.count("frames", len(speaking))
        for one, frame in zip(speaking, codes.cpu()[[one.row for one in speaking]]):
            self._pass(one, frame, ended[one.row])

    def _take_back(self, speaking: list[Speaking], found: list[tuple[Speaking, Breach]]) -> None:
        """After a breach: the same steps made everybody's frames at the same time, so as many are made again of all.

        What a listener has got cannot be taken back: of those who are heard it is the latest frame alone.
        """
        one, breach = found[0]
        evidence = evidence_of(one.watch, breach, one.frames)
        self._doubtful = max(1, *(len(one.frames) - breach.first_bad for one, breach in found))
        for one in speaking:
            kept = len(one.frames) - (1 if one.utterance.heard else self._doubtful)
            del one.frames[max(one.since, kept) :]
        self._handle._lose_trust(breach, breach.first_bad, len(speaking), evidence)
        self._unseat()

    def _pass(self, one: Speaking, frame: Tensor, ended: bool) -> None:
        first = one.utterance.first_frame_at is None
        try:
            one.utterance.take(frame)
            if first and one.utterance.first_frame_at is not None:
                self._metrics.observe("batch.first_frame", one.utterance.first_frame_at - one.utterance.queued_at)
            if ended or len(one.frames) == one.call.request.max_frames:
                one.utterance.finish(torch.cat(one.frames).cpu())
                self._leave(one)
                self._handle.guard.healthy(len(one.frames))
        except Exception as error:  # of the codec
            self._fail(one, error)

    def _leave(self, one: Speaking) -> None:
        if self._rows[one.row] is not one:
            return
        self._rows[one.row] = None
        self._metrics.count("batch.left")
        if self._under is not None:  # else everything is cleared before the next frame
            self._runner.state.vacate(one.row)

    def _fail(self, one: Speaking, error: BaseException) -> None:
        one.utterance.fail(error)
        self._leave(one)

    # ------------------------------------------------------------------------------------------------------ faults

    def _stumbled(self, error: Exception) -> tuple[Breach, int, dict[str, Tensor]]:
        """What an exception means for those who speak: the breach, how many they are, and what it leaves as evidence."""
        speaking = self.speaking
        watched = [one for one in speaking if one.watch is not None and one.watch.kept]
        if isinstance(error, FrameFault):
            sick = [one for one in watched if one.watch and not bool(one.watch.kept[-1].logits.isfinite().all())]
            watched = sick or watched
        one = next(iter(watched or speaking), None)
        watch = None if one is None else one.watch
        breach = breach_of(error, 0 if one is None else len(one.frames), watch)
        what = f"{type(error).__name__}: {error}"
        if self._metrics.fault(what):
            text = "a frame of %d utterances failed, they go on by a safer path: %s"
            logger.warning(text, len(speaking), what, exc_info=error)
        return breach, len(speaking), {} if one is None else evidence_of(one.watch, breach, one.frames)

    def _recover(self, breach: Breach, rows: int, evidence: dict[str, Tensor]) -> None:
        """One more try on the same rung after a first lack of memory, the next rung otherwise."""
        self._unseat()
        if breach.kind == "memory" and self.frames - self._roomed_at >= _FRAMES_WITH_ROOM:
            self._roomed_at = self.frames
            self._handle.memory.make_room(breach.reason)
        else:
            if breach.kind == "memory":
                self.disown()  # what is given back must not be held here
            self._handle._lose_trust(breach, breach.first_bad, rows, evidence)

    def speak_on_stock(self, utterance: Speaker, arguments: dict[str, Any]) -> None:
        """A whole utterance by the stock model, frame by frame, for as long as anybody wants it.

        Args:
            utterance: whose.
            arguments: of ``generate``.

        Raises:
            Exception: of the stock model.
        """
        try:
            codes = self._handle.calls.speak_on_stock(arguments, utterance.seeds, _put_to(utterance))
        except StreamClosed:
            return
        self._count_stock(len(codes))
        utterance.finish(codes.cpu())

    def rest_on_stock(self, one: Speaking) -> Tensor:
        """The frames of an utterance that are there, and the rest by the stock model: ``[F, codebooks]``.

        Raises:
            StreamClosed: nobody wants any more of it.
            Exception: of the stock model.
        """
        made, utterance = self._made(one), one.utterance
        codes = self._handle.calls.finish_on_stock(one.call, made, _put_to(utterance), utterance.seeds)
        self._count_stock(len(codes) - made.shape[1])
        return codes

    def _finish_on_stock(self, one: Speaking) -> None:
        self._handle._went_stock("a fault of the fast path")
        try:
            one.utterance.finish(self.rest_on_stock(one).cpu())
            self._leave(one)
        except StreamClosed:
            self._leave(one)
        except Exception as error:
            self._fail(one, error)

    def _count_stock(self, frames: int) -> None:
        self._metrics.count("frames", frames)
        if self._handle.guard.rung == STOCK:
            self._handle.guard.healthy(frames)
