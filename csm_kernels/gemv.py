"""Decode matrix-vector product, M = 1 to 16 rows.

``gemv`` and ``gemv_swiglu`` run the Triton kernels of :mod:`csm_kernels.gemv_kernel` on a GPU; ``gemv_ref`` and
``gemv_swiglu_ref`` are the specification. ``gemv_streamed`` is the same sum written for ``torch.compile`` on a CPU: as
multiply-and-sum it becomes one loop that reads the weights once, converts in registers and never writes a widened copy.

Numbers behind the form, 2 cores of a Xeon with AVX-512, torch 2.11, 2026-11-22, machine streaming 25 to 28 GB/s:

- One row of 1024 at a time is one chain of dependent adds and one memory stream, 18 GB/s in bf16 and 9.5 in int8; two
  rows from far apart are two of each, and gate and up, which Inductor fuses into one loop, four: 27 GB/s in bf16, where
  four rows of each, eight streams, spill registers and reach 24. Neighbouring rows lose: the prefetchers want distance.
- A sum over more than 4096 terms makes Inductor add in cascades: 19 GB/s at 1024 x 8192, 28 without.
- What is computed before (norm, SwiGLU) must be in memory, or every row of the product computes it again.
- ``F.linear`` in bf16: 14 GB/s. Native code with software prefetch: 32 to 36.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels import _ops
from csm_kernels._compiled import in_memory
from csm_kernels._target import runs_triton
from csm_kernels.gemv_kernel import MAX_ROWS, is_transposed, launch_gemv, launch_gemv_swiglu, workspace_size
from csm_kernels.norm import rms_norm_ref
from csm_kernels.quant import QuantWeight, dequantize, format_of
from csm_kernels.swiglu import swiglu_ref

_MAX_UNROLLED_ROWS = 16
_LONGEST_SUM = 4096


def gemv_streamed(x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with fp32 accumulation, one pass over the weights for all rows.

    Args:
        x: ``[M, K]`` fp32, M from 1 to 16.
        weight: ``[N, K]`` fp32, bf16 or fp16, or a :class:`~csm_kernels.quant.QuantWeight`.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]`` fp32.

    Meant to be traced by ``torch.compile``; eagerly it is correct and slow.
    """
    rows, width = x.shape
    data = weight.data if isinstance(weight, QuantWeight) else weight
    if rows > _MAX_UNROLLED_ROWS:
        out = x @ dequantize(weight).t()
        return out if bias is None else out + bias.float()
    if isinstance(weight, QuantWeight) and data.dtype == torch.uint8:
        out = _int4_sums(x, weight)
        return out if bias is None else out + bias.float()
    x = in_memory(x)
    height = data.shape[0]
    streams = 2 if rows <= 2 and height > 1 else 1
    # One reduction per (row, block): Inductor puts reductions of equal size over the same input into one loop, so that
    # a weight is loaded and widened once for all rows. The odd row that is left over is a block of its own.
    blocks = [data[i * (height // streams) : (i + 1) * (height // streams)] for i in range(streams)]
    if height % streams:
        blocks.append(data[height // streams * streams :])
    parts = [_chunked_sums(block, x[m]) for m in range(rows) for block in blocks]
    out = torch.cat(parts).view(rows, height)
    if isinstance(weight, QuantWeight):
        out = out * weight.scale
    return out if bias is None else out + bias.float()


def _int4_sums(x: Tensor, weight: QuantWeight) -> Tensor:
    """``[M, N]`` from int4: sums of nibbles times x by group, then a scale each; the levels' offset meets x's own sums.

    Nibbles are taken apart in int32: 0.64 ms at 8192 x 1024, 0.90 in uint8, 19.6 by way of a widened matrix, int8 0.46
    (1 core, torch 2.11, 2026-11-23).
    """
    rows, half = x.shape[0], weight.group // 2
    grouped = in_memory(torch.nn.functional.pad(x, (0, weight.padding)).view(rows, -1, 2, half))
    whole = in_memory(grouped.sum((2, 3)))
    codes = weight.data.unflatten(-1, (-1, half))
    height = codes.shape[0]
    streams = 2 if rows <= 2 and height > 1 else 1
    blocks = [codes[i * (height // streams) : (i + 1) * (height // streams)] for i in range(streams)]
    if height % streams:
        blocks.append(codes[height // streams * streams :])
    sums = []
    for m in range(rows):
        low, high = grouped[m].unbind(1)
        for block in blocks:
            wide = block.to(torch.int32)
            sums.append(((wide & 15).float() * low + (wide >> 4).float() * high).sum(-1))
    parts = in_memory(torch.cat(sums).view(rows, height, -1))
    if weight.symmetric:
        return ((parts - 8.0 * whole[:, None]) * weight.scale.float()).sum(-1)
    step, offset = weight.scale.float().unbind(-1)
    return (parts * step + whole[:, None] * offset).sum(-1)


def _chunked_sums(block: Tensor, row: Tensor) -> Tensor:
    """Row sums in pieces of at most 4096 terms: beyond that Inductor adds in cascades, at two thirds of the speed."""
    width = row.shape[0]
    least = -(-width // _LONGEST_SUM)
    chunks = next((n for n in range(least, 16 * least) if width % n == 0), 1)
    pieces = block.view(block.shape[0], chunks, width // chunks).float() * row.view(chunks, width // chunks)
    return pieces.sum(-1).sum(-1)


def gemv_library(x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> Tensor:
    """The same product by the vendor's matrix library, for eager execution and CUDA graphs of stock ops.

    Activations are rounded to the weight's dtype, as the stock model does; int8 weights are widened to fp32 first.
    Shapes as :func:`gemv_streamed`.
    """
    if isinstance(weight, QuantWeight) and weight.data.dtype == torch.uint8:
        out = torch.nn.functional.linear(x, dequantize(weight).to(x.dtype)).float()
    elif isinstance(weight, QuantWeight):
        out = torch.nn.functional.linear(x, weight.data.to(x.dtype)) * weight.scale
    else:
        out = torch.nn.functional.linear(x.to(weight.dtype), weight).float()
    return out if bias is None else out + bias.float()


def gemv_widened(x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> Tensor:
    """The same with every weight widened to fp32 first, so that no activation is rounded. Shapes as there."""
    return gemv_library(x, weight if isinstance(weight, QuantWeight) else weight.float(), bias)


def _unpacked(weight: Tensor | QuantWeight) -> tuple[Tensor, Tensor | None, int]:
    """As a registered op takes it: tensors and a number."""
    if isinstance(weight, QuantWeight):
        return weight.data, weight.scale, weight.padding
    return weight, None, 0


def _packed(data: Tensor, scale: Tensor | None, padding: int) -> Tensor | QuantWeight:
    return data if scale is None else QuantWeight(data, scale, padding)


def _checked_weight(x: Tensor, weight: Tensor | QuantWeight, name: str, transposed: bool) -> None:
    data = weight.data
    if isinstance(weight, QuantWeight):
        rows = 1 if format_of(weight) != "int4" else 2 if weight.symmetric else 3
        if weight.scale.ndim != rows or weight.scale.shape[0] != data.shape[0] or not weight.scale.is_contiguous():
            raise ValueError(
                f"{name}.scale must be contiguous with a scale for each of {data.shape[0]} rows, got "
                f"{tuple(weight.scale.shape)}"
            )
    elif data.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} must be fp32, bf16, fp16 or a QuantWeight, got {data.dtype}")
    width = weight.width if isinstance(weight, QuantWeight) else data.shape[-1]
    if data.ndim != 2 or width != x.shape[1]:
        raise ValueError(f"{name} must be [N, {x.shape[1]}] for x of {tuple(x.shape)}, got [{data.shape[0]}, {width}]")
    if not (transposed and is_transposed(weight) and (data.stride(0) == 1 or data.shape[0] == 1)):
        _checked_rows(data, name)


def _checked_rows(tensor: Tensor, name: str) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tuple(tensor.stride())}")


def _checked(
    x: Tensor,
    weight: Tensor | QuantWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    out_dtype: torch.dtype,
    name: str = "weight",
) -> None:
    if x.ndim != 2 or not 0 <= x.shape[0] <= MAX_ROWS or x.shape[1] == 0:
        raise ValueError(f"x must be [M, K] with M up to {MAX_ROWS} and K from 1, got {tuple(x.shape)}")
    for what, tensor in (("x", x), ("bias", bias), ("residual", residual), ("norm_weight", norm_weight)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{what} must be fp32, bf16 or fp16, got {tensor.dtype}")
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating point dtype, got {out_dtype}")
    _checked_rows(x, "x")
    _checked_weight(x, weight, name, transposed=name == "weight")
    height = weight.data.shape[0]
    for what, tensor, shape in (
        ("bias", bias, (height,)),
        ("residual", residual, (x.shape[0], height)),
        ("norm_weight", norm_weight, (x.shape[1],)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{what} must be {list(shape)}, got {tuple(tensor.shape)}")
        if tensor is not None:
            _checked_rows(tensor, what)


def _gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    padding: int,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    matrix = _packed(weight, scale, padding)
    _checked(x, matrix, bias, residual, norm_weight, out_dtype)
    if not runs_triton(x, weight, scale, bias, residual, norm_weight):
        return gemv_ref(x, matrix, bias, residual, norm_weight, eps).to(out_dtype)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    size = workspace_size(x, matrix, norm_weight is not None)
    workspace = torch.empty(size, dtype=torch.float32, device=x.device) if size else None
    launch_gemv(x, matrix, bias, residual, norm_weight, eps, out, workspace)
    return out


def _gemv_swiglu(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor | None,
    up: Tensor,
    up_scale: Tensor | None,
    padding: int,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    first, second = _packed(gate, gate_scale, padding), _packed(up, up_scale, padding)
    _checked(x, first, None, None, norm_weight, out_dtype, "gate")
    _checked(x, second, None, None, norm_weight, out_dtype, "up")
    for what in ("data", "scale"):
        a, b = getattr(first, what, None), getattr(second, what, None)
        if a is not None and b is not None and (a.shape != b.shape or a.dtype != b.dtype):
            raise ValueError(
                f"up must have the shape and format of gate: its {what} is {b.dtype} {tuple(b.shape)}, that of gate "
                f"{a.dtype} {tuple(a.shape)}"
            )
    if not runs_triton(x, gate, gate_scale, up, up_scale, norm_weight):
        return gemv_swiglu_ref(x, first, second, norm_weight, eps).to(out_dtype)
    out = torch.empty(x.shape[0], gate.shape[0], dtype=out_dtype, device=x.device)
    launch_gemv_swiglu(x, first, second, norm_weight, eps, out)
    return out


_gemv_op = _ops.register(
    "gemv",
    _gemv,
    lambda x, weight, scale, padding, bias, residual, norm_weight, eps, out_dtype: x.new_empty(
        x.shape[0], weight.shape[0], dtype=out_dtype
    ),
)
_gemv_swiglu_op = _ops.register(
    "gemv_swiglu",
    _gemv_swiglu,
    lambda x, gate, gate_scale, up, up_scale, padding, norm_weight, eps, out_dtype: x.new_empty(
        x.shape[0], gate.shape[0], dtype=out_dtype
    ),
)


def gemv(
    x: Tensor,
    weight: Tensor | QuantWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``residual + bias + rms_norm(x) @ weight.T`` for a few rows, each of the three optional, in one launch or two.

    Args:
        x: ``[M, K]`` fp32, bf16 or fp16, M up to 16, unit stride in the last dimension.
        weight: ``[N, K]`` fp32, bf16 or fp16, unit stride in the last dimension, or in the first as a transposed view
            has it, or a :class:`~csm_kernels.quant.QuantWeight` of any format.
        bias: ``[N]``.
        residual: ``[M, N]``, added in fp32.
        norm_weight: ``[K]``; where given, x is normalised over K first, as :func:`~csm_kernels.norm.rms_norm` does.
        eps: the norm's, added to the mean square.
        out_dtype: dtype of the result, fp32 where None.

    Returns:
        ``[M, N]``, contiguous. Sums are fp32. For int4 at any M, and from M = 3 on for all formats but fp32 and all
        weights but transposed ones, x (times ``norm_weight``) is rounded to bf16 for the tensor cores, with fp16 weights
        to tf32; otherwise nothing is rounded. No gradients.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; the message names the argument.

    Example:
        >>> gemv(torch.randn(1, 1024), torch.randn(2051, 1024)).shape
        torch.Size([1, 2051])

    Source: the fused decode phases of public single-batch engines, gpt-fast among them. Not yet run on a GPU.
    """
    return _gemv_op(x, *_unpacked(weight), bias, residual, norm_weight, eps, out_dtype or torch.float32)


def gemv_swiglu(
    x: Tensor,
    gate: Tensor | QuantWeight,
    up: Tensor | QuantWeight,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, both products in one launch, x optionally normalised first.

    Args:
        x: ``[M, K]``, as in :func:`gemv`.
        gate: ``[F, K]``, as the weight there.
        up: ``[F, K]`` in the format of ``gate``.
        norm_weight: ``[K]``, as there.
        eps: as there.
        out_dtype: as there.

    Returns:
        ``[M, F]``, contiguous; what is rounded is said there.

    Raises:
        ValueError: as there, and where gate and up differ in shape or format.

    Source: Shazeer, GLU Variants Improve Transformer (2020). Not yet run on a GPU.
    """
    first, second = _unpacked(gate), _unpacked(up)
    if isinstance(gate, QuantWeight) != isinstance(up, QuantWeight) or first[2] != second[2]:
        raise ValueError(f"up must have the format of gate, {format_of(gate)}, got {format_of(up)}")
    return _gemv_swiglu_op(x, *first[:2], *second[:2], first[2], norm_weight, eps, out_dtype or torch.float32)


def gemv_ref(
    x: Tensor,
    weight: Tensor | QuantWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The specification: ``residual + bias + rms_norm(x) @ dequantize(weight).T``, all fp32; as :func:`gemv`, any M."""
    x = x.float() if norm_weight is None else rms_norm_ref(x, norm_weight, eps)
    out = x @ dequantize(weight).t()
    if bias is not None:
        out = out + bias.float()
    return out if residual is None else out + residual.float()


def gemv_swiglu_ref(
    x: Tensor,
    gate: Tensor | QuantWeight,
    up: Tensor | QuantWeight,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The specification of :func:`gemv_swiglu`, fp32 out. Shapes as there."""
    x = x.float() if norm_weight is None else rms_norm_ref(x, norm_weight, eps)
    return swiglu_ref(gemv_ref(x, gate), gemv_ref(x, up))
