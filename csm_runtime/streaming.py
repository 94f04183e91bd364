"""Sound while it is being made: ``model.acceleration.stream(...)`` and its async form.

Frames come from ``generate()`` in a thread of the stream's own, and the codec decodes them there, between two frames: on a
CPU the two would only take the cores from each other. What the chunks hold is the offline decode of the same codes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csm_runtime.codec import decode_offline
from csm_runtime.codec_stream import CodecStream
from csm_runtime.codec_stream import why_not as why_not_chunked
from csm_runtime.metrics import Metrics

logger = logging.getLogger("csm_runtime")

DEFAULT_SCHEDULE = (1,)
DEFAULT_AHEAD = 32
"""Chunks that wait for the listener before generation waits as well."""


@dataclass(frozen=True)
class AudioChunk:
    """A piece of one row's sound, behind the piece before it without a seam.

    Attributes:
        samples: ``[S]`` fp32 on the CPU.
        rate: samples per second, 24000 for Mimi.
        row: of the batch.
        index: number of the chunk in its row.
        start: number of its first sample in its row.
        frames: codec frames it holds.
        made_after: seconds from the call of ``stream()`` until it was ready.
        codec_seconds: of it, what its decoding took.
    """

    samples: Tensor
    rate: int
    row: int
    index: int
    start: int
    frames: int
    made_after: float
    codec_seconds: float

    @property
    def seconds(self) -> float:
        """How long it sounds."""
        return len(self.samples) / self.rate


class StreamClosed(Exception):
    """Raised into generation when the listener has left."""


def schedule_of(chunk_frames: Any) -> tuple[int, ...]:
    """Frames per chunk, the last entry from then on.

    Raises:
        ValueError: neither an integer of at least 1 nor a sequence of them.
    """
    sizes = (chunk_frames,) if type(chunk_frames) is int else chunk_frames
    if (
        isinstance(sizes, (str, bytes))
        or not isinstance(sizes, Sequence)
        or not sizes
        or not all(type(size) is int and size >= 1 for size in sizes)
    ):
        raise ValueError(
            f"chunk_frames must be a number of frames of at least 1, or a sequence of them, got {chunk_frames!r}"
        )
    return tuple(sizes)


class RowSound:
    """The sound of one row: takes its frames one by one and gives a chunk whenever enough have come.

    Args:
        codec: transformers' Mimi, in the dtype that is to be decoded in.
        end_code: a frame of this code alone ends the row and is no sound, as in the stock ``generate``.
        schedule: frames per chunk, the last entry from then on.
        row: of the batch.
        watermark: see :func:`stream_of`.
        metrics: where times and faults go.
        started: ``time.perf_counter()`` of the call.
    """

    def __init__(
        self,
        codec: Any,
        end_code: int,
        schedule: Sequence[int] = DEFAULT_SCHEDULE,
        row: int = 0,
        watermark: Callable[[Tensor, int], Tensor] | None = None,
        metrics: Metrics | None = None,
        started: float | None = None,
    ) -> None:
        self._codec, self._end_code, self._schedule, self._row = codec, end_code, schedule, row
        self._watermark, self._metrics = watermark, metrics or Metrics()
        self._started = time.perf_counter() if started is None else started
        self._waiting: list[Tensor] = []
        self._decoded: list[Tensor] = []
        self._index = self._start = 0
        own = getattr(codec, "stream", None)  # a codec that brings its own way
        if callable(own):
            self._stream: Any = own()
            reason = "and it has no state that could be carried on" if self._stream is None else None
        else:
            reason = why_not_chunked(codec)
            self._stream = CodecStream(codec) if reason is None else None
        if reason is not None:
            self._say(f"the codec cannot be decoded chunk by chunk, {reason}; each chunk decodes all frames so far")
        self.rate = int(codec.config.sampling_rate)
        self.ended = False

    def add(self, codes: Tensor) -> AudioChunk | None:
        """Take a frame ``[K]`` int64; a chunk where it completes one.

        Raises:
            IndexError: a code that the codec has no vector for.
            ValueError: the watermark returned something else than samples of the same number.
        """
        if self.ended:
            return None
        if bool((codes == self._end_code).all()):
            return self.finish()
        self._waiting.append(codes)
        wanted = self._schedule[min(self._index, len(self._schedule) - 1)]
        return self._chunk() if len(self._waiting) >= wanted else None

    def finish(self) -> AudioChunk | None:
        """The frames that are left, once the row has ended."""
        self.ended = True
        return self._chunk() if self._waiting else None

    def _chunk(self) -> AudioChunk:
        begin = time.perf_counter()
        codes = torch.stack(self._waiting)[None]
        samples = self._sound(codes).cpu()
        self._waiting.clear()
        if self._watermark is not None:
            samples = _watermarked(self._watermark, samples, self.rate)
        now = time.perf_counter()
        chunk = AudioChunk(
            samples=samples,
            rate=self.rate,
            row=self._row,
            index=self._index,
            start=self._start,
            frames=codes.shape[1],
            made_after=now - self._started,
            codec_seconds=now - begin,
        )
        self._metrics.observe("codec", chunk.codec_seconds)
        if self._index == 0:
            self._metrics.observe("first_audio", chunk.made_after)
        self._index += 1
        self._start += len(samples)
        return chunk

    def _sound(self, codes: Tensor) -> Tensor:
        """``[S]`` fp32 of frames ``[1, F, K]``; by the stock codec, from the start, where the carried state fails."""
        codes = codes.to(next(self._codec.parameters()).device)
        self._decoded.append(codes)
        if self._stream is not None:
            try:
                made = self._stream.decode(codes)[0]
                if not bool(made.isfinite().all()):
                    raise ArithmeticError("samples that are NaN or infinite")
                return made
            except IndexError:
                raise
            except Exception as error:
                self._say(f"decoding chunk by chunk failed, each chunk decodes all frames so far: {error}")
                self._stream = None
        whole = decode_offline(self._codec, torch.cat(self._decoded, dim=1))[0].float()
        return whole[self._start :]

    def _say(self, what: str) -> None:
        if self._metrics.fault(what):
            logger.warning(what)


def _watermarked(watermark: Callable[[Tensor, int], Tensor], samples: Tensor, rate: int) -> Tensor:
    made = watermark(samples, rate)
    if not isinstance(made, Tensor) or made.shape != samples.shape:
        came = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"watermark must return {len(samples)} samples as it was given, got {came}")
    return made.to("cpu", torch.float32)


class Channel:
    """Chunks on their way from the thread that makes them to the one that plays them.

    Args:
        ahead: chunks that may wait before :meth:`put` waits; None for any number.
        yields: put() does not wait while this says True: who waits for the listener must not keep others waiting.
    """

    def __init__(self, ahead: int | None, yields: Callable[[], bool] = lambda: False) -> None:
        self._ahead, self._yields = ahead, yields
        self._chunks: deque[AudioChunk] = deque()
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._done = self.closed = False
        self.on_change: Callable[[], None] | None = None
        self.waited = 0.0

    def put(self, chunk: AudioChunk) -> None:
        """Hand a chunk over; waits while too many wait.

        Raises:
            StreamClosed: nobody listens any more.
        """
        start = time.perf_counter()
        with self._change:
            while not self.closed and self._ahead is not None and len(self._chunks) >= self._ahead:
                if self._yields():
                    break
                self._change.wait(0.05)
            self.waited += time.perf_counter() - start
            if self.closed:
                raise StreamClosed
            self._chunks.append(chunk)
            self._change.notify_all()
        self._tell()

    def check(self) -> None:
        """Raise :class:`StreamClosed` where nobody listens any more."""
        if self.closed:
            raise StreamClosed

    def end(self, error: BaseException | None = None) -> None:
        """No chunk comes after this."""
        with self._change:
            self._done, self._error = True, error
            self._change.notify_all()
        self._tell()

    def close(self) -> None:
        """The listener leaves."""
        with self._change:
            self.closed = True
            self._chunks.clear()
            self._change.notify_all()
        self._tell()

    def take(self, wait: bool) -> AudioChunk | None:
        """The next chunk; None where there is none yet and ``wait`` is False.

        Raises:
            StopIteration: there are no more.
            Exception: what generation raised, once.
        """
        with self._change:
            while not self._chunks and not self._done and not self.closed and wait:
                self._change.wait()
            if self._chunks:
                chunk = self._chunks.popleft()
                self._change.notify_all()
                return chunk
            if self.closed or self._done:
                error, self._error = self._error, None
                if error is not None and not self.closed:
                    raise error
                raise StopIteration
            return None

    async def listen(self) -> AsyncIterator[AudioChunk]:
        """The chunks, without blocking the event loop; raises as :meth:`take`."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
                loop.call_soon_threadsafe(changed.set)

        self.on_change = tell
        while True:
            changed.clear()
            try:
                chunk = self.take(wait=False)
            except StopIteration:
                return
            if chunk is None:
                await changed.wait()
            else:
                yield chunk

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()


class AudioStream:
    """Chunks of an utterance, as :func:`stream_of` makes them; iterate over it, or close it early.

    ``with`` closes it at the end of the block. What generation raises, the iteration raises, after the chunks that were made
    before.
    """

    def __init__(self, channel: Channel, run: Callable[[], None], name: str = "csm-stream") -> None:
        self._channel = channel
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[AudioChunk]:
        return self

    def __next__(self) -> AudioChunk:
        try:
            chunk = self._channel.take(wait=True)
        except StopIteration:
            self._thread.join()
            raise
        assert chunk is not None
        return chunk

    def close(self, wait: bool = True) -> None:
        """Stop generation at its next frame and give everything back; ``wait`` until it has stopped."""
        self._channel.close()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._channel.closed

    @property
    def running(self) -> bool:
        """Whether frames are still being made."""
        return self._thread.is_alive()

    def __enter__(self) -> AudioStream:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __del__(self) -> None:
        channel = getattr(self, "_channel", None)
        if channel is not None:
            channel.close()


class AsyncAudioStream:
    """The same for ``async for``: nothing blocks the event loop, and cancellation of the task closes the stream."""

    def __init__(self, start: Callable[[], AudioStream], channel: Channel) -> None:
        self._start, self._channel = start, channel
        self._chunks = channel.listen()
        self._stream: AudioStream | None = None

    def __aiter__(self) -> AsyncAudioStream:
        return self

    async def __anext__(self) -> AudioChunk:
        if self._stream is None:
            self._stream = self._start()
        try:
            return await anext(self._chunks)
        except asyncio.CancelledError:
            self._channel.close()
            raise

    async def aclose(self) -> None:
        """Stop generation at its next frame, and wait until it has."""
        self._channel.close()
        if self._stream is not None:
            await asyncio.to_thread(self._stream.close)

    async def __aenter__(self) -> AsyncAudioStream:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.aclose()


class _Sink:
    """The streamer that ``generate`` gets: the prompt first, which is no frame, then frames ``[N, K]``."""

    def __init__(self, rows_of: Callable[[int], list[RowSound]], channel: Channel) -> None:
        self._rows_of, self._channel = rows_of, channel
        self._prompt_seen = False
        self.rows: list[RowSound] = []

    @property
    def waited(self) -> float:
        """Seconds that generation has waited for the listener."""
        return self._channel.waited

    def put(self, value: Tensor) -> None:
        self._channel.check()
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if not self.rows:
            self.rows = self._rows_of(len(value))
        for row, codes in zip(self.rows, value):
            self._pass(row.add(codes))

    def end(self) -> None:
        for row in self.rows:
            if not row.ended:
                self._pass(row.finish())

    def _pass(self, chunk: AudioChunk | None) -> None:
        if chunk is not None:
            self._channel.put(chunk)


def stream_of(
    generate: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    codec: Callable[[], Any],
    end_code: int,
    chunk_frames: int | Sequence[int],
    ahead: int | None,
    watermark: Callable[[Tensor, int], Tensor] | None,
    metrics: Metrics,
    yields: Callable[[], bool],
) -> tuple[Channel, Callable[[], None]]:
    """A channel, and what fills it when it is run in a thread.

    Args:
        generate: takes ``arguments`` and a streamer.
        arguments: of ``generate``.
        codec: the codec to decode with, asked for once frames are there.
        end_code: see :class:`RowSound`.
        chunk_frames: frames per chunk, see :func:`schedule_of`.
        ahead: see :class:`Channel`.
        watermark: called with each chunk's samples ``[S]`` fp32 and the rate; what it returns is what is heard.
        metrics: where times and faults go.
        yields: see :class:`Channel`.

    Raises:
        ValueError: a bad argument.
    """
    schedule = schedule_of(chunk_frames)
    if ahead is not None and (type(ahead) is not int or ahead < 1):
        raise ValueError(f"ahead must be a number of chunks of at least 1 or None, got {ahead!r}")
    if watermark is not None and not callable(watermark):
        raise ValueError(f"watermark must be callable with samples and their rate, got {watermark!r}")
    for name in ("streamer", "output_audio", "return_dict_in_generate"):
        if arguments.get(name):
            raise ValueError(f"{name} is stream()'s own business, got {arguments[name]!r}; leave it out")
    channel = Channel(ahead, yields)
    started = time.perf_counter()

    def rows_of(count: int) -> list[RowSound]:
        made = codec()
        return [RowSound(made, end_code, schedule, row, watermark, metrics, started) for row in range(count)]

    def run() -> None:
        sink = _Sink(rows_of, channel)
        try:
            generate(**arguments, streamer=sink)
            channel.end()
        except StreamClosed:
            metrics.count("stream.closed")
            channel.end()
        except BaseException as error:  # whatever it is, the listener is told
            channel.end(error)

    return channel, run
