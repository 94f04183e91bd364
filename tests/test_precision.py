"""Lower precision: bf16 by the tolerance rule, int8 on dequantised weights, and the quantiser by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from csm_models import CONFIGS, build, int8_twin, on_fast_path, stock, teacher_forced, text_prompt
from transformers.cache_utils import DynamicCache

from csm_kernels.gemv import gemv_library, gemv_ref, gemv_streamed
from csm_kernels.quant import QuantWeight, dequantize, quantize_int8
from csm_kernels.testing import assert_close, sqnr_db
from csm_runtime import PrecisionPolicy, accelerate
from csm_runtime.engine import Engine

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


def recorded(model: Any, prompt: dict[str, torch.Tensor], frames: int, monkeypatch: Any) -> tuple[torch.Tensor, ...]:
    """Tokens of a greedy call, and the engine's hidden states and depth logits behind them."""
    hidden: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    rows = prompt["input_ids"].shape[0]
    emit, position_of, pair_of = Engine.emit, Engine.depth_position, Engine.depth_pair

    def spy_emit(self: Engine, runner: Any) -> None:
        hidden.append(runner.state.hidden[:rows].clone())
        emit(self, runner)

    def spy_position(self: Engine, runner: Any, position: torch.Tensor, token: torch.Tensor) -> Any:
        out = position_of(self, runner, position, token)
        if int(position) > 0:
            logits.append(out[1][:rows].clone())
        return out

    def spy_pair(self: Engine, runner: Any, token: torch.Tensor) -> Any:
        out = pair_of(self, runner, token)
        logits.append(out[1][:rows].clone())
        return out

    model.generate(**prompt, **GREEDY, max_new_tokens=1)  # warm, so that no self-test is recorded
    with monkeypatch.context() as patch, on_fast_path(model):
        patch.setattr(Engine, "emit", spy_emit)
        patch.setattr(Engine, "depth_position", spy_position)
        patch.setattr(Engine, "depth_pair", spy_pair)
        tokens = model.generate(**prompt, **GREEDY, max_new_tokens=frames)
    depth = torch.stack(logits, dim=1).view(rows, frames, tokens.shape[2] - 1, -1)
    return tokens, torch.stack(hidden, dim=1), depth


def assert_within_tolerance(model: Any, truth: Any, eager: Any, monkeypatch: Any) -> None:
    """Teacher-forced on the engine's own tokens: at most twice the error of stock's modules in the same dtype."""
    prompt = text_prompt((6, 9, 3))
    tokens, hidden, depth = recorded(model, prompt, 6, monkeypatch)
    true_hidden, true_first, true_depth = teacher_forced(truth, prompt, tokens)
    eager_hidden, eager_first, eager_depth = teacher_forced(eager, prompt, tokens)
    assert_close(hidden, true_hidden, eager_hidden, name="hidden state", terms=4)
    assert_close(depth, true_depth, eager_depth, name="depth logits", terms=4)
    first = (hidden @ model.lm_head.weight.float().t()).detach()
    assert_close(first, true_first, eager_first, name="codebook 0 logits", terms=4)
    step = 4 * torch.finfo(model.dtype).eps  # eager frames round codebook 0's logits to the model's dtype
    for name, logits, drawn in (("first", first, tokens[..., 0]), ("depth", depth, tokens[..., 1:])):
        best, chosen = logits.amax(-1), logits.gather(-1, drawn[..., None])[..., 0]
        assert bool((best - chosen <= step * best.abs()).all()), f"{name}: a token is not the largest of its logits"


@pytest.mark.parametrize("name", ["base", "biases", "norms", "eight_codebooks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_the_tolerance_rule(monkeypatch: Any, name: str, dtype: torch.dtype) -> None:
    model = accelerate(build(name, std=0.1, dtype=dtype), mode="eager", progress=False)
    truth = build(name, std=0.1, dtype=dtype).float()
    assert_within_tolerance(model, truth, build(name, std=0.1, dtype=dtype), monkeypatch)


@pytest.mark.slow
def test_compiled_bf16_by_the_tolerance_rule(monkeypatch: Any) -> None:
    model = accelerate(build(std=0.1, dtype=torch.bfloat16), mode="compile", batch_sizes=(4,), progress=False)
    assert model.acceleration.mode == "compile"
    truth = build(std=0.1, dtype=torch.bfloat16).float()
    assert_within_tolerance(model, truth, build(std=0.1, dtype=torch.bfloat16), monkeypatch)


def test_the_rule_finds_a_bug(monkeypatch: Any) -> None:
    """A norm weight off by a fifth is outside the tolerance, so a pass above says something."""
    model = build(std=0.1, dtype=torch.bfloat16)
    model.depth_decoder.model.layers[0].post_attention_layernorm.weight.data.mul_(1.2)
    accelerate(model, mode="eager", progress=False)
    truth = build(std=0.1, dtype=torch.bfloat16).float()
    with pytest.raises(AssertionError, match="depth logits"):
        assert_within_tolerance(model, truth, build(std=0.1, dtype=torch.bfloat16), monkeypatch)


# ------------------------------------------------------------------------------------------------ int8


def greedy_after_prefill(prefill: Any, decode: Any, prompt: dict[str, torch.Tensor], frames: int) -> torch.Tensor:
    """Stock modules frame by frame: the prompt through one model, every frame through another.

    This is what int8 promises as long as the originals are there: prefill in the stock weights, frames in int8.
    """
    made: list[torch.Tensor] = []
    with torch.no_grad():
        mask = prompt["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        x = prefill._merge_input_ids_with_input_values(prompt["input_ids"])["inputs_embeds"]
        cache = DynamicCache(config=prefill.config)
        model = prefill
        for _ in range(frames):
            hidden = model.backbone_model(
                inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            model = decode
            codes = decode.lm_head(hidden).argmax(-1)[:, None]
            for _ in range(decode.config.num_codebooks - 1):
                fed = torch.nn.functional.pad(codes, (1, 0))
                logits = decode.depth_decoder(input_ids=fed, backbone_last_hidden_state=hidden).logits[:, -1]
                codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
            made.append(codes)
            x = decode.backbone_model.embed_tokens(codes[:, None])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
    return torch.stack(made, dim=1)


def test_the_reference_loop_is_stocks() -> None:
    model, prompt = build(), text_prompt((5, 9, 3))
    assert torch.equal(
        greedy_after_prefill(model, model, prompt, 6), stock(model, **prompt, **GREEDY, max_new_tokens=6)
    )


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "thirty_two_codebooks"])
def test_int8_equals_stock_on_dequantised_weights(name: str) -> None:
    prompt, twin = text_prompt((5, 9, 3)), int8_twin(name)
    model = accelerate(build(name), precision="int8", mode="eager", progress=False)
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=6)
    assert torch.equal(got, greedy_after_prefill(build(name), twin, prompt, 6))
    dropped = accelerate(build(name), precision="int8", drop_originals=True, mode="eager", progress=False)
    with on_fast_path(dropped):
        got = dropped.generate(**prompt, **GREEDY, max_new_tokens=6)
    assert torch.equal(got, stock(twin, **prompt, **GREEDY, max_new_tokens=6))


def test_int8_is_not_the_stock_precision() -> None:
    model, prompt = accelerate(build(), precision="int8", mode="eager", progress=False), text_prompt((5, 9, 3))
    got = model.generate(**prompt, **GREEDY, max_new_tokens=12)
    assert not torch.equal(got, stock(model, **prompt, **GREEDY, max_new_tokens=12))


@pytest.mark.slow
def test_compiled_int8_equals_stock_on_dequantised_weights() -> None:
    model = accelerate(build(), precision="int8", mode="compile", progress=False)
    assert model.acceleration.mode == "compile"
    prompt = text_prompt((7,))
    with on_fast_path(model):
        got = model.generate(**prompt, **GREEDY, max_new_tokens=15)
    assert torch.equal(got, greedy_after_prefill(build(), int8_twin(), prompt, 15))


def test_int8_of_a_bf16_model_by_the_tolerance_rule(monkeypatch: Any) -> None:
    """Truth: the dequantised weights in fp32. Eager: the stock modules in bf16 on the same weights."""
    model = accelerate(
        build(std=0.1, dtype=torch.bfloat16), precision="int8", drop_originals=True, mode="eager", progress=False
    )
    truth = int8_twin(std=0.1, dtype=torch.bfloat16)
    assert truth.dtype == torch.float32
    eager = int8_twin(std=0.1, dtype=torch.bfloat16).to(torch.bfloat16)
    assert_within_tolerance(model, truth, eager, monkeypatch)


@pytest.mark.parametrize("zone", ["depth.mlp", "depth.attention", "depth.head", "depth.projection", "backbone.mlp"])
def test_one_zone_in_int8(zone: str) -> None:
    """Each zone lowers its own matrices and no others."""
    policy = PrecisionPolicy(((zone, "int8"),))
    model = accelerate(build(), precision=policy, mode="eager", progress=False)
    prompt = text_prompt((5, 9, 3))
    got = model.generate(**prompt, **GREEDY, max_new_tokens=6)
    assert torch.equal(got, greedy_after_prefill(build(), int8_twin(zones=(zone,)), prompt, 6))
    formats = {row["zone"]: row["format"] for row in model.acceleration.report().zones}
    assert formats[zone] == "int8"
    assert sum(fmt == "int8" for fmt in formats.values()) == 1


# ------------------------------------------------------------------------------------------------ the quantiser


@pytest.mark.parametrize("shape", [(64, 1024), (2051, 63), (3, 257), (5, 1), (1, 999), (2, 7, 127)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantiser_keeps_the_signal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    packed = quantize_int8(weight)
    assert packed.data.dtype == torch.int8
    assert packed.data.shape == weight.shape
    assert packed.scale.dtype == torch.float32
    assert packed.scale.shape == weight.shape[:-1]
    widened = dequantize(packed)
    assert sqnr_db(widened, weight.float()) > 38.0
    error = (widened - weight.float()).abs()
    assert bool((error <= 0.501 * packed.scale[..., None]).all()), "further than half a step"


def test_the_largest_of_a_row_is_exact_and_signs_are_symmetric() -> None:
    weight = torch.randn(20, 33, generator=torch.Generator().manual_seed(1))
    packed, negated = quantize_int8(weight), quantize_int8(-weight)
    assert bool((packed.data.abs().amax(-1) == 127).all())
    assert torch.equal(packed.data, -negated.data)
    torch.testing.assert_close(dequantize(packed).abs().amax(-1), weight.abs().amax(-1))


def test_rows_have_scales_of_their_own() -> None:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1e-4], [1e4]])
    assert sqnr_db(dequantize(quantize_int8(weight))[0], weight[0]) > 38.0


def test_zero_rows_stay_zero() -> None:
    weight = torch.randn(4, 9)
    weight[2] = 0.0
    packed = quantize_int8(weight)
    assert float(packed.scale[2]) == 1.0
    assert bool((dequantize(packed)[2] == 0).all())
    assert torch.isfinite(dequantize(packed)).all()


def test_tiny_rows_do_not_overflow() -> None:
    for size in (1e-38, 1e-44):
        assert torch.isfinite(dequantize(quantize_int8(torch.full((1, 8), size)))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_no_scale_stands_for_is_refused(bad: float) -> None:
    weight = torch.randn(4, 9)
    weight[3, 8] = bad
    with pytest.raises(ValueError, match="weight"):
        quantize_int8(weight)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        quantize_int8(torch.ones(2, 2, dtype=torch.long))


# ------------------------------------------------------------------------------------------------ the products


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17])
@pytest.mark.parametrize(("height", "width"), [(2051, 64), (63, 127), (1, 257), (999, 1), (64, 1024), (4, 2048)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_by_the_tolerance_rule(rows: int, height: int, width: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(rows * height + width)
    x = torch.randn(rows, width, generator=generator)
    weight: Any = torch.randn(height, width, generator=generator)
    bias = torch.randn(height, generator=generator)
    weight = quantize_int8(weight) if kind == "int8" else weight.to(getattr(torch, kind))
    wide = dequantize(weight).double()
    for b in (None, bias):
        truth = x.double() @ wide.t() + (0 if b is None else b.double())
        eager = torch.nn.functional.linear(x, wide.float(), b)
        for op in (gemv_streamed, gemv_ref):
            assert_close(op(x, weight, b), truth, eager, name=op.__name__, terms=width)
        in_dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        eager = torch.nn.functional.linear(x.to(in_dtype), wide.to(in_dtype)).float()
        library = gemv_library(x, weight, None)
        assert library.dtype == torch.float32
        assert_close(library.to(in_dtype), x.double() @ wide.t(), eager.to(in_dtype), name="gemv_library", terms=width)


@pytest.mark.parametrize("op", [gemv_streamed, gemv_library, gemv_ref])
def test_infinities_and_nan_stay_in_their_row(op: Any) -> None:
    x = torch.randn(3, 16)
    x[1, 4] = float("nan")
    out = op(x, torch.randn(8, 16))
    assert torch.isfinite(out[[0, 2]]).all()
    assert torch.isnan(out[1]).all()
    packed = QuantWeight(torch.ones(2, 16, dtype=torch.int8), torch.tensor([1.0, float("inf")]))
    assert torch.isfinite(op(torch.ones(1, 16), packed)[0, 0])
