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


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def silu_in_place(x: Tensor, up: Tensor) -> Any:
    x = x + 0
    return functional.silu(x, inplace=True) * up, x


def silu_in_place_by_position(x: Tensor, up: Tensor) -> Any:
    x = x + 0
    return functional.silu(x, True) * up, x


def another_op_in_place(x: Tensor, up: Tensor) -> Any:
    x = x + 0
    smooth = functional.silu(x)
    functional.relu(x, inplace=True)
    return smooth * up, x


def foreach_in_place(x: Tensor, up: Tensor) -> Any:
    x = x + 0
    smooth = functional.silu(x)
    torch._foreach_add_([x], 1)
    return smooth * up, x


def product_in_place(x: Tensor, up: Tensor) -> Any:
    up = up + 0
    kept = up
    up *= functional.silu(x)
    up += 1
    return up, kept


def product_into_another(x: Tensor, up: Tensor) -> Any:
    out = torch.empty_like(x)
    torch.mul(functional.silu(x), up, out=out).add_(1)
    return out


def write_to_a_replaced_value(x: Tensor, up: Tensor) -> Any:
    y = torch.ones(8) * normed(x)
    smooth = functional.silu(y)
    y += 1
    return smooth * up, y


def alpha_of_a_sum(x: Tensor, up: Tensor) -> Any:
    mean = x.pow(2).mean(-1, keepdim=True)
    return torch.ones(8) * (x * torch.rsqrt(torch.add(mean, 0.5, alpha=3)))


def alpha_of_a_rotation(x: Tensor, up: Tensor) -> Any:
    x, angle = x.view(1, 2, 4, 8), torch.linspace(0, 3, 8).expand(1, 1, 4, 8)
    rotated = torch.cat((-x[..., 4:], x[..., :4]), -1)
    return torch.add(x * angle.cos(), rotated * angle.sin(), alpha=-1)


def truncated_input(x: Tensor, up: Tensor) -> Any:
    return torch.ones(8) * normed((3 * x).to(torch.int32).float())


def rounded_input(x: Tensor, up: Tensor) -> Any:
    return torch.ones(8) * normed(x.to(torch.bfloat16).float() + 0) + normed(x.to(torch.bfloat16).float())


def odd_head(x: Tensor, up: Tensor) -> Any:
    x = x[:, :5].reshape(1, 2, 4, 5)
    angle = torch.linspace(0, 3, 5).expand(1, 1, 4, 5)
    return x * angle.cos() + torch.cat((-x[..., 2:], x[..., :2]), -1) * angle.sin()


def narrow_values_of_attention(x: Tensor, up: Tensor) -> Any:
    q, k = x.view(2, 4, 1, 8), up.view(2, 4, 1, 8).expand(2, 4, 5, 8)
    return functional.scaled_dot_product_attention(q, k, k[..., :6])


def groups_of_values_alone(x: Tensor, up: Tensor) -> Any:
    q, v = x.view(2, 4, 1, 8), up[:4].view(2, 2, 1, 8).expand(2, 2, 5, 8)
    k = v.repeat_interleave(2, 1)
    v = v[:, :, None, :, :].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8)
    return functional.scaled_dot_product_attention(q, k, v)


def broadcast_query(x: Tensor, up: Tensor) -> Any:
    return functional.scaled_dot_product_attention(x[:1].view(1, 1, 1, 8), up.view(2, 4, 1, 8), up.view(2, 4, 1, 8))


def empty_product(x: Tensor, up: Tensor) -> Any:
    return functional.linear(x[:, :0], up[:, :0]), functional.linear(x, up[:0])


def by_name(x: Tensor, up: Tensor) -> Any:
    q, k = x.view(2, 4, 1, 8), up.view(2, 4, 1, 8)
    square = torch.mean(input=x.pow(exponent=2), dim=-1, keepdim=True)
    rotary, angle = x.view(1, 2, 4, 8), torch.linspace(0, 3, 8).expand(1, 1, 4, 8)
    half = torch.cat(tensors=(-rotary[..., 4:], rotary[..., :4]), dim=-1)
    return (
        functional.scaled_dot_product_attention(query=q, key=k, value=k),
        functional.scaled_dot_product_attention(q, key=k, value=k, attn_mask=None),
        functional.linear(x, weight=up),
        functional.linear(input=x, weight=up, bias=None),
        functional.silu(input=x) * up,
        torch.ones(8) * (x * torch.rsqrt(input=square + 1e-5)),
        rotary * angle.cos() + half * angle.sin(),
    )


@pytest.mark.parametrize(
    "function",
    [
        silu_in_place,
        silu_in_place_by_position,
        another_op_in_place,
        foreach_in_place,
        product_in_place,
        product_into_another,
        write_to_a_replaced_value,
        alpha_of_a_sum,
        alpha_of_a_rotation,
        truncated_input,
        rounded_input,
        odd_head,
        narrow_values_of_attention,
        groups_of_values_alone,
        broadcast_query,
        empty_product,
        by_name,
    ],
)
def test_whatever_is_replaced_the_results_stay(function: Callable[..., Any]) -> None:
    x, up = torch.randn(8, 8), torch.randn(8, 8)
    wanted = function(x.clone(), up.clone())
    got, counts = run(function, x, up)
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, wanted))):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.allclose(a, b, atol=1e-5)
    if function is by_name:
        assert counts == {"rms_norm": 1, "rope": 1, "swiglu": 1, "attention": 2, "gemv": 2}


def test_dtypes_are_those_of_eager() -> None:
    """A bf16 rotation by fp32 angles is fp32; under autocast, products and attention of fp32 tensors are bf16."""

    def mixed(x: Tensor, weight: Tensor) -> Any:
        heads, angle = x.bfloat16().view(1, 2, 4, 8), torch.linspace(0, 3, 8).expand(1, 1, 4, 8)
        rotated = torch.cat((-heads[..., 4:], heads[..., :4]), -1)
        rotation = heads * angle.cos() + rotated * angle.sin()
        cache = torch.zeros(16, 8, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            product = functional.linear(x, weight)
            cache.index_copy_(0, torch.arange(8), product)
            q = x.view(2, 4, 1, 8)
            return rotation, product, cache, functional.scaled_dot_product_attention(q, q, q)

    x, weight = torch.randn(8, 8), torch.randn(8, 8)
    got, counts = run(mixed, x, weight)
    assert counts == {"rope": 1, "attention": 1, "gemv": 1}
    for a, b in zip(got, mixed(x, weight)):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), atol=0.1)
    assert torch.allclose(got[0], mixed(x, weight)[0], atol=1e-5)


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
