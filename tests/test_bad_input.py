"""Bad input is refused with the argument's name, what came and what was wanted, and the model is left as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from csm_models import (
    AUDIO,
    FRAME_SAMPLES,
    POSITIONS,
    TEXT_VOCAB,
    audio_prompt,
    build,
    code_prompt,
    on_fast_path,
    stock,
    text_prompt,
)
from torch import nn
from transformers import GenerationConfig

from csm_runtime import PrecisionPolicy, accelerate

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


def generation_configs(model: Any) -> list[dict[str, Any]]:
    return [copy.deepcopy(c.to_dict()) for c in (model.generation_config, model.depth_decoder.generation_config)]


@contextlib.contextmanager
def refused(
    model: Any, *words: Any, error: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[None]:
    """The block must raise an error that holds all words; afterwards the model generates as stock does."""
    before, names = generation_configs(model), set(model.__dict__)
    counters = dict(model.acceleration.metrics.counters)
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))
    assert generation_configs(model) == before
    assert set(model.__dict__) == names
    assert dict(model.acceleration.metrics.counters) == counters, "bad input is neither a fault nor a stock call"
    prompt = text_prompt((4, 6))
    with on_fast_path(model):
        got = model.generate(**prompt, do_sample=False, max_new_tokens=2)
    assert torch.equal(got, stock(model, **prompt, do_sample=False, max_new_tokens=2))


@contextlib.contextmanager
def not_accelerated(model: Any, *words: Any, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block must raise an error that holds all words, and leave no trace on the model."""
    before = set(model.__dict__) if isinstance(model, nn.Module) else None
    configs = generation_configs(model) if hasattr(model, "depth_decoder") else None
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))
    if before is not None:
        assert set(model.__dict__) == before
        assert "generate" not in model.__dict__
        assert "acceleration" not in model.__dict__
    if configs is not None:
        assert generation_configs(model) == configs


# ------------------------------------------------------------------------------------------------ accelerate()


@pytest.mark.parametrize(
    "thing", [None, "sesame/csm-1b", 3, nn.Linear(2, 2), object()], ids=lambda thing: type(thing).__name__
)
def test_not_a_csm(thing: Any) -> None:
    with not_accelerated(thing, "model", "CsmForConditionalGeneration", type(thing).__qualname__, error=TypeError):
        accelerate(thing)


def test_a_part_of_a_csm() -> None:
    with not_accelerated(build().depth_decoder, "CsmDepthDecoderForCausalLM", error=TypeError):
        accelerate(build().depth_decoder)


def test_a_class_of_the_same_name() -> None:
    class CsmForConditionalGeneration(nn.Module):
        pass

    model = CsmForConditionalGeneration()
    with not_accelerated(model, "model", error=TypeError):
        accelerate(model)


@pytest.mark.parametrize("part", ["backbone", "depth"])
def test_activation(part: str) -> None:
    model = build(**{part: {"hidden_act": "gelu"}})
    with not_accelerated(model, "hidden_act", "gelu", "silu"):
        accelerate(model, mode="eager", progress=False)


@pytest.mark.parametrize("part", ["backbone", "depth"])
def test_frequencies_that_change_with_the_length(part: str) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build(**{part: {"rope_parameters": rope}})
    with not_accelerated(model, "rope", "dynamic"):
        accelerate(model, mode="eager", progress=False)


def test_several_end_ids() -> None:
    model = build(backbone={"codebook_eos_token_id": [0, 1]})
    with not_accelerated(model, "codebook_eos_token_id", "[0, 1]"):
        accelerate(model, mode="eager", progress=False)


def test_codebooks_that_differ() -> None:
    model = build(depth={"num_codebooks": 5})
    with not_accelerated(model, "num_codebooks", 4, 5):
        accelerate(model, mode="eager", progress=False)


def test_double_precision() -> None:
    model = build(dtype=torch.float64)
    with not_accelerated(model, "dtype", "float64", "bfloat16"):
        accelerate(model, mode="eager", progress=False)


@pytest.mark.parametrize("precision", ["fp8", "", None, 8, "INT8"], ids=repr)
def test_precision(precision: Any) -> None:
    model = build()
    with not_accelerated(model, "precision", repr(precision), "stock", "int8"):
        accelerate(model, precision=precision, mode="eager", progress=False)


@pytest.mark.parametrize("mode", ["fast", "", None, "graph"], ids=repr)
def test_mode(mode: Any) -> None:
    model = build()
    with not_accelerated(model, "mode", repr(mode)):
        accelerate(model, mode=mode, progress=False)


@pytest.mark.parametrize("positions", [0, 1, -4, 2.5, "64"], ids=repr)
def test_max_positions(positions: Any) -> None:
    model = build()
    with not_accelerated(model, "max_positions", repr(positions)):
        accelerate(model, max_positions=positions, mode="eager", progress=False)


@pytest.mark.parametrize("sizes", [(0,), (17,), (1, -2), (1.0,), ("1",)], ids=repr)
def test_batch_sizes(sizes: Any) -> None:
    model = build()
    with not_accelerated(model, "batch_sizes", 16, repr(sizes[-1])):
        accelerate(model, batch_sizes=sizes, mode="eager", progress=False)


def test_batch_sizes_that_are_no_sequence() -> None:
    model = build()
    with pytest.raises((TypeError, ValueError), match="batch_sizes"):
        accelerate(model, batch_sizes=2, mode="eager", progress=False)
    assert "acceleration" not in model.__dict__


def test_weights_on_the_meta_device() -> None:
    model = build().to("meta")
    with not_accelerated(model, "meta"):
        accelerate(model, mode="eager", progress=False)


@pytest.mark.parametrize("part", ["depth_decoder", "lm_head", "backbone_model.layers.1.mlp.up_proj"])
def test_some_weights_on_the_meta_device(part: str) -> None:
    model = build()
    model.get_submodule(part).to("meta")
    with not_accelerated(model, "meta"):
        accelerate(model, mode="eager", progress=False)


def test_weights_that_int8_cannot_hold() -> None:
    model = build()
    model.depth_decoder.model.layers[0].mlp.up_proj.weight.data[3, 4] = float("nan")
    with not_accelerated(model, "NaN"):
        accelerate(model, precision="int8", mode="eager", progress=False)


class LoraLinear(nn.Module):
    """What an unmerged adapter puts in a linear layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _lora(model: Any) -> None:
    attention = model.backbone_model.layers[0].self_attn
    attention.q_proj = LoraLinear(attention.q_proj)


def _hook(model: Any) -> None:
    model.depth_decoder.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)


def _pre_hook(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _forward(model: Any) -> None:
    norm = model.backbone_model.norm
    stock_forward = norm.forward
    norm.forward = lambda x: stock_forward(x) * 2


def _parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.depth_decoder.model.layers[0].mlp.down_proj)


def _activation(model: Any) -> None:
    model.backbone_model.layers[0].mlp.act_fn = nn.GELU()


def _method(model: Any) -> None:
    model._sample = lambda *args, **kwargs: None


def _norm(model: Any) -> None:
    width = model.config.hidden_size
    model.backbone_model.norm = nn.LayerNorm(width)


def _embedding(model: Any) -> None:
    table = model.depth_decoder.model.embed_tokens
    model.depth_decoder.model.embed_tokens = nn.Embedding.from_pretrained(table.weight.data, max_norm=0.1)


MODIFICATIONS = [_lora, _hook, _pre_hook, _forward, _parametrized, _activation, _method, _norm]


@pytest.mark.parametrize("modify", MODIFICATIONS, ids=lambda f: f.__name__)
def test_modified_modules(modify: Any) -> None:
    model = build()
    modify(model)
    with not_accelerated(model, "model is not a plain CSM"):
        accelerate(model, mode="eager", progress=False)


def test_bad_arguments_of_a_second_call_leave_the_first(fast: Any) -> None:
    model = fast()
    handle = model.acceleration
    for options in ({"precision": "bogus"}, {"mode": "bogus"}, {"max_positions": 0}, {"batch_sizes": (99,)}):
        with refused(model, next(iter(options))):
            accelerate(model, progress=False, **{"mode": "eager", **options})
        assert model.acceleration is handle


def test_dropping_originals_of_nothing() -> None:
    """Without int8 there is nothing to drop: either say so, or stay restorable."""
    model = build()
    try:
        accelerate(model, drop_originals=True, mode="eager", progress=False)
    except ValueError as error:
        assert "drop_originals" in str(error)
        assert "acceleration" not in model.__dict__
    else:
        model.acceleration.restore()


def test_policies() -> None:
    for rules, word in (
        ((("depth.*", "int3"),), "int3"),
        ((("decoder.*", "int8"),), "decoder.*"),
        ((("*", "int8"),), "backbone.head"),
    ):
        with pytest.raises(ValueError, match="precision") as caught:
            PrecisionPolicy(rules)
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------ generate(): prompts


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0), (2, 0, 4)], ids=str)
def test_empty_prompt(shared: Any, shape: tuple[int, ...]) -> None:
    with refused(shared(), "input_ids", "empty", shape):
        shared().generate(torch.zeros(shape, dtype=torch.long), max_new_tokens=3)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3, 4), ()], ids=str)
def test_dimensions(shared: Any, shape: tuple[int, ...]) -> None:
    with refused(shared(), "input_ids", shape):
        shared().generate(torch.zeros(shape, dtype=torch.long), max_new_tokens=3)


def test_too_long(shared: Any) -> None:
    for ids in (torch.ones(1, POSITIONS + 1, dtype=torch.long), code_prompt(shared(), 1, POSITIONS + 1)):
        with refused(shared(), "input_ids", POSITIONS + 1, POSITIONS):
            shared().generate(ids, max_new_tokens=3)


@pytest.mark.parametrize("value", [-1, TEXT_VOCAB, 10**6])
def test_text_ids_out_of_range(shared: Any, value: int) -> None:
    prompt = text_prompt((4, 6))
    prompt["input_ids"][1, 3] = value
    with refused(shared(), "input_ids", value, TEXT_VOCAB - 1):
        shared().generate(**prompt, max_new_tokens=3)


@pytest.mark.parametrize("value", [-1, 32, 10**6])
def test_codes_out_of_range(shared: Any, value: int) -> None:
    """Stock would read another codebook's row of the embedding table without a word."""
    ids = code_prompt(shared(), 2, 5)
    ids[1, 3, 0] = value
    with refused(shared(), "input_ids", value, 31):
        shared().generate(ids, max_new_tokens=3)


def test_number_of_codebooks(shared: Any) -> None:
    with refused(shared(), "input_ids", 3, 4):
        shared().generate(torch.zeros(1, 5, 3, dtype=torch.long), max_new_tokens=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16])
def test_ids_that_are_not_integers(shared: Any, dtype: torch.dtype) -> None:
    with refused(shared(), "input_ids", dtype):
        shared().generate(torch.ones(1, 4, dtype=dtype), max_new_tokens=3)


def test_ids_that_are_no_tensor(shared: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="input_ids"):
        shared().generate([[1, 2, 3]], max_new_tokens=3)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 7), (12,), (2, 6, 4)], ids=str)
def test_shape_of_the_mask(shared: Any, shape: tuple[int, ...]) -> None:
    with refused(shared(), "attention_mask", shape, (2, 6)):
        shared().generate(text_prompt((4, 6))["input_ids"], attention_mask=torch.ones(shape).long(), max_new_tokens=3)


def test_a_row_that_is_all_padding(shared: Any) -> None:
    prompt = text_prompt((4, 6))
    prompt["attention_mask"][1] = 0
    with refused(shared(), "attention_mask", "row 1"):
        shared().generate(**prompt, max_new_tokens=3)


# ------------------------------------------------------------------------------------------------ generate(): audio


def audio_fault(name: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Spoil a prompt of two rows, with two segments and with one."""
    ids, cutoffs = prompt["input_ids"], prompt["input_values_cutoffs"]
    sound = prompt["input_values"]
    if name == "no cutoffs":
        del prompt["input_values_cutoffs"]
    elif name == "no sound":
        del prompt["input_values"]
    elif name == "too few segments":
        cutoffs[0, 1] = -1
    elif name == "too many segments":
        cutoffs[1, 1] = int(cutoffs[1, 0]) + FRAME_SAMPLES
    elif name == "beyond the sound":
        cutoffs[0, 1] = sound.shape[-1] + FRAME_SAMPLES
    elif name == "not increasing":
        cutoffs[0] = cutoffs[0].flip(0)
    elif name == "equal":
        cutoffs[0, 1] = cutoffs[0, 0]
    elif name == "zero":
        cutoffs[1, 0] = 0
    elif name == "rows of cutoffs":
        prompt["input_values_cutoffs"] = cutoffs[:1]
    elif name == "rows of sound":
        prompt["input_values"] = sound[:1]
    elif name == "flat cutoffs":
        prompt["input_values_cutoffs"] = cutoffs[0]
    elif name == "flat sound":
        prompt["input_values"] = sound[:, 0]
    elif name == "one audio token less":
        ids[0, (ids[0] == AUDIO).nonzero()[0]] = 7
    elif name == "one audio token more":
        ids[1, -1] = AUDIO
    elif name == "tokens in the wrong row":
        place = (ids[0] == AUDIO).nonzero()[0]
        ids[0, place] = 7
        ids[1, -1] = AUDIO
    elif name == "cutoffs in the wrong row":
        prompt["input_values_cutoffs"] = cutoffs.flip(0)
    elif name == "codes":
        prompt["input_ids"] = torch.zeros(2, ids.shape[1], 4, dtype=torch.long)
    elif name == "list":
        prompt["input_values_cutoffs"] = cutoffs.tolist()
    else:
        raise AssertionError(name)
    return prompt


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no cutoffs", ["input_values_cutoffs"]),
        ("no sound", ["input_values", "missing"]),
        ("too few segments", ["input_values_cutoffs", "row 0", 5, 2]),
        ("too many segments", ["input_values_cutoffs", "row 1", 1, 2]),
        ("beyond the sound", ["input_values_cutoffs", "row 0", 9240]),
        ("not increasing", ["input_values_cutoffs", "row 0", "increasing"]),
        ("equal", ["input_values_cutoffs", "row 0", "increasing"]),
        ("zero", ["input_values_cutoffs", "row 1"]),
        ("rows of cutoffs", ["input_values_cutoffs", (1, 2)]),
        ("rows of sound", ["input_values", "(1, 1,"]),
        ("flat cutoffs", ["input_values_cutoffs", (2,)]),
        ("flat sound", ["input_values"]),
        ("one audio token less", ["row 0", 5, 4]),
        ("one audio token more", ["row 1", 1, 2]),
        ("tokens in the wrong row", ["row 0"]),
        ("cutoffs in the wrong row", ["row 0"]),
        ("codes", ["input_values", "2 dimensions"]),
        ("list", ["input_values_cutoffs"]),
    ],
)
def test_sound_and_cutoffs(shared: Any, name: str, words: list[Any]) -> None:
    model = shared()
    prompt = audio_prompt(model, [[2 * FRAME_SAMPLES, 2 * FRAME_SAMPLES + 1560], [FRAME_SAMPLES]])
    with refused(model, *words, error=(ValueError, TypeError)):
        model.generate(**audio_fault(name, prompt), max_new_tokens=3)


@pytest.mark.parametrize("samples", [1, 100, 1919, 1920, 1921, 3840, 5000])
def test_every_length_the_codec_takes_is_accepted(shared: Any, samples: int) -> None:
    """The frames the check expects of a segment are those the codec makes of it."""
    model = shared()
    prompt = audio_prompt(model, [[samples]])
    made = model.codec_model.encode(prompt["input_values"]).audio_codes.shape[-1]
    assert made == int((prompt["input_ids"] == AUDIO).sum())
    with on_fast_path(model):
        model.generate(**prompt, **GREEDY, max_new_tokens=1)


# ------------------------------------------------------------------------------------------------ generate(): numbers

SPOILED = [
    ("temperature", 0),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_p", 1.5),
    ("top_p", -0.1),
]


@pytest.mark.parametrize(("name", "value"), SPOILED, ids=str)
@pytest.mark.parametrize("prefix", ["", "depth_decoder_"])
def test_sampling_values(shared: Any, prefix: str, name: str, value: Any) -> None:
    model = shared()
    with refused(model, prefix + name, repr(value)):
        model.generate(**text_prompt((4,)), max_new_tokens=2, **{prefix + "do_sample": True, prefix + name: value})


def test_sampling_values_of_a_generation_config(shared: Any) -> None:
    model = shared()
    config = GenerationConfig(do_sample=True, max_new_tokens=2)
    config.temperature = 0.0
    with refused(model, "temperature", 0.0):
        model.generate(**text_prompt((4,)), generation_config=config)


def test_sampling_values_that_meet_a_sampling_config(fast: Any) -> None:
    """do_sample from the model's own config, temperature from the call or from a config without do_sample."""
    model = build()
    model.generation_config.do_sample = True
    model = fast(of=model)
    config = GenerationConfig(max_new_tokens=2)
    config.temperature = -2.0
    for options in ({"temperature": -2.0}, {"generation_config": config}):
        with refused(model, "temperature", -2.0):
            model.generate(**text_prompt((4,)), **{"max_new_tokens": 2, **options})


def test_depth_sampling_values_that_meet_a_sampling_config(fast: Any) -> None:
    model = build()
    model.depth_decoder.generation_config.do_sample = True
    model.depth_decoder.generation_config.top_k = 1
    model = fast(of=model)
    with refused(model, "depth_decoder_temperature", -2.0):
        model.generate(**text_prompt((4,)), max_new_tokens=2, depth_decoder_temperature=-2.0)


def test_temperature_of_a_greedy_call_does_not_matter(shared: Any) -> None:
    model, prompt = shared(), text_prompt((4,))
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=2, temperature=0.0)
    assert torch.equal(got, stock(model, **prompt, **GREEDY, max_new_tokens=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1.5),
        ("seed", [1, 2, 3]),
        ("seed", [[1, 2]]),
        ("seed", "abc"),
        ("seed", True),
        ("seed", 2**70),
        ("seed", torch.tensor([0.5, 1.0])),
        ("utterance_ids", [1]),
        ("utterance_ids", [0.5, 1.5]),
        ("utterance_ids", "ab"),
        ("utterance_ids", 2**70),
        ("utterance_ids", torch.zeros(2, 2, dtype=torch.long)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampled", [True, False])
def test_seeds(shared: Any, name: str, value: Any, sampled: bool) -> None:
    with refused(shared(), name):
        shared().generate(**text_prompt((4, 6)), max_new_tokens=2, do_sample=sampled, **{name: value})


def test_seeds_of_several_sequences_per_prompt(shared: Any) -> None:
    """A list of seeds has one entry per row that is drawn: four, for two prompts of two sequences each."""
    model, prompt = shared(), text_prompt((4, 6))
    options = {"do_sample": True, "max_new_tokens": 2, "num_return_sequences": 2}
    with on_fast_path(model):
        rows = model.generate(**prompt, **options, seed=[1, 2, 3, 4])
    assert rows.shape[0] == 4
    with refused(model, "seed"):
        model.generate(**prompt, **options, seed=[1, 2])


# ------------------------------------------------------------------------------------------------ the KV buffer


def test_a_buffer_too_small_for_the_call(fast: Any) -> None:
    model = fast(max_positions=10)
    prompt = text_prompt((8, 6))
    with refused(model, "max_positions=10", 8, 4, 11):
        model.generate(**prompt, max_new_tokens=4, do_sample=False)
    with refused(model, "max_positions=10"):
        model.generate(**prompt, max_length=12, do_sample=False)
    with refused(model, "max_positions=10"):
        model.generate(**prompt, generation_config=GenerationConfig(max_new_tokens=4))
    with refused(model, "max_positions=10"):
        model.generate(**prompt)
    with on_fast_path(model):
        got = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(got, stock(model, **prompt, max_new_tokens=3, do_sample=False))


def test_a_buffer_that_just_fits_an_end(fast: Any) -> None:
    """The last frame is never fed back, so prompt and frames need one position less than their sum."""
    model, prompt = fast(max_positions=12), text_prompt((6,))
    with on_fast_path(model):
        got = model.generate(**prompt, max_new_tokens=7, do_sample=False)
    assert torch.equal(got, stock(model, **prompt, max_new_tokens=7, do_sample=False))
    with refused(model, "max_positions=12"):
        model.generate(**prompt, max_new_tokens=8, do_sample=False)


def test_a_buffer_larger_than_the_models_positions(fast: Any) -> None:
    model, prompt = fast(max_positions=80), text_prompt((60,))
    with on_fast_path(model):
        got = model.generate(**prompt, max_new_tokens=15, do_sample=False)
    assert torch.equal(got, stock(model, **prompt, max_new_tokens=15, do_sample=False))


def test_errors_of_stock_itself_pass_through(shared: Any) -> None:
    model = shared()
    with pytest.raises(ValueError) as theirs:
        stock(model, **text_prompt((4,)), max_new_tokens=2, nonsense=3)
    with pytest.raises(ValueError) as ours:
        model.generate(**text_prompt((4,)), max_new_tokens=2, nonsense=3)
    assert str(ours.value) == str(theirs.value)
