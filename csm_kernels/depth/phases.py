"""The phases of a decode step, one device function each, for a grid of any size and for either driver.

Every phase has the same five lines: let the next launch start, ask for the first tile of weights, wait for the phase
before, work, say that it is done. Weights depend on nothing, so their loads are on their way while a program waits.

A phase is cut into tiles of weight rows; program ``pid`` takes tiles ``pid, pid + programs, ...`` and one tile's result
depends on nothing else, so that the same tile sizes give the same bits whoever computes them and in which driver. The
residual stream, norms, softmax, sums and sampling are fp32. ``x`` is fp32 in the plain form of a product and bf16 in the
tensor-core form (tf32 beside fp16 weights).

Rows: ``batch`` of them, twice as many in the depth decoder's first pass, where row ``j * batch + b`` is position ``j`` of
utterance ``b``. Names: ``a`` is :class:`Pointers`, ``s`` :class:`Sizes`, ``t`` the :class:`Tile` of one matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from csm_kernels._gemv_tensor import nibbles
from csm_kernels._target import tl, triton
from csm_kernels.depth.barrier import arrive, trigger, wait
from csm_kernels.sampling import draw, noise_of


class Tile(NamedTuple):
    """How one matrix ``[N, K]`` is read: everything is a compile-time constant."""

    N: int
    K: int
    STORED: int
    """Stored elements of a row: K, or its bytes in int4."""
    SEGMENTS: int
    """Pieces that K is cut into, each ``[N, STORED / SEGMENTS]``."""
    FMT: int
    """0 as it is, 1 a scale per row, 2 int4 with a scale per group."""
    DOT: bool
    """On tensor cores."""
    TF32: bool
    BN: int
    """Weight rows of a tile."""
    BK: int
    """Columns of a tile; K is summed in chunks of them. In the tensor-core form SLICES slices of DEPTH stored elements."""
    BM: int
    """Rows of x at once: 1 in the plain form."""
    SLICES: int
    DEPTH: int
    EVICTION: str
    UNPACK: bool
    """int4 by inline PTX."""

    @property
    def tiles(self) -> int:
        """Tiles of weight rows."""
        return -(-self.N // self.BN)


class Sizes(NamedTuple):
    """Shape of a stack and of what surrounds it, and how it is run; compile-time constants."""

    LAYERS: int
    D: int
    F: int
    H: int
    KV: int
    HD: int
    NQ: int
    """Rows of q, k and v together."""
    G: int
    """Query heads of a KV head."""
    BG: int
    BD: int
    """G and HD, rounded up to powers of two."""
    SCALE: float
    EPS: float
    C: int
    """Cached positions."""
    BC: int
    """Cached positions of a block."""
    SPLITS: int
    POSITIONS: int
    """Rows of the rotary table."""
    DEPTH: bool
    """The depth decoder: positions come from the pass; else from the device, and a mask says what may be seen."""
    FUSE_O: bool
    """Attention and that KV head's columns of O in one phase."""
    FUSE_DRAW: bool
    """Every program draws the token itself at the head of a pass."""
    TABLE: bool
    CODEBOOKS: int
    V: int
    W: int
    """Width of the backbone."""
    ROUNDS: int
    WHOLE: bool
    BV: int
    """What :func:`csm_kernels.sampling.draw` takes."""
    BE: int
    """Columns of an embedding row copied at once."""


class Pointers(NamedTuple):
    """Every tensor a step touches. See ``pack.py`` for their layouts; what a step does not have is None."""

    qkv_weight: Any
    qkv_scale: Any
    qkv_bias: Any
    o_weight: Any
    o_scale: Any
    o_bias: Any
    gate_up_weight: Any
    gate_up_scale: Any
    gate_up_bias: Any
    down_weight: Any
    down_scale: Any
    down_bias: Any
    input_norm: Any
    post_norm: Any
    norm: Any
    cos: Any
    sin: Any
    projection: Any
    projection_scale: Any
    projection_bias: Any
    heads: Any
    heads_scale: Any
    embedding: Any
    table: Any
    k_cache: Any
    v_cache: Any
    hidden: Any
    """``[B, W]`` fp32, what position 0 is projected from."""
    codes: Any
    """``[B, codebooks]`` int64."""
    temperature: Any
    top_k: Any
    top_p: Any
    do_sample: Any
    seed: Any
    utterance: Any
    frame: Any
    allowed: Any
    """``[B, C]`` bool."""
    length: Any
    """``[B]`` int64, where the new keys go."""
    position: Any
    """``[B]`` int64, the rotary position."""
    stream: Any
    qkv: Any
    attended: Any
    peak: Any
    mass: Any
    parts: Any
    act: Any
    logits: Any
    token: Any
    flags: Any
    sync: Any


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


# ------------------------------------------------------------------------------------------------------- reading weights


@triton.jit
def matrix_at(pointer, index, t: tl.constexpr):
    """Matrix ``index`` of a stack."""
    return pointer + tl.cast(index, tl.int64) * (t.N * t.STORED)


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


# ------------------------------------------------------------------------------------------------------------ reading x


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


# --------------------------------------------------------------------------------------------------------- one product


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


# ------------------------------------------------------------------------------------------------------------ attention


@triton.jit
def place_of(a, b, j, p, s: tl.constexpr):
    """Cached positions before this pass, and the cache slot and rotary position of this row."""
    if s.DEPTH:
        before = tl.where(p == 1, 0, p)
        position = before + j
    else:
        before = tl.minimum(tl.load(a.length + b), s.C - 1).to(tl.int32)
        position = tl.minimum(tl.load(a.position + b), s.POSITIONS - 1).to(tl.int32)
    return before, before + j, position


@triton.jit
def turned(pointer, mask, cosine, sine, d, s: tl.constexpr):
    """Heads at ``pointer`` after rotation; ``sine`` carries the sign of its half."""
    other = (d + s.HD // 2) % s.HD
    return tl.load(pointer + d, mask=mask, other=0.0) * cosine + tl.load(pointer + other, mask=mask, other=0.0) * sine


@triton.jit
def rotation(a, position, d, s: tl.constexpr):
    """Cosine and signed sine at a position."""
    cosine = tl.load(a.cos + position * s.HD + d, mask=d < s.HD, other=0.0)
    sine = tl.load(a.sin + position * s.HD + d, mask=d < s.HD, other=0.0)
    return cosine, tl.where(d < s.HD // 2, -sine, sine)


@triton.jit
def new_pair(a, r, g, position, s: tl.constexpr):
    """Key and value of row ``r``, rounded to the cache's dtype."""
    d = tl.arange(0, s.BD)
    cosine, sine = rotation(a, position, d, s)
    row = a.qkv + r * s.NQ + s.H * s.HD + g * s.HD
    key = turned(row, d < s.HD, cosine, sine, d, s)
    value = tl.load(row + s.KV * s.HD + d, mask=d < s.HD, other=0.0)
    return key.to(a.k_cache.dtype.element_ty), value.to(a.v_cache.dtype.element_ty)


@triton.jit
def cache_at(b, g, l, batch, s: tl.constexpr):
    """Where the cache of one layer, row and KV head begins."""
    return ((tl.cast(l, tl.int64) * batch + b) * s.KV + g) * (s.C * s.HD)


@triton.jit
def remember(a, m, g, batch, p, l, s: tl.constexpr):
    """Write the new key and value of one row and KV head."""
    b, j = m % batch, m // batch
    before, slot, position = place_of(a, b, j, p, s)
    key, value = new_pair(a, m, g, position, s)
    d = tl.arange(0, s.BD)
    place = cache_at(b, g, l, batch, s) + slot * s.HD + d
    tl.store(a.k_cache + place, key, mask=d < s.HD)
    tl.store(a.v_cache + place, value, mask=d < s.HD)


@triton.jit
def attended_share(a, m, g, split, batch, p, l, s: tl.constexpr):
    """Softmax sums of one row, KV head and share of the context: values ``[BG, BD]``, their maximum and mass ``[BG]``.

    Shares are whole blocks of what the cache holds; the last also takes the positions of this pass, which stand in the
    qkv buffer, rounded as they will be in the cache: whether a position is old or new makes no difference.
    """
    BG: tl.constexpr = s.BG
    BD: tl.constexpr = s.BD
    b, j = m % batch, m // batch
    before, slot, position = place_of(a, b, j, p, s)
    heads, d = tl.arange(0, s.BG), tl.arange(0, s.BD)
    cosine, sine = rotation(a, position, d, s)
    mask = (heads < s.G)[:, None] & (d < s.HD)[None, :]
    q = a.qkv + m * s.NQ + (g * s.G + heads[:, None]) * s.HD
    q = turned(q, mask, cosine[None, :], sine[None, :], d[None, :], s) * s.SCALE
    top = tl.full((BG,), float("-inf"), tl.float32)
    mass = tl.zeros((BG,), tl.float32)
    values = tl.zeros((BG, BD), tl.float32)
    share = tl.cdiv(tl.cdiv(before, s.SPLITS), s.BC) * s.BC
    begin = tl.minimum(split * share, before)
    end = tl.minimum(split * share + share, before)
    cache = cache_at(b, g, l, batch, s)
    for start in range(begin, end, s.BC):
        c = start + tl.arange(0, s.BC)
        seen = c < end
        if a.allowed is not None:
            seen = seen & (tl.load(a.allowed + tl.cast(b, tl.int64) * s.C + c, mask=seen, other=0) != 0)
        inside = seen[:, None] & (d < s.HD)[None, :]
        at = cache + c[:, None] * s.HD + d[None, :]
        k = tl.load(a.k_cache + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(a.v_cache + at, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(seen[None, :], tl.sum(k[None, :, :] * q[:, None, :], 2), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        mass = mass * shrink + tl.sum(weights, 1)
        values = values * shrink[:, None] + tl.sum(v[None, :, :] * weights[:, :, None], 1)
        top = higher
    if split == s.SPLITS - 1:
        for i in range(0, j + 1):
            key, value = new_pair(a, i * batch + b, g, position - j + i, s)
            score = tl.sum(key.to(tl.float32)[None, :] * q, 1)
            higher = tl.maximum(top, score)
            weight, shrink = tl.exp(score - higher), tl.exp(top - higher)
            mass = mass * shrink + weight
            values = values * shrink[:, None] + value.to(tl.float32)[None, :] * weight[:, None]
            top = higher
    return values, top, mass


# --------------------------------------------------------------------------------------------------------------- phases


@triton.jit
def start(pid, programs, batch, p, a, s: tl.constexpr, t: tl.constexpr, target, limit, SYNC: tl.constexpr):
    """The projection: position 0 and, without a table, every token's embedding; with one, position 1 is copied."""
    trigger(SYNC)
    tile = load_tile(a.projection, pid, 0, True, t)
    wait(a.sync, target, limit, SYNC)
    rows = batch
    if s.TABLE:
        for b in range(pid, batch, programs):
            token = tl.load(a.token + b)
            enter_table(a, batch + b, token, s)
            tl.store(a.codes + b * s.CODEBOOKS, token)
    else:
        rows = tl.where(p == 1, 2 * batch, batch)
        for b in range(pid, batch, programs):
            tl.store(a.codes + b * s.CODEBOOKS, tl.load(a.token + b), mask=p == 1)
    product(
        tile, pid, programs, rows, 0, batch, p, -1, a, a.projection, a.projection_scale, a.projection_bias, None,
        ENTER, TO_START, s, t,
    )  # fmt: skip
    arrive(a.sync, SYNC)


@triton.jit
def enter_table(a, m, place, s: tl.constexpr):
    """Row ``m`` of the stream from row ``place`` of the table."""
    place = tl.minimum(tl.maximum(place, 0), (s.CODEBOOKS - 1) * s.V - 1)
    for begin in range(0, s.D, s.BE):
        columns = begin + tl.arange(0, s.BE)
        x = tl.load(a.table + tl.cast(place, tl.int64) * s.D + columns, mask=columns < s.D, other=0.0)
        tl.store(a.stream + m * s.D + columns, x.to(tl.float32), mask=columns < s.D)


@triton.jit
def noise_for(a, b, p, s: tl.constexpr):
    """The noise of codebook ``p - 1``, as far as it is made ahead of the logits."""
    return noise_of(a.seed + b, a.utterance + b, a.frame + b, tl.cast(p - 1, tl.int64), a.do_sample + b, s.WHOLE, s.BV)


@triton.jit
def drawn_token(noise, a, b, p, batch, trace, s: tl.constexpr):
    """Codebook ``p - 1`` of one row, and whether its logits are healthy."""
    logits = a.logits + tl.cast(p - 2, tl.int64) * trace + b * s.V
    return draw(
        logits, noise, a.temperature + b, a.top_k + b, a.top_p + b, a.do_sample + b, a.seed + b, a.utterance + b,
        a.frame + b, tl.cast(p - 1, tl.int64), s.V, s.ROUNDS, s.WHOLE, s.BV,
    )  # fmt: skip


@triton.jit
def keep_token(token, healthy, a, b, p, s: tl.constexpr):
    """Codebook ``p - 1`` to the frame's codes."""
    tl.store(a.codes + b * s.CODEBOOKS + p - 1, token.to(tl.int64))
    tl.store(a.token + b, token.to(tl.int64))
    tl.store(a.flags + b, 1, mask=healthy == 0)


@triton.jit
def draws(pid, programs, batch, p, trace, a, s: tl.constexpr, target, limit, SYNC: tl.constexpr):
    """A program per row draws codebook ``p - 1`` and, with a table, begins position ``p``."""
    trigger(SYNC)
    noise = noise_for(a, tl.minimum(pid, batch - 1), p, s)
    wait(a.sync, target, limit, SYNC)
    for b in range(pid, batch, programs):
        if b != pid:
            noise = noise_for(a, b, p, s)
        token, healthy = drawn_token(noise, a, b, p, batch, trace, s)
        keep_token(token, healthy, a, b, p, s)
        if s.TABLE:  # noqa: SIM102 one is a constant, the other a value
            if p < s.CODEBOOKS:
                enter_table(a, b, (p - 1) * s.V + token, s)
    arrive(a.sync, SYNC)


@triton.jit
def qkv(
    pid, programs, rows, batch, p, l, trace, a, s: tl.constexpr, t: tl.constexpr, target, limit, SYNC: tl.constexpr
):
    """Norm and the products of q, k and v; at the head of a pass, where it is fused, the draw before them."""
    trigger(SYNC)
    weight = matrix_at(a.qkv_weight, l, t)
    tile = load_tile(weight, pid, 0, True, t)
    picked = -1
    if s.FUSE_DRAW:
        draws_here = (l == 0) & (p > 1)
        width: tl.constexpr = s.BV if s.WHOLE else 1
        noise = tl.zeros((width,), tl.float32)
        if draws_here:
            noise = noise_for(a, 0, p, s)
        wait(a.sync, target, limit, SYNC)
        if draws_here:
            token, healthy = drawn_token(noise, a, 0, p, batch, trace, s)
            picked = ((p - 1) * s.V + token).to(tl.int32)
            if pid == 0:
                keep_token(token, healthy, a, 0, p, s)
                enter_table(a, 0, picked, s)
    else:
        wait(a.sync, target, limit, SYNC)
    scale = a.qkv_scale if a.qkv_scale is None else scale_at(a.qkv_scale, l, t)
    bias = a.qkv_bias if a.qkv_bias is None else a.qkv_bias + l * t.N
    product(
        tile, pid, programs, rows, 0, batch, l, picked, a, weight, scale, bias, a.input_norm + l * s.D,
        PICK if s.FUSE_DRAW else STREAM, TO_QKV, s, t,
    )  # fmt: skip
    arrive(a.sync, SYNC)


@triton.jit
def scale_at(pointer, index, t: tl.constexpr):
    """Scales of matrix ``index`` of a stack."""
    return pointer + tl.cast(index, tl.int64) * (t.N * (t.STORED // t.DEPTH if t.FMT == 2 else 1))


@triton.jit
def attend(pid, programs, rows, batch, p, l, a, s: tl.constexpr, target, limit, SYNC: tl.constexpr):
    """A row, a KV head and a share of the context per program; the last share writes the cache."""
    trigger(SYNC)
    wait(a.sync, target, limit, SYNC)
    for task in range(pid, rows * s.KV * s.SPLITS, programs):
        split = task % s.SPLITS
        g = task // s.SPLITS % s.KV
        m = task // (s.SPLITS * s.KV)
        values, top, mass = attended_share(a, m, g, split, batch, p, l, s)
        heads, d = tl.arange(0, s.BG), tl.arange(0, s.BD)
        at = (m * s.H + g * s.G + heads) * s.SPLITS + split
        tl.store(a.peak + at, top, mask=heads < s.G)
        tl.store(a.mass + at, mass, mask=heads < s.G)
        mask = (heads < s.G)[:, None] & (d < s.HD)[None, :]
        tl.store(a.attended + at[:, None] * s.HD + d[None, :], values, mask=mask)
        if split == s.SPLITS - 1:
            remember(a, m, g, batch, p, l, s)
    arrive(a.sync, SYNC)


@triton.jit
def load_slice(weight, tile, keep, s: tl.constexpr, t: tl.constexpr):
    """``[BN, BG, BD]`` of O: rows of a tile, columns of one KV head."""
    blocks: tl.constexpr = (s.D + t.BN - 1) // t.BN
    row = (tile % blocks) * t.BN + tl.arange(0, t.BN)
    heads, d = tl.arange(0, s.BG), tl.arange(0, s.BD)
    mask = (row < s.D)[:, None, None] & keep
    if (s.BG != s.G) | (s.BD != s.HD):
        mask = mask & (heads < s.G)[None, :, None] & (d < s.HD)[None, None, :]
    at = (tile // blocks * s.D + row)[:, None, None] * (s.G * s.HD) + heads[None, :, None] * s.HD + d[None, None, :]
    return tl.load(weight + at, mask=mask, eviction_policy=t.EVICTION)


@triton.jit
def attend_project(
    pid, programs, rows, batch, p, l, a, s: tl.constexpr, t: tl.constexpr, target, limit, SYNC: tl.constexpr
):
    """Attention of one KV head, and a tile of O's rows against that head's columns: pieces that the reader adds.

    The attention of a KV head is computed by every program that has a tile of it: at one row that costs less than
    another barrier would. A tile is ``BN`` rows of one segment of O.
    """
    trigger(SYNC)
    blocks: tl.constexpr = (s.D + t.BN - 1) // t.BN
    weight = matrix_at(a.o_weight, l, t)
    tile = load_slice(weight, pid, pid < s.KV * blocks, s, t)
    wait(a.sync, target, limit, SYNC)
    for task in range(pid, s.KV * blocks, programs):
        if task != pid:
            tile = load_slice(weight, task, True, s, t)
        g = task // blocks
        row = (task % blocks) * t.BN + tl.arange(0, t.BN)
        wide = tile.to(tl.float32)
        if (s.BG != s.G) | (s.BD != s.HD):
            inside = (tl.arange(0, s.BG) < s.G)[:, None] & (tl.arange(0, s.BD) < s.HD)[None, :]
            wide = tl.where(inside[None, :, :], wide, 0.0)
        for m in range(0, rows):
            values, top, mass = attended_share(a, m, g, 0, batch, p, l, s)
            if task % blocks == 0:
                remember(a, m, g, batch, p, l, s)
            total = tl.sum(tl.sum(wide * (values / mass[:, None])[None, :, :], 2), 1)
            if t.FMT == 1:
                total *= tl.load(a.o_scale + l * s.D + row, mask=row < s.D, other=0.0)
            tl.store(a.parts + (m * s.KV + g) * s.D + row, total, mask=row < s.D)
    arrive(a.sync, SYNC)


@triton.jit
def project(pid, programs, rows, batch, l, a, s: tl.constexpr, t: tl.constexpr, target, limit, SYNC: tl.constexpr):
    """O's product, added to the stream."""
    trigger(SYNC)
    weight = matrix_at(a.o_weight, l, t)
    tile = load_tile(weight, pid, 0, True, t)
    wait(a.sync, target, limit, SYNC)
    scale = a.o_scale if a.o_scale is None else scale_at(a.o_scale, l, t)
    bias = a.o_bias if a.o_bias is None else a.o_bias + l * t.N
    product(
        tile, pid, programs, rows, 0, batch, l, -1, a, weight, scale, bias, None, ATTENDED, TO_STREAM, s, t
    )  # fmt: skip
    arrive(a.sync, SYNC)


@triton.jit
def gate_up(pid, programs, rows, batch, l, a, s: tl.constexpr, t: tl.constexpr, target, limit, SYNC: tl.constexpr):
    """Norm, gate and up, and their SwiGLU."""
    trigger(SYNC)
    weight = matrix_at(a.gate_up_weight, l, t)
    tile = load_tile(weight, pid, 0, True, t)
    wait(a.sync, target, limit, SYNC)
    scale = a.gate_up_scale if a.gate_up_scale is None else scale_at(a.gate_up_scale, l, t)
    bias = a.gate_up_bias if a.gate_up_bias is None else a.gate_up_bias + l * t.N
    product(
        tile, pid, programs, rows, 0, batch, l, -1, a, weight, scale, bias, a.post_norm + l * s.D,
        PARTS if s.FUSE_O else STREAM, TO_ACT, s, t,
    )  # fmt: skip
    arrive(a.sync, SYNC)


@triton.jit
def down(pid, programs, rows, batch, l, a, s: tl.constexpr, t: tl.constexpr, target, limit, SYNC: tl.constexpr):
    """The down product, added to the stream."""
    trigger(SYNC)
    weight = matrix_at(a.down_weight, l, t)
    tile = load_tile(weight, pid, 0, True, t)
    wait(a.sync, target, limit, SYNC)
    scale = a.down_scale if a.down_scale is None else scale_at(a.down_scale, l, t)
    bias = a.down_bias if a.down_bias is None else a.down_bias + l * t.N
    product(
        tile, pid, programs, rows, 0, batch, l, -1, a, weight, scale, bias, None,
        ACT, TO_STREAM_PARTS if s.FUSE_O else TO_STREAM, s, t,
    )  # fmt: skip
    arrive(a.sync, SYNC)


@triton.jit
def head(pid, programs, batch, p, trace, a, s: tl.constexpr, t: tl.constexpr, target, limit, SYNC: tl.constexpr):
    """The final norm and the head of codebook ``p``, for the last position of a pass."""
    trigger(SYNC)
    weight = matrix_at(a.heads, p - 1, t)
    tile = load_tile(weight, pid, 0, True, t)
    wait(a.sync, target, limit, SYNC)
    scale = a.heads_scale if a.heads_scale is None else scale_at(a.heads_scale, p - 1, t)
    product(
        tile, pid, programs, batch, tl.where(p == 1, batch, 0), batch, tl.cast(p - 1, tl.int64) * trace, -1, a, weight,
        scale, None, a.norm, STREAM, TO_LOGITS, s, t,
    )  # fmt: skip
    arrive(a.sync, SYNC)
