"""Several utterances in one engine: each has a slot, joins and leaves between frames, and knows nothing of the others.

A thread of the batcher's own makes the frames, all slots at once, and holds the model's lock for one frame at a time:
``generate()``, ``report()`` and streams take their turns in between. Neither a join nor a leave compiles or captures
anything: a slot is a row of buffers that stay where they are, and what differs between utterances lies in tensors.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from csm_runtime import ladder
from csm_runtime.accelerate import DEFAULT_QUEUE, Acceleration
from csm_runtime.adapters import hf_call, hf_checks
from csm_runtime.adapters.hf_passes import Prefilled
from csm_runtime.batch_size import DEFAULT_SLOTS, stored_slots
from csm_runtime.checks import Sample
from csm_runtime.codec import cut_at_end
from csm_runtime.decode_loop import FrameFault, breach_of, looked
from csm_runtime.engine import BUCKETS, bucket_for
from csm_runtime.generate import Prepared, Seeds, as_it_was, plain_mode, prepared, seeded
from csm_runtime.guard import FAST, STOCK, Breach, Interrupted, Watch
from csm_runtime.kv import Fault
from csm_runtime.ladder import Seat
from csm_runtime.memory import is_out_of_memory
from csm_runtime.streaming import DEFAULT_SCHEDULE, RowSound, StreamClosed, schedule_of
from csm_runtime.utterance import Utterance

logger = logging.getLogger("csm_runtime")

_OWN = ("streamer", "output_audio", "return_dict_in_generate", "utterance_ids", "custom_generate")
"""Arguments of ``generate`` that say what becomes of its frames."""
_PATIENCE = 0.05
"""Seconds between two frames for which others that wait for the model go first: a report, or the start of a call."""
_FRAMES_WITH_ROOM = 128
"""Memory that runs out again within so many frames of making room is a breach: ten seconds of speech."""
_RATE_SECONDS = 10.0
"""What frames per second look back on."""


class QueueFull(RuntimeError):
    """As many utterances wait as may."""


@dataclass
class _Speaking:
    """An utterance in its slot."""

    utterance: Utterance
    call: Prepared
    row: int
    frames: list[Tensor] = field(default_factory=list)
    """``[1, codebooks]`` int64 each, on the model's device."""
    watch: Watch | None = None
    length: int = 0
    """The next free slot of its row's cache."""
    loaded: bool = False
    """Whether its row stands behind its latest frame; False before its prefill, and after a fault."""


class _Feed:
    """The streamer of an utterance on the stock path."""

    def __init__(self, utterance: Utterance, with_prompt: bool) -> None:
        self._utterance, self._is_prompt = utterance, with_prompt

    def put(self, value: Tensor) -> None:
        if self._utterance.done:
            raise StreamClosed
        if not self._is_prompt:
            self._utterance.take(value[0])
        self._is_prompt = False

    def end(self) -> None:
        """Whoever asked for the frames knows."""


class Batcher:
    """Speaks several utterances at once, with slots that are filled again as soon as one is free.

    An utterance's codes are those of ``generate(seed=seed, utterance_ids=[utterance_id])`` on its inputs alone, whatever its
    slot, its neighbours and the moment it joined: exactly so in fp32 and with the native CPU kernels, whose sums do not depend
    on the batch size, elsewhere up to ties that another batch size rounds otherwise. Utterances get their slots in the order
    they came. While others speak, one prompt goes through the backbone between two frames, so that a long queue does not make
    them stutter. Each utterance is verified by the guard as a call of its own, within one budget. What the fast path does not
    support is spoken by the stock model, alone, while the others wait.

    Use it as a context manager, or close it: its thread holds the model.

    Args:
        model: an accelerated model.
        slots: utterances that speak at once, 1 to 16; None for what :func:`~csm_runtime.batch_size.tune_batch_size` found
            here, or 4. Buffers and steps are those of the next of 1, 2, 4, 8 and 16.
        queue: utterances that may wait for a slot, at least 1.
        chunk_frames: codec frames per chunk of those that are heard while they speak, see
            :func:`~csm_runtime.streaming.schedule_of`.

    Raises:
        TypeError: the model is not accelerated.
        ValueError: a bad argument.

    Example::

        with Batcher(model, slots=8) as batcher:
            utterances = [batcher.submit(**inputs, seed=n) for n, inputs in enumerate(many)]
            codes = [utterance.result() for utterance in utterances]
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int | None = None,
        queue: int = DEFAULT_QUEUE,
        chunk_frames: int | Sequence[int] = DEFAULT_SCHEDULE,
    ) -> None:
        handle = model.__dict__.get("acceleration")
        if not isinstance(handle, Acceleration):
            raise TypeError("model must be accelerated: accelerate(model) first")
        if slots is not None and not (type(slots) is int and 1 <= slots <= BUCKETS[-1]):
            raise ValueError(f"slots must be an integer from 1 to {BUCKETS[-1]}, or None, got {slots!r}")
        if type(queue) is not int or queue < 1:
            raise ValueError(f"queue must be a number of utterances of at least 1, got {queue!r}")
        self._schedule = schedule_of(chunk_frames)
        self._model, self._handle, self._metrics = model, handle, handle.metrics
        self._slots = slots or stored_slots(model) or DEFAULT_SLOTS
        size = bucket_for(self._slots)
        assert size is not None
        self._bucket, self._limit = size, queue
        self._change = threading.Condition()
        self._queue: deque[Utterance] = deque()
        self._open: set[Utterance] = set()
        self._closing = False
        self._rows: list[_Speaking | None] = [None] * self._slots
        self._seat: Seat | None = None
        self._runner: Any = None
        self._under: tuple[str, int] | None = None
        """The guard's rung and the handle's revision that the seat is of."""
        self._frames, self._roomed_at = 0, -_FRAMES_WITH_ROOM
        self._rates: deque[tuple[float, int]] = deque(maxlen=1024)
        with handle._lock, plain_mode():
            if handle.guard.rung != STOCK and handle._reason_for_stock({}) is None:
                self._warm_up()
        self._metrics.watch("batch", self.status)
        self._thread = threading.Thread(target=self._work, name="csm-batcher", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        """Utterances that speak at once."""
        return self._slots

    def submit(
        self, *, seed: int | None = None, utterance_id: int = 0, sound: bool = False, **inputs: Any
    ) -> Utterance:
        """Have an utterance spoken. Never waits: not for a slot, not for the model.

        Args:
            seed: of its noise; None draws one from torch's generator.
            utterance_id: the other half of what the noise depends on.
            sound: make its sound while it speaks, for iterating over its chunks. Chunks wait for their listener without
                limit: a slow one keeps nobody waiting.
            inputs: of ``generate()``, of one row. Arguments ``depth_decoder_*`` are this utterance's own: nothing of them
                stays in the model's config.

        Returns:
            The utterance, at once.

        Raises:
            ValueError: bad input, named. What only the stock ``generate`` finds wrong, ``result()`` raises.
            QueueFull: as many wait as may.
            RuntimeError: the batcher is closed, or its model is not accelerated any more.
        """
        model, handle = self._model, self._handle
        if model.__dict__.get("acceleration") is not handle:
            raise RuntimeError("the model was restored or accelerated anew since; make a new batcher")
        for name in _OWN:
            if inputs.get(name) not in (None, False):
                raise ValueError(f"{name} is the batcher's own business, got {inputs[name]!r}; leave it out")
            inputs.pop(name, None)
        hf_checks.check_arguments(model, handle._spec, inputs)
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("input_ids is missing: the prompt of one utterance, [1, T] or [1, T, codebooks]")
        if ids.shape[0] != 1:
            raise ValueError(f"input_ids has {ids.shape[0]} rows, an utterance has one; submit each row by itself")
        frames = inputs.get("max_new_tokens")
        if type(frames) is int:
            self._check_room(ids.shape[1], frames)
        seeds = Seeds(seed, [utterance_id])
        seeds.fit(1, True)
        utterance = Utterance(
            {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()},
            seeds,
            self._sound,
            self._answered,
            self._row_sound if sound else None,
        )
        with self._change:
            if self._closing:
                raise RuntimeError("the batcher is closed; make a new one")
            if len(self._queue) >= self._limit:
                self._metrics.count("batch.refused")
                raise QueueFull(
                    f"{len(self._queue)} utterances wait for one of {self._slots} slots, and queue={self._limit} may; wait "
                    "for one of them and submit again, or make the batcher with a longer queue"
                )
            self._queue.append(utterance)
            self._open.add(utterance)
            self._change.notify_all()
        return utterance

    def status(self) -> dict[str, float]:
        """Slots, those in use, utterances that wait, and frames of all slots per second of the last ten."""
        now = time.perf_counter()
        rates = [(at, count) for at, count in list(self._rates) if now - at <= _RATE_SECONDS]
        span = now - rates[0][0] if rates else 0.0
        return {
            "slots": self._slots,
            "speaking": sum(one is not None for one in list(self._rows)),
            "waiting": len(self._queue),
            "frames_per_second": sum(count for _, count in rates[1:]) / span if span > 0 else 0.0,
        }

    def close(self, drain: bool = True) -> None:
        """Take nothing more, and wait until the thread has ended; again is allowed.

        Args:
            drain: speak to their ends those that are there; False cancels them.
        """
        with self._change:
            self._closing = True
            left = [] if drain else list(self._open)
            self._change.notify_all()
        for utterance in left:
            utterance.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.close(drain=kind is None)

    # --------------------------------------------------------------------------------------- in the callers' threads

    def _check_room(self, tokens: int, frames: int) -> None:
        try:
            self._handle._check_positions(1, tokens, frames)
        except hf_call.Unsupported:
            return  # for the stock path

    def _answered(self, utterance: Utterance) -> None:
        """In whatever thread it was answered or cancelled."""
        if utterance.cancelled:
            self._metrics.count("batch.cancelled")
        with self._change:
            self._open.discard(utterance)
            if utterance in self._queue:
                self._queue.remove(utterance)
            self._change.notify_all()

    def _sound(self, codes: Tensor) -> Tensor:
        """``[S]`` fp32 on the CPU of codes ``[F, codebooks]``."""
        handle = self._handle
        with handle._lock, plain_mode():
            sequences = codes[None].to(handle._engine.device)
            if not len(cut_at_end(sequences, self._model.config.codebook_eos_token_id)[0]):
                return torch.zeros(0)
            return handle._sound(sequences)[0].float().cpu()

    def _row_sound(self, started: float) -> RowSound:
        end = self._model.config.codebook_eos_token_id
        return RowSound(self._handle._stream_codec(), end, self._schedule, metrics=self._metrics, started=started)

    # -------------------------------------------------------------------------------------------------- the worker

    def _work(self) -> None:
        while True:
            with self._change:
                while not (self._queue or self._closing or self._speaking()):
                    self._change.wait()
                if self._closing and not self._queue and not self._speaking():
                    break
            try:
                with self._handle._lock, plain_mode():
                    self._turn()
            except BaseException as error:  # fallback is forbidden, or a bug of ours: whoever speaks is told
                if not isinstance(error, Interrupted):
                    logger.warning("the batcher failed, and every utterance that spoke with it", exc_info=True)
                self._unseat()
                for one in self._speaking():
                    self._fail(one, error)
            self._handle._lock.give_way(_PATIENCE)
        with self._handle._lock:
            self._disown()

    def _speaking(self) -> list[_Speaking]:
        return [one for one in self._rows if one is not None]

    def _turn(self) -> None:
        """One frame of all slots, and whatever comes before and after it."""
        handle = self._handle
        for one in self._speaking():
            if one.utterance.done:
                self._leave(one)
        self._admit()
        if not self._speaking():
            return
        rung, stumbled = handle.guard.rung, None
        if rung == STOCK:
            if self._runner is not None and self._runner.dropped:
                self._disown()
            self._finish_on_stock(self._speaking()[0])
            return
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

    # ------------------------------------------------------------------------------------------------------ joining

    def _admit(self) -> None:
        """Utterances to free slots: one where others speak, as many as there are slots where nobody does."""
        alone = not self._speaking()
        for row in range(self._slots):
            if self._rows[row] is not None:
                continue
            with self._change:
                if not self._queue:
                    return
                utterance = self._queue.popleft()
            self._join(utterance, row)
            if not alone or self._rows[row] is None:  # the stock path has spoken it: others have waited long enough
                return

    def _join(self, utterance: Utterance, row: int) -> None:
        """Have the stock ``generate`` prepare a call, and give it a row, or to the stock path."""
        handle, arguments = self._handle, utterance.arguments
        utterance.started_at = time.perf_counter()
        self._metrics.observe("queue", utterance.started_at - utterance.queued_at)
        self._metrics.count("batch.joined")
        handle.memory.between_calls()
        call = None
        try:
            reason = handle._reason_for_stock(arguments)
            if reason is None:
                try:
                    call = prepared(self._model, arguments)
                    if call.request.input_ids.shape[0] != 1:
                        raise ValueError(f"an utterance is one row, got {call.request.input_ids.shape[0]} of them")
                    handle._check_room(call.request)
                except hf_call.Unsupported as error:
                    reason = str(error)
            if reason is not None:
                handle._went_stock(reason)
                self._speak_on_stock(utterance)
        except Exception as error:
            self._metrics.count("batch.left")
            utterance.fail(error)
            return
        if reason is None and call is not None:
            self._rows[row] = _Speaking(utterance, call, row)
        else:
            self._metrics.count("batch.left")

    def _warm_up(self) -> None:
        """Have everything compiled before the first utterance comes; what fails fails again with it, and is handled there."""
        try:
            self._seated()
        except Exception as error:
            logger.debug("the batcher's slots are not ready yet: %s", error)

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
            self._disown()
            runner = seat.engine.own_runner(self._bucket)
        self._seat, self._runner = seat, runner
        seat.engine.make_ready(runner)
        runner.state.clear()
        self._under = handle.guard.rung, handle._revision
        return seat, runner

    def _unseat(self) -> None:
        """Before the next frame everybody goes through the prefill again, with the frames that are there."""
        self._under = None
        for one in self._speaking():
            one.loaded, one.watch = False, None

    def _disown(self) -> None:
        if self._seat is not None and self._runner is not None:
            self._seat.engine.disown(self._runner)
        self._seat = self._runner = None

    def _prefilled(self, seat: Seat) -> list[tuple[_Speaking, Prefilled, Tensor | None, Tensor]]:
        """The prompts and frames of those who are not loaded; one that cannot be encoded is its caller's alone."""
        out = []
        for one in self._speaking():
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

    def _made(self, one: _Speaking) -> Tensor:
        """``[1, n, codebooks]``, the frames so far."""
        none = one.call.request.input_ids.new_zeros(1, 0, self._handle._spec.codebooks)
        return torch.stack(one.frames, dim=1) if one.frames else none

    def _load(
        self, seat: Seat, runner: Any, one: _Speaking, prompt: Prefilled, mask: Tensor | None, last: Tensor
    ) -> None:
        """Everything that the frames of a row read set to an utterance's values."""
        handle, state, request, made = self._handle, runner.state, one.call.request, len(one.frames)
        one.length = state.load_row(one.row, prompt.layers, prompt.hidden, mask, last, made)
        state.set_end(request.eos_token, handle._spec.codebooks - 1, 0)  # a pad for idle rows, that every table has
        row = slice(one.row, one.row + 1)
        handle._set_drawing(runner, row, row, request, one.utterance.seeds)
        one.watch = handle._watch(seat, runner, request, made, one.row)
        one.loaded = True

    # -------------------------------------------------------------------------------------------------- one frame

    def _frame(self) -> None:
        start = time.perf_counter()
        seat, runner = self._seated()
        engine, state = seat.engine, runner.state
        prompts = self._prefilled(seat)
        going = [one for one in self._speaking() if one.loaded]
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
        speaking = self._speaking()
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

    def _samples(self, engine: Any, runner: Any, speaking: list[_Speaking]) -> dict[int, Sample]:
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

    def _deliver(self, speaking: list[_Speaking], codes: Tensor, samples: dict[int, Sample], ended: list[bool]) -> None:
        """Hand each its frame, once the guard has seen those of all; those whose speech has ended leave."""
        found: list[tuple[_Speaking, Breach]] = []
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
        self._frames += 1
        self._rates.append((time.perf_counter(), len(speaking)))
        self._metrics.count("frames", len(speaking))
        for one, frame in zip(speaking, codes.cpu()[[one.row for one in speaking]]):
            self._pass(one, frame, ended[one.row])

    def _take_back(self, speaking: list[_Speaking], found: list[tuple[_Speaking, Breach]]) -> None:
        """After a breach: the same steps made everybody's frames at the same time, so as many are made again of all.

        What a listener has got cannot be taken back: of those who are heard it is the latest frame alone.
        """
        one, breach = found[0]
        evidence = self._evidence(one, breach)
        doubtful = max(len(one.frames) - breach.first_bad for one, breach in found)
        for one in speaking:
            del one.frames[-1 if one.utterance.heard else -max(1, doubtful) :]
        self._handle._lose_trust(breach, breach.first_bad, len(speaking), evidence)
        self._unseat()

    def _pass(self, one: _Speaking, frame: Tensor, ended: bool) -> None:
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

    def _leave(self, one: _Speaking) -> None:
        if self._rows[one.row] is not one:
            return
        self._rows[one.row] = None
        self._metrics.count("batch.left")
        if self._under is not None:  # else everything is cleared before the next frame
            self._runner.state.vacate(one.row)

    def _fail(self, one: _Speaking, error: BaseException) -> None:
        one.utterance.fail(error)
        self._leave(one)

    # ------------------------------------------------------------------------------------------------------ faults

    def _stumbled(self, error: Exception) -> tuple[Breach, int, dict[str, Tensor]]:
        """What an exception means for those who speak: the breach, how many they are, and what it leaves as evidence."""
        speaking = self._speaking()
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
        return breach, len(speaking), {} if one is None else self._evidence(one, breach)

    def _evidence(self, one: _Speaking, breach: Breach) -> dict[str, Tensor]:
        try:
            if one.watch is not None and breach.kind != "memory":
                return one.watch.checks.evidence(list(one.watch.kept), one.frames)
        except Exception as error:  # a device that is lost, perhaps: the event does without
            logger.debug("no evidence: %s", error)
        return {}

    def _recover(self, breach: Breach, rows: int, evidence: dict[str, Tensor]) -> None:
        """One more try on the same rung after a first lack of memory, the next rung otherwise."""
        self._unseat()
        if breach.kind == "memory" and self._frames - self._roomed_at >= _FRAMES_WITH_ROOM:
            self._roomed_at = self._frames
            self._handle.memory.make_room(breach.reason)
        else:
            if breach.kind == "memory":
                self._disown()  # what is given back must not be held here
            self._handle._lose_trust(breach, breach.first_bad, rows, evidence)

    def _speak_on_stock(self, utterance: Utterance) -> None:
        """A whole utterance by the stock model, frame by frame, for as long as anybody wants it."""
        model, arguments = self._model, utterance.arguments
        ids = arguments["input_ids"]

        def speak() -> Any:
            return type(model).generate(model, **arguments, streamer=_Feed(utterance, with_prompt=True))

        try:
            with as_it_was(model.depth_decoder.generation_config):
                made = seeded(utterance.seeds, speak)
        except StreamClosed:
            return
        sequences = made if isinstance(made, Tensor) else made.sequences
        codes = sequences[0, ids.shape[1] if ids.ndim == 3 else 0 :]
        self._count_stock(len(codes))
        utterance.finish(codes.cpu())

    def _finish_on_stock(self, one: _Speaking) -> None:
        """The rest of an utterance by the stock model."""
        model, call, made = self._model, one.call, self._made(one)
        config = model.depth_decoder.generation_config
        ended = torch.zeros(1, dtype=torch.bool, device=made.device)
        feed = _Feed(one.utterance, with_prompt=False)
        self._handle._went_stock("a fault of the fast path")

        def go_on() -> Tensor:
            return hf_call.continue_on_stock(model, call.request, made, ended, call.processors, call.config, feed)

        try:
            with as_it_was(config):
                vars(config).clear()
                vars(config).update(call.depth_config)
                codes = seeded(one.utterance.seeds, go_on, made.shape[1])[0]
            self._count_stock(len(codes) - made.shape[1])
            one.utterance.finish(codes.cpu())
            self._leave(one)
        except StreamClosed:
            self._leave(one)
        except Exception as error:
            self._fail(one, error)

    def _count_stock(self, frames: int) -> None:
        self._metrics.count("frames", frames)
        if self._handle.guard.rung == STOCK:
            self._handle.guard.healthy(frames)
