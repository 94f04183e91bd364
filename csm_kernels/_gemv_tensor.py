"""Decode product on tensor cores.

x, times the norm's weight where there is one, is rounded to bf16; weights are exact in bf16 (int4 as its 16 levels,
scaled afterwards in fp32); sums are fp32. With fp16 weights both operands are tf32 instead, which holds fp16 exactly and
has the range of fp32. K is cut into slices, the batch dimension of ``tl.dot``, so that 16 weight rows are enough work for
4 warps and a group's scale multiplies the sum of its slice.
"""

from __future__ import annotations

from csm_kernels._gemv_plain import finish, load_wide, x_at
from csm_kernels._target import tl, triton


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
def nibbles(packed, SYMMETRIC: tl.constexpr, UNPACK: tl.constexpr):
    """Low and high nibbles of bytes in bf16, from -8 on where SYMMETRIC, else from 0."""
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
    return low, high


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
        low, high = nibbles(packed, SYMMETRIC, UNPACK)
        part = tl.dot(high, x_high, tl.dot(low, x_low))
        if SYMMETRIC:
            total += part * tl.load(scale_ptr, mask=inside_groups, other=0.0).to(tl.float32)
        else:
            step = tl.load(scale_ptr, mask=inside_groups, other=0.0).to(tl.float32)
            offset = tl.load(scale_ptr + 1, mask=inside_groups, other=0.0).to(tl.float32)
            sums = tl.sum(x_low.to(tl.float32), 1) + tl.sum(x_high.to(tl.float32), 1)
            total += part * step + offset * sums[:, None, :]
        return total
    weight = load_wide(tile_ptr, inside, WHOLE, EVICTION).to(x_low.dtype)
    return tl.dot(weight, x_low, total, input_precision="tf32")


@triton.jit
def tensor_kernel(
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
    each. With more than one program along K, ``out`` is ``[splits, M, N]`` fp32 and :func:`sum_kernel` finishes.
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
        x_low = x_at(x_tile, norm_ptr, start + x_column, width, HAS_NORM, WHOLE)[1].to(KIND)
        x_high = x_low
        if INT4:
            x_high = x_at(x_tile, norm_ptr, start + DEPTH + x_column, width, HAS_NORM, WHOLE)[1].to(KIND)
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
    finish(
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
def sum_kernel(
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
    finish(
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
