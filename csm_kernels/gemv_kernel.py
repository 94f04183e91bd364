"""Launchers of the decode matrix-vector product; :mod:`csm_kernels.gemv` is the op.

The plain kernel (:mod:`csm_kernels._gemv_plain`) takes fp32 weights at any M and the other formats but int4 at M <= 2;
the tensor-core kernel (:mod:`csm_kernels._gemv_tensor`) takes int4 at any M, where unpacking leaves no room for fp32
arithmetic, and the rest from M = 3 on. No atomics: the same result every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_kernels._gemv_plain import plain_kernel
from csm_kernels._gemv_tensor import sum_kernel, tensor_kernel
from csm_kernels._target import device_facts, inline_ptx, triton
from csm_kernels._tiles import tiles
from csm_kernels.quant import QuantWeight, format_of

MAX_ROWS = 16

_PLAIN_ROWS = 2
_PROCESSORS = 132  # of an H100, for launches that are only compiled
_SUM_BLOCK = 256


class _Plan(NamedTuple):
    """How a product is launched."""

    tensor_cores: bool
    programs: int
    splits: int
    sizes: dict[str, int]


def _plan(x: Tensor, weight: Tensor | QuantWeight, normed: bool, matrices: int) -> _Plan:
    """The kernel, and its tiles by format and shape; heuristics until there are measurements."""
    rows, width = x.shape
    fmt, height = format_of(weight), weight.data.shape[0]
    processors = device_facts(x.device.index or 0).processors if x.is_cuda else _PROCESSORS
    shape = {"M": rows, "N": height, "K": width, "format": fmt, "matrices": matrices}
    if is_transposed(weight):
        sizes = tiles("gemv_transposed", x, shape, _transposed_tiles(width, processors))
        return _Plan(False, min(triton.cdiv(height, sizes["BLOCK_N"]), sizes.pop("PROGRAMS")), 1, sizes)
    if fmt == "float32" or (fmt != "int4" and rows <= _PLAIN_ROWS):
        sizes = tiles("gemv_plain", x, shape, _plain_tiles(height, width, weight.data.itemsize, matrices, processors))
        return _Plan(False, min(triton.cdiv(height, sizes["BLOCK_N"]), sizes.pop("PROGRAMS")), 1, sizes)
    depth = weight.group // 2 if isinstance(weight, QuantWeight) and fmt == "int4" else 64
    split = not normed and matrices == 1  # a program needs all of a row of x to know its norm
    sizes = tiles("gemv_tensor", x, shape, _tensor_tiles(rows, height, width, depth, fmt, split, processors))
    return _Plan(True, triton.cdiv(height, sizes["BLOCK_N"]), sizes.pop("SPLITS"), sizes)


def _plain_tiles(height: int, width: int, itemsize: int, matrices: int, processors: int) -> dict[str, int]:
    """Up to K = 2048 a thread keeps 32 values of x and asks for 128 bytes of weights at once.

    One or two warps then share a row, so that its sum needs no or few exchanges: with four, the sums took as many
    instructions as the products. Longer rows are summed in blocks by four warps, 32 sums in a thread.
    """
    block_k = min(triton.next_power_of_2(width), 2048)
    if width > block_k:
        block_n, warps, wanted = 2 // matrices, 4, 2 * processors
    else:
        block_n, warps = max(1, 4 // (itemsize * matrices)), 1 if block_k <= 1024 else 2
        wanted = 4 * processors // warps
    block_n = _fewer(block_n, height, wanted)
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "STAGES": 1,
        "PROGRAMS": 16 * processors // warps,
        "num_warps": warps,
    }


def _transposed_tiles(width: int, processors: int) -> dict[str, int]:
    """16 rows side by side are a sector of 32 bytes in bf16: 129 programs for a head of 2051."""
    block_k = min(triton.next_power_of_2(width), 128)
    return {"BLOCK_N": 16, "BLOCK_K": block_k, "STAGES": 1, "PROGRAMS": 4 * processors, "num_warps": 4}


def is_transposed(weight: Tensor | QuantWeight) -> bool:
    """Whether a matrix is stored column by column: the transposed view of a contiguous one."""
    return isinstance(weight, Tensor) and weight.shape[1] > 1 and weight.stride(1) != 1


def _tensor_tiles(
    rows: int, height: int, width: int, depth: int, fmt: str, split: bool, processors: int
) -> dict[str, int]:
    """Four slices of K, or what makes 256 bytes of int4 rows; K is split until there are two programs per processor."""
    slices = max(4, 256 // depth) if fmt == "int4" else 4
    block_n = max(16, _fewer(32, height, 2 * processors))
    programs = triton.cdiv(height, block_n)
    chunks = triton.cdiv(width, slices * depth * (2 if fmt == "int4" else 1))
    return {
        "BLOCK_M": 8 if rows <= 8 else 16,
        "BLOCK_N": block_n,
        "SLICES": slices,
        "DEPTH": depth,
        "NORM_BLOCK": 512,
        "STAGES": 3,
        "SPLITS": max(1, min(chunks // 2, 8, triton.cdiv(2 * processors, programs))) if split else 1,
        "num_warps": 4,
    }


def _fewer(block: int, height: int, wanted: int) -> int:
    while block > 1 and triton.cdiv(height, block) < wanted:
        block //= 2
    return block


def workspace_size(x: Tensor, weight: Tensor | QuantWeight, normed: bool = False) -> int:
    """How many fp32 numbers :func:`launch_gemv` wants for partial sums, 0 where it sums along K in one program.

    Args:
        x: as there.
        weight: as there.
        normed: whether there will be a ``norm_weight``.
    """
    splits = _plan(x, weight, normed, 1).splits
    return splits * x.shape[0] * weight.data.shape[0] if splits > 1 else 0


def _launch(
    x: Tensor,
    weights: tuple[Tensor | QuantWeight, ...],
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out: Tensor,
    workspace: Tensor | None,
    evict_first: bool,
) -> None:
    data = [weight.data for weight in weights]
    scales = [weight.scale if isinstance(weight, QuantWeight) else None for weight in weights]
    (rows, width), height = x.shape, data[0].shape[0]
    if rows == 0 or height == 0:
        return
    fmt = format_of(weights[0])
    plan = _plan(x, weights[0], norm_weight is not None, len(weights))
    splits = 1 if workspace is None else plan.splits
    parts = out
    if workspace is not None and splits > 1:
        if (
            workspace.dtype != torch.float32
            or not workspace.is_contiguous()
            or workspace.numel() < splits * out.numel()
        ):
            raise ValueError(
                f"workspace must be contiguous fp32 with {splits * out.numel()} elements, got {workspace.dtype} of "
                f"{tuple(workspace.shape)}"
            )
        parts = workspace
    pointers = (
        x,
        data[0],
        data[-1],
        scales[0],
        scales[-1],
        bias if splits == 1 else None,
        residual if splits == 1 else None,
        norm_weight,
        parts,
    )
    strides = (
        x.stride(0),
        data[0].stride(0),
        data[-1].stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0) if splits == 1 else height,
    )
    transposed = is_transposed(weights[0])
    options: dict[str, Any] = {
        "HAS_SCALE": fmt in ("int8", "fp8"),
        "HAS_BIAS": bias is not None and splits == 1,
        "HAS_RESIDUAL": residual is not None and splits == 1,
        "HAS_NORM": norm_weight is not None,
        "HAS_UP": len(weights) == 2,
        "EVICTION": "evict_first" if evict_first else "",
        **plan.sizes,
    }
    if not plan.tensor_cores:
        block = plan.sizes["BLOCK_K"]
        options.update(ONCE=block >= width, WHOLE=width % block == 0, TRANSPOSED=transposed)
        column_stride = data[0].stride(1) if transposed else 1
        plain_kernel[(rows, plan.programs)](*pointers, height, width, *strides, column_stride, eps, **options)
        return
    stored = plan.sizes["SLICES"] * plan.sizes["DEPTH"]
    span = 2 * stored if fmt == "int4" else stored
    scale = scales[0]
    symmetric = not isinstance(weights[0], QuantWeight) or weights[0].symmetric
    tensor_kernel[(plan.programs, splits)](
        *pointers,
        rows,
        height,
        width,
        *strides,
        0 if scale is None else scale.stride(0),
        eps,
        triton.cdiv(triton.cdiv(width, span), splits),
        INT4=fmt == "int4",
        SYMMETRIC=symmetric,
        TF32=fmt == "float16",
        UNPACK=inline_ptx(),
        WHOLE=width % span == 0,
        **options,
    )
    if splits > 1:
        sum_kernel[(rows, triton.cdiv(height, _SUM_BLOCK))](
            parts,
            bias,
            residual,
            out,
            rows,
            height,
            strides[3],
            out.stride(0),
            splits,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK=_SUM_BLOCK,
            num_warps=2,
        )


def launch_gemv(
    x: Tensor,
    weight: Tensor | QuantWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out: Tensor,
    workspace: Tensor | None = None,
    evict_first: bool = False,
) -> None:
    """Launch the product into ``out``, ``[M, N]``, any float dtype; arguments as :func:`csm_kernels.gemv.gemv`.

    ``workspace`` holds partial sums, :func:`workspace_size` fp32 numbers; with None a program sums all of K, which leaves
    processors idle where N is small. ``evict_first`` is for weights the cache cannot keep until they are read again.
    """
    _launch(x, (weight,), bias, residual, norm_weight, eps, out, workspace, evict_first)


def launch_gemv_swiglu(
    x: Tensor,
    gate: Tensor | QuantWeight,
    up: Tensor | QuantWeight,
    norm_weight: Tensor | None,
    eps: float,
    out: Tensor,
    evict_first: bool = False,
) -> None:
    """Launch ``silu(gate x) * (up x)`` into ``out``, ``[M, F]``; arguments as :func:`csm_kernels.gemv.gemv_swiglu`."""
    _launch(x, (gate, up), None, None, norm_weight, eps, out, None, evict_first)
