"""Matrix-vector products of a decode step: tiles of weights, rows of x from wherever a phase finds them, and what becomes of
the result. One function, :func:`product`, on plain fp32 arithmetic or on tensor cores; sums are fp32 in both.
"""

from __future__ import annotations

from csm_kernels._gemv_tensor import nibbles
from csm_kernels._target import tl, triton

STREAM = tl.constexpr(0)
"""The residual stream, times a norm's weight and factor."""
PARTS = tl.constexpr(1)
"""Likewise, after the pieces of O's product have been added."""
PICK = tl.constexpr(2)
"""Likewise, but from the projected embedding of the token just drawn where there is one."""
ACT = tl.constexpr(3)
ATTENDED = tl.constexpr(4)
ENTER = tl.constexpr(5)
"""The backbone's hidden state, or the embedding of a token."""

TO_QKV = tl.constexpr(0)
TO_ACT = tl.constexpr(1)
"""Pairs of rows are gate and up."""
TO_STREAM = tl.constexpr(2)
"""Added to the residual stream."""
TO_STREAM_PARTS = tl.constexpr(3)
"""Likewise, with the pieces of O's product."""
TO_START = tl.constexpr(4)
"""The residual stream begins."""
TO_LOGITS = tl.constexpr(5)


@triton.jit
def matrix_at(pointer, index, t: tl.constexpr):
    """Matrix ``index`` of a stack."""
    return pointer + tl.cast(index, tl.int64) * (t.N * t.STORED)


@triton.jit
def scale_at(pointer, index, t: tl.constexpr):
    """Scales of matrix ``index`` of a stack."""
    return pointer + tl.cast(index, tl.int64) * (t.N * (t.STORED // t.DEPTH if t.FMT == 2 else 1))


@triton.jit
def load_tile(weight, tile, chunk, keep, t: tl.constexpr):
    """One tile as it is stored: ``[BN, BK]``, or ``[SLICES, BN, DEPTH]``; undefined beyond the matrix."""
    rows = tile * t.BN + tl.arange(0, t.BN)
    if t.DOT:
        slices, depth = tl.arange(0, t.SLICES)[:, None, None], tl.arange(0, t.DEPTH)[None, None, :]
        row, column = rows[None, :, None], chunk * (t.SLICES * t.DEPTH) + slices * t.DEPTH + depth
    else:
        row, column = rows[:, None], chunk * t.BK + tl.arange(0, t.BK)[None, :]
    mask = (row < t.N) & keep
    across: tl.constexpr = t.SLICES * t.DEPTH if t.DOT else t.BK
    if t.STORED % across != 0:
        mask = mask & (column < t.STORED)
    if t.SEGMENTS == 1:
        at = row * t.STORED + column
    else:
        width: tl.constexpr = t.STORED // t.SEGMENTS
        at = (column // width * t.N + row) * width + column % width
    return tl.load(weight + at, mask=mask, eviction_policy=t.EVICTION)


@triton.jit
def enter_at(a, m, columns, mask, batch, p, s: tl.constexpr):
    """What the projection is applied to: rows below ``batch`` of the first pass are the backbone's hidden state."""
    b = m % batch
    hidden = (m < batch) & (p == 1)
    token = tl.minimum(tl.maximum(tl.load(a.token + b), 0), (s.CODEBOOKS - 1) * s.V - 1)
    place = tl.minimum((p - 1) * s.V + token, s.CODEBOOKS * s.V - 1)
    state = tl.load(a.hidden + b * s.W + columns, mask=mask & hidden, other=0.0)
    embedded = tl.load(a.embedding + tl.cast(place, tl.int64) * s.W + columns, mask=mask & (hidden == 0), other=0.0)
    return tl.where(hidden, state.to(tl.float32), embedded.to(tl.float32))


@triton.jit
def attended_at(a, m, columns, mask, s: tl.constexpr):
    """The attention's output: shares of the context, brought to one maximum and added in a fixed order."""
    head = m * s.H + columns // s.HD
    place = head * s.SPLITS * s.HD + columns % s.HD
    if s.SPLITS == 1:
        value = tl.load(a.attended + place, mask=mask, other=0.0)
        total = tl.load(a.mass + head, mask=mask, other=1.0)
    else:
        top = tl.load(a.peak + head * s.SPLITS, mask=mask, other=0.0)
        for i in range(1, s.SPLITS):
            top = tl.maximum(top, tl.load(a.peak + head * s.SPLITS + i, mask=mask, other=0.0))
        value = tl.zeros_like(top)
        total = value
        for i in range(0, s.SPLITS):
            shrink = tl.exp(tl.load(a.peak + head * s.SPLITS + i, mask=mask, other=0.0) - top)
            value += tl.load(a.attended + place + i * s.HD, mask=mask, other=0.0) * shrink
            total += tl.load(a.mass + head * s.SPLITS + i, mask=mask, other=1.0) * shrink
    return value / total


@triton.jit
def x_at(a, m, columns, mask, batch, index, first, picked, SOURCE: tl.constexpr, s: tl.constexpr):
    """Elements ``columns`` of row ``m`` of x, fp32, 0 where masked; the two broadcast to the shape wanted.

    ``index`` is the pass for ENTER and the layer for PARTS; ``picked`` the row of the table for PICK, -1 for none.
    """
    if SOURCE == ENTER:
        x = enter_at(a, m, columns, mask, batch, index, s)
    elif SOURCE == ACT:
        x = tl.load(a.act + m * s.F + columns, mask=mask, other=0.0).to(tl.float32)
    elif SOURCE == ATTENDED:
        x = attended_at(a, m, columns, mask, s)
    elif SOURCE == PICK:
        drawn = picked >= 0
        x = tl.load(a.stream + m * s.D + columns, mask=mask & (drawn == 0), other=0.0)
        row = tl.cast(tl.maximum(picked, 0), tl.int64) * s.D
        x = tl.where(drawn, tl.load(a.table + row + columns, mask=mask & drawn, other=0.0).to(tl.float32), x)
    else:
        x = tl.load(a.stream + (first + m) * s.D + columns, mask=mask, other=0.0)
        if SOURCE == PARTS:
            x = with_parts(x, a, m, columns, mask, index, s)
    return x


@triton.jit
def with_parts(x, a, m, columns, mask, l, s: tl.constexpr):
    """``x`` and the pieces of O's product of layer ``l``, in their order."""
    GROUPS: tl.constexpr = s.KV
    for g in tl.static_range(GROUPS):
        x += tl.load(a.parts + (m * s.KV + g) * s.D + columns, mask=mask, other=0.0)
    if a.o_bias is not None:
        x += tl.load(a.o_bias + l * s.D + columns, mask=mask, other=0.0)
    return x


@triton.jit
def store_rows(total, row, m, keep, a, bias, index, SINK: tl.constexpr, s: tl.constexpr, t: tl.constexpr):
    """The result of a tile, ``[BN]`` or ``[BN, BM]``, to where it goes; ``row``, ``m`` and ``keep`` broadcast to it."""
    if bias is not None:
        total += tl.load(bias + row, mask=row < t.N, other=0.0)
    if SINK == TO_QKV:
        tl.store(a.qkv + m * s.NQ + row, total, mask=keep)
    elif SINK == TO_LOGITS:
        tl.store(a.logits + index + m * s.V + row, total, mask=keep)
    elif SINK == TO_START:
        tl.store(a.stream + m * s.D + row, total, mask=keep)
    else:
        x = tl.load(a.stream + m * s.D + row, mask=keep, other=0.0)
        if SINK == TO_STREAM_PARTS:
            x = with_parts(x, a, m, row, keep, index, s)
        tl.store(a.stream + m * s.D + row, x + total, mask=keep)


@triton.jit
def store_act(total, tile, m, rows, a, bias, s: tl.constexpr, t: tl.constexpr):
    """``silu(gate) * up`` of a tile whose rows are gate and up in turn."""
    half: tl.constexpr = t.BN // 2
    BM: tl.constexpr = t.BM
    row = tile * t.BN + tl.arange(0, t.BN)
    out = tile * half + tl.arange(0, half)
    if t.DOT:
        if bias is not None:
            total += tl.load(bias + row, mask=row < t.N, other=0.0)[:, None]
        pairs = tl.permute(tl.reshape(total, (half, 2, BM)), (0, 2, 1))
        out, m = out[:, None], m[None, :]
    else:
        if bias is not None:
            total += tl.load(bias + row, mask=row < t.N, other=0.0)
        pairs = tl.reshape(total, (half, 2))
    gate, up = tl.split(pairs)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(a.act + m * s.F + out, value.to(a.act.dtype.element_ty), mask=(out < s.F) & (m < rows))


@triton.jit
def product(
    weight_tile,
    pid,
    programs,
    rows,
    first,
    batch,
    index,
    picked,
    a,
    weight,
    scale,
    bias,
    norm,
    SOURCE: tl.constexpr,
    SINK: tl.constexpr,
    s: tl.constexpr,
    t: tl.constexpr,
):
    """All tiles of a program, for rows ``first`` to ``first + rows`` of x; ``weight_tile`` is the first, already loaded.

    While a tile is multiplied the next is on its way. ``scale`` stands at the matrix, ``bias`` and ``norm`` likewise or None.
    """
    BN: tl.constexpr = t.BN
    BK: tl.constexpr = t.BK
    BM: tl.constexpr = t.BM
    SLICES: tl.constexpr = t.SLICES
    span: tl.constexpr = t.SLICES * t.DEPTH * (2 if t.FMT == 2 else 1) if t.DOT else BK
    chunks: tl.constexpr = (t.K + span - 1) // span
    tiles: tl.constexpr = (t.N + BN - 1) // BN
    groups: tl.constexpr = t.STORED // t.DEPTH
    for block in range(0, tl.cdiv(rows, BM)):
        if t.DOT:
            m = block * BM + tl.arange(0, BM)
            factor = tl.full((BM,), 1.0, tl.float32)
            if norm is not None:
                squares = tl.zeros((BM,), tl.float32)
                for start in range(0, t.K, 256):
                    columns = (start + tl.arange(0, 256))[:, None]
                    mask = (columns < t.K) & (m < rows)[None, :]
                    x = x_at(a, m[None, :], columns, mask, batch, index, first, picked, SOURCE, s)
                    squares += tl.sum(x * x, 0)
                factor = tl.rsqrt(squares / t.K + s.EPS)
        else:
            m = block
        for tile in range(pid, tiles, programs):
            row = tile * BN + tl.arange(0, BN)
            if t.DOT:
                total = tl.zeros((SLICES, BN, BM), tl.float32)
            else:
                total = tl.zeros((BN, BK), tl.float32)
                squares = tl.zeros((BK,), tl.float32)
            for chunk in range(0, chunks):
                ends = chunk + 1 == chunks
                next_tile = tl.where(ends, tile + programs, tile)
                wraps = next_tile >= tiles
                more = (wraps == 0) | ((block + 1) * BM < rows)
                next_tile = tl.where(wraps, pid, next_tile)
                following = load_tile(weight, next_tile, tl.where(ends, 0, chunk + 1), more, t)
                if t.DOT:
                    total = tensor_step(
                        total, weight_tile, a, m, rows, row, chunk, batch, index, first, picked, scale, norm,
                        SOURCE, s, t, groups,
                    )  # fmt: skip
                else:
                    columns = chunk * BK + tl.arange(0, BK)
                    mask = columns < t.K
                    x = x_at(a, m, columns, mask, batch, index, first, picked, SOURCE, s)
                    if norm is not None:
                        squares += x * x
                        x = x * tl.load(norm + columns, mask=mask, other=0.0)
                    wide = weight_tile.to(tl.float32)
                    if t.K % BK != 0:
                        wide = tl.where(mask[None, :], wide, 0.0)
                    total += wide * x[None, :]
                weight_tile = following
            if t.DOT:
                result = tl.sum(total, 0) * factor[None, :]
            else:
                result = tl.sum(total, 1)
                if norm is not None:
                    result *= tl.rsqrt(tl.sum(squares, 0) / t.K + s.EPS)
            if t.FMT == 1:
                factors = tl.load(scale + row, mask=row < t.N, other=0.0)
                result *= factors[:, None] if t.DOT else factors
            if SINK == TO_ACT:
                store_act(result, tile, m, rows, a, bias, s, t)
            elif t.DOT:
                keep = (row < t.N)[:, None] & (m < rows)[None, :]
                store_rows(result, row[:, None], m[None, :], keep, a, bias, index, SINK, s, t)
            else:
                store_rows(result, row, m, row < t.N, a, bias, index, SINK, s, t)


@triton.jit
def tensor_step(
    total, weight_tile, a, m, rows, row, chunk, batch, index, first, picked, scale, norm,
    SOURCE: tl.constexpr, s: tl.constexpr, t: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``total`` and the product of one tile with its columns of x, slice by slice."""
    kind: tl.constexpr = tl.float32 if t.TF32 else tl.bfloat16
    double: tl.constexpr = 2 if t.FMT == 2 else 1
    slices = tl.arange(0, t.SLICES)[:, None, None]
    columns = chunk * (t.SLICES * t.DEPTH * double) + slices * (t.DEPTH * double) + tl.arange(0, t.DEPTH)[None, :, None]
    mask = (columns < t.K) & (m < rows)[None, None, :]
    low = x_at(a, m[None, None, :], columns, mask, batch, index, first, picked, SOURCE, s)
    if norm is not None:
        low *= tl.load(norm + columns, mask=columns < t.K, other=0.0)
    low = low.to(kind)
    if t.FMT == 2:
        mask = (columns + t.DEPTH < t.K) & (m < rows)[None, None, :]
        high = x_at(a, m[None, None, :], columns + t.DEPTH, mask, batch, index, first, picked, SOURCE, s)
        if norm is not None:
            high *= tl.load(norm + columns + t.DEPTH, mask=columns + t.DEPTH < t.K, other=0.0)
        out = int4_dot(total, weight_tile, low, high.to(kind), row, chunk * t.SLICES + slices, scale, GROUPS, t)
    else:
        wide = weight_tile.to(kind)
        if t.K % (t.SLICES * t.DEPTH) != 0:
            inside = chunk * (t.SLICES * t.DEPTH) + slices * t.DEPTH + tl.arange(0, t.DEPTH)[None, None, :] < t.K
            wide = tl.where(inside, wide.to(tl.float32), 0.0).to(kind)
        out = tl.dot(wide, low, total, input_precision="tf32")
    return out


@triton.jit
def int4_dot(total, packed, low, high, row, group, scale, GROUPS: tl.constexpr, t: tl.constexpr):
    """Both nibbles of a tile against their columns of x; a slice is a group, whose scale multiplies its sum."""
    weight_low, weight_high = nibbles(packed, True, t.UNPACK)
    part = tl.dot(weight_high, high, tl.dot(weight_low, low))
    mask = (row < t.N)[None, :, None] & (group < GROUPS)
    width: tl.constexpr = GROUPS // t.SEGMENTS
    at = (group // width * t.N + row[None, :, None]) * width + group % width
    factors = tl.load(scale + at, mask=mask, other=0.0)
    return total + part * factors.to(tl.float32)
