"""The frames of one ``generate`` call: launched a little ahead of what the host has read, delivered in order."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_runtime.adapters import hf_call
from csm_runtime.checks import Sample
from csm_runtime.engine import Engine, Trace
from csm_runtime.guard import Breach, Interrupted, Watch
from csm_runtime.kv import Fault
from csm_runtime.memory import is_out_of_memory
from csm_runtime.metrics import Metrics

logger = logging.getLogger("csm_runtime")


class FrameFault(RuntimeError):
    """What a frame's own checks on the device found."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class _Frame(NamedTuple):
    """A frame that has been launched, on the model's device."""

    codes: Tensor
    """``[N, codebooks]`` int64."""
    ended: Tensor
    """``[N]`` bool: rows whose speech has ended in this frame or before it."""
    faults: Tensor
    """``[1]`` int32, see :class:`~csm_runtime.kv.Fault`: where it is not 0 the codes mean nothing."""
    trace: Trace | None
    """What the guard may want of it."""


class _Mailbox:
    """Host memory for what the host wants to know of frames in flight: one slot for each, used in turn.

    Args:
        slots: frames in flight at most.
        rows: of the batch.
        codebooks: of a frame; 0 where nobody wants its codes.
        device: where the frames are made.
    """

    def __init__(self, slots: int, rows: int, codebooks: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._ended = torch.empty(slots, rows, dtype=torch.bool, pin_memory=cuda)
        self._faults = torch.empty(slots, 1, dtype=torch.int32, pin_memory=cuda)
        self._codes = torch.empty(slots, rows, codebooks, dtype=torch.int64, pin_memory=cuda)
        self._arrivals = [torch.cuda.Event() for _ in range(slots)] if cuda else []

    def post(self, index: int, frame: _Frame) -> None:
        """Enqueue the copies of frame ``index``, without waiting for them."""
        slot = index % len(self._ended)
        self._ended[slot].copy_(frame.ended, non_blocking=True)
        self._faults[slot].copy_(frame.faults, non_blocking=True)
        if self._codes.numel():
            self._codes[slot].copy_(frame.codes, non_blocking=True)
        if self._arrivals:
            self._arrivals[slot].record(torch.cuda.current_stream(self._device))

    def all_ended(self, index: int) -> bool:
        """Wait for frame ``index``: whether every row's speech has ended by then.

        Raises:
            RuntimeError: what the device raises, or what the frame's own checks found.
        """
        slot = index % len(self._ended)
        if self._arrivals:
            self._arrivals[slot].synchronize()
        if self._faults[slot].item():
            raise FrameFault(Fault(int(self._faults[slot])))
        return bool(self._ended[slot].all())

    def codes(self, index: int) -> Tensor:
        """``[N, codebooks]`` of a frame that has been waited for, the caller's own."""
        return self._codes[index % len(self._ended)].clone()


class DecodeLoop:
    """Makes the frames of one call, up to the engine's lag ahead of what the host has read of them.

    Frames that were launched before the host had read that all speech had ended are dropped: nobody sees them.

    Args:
        request: the call.
        begin: prefill; gives the engine and the runner that make this call's frames, and the guard's eye on them or None.
            Its faults are the loop's.
        streamer: gets the codes of every frame, or None.
        metrics: where timings go.
        made: an earlier loop of the same call, whose frames are kept.
        between_frames: called after each frame that went well, with no launch half done.
        launching: its block is the launch of a frame, prefill included.

    Attributes:
        frames: ``[N, codebooks]`` each, the frames that the host has read and the streamer has got.
        runner: what ``begin`` gave.
        breach: why it stopped before it was complete, or None.
        watch: what ``begin`` gave.
    """

    def __init__(
        self,
        request: hf_call.Request,
        begin: Callable[[], tuple[Engine, Any, Watch | None]],
        streamer: Any,
        metrics: Metrics,
        made: DecodeLoop | None = None,
        between_frames: Callable[[], None] | None = None,
        launching: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.frames: list[Tensor] = [] if made is None else made.frames
        self._ends: list[Tensor] = [] if made is None else made._ends
        self._none_ended = torch.zeros(request.input_ids.shape[0], dtype=torch.bool, device=request.input_ids.device)
        self.runner: Any = None
        self.breach: Breach | None = None
        self.watch: Watch | None = None
        self._evidence: dict[str, Tensor] = {}
        self._request, self._begin, self._streamer, self._metrics = request, begin, streamer, metrics
        self._between_frames, self._launching = between_frames, launching
        self._speech_ended = False
        self._fault: Exception | None = None
        self._in_flight: deque[_Frame] = deque()
        self._lag = 0
        self._start = time.perf_counter()

    @property
    def ended(self) -> Tensor:
        """``[N]`` bool on the device, rows whose speech has ended in ``frames``."""
        return self._ends[-1] if self._ends else self._none_ended

    @property
    def complete(self) -> bool:
        """Whether ``frames`` is all that was asked for."""
        return self._speech_ended or len(self.frames) == self._request.max_frames

    def run(self) -> None:
        """Make frames until there are enough, every row's speech has ended or something breaks.

        Raises:
            Exception: the streamer's own errors. Those of the engine leave the call incomplete, and are counted and logged.
        """
        try:
            while not self._stopped and not self._speech_ended and self._launched < self._request.max_frames:
                with self._launching():
                    self._launch()
                self._read(leave=self._lag)
                if self._between_frames is not None and not self._stopped:
                    self._between_frames()
            self._read(leave=0)
        finally:
            if self._fault is not None:
                self._say(self._fault)
                if self.breach is None:
                    self.breach = breach_of(self._fault, len(self.frames), self.watch)
                self._fault = None  # its traceback holds this loop

    @property
    def _stopped(self) -> bool:
        return self._fault is not None or self.breach is not None

    def fill_cache(self) -> None:
        """Fill the caller's ``past_key_values`` up to the last frame but one, as the stock loop leaves them."""
        request, state, rows = self._request, self.runner.state, len(self.ended)
        held = request.input_ids.shape[1] + len(self.frames) - 1
        dtype = self._engine.dtype  # the model's; the policy may keep the cache in another
        pairs = (
            tuple(cache[:rows, :, :held].to(dtype, copy=True) for cache in layer)
            for layer in zip(state.keys, state.values)
        )
        fill_cache(request, pairs, self._metrics)

    def evidence(self) -> dict[str, Tensor]:
        """What the guard's event keeps of the frames that led to the breach."""
        return self._evidence or self._gathered()

    def _gathered(self) -> dict[str, Tensor]:
        return evidence_of(self.watch, self.breach, self.frames)

    def release(self) -> None:
        """Give the runner back, once nothing reads its state any more; dropped frames may still be running."""
        if self.runner is not None:
            self._engine.release(self.runner)

    @property
    def _launched(self) -> int:
        return len(self.frames) + len(self._in_flight)

    def _set_up(self) -> None:
        """Prefill, and what depends on the engine, which prefill may have replaced."""
        self._engine, self.runner, self.watch = engine, _, _ = self._begin()
        self._metrics.observe("prefill", time.perf_counter() - self._start)
        # One launch ahead keeps the device busy while a streamer works; a second would only make every frame late. The
        # first frame waits for a launch as well: the device needs far longer for the frame than the host for that.
        self._lag = engine.lag if self._streamer is None else min(engine.lag, 1)
        rows, codebooks = len(self.ended), 0 if self._streamer is None else engine.spec.codebooks
        self._mailbox = _Mailbox(self._lag + 1, rows, codebooks, engine.device)

    def _say(self, fault: Exception) -> None:
        """Count a fault and, the first time, log it; the guard's line follows each time."""
        what = f"{type(fault).__name__}: {fault}"
        if self._metrics.fault(what):
            after = "a safer path goes on until guard.rearm()"
            if self.complete:
                after = "after the end of speech"
            elif is_out_of_memory(fault):
                after = "a safer path goes on until guard.rearm() if this happens again in the same call"
            logger.warning("the fast path failed at frame %d, %s: %s", len(self.frames), after, what, exc_info=fault)

    def _launch(self) -> None:
        """Enqueue one frame and the copies of what the host wants of it; nothing here waits for the device."""
        rows, index = len(self.ended), self._launched
        try:
            first = self.runner is None
            if first:
                self._set_up()
            codes = self._engine.next_frame(self.runner, first=first)[:rows].clone()
            state = self.runner.state
            trace = None if self.watch is None else self._engine.trace(self.runner, rows)
            frame = _Frame(codes, state.ended[:rows].clone(), state.faults.clone(), trace)
            self._mailbox.post(index, frame)
            self._in_flight.append(frame)
        except Interrupted:  # calibration has failed, and fallback is forbidden
            raise
        except Exception as error:  # whatever broke, the caller's audio goes on
            self._fault = error

    def _read(self, leave: int) -> None:
        """Read and deliver the oldest frames until ``leave`` are in flight or speech has ended."""
        while len(self._in_flight) > leave and not self._speech_ended:
            index, frame = len(self.frames), self._in_flight.popleft()
            sample = None if frame.trace is None else Sample(index, *frame.trace, ~self.ended)
            try:
                ended = self._mailbox.all_ended(index)
            except Exception as error:
                self._fault = self._fault or error
                self._in_flight.clear()  # without this frame, those after it are no use
                if self.watch is not None and sample is not None:
                    self.watch.kept.append(sample)
                return
            if index == 0:
                self._metrics.observe("first_frame", time.perf_counter() - self._start)
            self.frames.append(frame.codes)
            self._ends.append(frame.ended)
            if self.watch is not None:
                self.breach, self.watch = looked(self.watch, sample, self.frames, self._metrics)
                if self.breach is not None:
                    self._in_flight.clear()
                    self._evidence = self._gathered()
                    # What a streamer has got cannot be taken back.
                    kept = max(self.breach.first_bad, 0 if self._streamer is None else index)
                    del self.frames[kept:], self._ends[kept:]
                    return
            self._speech_ended = ended
            if self._streamer is not None:
                self._streamer.put(self._mailbox.codes(index))


def fill_cache(request: hf_call.Request, layers: Iterable[tuple[Tensor, Tensor]], metrics: Metrics) -> None:
    """Fill a call's ``past_key_values``; what goes wrong is counted, and must not cost the utterance that is already there."""
    try:
        hf_call.fill_cache(request.output_cache, layers)
    except Exception as error:
        what = f"past_key_values could not be filled: {type(error).__name__}: {error}"
        if metrics.fault(what):
            logger.warning(what, exc_info=True)


def looked(
    watch: Watch, sample: Sample | None, frames: list[Tensor], metrics: Metrics
) -> tuple[Breach | None, Watch | None]:
    """The guard's word on a frame, and who is asked next time: it never raises into generation, and is asked no more then."""
    try:
        return watch.look(sample, frames), watch
    except Exception as error:
        what = f"the guard failed: {type(error).__name__}: {error}"
        if metrics.fault(what):
            logger.warning(what, exc_info=True)
        return None, None


def evidence_of(watch: Watch | None, breach: Breach | None, frames: list[Tensor]) -> dict[str, Tensor]:
    """What an event keeps of the frames that led to a breach; it never raises, and touches nothing after a lack of memory."""
    try:
        if watch is not None and (breach is None or breach.kind != "memory"):
            return watch.checks.evidence(list(watch.kept), frames)
    except Exception as error:  # a device that is lost, perhaps: the event does without
        logger.debug("no evidence: %s", error)
    return {}


def breach_of(fault: Exception, frame: int, watch: Watch | None = None) -> Breach:
    """What an exception, or a frame's own checks, mean for an utterance whose frames before ``frame`` are good."""
    reason = f"{type(fault).__name__}: {fault}"
    if isinstance(fault, FrameFault):
        suspect = None
        if fault.fault != Fault.TIMED_OUT and watch is not None and watch.kept:
            suspect = "depth" if bool(torch.isfinite(watch.kept[-1].hidden).all()) else "backbone"
        return Breach(str(fault), "frame", frame, suspect)
    if is_out_of_memory(fault):
        return Breach(reason, "memory", frame)
    return Breach(reason, "exception", frame)
