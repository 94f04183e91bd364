"""What the fast path does not do goes to the stock path with a named reason, and a fault never reaches the caller."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from csm_models import (
    Recorder,
    assert_same_puts,
    audio_prompt,
    build,
    code_prompt,
    copy_first_codebook,
    on_fast_path,
    on_stock_path,
    stock,
    text_prompt,
)
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, StaticCache

from csm_runtime.engine import Engine

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


class ForbidToken(LogitsProcessor):
    """A processor that visibly changes tokens."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] = float("-inf")
        return scores


def assert_equal_outputs(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_equal_outputs(a, b)
    elif isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for key in ours:
            if key != "past_key_values":
                assert_equal_outputs(ours[key], theirs[key])
    else:
        assert ours == theirs


# ------------------------------------------------------------------------------------------- asked for by the caller


@pytest.mark.parametrize("flag", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_intermediate_outputs(fast: Any, flag: str) -> None:
    model = build()
    if flag == "output_attentions":
        model.set_attn_implementation("eager")
    model = fast(of=model)
    prompt = text_prompt((4, 7))
    options = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True, flag: True}
    with on_stock_path(model, flag):
        ours = model.generate(**prompt, **options)
    theirs = stock(model, **prompt, **options)
    assert getattr(ours, flag.removeprefix("output_")) is not None
    assert_equal_outputs(ours, theirs)


def test_custom_processor(shared: Any) -> None:
    model, prompt = shared(), text_prompt((4, 7))
    plain = stock(model, **prompt, **GREEDY, max_new_tokens=4)
    options = {"logits_processor": LogitsProcessorList([ForbidToken(int(plain[0, 0, 0]))]), "max_new_tokens": 4}
    with on_stock_path(model, "ForbidToken"):
        ours = model.generate(**prompt, **GREEDY, **options)
    assert not torch.equal(ours, plain)
    assert torch.equal(ours, stock(model, **prompt, **GREEDY, **options))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"repetition_penalty": 1.7}, "RepetitionPenalty"),
        ({"suppress_tokens": [13, 29]}, "SuppressTokens"),
        ({"do_sample": True, "min_p": 0.9}, "MinP"),
        ({"do_sample": True, "typical_p": 0.5}, "Typical"),
        ({"renormalize_logits": True, "do_sample": True}, "LogitNormalization"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_built_in_processors(shared: Any, option: dict[str, Any], reason: str) -> None:
    """Those the fast path lacks; what stock says, errors included, is what the caller gets."""
    model, prompt = shared(), text_prompt((4, 7))
    options = {**GREEDY, "max_new_tokens": 3, **option}

    def outcome(generate: Any) -> Any:
        torch.manual_seed(7)
        try:
            return generate(**prompt, **options)
        except (ValueError, RuntimeError, IndexError) as error:
            return type(error)

    with on_stock_path(model, reason):
        ours = outcome(model.generate)
    assert_equal_outputs(ours, outcome(lambda **kwargs: stock(model, **kwargs)))


def test_depth_decoder_processors(fast: Any) -> None:
    model, prompt = fast(), text_prompt((4, 7))
    options = {"do_sample": False, "max_new_tokens": 3, "depth_decoder_suppress_tokens": [11, 8]}
    with on_stock_path(model, "the depth decoder uses SuppressTokens"):
        ours = model.generate(**prompt, **options)
    assert torch.equal(ours, stock(model, **prompt, **options))
    assert 11 not in ours[:, :, 1:]


@pytest.mark.parametrize("beams", [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}])
def test_beam_search_is_refused_as_stock_refuses_it(shared: Any, beams: dict[str, Any]) -> None:
    model, prompt = shared(), text_prompt((4,))
    with pytest.raises(ValueError) as theirs:
        stock(model, **prompt, max_new_tokens=3, **beams)
    with pytest.raises(ValueError) as ours:
        model.generate(**prompt, max_new_tokens=3, **beams)
    assert str(ours.value) == str(theirs.value)
    with on_fast_path(model):
        model.generate(**prompt, **GREEDY, max_new_tokens=2)


def test_depth_decoder_beams(fast: Any) -> None:
    model, prompt = fast(), text_prompt((4,))
    options = {"do_sample": False, "max_new_tokens": 2, "depth_decoder_num_beams": 2}
    with on_stock_path(model, "the depth decoder"):
        ours = model.generate(**prompt, **options)
    assert torch.equal(ours, stock(model, **prompt, **options))


def test_inputs_embeds(shared: Any) -> None:
    model = shared()
    embeds = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    with on_stock_path(model, "inputs_embeds"):
        ours = model.generate(inputs_embeds=embeds, **GREEDY, max_new_tokens=4)
    assert torch.equal(ours, stock(model, inputs_embeds=embeds, **GREEDY, max_new_tokens=4))


def test_no_cache(shared: Any) -> None:
    model, ids = shared(), code_prompt(shared(), 1, 4)
    with on_stock_path(model, "use_cache=False"):
        ours = model.generate(ids, **GREEDY, max_new_tokens=3, use_cache=False)
    assert torch.equal(ours, stock(model, ids, **GREEDY, max_new_tokens=3, use_cache=False))


def test_a_cache_that_holds_a_prompt(shared: Any) -> None:
    model, ids = shared(), code_prompt(shared(), 1, 6)

    def cache() -> Any:
        held = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :4], past_key_values=held, use_cache=True)
        return held

    with on_stock_path(model, "past_key_values"):
        ours = model.generate(ids, past_key_values=cache(), **GREEDY, max_new_tokens=3)
    assert torch.equal(ours, stock(model, ids, past_key_values=cache(), **GREEDY, max_new_tokens=3))


def test_an_empty_cache_of_the_callers_own_is_filled(shared: Any) -> None:
    model, prompt = shared(), text_prompt((5,))
    for make in (
        lambda: DynamicCache(config=model.config),
        lambda: StaticCache(config=model.config, max_cache_len=32),
    ):
        ours, theirs = make(), make()
        assert torch.equal(
            model.generate(**prompt, past_key_values=ours, **GREEDY, max_new_tokens=3),
            stock(model, **prompt, past_key_values=theirs, **GREEDY, max_new_tokens=3),
        )
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length()) == 7
        for a, b in zip(ours.layers, theirs.layers):
            torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)


def test_a_streamed_batch_beyond_the_largest_bucket(shared: Any) -> None:
    model, prompt = shared(), text_prompt([4] * 17)
    with on_stock_path(model, "a streamer for 17 rows"):
        ours = model.generate(**prompt, **GREEDY, max_new_tokens=2, streamer=Recorder())
    assert torch.equal(ours, stock(model, **prompt, **GREEDY, max_new_tokens=2))


def test_the_largest_bucket_is_fast(fast: Any) -> None:
    model, prompt = fast(), text_prompt([4, 5] * 8)
    with on_fast_path(model):
        ours = model.generate(**prompt, **GREEDY, max_new_tokens=2)
    assert torch.equal(ours, stock(model, **prompt, **GREEDY, max_new_tokens=2))


def test_more_positions_than_the_default_buffer(shared: Any) -> None:
    model, prompt = shared(), text_prompt((60,))
    with on_stock_path(model, "more than 64 positions"):
        ours = model.generate(**prompt, **GREEDY, max_new_tokens=6)
    assert torch.equal(ours, stock(model, **prompt, **GREEDY, max_new_tokens=6))
    with on_fast_path(model):
        model.generate(**prompt, **GREEDY, max_new_tokens=5)


def test_autocast(shared: Any) -> None:
    model, prompt = shared(), text_prompt((5,))
    with torch.autocast("cpu", torch.bfloat16):
        with on_stock_path(model, "autocast"):
            ours = model.generate(**prompt, **GREEDY, max_new_tokens=3)
        assert torch.equal(ours, stock(model, **prompt, **GREEDY, max_new_tokens=3))


def test_the_callers_own_decode_loop(shared: Any) -> None:
    model = shared()

    def loop(model: Any, input_ids: Any, **kwargs: Any) -> str:
        return torch.tensor([len(input_ids)])

    with on_stock_path(model, "custom_generate"):
        assert int(model.generate(**text_prompt((5, 6)), max_new_tokens=3, custom_generate=loop)[0]) == 2


@pytest.mark.parametrize("made", [torch.tensor([2]), torch.zeros(2, 3), torch.zeros(())])
def test_the_callers_own_decode_loop_while_the_guard_counts_frames(fast: Any, made: Any) -> None:
    model = fast()
    guard = model.acceleration.guard
    guard.rung, guard.reason = "stock", "a test"
    before = guard.status()
    assert model.generate(**text_prompt((5,)), max_new_tokens=3, custom_generate=lambda *_, **__: made) is made
    assert guard.status() == before
    model.generate(**text_prompt((5,)), **GREEDY, max_new_tokens=3)
    assert guard._healthy == 3, "stock frames count, what somebody else's loop returns does not"


def test_a_call_from_inside_a_call(shared: Any) -> None:
    model, prompt = shared(), text_prompt((5,))
    inner = {}

    class Nosy(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.puts) == 3:
                inner["tokens"] = model.generate(**text_prompt((3,)), **GREEDY, max_new_tokens=3)

    tokens = model.generate(**prompt, **GREEDY, max_new_tokens=5, streamer=Nosy())
    assert torch.equal(tokens, stock(model, **prompt, **GREEDY, max_new_tokens=5))
    assert torch.equal(inner["tokens"], stock(model, **text_prompt((3,)), **GREEDY, max_new_tokens=3))
    assert any("inside another call" in reason for reason in model.acceleration.metrics.stock_reasons)


def test_sampling_on_the_stock_path_follows_torchs_seed(shared: Any) -> None:
    model, prompt = shared(), text_prompt([4] * 17)
    options = {"do_sample": True, "depth_decoder_do_sample": False, "max_new_tokens": 2}
    torch.manual_seed(3)
    ours = model.generate(**prompt, **options, streamer=Recorder())
    torch.manual_seed(3)
    assert torch.equal(ours, stock(model, **prompt, **options))


@pytest.mark.parametrize(
    "seed", [5, torch.tensor(5), torch.full((17,), 5), [5] * 17], ids=["int", "0-dim", "tensor", "list"]
)
def test_a_seed_holds_on_the_stock_path_too(shared: Any, seed: Any) -> None:
    model, prompt = shared(), text_prompt([4] * 17)
    options = {"do_sample": True, "depth_decoder_do_sample": False, "max_new_tokens": 2, "min_p": 0.01}
    state = torch.get_rng_state()
    first = model.generate(**prompt, **options, seed=seed)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator moved"
    torch.rand(3)
    assert torch.equal(model.generate(**prompt, **options, seed=seed), first)
    assert not torch.equal(model.generate(**prompt, **options, seed=6), first)


def test_each_reason_is_counted_and_logged_once(fast: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, prompt = fast(), text_prompt((4,))
    for _ in range(3):
        model.generate(**prompt, **GREEDY, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    model.generate(**prompt, **GREEDY, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    assert dict(model.acceleration.metrics.stock_reasons) == {"output_scores": 3, "output_logits": 1}
    lines = [record.getMessage() for record in caplog.records if record.name == "csm_runtime"]
    assert len(lines) == 2
    assert "output_scores" in lines[0]
    assert "output_logits" in lines[1]
    assert "output_scores" in str(model.acceleration.report())


def test_num_return_sequences(fast: Any) -> None:
    model, prompt = fast(), text_prompt((4, 7))
    with pytest.raises(ValueError):
        model.generate(**prompt, **GREEDY, max_new_tokens=2, num_return_sequences=2)
    options = {"do_sample": True, "top_k": 1, "depth_decoder_do_sample": False, "max_new_tokens": 3}
    ours = model.generate(**prompt, **options, num_return_sequences=2)
    assert torch.equal(ours, stock(model, **prompt, **options, num_return_sequences=2))
    assert ours.shape[0] == 4


# ------------------------------------------------------------------------------------------- faults of the fast path


def break_frame(monkeypatch: pytest.MonkeyPatch, frame: int) -> None:
    stock_frame = Engine.next_frame
    made = {"count": 0}

    def next_frame(self: Engine, runner: Any, first: bool) -> torch.Tensor:
        if made["count"] == frame:
            raise RuntimeError("injected")
        made["count"] += 1
        return stock_frame(self, runner, first)

    monkeypatch.setattr(Engine, "next_frame", next_frame)


@pytest.mark.parametrize("kind", ["text", "codes", "audio"])
@pytest.mark.parametrize("frame", [0, 1, 4])
def test_a_fault_does_not_show(
    fast: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, frame: int, kind: str
) -> None:
    model = fast("biases")
    prompt: dict[str, Any] = text_prompt((5, 9, 3))
    if kind == "codes":
        prompt = {"input_ids": code_prompt(model, 2, 5)}
    if kind == "audio":
        prompt = audio_prompt(model, [[1920, 2500], []])
    theirs, ours = Recorder(), Recorder()
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=7, streamer=theirs)
    with monkeypatch.context() as patch:
        break_frame(patch, frame)
        got = model.generate(**prompt, **GREEDY, max_new_tokens=7, streamer=ours)
    assert torch.equal(got, wanted)
    assert_same_puts(ours, theirs)
    metrics = model.acceleration.metrics
    assert metrics.counters["faults"] == 1
    assert metrics.counters["generate.stock"] == 1
    assert metrics.counters["generate.fast"] == 0
    assert dict(metrics.faults) == {"RuntimeError: injected": 1}
    assert dict(metrics.stock_reasons) == {"a fault of the fast path": 1}
    warned = [record for record in caplog.records if "the fast path failed" in record.getMessage()]
    assert len(warned) == 1
    with on_stock_path(model, "until rearm(): RuntimeError: injected"):
        model.generate(**prompt, **GREEDY, max_new_tokens=1)
    model.acceleration.guard.rearm()
    with on_fast_path(model):
        assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=3), wanted[:, : got.shape[1] - 4])


def test_the_same_fault_warns_once(
    fast: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompt = fast(), text_prompt((4,))
    break_frame(monkeypatch, 0)
    for _ in range(3):
        model.generate(**prompt, **GREEDY, max_new_tokens=2)
        model.acceleration.guard.rearm()
    assert model.acceleration.metrics.counters["faults"] == 3
    assert sum("the fast path failed" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("pads", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("frame", [3, 5, 8])
def test_a_fault_after_a_row_has_ended(fast: Any, monkeypatch: pytest.MonkeyPatch, frame: int, pads: bool) -> None:
    """The rows end in frames 4, 6 and 11; the streamer must see pads and the end where stock shows them."""
    model = copy_first_codebook(build(seed=2))
    model.config.codebook_eos_token_id = 4
    if pads:
        model.generation_config.eos_token_id = 5
    model = fast(of=model)
    prompt = text_prompt((5, 9, 3))
    theirs, ours = Recorder(), Recorder()
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=14, streamer=theirs)
    assert wanted.shape[1] == 12
    break_frame(monkeypatch, frame)
    got = model.generate(**prompt, **GREEDY, max_new_tokens=14, streamer=ours)
    assert torch.equal(got, wanted)
    assert_same_puts(ours, theirs)


@pytest.mark.parametrize("frame", [0, 2])
def test_a_fault_under_return_dict(fast: Any, monkeypatch: pytest.MonkeyPatch, frame: int) -> None:
    model, prompt = fast(), text_prompt((4, 6))
    options = {**GREEDY, "max_new_tokens": 5, "return_dict_in_generate": True, "output_audio": True}
    wanted = stock(model, **prompt, **options)
    break_frame(monkeypatch, frame)
    got = model.generate(**prompt, **options)
    assert type(got) is type(wanted)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.audio, wanted.audio))
    assert got.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()
    for a, b in zip(got.past_key_values.layers, wanted.past_key_values.layers):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)


def test_a_fault_in_the_setup_of_a_call(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = fast(), text_prompt((4, 6))

    def prepare(self: Engine, rows: int) -> None:
        raise MemoryError("injected")

    monkeypatch.setattr(Engine, "prepare", prepare)
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=3)
    assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=3), wanted)
    assert model.acceleration.metrics.counters["faults"] >= 1


def test_interrupts_are_not_swallowed(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = fast(), text_prompt((4,))
    stock_frame = Engine.next_frame

    def interrupted(self: Engine, runner: Any, first: bool) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "next_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**prompt, **GREEDY, max_new_tokens=3)
    monkeypatch.setattr(Engine, "next_frame", stock_frame)
    with on_fast_path(model):
        model.generate(**prompt, **GREEDY, max_new_tokens=3)


def test_a_streamers_own_error_reaches_its_caller(fast: Any) -> None:
    """It is not a fault of the fast path, and the frame must not be made twice."""
    model, prompt = fast(), text_prompt((4,))

    class Broken(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.puts) == 3:
                raise OSError("sound card gone")

    streamer = Broken()
    with pytest.raises(OSError, match="sound card"):
        model.generate(**prompt, **GREEDY, max_new_tokens=6, streamer=streamer)
    assert len(streamer.puts) == 3
    with on_fast_path(model):
        model.generate(**prompt, **GREEDY, max_new_tokens=3)


def test_a_step_that_fails_its_self_test_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler that makes wrong code: frames run eagerly, and the report says why."""
    from csm_runtime import accelerate, compiling

    def miscompile(step: Any) -> Any:
        def wrong(*args: Any) -> Any:
            out = step(*args)
            return out * 1.01 if isinstance(out, torch.Tensor) and out.is_floating_point() else out

        return wrong

    monkeypatch.setattr(compiling, "compile_step", miscompile)
    model = accelerate(build(), mode="compile", batch_sizes=(2,), progress=False)
    assert model.acceleration.mode == "eager"
    report = model.acceleration.report()
    assert any("backbone layer differs" in note for note in report.notes)
    assert "backbone layer differs" in str(report)
    prompt = text_prompt((4, 6))
    with on_fast_path(model):
        ours = model.generate(**prompt, **GREEDY, max_new_tokens=4)
    assert torch.equal(ours, stock(model, **prompt, **GREEDY, max_new_tokens=4))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from csm_runtime import accelerate, compiling

    def no_compiler(step: Any) -> Any:
        def raises(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler found\nsecond line")

        return raises

    monkeypatch.setattr(compiling, "compile_step", no_compiler)
    model = accelerate(build(), mode="compile", batch_sizes=(), progress=False)
    prompt = text_prompt((4, 6))
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=4)
    assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=4), wanted)
    assert model.acceleration.mode == "eager"
    assert any("no C++ compiler found" in note for note in model.acceleration.notes)
    with on_fast_path(model):
        assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=4), wanted)


def test_generation_config_of_the_call_is_untouched_by_a_fault(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = fast(), text_prompt((4,))
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    before = [copy.deepcopy(c.to_dict()) for c in (config, model.generation_config)]
    break_frame(monkeypatch, 1)
    model.generate(**prompt, generation_config=config)
    assert [c.to_dict() for c in (config, model.generation_config)] == before


def test_faults_are_logged_at_warning(
    fast: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = fast()
    break_frame(monkeypatch, 2)
    model.generate(**text_prompt((4,)), **GREEDY, max_new_tokens=4)
    record = next(r for r in caplog.records if "the fast path failed" in r.getMessage())
    assert record.levelno == logging.WARNING
    assert "frame 2" in record.getMessage()
    assert "injected" in record.getMessage()
