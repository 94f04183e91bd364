"""One utterance of a batcher, as its caller sees it: codes, sound, chunks, from any thread or event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from torch import Tensor

from csm_runtime.streaming import AudioChunk, Channel, RowSound

Cancelled = concurrent.futures.CancelledError


class Utterance:
    """What :meth:`csm_runtime.batching.Batcher.submit` returns.

    ``await utterance`` gives what :meth:`result` gives, and iterating, also by ``async for``, its sound chunk by chunk, where
    it was asked for with ``sound=True``. A task that is cancelled while it awaits cancels the utterance.

    Attributes:
        queued_at: ``time.perf_counter()`` of its submission.
        started_at: when it got its slot, or None.
        first_frame_at: when its first frame was there, or None.
        ended_at: when it was answered, or None.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        seeds: Any,
        decode: Callable[[Tensor], Tensor],
        answered: Callable[[Utterance], None],
        sound: Callable[[float], RowSound] | None = None,
    ) -> None:
        self.queued_at = time.perf_counter()
        self.started_at: float | None = None
        self.first_frame_at: float | None = None
        self.ended_at: float | None = None
        self.arguments, self.seeds = arguments, seeds
        self._decode, self._sound = decode, sound
        self._row: RowSound | None = None
        self._channel = None if sound is None else Channel(None)
        self._future: concurrent.futures.Future[Tensor] = concurrent.futures.Future()
        self._future.add_done_callback(lambda future: self._answered(answered))

    # -------------------------------------------------------------------------------------------------- for callers

    @property
    def done(self) -> bool:
        """Whether it has been answered: it is there, has failed or was cancelled."""
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._future.cancelled()

    @property
    def heard(self) -> bool:
        """Whether its sound is made while it speaks."""
        return self._channel is not None

    def result(self, timeout: float | None = None) -> Tensor:
        """Wait for its codes, ``[F, codebooks]`` int64 on the CPU, the frame that ends its speech included.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it is not there yet.
            concurrent.futures.CancelledError: it was cancelled.
            Exception: what it failed with.
        """
        return self._future.result(timeout)

    def audio(self, timeout: float | None = None) -> Tensor:
        """Wait for it and decode it whole: ``[S]`` fp32 on the CPU, what ``generate(output_audio=True)`` gives.

        Decoding takes its turn between two frames of the model. Raises as :meth:`result`.
        """
        return self._decode(self.result(timeout))

    def cancel(self) -> bool:
        """Answer it now with :class:`concurrent.futures.CancelledError`; its slot is free before the next frame.

        Returns:
            False where it has been answered already.
        """
        return not self._future.done() and self._future.cancel()

    def __iter__(self) -> Iterator[AudioChunk]:
        channel = self._listened()
        while True:
            try:
                chunk = channel.take(wait=True)
            except StopIteration:
                return
            assert chunk is not None
            yield chunk

    async def __aiter__(self) -> AsyncIterator[AudioChunk]:
        try:
            async for chunk in self._listened().listen():
                yield chunk
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __await__(self) -> Generator[Any, None, Tensor]:
        return asyncio.wrap_future(self._future).__await__()

    def _listened(self) -> Channel:
        if self._channel is None:
            raise ValueError("this utterance makes no sound while it speaks; submit(sound=True) does, or use audio()")
        return self._channel

    # ----------------------------------------------------------------------------------------------- for the batcher

    def take(self, frame: Tensor) -> None:
        """A frame ``[codebooks]`` of it is there: its sound, if that is wanted.

        Raises:
            Exception: of the codec or the watermark.
        """
        if self.first_frame_at is None:
            self.first_frame_at = time.perf_counter()
        if self._sound is not None:
            self._row = row = self._row or self._sound(self.queued_at)
            self._pass(row.add(frame))

    def finish(self, codes: Tensor) -> None:
        """All of it is there. Raises as :meth:`take`."""
        row = self._row
        if row is not None and not row.ended:
            self._pass(row.finish())
        self._answer(lambda: self._future.set_result(codes))

    def fail(self, error: BaseException) -> None:
        """It will not be there."""
        self._answer(lambda: self._future.set_exception(error))

    def _pass(self, chunk: AudioChunk | None) -> None:
        if chunk is not None and self._channel is not None and not self._future.done():
            self._channel.put(chunk)

    def _answer(self, answer: Callable[[], None]) -> None:
        if not self._future.done():
            self.ended_at = time.perf_counter()  # before anybody who waits goes on
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was cancelled meanwhile
            answer()

    def _answered(self, tell: Callable[[Utterance], None]) -> None:
        if self.ended_at is None:
            self.ended_at = time.perf_counter()
        self.arguments, self._row = {}, None
        tell(self)
        if self._channel is not None:
            cancelled = self._future.cancelled()
            self._channel.end(Cancelled() if cancelled else self._future.exception())
