"""The Triton kernels of the decode matrix-vector product, and their launchers; :mod:`csm_kernels.gemv` is the op.

On the plain kernel every weight is widened to fp32 and multiplied there: nothing is rounded, and at one or two rows of
x that is 4 to 5 instructions per weight (sm_90), less than the memory's time. It takes fp32 weights at any M and the
other formats but int4 at M <= 2.

The tensor-core kernel takes int4 at any M, where unpacking leaves no room for fp32 arithmetic, and the rest from M = 3
on. There x, times the norm's weight where there is one, is rounded to bf16; weights are exact in bf16 (int4 as its 16
levels, scaled afterwards in fp32); sums are fp32. With fp16 weights both operands are tf32 instead, which holds fp16
exactly and has the range of fp32. K is cut into slices, the batch dimension of ``tl.dot``, so that 16 weight rows are
enough work for 4 warps and a group's scale multiplies the sum of its slice.

No atomics: the same result every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_kernels._target import device_facts, interpreting, tl, triton
from csm_kernels._tiles import tiles
from csm_kernels.quant import QuantWeight, format_of

MAX_ROWS = 16

_PLAIN_ROWS = 2
_PROCESSORS = 132  # of an H100, for launches that are only compiled
_SUM_BLOCK = 256


def _unpacking(bias: str) -> str:
    """Four bytes to their low and their high nibbles in bf16: 0x43 above a nibble is 128 + nibble, ``bias`` is added."""
    return f"""{{
        .reg .b32 low, high, one, bias, a, b, c, d;
        and.b32 low, $4, 0x0F0F0F0F;
        shr.u32 high, $4, 4;
        and.b32 high, high, 0x0F0F0F0F;
        prmt.b32 a, low, 0x43434343, 0x4140;
        prmt.b32 b, low, 0x43434343, 0x4342;
        prmt.b32 c, high, 0x43434343, 0x4140;
        prmt.b32 d, high, 0x43434343, 0x4342;
        mov.b32 one, 0x3F803F80;
        mov.b32 bias, {bias};
        fma.rn.bf16x2 $0, a, one, bias;
        fma.rn.bf16x2 $1, b, one, bias;
        fma.rn.bf16x2 $2, c, one, bias;
        fma.rn.bf16x2 $3, d, one, bias;
    }}"""


# 11 instructions for 8 weights, where the compiler takes 26 for the same arithmetic on single values (triton 3.6, sm_90).
_UNPACK_SIGNED = tl.constexpr(_unpacking("0xC308C308"))  # -136: nibble - 8
_UNPACK_UNSIGNED = tl.constexpr(_unpacking("0xC300C300"))  # -128


@triton.jit
def _load(pointer, mask, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    """fp32, 0 where masked: fp8 takes no ``other``, and what was not loaded may be NaN."""
    if WHOLE:
        return tl.load(pointer, eviction_policy=EVICTION).to(tl.float32)
    value = tl.load(pointer, mask=mask, eviction_policy=EVICTION).to(tl.float32)
    return tl.where(mask, value, 0.0)


@triton.jit
def _x_at(x_ptr, norm_ptr, columns, width, HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):
    """A piece of a row of x: as it is, and times the norm's weight."""
    inside = columns < width
    x = _load(x_ptr + columns, inside, WHOLE, "")
    weighted = x
    if HAS_NORM:
        weighted = x * _load(norm_ptr + columns, inside, WHOLE, "")
    return x, weighted


@triton.jit
def _finish(
    total,
    up,
    row,
    m,
    keep,
    bias_ptr,
    residual_ptr,
    residual_stride,
    out_ptr,
    out_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_UP: tl.constexpr,
):
    """The epilogue, fp32 until the store; ``row``, ``m`` and ``keep`` broadcast to the shape of ``total``."""
    if HAS_UP:
        total = total / (1.0 + tl.exp(-total)) * up
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=keep, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + m * residual_stride + row, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * out_stride + row, total.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _plain_kernel(
    x_ptr,
    weight_ptr,
    up_ptr,
    scale_ptr,
    up_scale_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    height,
    width,
    x_stride,
    weight_stride,
    up_stride,
    residual_stride,
    out_stride,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_UP: tl.constexpr,
    ONCE: tl.constexpr,
    WHOLE: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row of x, tiles ``pid, pid + programs, ...`` of the weight's rows; all of it in fp32.

    ONCE: a row of x is one block and is read once for all tiles. The rows of x are neighbouring programs, so that the
    second finds the weights in the cache. The norm's 1/rms is found beside the sums and multiplies them at the end.
    """
    m = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m * x_stride
    factor = 1.0
    if ONCE:
        raw, x = _x_at(x_row, norm_ptr, columns, width, HAS_NORM, WHOLE)
        if HAS_NORM:
            factor = tl.rsqrt(tl.sum(raw * raw, 0) / width + eps)
    for tile in tl.range(tl.program_id(1), tl.cdiv(height, BLOCK_N), tl.num_programs(1), num_stages=STAGES):
        row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        safe = tl.minimum(row, height - 1).to(tl.int64)
        weight_tile = weight_ptr + safe[:, None] * weight_stride + columns[None, :]
        if HAS_UP:
            up_tile = up_ptr + safe[:, None] * up_stride + columns[None, :]
        if ONCE:
            inside = (columns < width)[None, :]
            total = tl.sum(_load(weight_tile, inside, WHOLE, EVICTION) * x[None, :], 1)
            up = total
            if HAS_UP:
                up = tl.sum(_load(up_tile, inside, WHOLE, EVICTION) * x[None, :], 1)
        else:
            sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            ups = sums
            squares = tl.zeros((BLOCK_K,), tl.float32)
            for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
                inside = (start + columns < width)[None, :]
                raw, x = _x_at(x_row, norm_ptr, start + columns, width, HAS_NORM, WHOLE)
                sums += _load(weight_tile + start, inside, WHOLE, EVICTION) * x[None, :]
                if HAS_UP:
                    ups += _load(up_tile + start, inside, WHOLE, EVICTION) * x[None, :]
                if HAS_NORM:
                    squares += raw * raw
            total, up = tl.sum(sums, 1), tl.sum(ups, 1)
            if HAS_NORM:
                factor = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        total *= factor
        up *= factor
        if HAS_SCALE:
            total *= tl.load(scale_ptr + safe)
            if HAS_UP:
                up *= tl.load(up_scale_ptr + safe)
        _finish(
            total,
            up,
            row,
            m,
            row < height,
            bias_ptr,
            residual_ptr,
            residual_stride,
            out_ptr,
            out_stride,
            HAS_BIAS,
            HAS_RESIDUAL,
            HAS_UP,
        )


@triton.jit
def _slices_dot(
    total,
    tile_ptr,
    scale_ptr,
    x_low,
    x_high,
    inside,
    inside_groups,
    INT4: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    UNPACK: tl.constexpr,
    WHOLE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """``total`` plus the product of one tile, ``[slices, rows, depth] x [slices, depth, M]``, slice by slice."""
    if INT4:
        if WHOLE:
            packed = tl.load(tile_ptr, eviction_policy=EVICTION)
        else:
            packed = tl.load(tile_ptr, mask=inside_groups, other=0, eviction_policy=EVICTION)
        if UNPACK:
            low, high = tl.inline_asm_elementwise(
                _UNPACK_SIGNED if SYMMETRIC else _UNPACK_UNSIGNED,
                "=r,=r,=r,=r,r",
                [packed],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            zero = 8 if SYMMETRIC else 0
            low = ((packed & 15).to(tl.int32) - zero).to(tl.bfloat16)
            high = ((packed >> 4).to(tl.int32) - zero).to(tl.bfloat16)
        part = tl.dot(high, x_high, tl.dot(low, x_low))
        if SYMMETRIC:
            total += part * tl.load(scale_ptr, mask=inside_groups, other=0.0).to(tl.float32)
        else:
            step = tl.load(scale_ptr, mask=inside_groups, other=0.0).to(tl.float32)
            offset = tl.load(scale_ptr + 1, mask=inside_groups, other=0.0).to(tl.float32)
            sums = tl.sum(x_low.to(tl.float32), 1) + tl.sum(x_high.to(tl.float32), 1)
            total += part * step + offset * sums[:, None, :]
        return total
    weight = _load(tile_ptr, inside, WHOLE, EVICTION).to(x_low.dtype)
    return tl.dot(weight, x_low, total, input_precision="tf32")


@triton.jit
def _tensor_kernel(
    x_ptr,
    weight_ptr,
    up_ptr,
    scale_ptr,
    up_scale_ptr,
    bias_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    rows,
    height,
    width,
    x_stride,
    weight_stride,
    up_stride,
    residual_stride,
    out_stride,
    scale_stride,
    eps,
    chunks,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_UP: tl.constexpr,
    INT4: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TF32: tl.constexpr,
    UNPACK: tl.constexpr,
    WHOLE: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of weight rows for all rows of x; program ``(i, s)`` sums ``chunks`` chunks of K from ``s * chunks`` on.

    A chunk is SLICES slices, a slice DEPTH stored elements of a weight row: columns, or bytes with two columns of a group
    each. With more than one program along K, ``out`` is ``[splits, M, N]`` fp32 and :func:`_sum_kernel` finishes.
    """
    SPAN: tl.constexpr = DEPTH * (2 if INT4 else 1)
    KIND: tl.constexpr = tl.float32 if TF32 else tl.bfloat16
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(row, height - 1).to(tl.int64)[None, :, None]
    m = tl.arange(0, BLOCK_M)
    slices = tl.arange(0, SLICES)[:, None, None]
    depth = tl.arange(0, DEPTH)
    x_tile = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[None, None, :] * x_stride
    x_column = slices * SPAN + depth[None, :, None]
    w_column = slices * DEPTH + depth[None, None, :]
    weight_tile = weight_ptr + safe * weight_stride + w_column
    group = slices * (1 if SYMMETRIC else 2)
    scale_tile = scale_ptr + safe * scale_stride + group if INT4 else weight_tile
    if HAS_UP:
        up_tile = up_ptr + safe * up_stride + w_column
        up_scale_tile = up_scale_ptr + safe * scale_stride + group if INT4 else up_tile
    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    up = total
    first = tl.program_id(1) * chunks
    last = tl.minimum(first + chunks, tl.cdiv(width, SLICES * SPAN))
    for chunk in tl.range(first, last, num_stages=STAGES):
        start = chunk * (SLICES * SPAN)
        x_low = _x_at(x_tile, norm_ptr, start + x_column, width, HAS_NORM, WHOLE)[1].to(KIND)
        x_high = x_low
        if INT4:
            x_high = _x_at(x_tile, norm_ptr, start + DEPTH + x_column, width, HAS_NORM, WHOLE)[1].to(KIND)
        at = chunk * (SLICES * DEPTH)
        g = chunk * SLICES * (1 if SYMMETRIC else 2)
        inside = start + w_column < width
        inside_groups = start + slices * SPAN < width
        total = _slices_dot(
            total,
            weight_tile + at,
            scale_tile + g,
            x_low,
            x_high,
            inside,
            inside_groups,
            INT4,
            SYMMETRIC,
            UNPACK,
            WHOLE,
            EVICTION,
        )
        if HAS_UP:
            up = _slices_dot(
                up,
                up_tile + at,
                up_scale_tile + g,
                x_low,
                x_high,
                inside,
                inside_groups,
                INT4,
                SYMMETRIC,
                UNPACK,
                WHOLE,
                EVICTION,
            )
    total, up = tl.sum(total, 0), tl.sum(up, 0)
    if HAS_NORM:
        # In the loop above every value of x is in this program padded to BLOCK_M rows and in the layout of the product:
        # squares took a quarter of its instructions there. Here they read x again, from the cache.
        x_rows = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * x_stride
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, width, NORM_BLOCK):
            columns = start + tl.arange(0, NORM_BLOCK)[None, :]
            x = tl.load(x_rows + columns, mask=columns < width, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, 1)
        factor = tl.rsqrt(squares / width + eps)[None, :]
        total *= factor
        up *= factor
    row, m = row[:, None], m.to(tl.int64)[None, :]
    keep = (row < height) & (m < rows)
    if HAS_SCALE:
        total *= tl.load(scale_ptr + row, mask=row < height, other=0.0)
        if HAS_UP:
            up *= tl.load(up_scale_ptr + row, mask=row < height, other=0.0)
    out_part = out_ptr + tl.program_id(1).to(tl.int64) * rows * height
    _finish(
        total,
        up,
        row,
        m,
        keep,
        bias_ptr,
        residual_ptr,
        residual_stride,
        out_part,
        out_stride,
        HAS_BIAS,
        HAS_RESIDUAL,
        HAS_UP,
    )


@triton.jit
def _sum_kernel(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    height,
    residual_stride,
    out_stride,
    splits,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums ``[splits, M, N]`` in their order, and the epilogue."""
    m = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = row < height
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, splits):
        at = (tl.cast(part, tl.int64) * rows + m) * height
        total += tl.load(parts_ptr + at + row, mask=keep, other=0.0)
    _finish(
        total,
        total,
        row,
        m,
        keep,
        bias_ptr,
        residual_ptr,
        residual_stride,
        out_ptr,
        out_stride,
        HAS_BIAS,
        HAS_RESIDUAL,
        False,
    )


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
        options.update(ONCE=block >= width, WHOLE=width % block == 0)
        _plain_kernel[(rows, plan.programs)](*pointers, height, width, *strides, eps, **options)
        return
    stored = plan.sizes["SLICES"] * plan.sizes["DEPTH"]
    span = 2 * stored if fmt == "int4" else stored
    scale = scales[0]
    symmetric = not isinstance(weights[0], QuantWeight) or weights[0].symmetric
    _tensor_kernel[(plan.programs, splits)](
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
        UNPACK=not interpreting(),
        WHOLE=width % span == 0,
        **options,
    )
    if splits > 1:
        _sum_kernel[(rows, triton.cdiv(height, _SUM_BLOCK))](
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
