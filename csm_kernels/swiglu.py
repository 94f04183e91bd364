"""SwiGLU gate, forward and backward; what the backward needs beside the inputs it computes again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._rows import Rows, row_start, rows_of, walkable
from csm_kernels._target import runs_triton, tl, triton
from csm_kernels._tiles import tiles


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    width,
    BLOCK_F: tl.constexpr,
):
    """A piece of one row, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = column < width
    gate_row = gate_ptr + row_start(row, gate_inner, gate_outer_stride, gate_inner_stride)
    up_row = up_ptr + row_start(row, up_inner, up_outer_stride, up_inner_stride)
    gate = tl.load(gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gate_ptr,
    up_ptr,
    grad_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    grad_inner,
    grad_outer_stride,
    grad_inner_stride,
    width,
    BLOCK_F: tl.constexpr,
):
    """A piece of one row, in fp32; silu and its slope come from the gate once more."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = column < width
    gate_row = gate_ptr + row_start(row, gate_inner, gate_outer_stride, gate_inner_stride)
    up_row = up_ptr + row_start(row, up_inner, up_outer_stride, up_inner_stride)
    grad_row = grad_ptr + row_start(row, grad_inner, grad_outer_stride, grad_inner_stride)
    gate = tl.load(gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_row + column, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_row + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gate_grad = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    up_grad = grad * gate * sigmoid
    tl.store(gate_grad_ptr + row * width + column, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(up_grad_ptr + row * width + column, up_grad.to(up_grad_ptr.dtype.element_ty), mask=mask)


def _grid(gate: Tensor, rows: Rows) -> tuple[tuple[int, int], dict[str, int]]:
    width = gate.shape[-1]
    # 8 elements a thread: one 16-byte load of bf16. A single row of 8192 still makes 8 programs.
    block = min(1024, triton.next_power_of_2(width))
    meta = tiles("swiglu", gate, {"F": width}, {"BLOCK_F": block, "num_warps": max(1, block // 256)})
    return (rows.total, triton.cdiv(width, meta["BLOCK_F"])), meta


def launch_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Launch the forward kernel into ``out``, contiguous. ``gate`` and ``up`` may be halves of one product's rows."""
    if gate.numel() == 0:
        return
    rows = rows_of(gate, "gate")
    others = rows_of(up, "up")
    grid, meta = _grid(gate, rows)
    _forward_kernel[grid](gate, up, out, *rows.walk, *others.walk, gate.shape[-1], **meta)


def launch_backward(gate: Tensor, up: Tensor, grad: Tensor, gate_grad: Tensor, up_grad: Tensor) -> None:
    """Launch the backward kernel into ``gate_grad`` and ``up_grad``, contiguous."""
    if gate.numel() == 0:
        return
    rows = rows_of(gate, "gate")
    others = rows_of(up, "up")
    grads = rows_of(grad, "grad")
    grid, meta = _grid(gate, rows)
    _backward_kernel[grid](
        gate, up, grad, gate_grad, up_grad, *rows.walk, *others.walk, *grads.walk, gate.shape[-1], **meta
    )


def _product(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu_ref` in one new tensor, for large ones on a CPU cost more to allocate than to fill."""
    return torch.nn.functional.silu(gate.float()).mul_(up.float())


def _checked(gate: Tensor, up: Tensor) -> None:
    for name, tensor in (("gate", gate), ("up", up)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if gate.ndim == 0:
        raise ValueError("gate needs at least one dimension, got a scalar")
    if up.shape != gate.shape:
        raise ValueError(f"up must have the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}")


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    _checked(gate, up)
    if not runs_triton(gate, up):
        return _product(gate, up).to(gate.dtype).contiguous()
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    launch_forward(gate, up, out)
    return out


def _swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_triton(gate, up, grad):
        wide, wide_grad = gate.float(), grad.float()
        up_grad = torch.nn.functional.silu(wide).mul_(wide_grad)
        gate_grad = torch.ops.aten.silu_backward(wide_grad * up.float(), wide)
        return gate_grad.to(gate.dtype).contiguous(), up_grad.to(up.dtype).contiguous()
    gate_grad = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    up_grad = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    launch_backward(gate, up, walkable(grad), gate_grad, up_grad)
    return gate_grad, up_grad


_backward_op = _ops.register(
    "swiglu_backward",
    _swiglu_backward,
    lambda gate, up, grad: (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(up.shape, dtype=up.dtype, device=up.device),
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_op = _ops.register(
    "swiglu",
    _swiglu,
    lambda gate, up: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
    backward=lambda ctx, grad: _backward_op(*ctx.saved_tensors, grad),
    setup_context=_save,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, computed in fp32, differentiable.

    Args:
        gate: ``[..., F]``, fp32, bf16 or fp16, unit stride in the last dimension, otherwise any strides two numbers can
            walk: the halves of one ``[..., 2 F]`` product are read where they are.
        up: ``[..., F]``, any of these dtypes.

    Returns:
        ``[..., F]`` in the dtype of ``gate``, contiguous. For the backward only ``gate`` and ``up`` are kept: stock
        SwiGLU keeps ``silu(gate)`` as well, half as much again.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> gate, up = torch.randn(4, 2 * 8192).chunk(2, dim=-1)
        >>> swiglu(gate, up).shape
        torch.Size([4, 8192])

    Source: Shazeer, GLU Variants Improve Transformer (2020). Not yet run on a GPU.
    """
    return _op(gate, up)


def _gated_product(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.autocast(gate.device.type, enabled=False):
        product = _swiglu(gate, up).to(dtype)
        return torch.nn.functional.linear(product, weight.to(dtype), None if bias is None else bias.to(dtype))


def _gated_product_backward(
    gate: Tensor, up: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(gate.device.type, enabled=False):
        rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
        weight_grad = weight.new_empty(0)
        if wants_weight:
            product = _swiglu(gate, up).to(dtype).view(-1, gate.shape[-1])
            weight_grad = torch.mm(rows.t(), product).to(weight.dtype)
            del product
        wide = torch.mm(rows, weight.to(dtype)).view(gate.shape)
        return (*_swiglu_backward(gate, up, wide), weight_grad)


_gated_product_backward_op = _ops.register(
    "swiglu_linear_backward",
    _gated_product_backward,
    lambda gate, up, weight, grad, dtype, wants_weight: (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(up.shape, dtype=up.dtype, device=up.device),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    ),
)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, weight, ctx.bias, ctx.dtype = inputs
    ctx.bias = None if ctx.bias is None else ctx.bias.dtype
    ctx.save_for_backward(gate, up, weight)


def _gated_product_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_weight = ctx.needs_input_grad[2]
    gate_grad, up_grad, weight_grad = _gated_product_backward_op(*ctx.saved_tensors, grad, ctx.dtype, wants_weight)
    bias_grad = None if ctx.bias is None else grad.flatten(0, -2).sum(0).to(ctx.bias)
    return gate_grad, up_grad, weight_grad if wants_weight else None, bias_grad, None


_gated_product_op = _ops.register(
    "swiglu_linear",
    _gated_product,
    lambda gate, up, weight, bias, dtype: gate.new_empty((*gate.shape[:-1], weight.shape[0]), dtype=dtype),
    backward=_gated_product_grads,
    setup_context=_save_linear,
)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(silu(gate) * up, weight, bias)`` that keeps only ``gate`` and ``up`` for its backward.

    The product is computed again where the gradient of ``weight`` needs it. Stock keeps ``silu(gate)`` and the product as
    well: of a depth decoder's activations 71 % are these four, and half of them go.

    Args:
        gate: ``[..., F]``, at least two dimensions.
        up: ``[..., F]``.
        weight: ``[D, F]``, of the down projection.
        bias: ``[D]`` or None.

    Returns:
        ``[..., D]`` in the dtype of ``gate``, under autocast in autocast's.

    Raises:
        ValueError: shapes or dtypes do not fit; the message names the argument.

    Example:
        >>> gate, up = torch.randn(4, 2 * 8192).chunk(2, dim=-1)
        >>> swiglu_linear(gate, up, torch.randn(1024, 8192)).shape
        torch.Size([4, 1024])

    Source: as :func:`swiglu`; the recomputation as in Unsloth's LoRA MLP. Not yet run on a GPU.
    """
    _checked(gate, up)
    if gate.ndim < 2:
        raise ValueError(f"gate must have at least two dimensions, got {tuple(gate.shape)}")
    if weight.ndim != 2 or weight.shape[1] != gate.shape[-1]:
        raise ValueError(f"weight must be [D, {gate.shape[-1]}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    kind = gate.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else gate.dtype
    if dtype == gate.dtype and weight.dtype != dtype and not torch.is_autocast_enabled(kind):
        raise ValueError(f"weight must have the dtype of gate, {dtype}, got {weight.dtype}")
    return _gated_product_op(gate, up, weight, bias, dtype)


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of :func:`swiglu`, before its last rounding: ``silu(gate) * up`` in fp32.

    Args:
        gate: ``[..., F]``.
        up: ``[..., F]``.

    Returns:
        ``[..., F]`` fp32.

    Source: Shazeer, GLU Variants Improve Transformer (2020).
    """
    return torch.nn.functional.silu(gate.float()) * up.float()
