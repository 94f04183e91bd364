"""SwiGLU: the kernels against fp64, by the one tolerance rule."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from csm_kernels.swiglu import launch_backward, launch_forward, swiglu, swiglu_linear, swiglu_ref
from csm_kernels.testing import assert_close, assert_untouched, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (8192, 1024, 1, 63, 127, 257, 999, 2051)


def formula(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers' CsmMLP, in the dtype it is given."""
    return torch.nn.functional.silu(gate) * up


def inputs(device: torch.device, width: int, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, Tensor]:
    gate = 4 * torch.randn(rows, width)
    gate.view(-1)[:: max(1, width // 3)] *= 20  # saturated gates of both signs
    return gate.to(dtype).to(device), torch.randn(rows, width).to(dtype).to(device)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device: torch.device, width: int, dtype: torch.dtype) -> None:
    gate, up = inputs(device, width, dtype)
    out = swiglu(gate, up)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, formula(gate.double(), up.double()), formula(gate, up), name="swiglu", terms=2)


def test_dtypes_may_differ(device: torch.device) -> None:
    gate, up = inputs(device, 257, torch.float32)
    low = up.bfloat16()
    assert swiglu(gate, low).dtype == torch.float32 and swiglu(low, gate).dtype == torch.bfloat16
    assert_close(swiglu(gate, low), formula(gate.double(), low.double()), formula(gate, low.float()), terms=2)


@pytest.mark.parametrize("width", (8192, 63, 1, 1025))
@pytest.mark.parametrize(("dtype", "other"), [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)])
def test_backward(device: torch.device, width: int, dtype: torch.dtype, other: torch.dtype) -> None:
    gate, up = inputs(device, width, dtype)
    up, grad = up.to(other), torch.randn(gate.shape, device=device).to(dtype)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    ours = torch.autograd.grad(swiglu(gate, up), leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(formula(*wide), wide, grad.double())
    eager = torch.autograd.grad(formula(gate, up), leaves, grad)
    for name, a, b, c, leaf in zip(("gate", "up"), ours, truth, eager, leaves):
        assert a.dtype == leaf.dtype
        assert_close(a, b, c, name=f"gradient of {name}", terms=3)


def test_nothing_but_the_inputs_is_kept(device: torch.device) -> None:
    gate, up = inputs(device, 64, torch.float32)
    gate.requires_grad_(), up.requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_gradients_autograd_hands_out(device: torch.device) -> None:
    """An expanded scalar cannot be walked."""
    gate, up = inputs(device, 127, torch.float32)
    gate.requires_grad_(), up.requires_grad_()
    ours = torch.autograd.grad(swiglu(gate, up).sum(), (gate, up))
    wanted = torch.autograd.grad(formula(gate, up).sum(), (gate, up))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, wanted))


def test_strides_are_walked_and_not_copied(device: torch.device) -> None:
    base = torch.randn(3, 8, 2, 96, device=device)
    pairs = (
        base[:, :, 0].chunk(2, dim=-1),  # halves of one product
        (base[:, ::2, 0, :64], base[:, 1::2, 1, 32:]),
        (base[:, 1:4, 0, 5:69].transpose(0, 1), base[:, 3:6, 1, :64].transpose(0, 1).contiguous()),
        (base[1, ::3, 1, 32:], base[:, 0, :, :64].transpose(0, 1)[0]),
        (base[0, :1, 0, :64].expand(5, 64), base[2, :5, 1, 1:65]),
    )
    for pair in pairs:
        assert not pair[0].is_contiguous()
        gate, up = (t.detach().requires_grad_() for t in pair)
        out = swiglu(gate, up)
        wanted, truth = formula(gate, up), formula(gate.double(), up.double())
        assert_close(out.detach(), truth.detach(), wanted.detach(), name="strided", terms=2)
        grad = torch.randn(*out.shape[:-1], 2 * out.shape[-1], device=device)[..., : out.shape[-1]]
        ours, theirs = (torch.autograd.grad(value, (gate, up), grad) for value in (out, wanted))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))


def test_broken_values_stay_alone(device: torch.device) -> None:
    gate, up = inputs(device, 257, torch.float32)
    clean = swiglu(gate, up)
    gate[0, 3], gate[1, 0], gate[1, 1], up[2, 256] = (float(v) for v in ("nan", "inf", "-inf", "inf"))
    out = swiglu(gate, up)
    broken = torch.zeros_like(out, dtype=torch.bool)
    broken[[0, 1, 1, 2], [3, 0, 1, 256]] = True
    assert not out[broken].isfinite().any()
    assert torch.equal(out.isnan(), formula(gate, up).isnan())
    assert torch.equal(out[~broken], clean[~broken])


@pytest.mark.parametrize("width", [63, 1024, 1025])
def test_every_output_is_written_and_nothing_else(device: torch.device, width: int) -> None:
    gate, up = inputs(device, width, torch.bfloat16)
    out, out_whole = guarded(gate.shape, gate.dtype, device)
    gate_grad, gate_whole = guarded(gate.shape, gate.dtype, device)
    up_grad, up_whole = guarded(gate.shape, gate.dtype, device)
    launch_forward(gate, up, out)
    launch_backward(gate, up, gate, gate_grad, up_grad)
    for buffer, whole in ((out, out_whole), (gate_grad, gate_whole), (up_grad, up_whole)):
        assert buffer.isfinite().all()
        assert_untouched(whole)


def test_the_same_every_time(device: torch.device) -> None:
    gate, up = inputs(device, 999, torch.bfloat16)
    gate.requires_grad_(), up.requires_grad_()
    first = torch.autograd.grad(swiglu(gate, up), (gate, up), up.detach())
    for _ in range(3):
        again = torch.autograd.grad(swiglu(gate, up), (gate, up), up.detach())
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.dispatcher
def test_the_reference_runs_where_triton_does_not(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    base = 4 * torch.randn(2, 3, 128, device=device)
    gate, up = base[..., :64].transpose(0, 1).requires_grad_(), base[..., 64:].transpose(0, 1).requires_grad_()
    grad = torch.randn(3, 2, 64, device=device)
    ours = swiglu(gate, up)
    our_grads = torch.autograd.grad(ours, (gate, up), grad)
    monkeypatch.setattr(sys.modules["csm_kernels.swiglu"], "runs_triton", lambda *tensors: False)
    theirs = swiglu(gate, up)
    assert torch.equal(theirs, swiglu_ref(gate, up)) and theirs.is_contiguous()
    assert torch.allclose(ours, theirs, atol=1e-5)
    for a, b in zip(our_grads, torch.autograd.grad(theirs, (gate, up), grad)):
        assert torch.allclose(a, b, atol=1e-5)
    torch.library.opcheck(torch.ops.csm_kernels.swiglu.default, (gate, up))


@pytest.mark.dispatcher
def test_the_ops_are_sound(device: torch.device) -> None:
    gate, up = inputs(device, 63, torch.float32)
    torch.library.opcheck(torch.ops.csm_kernels.swiglu.default, (gate.requires_grad_(), up.requires_grad_()))


@pytest.mark.slow
@pytest.mark.dispatcher
def test_compiles_whole(device: torch.device) -> None:
    gate, up = inputs(device, 64, torch.float32)
    gate.requires_grad_()

    def step(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate * 0.1, up) + gate

    got, wanted = torch.compile(step, fullgraph=True)(gate, up), step(gate, up)
    assert torch.allclose(got, wanted, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value.square().sum(), gate)[0] for value in (got, wanted))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_empty(device: torch.device) -> None:
    for shape in ((0, 8), (3, 0)):
        gate = torch.zeros(shape, device=device, requires_grad=True)
        out = swiglu(gate, gate.detach())
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), gate)[0].shape == shape


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(2, 8), torch.ones(2, 7), "up must have the shape of gate"),
        (torch.ones(2, 8), torch.ones(8), "up must have the shape of gate"),
        (torch.ones(2, 8, dtype=torch.int32), torch.ones(2, 8), "gate must be floating point"),
        (torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool), "up must be floating point"),
        (torch.tensor(1.0), torch.tensor(1.0), "gate needs at least one dimension"),
        (torch.ones(8, 2).t(), torch.ones(2, 8), "gate must have unit stride"),
        (torch.ones(2, 8), torch.ones(8, 2).t(), "up must have unit stride"),
        (torch.ones(4, 4, 4, 8)[::2, ::2, ::2], torch.ones(2, 2, 2, 8), "gate .* cannot be walked"),
    ],
)
def test_bad_arguments(device: torch.device, gate: Tensor, up: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate.to(device), up.to(device))


# --------------------------------------------------------------------------------------------- with the down projection


def linear_inputs(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, out: int = 24, bias: bool = True
) -> list[Tensor]:
    """Gate, up, weight and, where wanted, bias, as leaves."""
    gate, up = (torch.randn(shape) for _ in range(2))
    tensors = [2 * gate, up, torch.randn(out, shape[-1]) / shape[-1] ** 0.5] + [torch.randn(out)] * bias
    return [t.to(dtype).to(device).requires_grad_() for t in tensors]


def linear_formula(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(formula(gate, up), weight, bias)


def check_linear(leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Output and all gradients as near the truth as the stock layers in the same dtype."""
    out = swiglu_linear(*leaves)
    assert out.dtype == dtype and out.shape == (*leaves[0].shape[:-1], len(leaves[2]))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth, eager = linear_formula(*wide), linear_formula(*leaves)
    assert_close(out.detach(), truth.detach(), eager.detach(), name="swiglu_linear", terms=leaves[2].shape[1])
    grad = torch.randn(out.shape, device=out.device).to(dtype)
    got, stock = (torch.autograd.grad(value, leaves, grad) for value in (out, eager))
    rows = out.numel() // out.shape[-1]
    for name, a, b, c, leaf, terms in zip(
        ("gate", "up", "weight", "bias"),
        got,
        torch.autograd.grad(truth, wide, grad.double()),
        stock,
        leaves,
        (out.shape[-1], out.shape[-1], rows, rows),
    ):
        assert a.dtype == leaf.dtype
        assert_close(a, b, c, name=f"gradient of {name}", terms=max(1, terms))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 96), (2, 3, 2, 63), (1, 1), (0, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    check_linear(linear_inputs(device, shape, dtype, bias=bias), dtype)


def test_linear_of_halves_of_one_product(device: torch.device) -> None:
    gate, up = torch.randn(2, 5, 2 * 48, device=device).chunk(2, dim=-1)
    weight = torch.randn(48, 24, device=device).t()
    assert not gate.is_contiguous() and not weight.is_contiguous()
    check_linear([t.detach().requires_grad_() for t in (gate, up, weight)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_without_triton(device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["csm_kernels.swiglu"], "runs_triton", lambda *tensors: False)
    check_linear(linear_inputs(device, (2, 5, 63), dtype), dtype)


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_keeps_gate_up_and_weight(device: torch.device, autocast: bool) -> None:
    """The very tensors: neither the product nor, under autocast, a copy in another dtype."""
    gate, up, weight, bias = linear_inputs(device, (2, 5, 96), torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast),
    ):
        out = swiglu_linear(gate, up, weight, bias)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (gate, up, weight)]
    assert "dtype" in vars(out.grad_fn) and not [v for v in tree_leaves(vars(out.grad_fn)) if isinstance(v, Tensor)]


@pytest.mark.dispatcher
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_linear_under_autocast(device: torch.device, gate_dtype: torch.dtype) -> None:
    """The product in autocast's dtype, gradients in that of their tensors; the gate in fp32 all the same."""
    gate, up, weight, bias = linear_inputs(device, (9, 96), torch.float32)
    gate, up = (t.detach().to(gate_dtype).requires_grad_() for t in (gate, up))
    leaves = [gate, up, weight, bias]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = linear_formula(*wide)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, eager = swiglu_linear(*leaves), linear_formula(*leaves)
    assert out.dtype == torch.bfloat16
    assert_close(out.detach(), truth.detach(), eager.detach(), name="swiglu_linear", terms=96)
    grad = torch.randn(out.shape, device=device).bfloat16()
    got, stock = (torch.autograd.grad(value, leaves, grad) for value in (out, eager))
    for a, b, c, leaf in zip(got, torch.autograd.grad(truth, wide, grad.double()), stock, leaves):
        assert a.dtype == leaf.dtype
        assert_close(a, b, c.bfloat16(), name="gradient", terms=24)


@pytest.mark.dispatcher
def test_linear_of_a_frozen_weight(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LoRA: the same gradients of gate and up, and the product is not computed again."""
    leaves = linear_inputs(device, (2, 5, 96), torch.float32)
    grad = torch.randn(2, 5, 24, device=device)
    wanted = torch.autograd.grad(swiglu_linear(*leaves), leaves, grad)
    gate, up, weight, bias = leaves
    out = swiglu_linear(gate, up, weight.detach(), bias.detach())
    again = []
    stock = sys.modules["csm_kernels.swiglu"]._swiglu  # type: ignore[attr-defined]
    monkeypatch.setattr(
        sys.modules["csm_kernels.swiglu"], "_swiglu", lambda *args: (again.append(args), stock(*args))[1]
    )
    got = torch.autograd.grad(out, (gate, up), grad)
    assert not again
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    torch.autograd.grad(swiglu_linear(gate.detach(), up.detach(), weight, None), weight, grad)
    assert len(again) == 2  # forward and backward: the counting works


def test_linear_is_the_same_every_time(device: torch.device) -> None:
    leaves = linear_inputs(device, (3, 5, 257), torch.bfloat16)
    grad = torch.randn(3, 5, 24, device=device).bfloat16()
    first = torch.autograd.grad(swiglu_linear(*leaves), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(swiglu_linear(*leaves), leaves, grad)))


@pytest.mark.dispatcher
@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_op_is_sound(device: torch.device, bias: bool) -> None:
    gate, up, weight, *rest = linear_inputs(device, (2, 3, 63), torch.float32, bias=bias)
    args = (gate, up, weight, rest[0] if rest else None)
    torch.library.opcheck(torch.ops.csm_kernels.swiglu_linear.default, (*args, torch.float32))
    torch.library.opcheck(torch.ops.csm_kernels.swiglu_linear.default, (*args, torch.bfloat16))


@pytest.mark.parametrize(
    ("gate", "up", "weight", "bias", "message"),
    [
        (torch.ones(2, 8), torch.ones(2, 7), torch.ones(3, 8), None, "up must have the shape of gate"),
        (torch.ones(8), torch.ones(8), torch.ones(3, 8), None, "gate must have at least two dimensions"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(8, 3), None, r"weight must be \[D, 8\], got \(8, 3\)"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), None, r"weight must be \[D, 8\]"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), r"bias must be \[3\], got \(8,\)"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(3, 8).half(), None, "weight must have the dtype of gate"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(3, 8).half(), torch.ones(3), "weight must have the dtype"),
        (torch.ones(2, 8).int(), torch.ones(2, 8), torch.ones(3, 8), None, "gate must be floating point"),
        (torch.ones(8, 2).t(), torch.ones(2, 8), torch.ones(3, 8), None, "gate must have unit stride"),
    ],
)
def test_bad_arguments_of_the_linear(
    device: torch.device, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu_linear(gate.to(device), up.to(device), weight.to(device), None if bias is None else bias.to(device))
