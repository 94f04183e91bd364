"""Frames launched ahead of what the host has read: whatever the lag, a call gives what it gives without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from csm_models import Recorder, assert_same_puts, build, code_prompt, copy_first_codebook, stock, text_prompt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csm_runtime import accelerate, decode_loop
from csm_runtime.adapters import hf_call
from csm_runtime.engine import Engine

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
OPTIONS = {**GREEDY, "return_dict_in_generate": True, "output_audio": True}
THREE = text_prompt((5, 9, 3))
LAGS = (1, 2, 3)
ENDINGS: dict[str, tuple[str, int, int, tuple[int | None, ...]]] = {
    # config, seed, end-of-speech id, frame in which each row of THREE says it
    "rising": ("base", 2, 4, (4, 6, 11)),
    "at once": ("eight_codebooks", 1, 1, (4, 11, 0)),
    "never": ("base", 0, 7, (5, 12, None)),
}


def row(index: int) -> dict[str, Tensor]:
    """One row of THREE as a batch of its own."""
    return {key: value[index : index + 1] for key, value in THREE.items()}


@pytest.fixture(scope="module")
def ending() -> Callable[..., Any]:
    """``ending(name, pads)``: a model that does say the end-of-speech frame, kept for the module."""
    made: dict[tuple[str, bool], Any] = {}

    def model(name: str, pads: bool = True) -> Any:
        if (name, pads) not in made:
            config, seed, eos, _ = ENDINGS[name]
            one = copy_first_codebook(build(config, seed=seed))
            one.config.codebook_eos_token_id = eos
            if pads:  # any eos_token_id switches on stock's padding of finished rows
                one.generation_config.eos_token_id = 5
            made[name, pads] = accelerate(one, mode="eager", batch_sizes=(1, 4), progress=False)
        return made[name, pads]

    return model


@dataclass
class Call:
    """What one call gave, and how it went."""

    out: Any
    streamer: Recorder | None
    counters: Counter[str]
    launched: int
    log: list[str]
    """``launch`` and ``put``, in the order they came."""


class Calls:
    """Calls models with a lag and frames that break, and watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.rests: list[tuple[Tensor, Tensor, int]] = []
        """What the stock path was given: frames, which rows had ended, what the streamer had got by then."""

    def __call__(
        self,
        model: Any,
        prompt: dict[str, Tensor],
        lag: int,
        *,
        stream: bool = False,
        break_launch: int | None = None,
        break_read: int | None = None,
        **options: Any,
    ) -> Call:
        log: list[str] = []
        streamer = Recorder() if stream else None
        metrics = model.acceleration.metrics
        model.acceleration.guard.rearm()  # an earlier fault has sent it to the stock path
        before = Counter(metrics.counters)
        metrics.reset_times()
        with self._patch.context() as patch:
            patch.setattr(model.acceleration._engine, "lag", lag)
            self._watch(patch, log, streamer, break_launch, break_read)
            out = model.generate(**prompt, **{**OPTIONS, **options}, streamer=streamer)
        counters = Counter(metrics.counters)
        counters.subtract(before)
        assert [len(metrics.times(name)) for name in ("prefill", "first_frame")] in ([1, 1], [1, 0])
        seen = Counter({name: n for name, n in counters.items() if n > 0 and not name.startswith("guard.")})
        return Call(out, streamer, seen, log.count("launch"), log)

    def _watch(
        self,
        patch: pytest.MonkeyPatch,
        log: list[str],
        streamer: Recorder | None,
        break_launch: int | None,
        break_read: int | None,
    ) -> None:
        next_frame, all_ended, rest = Engine.next_frame, decode_loop._Mailbox.all_ended, hf_call.continue_on_stock

        def launch(engine: Engine, runner: Any, first: bool) -> Tensor:
            assert first == (not log)
            if log.count("launch") == break_launch:
                raise RuntimeError("injected at a launch")
            log.append("launch")
            return next_frame(engine, runner, first)

        def read(mailbox: Any, index: int) -> bool:
            if index == break_read and "broken" not in log:  # the device recovers: what comes later can be read again
                log.append("broken")
                raise RuntimeError("injected at a read")
            return all_ended(mailbox, index)

        def rests(model: Any, request: Any, made: Tensor, ended: Tensor, *more: Any) -> Tensor:
            self.rests.append((made.clone(), ended.clone(), log.count("put")))
            return rest(model, request, made, ended, *more)

        patch.setattr(Engine, "next_frame", launch)
        patch.setattr(decode_loop._Mailbox, "all_ended", read)
        patch.setattr(hf_call, "continue_on_stock", rests)
        if streamer is not None:
            put = streamer.put

            def logged(value: Tensor) -> None:
                put(value)
                if log:  # not the prompt
                    log.append("put")

            streamer.put = logged  # type: ignore[method-assign]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def anything(a: Tensor, b: Tensor) -> bool:
    return True


def assert_same(ours: Call, theirs: Call, caches: Callable[[Tensor, Tensor], bool] = torch.equal) -> None:
    """Bit for bit the same tokens, sound, cache and streamed frames."""
    a, b = ours.out, theirs.out
    assert type(a) is type(b)
    assert torch.equal(a.sequences, b.sequences)
    assert (a.audio is None) == (b.audio is None)
    if a.audio is not None:
        assert len(a.audio) == len(b.audio)
        assert all(torch.equal(x, y) for x, y in zip(a.audio, b.audio))
    assert a.past_key_values.get_seq_length() == b.past_key_values.get_seq_length() > 0
    for x, y in zip(a.past_key_values.layers, b.past_key_values.layers):
        assert x.keys.shape == y.keys.shape
        assert caches(x.keys, y.keys)
        assert caches(x.values, y.values)
    assert (ours.streamer is None) == (theirs.streamer is None)
    if ours.streamer is not None and theirs.streamer is not None:
        assert_same_puts(ours.streamer, theirs.streamer)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def by_stock(model: Any, prompt: dict[str, Tensor], stream: bool, **options: Any) -> Call:
    streamer = Recorder() if stream else None
    return Call(stock(model, **prompt, **{**OPTIONS, **options}, streamer=streamer), streamer, Counter(), 0, [])


# ------------------------------------------------------------------------------------------------ the end

PROMPTS = {"three rows": THREE, "row 0": row(0), "row 1": row(1), "row 2": row(2)}


def length(name: str, which: str, limit: int) -> int:
    """Frames until every row of a prompt has ended, or the limit."""
    ends = ENDINGS[name][3] if which == "three rows" else (ENDINGS[name][3][int(which[-1])],)
    return min([limit] if None in ends else [limit, max(end + 1 for end in ends if end is not None)])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("pads", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("which", list(PROMPTS))
@pytest.mark.parametrize("name", list(ENDINGS))
def test_the_lag_does_not_show(
    ending: Callable[..., Any], call: Calls, name: str, which: str, pads: bool, stream: bool
) -> None:
    """Rows that end at different frames, in the first one, in the last one that is allowed, and never."""
    model, prompt = ending(name, pads), PROMPTS[which]
    whole = length(name, which, 14)
    options = {"output_audio": name != "at once"}  # Mimi cannot decode a row without a frame of sound
    for limit in {1, whole, whole + 1, 14}:
        frames = length(name, which, limit)
        options["max_new_tokens"] = limit
        wanted = call(model, prompt, 0, stream=stream, **options)
        assert_same(wanted, by_stock(model, prompt, stream, **options), close)
        assert wanted.out.sequences.shape[1] == frames == wanted.launched
        for lag in LAGS:
            got = call(model, prompt, lag, stream=stream, **options)
            assert_same(got, wanted)
            assert got.counters == wanted.counters == {"generate.fast": 1, "frames": frames * len(prompt["input_ids"])}
            assert got.launched == min(limit, frames + (min(lag, 1) if stream else lag)), "not run ahead, or too far"


SAMPLED = {
    "do_sample": True,
    "top_k": 2,
    "depth_decoder_do_sample": True,
    "depth_decoder_top_k": 2,
    "depth_decoder_temperature": 0.3,
    "output_audio": False,  # Mimi cannot decode a row without a frame of sound
    "max_new_tokens": 16,
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("which", ["three rows", "row 0"])
def test_sampled(ending: Callable[..., Any], call: Calls, which: str, stream: bool) -> None:
    model, lengths = ending("rising"), set()
    for seed in range(6):
        wanted = call(model, PROMPTS[which], 0, stream=stream, seed=seed, **SAMPLED)
        lengths.add(wanted.out.sequences.shape[1])
        for lag in LAGS:
            got = call(model, PROMPTS[which], lag, stream=stream, seed=seed, **SAMPLED)
            assert_same(got, wanted)
            assert got.counters == wanted.counters
    assert len(lengths) > 2, "calls that all end alike test nothing"


@pytest.mark.parametrize("lag", LAGS)
def test_frames_nobody_sees_draw_no_noise(ending: Callable[..., Any], call: Calls, lag: int) -> None:
    """Without a seed of its own a call takes one number from torch's generator, however far it runs."""
    model, following = ending("rising"), []
    for n in (0, lag):
        torch.manual_seed(3)
        calls = [call(model, row(0), n, **SAMPLED).out.sequences for _ in range(3)]
        following.append([*calls, torch.rand(1)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*following))


@pytest.mark.parametrize("lag", LAGS)
def test_codes_as_prompt(ending: Callable[..., Any], call: Calls, lag: int) -> None:
    model = ending("rising")
    prompt = {"input_ids": code_prompt(model, 2, 6)}
    wanted, got = (call(model, prompt, n, max_new_tokens=9) for n in (0, lag))
    assert_same(got, wanted)


@pytest.mark.parametrize("lag", LAGS)
def test_calls_one_after_another(ending: Callable[..., Any], call: Calls, lag: int) -> None:
    """What was launched too far in one call does not show in the next."""
    model = ending("rising")
    for prompt in (row(0), row(2), row(0), THREE, row(1), THREE):
        assert_same(call(model, prompt, lag, max_new_tokens=14), call(model, prompt, 0, max_new_tokens=14))


@pytest.mark.parametrize("lag", LAGS)
def test_the_last_position_of_the_buffer(call: Calls, lag: int) -> None:
    """Frames that are launched ahead need no room beyond what the call needs."""
    model = copy_first_codebook(build(seed=2))
    model.config.codebook_eos_token_id = 4
    model = accelerate(model, mode="eager", max_positions=9 + 12 - 1, batch_sizes=(4,), progress=False)
    wanted, got = (call(model, THREE, n, max_new_tokens=12) for n in (0, lag))
    assert_same(got, wanted)
    assert got.launched == 12
    with pytest.raises(ValueError, match="max_positions=20 is too small"):
        call(model, THREE, lag, max_new_tokens=13)


@pytest.mark.parametrize(
    ("device", "mode", "lag"),
    [("cpu", "auto", 0), ("cpu", "eager", 0), ("cuda", "eager", 0), ("cuda", "graph", 2), ("cuda", "auto", 2)],
)
def test_only_graphs_run_ahead(
    ending: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, device: str, mode: str, lag: int
) -> None:
    made = ending("rising").acceleration._engine
    monkeypatch.setattr(torch, "tensor", lambda values, device: values)  # no CUDA here
    rotary = (made.rotary, made.depth_rotary)
    assert Engine(made.spec, rotary, made.dtype, torch.device(device), 8, mode, made.metrics).lag == lag


# ------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("lag", (0, *LAGS))
def test_a_frame_is_put_when_the_next_is_launched(ending: Callable[..., Any], call: Calls, lag: int) -> None:
    log = call(ending("rising"), row(0), lag, stream=True, max_new_tokens=14).log
    if lag == 0:
        assert log == ["launch", "put"] * 5
    else:
        assert log == ["launch"] + ["launch", "put"] * 5
    log = call(ending("never"), row(2), lag, stream=True, max_new_tokens=4).log
    assert log == (["launch", "put"] * 4 if lag == 0 else ["launch"] + ["launch", "put"] * 3 + ["put"])


@pytest.mark.parametrize("lag", LAGS)
def test_streamed_frames_belong_to_the_streamer(
    ending: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    model, kept = ending("never"), []

    class Keeper(Recorder):
        def put(self, value: Tensor) -> None:
            kept.append(value)

    monkeypatch.setattr(model.acceleration._engine, "lag", lag)
    tokens = model.generate(**THREE, **GREEDY, max_new_tokens=8, streamer=Keeper())
    assert torch.equal(torch.stack(kept[-8:], dim=1), tokens)


@pytest.mark.parametrize("lag", LAGS)
def test_a_streamers_own_error(
    ending: Callable[..., Any], call: Calls, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    model = ending("rising")
    wanted = call(model, row(1), 0, max_new_tokens=14)

    class Broken(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.puts) == 3:
                raise OSError("sound card gone")

    streamer = Broken()
    faults = model.acceleration.metrics.counters["faults"]
    with monkeypatch.context() as patch:
        patch.setattr(model.acceleration._engine, "lag", lag)
        with pytest.raises(OSError, match="sound card"):
            model.generate(**row(1), **GREEDY, max_new_tokens=14, streamer=streamer)
    assert len(streamer.puts) == 3
    assert model.acceleration.metrics.counters["faults"] == faults
    assert_same(call(model, row(1), lag, max_new_tokens=14), wanted)


@pytest.mark.parametrize("pads", [False, True], ids=["unpadded", "padded"])
def test_a_launch_reads_nothing(ending: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, pads: bool) -> None:
    """A value that the host asks for between two frames is a wait for the device, on CUDA."""
    model, launch = ending("rising", pads), decode_loop.DecodeLoop._launch
    launches = []

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a value"
            return func(*args, **(kwargs or {}))

    def watched(loop: decode_loop.DecodeLoop) -> None:
        launches.append(1)
        if len(launches) == 1:
            launch(loop)  # with the prompt
        else:
            with NoReads():
                launch(loop)

    monkeypatch.setattr(decode_loop.DecodeLoop, "_launch", watched)
    monkeypatch.setattr(model.acceleration._engine, "lag", 2)
    faults = model.acceleration.metrics.counters["faults"]
    tokens = model.generate(**THREE, **GREEDY, max_new_tokens=14)
    assert torch.equal(tokens, stock(model, **THREE, **GREEDY, max_new_tokens=14))
    assert model.acceleration.metrics.counters["faults"] == faults
    assert len(launches) == 14


# ------------------------------------------------------------------------------------------------ faults


def assert_stock_went_on(call: Calls, wanted: Call, frames: int, streamed: bool) -> None:
    """The stock path was given exactly the frames that count, and the streamer had got exactly these."""
    ((made, ended, puts),) = call.rests
    assert torch.equal(made, wanted.out.sequences[:, :frames])
    eos = ENDINGS["rising"][2]
    assert torch.equal(ended, (made[:, :, :-1] == eos).all(-1).any(-1) if frames else torch.zeros(len(made)).bool())
    assert puts == (frames if streamed else 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("lag", (0, *LAGS))
@pytest.mark.parametrize("which", ["three rows", "row 0"])
def test_a_launch_fails(ending: Callable[..., Any], call: Calls, which: str, lag: int, stream: bool) -> None:
    """Before the end the stock path goes on; after it there is nothing left to do, and nothing is lost."""
    model, prompt = ending("rising"), PROMPTS[which]
    frames = length("rising", which, 14)
    wanted = by_stock(model, prompt, stream, max_new_tokens=14)
    ahead = min(lag, 1) if stream else lag
    for broken in {0, 1, 3, frames - 1, frames, frames + 1, frames + 2, frames + 3}:
        call.rests.clear()
        got = call(model, prompt, lag, stream=stream, break_launch=broken, max_new_tokens=14)
        made = list(call.rests)
        assert_same(got, wanted, anything)
        assert_same(got, call(model, prompt, 0, stream=stream, break_launch=broken, max_new_tokens=14))
        call.rests = made
        fast = {"generate.fast": 1, "frames": frames * len(prompt["input_ids"])}
        if broken < frames:
            assert_stock_went_on(call, wanted, broken, stream)
            assert got.counters == {"faults": 1, "generate.stock": 1}
        elif broken < min(frames + ahead, 14):
            assert not call.rests
            assert got.counters == {"faults": 1, **fast}
        else:
            assert not call.rests
            assert got.counters == fast


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("lag", (0, *LAGS))
@pytest.mark.parametrize("broken", [0, 1, 4, 5, 8, 11, 12])
def test_a_read_fails(ending: Callable[..., Any], call: Calls, broken: int, lag: int, stream: bool) -> None:
    """Only the frames before it count, whatever was launched after it."""
    model = ending("rising")
    wanted = by_stock(model, THREE, stream, max_new_tokens=14)
    without = call(model, THREE, 0, stream=stream, break_launch=broken, max_new_tokens=14)
    call.rests.clear()
    got = call(model, THREE, lag, stream=stream, break_read=broken, max_new_tokens=14)
    assert_same(got, without)
    assert_same(got, wanted, anything)
    if broken < 12:
        assert_stock_went_on(call, wanted, broken, stream)
        assert got.counters == {"faults": 1, "generate.stock": 1}
    else:
        assert got.counters == {"generate.fast": 1, "frames": 36}, "a frame after the end was read"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("launch", "read"), [(6, 5), (6, 4), (6, 3), (12, 11), (13, 11), (1, 0)])
def test_a_launch_fails_and_then_a_read(
    ending: Callable[..., Any],
    call: Calls,
    caplog: pytest.LogCaptureFixture,
    launch: int,
    read: int,
    stream: bool,
) -> None:
    model, lag = ending("rising"), 3
    wanted = by_stock(model, THREE, stream, max_new_tokens=14)
    without = call(model, THREE, 0, stream=stream, break_launch=read, max_new_tokens=14)
    for kept in (call.rests, caplog.records, model.acceleration.metrics.faults):
        kept.clear()
    got = call(model, THREE, lag, stream=stream, break_launch=launch, break_read=read, max_new_tokens=14)
    assert_same(got, without)
    assert_same(got, wanted, anything)
    assert_stock_went_on(call, wanted, read, stream)
    assert got.counters == {"faults": 1, "generate.stock": 1}
    pending = launch - read <= (1 if stream else lag)
    what = "injected at a launch" if pending else "injected at a read"
    said = [record.getMessage() for record in caplog.records]
    assert (
        f"the fast path failed at frame {read}, a safer path goes on until guard.rearm(): RuntimeError: {what}" in said
    )
    assert dict(model.acceleration.metrics.faults) == {f"RuntimeError: {what}": 1}


def test_a_fault_after_the_end_is_said(
    ending: Callable[..., Any], call: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    model = ending("rising")
    model.acceleration.metrics.faults.clear()
    call(model, row(0), 2, break_launch=6, max_new_tokens=14)
    (record,) = caplog.records
    assert record.getMessage().startswith("the fast path failed at frame 5, after the end of speech: RuntimeError")


def test_a_fault_keeps_nothing_alive(ending: Callable[..., Any], call: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception holds the frames of its stack: a loop that kept it would live until the garbage collector comes."""
    import gc
    import weakref

    loops: list[Any] = []
    run = decode_loop.DecodeLoop.run

    def watched(loop: decode_loop.DecodeLoop) -> None:
        loops.append(weakref.ref(loop))
        run(loop)

    monkeypatch.setattr(decode_loop.DecodeLoop, "run", watched)
    model = ending("rising")
    model.acceleration.metrics.faults["RuntimeError: injected at a launch"] = 1  # a log record would keep it too
    gc.collect()
    gc.disable()
    try:
        call(model, row(0), 2, break_launch=3, max_new_tokens=14)
        assert loops[0]() is None
    finally:
        gc.enable()
