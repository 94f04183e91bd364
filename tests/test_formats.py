"""Every format of a policy in whole utterances: tokens are those of a stock model whose weights are what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from csm_models import build, lowered_twin, on_fast_path, stock, teacher_forced, text_prompt, trained
from test_precision import assert_within_tolerance, greedy_after_prefill, recorded

from csm_kernels.quant import QuantWeight
from csm_kernels.testing import assert_close
from csm_runtime import PrecisionPolicy, accelerate
from csm_runtime.adapters.hf import live_weights
from csm_runtime.precision import PRESETS
from csm_runtime.weights import PackedWeights

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}
PROMPT = text_prompt((5, 9, 3))

BANKS = (
    ("depth.head.[1-2]", "keep"),
    ("depth.head.3", "int4:32"),
    ("depth.head.5", "int8"),
    ("depth.head", "fp8"),
)
MIXED = PrecisionPolicy((
    *BANKS,
    ("*.mlp", "int4"),
    ("depth.attention", "fp16"),
    ("backbone.attention", "bf16"),
    ("depth.projection", "int4:64"),
    ("backbone.embedding", "int8"),
    ("depth.embedding", "int4:32"),
))  # fmt: skip
ONE_FORMAT = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "int4:32", "int4:64")


def uniform(fmt: str) -> PrecisionPolicy:
    keeps = (("kv", "keep"), ("codec", "keep"), ("backbone.head", fmt))
    return PrecisionPolicy((*keeps, ("*", fmt)), fmt)


def assert_is_its_twin(policy: PrecisionPolicy, make: Any, frames: int = 6) -> None:
    model, prompt = accelerate(make(), precision=policy, mode="eager", progress=False, guard=False), PROMPT
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=frames)
    twin = lowered_twin(policy, of=make())
    assert torch.equal(got, greedy_after_prefill(make(), twin, prompt, frames))


@pytest.mark.parametrize("fmt", ONE_FORMAT)
@pytest.mark.parametrize("name", ["base", "biases", "eight_codebooks", "depth_vocabulary"])
def test_one_format_everywhere(name: str, fmt: str) -> None:
    """Widths of 24 to 48 are no whole int4 groups of 64 or 128; the model of eight codebooks has heads of 20 columns."""
    assert_is_its_twin(uniform(fmt), lambda: build(name, seed=2))


@pytest.mark.parametrize("name", ["base", "biases", "eight_codebooks", "tied", "two_codebooks", "thirty_two_codebooks"])
def test_formats_side_by_side(name: str) -> None:
    rules = MIXED.rules if name in ("eight_codebooks", "thirty_two_codebooks") else MIXED.rules[3:]
    if name == "tied":
        rules = (("*.embedding", "int8"), *rules[:-2])
    assert_is_its_twin(PrecisionPolicy(rules), lambda: build(name))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets(preset: str) -> None:
    assert_is_its_twin(PRESETS[preset], lambda: build("eight_codebooks"))
    assert_is_its_twin(PRESETS[preset], trained, frames=3)


def test_tied_embeddings_are_one_copy() -> None:
    policy = PrecisionPolicy((("*.embedding", "int8"),))
    model = accelerate(build("tied"), precision=policy, mode="eager", progress=False, guard=False)
    packed = model.acceleration._engine.packed
    assert packed.depth_embedding.data is packed.backbone_embedding.data
    table = model.depth_decoder.model.embed_tokens.weight
    heads = model.depth_decoder.codebooks_head.weight
    assert model.acceleration.report().copied_bytes == table.numel() + 4 * len(table) + heads.nbytes
    assert [row["sqnr_db"] for row in model.acceleration.report().zones if "embedding" in row["zone"]] == [
        pytest.approx(43, abs=4)
    ] * 2
    before = model.generate(**PROMPT, **GREEDY, max_new_tokens=6)
    table.data.neg_()
    after = model.generate(**PROMPT, **GREEDY, max_new_tokens=6)
    assert model.acceleration.metrics.counters["weights.repacked"] == 1
    assert not torch.equal(before, after)
    fresh = build("tied")
    fresh.depth_decoder.model.embed_tokens.weight.data.neg_()
    fresh = accelerate(fresh, precision=policy, mode="eager", progress=False, guard=False)
    assert torch.equal(fresh.generate(**PROMPT, **GREEDY, max_new_tokens=6), after)


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_a_narrower_cache(monkeypatch: Any, fmt: str) -> None:
    """Close to stock, further off than fp32, half the bytes; the caller's cache stays in the model's dtype."""
    policy = PrecisionPolicy((("kv", fmt),))
    model, plain = (
        accelerate(build(std=0.1), precision=p, mode="eager", progress=False, guard=False) for p in (policy, "exact")
    )
    plain.generate(**PROMPT, **GREEDY, max_new_tokens=1)
    tokens, hidden, depth = recorded(model, PROMPT, 8, monkeypatch)
    true_hidden, _, true_depth = teacher_forced(build(std=0.1), PROMPT, tokens)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[fmt]
    eager_hidden, _, eager_depth = teacher_forced(build(std=0.1, dtype=kind), PROMPT, tokens)
    assert_close(hidden.to(kind), true_hidden, eager_hidden, name="hidden state", terms=4)
    assert_close(depth.to(kind), true_depth, eager_depth, name="depth logits", terms=4)
    assert not torch.allclose(hidden[:, -1], true_hidden[:, -1], atol=1e-5)
    ours, theirs = model.acceleration.report(), plain.acceleration.report()
    assert 2 * ours.kv_bytes == theirs.kv_bytes
    assert ours.zones[-2]["format"] == fmt
    out = model.generate(**PROMPT, **GREEDY, max_new_tokens=3, return_dict_in_generate=True)
    assert out.past_key_values.layers[0].keys.dtype == torch.float32
    assert "unknown" not in str(ours) and any(
        line.startswith("kv") and line.endswith("-") for line in str(ours).split("\n")
    )


def test_a_wider_cache() -> None:
    policy = PrecisionPolicy((("kv", "fp32"),))
    model = accelerate(build(dtype=torch.bfloat16), precision=policy, mode="eager", progress=False, guard=False)
    assert model.acceleration._engine.runner(1).state.keys[0].dtype == torch.float32
    out = model.generate(**PROMPT, **GREEDY, max_new_tokens=3, return_dict_in_generate=True)
    assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("fmt", ["fp32", "fp8", "int4:32", "fp16"])
def test_a_bf16_model_by_the_tolerance_rule(monkeypatch: Any, fmt: str) -> None:
    """Truth: what is stored, in fp32. Eager: the stock modules in bf16 on the same weights."""
    policy = PrecisionPolicy((("*.mlp", fmt), ("*.attention", fmt), ("depth.head.2", fmt)))
    source = build(std=0.1, dtype=torch.bfloat16)
    model = accelerate(
        build(std=0.1, dtype=torch.bfloat16), precision=policy, mode="eager", progress=False, guard=False
    )
    # Prompts run through the originals, so the truth is teacher-forced with them where they differ: drop them instead.
    if fmt in ("fp8", "int4:32"):
        model.acceleration.drop_originals()
    twin = lowered_twin(policy, of=source)
    eager = lowered_twin(policy, of=build(std=0.1, dtype=torch.bfloat16)).to(torch.bfloat16)
    assert_within_tolerance(model, twin, eager, monkeypatch)


# ------------------------------------------------------------------------------------------------ copies


def test_originals_of_every_quantised_format_can_be_dropped() -> None:
    rules = (("depth.head.3", "int4:32"), ("depth.head", "fp8"), ("*.mlp", "int4"), ("*.embedding", "int8"))
    policy = PrecisionPolicy((*rules, ("*.attention", "bf16")))
    model = build("eight_codebooks")
    accelerate(model, precision=policy, mode="eager", progress=False, guard=False, drop_originals=True)
    depth = model.depth_decoder
    assert depth.codebooks_head.weight.is_meta and depth.model.embed_tokens.weight.is_meta
    assert model.backbone_model.embed_tokens.embed_audio_tokens.weight.is_meta
    assert not depth.model.layers[0].self_attn.q_proj.weight.is_meta, "a cast keeps its original"
    got = model.generate(**PROMPT, **GREEDY, max_new_tokens=5)
    twin = lowered_twin(policy, of=build("eight_codebooks"))
    with torch.no_grad():  # casts keep their originals, and the prompt runs through them
        for ours, theirs in ((model.backbone_model, twin.backbone_model), (depth.model, twin.depth_decoder.model)):
            for mine, other in zip(ours.layers, theirs.layers):
                other.self_attn.load_state_dict(mine.self_attn.state_dict())
    assert torch.equal(
        stock(model, **PROMPT, **GREEDY, max_new_tokens=5), stock(twin, **PROMPT, **GREEDY, max_new_tokens=5)
    )
    assert torch.equal(got, greedy_after_prefill(twin, lowered_twin(policy, of=build("eight_codebooks")), PROMPT, 5))


def test_heads_keep_their_originals_while_one_is_not_quantised() -> None:
    policy = PrecisionPolicy((("depth.head.1", "keep"), ("depth.head", "int8"), ("depth.mlp", "int8")))
    model = accelerate(build(), precision=policy, mode="eager", progress=False, guard=False, drop_originals=True)
    assert model.acceleration.originals_dropped
    assert not model.depth_decoder.codebooks_head.weight.is_meta
    before = model.generate(**PROMPT, **GREEDY, max_new_tokens=5)
    model.depth_decoder.codebooks_head.weight.data.neg_()
    assert not torch.equal(model.generate(**PROMPT, **GREEDY, max_new_tokens=5), before), "they are still watched"


@pytest.fixture
def packing() -> tuple[Any, PackedWeights]:
    model, weights = build("eight_codebooks"), PackedWeights(MIXED)
    weights.refresh(live_weights(model))
    return model, weights


def test_every_changed_matrix_is_packed_again(packing: tuple[Any, PackedWeights]) -> None:
    model, weights = packing
    assert weights.refresh(live_weights(model))[1] == []
    layer = model.backbone_model.layers[1]
    for weight, names in (
        (layer.mlp.up_proj.weight, ["backbone.1.up"]),
        (layer.self_attn.v_proj.weight, ["backbone.1.v"]),
        (model.depth_decoder.model.embed_tokens.weight, ["depth.embedding"]),
        (
            model.depth_decoder.codebooks_head.weight,
            ["depth.head.1-2", "depth.head.3", "depth.head.4,6-7", "depth.head.5"],
        ),
        (model.lm_head.weight, []),
    ):
        weight.data.flatten()[-1].add_(1.0)
        packed, stale = weights.refresh(live_weights(model))
        assert stale == names
        fresh, _ = PackedWeights(MIXED).refresh(live_weights(model))
        assert str(packed) == str(fresh)


def test_corrupted_copies_are_named(packing: tuple[Any, PackedWeights]) -> None:
    model, weights = packing
    packed, _ = weights.refresh(live_weights(model))
    assert weights.corrupted() == []
    layer = packed.backbone.layers[1]
    changed: list[tuple[str, torch.Tensor]] = [
        ("backbone.1.up", layer.up.weight.data),
        ("backbone.1.down", layer.down.weight.scale),
        ("backbone.1.q", layer.q.weight),
        ("depth.embedding", packed.depth_embedding.data),
        ("depth.head.1-2", packed.depth_heads.banks[0]),
        ("depth.head.4,6-7", packed.depth_heads.banks[2].data),
    ]
    for name, tensor in changed:
        raw = tensor.view(torch.uint8).flatten()
        kept = int(raw[-1])
        raw[-1] = kept ^ 64
        assert weights.corrupted() == [name]
        raw[-1] = kept
    assert weights.corrupted() == []


def test_another_policy_shares_the_copies_it_has_in_common(packing: tuple[Any, PackedWeights]) -> None:
    model, weights = packing
    others = (rule for rule in MIXED.rules if rule[0] != "depth.head.3")
    safer = PrecisionPolicy((("depth.head.3", "fp8"), ("backbone.mlp", "int8"), *others))
    other = weights.with_policy(safer)
    old, new = weights.refresh(live_weights(model))[0], other.refresh(live_weights(model))[0]
    assert new.depth.layers[0].gate.weight.data is old.depth.layers[0].gate.weight.data
    assert new.depth_heads.banks[0] is old.depth_heads.banks[0]
    assert new.backbone_embedding.data is old.backbone_embedding.data
    assert isinstance(new.backbone.layers[0].up.weight, QuantWeight)
    assert new.backbone.layers[0].up.weight.data.dtype == torch.int8
    assert str(new) == str(PackedWeights(safer).refresh(live_weights(model))[0])
    assert str(old) == str(PackedWeights(MIXED).refresh(live_weights(model))[0])
    before = old.depth.layers[0].gate.weight.data.clone()
    model.depth_decoder.model.layers[0].mlp.gate_proj.weight.data.neg_()
    assert "depth.0.gate" in other.refresh(live_weights(model))[1]
    assert torch.equal(old.depth.layers[0].gate.weight.data, before), "what one makes again is its own"
    assert "depth.0.gate" in weights.refresh(live_weights(model))[1]


def test_dropped_originals_cannot_take_another_format() -> None:
    policy = PrecisionPolicy((("depth.mlp", "int8"),))
    model = accelerate(build(), precision=policy, mode="eager", progress=False, guard=False, drop_originals=True)
    weights = model.acceleration._weights
    same, _ = weights.with_policy(PrecisionPolicy((*policy.rules, ("kv", "bf16")))).refresh(live_weights(model))
    assert same.depth.layers[0].up.weight.data is weights.refresh(live_weights(model))[0].depth.layers[0].up.weight.data
    with pytest.raises(ValueError, match=r"original of depth\.0\.gate was dropped, so it cannot be stored as keep"):
        weights.with_policy(PrecisionPolicy()).refresh(live_weights(model))


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "int8", "fp8", "int4"])
def test_values_a_format_cannot_hold(fmt: str) -> None:
    model = build()
    value = {"fp16": 1e30, "bf16": 3.4e38}.get(fmt, float("inf"))
    model.depth_decoder.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ValueError, match=rf"precision: depth\.1\.up .*{fmt}"):
        accelerate(model, precision=PrecisionPolicy((("depth.mlp", fmt),)), mode="eager", progress=False, guard=False)
    assert "acceleration" not in model.__dict__


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["mixed", "fp8"])
def test_compiled_steps_of_several_banks(fmt: str) -> None:
    policy = MIXED if fmt == "mixed" else uniform("fp8")
    model = accelerate(build("eight_codebooks"), precision=policy, mode="compile", progress=False)
    assert model.acceleration.mode == "compile", model.acceleration.notes
    runner = model.acceleration._engine.runner(1)
    assert len(runner.depth) == (4 if fmt == "mixed" else 1)
    prompt = text_prompt((7,))
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=10)
    twin = lowered_twin(policy, of=build("eight_codebooks"))
    assert torch.equal(got, greedy_after_prefill(build("eight_codebooks"), twin, prompt, 10))
