"""Decode product on plain fp32 arithmetic, and the pieces that it shares with the tensor-core kernel.

Every weight is widened to fp32 and multiplied there: nothing is rounded, and at one or two rows of x that is 4 to 5
instructions per weight (sm_90), less than the memory's time.
"""

from __future__ import annotations

from csm_kernels._target import tl, triton


@triton.jit
def load_wide(pointer, mask, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    """fp32, 0 where masked: fp8 takes no ``other``, and what was not loaded may be NaN."""
    if WHOLE:
        return tl.load(pointer, eviction_policy=EVICTION).to(tl.float32)
    value = tl.load(pointer, mask=mask, eviction_policy=EVICTION).to(tl.float32)
    return tl.where(mask, value, 0.0)


@triton.jit
def x_at(x_ptr, norm_ptr, columns, width, HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):
    """A piece of a row of x: as it is, and times the norm's weight."""
    inside = columns < width
    x = load_wide(x_ptr + columns, inside, WHOLE, "")
    weighted = x
    if HAS_NORM:
        weighted = x * load_wide(norm_ptr + columns, inside, WHOLE, "")
    return x, weighted


@triton.jit
def finish(
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
def plain_kernel(
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
    column_stride,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_UP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ONCE: tl.constexpr,
    WHOLE: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row of x, tiles ``pid, pid + programs, ...`` of the weight's rows; all of it in fp32.

    ONCE: a row of x is one block and is read once for all tiles. TRANSPOSED: the weight's rows are neighbours in memory,
    its columns ``column_stride`` apart, and a tile has enough rows to read whole sectors. The rows of x are neighbouring
    programs, so that the second finds the weights in the cache. The norm's 1/rms is found beside the sums and multiplies
    them at the end.
    """
    m = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m * x_stride
    factor = 1.0
    if ONCE:
        raw, x = x_at(x_row, norm_ptr, columns, width, HAS_NORM, WHOLE)
        if HAS_NORM:
            factor = tl.rsqrt(tl.sum(raw * raw, 0) / width + eps)
    for tile in tl.range(tl.program_id(1), tl.cdiv(height, BLOCK_N), tl.num_programs(1), num_stages=STAGES):
        row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        safe = tl.minimum(row, height - 1).to(tl.int64)
        if TRANSPOSED:
            weight_tile = weight_ptr + safe[:, None] + columns[None, :].to(tl.int64) * column_stride
        else:
            weight_tile = weight_ptr + safe[:, None] * weight_stride + columns[None, :]
        if HAS_UP:
            up_tile = up_ptr + safe[:, None] * up_stride + columns[None, :]
        if ONCE:
            inside = (columns < width)[None, :]
            total = tl.sum(load_wide(weight_tile, inside, WHOLE, EVICTION) * x[None, :], 1)
            up = total
            if HAS_UP:
                up = tl.sum(load_wide(up_tile, inside, WHOLE, EVICTION) * x[None, :], 1)
        else:
            sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            ups = sums
            squares = tl.zeros((BLOCK_K,), tl.float32)
            for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
                inside = (start + columns < width)[None, :]
                raw, x = x_at(x_row, norm_ptr, start + columns, width, HAS_NORM, WHOLE)
                at = tl.cast(start, tl.int64) * column_stride if TRANSPOSED else start
                sums += load_wide(weight_tile + at, inside, WHOLE, EVICTION) * x[None, :]
                if HAS_UP:
                    ups += load_wide(up_tile + start, inside, WHOLE, EVICTION) * x[None, :]
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
        finish(
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
