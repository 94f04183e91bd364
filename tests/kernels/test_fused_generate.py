"""``accelerate(model, mode="kernels")``: whole utterances on the fused kernels against the stock model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from csm_models import (
    build,
    copy_first_codebook,
    int8_twin,
    lowered_twin,
    on_fast_path,
    stock,
    text_prompt,
)

from csm_kernels.depth import depth_logits, kernel
from csm_kernels.testing import sqnr_db
from csm_runtime import PrecisionPolicy, accelerate
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.metrics import Metrics
from csm_runtime.precision import PRESETS
from kernels.depth_models import few_programs

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


@pytest.fixture(autouse=True)
def tall_tiles() -> Iterator[None]:
    with few_programs(64):
        yield


def fused(model: Any, **options: Any) -> Any:
    """The model on fused kernels, nothing else; unless the options say so frames are not verified, which takes a minute."""
    options.setdefault("guard", False)
    model = accelerate(model, mode="kernels", batch_sizes=(1,), max_positions=48, progress=False, **options)
    assert model.acceleration.mode == "kernels"
    assert not model.acceleration.notes
    return model


@pytest.mark.parametrize(
    ("name", "rows"),
    [("base", 3), ("biases", 1), ("depth_vocabulary", 1), ("two_codebooks", 3), ("llama3", 1), ("norms", 1)],
)
def test_greedy_tokens_are_the_stock_models(name: str, rows: int, device: torch.device) -> None:
    model = fused(build(name).to(device))
    prompt = {key: value.to(device) for key, value in text_prompt((7, 12, 3)[:rows]).items()}
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=4)
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=4)
    assert torch.equal(got, wanted)


def test_both_drivers_and_the_bits_they_make(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The persistent driver in the engine: what the tile table may choose."""
    prompt = {key: value.to(device) for key, value in text_prompt((5,)).items()}
    launches = fused(build("base").to(device)).generate(**prompt, seed=3, max_new_tokens=4)
    stock_plan = kernel.plan

    def persistent(*args: Any, **options: Any) -> Any:
        return stock_plan(*args, **{**options, "persistent": True, "programs": 1})

    monkeypatch.setattr("csm_runtime.fused.plan", persistent)
    model = fused(build("base").to(device))
    assert torch.equal(model.generate(**prompt, seed=3, max_new_tokens=4), launches)


def test_rows_end_on_their_own_and_are_padded(device: torch.device) -> None:
    """End of speech is judged on the device, row by row."""
    model = copy_first_codebook(build("base", seed=1))
    model.config.codebook_eos_token_id = 13
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 5, 6  # switches padding on
    model = fused(model.to(device))
    prompt = {key: value.to(device) for key, value in text_prompt((5, 9, 3)).items()}
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=10)
    assert wanted.shape[1] == 8, "the rows end in frames 1, 7 and 5"
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=10)
    assert torch.equal(got, wanted)
    assert bool((got[0, 2:] == model.config.codebook_pad_token_id).all())


def test_sampling_repeats_and_depends_on_the_seed(device: torch.device) -> None:
    model = fused(build("base").to(device))
    prompt = {key: value.to(device) for key, value in text_prompt((4, 9)).items()}
    options = dict(do_sample=True, depth_decoder_do_sample=True, max_new_tokens=3)
    one, same, other = (model.generate(**prompt, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    swapped = {key: value.flip(0) for key, value in prompt.items()}
    turned = model.generate(**swapped, seed=1, utterance_ids=[1, 0], **options)
    assert torch.equal(turned.flip(0), one), "a row's speech depends on neither slot nor neighbours"


@pytest.mark.parametrize("precision", ["stock", "int8"])
def test_lower_precision_is_near_the_truth(precision: str, device: torch.device) -> None:
    """bf16 and int8: every frame's logits, teacher-forced, from the packed weights of the engine."""
    model = build("base").to(torch.bfloat16).to(device)
    twin = int8_twin("base").to(device) if precision == "int8" else build("base").to(device)
    model = fused(model, precision=precision)
    prompt = {key: value.to(device) for key, value in text_prompt((7,)).items()}
    with on_fast_path(model):
        frames = model.generate(**prompt, **GREEDY, max_new_tokens=3)
    assert frames.shape[1] == 3
    hidden = torch.randn(5, model.config.hidden_size, device=device)
    codes = torch.randint(model.config.vocab_size, (5, model.config.num_codebooks - 1), device=device)
    engine = model.acceleration._engine
    ours = depth_logits(hidden, codes, engine._fused.weights.depth)
    theirs = Passes(twin, False, Metrics()).codebook_logits(hidden, codes)
    assert sqnr_db(ours.detach(), theirs.detach()) > 20


def test_weights_changed_in_place_are_noticed(device: torch.device) -> None:
    """A merge into the backbone, one into the depth decoder and a changed embedding: all are packed again."""
    model = fused(build("base").to(device))
    prompt = {key: value.to(device) for key, value in text_prompt((6,)).items()}
    layers = model.depth_decoder.model.layers, model.backbone_model.layers
    changes = [
        layers[0][0].mlp.down_proj.weight,
        layers[1][0].self_attn.q_proj.weight,
        model.depth_decoder.model.embed_tokens.weight,
        layers[0][0].input_layernorm.weight,
    ]
    for weight in changes:
        before = model.generate(**prompt, **GREEDY, max_new_tokens=3)
        with torch.no_grad():
            weight.data += 0.7 * torch.randn_like(weight) * weight.std().clamp(min=0.1)
        wanted = stock(model, **prompt, **GREEDY, max_new_tokens=3)
        assert not torch.equal(before, wanted)
        assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=3), wanted)


def test_wrong_kernels_are_found_before_they_are_used(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Weights packed in another order than the kernels read them: the self-test sees it, frames run eagerly."""
    from csm_runtime import fused as runtime

    stock_pack = runtime.pack_depth

    def scrambled(*args: Any, **options: Any) -> Any:
        packed = stock_pack(*args, **options)
        return packed._replace(stack=packed.stack._replace(down=packed.stack.down.flip(1)))

    monkeypatch.setattr(runtime, "pack_depth", scrambled)
    model = accelerate(build("base").to(device), mode="kernels", max_positions=48, progress=False)
    assert model.acceleration.mode == "eager"
    (note,) = model.acceleration.notes
    assert "depth logits" in note


def test_a_barrier_that_times_out_goes_on_without_the_kernels(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The frame's codes mean nothing: it is dropped, and the utterance goes on without the fast path."""
    model = fused(build("base").to(device))
    prompt = {key: value.to(device) for key, value in text_prompt((6,)).items()}
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=5)
    from csm_runtime.fused import FusedFrame

    stock_emit, calls = FusedFrame.emit, []

    def emit(self: Any) -> None:
        stock_emit(self)
        calls.append(1)
        if len(calls) == 3:
            self._state.codes.fill_(0)
            self._state.faults.fill_(1)

    monkeypatch.setattr(FusedFrame, "emit", emit)
    got = model.generate(**prompt, **GREEDY, max_new_tokens=5)
    assert torch.equal(got, wanted)
    seen = model.acceleration.metrics.snapshot()
    assert seen["counters"]["generate.rung"] == 1 and not seen["stock_reasons"]
    assert model.acceleration.guard.rung == "eager"
    assert seen["faults"] == {"FrameFault: a grid barrier of the fused decode kernel timed out": 1}


def test_a_barrier_that_timed_out_concerns_no_later_call(device: torch.device) -> None:
    """A call's first frame runs no backbone: the error word an earlier call left there is not its own."""
    model = fused(build("base").to(device))
    prompt = {key: value.to(device) for key, value in text_prompt((6,)).items()}
    model.acceleration._engine.runner(1).frame._backbone.buffers.sync[1] = 1
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=2)
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=2)
    assert torch.equal(got, wanted)


def test_the_guard_finds_a_kernel_gone_wrong(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Its limits are those of sound kernels; where one is not, library ops take over for the suspect, with equal tokens."""
    from csm_runtime.fused import FusedFrame
    from csm_runtime.guard import GuardConfig

    model = fused(build("base").to(device), guard=GuardConfig(budget=1e9))
    guard = model.acceleration.guard
    least = guard.floors["fast"].least
    assert set(least) >= {"logits of codebook 0", "logits of codebooks 1 to 7", "keys", "values", "hidden state"}
    assert min(least.values()) > 30
    prompt = {key: value.to(device) for key, value in text_prompt((6,)).items()}
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=20)
    stock_decode = FusedFrame.decode_depth

    def decode(self: Any) -> None:
        stock_decode(self)
        if int(self._state.frame[0]) >= 2:
            self._depth_logits.mul_(0.97)

    monkeypatch.setattr(FusedFrame, "decode_depth", decode)
    got = model.generate(**prompt, **GREEDY, max_new_tokens=20)
    (event,) = guard.events
    assert (event.frame, event.suspect, event.next_rung) == (2, "depth", "plain depth")
    assert torch.equal(got, wanted)


def test_restore_and_report(device: torch.device) -> None:
    model = build("base").to(device)
    before = stock(model, **{k: v.to(device) for k, v in text_prompt((6,)).items()}, **GREEDY, max_new_tokens=3)
    model = fused(model)
    report = model.acceleration.report()
    weights = sum(p.nbytes for name, p in model.named_parameters() if "codec" not in name)
    assert 0.3 * weights < report.copied_bytes < 1.5 * weights, "both stacks are copied, and the embeddings projected"
    model.acceleration.restore()
    after = model.generate(**{k: v.to(device) for k, v in text_prompt((6,)).items()}, **GREEDY, max_new_tokens=3)
    assert torch.equal(before, after)


MIXES = {
    "smallest": PRESETS["smallest"],
    "balanced": PRESETS["balanced"],
    "fp8 and a table in int4": PrecisionPolicy((("depth.embedding", "int4:32"), ("*.mlp", "fp8"), ("depth.head", "fp8"))),
    "int4 of every width": PrecisionPolicy((
        ("backbone.embedding", "fp8"),
        ("*.attention", "int4:32"),
        ("depth.head", "int4:64"),
        ("depth.projection", "int4"),
        ("depth.mlp", "int8"),
    )),
    "casts": PrecisionPolicy((("depth.attention", "fp16"), ("backbone.mlp", "bf16"), ("kv", "bf16"))),
}  # fmt: skip


@pytest.mark.parametrize("mix", sorted(MIXES))
def test_formats_side_by_side_are_near_their_twin(mix: str, device: torch.device) -> None:
    """Every frame's logits, teacher-forced, from the packed weights of the engine; and the backbone's hidden state."""
    policy = MIXES[mix]
    model = fused(build("base").to(device), precision=policy, guard=False)
    twin = lowered_twin(policy, of=build("base")).to(device)
    prompt = {key: value.to(device) for key, value in text_prompt((7,)).items()}
    with on_fast_path(model):
        frames = model.generate(**prompt, **GREEDY, max_new_tokens=3)
    assert frames.shape[1] == 3
    hidden = torch.randn(5, model.config.hidden_size, device=device)
    codes = torch.randint(model.config.vocab_size, (5, model.config.num_codebooks - 1), device=device)
    engine = model.acceleration._engine
    ours = depth_logits(hidden, codes, engine._fused.weights.depth)
    theirs = Passes(twin, False, Metrics()).codebook_logits(hidden, codes)
    assert sqnr_db(ours.detach(), theirs.detach()) > 30
    made, state = frames[:, -1], engine.runner(1).state
    runner = engine.runner(1)
    state.rewind()
    state.allowed.zero_()
    state.codes.copy_(made)
    runner.frame.advance()
    x = twin.backbone_model.embed_tokens(made[:, None])
    wanted = twin.backbone_model(inputs_embeds=x).last_hidden_state[:, -1]
    assert sqnr_db(state.hidden, wanted.detach()) > 30


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("depth.head.1", "int8"),), "the depth decoder's heads are in 2 formats, and they read one"),
        ((("backbone.embedding", "int4"),), "zone 'backbone.embedding' is stored in int4"),
    ],
)
def test_formats_the_kernels_do_not_read(rules: Any, words: str) -> None:
    model = build("base")
    with pytest.raises(ValueError, match=words):
        accelerate(model, mode="kernels", max_positions=48, progress=False, precision=PrecisionPolicy(rules))
    assert "acceleration" not in model.__dict__
