"""The phases of a decode step, one device function each, for a grid of any size and for either driver.

Every phase has the same five lines: let the next launch start, ask for the first tile of weights, wait for the phase
before, work, say that it is done. Weights depend on nothing, so their loads are on their way while a program waits.

A phase is cut into tiles of weight rows; program ``pid`` takes tiles ``pid, pid + programs, ...`` and one tile's result
depends on nothing else, so that the same tile sizes give the same bits whoever computes them and in which driver. The
residual stream, norms, softmax, sums and sampling are fp32. ``x`` is fp32 in the plain form of a product and bf16 in the
tensor-core form (tf32 beside fp16 weights).

Rows: ``batch`` of them, twice as many in the depth decoder's first pass, where row ``j * batch + b`` is position ``j`` of
utterance ``b``. Names: ``a`` is :class:`~csm_kernels.depth.args.Pointers`, ``s`` its ``Sizes``,
``t`` the ``Tile`` of one matrix.
"""

from __future__ import annotations

from csm_kernels._target import tl, triton
from csm_kernels.depth.barrier import arrive, trigger, wait
from csm_kernels.depth.context import attended_share, remember
from csm_kernels.depth.product import (
    ACT,
    ATTENDED,
    ENTER,
    PARTS,
    PICK,
    STREAM,
    TO_ACT,
    TO_LOGITS,
    TO_QKV,
    TO_START,
    TO_STREAM,
    TO_STREAM_PARTS,
    load_tile,
    matrix_at,
    product,
    scale_at,
)
from csm_kernels.sampling import draw, noise_of


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
def drawn_token(noise, a, b, p, trace, s: tl.constexpr):
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
        token, healthy = drawn_token(noise, a, b, p, trace, s)
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
            token, healthy = drawn_token(noise, a, 0, p, trace, s)
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
