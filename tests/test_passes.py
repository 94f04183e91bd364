"""Parallel passes through compiled stock layers: what they compute, that they compile once, and what replaces them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from csm_models import build, on_fast_path, stock, teacher_forced, text_prompt
from test_no_recompile import no_new_graphs

from csm_kernels.testing import assert_close
from csm_runtime import accelerate, compiling
from csm_runtime.adapters import hf, hf_passes
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.metrics import Metrics

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


@pytest.fixture(scope="module")
def base() -> Any:
    """A model and its compiled passes, ready for one row and for several."""
    model = build("biases")
    passes = Passes(model, True, Metrics())
    with torch.no_grad():
        for rows in (1, 4):
            passes.warm_up(rows)
    return model, passes


def padded(lengths: list[int]) -> torch.Tensor:
    return torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [512, 5])
def test_a_prompt_is_what_the_stock_backbone_makes_of_it(
    base: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any batch, length, padding, position and number of chunks, and nothing compiles for it."""
    model, passes = base
    monkeypatch.setattr(hf_passes, "CHUNK", chunk)
    width = model.config.hidden_size
    with torch.no_grad(), no_new_graphs():
        for lengths in ([1], [2], [23], [6], [7, 7], [3, 23, 11], [1, 2], [9] * 16):
            tokens = max(lengths)
            x = torch.randn(len(lengths), tokens, width)
            for mask in (None, padded(lengths)):
                positions = torch.arange(tokens)[None] + (0 if mask is None else torch.arange(len(lengths))[:, None])
                got = passes.prefill(x, mask, positions)
                wanted = hf_passes._stock_prefill(model, x, mask, positions)
                assert torch.allclose(got.hidden, wanted.hidden, atol=1e-5), lengths
                seen = (torch.ones(len(lengths), tokens) if mask is None else mask).bool()[:, None, :, None]
                for ours, theirs in zip(got.layers, wanted.layers):
                    for a, b in zip(ours, theirs):
                        assert a.shape == b.shape
                        assert torch.allclose(a * seen, b * seen, atol=1e-5), lengths
    assert passes.compiled


@pytest.mark.slow
def test_bfloat16() -> None:
    """By the one tolerance rule, against the same weights in fp64."""
    model = build(dtype=torch.bfloat16)
    passes = Passes(model, True, Metrics())
    x, positions = torch.randn(2, 9, model.config.hidden_size).bfloat16(), torch.arange(9)[None]
    with torch.no_grad():
        got = passes.prefill(x, None, positions)
        eager = hf_passes._stock_prefill(model, x, None, positions)
        truth = hf_passes._stock_prefill(build().bfloat16().double(), x.double(), None, positions)
    assert passes.compiled and got.layers[0][0].dtype == torch.bfloat16
    assert_close(got.hidden, truth.hidden, eager.hidden, name="hidden", terms=4)
    for ours, theirs, exact in zip(got.layers, eager.layers, truth.layers):
        assert_close(ours[0], exact[0], theirs[0], name="keys", terms=4)
        assert_close(ours[1], exact[1], theirs[1], name="values", terms=4)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["base", "depth_vocabulary", "two_codebooks"])
def test_codebook_logits_are_those_of_the_stock_depth_decoder(name: str, compiled: bool) -> None:
    model = build(name)
    passes = Passes(model, compiled, Metrics())
    prompt, count = text_prompt((6,)), model.config.num_codebooks
    frames = torch.randint(model.config.depth_decoder_config.vocab_size, (1, 3, count))
    with torch.no_grad():
        hidden, _, wanted = teacher_forced(model, prompt, frames)
        got = passes.codebook_logits(hidden.flatten(0, 1), frames.flatten(0, 1)[:, :-1])
        part = passes.codebook_logits(hidden.flatten(0, 1), frames.flatten(0, 1)[:, :1])
    assert passes.compiled is compiled
    assert torch.allclose(got, wanted.flatten(0, 1), atol=1e-5)
    assert torch.allclose(part, wanted.flatten(0, 1)[:, :1], atol=1e-5)


@pytest.mark.slow
def test_the_report_says_what_prompts_run_through(compiled: Any) -> None:
    report = compiled("llama3").acceleration.report()
    assert report.compiled_prefill
    # One layer each of the two stacks stands for all.
    assert report.replaced == {"rms_norm": 4, "rope": 4, "swiglu": 2}
    assert "backend csm, which replaced 4 rms_norm, 4 rope, 2 swiglu" in str(report)
    assert "prefill" not in str(report).splitlines()[-1]


def test_eager_mode_leaves_prompts_to_the_stock_layers(shared: Any) -> None:
    report = shared().acceleration.report()
    assert not report.compiled_prefill and not report.replaced
    assert "left alone: prefill" in str(report)


@pytest.mark.slow
def test_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts go through the stock layers, frames stay fast, and the fault is said once and counted."""

    def broken(function: Any, replaced: Any) -> Any:
        def raises(*args: Any) -> Any:
            raise RuntimeError("injected")

        return raises

    monkeypatch.setattr(compiling, "compile_pass", broken)
    model = accelerate(build(), mode="compile", batch_sizes=(1,), progress=False)
    assert model.acceleration.mode == "compile"
    assert not model.acceleration.report().compiled_prefill
    assert sum("injected" in what for what in model.acceleration.metrics.faults) == 1
    assert sum("prompts go through the stock layers" in r.getMessage() for r in caplog.records) == 1
    prompt = text_prompt((7,))
    wanted = stock(model, **prompt, **GREEDY, max_new_tokens=4)
    with on_fast_path(model):
        assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=4), wanted)


@pytest.mark.slow
def test_a_backend_that_makes_wrong_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, replaced: Any) -> Any:
        return lambda *args: function(*args) * 1.01

    monkeypatch.setattr(compiling, "compile_pass", wrong)
    metrics = Metrics()
    passes = Passes(build(), True, metrics)
    with torch.no_grad():
        passes.warm_up(2)
    assert not passes.compiled
    assert any("differs from the stock one by 1.0e-02" in what for what in metrics.faults)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["attention", "training"])
def test_what_compiled_layers_are_not_for(how: str, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attention implementation, and modules in training mode: stock layers, the same tokens."""
    model = compiled("untied")
    before = model.config._attn_implementation
    try:
        if how == "attention":
            model.set_attn_implementation("eager")
        else:
            model.train()
        calls: list[Any] = []
        original = hf_passes._stock_prefill
        monkeypatch.setattr(hf_passes, "_stock_prefill", lambda *args: (calls.append(args), original(*args))[1])
        prompt = text_prompt((7,))
        wanted = stock(model, **prompt, **GREEDY, max_new_tokens=4)
        with on_fast_path(model):
            assert torch.equal(model.generate(**prompt, **GREEDY, max_new_tokens=4), wanted)
        assert len(calls) == 1
    finally:
        model.set_attn_implementation(before)
        model.eval()


@pytest.mark.parametrize("part", ["depth_heads", "depth_embedding", "depth_norm"])
def test_weights_read_in_the_wrong_order_fail_the_self_test(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an adapter of another version of the stock code might do."""
    read = hf.live_weights

    def shuffled(model: Any) -> Any:
        weights = read(model)
        return weights._replace(**{part: getattr(weights, part).roll(1, 0)})

    model = build("norms")
    monkeypatch.setattr(hf, "live_weights", shuffled)
    with pytest.raises(RuntimeError, match="depth logits differ from the stock model's"):
        accelerate(model, mode="eager", progress=False)
    assert "generate" not in model.__dict__
