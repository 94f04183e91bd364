"""RMSNorm and residual + RMSNorm, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._rows import row_start, rows_of, walkable
from csm_kernels._target import device_facts, runs_triton, tl, triton
from csm_kernels._tiles import tiles

_WIDEST = 65536


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    rstd_ptr,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    r_inner,
    r_outer_stride,
    r_inner_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row: sum, norm and product in fp32; the sum is rounded to its own dtype before it is normalised."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < width
    x_row = x_ptr + row_start(row, x_inner, x_outer_stride, x_inner_stride)
    x = tl.load(x_row + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row_start(row, r_inner, r_outer_stride, r_inner_stride)
        total = x + tl.load(residual_row + columns, mask=mask, other=0.0).to(tl.float32)
        total = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + columns, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(out_ptr + row * width + columns, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_ptr,
    sum_grad_ptr,
    x_grad_ptr,
    partial_ptr,
    rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    g_inner,
    g_outer_stride,
    g_inner_stride,
    width,
    HAS_SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows ``pid, pid + programs, ...``; this program's share of the weight's gradient goes to one row of ``partial``."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < width
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK_D,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        x_row = x_ptr + row_start(row, x_inner, x_outer_stride, x_inner_stride)
        grad_row = grad_ptr + row_start(row, g_inner, g_outer_stride, g_inner_stride)
        rstd = tl.load(rstd_ptr + row)
        unit = tl.load(x_row + columns, mask=mask, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_row + columns, mask=mask, other=0.0).to(tl.float32)
        share += grad * unit
        scaled = grad * weight
        x_grad = rstd * (scaled - unit * (tl.sum(scaled * unit, 0) / width))
        out = tl.cast(row, tl.int64) * width + columns
        if HAS_SUM:
            x_grad += tl.load(sum_grad_ptr + out, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_grad_ptr + out, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program.to(tl.int64) * width + columns, share, mask=mask)


def _tiles(x: Tensor, width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return tiles("norm", x, {"D": width}, {"BLOCK_D": block, "num_warps": max(1, min(16, block // 512))})


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None, rstd: Tensor
) -> None:
    """Launch the forward kernel into ``out`` and ``total``, contiguous, and ``rstd``, ``[rows]`` fp32."""
    rows = rows_of(x, "x")
    other = rows if residual is None else rows_of(residual, "residual")
    if rows.total == 0 or x.shape[-1] == 0:
        return
    _forward_kernel[(rows.total,)](
        x,
        residual,
        weight,
        out,
        total,
        rstd,
        *rows.walk,
        *other.walk,
        x.shape[-1],
        eps,
        HAS_RESIDUAL=residual is not None,
        **_tiles(x, x.shape[-1]),
    )


def launch_backward(
    x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, sum_grad: Tensor | None, x_grad: Tensor
) -> Tensor:
    """Launch the backward kernel into ``x_grad``, contiguous; returns the weight's gradient, ``[D]`` fp32.

    ``x`` is what was normalised, the sum where there was a residual; ``sum_grad``, contiguous, is added to its gradient.
    """
    rows, width = rows_of(x, "x"), x.shape[-1]
    # A fixed number of partial sums, added in a fixed order: the same gradient every time.
    programs = min(rows.total, 2 * device_facts(x.device.index or 0).processors if x.is_cuda else 8)
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if rows.total and width:
        _backward_kernel[(programs,)](
            x,
            weight,
            rstd,
            grad,
            sum_grad,
            x_grad,
            partial,
            rows.total,
            *rows.walk,
            *rows_of(grad, "grad").walk,
            width,
            HAS_SUM=sum_grad is not None,
            **_tiles(x, width),
        )
    return partial.sum(0)


def _checked(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if x.ndim == 0 or weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight must be [D] for x of [..., D], got {tuple(weight.shape)} for x of {tuple(x.shape)}")
    if x.shape[-1] > _WIDEST:
        raise ValueError(f"x must be at most {_WIDEST} wide, got {x.shape[-1]}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _checked(x, weight)
    if not runs_triton(x, weight):
        wide = x.float()
        rstd = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
        return (wide * rstd).mul_(weight.float()).to(x.dtype).contiguous(), rstd.flatten()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    launch_forward(x, None, weight.contiguous(), eps, out, None, rstd)
    return out, rstd


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _checked(x, weight, residual)
    if not runs_triton(x, residual, weight):
        normed, total = add_rms_norm_ref(x, residual, weight, eps)
        rstd = torch.rsqrt(total.float().square().mean(-1) + eps).flatten()
        return normed.to(x.dtype).contiguous(), total.contiguous(), rstd
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    launch_forward(x, residual, weight.contiguous(), eps, out, total, rstd)
    return out, total, rstd


def _norm_backward(
    x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, sum_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not runs_triton(x, weight, grad):
        # In place where it can be: on a CPU large new tensors cost more than the sums.
        scale = rstd.view(x.shape[:-1])[..., None]
        unit, wide, factor = x.float() * scale, grad.float(), weight.float()
        both = wide * unit
        weight_grad = both.reshape(-1, x.shape[-1]).sum(0)
        mean = (both @ factor)[..., None] / max(1, x.shape[-1])
        del both
        x_grad = unit.mul_(-mean).addcmul_(wide, factor).mul_(scale)
        if sum_grad is not None:
            x_grad.add_(sum_grad)
        return x_grad.to(x.dtype).contiguous(), weight_grad.to(weight.dtype)
    x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if sum_grad is not None:
        sum_grad = sum_grad.contiguous()
    weight_grad = launch_backward(x, weight.contiguous(), rstd, walkable(grad), sum_grad, x_grad)
    return x_grad, weight_grad.to(weight.dtype)


def _fake_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.dtypes = x.dtype, residual.dtype


_norm_backward_op = _ops.register(
    "rms_norm_backward",
    _norm_backward,
    lambda x, weight, rstd, grad, sum_grad: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        weight.new_empty(weight.shape),
    ),
)
_norm_op = _ops.register(
    "rms_norm",
    _norm,
    lambda x, weight, eps: (torch.empty(x.shape, dtype=x.dtype, device=x.device), _fake_rstd(x)),
    backward=lambda ctx, grad, _: (*_norm_backward_op(*ctx.saved_tensors, grad, None), None),
    setup_context=_save,
)


def _add_norm_grads(ctx: Any, grad: Tensor, sum_grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    shared, weight_grad = _norm_backward_op(*ctx.saved_tensors, grad, sum_grad)
    return shared.to(ctx.dtypes[0]), shared.to(ctx.dtypes[1]), weight_grad, None


_add_norm_op = _ops.register(
    "add_rms_norm",
    _add_norm,
    lambda x, residual, weight, eps: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape, dtype=residual.dtype, device=x.device),
        _fake_rstd(x),
    ),
    backward=_add_norm_grads,
    setup_context=_save_sum,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension, computed in fp32, differentiable.

    Args:
        x: ``[..., D]``, fp32, bf16 or fp16, unit stride in the last dimension, otherwise any strides two numbers can walk.
        weight: ``[D]``, any float dtype.
        eps: added to the mean square.

    Returns:
        ``[..., D]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> rms_norm(torch.randn(4, 2048), torch.ones(2048), 1e-5).shape
        torch.Size([4, 2048])

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019). Not yet run on a GPU.
    """
    return _norm_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + residual``, and its RMSNorm, in one pass; differentiable.

    Args:
        x: ``[..., D]``, the branch's output.
        residual: ``[..., D]``, any float dtype, the residual stream.
        weight: ``[D]``.
        eps: added to the mean square.

    Returns:
        The normalised sum in the dtype of ``x`` and the sum in the dtype of ``residual``, both contiguous. The sum is
        rounded before it is normalised, as a stock model that writes it down does.

    Raises:
        ValueError: as :func:`rms_norm`.

    Source: as :func:`rms_norm`. Not yet run on a GPU.
    """
    normed, total, _ = _add_norm_op(x, residual, weight, eps)
    return normed, total


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of :func:`rms_norm`, before its last rounding: fp32 out. Shapes as there.

    Source: ``CsmRMSNorm`` of transformers, whose product with the weight happens in the model's dtype and here in fp32.
    """
    x = x.float()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of :func:`add_rms_norm`: the norm in fp32, the sum in the dtype of ``residual``."""
    total = (x.float() + residual.float()).to(residual.dtype)
    return rms_norm_ref(total, weight, eps), total
