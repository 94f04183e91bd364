"""Streams: their sound is the offline decode of the same codes, whoever listens, leaves or is slow."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from csm_models import FRAME_SAMPLES, audio_prompt, build, copy_first_codebook, stock, text_prompt
from torch import Tensor

from csm_runtime import accelerate
from csm_runtime.codec_stream import CodecStream
from csm_runtime.engine import Engine
from csm_runtime.generate import Turns
from csm_runtime.streaming import AudioChunk, AudioStream, Channel, StreamClosed

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
ONE = text_prompt((5,))
FRAMES = 9


@pytest.fixture(scope="module")
def model() -> Any:
    return accelerate(build("base"), mode="eager", progress=False, guard=False)


@pytest.fixture(scope="module")
def ending() -> Any:
    """Says the end of speech in the frames 4, 11 and 0 of its three rows."""
    made = copy_first_codebook(build("eight_codebooks", seed=1))
    made.config.codebook_eos_token_id = 1
    made.generation_config.eos_token_id = 5
    return accelerate(made, mode="eager", progress=False, guard=False, batch_sizes=(4,))


def joined(chunks: list[AudioChunk], row: int = 0) -> Tensor:
    """The sound of a row, after a look at how its chunks say they lie."""
    mine = [chunk for chunk in chunks if chunk.row == row]
    at = 0
    for index, chunk in enumerate(mine):
        assert (chunk.index, chunk.start) == (index, at) and chunk.samples.dtype == torch.float32
        assert len(chunk.samples) == chunk.frames * FRAME_SAMPLES and chunk.rate == 24_000
        at += len(chunk.samples)
    return torch.cat([chunk.samples for chunk in mine]) if mine else torch.zeros(0)


def close(ours: Tensor, wanted: Tensor) -> None:
    assert ours.shape == wanted.shape
    assert float((ours - wanted.float()).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("size", [1, 2, 4, 100, (1, 3, 2)])
def test_a_stream_is_the_offline_sound(model: Any, size: Any) -> None:
    wanted = model.generate(**ONE, max_new_tokens=FRAMES, output_audio=True, **GREEDY)[0]
    assert float(wanted.std()) > 1e-3
    chunks = list(model.acceleration.stream(**ONE, max_new_tokens=FRAMES, chunk_frames=size, **GREEDY))
    close(joined(chunks), wanted)
    sizes = [size] if isinstance(size, int) else list(size)
    wanted_sizes, left = [], FRAMES
    while left:
        wanted_sizes.append(min(left, sizes[min(len(wanted_sizes), len(sizes) - 1)]))
        left -= wanted_sizes[-1]
    assert [chunk.frames for chunk in chunks] == wanted_sizes
    times = [chunk.made_after for chunk in chunks]
    assert times == sorted(times) and all(0 < chunk.codec_seconds < chunk.made_after for chunk in chunks)


def test_a_seed_holds_in_a_stream(model: Any) -> None:
    wanted = model.generate(**ONE, max_new_tokens=FRAMES, output_audio=True, seed=3)[0]
    made = list(model.acceleration.stream(**ONE, max_new_tokens=FRAMES, seed=3))
    close(joined(made), wanted)


def test_a_reference_is_heard_in_a_stream(model: Any) -> None:
    inputs = audio_prompt(model, [[3 * FRAME_SAMPLES]])
    wanted = model.generate(**inputs, max_new_tokens=4, output_audio=True, **GREEDY)[0]
    close(joined(list(model.acceleration.stream(**inputs, max_new_tokens=4, **GREEDY))), wanted)


@pytest.mark.parametrize("size", [1, 3])
def test_rows_end_where_their_speech_ends(ending: Any, size: int) -> None:
    inputs = text_prompt((5, 9, 3))
    codes = stock(ending, **inputs, max_new_tokens=14, **GREEDY)
    chunks = list(ending.acceleration.stream(**inputs, max_new_tokens=14, chunk_frames=size, **GREEDY))
    lengths = []
    for row in range(3):
        ended = (codes[row] == 1).all(-1)
        frames = int(ended.int().argmax()) if bool(ended.any()) else codes.shape[1]
        lengths.append(frames)
        made = joined(chunks, row)
        assert len(made) == frames * FRAME_SAMPLES
        if frames:
            with torch.no_grad():
                close(made, ending.codec_model.decode(codes[row : row + 1, :frames].transpose(1, 2)).audio_values[0, 0])
    assert len(set(lengths)) == 3 and 0 in lengths


def test_the_first_chunk_comes_after_one_frame(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, allowed = [], threading.Semaphore(1)
    emit = Engine.emit

    def slow(self: Engine, runner: Any) -> None:
        assert allowed.acquire(timeout=60)
        emit(self, runner)
        made.append(time.perf_counter())

    monkeypatch.setattr(Engine, "emit", slow)
    stream = model.acceleration.stream(**ONE, max_new_tokens=3, **GREEDY)
    first = next(stream)
    assert first.frames == 1 and len(made) == 1
    for _ in range(2):
        allowed.release()
    assert len(list(stream)) == 2


def test_samples_are_fp32_whatever_the_model_is() -> None:
    model = accelerate(build("base", dtype=torch.bfloat16), mode="eager", progress=False, guard=False)
    codes = model.generate(**ONE, max_new_tokens=5, **GREEDY)
    codec = copy.deepcopy(model.codec_model).float()
    for module in codec.modules():
        if hasattr(module, "_embed"):
            module._embed = None
    with torch.no_grad():
        wanted = codec.decode(codes.transpose(1, 2)).audio_values[0, 0]
    handle = model.acceleration
    made = joined(list(handle.stream(**ONE, max_new_tokens=5, **GREEDY)))
    close(made, wanted)
    copied = handle._streamed.in_format()
    list(handle.stream(**ONE, max_new_tokens=2, **GREEDY))
    assert handle._streamed.in_format() is copied, "the fp32 copy is made once"
    assert model.codec_model.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- whoever listens


def test_a_slow_listener_holds_generation_back(model: Any) -> None:
    stream = model.acceleration.stream(**ONE, max_new_tokens=FRAMES, ahead=2, **GREEDY)
    before = model.acceleration.metrics.counters["frames"]
    first = next(stream)
    deadline = time.perf_counter() + 30
    while len(stream._channel._chunks) < 2 and time.perf_counter() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(stream._channel._chunks) == 2 and stream.running
    assert model.acceleration.metrics.counters["frames"] == before
    assert len([first, *stream]) == FRAMES and not stream.running


def test_another_call_does_not_wait_for_a_slow_listener(model: Any) -> None:
    stream = model.acceleration.stream(**ONE, max_new_tokens=FRAMES, ahead=1, **GREEDY)
    first = next(stream)
    assert model.generate(**ONE, max_new_tokens=2, **GREEDY).shape[1] == 2  # from the thread that listens
    assert model.acceleration.report().mode == "eager"
    assert sum(chunk.frames for chunk in [first, *stream]) == FRAMES


@pytest.mark.parametrize("how", ["close", "with", "forgotten"])
def test_leaving_early_stops_generation(model: Any, how: str) -> None:
    handle = model.acceleration
    before = handle.metrics.counters["stream.closed"]
    stream = handle.stream(**ONE, max_new_tokens=40, ahead=1, **GREEDY)
    thread = stream._thread
    next(stream)
    if how == "close":
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
    elif how == "with":
        with stream:
            pass
    else:
        there = weakref.ref(stream)
        del stream
        gc.collect()
        assert there() is None
    thread.join(30)
    assert not thread.is_alive() and handle.metrics.counters["stream.closed"] == before + 1
    assert handle.guard.rung == "fast" and not handle.metrics.faults
    assert model.generate(**ONE, max_new_tokens=2, **GREEDY).shape[1] == 2


def test_what_generation_raises_the_listener_gets(model: Any) -> None:
    stream = model.acceleration.stream(**ONE, max_new_tokens=2, temperature=-1.0, do_sample=True)
    with pytest.raises(ValueError, match="temperature"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert not stream.running or stream.close() is None


def test_frames_before_an_error_are_heard(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamer's own error ends a call: here the codec meets a code that it has no vector for."""
    decode, calls = CodecStream.decode, []

    def broken(self: CodecStream, codes: Tensor) -> Tensor:
        calls.append(codes.shape[1])
        if len(calls) == 3:
            raise IndexError("codes must be 0 to 31, got 99")
        return decode(self, codes)

    monkeypatch.setattr(CodecStream, "decode", broken)
    stream = model.acceleration.stream(**ONE, max_new_tokens=6, **GREEDY)
    heard = [next(stream), next(stream)]
    with pytest.raises(IndexError, match="99"):
        next(stream)
    assert len(joined(heard)) == 2 * FRAME_SAMPLES


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_fault_of_the_chunked_codec_loses_nothing(model: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    wanted = model.generate(**ONE, max_new_tokens=6, output_audio=True, **GREEDY)[0]
    decode, calls = CodecStream.decode, []

    def broken(self: CodecStream, codes: Tensor) -> Tensor:
        calls.append(codes.shape[1])
        if len(calls) == 3 and fault == "raises":
            raise RuntimeError("a bug")
        return decode(self, codes) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(CodecStream, "decode", broken)
    metrics = model.acceleration.metrics
    chunks = list(model.acceleration.stream(**ONE, max_new_tokens=6, **GREEDY))
    close(joined(chunks), wanted)
    assert len(chunks) == 6 and len(calls) == 3
    assert any("chunk by chunk failed" in what for what in metrics.faults)
    metrics.faults.clear()


def test_a_codec_that_looks_ahead_is_decoded_from_the_start() -> None:
    model = build("base")
    model.codec_model.config.use_causal_conv = False
    accelerate(model, mode="eager", progress=False, guard=False)
    chunks = list(model.acceleration.stream(**ONE, max_new_tokens=3, **GREEDY))
    assert [chunk.frames for chunk in chunks] == [1, 1, 1]
    assert len(joined(chunks)) == 3 * FRAME_SAMPLES
    assert any("cannot be decoded chunk by chunk" in what for what in model.acceleration.metrics.faults)


def test_a_stream_on_the_stock_path(model: Any) -> None:
    wanted = model.generate(**ONE, max_new_tokens=5, output_audio=True, **GREEDY)[0]
    handle = model.acceleration
    made = list(handle.stream(**ONE, max_new_tokens=5, output_scores=True, **GREEDY))
    assert handle.metrics.stock_reasons["output_scores"] == 1
    close(joined(made), wanted)


def test_the_watermark_is_what_is_heard(model: Any) -> None:
    plain = joined(list(model.acceleration.stream(**ONE, max_new_tokens=4, chunk_frames=2, **GREEDY)))
    rates = []

    def mark(samples: Tensor, rate: int) -> Tensor:
        rates.append(rate)
        return samples + 0.25

    marked = list(model.acceleration.stream(**ONE, max_new_tokens=4, chunk_frames=2, watermark=mark, **GREEDY))
    assert torch.equal(joined(marked), plain + 0.25) and rates == [24_000, 24_000]
    stream = model.acceleration.stream(**ONE, max_new_tokens=4, watermark=lambda samples, rate: samples[:-1], **GREEDY)
    with pytest.raises(ValueError, match=r"watermark must return 1920 samples .* got \(1919,\)"):
        next(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_frames": 0}, "chunk_frames must be .* got 0"),
        ({"chunk_frames": (1, 0)}, r"chunk_frames must be .* got \(1, 0\)"),
        ({"chunk_frames": "2"}, "chunk_frames must be .* got '2'"),
        ({"ahead": 0}, "ahead must be .* got 0"),
        ({"watermark": 3}, "watermark must be callable"),
        ({"streamer": object()}, "streamer is stream\\(\\)'s own business"),
        ({"output_audio": True}, "output_audio is stream\\(\\)'s own business"),
    ],
)
def test_bad_arguments_are_refused_at_once(model: Any, options: dict[str, Any], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match=message):
        model.acceleration.stream(**ONE, **options)
    assert threading.active_count() == before


def test_times_are_kept(model: Any) -> None:
    metrics = model.acceleration.metrics
    metrics.reset_times()
    spoken = metrics.snapshot()["audio"]["seconds"] or 0.0
    list(model.acceleration.stream(**ONE, max_new_tokens=5, **GREEDY))
    assert len(metrics.times("first_audio")) == 1 and len(metrics.times("codec")) == 5
    assert metrics.snapshot()["audio"]["seconds"] == pytest.approx(spoken + 0.4)


# ---------------------------------------------------------------------------------------------------------- asyncio


def test_async_streams_take_turns(model: Any) -> None:
    wanted = [model.generate(**ONE, max_new_tokens=4, output_audio=True, seed=seed)[0] for seed in range(3)]

    async def listen(seed: int) -> list[AudioChunk]:
        return [chunk async for chunk in model.acceleration.astream(**ONE, max_new_tokens=4, seed=seed)]

    async def all_of_them() -> list[list[AudioChunk]]:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0.002)

        heart = asyncio.create_task(beat())
        made = await asyncio.gather(*map(listen, range(3)))
        heart.cancel()
        assert beats > 5, "the event loop was blocked"
        return made

    for chunks, sound in zip(asyncio.run(all_of_them()), wanted):
        close(joined(chunks), sound)


def test_cancelling_the_task_closes_the_stream(model: Any) -> None:
    handle = model.acceleration
    before = handle.metrics.counters["stream.closed"]

    async def left() -> None:
        stream = handle.astream(**ONE, max_new_tokens=40, ahead=1, **GREEDY)

        async def listen() -> None:
            async for _ in stream:
                await asyncio.sleep(3600)

        task = asyncio.create_task(listen())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stream.aclose()

    asyncio.run(left())
    assert handle.metrics.counters["stream.closed"] == before + 1
    assert model.generate(**ONE, max_new_tokens=2, **GREEDY).shape[1] == 2


def test_async_errors_and_early_exit(model: Any) -> None:
    async def go() -> int:
        with pytest.raises(ValueError, match="temperature"):
            async for _ in model.acceleration.astream(**ONE, max_new_tokens=2, temperature=-1.0, do_sample=True):
                pass
        async with model.acceleration.astream(**ONE, max_new_tokens=40, ahead=1, **GREEDY) as stream:
            async for chunk in stream:
                return chunk.frames
        return 0

    assert asyncio.run(go()) == 1


# ---------------------------------------------------------------------------------------------------------- pieces


def test_a_channel_that_nobody_listens_to_raises_at_once() -> None:
    channel = Channel(1)
    channel.close()
    with pytest.raises(StreamClosed):
        channel.check()
    chunk = AudioChunk(torch.zeros(4), 24_000, 0, 0, 0, 1, 0.0, 0.0)
    with pytest.raises(StreamClosed):
        channel.put(chunk)


def test_closing_wakes_who_waits_on_either_side() -> None:
    channel, chunk = Channel(1), AudioChunk(torch.zeros(4), 24_000, 0, 0, 0, 1, 0.0, 0.0)

    def make() -> None:
        while True:
            channel.put(chunk)

    stream = AudioStream(channel, lambda: _until_closed(make))
    next(stream)
    time.sleep(0.1)
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 5 and not stream.running
    empty = Channel(1)
    ended: list[str] = []

    def listen() -> None:
        try:
            empty.take(wait=True)
        except StopIteration:
            ended.append("stop")

    waiting = threading.Thread(target=listen)
    waiting.start()
    time.sleep(0.05)
    empty.close()
    waiting.join(5)
    assert ended == ["stop"]


def _until_closed(make: Any) -> None:
    with pytest.raises(StreamClosed):
        make()


def test_turns_count_who_waits() -> None:
    turns, held, done = Turns(), threading.Event(), threading.Event()

    def hold() -> None:
        with turns, turns:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    other = threading.Thread(target=lambda: turns.__enter__() or turns.__exit__())
    other.start()
    deadline = time.perf_counter() + 30
    while turns.waiting != 1 and time.perf_counter() < deadline:
        time.sleep(0.005)
    assert turns.waiting == 1
    done.set()
    holder.join(30)
    other.join(30)
    assert turns.waiting == 0
