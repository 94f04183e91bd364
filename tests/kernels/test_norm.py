"""RMSNorm and residual + RMSNorm: the kernels against fp64, by the one tolerance rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csm_kernels import norm
from csm_kernels.norm import add_rms_norm, rms_norm
from csm_kernels.testing import assert_close, assert_untouched, guarded

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (2048, 1024, 1, 63, 127, 257, 999)


def truth(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def eager(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """As transformers' CsmRMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def inputs(device: torch.device, width: int, dtype: torch.dtype, rows: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, width).to(dtype)
    return x.to(device), (torch.rand(width) + 0.5).to(dtype).to(device)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device: torch.device, width: int, dtype: torch.dtype) -> None:
    x, weight = inputs(device, width, dtype)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, truth(x, weight), eager(x, weight), name="rms_norm", terms=2)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "stream"), [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)])
def test_forward_with_residual(device: torch.device, width: int, dtype: torch.dtype, stream: torch.dtype) -> None:
    x, weight = inputs(device, width, dtype)
    residual = torch.randn(x.shape, device=device).to(stream)
    out, total = add_rms_norm(x, residual, weight, EPS)
    assert out.dtype == dtype and total.dtype == stream
    assert torch.equal(total, (x.float() + residual.float()).to(stream))
    assert_close(out, truth(total, weight), eager(total, weight.to(stream)).to(dtype), name="add_rms_norm", terms=2)


def gradients(x: Tensor, residual: Tensor | None, weight: Tensor, grads: tuple[Tensor, ...]) -> list[Tensor]:
    """In fp64, by autograd."""
    leaves = [t.double().requires_grad_() for t in (x, residual, weight) if t is not None]
    total = leaves[0] if residual is None else leaves[0] + leaves[1]
    outs = [truth(total, leaves[-1])] + ([] if residual is None else [total])
    return list(torch.autograd.grad(outs, leaves, [g.double() for g in grads[: len(outs)]]))


@pytest.mark.parametrize("width", (2048, 63, 257, 1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("residual", [False, True])
def test_backward(device: torch.device, width: int, dtype: torch.dtype, residual: bool) -> None:
    x, weight = inputs(device, width, dtype, rows=11)
    other = torch.randn(x.shape, device=device).to(dtype) if residual else None
    # What is normalised is rounded first; differentiate at the rounded sum.
    grads = torch.randn(x.shape, device=device).to(dtype), torch.randn(x.shape, device=device).to(dtype)
    leaves = [t.detach().clone().requires_grad_() for t in (x, other, weight) if t is not None]
    if other is None:
        outs = (rms_norm(leaves[0], leaves[1], EPS),)
        stock = (eager(leaves[0], leaves[1]),)
        wanted = gradients(x, None, weight, grads)
    else:
        outs = add_rms_norm(leaves[0], leaves[1], leaves[2], EPS)
        total = (x + other).double()
        wanted = gradients(total, torch.zeros_like(total), weight, grads)
        rounded = leaves[0] + leaves[1]
        stock = (eager(rounded, leaves[2]), rounded)
    ours = torch.autograd.grad(outs, leaves, grads[: len(outs)])
    theirs = torch.autograd.grad(stock, leaves, grads[: len(stock)])
    for name, a, b, c in zip(("x", "residual or weight", "weight"), ours, wanted, theirs):
        assert a.dtype == dtype
        assert_close(a, b, c, name=f"gradient of {name}", terms=x.shape[0])


def test_strides_are_walked_and_not_copied(device: torch.device) -> None:
    base = torch.randn(3, 8, 2, 96, device=device)
    weight = torch.rand(64, device=device)
    for x in (
        base[:, ::2, 0, :64],
        base[:, 1:4, :, 5:69].transpose(1, 2)[:, 0],
        base[1, ::3, 1, 32:],
        base[..., 0, 0, :64],
    ):
        assert not x.is_contiguous()
        assert_close(rms_norm(x, weight, EPS), truth(x, weight), eager(x, weight), name="strided", terms=2)
        residual = torch.randn(x.shape, device=device)
        out, total = add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, x + residual)
        assert_close(out, truth(total, weight), eager(total, weight), name="strided", terms=2)


def test_broken_rows_stay_alone(device: torch.device) -> None:
    x, weight = inputs(device, 127, torch.float32)
    x[1, 3], x[3, 0] = float("nan"), float("inf")
    out = rms_norm(x, weight, EPS)
    assert out[1].isnan().all() and not out[3].isfinite().all()
    keep = [0, 2, 4]
    assert torch.equal(out[keep], rms_norm(x[keep], weight, EPS))


@pytest.mark.parametrize("width", [63, 1024])
def test_every_output_is_written_and_nothing_else(device: torch.device, width: int) -> None:
    x, weight = inputs(device, width, torch.bfloat16)
    out, out_whole = guarded(x.shape, x.dtype, device)
    total, total_whole = guarded(x.shape, x.dtype, device)
    rstd, rstd_whole = guarded(x.shape[:1], torch.float32, device)
    norm.launch_forward(x, x, weight, EPS, out, total, rstd)
    x_grad, grad_whole = guarded(x.shape, x.dtype, device)
    norm.launch_backward(total, weight, rstd, x, x, x_grad)
    for buffer in (out, total, rstd, x_grad):
        assert buffer.isfinite().all()
    for whole in (out_whole, total_whole, rstd_whole, grad_whole):
        assert_untouched(whole)


def test_the_same_every_time(device: torch.device) -> None:
    x, weight = inputs(device, 999, torch.bfloat16, rows=20)
    x.requires_grad_(), weight.requires_grad_()
    grad = torch.randn_like(x)
    first = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
    for _ in range(3):
        again = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.dispatcher
def test_the_ops_are_sound(device: torch.device) -> None:
    x, weight = inputs(device, 63, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.csm_kernels.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.csm_kernels.add_rms_norm.default, (x, x.detach(), weight, EPS))


@pytest.mark.dispatcher
@pytest.mark.slow
def test_compiles_whole(device: torch.device) -> None:
    x, weight = inputs(device, 64, torch.float32)
    x.requires_grad_()

    def step(x: Tensor, weight: Tensor) -> Tensor:
        out, total = add_rms_norm(x * 2, x, weight, EPS)
        return rms_norm(out, weight, EPS) + total

    got = torch.compile(step, fullgraph=True)(x, weight)
    assert torch.allclose(got, step(x, weight), atol=1e-6)
    ours, theirs = (torch.autograd.grad(value.sum(), x)[0] for value in (got, step(x, weight)))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_empty(device: torch.device) -> None:
    x, weight = torch.zeros(0, 8, device=device), torch.ones(8, device=device)
    assert rms_norm(x, weight, EPS).shape == (0, 8)
    assert add_rms_norm(x, x, weight, EPS)[1].shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        (torch.ones(2, 8), torch.ones(7), None, "weight must be"),
        (torch.ones(2, 8), torch.ones(1, 8), None, "weight must be"),
        (torch.ones(2, 8, dtype=torch.int32), torch.ones(8), None, "x must be floating point"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(2, 9), "residual must have"),
        (torch.ones(2, 70000), torch.ones(70000), None, "at most 65536 wide"),
        (torch.ones(8, 2).t(), torch.ones(8), None, "x must have unit stride"),
        (torch.ones(2, 2, 2, 2, 8)[::2, ::2, ::2, :, :4].expand(3, 1, 1, 2, 4)[:, :, :, ::2], torch.ones(4), None, ""),
    ],
)
def test_bad_arguments(device: torch.device, x: Tensor, weight: Tensor, residual: Tensor | None, message: str) -> None:
    if not message:  # broadcast rows are walked like any other
        assert rms_norm(x.to(device), weight.to(device), EPS).shape == x.shape
        return
    with pytest.raises(ValueError, match=message):
        if residual is None:
            rms_norm(x.to(device), weight.to(device), EPS)
        else:
            add_rms_norm(x.to(device), residual.to(device), weight.to(device), EPS)
