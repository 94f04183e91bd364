"""Several utterances in one engine: each has a slot, joins and leaves between frames, and knows nothing of the others.

A thread of the batcher's own has the frames made (``slots.py``), all slots at once, and holds the model's lock for one frame at
a time: ``generate()``, ``report()`` and streams take their turns in between.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csm_runtime.accelerate import DEFAULT_QUEUE, Acceleration
from csm_runtime.adapters import hf_call
from csm_runtime.batch_size import DEFAULT_SLOTS, stored_slots
from csm_runtime.codec import cut_at_end
from csm_runtime.engine import BUCKETS
from csm_runtime.generate import Seeds, plain_mode
from csm_runtime.guard import STOCK, Interrupted
from csm_runtime.slots import Slots, Speaking
from csm_runtime.streaming import DEFAULT_SCHEDULE, RowSound, schedule_of
from csm_runtime.utterance import Utterance

logger = logging.getLogger("csm_runtime")

_PATIENCE = 0.05
"""Seconds between two frames for which others that wait for the model go first: a report, or the start of a call."""


class QueueFull(RuntimeError):
    """As many utterances wait as may."""


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
        self._model, self._handle, self._metrics = handle._model, handle, handle.metrics
        self._count, self._limit = slots or stored_slots(model) or DEFAULT_SLOTS, queue
        self._slots = Slots(handle, self._count, self._next, self._join)
        self._change = threading.Condition()
        self._queue: deque[Utterance] = deque()
        self._open: set[Utterance] = set()
        self._closing = False
        with handle._lock, plain_mode():
            if handle.guard.rung != STOCK and handle._reason_for_stock({}) is None:
                self._slots.warm_up()
        self._metrics.watch("batch", self.status)
        self._thread = threading.Thread(target=self._work, name="csm-batcher", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        """Utterances that speak at once."""
        return self._count

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
        room = handle.calls.check(inputs)
        if room is not None:
            self._check_room(*room)
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
                    f"{len(self._queue)} utterances wait for one of {self._count} slots, and queue={self._limit} may; wait "
                    "for one of them and submit again, or make the batcher with a longer queue"
                )
            self._queue.append(utterance)
            self._open.add(utterance)
            self._change.notify_all()
        return utterance

    def status(self) -> dict[str, float]:
        """Slots, those in use, utterances that wait, and frames of all slots per second of the last ten."""
        return {
            "slots": self._count,
            "speaking": len(self._slots.speaking),
            "waiting": len(self._queue),
            "frames_per_second": self._slots.frames_per_second,
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
            self._handle._check_positions(tokens, frames)
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
        slots = self._slots
        while True:
            with self._change:
                while not (self._queue or self._closing or slots.speaking):
                    self._change.wait()
                if self._closing and not self._queue and not slots.speaking:
                    break
            try:
                with self._handle._lock, plain_mode():
                    slots.turn()
            except BaseException as error:  # fallback is forbidden, or a bug of ours: whoever speaks is told
                if not isinstance(error, Interrupted):
                    logger.warning("the batcher failed, and every utterance that spoke with it", exc_info=True)
                slots.fail(error)
            self._handle._lock.give_way(_PATIENCE)
        with self._handle._lock:
            slots.disown()

    def _next(self) -> Utterance | None:
        """The utterance that has waited longest, or None."""
        with self._change:
            if not self._queue:
                return None
            utterance = self._queue.popleft()
        utterance.started_at = time.perf_counter()
        self._metrics.observe("queue", utterance.started_at - utterance.queued_at)
        return utterance

    def _join(self, utterance: Utterance) -> Speaking | None:
        """Have the stock ``generate`` prepare a call, or make all of it where the fast path cannot."""
        handle, arguments = self._handle, utterance.arguments
        reason = handle._reason_for_stock(arguments)
        if reason is None:
            try:
                call = handle.calls.prepared(arguments)
                if call.request.input_ids.shape[0] != 1:
                    raise ValueError(f"an utterance is one row, got {call.request.input_ids.shape[0]} of them")
                handle._check_room(call.request)
                return Speaking(utterance, call)
            except hf_call.Unsupported as error:
                reason = str(error)
        handle._went_stock(reason)
        self._slots.speak_on_stock(utterance, arguments)
        return None
