"""Several utterances in one engine: each says what it says alone, whoever joins, leaves or fails beside it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from csm_models import (
    FRAME_SAMPLES,
    audio_prompt,
    build,
    code_prompt,
    copy_first_codebook,
    on_stock_path,
    stock,
    text_prompt,
)
from test_late_end import ENDINGS, THREE, row
from test_no_recompile import no_new_graphs
from torch import Tensor

from csm_runtime import accelerate, batch_size, compiling
from csm_runtime.adapters import hf_call
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.batch_size import BatchTuning, tune_batch_size
from csm_runtime.batching import Batcher, QueueFull
from csm_runtime.engine import Engine
from csm_runtime.generate import as_it_was, prepared
from csm_runtime.guard import GuardConfig, Interrupted
from csm_runtime.slots import Slots

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
SAMPLED = {"do_sample": True, "depth_decoder_do_sample": True}
FRAMES = 12
SOON = 60.0
"""Seconds after which a test that waits has failed."""


def make(mode: str = "eager", config: str = "base", **options: Any) -> Any:
    options.setdefault("batch_sizes", (1,))
    if mode == "native":
        options.setdefault("without", ("compiled prefill",))  # 6 s for every model
    return accelerate(build(config), mode=mode, progress=False, **options)


@pytest.fixture(scope="module")
def kept() -> Callable[[str], Any]:
    """``kept(mode)``: a model for the module; tests leave its weights and its guard as they are."""
    made: dict[str, Any] = {}

    def model(mode: str = "eager") -> Any:
        if mode not in made:
            made[mode] = make(mode)
        return made[mode]

    return model


@pytest.fixture(scope="module")
def model(kept: Callable[[str], Any]) -> Any:
    return kept("eager")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "csm-batcher"]


def calls(model: Any) -> list[dict[str, Any]]:
    """Inputs and settings that have nothing in common."""
    several = [
        {**text_prompt((3,), seed=3), **SAMPLED, "seed": 5, "max_new_tokens": 9},
        {**text_prompt((17,), seed=4), **GREEDY, "seed": 1, "max_new_tokens": 4},
        {**text_prompt((1,), seed=5), **SAMPLED, "temperature": 0.4, "top_k": 3, "seed": -(2**62)},
        {**audio_prompt(model, [[3 * FRAME_SAMPLES]]), **SAMPLED, "depth_decoder_temperature": 1.7, "seed": 2},
        {"input_ids": code_prompt(model, 1, 6), **SAMPLED, "top_p": 0.6, "depth_decoder_top_k": 4, "seed": 5},
        {**{key: value[2:] for key, value in text_prompt((5, 9, 3)).items()}, **SAMPLED, "seed": 8},
        {**text_prompt((3,), seed=3), **SAMPLED, "seed": 6, "max_new_tokens": 1},
        {**text_prompt((3,), seed=3), "do_sample": False, "depth_decoder_do_sample": True, "seed": 7},
    ]
    return [{"max_new_tokens": FRAMES, **one} for one in several]


def alone(model: Any, call: dict[str, Any], number: int = 0) -> Tensor:
    """What ``generate`` makes of one call, ``[F, codebooks]``, without what it leaves in the depth decoder's config."""
    with as_it_was(model.depth_decoder.generation_config):
        made = model.generate(**call, utterance_ids=[number])[0]
    return made[call["input_ids"].shape[1] :] if call["input_ids"].ndim == 3 else made


class Slow:
    """Lets every frame of every engine take some time, and may do something before one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        self.frames, self.before = 0, {}
        emit = Engine.emit

        def slow(engine: Engine, runner: Any) -> None:
            time.sleep(seconds)
            self.frames += 1
            self.before.get(self.frames, lambda engine, runner: None)(engine, runner)
            emit(engine, runner)

        patch.setattr(Engine, "emit", slow)
        self.before: dict[int, Callable[[Any, Any], None]]


# ------------------------------------------------------------------------------------------- the same as alone

MODES = ["eager", "native", pytest.param("compile", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_codes_are_those_of_a_call_alone(kept: Any, mode: str, slots: int) -> None:
    model = kept(mode)
    wanted = [alone(model, call, number) for number, call in enumerate(calls(model))]
    assert len({tuple(one.flatten().tolist()) for one in wanted}) == len(wanted)
    for order in range(3 if mode == "eager" else 2):
        which = random.Random(order).sample(range(len(wanted)), len(wanted))
        before = dict(model.acceleration.metrics.counters)
        with model.acceleration.batcher(slots=slots) as batcher:
            made = {n: batcher.submit(**calls(model)[n], utterance_id=n) for n in which}
            for n in which:
                got = made[n].result(SOON)
                assert got.dtype == torch.int64 and got.device.type == "cpu"
                assert torch.equal(got, wanted[n]), (mode, slots, order, n)
        counters = model.acceleration.metrics.counters
        grown = {
            name: counters[name] - before.get(name, 0) for name in ("frames", "faults", "batch.joined", "batch.left")
        }
        assert grown == {"frames": sum(map(len, wanted)), "faults": 0, "batch.joined": 8, "batch.left": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_sums_do_not_depend_on_the_slots(dtype: torch.dtype) -> None:
    model = build("eight_codebooks", dtype=dtype)
    accelerate(model, mode="native", precision="int8", progress=False, without=("compiled prefill",))
    several = [{**text_prompt((n,), seed=n), **SAMPLED, "seed": n, "max_new_tokens": FRAMES} for n in range(1, 9)]
    wanted = [alone(model, call, n) for n, call in enumerate(several)]
    with model.acceleration.batcher(slots=5) as batcher:
        made = [batcher.submit(**call, utterance_id=n) for n, call in enumerate(several)]
        assert all(torch.equal(one.result(SOON), wanted[n]) for n, one in enumerate(made))


def test_greedy_codes_are_the_stock_models(model: Any) -> None:
    with model.acceleration.batcher(slots=3) as batcher:
        made = [batcher.submit(**row(n), **GREEDY, max_new_tokens=FRAMES) for n in range(3)]
        for n, one in enumerate(made):
            assert torch.equal(one.result(SOON), stock(model, **row(n), **GREEDY, max_new_tokens=FRAMES)[0])


@pytest.mark.parametrize("mode", ["eager", "native"])
@pytest.mark.parametrize("name", list(ENDINGS))
def test_each_ends_where_its_speech_ends(name: str, mode: str) -> None:
    config, seed, eos, ends = ENDINGS[name]
    model = copy_first_codebook(build(config, seed=seed))
    model.config.codebook_eos_token_id = eos
    accelerate(model, mode=mode, progress=False, without=("compiled prefill",))
    with model.acceleration.batcher(slots=2) as batcher:  # the third joins where another has left
        made = [batcher.submit(**row(n), **GREEDY, max_new_tokens=14, sound=True) for n in range(3)]
        for n, end in enumerate(ends):
            codes = made[n].result(SOON)
            assert len(codes) == (14 if end is None else end + 1)
            assert torch.equal(codes, stock(model, **row(n), **GREEDY, max_new_tokens=14)[0])
            sounding = 14 if end is None else end
            assert sum(chunk.frames for chunk in made[n]) == sounding
            assert made[n].audio().shape == (sounding * FRAME_SAMPLES,)


def test_joining_and_leaving_between_frames(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every moment of another's speech is one to join at, or to leave at."""
    prompt = text_prompt((5,))
    long, short = ({**prompt, **SAMPLED, "seed": n, "max_new_tokens": frames} for n, frames in ((1, 30), (2, 3)))
    wanted = alone(model, long), alone(model, short)
    slow = Slow(monkeypatch)
    with model.acceleration.batcher(slots=2) as batcher:
        joined: list[Any] = []
        slow.frames = 0
        for at in range(1, 24, 5):
            slow.before[at] = lambda engine, runner: joined.append(batcher.submit(**short))
        first = batcher.submit(**long)
        assert torch.equal(first.result(SOON), wanted[0])
        assert len(joined) == 5
        assert all(torch.equal(one.result(SOON), wanted[1]) for one in joined)
        assert [one.started_at for one in joined] == sorted(one.started_at for one in joined)
        assert all(one.started_at < one.first_frame_at < one.ended_at < first.ended_at for one in joined)


@pytest.mark.parametrize("mode", ["eager", "native"])
def test_empty_slots_never_run_over_their_end(kept: Any, mode: str) -> None:
    """More frames than a cache has positions, beside rows that nobody has ever spoken in, and one that was left."""
    model = kept(mode)
    call = {**text_prompt((5,)), **SAMPLED, "seed": 1, "max_new_tokens": 30}
    wanted, faults = alone(model, call), model.acceleration.metrics.counters["faults"]
    with model.acceleration.batcher(slots=3) as batcher:
        batcher.submit(**{**call, "max_new_tokens": 9})
        for _ in range(4):
            assert torch.equal(batcher.submit(**call).result(SOON), wanted)
        state = batcher._slots._runner.state
        assert int(state.length[3]) <= 1 and int(state.frame[3]) > state.capacity == 64
    assert model.acceleration.metrics.counters["faults"] == faults


def test_one_prompt_between_two_frames(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long queue does not keep those waiting who speak; where nobody speaks, all slots are filled at once."""
    log: list[str] = []
    prefill, slow = Passes.prefill, Slow(monkeypatch)
    monkeypatch.setattr(Passes, "prefill", lambda *args: log.append("prompt") or prefill(*args))
    with model.acceleration.batcher(slots=4) as batcher:
        log.clear()
        slow.frames = 0
        for at in range(1, 40):
            slow.before[at] = lambda engine, runner: log.append("frame")
        with batcher._handle._lock:
            made = [batcher.submit(**text_prompt((4,)), **GREEDY, max_new_tokens=3 + 2 * (n % 5)) for n in range(10)]
            time.sleep(0.05)
        for one in made:
            one.result(SOON)
    starts = [one.started_at for one in made]
    assert starts == sorted(starts), "first come, first served"
    text = " ".join(log)
    assert text.count("prompt") == 10
    assert "frame prompt prompt" not in text


@pytest.mark.parametrize("mode", ["native", pytest.param("compile", marks=pytest.mark.slow)])
def test_nothing_is_made_anew(kept: Any, mode: str) -> None:
    model = kept(mode)
    handle = model.acceleration
    with handle.batcher(slots=2) as batcher:
        batcher.submit(**text_prompt((4,)), **GREEDY, max_new_tokens=3).result(SOON)
        model.generate(**text_prompt((4, 3)), **GREEDY, max_new_tokens=2)
        runners = len(handle._engine._all())
        slots = batcher._slots
        runner, steps, frame = slots._runner, slots._runner.steps, slots._runner.frame
        with no_new_graphs():
            for call in calls(model):
                batcher.submit(**call)
            for call in calls(model)[:3]:
                batcher.submit(**call).cancel()
            model.generate(**text_prompt((4, 3)), **GREEDY, max_new_tokens=2)
            batcher.submit(**text_prompt((30,)), **GREEDY, max_new_tokens=3).result(SOON)
        assert (slots._runner, slots._runner.steps, slots._runner.frame) == (runner, steps, frame)
        assert len(handle._engine._all()) == runners


def test_calls_and_reports_come_in_between(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batcher's own bucket, too: its rows are nobody else's."""
    call = {**text_prompt((5,)), **SAMPLED, "seed": 1, "max_new_tokens": 40}
    wanted, two = alone(model, call), model.generate(**text_prompt((5, 4)), **GREEDY, max_new_tokens=5)
    Slow(monkeypatch, 0.01)
    with model.acceleration.batcher(slots=2) as batcher:
        speaking = batcher.submit(**call, sound=True)
        next(iter(speaking))
        assert torch.equal(model.generate(**text_prompt((5, 4)), **GREEDY, max_new_tokens=5), two)
        assert model.acceleration.report().metrics["watched"]["batch"]["speaking"] == 1
        assert not speaking.done
        assert torch.equal(speaking.result(SOON), wanted)


# ------------------------------------------------------------------------------------------------------ callers


def test_sound_is_that_of_a_call_alone(model: Any) -> None:
    call = {**text_prompt((5,)), **SAMPLED, "seed": 3, "max_new_tokens": 7}
    wanted = model.generate(**call, utterance_ids=[4], output_audio=True)[0]
    with model.acceleration.batcher(slots=3, chunk_frames=(1, 3)) as batcher:
        others = [batcher.submit(**text_prompt((n,)), **GREEDY, max_new_tokens=FRAMES, sound=True) for n in (3, 9)]
        one = batcher.submit(**call, utterance_id=4, sound=True)
        chunks = list(one)
        assert [chunk.frames for chunk in chunks] == [1, 3, 3]
        made = torch.cat([chunk.samples for chunk in chunks])
        assert made.dtype == torch.float32
        assert float((made - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
        assert torch.equal(one.audio(), wanted)
        assert all(sum(chunk.frames for chunk in other) == FRAMES for other in others)
        with pytest.raises(ValueError, match="sound=True"):
            next(iter(batcher.submit(**call)))


@pytest.mark.parametrize("sound", [False, True])
def test_cancelling(model: Any, monkeypatch: pytest.MonkeyPatch, sound: bool) -> None:
    call = {**text_prompt((5,)), **SAMPLED, "seed": 1, "max_new_tokens": 40, "sound": sound}
    wanted = alone(model, {**{k: v for k, v in call.items() if k != "sound"}})
    Slow(monkeypatch, 0.01)
    with model.acceleration.batcher(slots=2) as batcher:
        first, second, third, fourth = (batcher.submit(**call) for _ in range(4))
        while second.first_frame_at is None:
            time.sleep(0.005)
        assert third.started_at is None
        assert third.cancel() and third.done and third.cancelled
        assert batcher.status()["waiting"] == 1
        assert second.cancel()
        for one in (second, third):
            with pytest.raises(concurrent.futures.CancelledError):
                one.result(SOON)
            if sound:
                with pytest.raises(concurrent.futures.CancelledError):
                    list(one)
        with pytest.raises(TimeoutError):
            first.result(0.001)
        assert torch.equal(first.result(SOON), wanted) and torch.equal(fourth.result(SOON), wanted)
        assert not first.cancel() and not first.cancelled
    counters = model.acceleration.metrics.counters
    assert counters["batch.cancelled"] >= 2


def test_a_full_queue_refuses(model: Any) -> None:
    with model.acceleration.batcher(slots=1, queue=2) as batcher:
        with model.acceleration._lock:
            made = []
            with pytest.raises(QueueFull, match=r"2 utterances wait for one of 1 slots, and queue=2 may"):
                for _ in range(6):
                    made.append(batcher.submit(**text_prompt((4,)), **GREEDY, max_new_tokens=2))
                    time.sleep(0.02)
        assert len(made) in (2, 3)
        assert all(len(one.result(SOON)) == 2 for one in made)
        assert len(batcher.submit(**text_prompt((4,)), **GREEDY, max_new_tokens=2).result(SOON)) == 2
    assert issubclass(QueueFull, RuntimeError) and model.acceleration.metrics.counters["batch.refused"] >= 1


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"input_ids": torch.tensor([[1, 2], [3, 4]])}, "2 rows"),
        ({"input_ids": torch.tensor([[1, 9999]])}, "text token ids from 1 to 9999"),
        ({"input_ids": None}, "input_ids is missing"),
        ({"temperature": -1.0, "do_sample": True}, "temperature must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"seed": [1, 2]}, "seed must be"),
        ({"utterance_id": "x"}, "utterance_ids must be"),
        ({"streamer": object()}, "streamer is the batcher's own business"),
        ({"output_audio": True}, "output_audio is the batcher's"),
        ({"input_values": torch.zeros(1, 1, 9)}, "belong together"),
    ],
)
def test_bad_input_is_refused_at_once(model: Any, wrong: dict[str, Any], match: str) -> None:
    with model.acceleration.batcher(slots=1) as batcher:
        with pytest.raises(ValueError, match=match):
            batcher.submit(**{"input_ids": torch.tensor([[1, 2]]), "max_new_tokens": 2, **wrong})
        assert not batcher._open


def test_what_only_stock_finds_wrong(model: Any) -> None:
    with model.acceleration.batcher(slots=1) as batcher:
        one = batcher.submit(**text_prompt((3,)), max_new_tokens=2, no_such_argument=1)
        with pytest.raises(ValueError, match="no_such_argument"):
            one.result(SOON)
    small = make(max_positions=16)
    with small.acceleration.batcher(slots=1) as batcher:
        with pytest.raises(ValueError, match="max_positions=16 is too small"):
            batcher.submit(**text_prompt((9,)), max_new_tokens=9)
        assert len(batcher.submit(**text_prompt((9,)), **GREEDY, max_new_tokens=8).result(SOON)) == 8


def test_bad_batchers(model: Any) -> None:
    for wrong in (0, 17, True, 2.0):
        with pytest.raises(ValueError, match="slots must be an integer from 1 to 16"):
            Batcher(model, slots=wrong)
    with pytest.raises(ValueError, match="queue must be"):
        Batcher(model, queue=0)
    with pytest.raises(ValueError, match="chunk_frames must be"):
        Batcher(model, chunk_frames=0)
    with pytest.raises(TypeError, match="accelerate"):
        Batcher(build())


def test_what_is_written_later_is_not_read(model: Any) -> None:
    call = {**text_prompt((5,)), **GREEDY, "max_new_tokens": 3}
    wanted = alone(model, call)
    with model.acceleration.batcher(slots=1) as batcher, model.acceleration._lock:
        one = batcher.submit(**call)
        call["input_ids"].fill_(1)
    assert torch.equal(one.result(SOON), wanted)


def test_arguments_of_one_are_not_those_of_the_next(model: Any) -> None:
    before = dict(vars(model.depth_decoder.generation_config))
    with model.acceleration.batcher(slots=1) as batcher:
        batcher.submit(**text_prompt((3,)), **GREEDY, max_new_tokens=2, depth_decoder_temperature=0.3).result(SOON)
    assert vars(model.depth_decoder.generation_config) == before


@pytest.mark.parametrize("drain", [True, False])
def test_closing(model: Any, monkeypatch: pytest.MonkeyPatch, drain: bool) -> None:
    Slow(monkeypatch, 0.01)
    batcher = model.acceleration.batcher(slots=2)
    made = [batcher.submit(**text_prompt((3,)), **GREEDY, max_new_tokens=9) for _ in range(5)]
    while made[0].first_frame_at is None:
        time.sleep(0.005)
    batcher.close(drain=drain)
    batcher.close()
    assert all(one.done for one in made)
    assert [one.cancelled for one in made] == [not drain] * 5
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(**text_prompt((3,)))
    assert len(model.acceleration._engine._owned) == 0


def test_an_error_in_the_block_cancels(model: Any) -> None:
    with pytest.raises(KeyError), model.acceleration.batcher(slots=1) as batcher:
        one = batcher.submit(**text_prompt((3,)), **GREEDY, max_new_tokens=50)
        raise KeyError
    assert one.cancelled


def test_after_restore() -> None:
    model = make()
    with model.acceleration.batcher(slots=1) as batcher:
        model.acceleration.restore()
        with pytest.raises(RuntimeError, match="make a new batcher"):
            batcher.submit(**text_prompt((3,)))


def test_asyncio_callers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    several = calls(model)
    wanted = [alone(model, call, n) for n, call in enumerate(several)]
    Slow(monkeypatch, 0.002)

    async def listen(batcher: Batcher, n: int) -> list[int]:
        one = batcher.submit(**several[n], utterance_id=n, sound=True)
        frames = [chunk.frames async for chunk in one]
        assert torch.equal(await one, wanted[n])
        return frames

    async def give_up(batcher: Batcher, how: str) -> Any:
        one = batcher.submit(**text_prompt((3,)), **GREEDY, max_new_tokens=50, sound=True)
        if how == "wait":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(one, 0.03)
            return one
        task = asyncio.create_task(_all(one))
        await asyncio.sleep(0.03)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return one

    async def main() -> None:
        with model.acceleration.batcher(slots=3) as batcher:
            heard = await asyncio.gather(*(listen(batcher, n) for n in range(len(several))))
            assert [sum(frames) for frames in heard] == [len(one) for one in wanted]
            for how in ("wait", "all"):
                one = await give_up(batcher, how)
                assert one.cancelled
            with pytest.raises(asyncio.CancelledError):
                await one
            await asyncio.to_thread(batcher.close)

    asyncio.run(main())


async def _all(one: Any) -> list[Any]:
    return [chunk async for chunk in one]


def test_thread_callers(model: Any) -> None:
    several = calls(model)
    wanted = [alone(model, call, n) for n, call in enumerate(several)]
    with model.acceleration.batcher(slots=3) as batcher, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def speak(n: int) -> bool:
            return torch.equal(batcher.submit(**several[n % 8], utterance_id=n % 8).result(SOON), wanted[n % 8])

        assert all(pool.map(speak, range(32)))
        status = batcher.status()
        assert status["slots"] == 3 and status["waiting"] == 0 and status["frames_per_second"] > 0


# ------------------------------------------------------------------------------------------------------- faults


def faulty(kind: str) -> Callable[[Any, Any], None]:
    def spoil(engine: Engine, runner: Any) -> None:
        if kind == "NaN":
            runner.state.hidden[1].fill_(float("nan"))
        elif kind == "memory":
            raise torch.OutOfMemoryError("injected: you tried to allocate 4096 bytes")
        else:
            raise RuntimeError("injected")

    return spoil


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("mode", ["eager", "native"])
@pytest.mark.parametrize("kind", ["exception", "NaN", "memory", "memory twice"])
def test_a_fault_costs_no_token(monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, sound: bool) -> None:
    """On the next rung, which is the stock path in mode eager and for a second lack of memory: greedy there."""
    model = make(mode)
    ends_on_stock = mode == "eager" and kind != "memory" or kind == "memory twice"
    drawn = GREEDY if ends_on_stock else SAMPLED
    several = [{**text_prompt((n,), seed=n), **drawn, "seed": n, "max_new_tokens": 8 + n} for n in range(3, 9)]
    wanted = [alone(model, call, n) for n, call in enumerate(several)]
    handle = model.acceleration
    slow = Slow(monkeypatch)
    with handle.batcher(slots=4) as batcher:
        handle.metrics.counters.clear()
        slow.frames = 0
        slow.before[4] = faulty(kind.split(maxsplit=1)[0])
        if kind == "memory twice":
            slow.before[7] = faulty("memory")
        made = [batcher.submit(**call, utterance_id=n, sound=sound) for n, call in enumerate(several)]
        for n, one in enumerate(made):
            assert torch.equal(one.result(SOON), wanted[n]), n
            if sound:
                assert sum(chunk.frames for chunk in one) == len(wanted[n])
        rung = handle.guard.rung
        counters = handle.metrics.counters
        if kind == "memory":
            assert (rung, counters["memory.retries"], counters["generate.stock"]) == ("fast", 1, 0)
        elif ends_on_stock:
            assert rung == "stock" and counters["generate.stock"] > 0
        else:
            assert rung == ("eager" if kind == "exception" else "plain backbone"), handle.guard.events
            assert counters["generate.stock"] == 0
        handle.guard.rearm()
        assert torch.equal(batcher.submit(**several[0]).result(SOON), wanted[0])
        assert counters["faults"] == (2 if kind == "memory twice" else 1)


@pytest.mark.parametrize("sound", [False, True])
def test_a_breach_of_one_is_made_again(monkeypatch: pytest.MonkeyPatch, sound: bool) -> None:
    """One row's last codebook comes out wrong from some frame on: the guard finds it, and it is said right."""
    at, frames = 5, 48
    model = make(guard=GuardConfig(budget=1e9))
    handle = model.acceleration
    call = {**GREEDY, "max_new_tokens": frames}
    wanted = [stock(model, **row(n), **call)[0] for n in range(3)]
    slow = Slow(monkeypatch)
    emit = Engine.emit

    def spoiled(engine: Engine, runner: Any) -> None:
        emit(engine, runner)
        state = runner.state
        if handle.guard.rung == "fast" and int(state.frame[1]) >= at and slow.frames > 8:
            state.codes[1, -1] = (state.codes[1, -1] + 3) % 32

    with handle.batcher(slots=3) as batcher:
        slow.frames = 0
        monkeypatch.setattr(Engine, "emit", spoiled)
        with handle._lock:
            made = [batcher.submit(**row(n), **call, sound=sound) for n in range(3)]
            time.sleep(0.05)
        codes = [one.result(SOON) for one in made]
    (event,) = handle.guard.events
    assert event.kind == "verification" and event.next_rung == "stock" and event.rows == 3
    assert event.tensors["codes"].shape[1] == 1
    bad = [n for n in range(3) if not torch.equal(codes[n], wanted[n])]
    if sound:  # what was heard stays
        assert len(bad) == 1 and all(len(codes[n]) == frames for n in range(3))
    else:
        assert not bad
    handle.guard.rearm()
    assert handle.replay(event), "the same finding"


def test_a_prompt_that_fails_is_one_callers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    several = [{**text_prompt((n,), seed=n), **SAMPLED, "seed": n, "max_new_tokens": 9} for n in range(3, 9)]
    wanted = [alone(model, call) for call in several]
    prefill, tried = Passes.prefill, []

    def failing(passes: Passes, x: Tensor, *args: Any) -> Any:
        if x.shape[1] == 5:
            raise ValueError("injected: bad audio")
        if x.shape[1] == 7 and not tried:
            tried.append(1)
            raise torch.OutOfMemoryError("injected: you tried to allocate 4096 bytes")
        return prefill(passes, x, *args)

    monkeypatch.setattr(Passes, "prefill", failing)
    with model.acceleration.batcher(slots=2) as batcher:
        made = [batcher.submit(**call) for call in several]
        for n, one in enumerate(made):
            if n == 2:
                with pytest.raises(ValueError, match="bad audio"):
                    one.result(SOON)
            else:
                assert torch.equal(one.result(SOON), wanted[n])
    assert tried and model.acceleration.guard.rung == "fast"


def test_a_prompt_of_nan_is_one_callers(model: Any) -> None:
    bad, faults = audio_prompt(model, [[3 * FRAME_SAMPLES]]), model.acceleration.metrics.counters["faults"]
    call = {**text_prompt((5,)), **SAMPLED, "seed": 1, "max_new_tokens": 9}
    wanted = alone(model, call)
    embed = hf_call.embedded_with

    def poisoned(model: Any, ids: Tensor, codes: Any) -> Tensor:
        return embed(model, ids, codes) * float("nan")

    with pytest.MonkeyPatch.context() as patch, model.acceleration.batcher(slots=2) as batcher:
        patch.setattr(hf_call, "embedded_with", poisoned)
        one, other = batcher.submit(**bad, **GREEDY, max_new_tokens=3), batcher.submit(**call)
        with pytest.raises(ArithmeticError, match="hidden state is NaN"):
            one.result(SOON)
        assert torch.equal(other.result(SOON), wanted)
    assert model.acceleration.guard.rung == "fast" and model.acceleration.metrics.counters["faults"] == faults


def test_a_codec_that_fails_is_one_callers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from csm_runtime.streaming import RowSound

    add = RowSound.add

    def failing(self: RowSound, codes: Tensor) -> Any:
        if self._index == 2:
            raise IndexError("injected: a code that the codec does not have")
        return add(self, codes)

    with model.acceleration.batcher(slots=2) as batcher:
        monkeypatch.setattr(RowSound, "add", failing)
        one, other = (
            batcher.submit(**text_prompt((4,)), **GREEDY, max_new_tokens=6, sound=sound) for sound in (True, False)
        )
        heard = []
        with pytest.raises(IndexError, match="injected"):
            for chunk in one:
                heard.append(chunk)
        assert len(heard) == 2 and len(other.result(SOON)) == 6


def test_forbidden_fallback_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(guard=GuardConfig(fallback="forbid"))
    slow = Slow(monkeypatch)
    with model.acceleration.batcher(slots=2) as batcher:
        slow.frames = 0
        slow.before[3] = faulty("exception")
        made = [batcher.submit(**text_prompt((n,)), **GREEDY, max_new_tokens=9) for n in (3, 4)]
        for one in made:
            with pytest.raises(Interrupted, match="injected"):
                one.result(SOON)
        assert len(batcher.submit(**text_prompt((3,)), **GREEDY, max_new_tokens=4).result(SOON)) == 4


def test_a_bug_in_the_batcher_is_told_to_all(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.acceleration.batcher(slots=2) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "_frame", lambda self: 1 / 0)
            patch.setattr(Slots, "_stumbled", lambda self, error: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                batcher.submit(**text_prompt((3,)), **GREEDY, max_new_tokens=3).result(SOON)
        assert len(batcher.submit(**text_prompt((3,)), **GREEDY, max_new_tokens=3).result(SOON)) == 3


def test_the_stock_path_speaks_what_the_fast_one_does_not(model: Any) -> None:
    call = {**text_prompt((4,)), **SAMPLED, "max_new_tokens": 5, "min_p": 0.2, "seed": 3}
    wanted = model.generate(**call)[0]
    other = {**text_prompt((5,)), **SAMPLED, "seed": 1, "max_new_tokens": 9}
    with on_stock_path(model, "MinP"), model.acceleration.batcher(slots=2) as batcher:
        made = [batcher.submit(**other), batcher.submit(**call, sound=True), batcher.submit(**other)]
        assert torch.equal(made[1].result(SOON), wanted)
        assert sum(chunk.frames for chunk in made[1]) == 5
        made = [made[0].result(SOON), made[2].result(SOON)]
    assert torch.equal(*made) and torch.equal(made[0], alone(model, other))


def test_weights_may_change_while_others_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(precision="int8")
    call = {**text_prompt((4,)), **GREEDY, "max_new_tokens": 30}
    Slow(monkeypatch, 0.005)
    with model.acceleration.batcher(slots=2) as batcher:
        first = batcher.submit(**call)
        while first.first_frame_at is None:
            time.sleep(0.002)
        with model.acceleration._lock, torch.no_grad():
            model.backbone_model.layers[0].mlp.up_proj.weight.mul_(-1.0)
        second = batcher.submit(**call)
        assert len(first.result(SOON)) == 30
        assert torch.equal(second.result(SOON), alone(model, call))
        with model.acceleration._lock:
            model.bfloat16()
        assert torch.equal(batcher.submit(**call).result(SOON), alone(model, call))
        assert model.acceleration.guard.rung == "fast"


# ------------------------------------------------------------------------------------------------------- tuning


def test_tuning_finds_stores_and_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("CSM_KERNELS_CACHE", str(tmp_path))
    model = make()
    took = {1: 0.02, 2: 0.03, 4: 0.05, 8: 0.0995, 16: 0.2}
    real = batch_size._measured(model.acceleration, [1, 2], 16, False)
    assert set(real) == {1, 2} and all(len(times) == 10 and min(times) > 0 for times in real.values())
    monkeypatch.setattr(batch_size, "_measured", lambda handle, sizes, *_: {n: [took[n]] * 3 for n in sizes})
    for bound, slots, fits in ((80.0, 4, True), (100.0, 4, True), (25, 1, True), (1.0, 1, False), (500, 4, True)):
        found = tune_batch_size(model, bound, progress=False)
        assert (found.slots, found.fits, found.latency_ms) == (slots, fits, bound), found
    assert found.frames_per_second[4] == pytest.approx(80.0)
    took[8] = 0.09
    assert tune_batch_size(model, 100.0, sizes=(8, 1), progress=False).slots == 8
    with model.acceleration.batcher() as batcher:
        assert batcher.slots == 8
    with make(precision="int8").acceleration.batcher() as batcher:
        assert batcher.slots == batch_size.DEFAULT_SLOTS, "another policy was not measured"
    (compiling.cache_dir() / "batch-sizes.json").write_text("{")
    assert batch_size.stored_slots(model) is None
    for wrong in ({"latency_ms": 0}, {"sizes": (3,)}, {"sizes": ()}, {"latency_ms": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tune_batch_size(model, **wrong)
    assert "4 slots" in str(BatchTuning(4, 80.0, True, {4: 50.0}, 384))


def test_tuning_leaves_calls_as_they_are(model: Any) -> None:
    call = calls(model)[0]
    wanted, frames = alone(model, call), model.acceleration.metrics.counters["frames"]
    found = tune_batch_size(model, sizes=(1, 2), progress=False)
    assert set(found.frame_ms) == {1, 2} and found.context == 32
    before = (set(model.acceleration._warm), len(model.acceleration._engine._all()))
    tune_batch_size(model, sizes=(16,), progress=False)
    assert (set(model.acceleration._warm), len(model.acceleration._engine._all())) == before
    assert model.acceleration.metrics.counters["frames"] == frames
    assert torch.equal(alone(model, call), wanted)


# --------------------------------------------------------------------------------------------------------- soak


@pytest.mark.slow
def test_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 short utterances over 8 slots with cancels and failures: each is answered, with its own frames alone."""
    soak(monkeypatch, 2000)


def test_short_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    soak(monkeypatch, 400)


def soak(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    torch.set_num_threads(1)
    config, seed, eos, _ = ENDINGS["rising"]
    model = copy_first_codebook(build(config, seed=seed))
    model.config.codebook_eos_token_id = eos
    accelerate(model, mode="native", progress=False, without=("compiled prefill",))
    handle, rng = model.acceleration, random.Random(0)
    pool = []
    for n in range(40):
        prompt = text_prompt((1 + n % 11,), seed=n)
        drawn = GREEDY if n % 4 == 0 else {**SAMPLED, "top_k": 2, "depth_decoder_top_k": 2}
        pool.append({**prompt, **drawn, "seed": n, "max_new_tokens": 1 + n % 9})
    wanted = [alone(model, call, n) for n, call in enumerate(pool)]
    assert len({len(one) for one in wanted}) > 4
    injected = _inject(monkeypatch, handle, random.Random(1))
    jobs, lock, seen = iter(range(count)), threading.Lock(), {"right": 0, "cancelled": 0, "failed": 0, "full": 0}
    marks: list[tuple[int, int, int]] = []

    def note(what: str) -> None:
        with lock:
            seen[what] += 1
            answered = sum(seen.values()) - seen["full"]
            if answered % 25 == 0:
                handle.guard.rearm()
            if answered in (count // 4, count):
                gc.collect()
                marks.append((_resident(), len(gc.get_objects()), threading.active_count()))

    def settle(one: Any, n: int, heard: int | None, codes: Callable[[], Tensor]) -> None:
        try:
            made = codes()
        except (concurrent.futures.CancelledError, asyncio.CancelledError):
            note("cancelled")
        except ValueError as error:
            assert "bad audio" in str(error)
            note("failed")
        else:
            assert torch.equal(made, wanted[n]), (n, made, wanted[n])
            ends = bool((wanted[n][-1] == eos).all())
            assert heard is None or heard == len(wanted[n]) - ends
            note("right")

    def submit(batcher: Batcher, n: int, sound: bool) -> Any:
        try:
            return batcher.submit(**pool[n], utterance_id=n, sound=sound)
        except QueueFull:
            note("full")
            return None

    def draw() -> tuple[int, bool, float | None] | None:
        with lock:
            if next(jobs, None) is None:
                return None
            return rng.randrange(40), rng.random() < 0.05, rng.uniform(0, 0.03) if rng.random() < 0.1 else None

    def caller(batcher: Batcher) -> None:
        while (job := draw()) is not None:
            n, sound, leave = job
            while (one := submit(batcher, n, sound)) is None:
                time.sleep(0.005)
            if leave is not None:
                time.sleep(leave)
                one.cancel()
            heard = None
            if sound and leave is None:
                try:
                    heard = sum(chunk.frames for chunk in one)
                except ValueError:
                    heard = None
            settle(one, n, heard, lambda one=one: one.result(SOON))

    async def task(batcher: Batcher) -> None:
        while (job := draw()) is not None:
            n, sound, leave = job
            while (one := submit(batcher, n, sound)) is None:
                await asyncio.sleep(0.005)
            if leave is not None:
                asyncio.get_running_loop().call_later(leave, one.cancel)
            (made,) = await asyncio.gather(one, return_exceptions=True)
            heard = None
            if sound and isinstance(made, Tensor):
                heard = 0
                async for chunk in one:
                    heard += chunk.frames

            def codes(made: Any = made) -> Tensor:
                if isinstance(made, BaseException):
                    raise made
                return made

            settle(one, n, heard, codes)

    async def several(batcher: Batcher) -> None:
        await asyncio.gather(*(task(batcher) for _ in range(8)))

    with handle.batcher(slots=8, queue=12) as batcher, concurrent.futures.ThreadPoolExecutor(9) as threads:
        running = [threads.submit(caller, batcher) for _ in range(8)]
        running.append(threads.submit(lambda: asyncio.run(several(batcher))))
        for one in running:
            one.result()
        assert batcher.status() | {"frames_per_second": 0} == {
            "slots": 8,
            "speaking": 0,
            "waiting": 0,
            "frames_per_second": 0,
        }
        assert not batcher._open and not batcher._queue
    assert seen["right"] + seen["cancelled"] + seen["failed"] == count
    assert seen["right"] > 0.8 * count and seen["cancelled"] > 0.01 * count
    assert 0 < seen["failed"] <= injected["prompt"], "a failure is one caller's"
    assert all(injected.values()), injected
    counters = handle.metrics.counters
    assert counters["batch.joined"] == counters["batch.left"]
    assert counters["generate.stock"] == 0
    (memory, objects, threads_then), (memory_now, objects_now, threads_now) = marks
    assert memory_now - memory < 24 << 20, marks
    assert objects_now - objects < 20_000, marks
    assert threads_now <= threads_then, marks


def _inject(patch: pytest.MonkeyPatch, handle: Any, rng: random.Random) -> dict[str, int]:
    """Frames and prompts that fail now and then; never below the fast path, whose next rung keeps the noise."""
    injected = {"exception": 0, "NaN": 0, "memory": 0, "prompt": 0}
    emit, prefill, since = Engine.emit, Passes.prefill, [0]

    def failing(engine: Engine, runner: Any) -> None:
        since[0] += 1
        if handle.guard.rung == "fast" and rng.random() < 0.03:
            kind = rng.choice(["exception", "NaN", "memory"])
            if kind != "memory" or since[0] > 200:
                injected[kind] += 1
                if kind == "memory":
                    since[0] = 0
                    raise torch.OutOfMemoryError("injected: you tried to allocate 4096 bytes")
                if kind == "exception":
                    raise RuntimeError("injected")
                runner.state.hidden.fill_(float("nan"))
        emit(engine, runner)

    def bad(passes: Passes, x: Tensor, *args: Any) -> Any:
        if rng.random() < 0.005:
            injected["prompt"] += 1
            raise ValueError("injected: bad audio")
        return prefill(passes, x, *args)

    patch.setattr(Engine, "emit", failing)
    patch.setattr(Passes, "prefill", bad)
    return injected


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def test_prepared_calls_change_nothing(model: Any) -> None:
    """The stock ``generate`` up to its loop, and not a token further."""
    before = [dict(vars(one.generation_config)) for one in (model, model.depth_decoder)]
    call = prepared(model, {**text_prompt((4,)), "max_new_tokens": 7, "depth_decoder_temperature": 0.2, **SAMPLED})
    assert call.request.max_frames == 7 and call.request.depth.temperature == 0.2
    assert call.depth_config["temperature"] == 0.2
    assert [dict(vars(one.generation_config)) for one in (model, model.depth_decoder)] == before
    with pytest.raises(hf_call.Unsupported, match="use_cache"):
        prepared(model, {**text_prompt((4,)), "use_cache": False})
    assert THREE["input_ids"].shape[0] == 3
