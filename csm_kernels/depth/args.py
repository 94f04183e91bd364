"""What the phases of a decode step are given: pointers, sizes and tiles.

All are named tuples: a kernel takes :class:`Pointers` as one argument, the other two as compile-time constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple


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
