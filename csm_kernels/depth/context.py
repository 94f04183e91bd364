"""Attention of a decode step: the new positions' keys and values, and one row's look at the context."""

from __future__ import annotations

from csm_kernels._target import tl, triton


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
