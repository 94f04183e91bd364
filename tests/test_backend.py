"""The torch.compile backend "csm" on stock graphs: what it replaces, and that the numbers stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from csm_models import build
from torch import Tensor, fx, nn
from torch.nn import functional

from csm_kernels.testing import assert_close
from csm_runtime import backend

pytestmark = pytest.mark.slow

LAYERS = 2


class Watched:
    """The backend without Inductor, which the rules do not need: rewritten graphs run as they are."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, graph: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.counts.update(backend.rewrite(graph))
        graph.graph.lint()
        return graph


def run(function: Callable[..., Any], *args: Any, grad: bool = False, **kwargs: Any) -> tuple[Any, dict[str, int]]:
    torch._dynamo.reset()
    watched = Watched()
    with torch.set_grad_enabled(grad):
        out = torch.compile(function, backend=watched, dynamic=False)(*args, **kwargs)
    return out, dict(watched.counts)


@pytest.mark.parametrize("name", ["base", "llama3", "biases", "norms"])
def test_a_stock_prefill(name: str) -> None:
    model = build(name).backbone_model
    x = torch.randn(2, 11, model.config.hidden_size)
    with torch.no_grad():
        wanted = model(inputs_embeds=x, use_cache=False).last_hidden_state
    got, counts = run(model.forward, inputs_embeds=x, use_cache=False)
    layers = model.config.num_hidden_layers
    # 22 rows are too many for a matrix-vector product.
    assert counts == {"rms_norm": 2 * layers + 1, "rope": 2 * layers, "swiglu": layers}
    assert torch.allclose(got.last_hidden_state, wanted, atol=1e-5)


def test_a_stock_decode_step() -> None:
    from transformers.cache_utils import DynamicCache

    model = build().backbone_model
    x, caches = torch.randn(2, 6, model.config.hidden_size), []
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(inputs_embeds=x[:, :5], past_key_values=cache, use_cache=True)
        caches.append(cache)
    with torch.no_grad():
        wanted = model(inputs_embeds=x[:, 5:], past_key_values=caches[0], use_cache=True).last_hidden_state
    got, counts = run(model.forward, inputs_embeds=x[:, 5:], past_key_values=caches[1], use_cache=True)
    assert counts == {
        "rms_norm": 2 * LAYERS + 1,
        "rope": 2 * LAYERS,
        "swiglu": LAYERS,
        "attention": LAYERS,
        "gemv": 7 * LAYERS,
    }
    assert torch.allclose(got.last_hidden_state, wanted, atol=1e-5)


def test_a_padded_stock_decode_step() -> None:
    """Left padding and a static cache: the step has a mask, and unused slots behind it."""
    from transformers.cache_utils import StaticCache

    model = build().backbone_model
    x, caches = torch.randn(2, 6, model.config.hidden_size), []
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(2):
        cache = StaticCache(config=model.config, max_cache_len=9)
        with torch.no_grad():
            model(
                inputs_embeds=x[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], past_key_values=cache
            )
        caches.append(cache)
    step = {"inputs_embeds": x[:, 5:], "attention_mask": mask, "position_ids": positions[:, 5:]}
    with torch.no_grad():
        wanted = model(**step, past_key_values=caches[0]).last_hidden_state
    got, counts = run(model.forward, **step, past_key_values=caches[1])
    assert counts["attention"] == LAYERS
    assert torch.allclose(got.last_hidden_state, wanted, atol=1e-5)


def test_double_precision_stays_double() -> None:
    model = build().double().backbone_model
    x = torch.randn(1, 3, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(inputs_embeds=x, use_cache=False).last_hidden_state
    got, counts = run(model.forward, inputs_embeds=x, use_cache=False)
    # Stock norms compute in fp32 whatever the model's dtype is, and so may ours.
    assert set(counts) <= {"rms_norm"}
    assert torch.allclose(got.last_hidden_state, wanted, atol=1e-14)


def test_bfloat16_is_nearer_the_truth_than_stock() -> None:
    """By the one tolerance rule, against the same model in fp64."""
    model = build(dtype=torch.bfloat16).backbone_model
    x = torch.randn(1, 9, model.config.hidden_size).bfloat16()
    with torch.no_grad():
        eager = model(inputs_embeds=x, use_cache=False).last_hidden_state
        truth = build().bfloat16().double().backbone_model(inputs_embeds=x.double(), use_cache=False).last_hidden_state
    got, _ = run(model.forward, inputs_embeds=x, use_cache=False)
    assert got.last_hidden_state.dtype == torch.bfloat16
    assert_close(got.last_hidden_state, truth, eager, name="backbone", terms=4)


def test_a_training_forward_keeps_its_gradients() -> None:
    model = build().train().backbone_model
    x = torch.randn(1, 7, model.config.hidden_size)

    def losses(forward: Callable[..., Any]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = forward(inputs_embeds=x, use_cache=False).last_hidden_state.square().mean()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.layers.parameters()]

    wanted, grads = losses(model.forward)
    torch._dynamo.reset()
    watched = Watched()
    got, ours = losses(torch.compile(model.forward, backend=watched, dynamic=False))
    # Few rows, but nothing that has no backward.
    assert dict(watched.counts) == {"rms_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "swiglu": LAYERS}
    assert torch.allclose(got, wanted)
    for a, b in zip(ours, grads):
        assert torch.allclose(a, b, atol=1e-5)


def test_lengths_stay_symbolic() -> None:
    """A rule that looked at a length too closely would compile for every prompt anew."""
    model = build().backbone_model
    torch._dynamo.reset()
    watched = Watched()
    forward = torch.compile(model.forward, backend=watched, dynamic=True)
    for tokens in (5, 9, 17, 31):
        x = torch.randn(1, tokens, model.config.hidden_size)
        with torch.no_grad():
            wanted = model(inputs_embeds=x, use_cache=False).last_hidden_state
            assert torch.allclose(forward(inputs_embeds=x, use_cache=False).last_hidden_state, wanted, atol=1e-5)
    assert watched.counts["rms_norm"] == 2 * LAYERS + 1


class TorchtuneNorm(nn.Module):
    """RMSNorm as torchtune writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.scale


def test_another_stacks_code_is_found_too() -> None:
    layer = TorchtuneNorm(24)
    x = torch.randn(3, 24)
    with torch.no_grad():
        wanted = layer(x)
    got, counts = run(layer.forward, x)
    assert counts == {"rms_norm": 1}
    assert torch.allclose(got, wanted, atol=1e-6)


def test_all_of_it_through_inductor_by_name() -> None:
    """The entry point: the backend is found by its name, and counts."""
    torch._dynamo.reset()
    assert "csm" in torch._dynamo.list_backends()
    before = backend.replaced().get("rms_norm", 0)
    layer = TorchtuneNorm(32)
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.allclose(torch.compile(layer, backend="csm")(x), layer(x), atol=1e-6)
    assert backend.replaced()["rms_norm"] == before + 1


def test_writes_in_place_stay() -> None:
    """To what nothing in the graph reads afterwards, and in the middle of a pattern."""

    def counted(x: Tensor, calls: Tensor) -> Tensor:
        calls.add_(1)
        return functional.silu(x) * x

    calls = torch.zeros(())
    x = torch.randn(4, 4)
    got, counts = run(counted, x, calls)
    assert counts == {"swiglu": 1} and calls == 1
    assert torch.allclose(got, functional.silu(x) * x)

    def late(x: Tensor, up: Tensor) -> Tensor:
        gate = x + 1
        smooth = functional.silu(gate)
        gate += 1
        return smooth * up, gate.view(-1)

    got, counts = run(late, x, x)
    assert counts == {}
    assert torch.allclose(got[0], functional.silu(x + 1) * x) and torch.allclose(got[1], (x + 2).view(-1))

    def residual(x: Tensor, weight: Tensor) -> Tensor:
        h = x * 1
        for _ in range(3):
            h += weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))
        return h

    got, counts = run(residual, x, torch.ones(4))
    assert counts == {"rms_norm": 3}
    assert torch.allclose(got, residual(x, torch.ones(4)), atol=1e-6)


@pytest.mark.parametrize("choice", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True}}])
def test_modes_and_options_are_inductors(choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    patches: list[dict[str, Any]] = []
    inner = compile_fx.compile_fx

    def watched(*args: Any, config_patches: Any = None, **kwargs: Any) -> Any:
        patches.append(config_patches)
        return inner(*args, config_patches=config_patches, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", watched)
    torch._dynamo.reset()
    x = torch.randn(2, 8)
    assert torch.equal(torch.compile(torch.relu, backend="csm", **choice)(x), torch.relu(x))
    assert patches[0]["max_autotune"] is True


def test_an_option_inductor_does_not_know() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(torch.relu, backend="csm", options={"no_such_option": 1})(torch.randn(2, 8))


# ------------------------------------------------------------------------------------ what only looks like a match


def norm_over_tokens(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-5) * torch.ones(8)


def norm_of_another(x: Tensor) -> Tensor:
    return torch.ones(8) * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5))


def cube(x: Tensor) -> Tensor:
    return torch.ones(8) * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5))


def wide_weight(x: Tensor) -> Tensor:
    return torch.ones(8, 8) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def broadcast_gate(x: Tensor) -> Tensor:
    return functional.silu(x) * x[:1]


def rotation_by_thirds(x: Tensor) -> Tensor:
    y, table = x.view(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    return y * table + torch.cat((-y[..., 3:], y[..., :3]), dim=-1) * table


def other_half_first(x: Tensor) -> Tensor:
    y, table = x.view(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    return y * table + torch.cat((-y[..., :4], y[..., 4:]), dim=-1) * table


def angles_by_head(x: Tensor) -> Tensor:
    y, table = x.view(1, 2, 4, 8), torch.ones(1, 2, 4, 8) * torch.arange(2).view(1, 2, 1, 1)
    return y * table + torch.cat((-y[..., 4:], y[..., :4]), dim=-1) * table


def masked_attention(x: Tensor) -> Tensor:
    y = x.view(1, 1, 8, 8)
    return functional.scaled_dot_product_attention(y[:, :, :1], y, y, attn_mask=torch.arange(8).expand(8, 8)[:1] < 5)


def scaled_attention(x: Tensor) -> Tensor:
    y = x.view(1, 1, 8, 8)
    return functional.scaled_dot_product_attention(y[:, :, :1], y, y, scale=0.5)


def causal_attention(x: Tensor) -> Tensor:
    """The first of eight keys only."""
    y = x.view(1, 1, 8, 8)
    return functional.scaled_dot_product_attention(y[:, :, :1], y, y, is_causal=True)


def many_queries(x: Tensor) -> Tensor:
    y = x.view(1, 1, 8, 8)
    return functional.scaled_dot_product_attention(y, y, y)


@pytest.mark.parametrize(
    "function",
    [
        norm_over_tokens,
        norm_of_another,
        cube,
        wide_weight,
        broadcast_gate,
        rotation_by_thirds,
        other_half_first,
        angles_by_head,
        masked_attention,
        scaled_attention,
        causal_attention,
        many_queries,
    ],
)
def test_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 8)
    got, counts = run(function, x)
    assert counts == {}
    assert torch.allclose(got, function(x), atol=1e-6)
