"""fp32 greedy tokens equal the stock model's, frame for frame, whatever the shape of model, prompt and call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from csm_models import (
    CONFIGS,
    FRAME_SAMPLES,
    Recorder,
    assert_same_puts,
    audio_prompt,
    build,
    code_prompt,
    copy_first_codebook,
    on_fast_path,
    stock,
    text_prompt,
)
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache

from csm_runtime import accelerate
from csm_runtime.adapters import hf_passes

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
LENGTHS = (7, 12, 3, 1, 9)
ENDINGS = (
    # config, seed, end-of-speech id, frame in which each of three rows says it
    ("base", 2, 4, (4, 6, 11)),
    ("base", 1, 13, (1, 7, 5)),
    ("eight_codebooks", 1, 1, (4, 11, 0)),
    ("base", 0, 7, (5, 12, None)),
)


def same(model: Any, prompt: dict[str, Any], **options: Any) -> torch.Tensor:
    """Tokens of the fast path, after asserting that stock makes the same from the same call."""
    wanted = stock(model, **prompt, **GREEDY, **options)
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, **options)
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert torch.equal(got, wanted), (got != wanted).nonzero()[0]
    return got


def ending_model(name: str, seed: int, eos: int) -> Any:
    """A stock model that does say the end-of-speech frame."""
    model = copy_first_codebook(build(name, seed=seed))
    model.config.codebook_eos_token_id = eos
    return model


def first_ends(tokens: torch.Tensor, eos: int) -> tuple[int | None, ...]:
    hits = (tokens[:, :, :-1] == eos).all(-1)
    return tuple(int(row.nonzero()[0]) if bool(row.any()) else None for row in hits)


# ------------------------------------------------------------------------------------------------ shapes of models


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_config(shared: Any, name: str) -> None:
    model = shared(name)
    frames = 3 if name == "thirty_two_codebooks" else 6
    tokens = same(model, text_prompt(LENGTHS[:3]), max_new_tokens=frames)
    assert tokens.unique().numel() > 10, "tokens that hardly vary test nothing"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["base", "biases"])
def test_batches_of_uneven_prompts(shared: Any, name: str, rows: int) -> None:
    same(shared(name), text_prompt(LENGTHS[:rows], seed=rows), max_new_tokens=6)


@pytest.mark.parametrize("backbone", ["base", "llama3", "norms"])
def test_long_utterances(shared: Any, backbone: str) -> None:
    """Far enough for a wrong rotary position or cache slot to turn a token."""
    same(shared(backbone), text_prompt((4, 9)), max_new_tokens=40)


def test_rows_do_not_disturb_each_other(shared: Any) -> None:
    model, prompt = shared(), text_prompt(LENGTHS)
    together = model.generate(**prompt, **GREEDY, max_new_tokens=6)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(prompt["input_ids"][row : row + 1, -length:], **GREEDY, max_new_tokens=6)
        assert torch.equal(alone[0], together[row]), row


def test_eager_attention_implementation(fast: Any) -> None:
    model = build()
    model.set_attn_implementation("eager")
    same(fast(of=model), text_prompt((5, 8)), max_new_tokens=5)


def test_a_subclass_without_changes(fast: Any) -> None:
    model = build()

    class Mine(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Mine
    same(fast(of=model), text_prompt((5,)), max_new_tokens=4)


# ------------------------------------------------------------------------------------------------ shapes of prompts


@pytest.mark.parametrize("rows", [1, 3])
def test_codes_as_prompt(shared: Any, rows: int) -> None:
    model = shared("untied")
    ids = code_prompt(model, rows, 7)
    tokens = same(model, {"input_ids": ids}, max_new_tokens=5)
    assert torch.equal(tokens[:, :7], ids)
    assert tokens.shape[1] == 12


def test_codes_as_padded_prompt(shared: Any) -> None:
    model = shared()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    same(model, {"input_ids": code_prompt(model, 2, 6), "attention_mask": mask}, max_new_tokens=5)


@pytest.mark.parametrize(
    "segments",
    [
        [[3 * FRAME_SAMPLES]],
        [[2 * FRAME_SAMPLES, 2500]],
        [[2 * FRAME_SAMPLES, 2500, 700], [FRAME_SAMPLES]],
        [[], [3000]],
        [[4000], [], [1, FRAME_SAMPLES + 1]],
    ],
    ids=str,
)
def test_reference_audio(shared: Any, segments: list[list[int]]) -> None:
    model = shared()
    prompt = audio_prompt(model, segments)
    tokens = same(model, prompt, max_new_tokens=5)
    other = {**prompt, "input_values": prompt["input_values"].flip(-1)}
    assert not torch.equal(model.generate(**other, **GREEDY, max_new_tokens=5), tokens), "the sound is not heard"


def test_audio_tokens_without_sound_are_text(shared: Any) -> None:
    model = shared()
    prompt = audio_prompt(model, [[FRAME_SAMPLES]])
    same(model, {key: prompt[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=3)


def test_no_mask_and_a_mask_of_ones(shared: Any) -> None:
    model, ids = shared(), text_prompt((8, 8))["input_ids"]
    tokens = same(model, {"input_ids": ids}, max_new_tokens=4)
    assert torch.equal(
        tokens, same(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, max_new_tokens=4)
    )


def test_pad_tokens_without_a_mask(shared: Any) -> None:
    """Stock infers a mask from pad tokens, or does not: either way the same."""
    same(shared(), {"input_ids": text_prompt((4, 8))["input_ids"]}, max_new_tokens=4)


def test_masks_with_holes(shared: Any) -> None:
    prompt = text_prompt((9, 9))
    prompt["attention_mask"][0, 2:5] = 0
    prompt["attention_mask"][1, 7] = 0
    plain = same(shared(), {**prompt, "attention_mask": torch.ones(2, 9, dtype=torch.long)}, max_new_tokens=5)
    assert not torch.equal(same(shared(), prompt, max_new_tokens=5), plain)


def test_a_mask_that_hides_the_last_position(shared: Any) -> None:
    prompt = text_prompt((6, 9))
    prompt["input_ids"], prompt["attention_mask"] = prompt["input_ids"].flip(1), prompt["attention_mask"].flip(1)
    same(shared(), prompt, max_new_tokens=5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_dtypes_of_masks(shared: Any, dtype: torch.dtype) -> None:
    prompt = text_prompt((4, 7))
    prompt["attention_mask"] = prompt["attention_mask"].to(dtype)
    same(shared(), prompt, max_new_tokens=4)


def test_int32_ids(shared: Any) -> None:
    prompt = text_prompt((4, 7))
    prompt["input_ids"] = prompt["input_ids"].int()
    same(shared(), prompt, max_new_tokens=4)


def test_own_position_ids(shared: Any) -> None:
    prompt = {**text_prompt((6, 6)), "position_ids": torch.arange(6)[None].expand(2, -1) + torch.tensor([[11], [3]])}
    same(shared(), prompt, max_new_tokens=5)


def test_a_prompt_longer_than_a_prefill_chunk(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks shorter than one row's padding included: all their positions are hidden."""
    model, prompt = shared("biases"), text_prompt((3, 23, 11))
    monkeypatch.setattr(hf_passes, "CHUNK", 5)
    same(model, prompt, max_new_tokens=5)


def test_prefill_is_chunked(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared()
    monkeypatch.setattr(hf_passes, "CHUNK", 5)
    widths = []
    forward = type(model.backbone_model).forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["inputs_embeds"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.backbone_model), "forward", spy)
    model.generate(**text_prompt((13,)), **GREEDY, max_new_tokens=2)
    assert widths == [5, 5, 3]


# ------------------------------------------------------------------------------------------------ end of speech


@pytest.mark.parametrize("pads", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_rows_end_where_stock_ends_them(fast: Any, ending: tuple[Any, ...], pads: bool) -> None:
    name, seed, eos, ends = ending
    model = ending_model(name, seed, eos)
    if pads:  # any eos_token_id switches on stock's padding of finished rows
        model.generation_config.eos_token_id = 5
        model.generation_config.pad_token_id = 6
    model = fast(of=model)
    tokens = same(model, text_prompt((5, 9, 3)), max_new_tokens=14)
    assert first_ends(tokens, eos) == ends
    last = 14 if None in ends else max(end for end in ends if end is not None) + 1
    assert tokens.shape[1] == last
    for row, end in enumerate(ends):
        if end is not None and end + 1 < last:
            assert bool((tokens[row, end + 1 :] == model.config.codebook_pad_token_id).all()) == pads


def test_two_codebooks_end_on_the_first_alone(fast: Any) -> None:
    """Stock leaves the last codebook out of its end rule; with two codebooks, codebook 0 decides."""
    model = build("two_codebooks")
    prompt = text_prompt((5, 9))
    tokens = stock(model, **prompt, **GREEDY, max_new_tokens=6)
    row, frame = next((r, f) for r in (0, 1) for f in (2, 3, 4) if tokens[r, f, 0] not in tokens[r, :f, 0])
    assert tokens[row, frame, 0] != tokens[row, frame, 1]
    model.config.codebook_eos_token_id = int(tokens[row, frame, 0])
    alone = {"input_ids": prompt["input_ids"][row : row + 1], "attention_mask": prompt["attention_mask"][row : row + 1]}
    assert same(fast(of=model), alone, max_new_tokens=6).shape[1] == frame + 1


def test_end_in_the_first_and_in_the_last_allowed_frame(fast: Any) -> None:
    model = fast(of=ending_model("base", 2, 4))
    prompt = text_prompt((5, 9, 3))
    first = {key: value[:1] for key, value in prompt.items()}
    for limit, frames in ((4, 4), (5, 5), (6, 5)):
        assert same(model, first, max_new_tokens=limit).shape[1] == frames


def test_codes_as_prompt_end(fast: Any) -> None:
    """End of speech is looked for in new frames only: a prompt may hold the end frame of an earlier turn."""
    model = fast(of=ending_model("base", 2, 4))
    ids = code_prompt(model, 2, 6)
    ids[0, 2] = 4
    ids[1, -1] = 4
    same(model, {"input_ids": ids}, max_new_tokens=10)


def test_the_end_id_is_read_at_the_call(fast: Any) -> None:
    """Stock reads both ids from the config in every call, so a change after accelerate() counts."""
    model = fast(of=ending_model("base", 2, 31))
    prompt = text_prompt((5, 9, 3))
    assert same(model, prompt, max_new_tokens=12).shape[1] == 12
    model.config.codebook_eos_token_id = 4
    model.config.codebook_pad_token_id = 17
    model.generation_config.eos_token_id = 5
    tokens = same(model, prompt, max_new_tokens=14)
    assert first_ends(tokens, 4) == (4, 6, 11)
    assert bool((tokens[0, 5:] == 17).all())


# ------------------------------------------------------------------------------------------------ arguments of the call


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_new_tokens(shared: Any, limit: int) -> None:
    assert same(shared(), text_prompt((4, 6)), max_new_tokens=limit).shape[1] == limit


def test_max_length_counts_the_prompt(shared: Any) -> None:
    model = shared()
    assert same(model, text_prompt((4, 6)), max_length=11).shape[1] == 5
    assert same(model, {"input_ids": code_prompt(model, 1, 6)}, max_length=11).shape[1] == 11


def test_both_limits(shared: Any) -> None:
    same(shared(), text_prompt((4, 6)), max_length=30, max_new_tokens=3)


def test_no_limit_given(shared: Any) -> None:
    same(shared(), text_prompt((4,)))


def test_limits_of_the_generation_config_and_of_the_call(fast: Any) -> None:
    model = fast(max_positions=24)
    model.generation_config.max_new_tokens = 4
    assert same(model, text_prompt((6,))).shape[1] == 4
    assert same(model, text_prompt((6,)), max_new_tokens=7).shape[1] == 7
    same(model, text_prompt((6,)), max_length=60)


def test_generation_config_object(shared: Any) -> None:
    model = shared()
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    before = copy.deepcopy(config.to_dict())
    same(model, text_prompt((4, 6)), generation_config=config)
    assert config.to_dict() == before
    same(model, text_prompt((4, 6)), generation_config=config, max_new_tokens=2)


def test_arguments_by_place(shared: Any) -> None:
    model = shared()
    prompt = audio_prompt(model, [[FRAME_SAMPLES]])
    args = (prompt["input_ids"], prompt["input_values"], prompt["input_values_cutoffs"])
    with on_fast_path(model):
        got = model.generate(*args, max_new_tokens=4, **GREEDY)
    assert torch.equal(got, stock(model, *args, max_new_tokens=4, **GREEDY))


@pytest.mark.parametrize(
    "name",
    [
        "custom_generate",
        "logits_processor",
        "stopping_criteria",
        "streamer",
        "inputs",
        "assistant_model",
        "synced_gpus",
    ],
)
def test_arguments_given_as_none(shared: Any, name: str) -> None:
    same(shared(), text_prompt((4,)), max_new_tokens=3, **{name: None})


def test_greedy_codebook_0_over_a_sampling_config(fast: Any) -> None:
    model = build()
    for config in (model.generation_config, model.depth_decoder.generation_config):
        config.do_sample, config.temperature, config.top_k = True, 0.9, 5
    same(fast(of=model), text_prompt((4, 6)), max_new_tokens=5)


def test_top_k_of_one_is_greedy(shared: Any) -> None:
    model, prompt = shared(), text_prompt((4, 6))
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=5)
    options = {"do_sample": True, "top_k": 1, "depth_decoder_do_sample": True, "depth_decoder_top_k": 1}
    with on_fast_path(model):
        assert torch.equal(model.generate(**prompt, **options, max_new_tokens=5), wanted)


def test_depth_arguments_stay_as_stock_leaves_them(fast: Any) -> None:
    """Stock writes depth_decoder_* arguments into the depth decoder's own config, where the next call finds them."""
    ours, theirs = fast(), build()
    options = {"do_sample": False, "depth_decoder_do_sample": True, "depth_decoder_top_k": 1, "max_new_tokens": 2}
    prompt = text_prompt((4,))
    ours.generate(**prompt, **options)
    theirs.generate(**prompt, **options)
    assert ours.depth_decoder.generation_config.to_dict() == theirs.depth_decoder.generation_config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.depth_decoder.generation_config.top_k == 1


def test_streamer(fast: Any) -> None:
    model = ending_model("base", 2, 4)
    model.generation_config.eos_token_id = 5
    model = fast(of=model)
    for prompt in (text_prompt((5, 9, 3)), {"input_ids": code_prompt(model, 1, 5)}):
        theirs, ours = Recorder(), Recorder()
        stock(model, **prompt, **GREEDY, max_new_tokens=14, streamer=theirs)
        with on_fast_path(model):
            model.generate(**prompt, **GREEDY, max_new_tokens=14, streamer=ours)
        assert_same_puts(ours, theirs)


def test_streamed_frames_are_not_overwritten(shared: Any) -> None:
    """A streamer may keep what it was given without copying it."""

    class Keeper:
        kept: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.kept.append(value)

        def end(self) -> None:
            pass

    keeper = Keeper()
    tokens = shared().generate(**text_prompt((4, 6)), **GREEDY, max_new_tokens=5, streamer=keeper)
    assert torch.equal(torch.stack(keeper.kept[-5:], dim=1), tokens)


@pytest.mark.parametrize("limit", [5, 14])
def test_output_audio(fast: Any, limit: int) -> None:
    model = fast(of=ending_model("base", 0, 7))
    prompt = text_prompt((5, 9, 3))
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=limit, output_audio=True)
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=limit, output_audio=True)
    assert isinstance(got, list)
    assert len(got) == len(wanted) == 3
    for ours, theirs in zip(got, wanted):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    if limit == 14:
        assert len({wave.numel() for wave in got}) == 3


@pytest.mark.parametrize("audio", [False, True])
def test_return_dict(shared: Any, audio: bool) -> None:
    model, prompt = shared("biases" if not audio else "base"), text_prompt((5, 9))
    options = {**GREEDY, "max_new_tokens": 5, "return_dict_in_generate": True, "output_audio": audio}
    wanted = stock(model, **prompt, **options)
    with on_fast_path(model):
        got = model.generate(**prompt, **options)
    assert type(got) is type(wanted)
    assert set(got.keys()) == set(wanted.keys())
    assert torch.equal(got.sequences, wanted.sequences)
    for name in ("scores", "logits", "attentions", "hidden_states"):
        assert getattr(got, name) is None
        assert getattr(wanted, name) is None
    if audio:
        assert all(torch.equal(a, b) for a, b in zip(got.audio, wanted.audio))
    else:
        assert got.audio is None
    assert_caches_equal(got.past_key_values, wanted.past_key_values)


def assert_caches_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length() > 0
    assert len(ours.layers) == len(theirs.layers)
    for a, b in zip(ours.layers, theirs.layers):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)


def test_the_returned_cache_goes_on(shared: Any) -> None:
    """The next stock forward pass over the returned cache says what codebook 0 comes next."""
    model, prompt = shared(), text_prompt((7,))
    longer = stock(model, **prompt, **GREEDY, max_new_tokens=6)
    out = model.generate(**prompt, **GREEDY, max_new_tokens=5, return_dict_in_generate=True)
    with torch.no_grad():
        step = model(input_ids=out.sequences[:, -1:], past_key_values=out.past_key_values, use_cache=True)
    assert int(step.logits[0, -1].argmax()) == int(longer[0, 5, 0])
    again = model.generate(**prompt, **GREEDY, max_new_tokens=5, return_dict_in_generate=True)
    assert again.past_key_values.get_seq_length() == 7 + 4, "a returned cache belongs to its caller"


def test_the_returned_cache_holds_the_pads_of_finished_rows(fast: Any) -> None:
    model = ending_model("base", 2, 4)
    model.generation_config.eos_token_id = 5
    model, prompt = fast(of=model), text_prompt((5, 9, 3))
    options = {**GREEDY, "max_new_tokens": 9, "return_dict_in_generate": True}
    wanted = stock(model, **prompt, **options)
    got = model.generate(**prompt, **options)
    assert first_ends(got.sequences, 4) == (4, 6, None)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_caches_equal(got.past_key_values, wanted.past_key_values)


def test_static_cache(shared: Any) -> None:
    model, prompt = shared(), text_prompt((5, 9))
    options = {**GREEDY, "max_new_tokens": 5, "return_dict_in_generate": True, "cache_implementation": "static"}
    wanted = stock(model, **prompt, **options)
    assert type(wanted.past_key_values) is StaticCache
    got = model.generate(**prompt, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    assert type(got.past_key_values) is StaticCache
    for a, b in zip(got.past_key_values.layers, wanted.past_key_values.layers):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)


def test_dynamic_cache_is_the_default(shared: Any) -> None:
    out = shared().generate(**text_prompt((5,)), **GREEDY, max_new_tokens=2, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache


@pytest.mark.parametrize("caller", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_of_the_caller(shared: Any, caller: Any) -> None:
    model = shared()
    with caller():
        prompt = audio_prompt(model, [[FRAME_SAMPLES], []])
        same(model, prompt, max_new_tokens=4)


def test_a_fresh_model_first_used_in_inference_mode(fast: Any) -> None:
    with torch.inference_mode():
        model = fast(batch_sizes=(1,))
        same(model, text_prompt((4, 6)), max_new_tokens=3)
    same(model, text_prompt((4, 6)), max_new_tokens=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_of_the_caller(fast: Any, dtype: torch.dtype) -> None:
    stock_model = build()
    torch.set_default_dtype(dtype)
    try:
        same(fast(of=stock_model), text_prompt((4, 6)), max_new_tokens=3)
    finally:
        torch.set_default_dtype(torch.float32)


def test_calls_one_after_another_leave_no_trace(shared: Any) -> None:
    """Long after short, few rows after many, masked after full: stale buffers must not show."""
    model = shared()
    for lengths, frames in (((12, 3), 12), ((2,), 3), ((3, 9, 1, 4), 6), ((2, 2), 8), ((6,), 4)):
        same(model, text_prompt(lengths, seed=frames), max_new_tokens=frames)


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "calls"),
    [("base", (((7,), 20), ((5, 9, 3), 8))), ("biases", (((5, 9), 8),)), ("llama3", (((5,), 20),))],
)
def test_compiled_steps(compiled: Any, name: str, calls: Any) -> None:
    model = compiled(name)
    for lengths, frames in calls:
        same(model, text_prompt(lengths), max_new_tokens=frames)
    assert model.acceleration.mode == "compile"


@pytest.mark.slow
def test_compiled_steps_hear_and_end(compiled: Any) -> None:
    model = compiled()
    same(model, audio_prompt(model, [[2 * FRAME_SAMPLES, 2500], [], [FRAME_SAMPLES]]), max_new_tokens=5)
    ending = accelerate(ending_model("base", 2, 4), mode="compile", batch_sizes=(), progress=False)
    tokens = same(ending, text_prompt((5, 9, 3)), max_new_tokens=14)
    assert first_ends(tokens, 4) == (4, 6, 11)
    assert ending.acceleration.mode == "compile"
