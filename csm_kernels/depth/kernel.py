"""The two drivers of a decode step, made of the same phases: one persistent kernel, or one launch per phase.

Persistent: as many programs as the device has processors walk through all phases of a frame and meet at a barrier after
each (cooperative launch: all of them are resident or the launch is an error). Launches: a kernel per phase in stream
order; on sm_90 and later each is launched while the one before still runs (programmatic dependent launch) and waits
inside, its weights already asked for. Both are made for a CUDA graph: no allocation, no host sync, every changing value
in a tensor. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from csm_kernels._target import device_facts, inline_ptx, interpreting, tl, triton
from csm_kernels._tiles import tiles
from csm_kernels.depth import phases
from csm_kernels.depth.args import Pointers, Sizes, Tile
from csm_kernels.depth.barrier import GRID, GRID_PTX, NO_SYNC, PDL
from csm_kernels.depth.pack import Matrix, PackedDepth, PackedStack, Workspace, evictions
from csm_kernels.quant import QuantWeight, format_of
from csm_kernels.sampling import WHOLE_VOCAB, NoiseKey, SamplingParams

_PROCESSORS = 132  # of an H100, for launches that are only compiled or interpreted
_CACHE = 50 * 2**20  # likewise
_POLLS = 20_000_000
"""A barrier gives up after so many looks: a few seconds at 0.1 to 0.5 us a look."""
_DRAW_WARPS = 8
"""At 4 warps the draw takes 225 registers a thread (CSM's 2051 tokens, sm_90)."""
_ROUNDS = 8
"""Of strike-out in the draw, before it searches for the threshold."""


class Tiles(NamedTuple):
    """The tile of every matrix of a step; a backbone has no projection and no heads."""

    projection: Tile | None
    qkv: Tile
    o: Tile
    gate_up: Tile
    down: Tile
    heads: Tile | None


class Plan(NamedTuple):
    """How a step is run."""

    persistent: bool
    programs: int
    """Of the persistent kernel."""
    warps: int
    sync: int
    sizes: Sizes
    tiles: Tiles


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def layer(
    pid, programs, rows, batch, p, l, trace, a, s: tl.constexpr, QKV: tl.constexpr, O: tl.constexpr,
    GATE_UP: tl.constexpr, DOWN: tl.constexpr, target, limit, SYNC: tl.constexpr,
):  # fmt: skip
    """One Llama layer; returns the arrivals after which the next phase may start."""
    phases.qkv(pid, programs, rows, batch, p, l, trace, a, s, QKV, target, limit, SYNC)
    target += programs
    if s.FUSE_O:
        phases.attend_project(pid, programs, rows, batch, p, l, a, s, O, target, limit, SYNC)
    else:
        phases.attend(pid, programs, rows, batch, p, l, a, s, target, limit, SYNC)
        target += programs
        phases.project(pid, programs, rows, batch, l, a, s, O, target, limit, SYNC)
    target += programs
    phases.gate_up(pid, programs, rows, batch, l, a, s, GATE_UP, target, limit, SYNC)
    target += programs
    phases.down(pid, programs, rows, batch, l, a, s, DOWN, target, limit, SYNC)
    return target + programs


@triton.jit(do_not_specialize=["batch", "trace", "limit"])
def depth_kernel(
    a, batch, trace, limit, s: tl.constexpr, PROJECTION: tl.constexpr, QKV: tl.constexpr, O: tl.constexpr,
    GATE_UP: tl.constexpr, DOWN: tl.constexpr, HEADS: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """All codebooks of a frame after the first."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    phases.start(pid, programs, batch, 1, a, s, PROJECTION, 0, limit, SYNC)
    target = programs
    for p in range(1, s.CODEBOOKS):
        rows = tl.where(p == 1, 2 * batch, batch)
        if not s.FUSE_DRAW:  # noqa: SIM102 one is a constant, the other a value
            if p > 1:
                phases.draws(pid, programs, batch, p, trace, a, s, target, limit, SYNC)
                target += programs
                if not s.TABLE:
                    phases.start(pid, programs, batch, p, a, s, PROJECTION, target, limit, SYNC)
                    target += programs
        for l in range(0, s.LAYERS):
            target = layer(
                pid, programs, rows, batch, p, l, trace, a, s, QKV, O, GATE_UP, DOWN, target, limit, SYNC
            )  # fmt: skip
        phases.head(pid, programs, batch, p, trace, a, s, HEADS, target, limit, SYNC)
        target += programs
    phases.draws(pid, programs, batch, s.CODEBOOKS, trace, a, s, target, limit, SYNC)


@triton.jit(do_not_specialize=["batch", "limit"])
def stack_kernel(
    a, batch, limit, s: tl.constexpr, QKV: tl.constexpr, O: tl.constexpr, GATE_UP: tl.constexpr, DOWN: tl.constexpr,
    SYNC: tl.constexpr,
):  # fmt: skip
    """All layers of the backbone for one new position per row."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    target = 0
    for l in range(0, s.LAYERS):
        target = layer(pid, programs, batch, batch, 2, l, 0, a, s, QKV, O, GATE_UP, DOWN, target, limit, SYNC)


_STEP = ["batch", "rows", "p", "l", "trace"]


@triton.jit(do_not_specialize=_STEP)
def start_kernel(a, batch, p, s: tl.constexpr, T: tl.constexpr, SYNC: tl.constexpr):
    """The projection. These kernels are the phases of the same names, a launch each."""
    phases.start(tl.program_id(0), tl.num_programs(0), batch, p, a, s, T, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def draws_kernel(a, batch, p, trace, s: tl.constexpr, SYNC: tl.constexpr):
    """The draw of one codebook."""
    phases.draws(tl.program_id(0), tl.num_programs(0), batch, p, trace, a, s, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def qkv_kernel(a, rows, batch, p, l, trace, s: tl.constexpr, T: tl.constexpr, SYNC: tl.constexpr):
    """Norm, q, k and v."""
    phases.qkv(tl.program_id(0), tl.num_programs(0), rows, batch, p, l, trace, a, s, T, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def attend_kernel(a, rows, batch, p, l, s: tl.constexpr, SYNC: tl.constexpr):
    """Attention."""
    phases.attend(tl.program_id(0), tl.num_programs(0), rows, batch, p, l, a, s, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def attend_project_kernel(a, rows, batch, p, l, s: tl.constexpr, T: tl.constexpr, SYNC: tl.constexpr):
    """Attention and O."""
    phases.attend_project(tl.program_id(0), tl.num_programs(0), rows, batch, p, l, a, s, T, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def project_kernel(a, rows, batch, l, s: tl.constexpr, T: tl.constexpr, SYNC: tl.constexpr):
    """O."""
    phases.project(tl.program_id(0), tl.num_programs(0), rows, batch, l, a, s, T, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def gate_up_kernel(a, rows, batch, l, s: tl.constexpr, T: tl.constexpr, SYNC: tl.constexpr):
    """Norm, gate, up and SwiGLU."""
    phases.gate_up(tl.program_id(0), tl.num_programs(0), rows, batch, l, a, s, T, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def down_kernel(a, rows, batch, l, s: tl.constexpr, T: tl.constexpr, SYNC: tl.constexpr):
    """Down."""
    phases.down(tl.program_id(0), tl.num_programs(0), rows, batch, l, a, s, T, 0, 0, SYNC)


@triton.jit(do_not_specialize=_STEP)
def head_kernel(a, batch, p, trace, s: tl.constexpr, T: tl.constexpr, SYNC: tl.constexpr):
    """The last norm and a head."""
    phases.head(tl.program_id(0), tl.num_programs(0), batch, p, trace, a, s, T, 0, 0, SYNC)


# ---------------------------------------------------------------------------------------------------------------- plans


class _Layout(NamedTuple):
    """What the choice of tiles depends on besides the matrix."""

    batch: int
    persistent: bool
    warps: int
    programs: int


def _tile(
    matrix: Matrix,
    height: int,
    width: int,
    segments: int,
    eviction: str,
    pairs: bool,
    at: _Layout,
    chosen: dict[str, int],
) -> Tile:
    """Tile of one matrix; ``chosen`` is the table's or a test's word on ``BN``."""
    fmt = format_of(matrix)
    kind = 1 if fmt in ("int8", "fp8") else 2 if fmt == "int4" else 0
    dot = fmt == "int4" or (at.batch > 1 and fmt != "float32")
    stored = segments * matrix.data.shape[-1]
    depth = matrix.group // 2 if isinstance(matrix, QuantWeight) and kind == 2 else 64 if at.batch <= 4 else 32
    slices = min(at.warps, triton.next_power_of_2(triton.cdiv(stored, depth))) if dot else 1
    block_k = slices * depth if dot else min(triton.next_power_of_2(width), 2048)
    least = 16 if dot else 2 if pairs else 1
    tall = height
    if segments > 1 and not dot:
        # Behind the fused attention, which every tile repeats: a tile is rows of one segment, as many as registers hold.
        tall, largest = segments * height, at.warps * 32 * 64 // triton.next_power_of_2(width // segments)
    elif dot or not at.persistent:
        largest = 2
    else:
        largest = at.warps * 32 * (32 if fmt == "float32" else 64) // block_k
    block_n = chosen.get("BN", _balanced(tall, least, max(least, largest), at.programs))
    return Tile(
        N=height,
        K=width,
        STORED=stored,
        SEGMENTS=segments,
        FMT=kind,
        DOT=dot,
        TF32=fmt == "float16",
        BN=max(block_n, least),
        BK=block_k,
        BM=(8 if at.batch <= 4 else 16) if dot else 1,
        SLICES=slices,
        DEPTH=depth if dot else 1,
        EVICTION=eviction,
        UNPACK=inline_ptx() and kind == 2,
    )


def _balanced(height: int, least: int, largest: int, programs: int) -> int:
    """The largest tile that gives the busiest program at most a tenth more rows than the best choice would.

    Two rows a tile are the fairest for CSM's gate and up, by 126 rows to 128, and leave a single load in flight.
    """
    busiest = {
        size: size * triton.cdiv(triton.cdiv(height, size), programs)
        for size in (least << i for i in range(8))
        if size <= largest
    }
    return max(size for size, rows in busiest.items() if rows <= 1.1 * min(busiest.values()))


def plan(
    packed: PackedDepth | PackedStack,
    batch: int,
    workspace: Workspace,
    capacity: int,
    *,
    persistent: bool | None = None,
    programs: int | None = None,
) -> Plan:
    """Tiles, grid and driver of a depth decoder or a backbone.

    Args:
        packed: its weights.
        batch: rows.
        workspace: its buffers; says on which device, and how often attention is split.
        capacity: cached positions.
        persistent: the driver; None for what the tile table says was faster.
        programs: grid of the persistent kernel; None for one per processor.
    """
    depth = packed if isinstance(packed, PackedDepth) else None
    stack = packed.stack if isinstance(packed, PackedDepth) else packed
    shape, buffers = stack.shape, workspace.buffers
    device = buffers.stream.device
    facts = device_facts(device.index or 0) if device.type == "cuda" else None
    formats = {name: format_of(getattr(stack, name)) for name in ("qkv", "gate_up")}
    size = {"D": shape.width, "L": shape.layers, "B": batch, **formats}
    table = "depth" if depth is not None else "backbone"
    chosen = tiles(table, buffers.stream, size, {"PERSISTENT": 0})
    if persistent is None:
        persistent = bool(chosen["PERSISTENT"])
    warps = chosen.get("num_warps", 8 if persistent else 4)
    grid = programs or (facts.processors if facts is not None else _PROCESSORS)
    at = _Layout(batch, persistent, warps, grid)
    keep = {} if depth is None else evictions(depth, facts.cache_bytes if facts is not None else _CACHE)

    def tile(name: str, matrix: Matrix, height: int, width: int, segments: int = 1) -> Tile:
        block = {"BN": chosen[f"BN_{name}"]} if f"BN_{name}" in chosen else {}
        return _tile(matrix, height, width, segments, keep.get(name, "evict_first"), name == "gate_up", at, block)

    rows, across = (shape.heads + 2 * shape.groups) * shape.dim, shape.heads * shape.dim
    found = Tiles(
        tile("projection", depth.projection, shape.width, depth.width) if depth is not None else None,
        tile("qkv", stack.qkv, rows, shape.width),
        tile("o", stack.o, shape.width, across, stack.segments),
        tile("gate_up", stack.gate_up, 2 * shape.ffn, shape.width),
        tile("down", stack.down, shape.width, shape.ffn),
        tile("heads", depth.heads, depth.vocab, shape.width) if depth is not None else None,
    )
    sizes = _sizes(stack, depth, batch, workspace, capacity, persistent, found.o.DOT, warps)
    if not persistent:
        sync = PDL if facts is not None and facts.capability >= 90 and inline_ptx() else NO_SYNC
    else:
        sync = GRID_PTX if inline_ptx() else GRID
    return Plan(persistent, grid, warps, sync, sizes, found)


def _sizes(
    stack: PackedStack,
    depth: PackedDepth | None,
    batch: int,
    workspace: Workspace,
    capacity: int,
    persistent: bool,
    dot: bool,
    warps: int,
) -> Sizes:
    shape, vocab = stack.shape, 1 if depth is None else depth.vocab
    group = shape.heads // shape.groups
    wide, heads = triton.next_power_of_2(shape.dim), triton.next_power_of_2(group)
    return Sizes(
        LAYERS=shape.layers,
        D=shape.width,
        F=shape.ffn,
        H=shape.heads,
        KV=shape.groups,
        HD=shape.dim,
        NQ=(shape.heads + 2 * shape.groups) * shape.dim,
        G=group,
        BG=heads,
        BD=wide,
        SCALE=shape.dim**-0.5,
        EPS=shape.eps,
        C=capacity,
        BC=max(1, min(triton.next_power_of_2(capacity), 1024 * warps // (heads * wide))),
        SPLITS=workspace.buffers.peak.shape[2],
        POSITIONS=stack.cos.shape[0],
        DEPTH=depth is not None,
        FUSE_O=depth is not None and batch == 1 and stack.segments == shape.groups and not dot,
        FUSE_DRAW=depth is not None and persistent and batch == 1 and depth.table is not None,
        TABLE=depth is not None and depth.table is not None,
        CODEBOOKS=1 if depth is None else depth.codebooks,
        V=vocab,
        W=1 if depth is None else depth.width,
        ROUNDS=_ROUNDS,
        WHOLE=vocab <= WHOLE_VOCAB,
        BV=triton.next_power_of_2(vocab) if vocab <= WHOLE_VOCAB else 2048,
        BE=min(1024, triton.next_power_of_2(shape.width)),
    )


# ------------------------------------------------------------------------------------------------------------- launches


def _parts(matrix: Matrix | None) -> tuple[Tensor | None, Tensor | None]:
    return (matrix.data, matrix.scale) if isinstance(matrix, QuantWeight) else (matrix, None)


def stack_pointers(stack: PackedStack, workspace: Workspace, keys: Tensor, values: Tensor) -> Pointers:
    """The tensors of a stack; what only a depth decoder or only a backbone has is left None."""
    fields: dict[str, Any] = dict.fromkeys(Pointers._fields)
    for name in ("qkv", "o", "gate_up", "down"):
        fields[f"{name}_weight"], fields[f"{name}_scale"] = _parts(getattr(stack, name))
        fields[f"{name}_bias"] = getattr(stack, f"{name}_bias")
    for name in ("input_norm", "post_norm", "norm", "cos", "sin"):
        fields[name] = getattr(stack, name)
    return Pointers(**{**fields, **workspace.buffers._asdict(), "k_cache": keys, "v_cache": values})


def depth_pointers(
    packed: PackedDepth, workspace: Workspace, hidden: Tensor, codes: Tensor, params: SamplingParams, key: NoiseKey
) -> Pointers:
    """The tensors of a depth decoder."""
    assert workspace.keys is not None and workspace.values is not None
    projection, projection_scale = _parts(packed.projection)
    heads, heads_scale = _parts(packed.heads)
    return stack_pointers(packed.stack, workspace, workspace.keys, workspace.values)._replace(
        projection=projection,
        projection_scale=projection_scale,
        projection_bias=packed.projection_bias,
        heads=heads,
        heads_scale=heads_scale,
        embedding=packed.embedding.data,
        table=packed.table,
        hidden=hidden,
        codes=codes,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        do_sample=params.do_sample,
        seed=key.seed,
        utterance=key.utterance,
        frame=key.frame,
    )


Launch = tuple[str, Any, int, tuple[Any, ...]]
"""Name of a phase, its kernel, its grid and its arguments."""


def layer_launches(p: Plan, a: Pointers, rows: int, batch: int, step: int, l: int, trace: int) -> Iterator[Launch]:
    """The phases of one layer, one launch each."""
    s, t = p.sizes, p.tiles
    yield "qkv", qkv_kernel, t.qkv.tiles, (a, rows, batch, step, l, trace, s, t.qkv)
    if s.FUSE_O:
        blocks = s.KV * triton.cdiv(s.D, t.o.BN)
        yield "attend_project", attend_project_kernel, blocks, (a, rows, batch, step, l, s, t.o)
    else:
        yield "attend", attend_kernel, rows * s.KV * s.SPLITS, (a, rows, batch, step, l, s)
        yield "project", project_kernel, t.o.tiles, (a, rows, batch, l, s, t.o)
    yield "gate_up", gate_up_kernel, t.gate_up.tiles, (a, rows, batch, l, s, t.gate_up)
    yield "down", down_kernel, t.down.tiles, (a, rows, batch, l, s, t.down)


def depth_launches(p: Plan, a: Pointers, batch: int, trace: int) -> Iterator[Launch]:
    """Every phase of a frame in order: what a CUDA graph captures where nothing is persistent."""
    s, t = p.sizes, p.tiles
    assert t.projection is not None and t.heads is not None
    yield "start", start_kernel, t.projection.tiles, (a, batch, 1, s, t.projection)
    for step in range(1, s.CODEBOOKS):
        if step > 1 and not s.FUSE_DRAW:
            yield "draws", draws_kernel, batch, (a, batch, step, trace, s)
            if not s.TABLE:
                yield "start", start_kernel, t.projection.tiles, (a, batch, step, s, t.projection)
        rows = 2 * batch if step == 1 else batch
        for l in range(s.LAYERS):
            yield from layer_launches(p, a, rows, batch, step, l, trace)
        yield "head", head_kernel, t.heads.tiles, (a, batch, step, trace, s, t.heads)
    yield "draws", draws_kernel, batch, (a, batch, s.CODEBOOKS, trace, s)


def run_launches(p: Plan, launches: Iterator[Launch]) -> None:
    """One launch after another; all but the first may start early where the device can do that."""
    sync = NO_SYNC
    for _, kernel, grid, arguments in launches:
        options = {"launch_pdl": True} if sync == PDL else {}
        warps = max(p.warps, _DRAW_WARPS) if kernel is draws_kernel else p.warps
        kernel[(grid,)](*arguments, SYNC=sync, num_warps=warps, num_stages=1, **options)
        sync = p.sync


def launch_depth(p: Plan, a: Pointers, batch: int, trace: int = 0) -> None:
    """One frame, codebook 0 being in ``a.token``; by either driver."""
    if not p.persistent:
        run_launches(p, depth_launches(p, a, batch, trace))
        return
    a.sync.zero_()
    t = p.tiles
    depth_kernel[(p.programs,)](
        a,
        batch,
        trace,
        _POLLS,
        p.sizes,
        t.projection,
        t.qkv,
        t.o,
        t.gate_up,
        t.down,
        t.heads,
        p.sync,
        **_cooperative(p),
    )


def launch_stack(p: Plan, a: Pointers, batch: int) -> None:
    """One backbone position per row: ``a.stream`` in, ``a.stream`` out, the final norm not yet applied."""
    if not p.persistent:
        launches = (x for l in range(p.sizes.LAYERS) for x in layer_launches(p, a, batch, batch, 2, l, 0))
        run_launches(p, launches)
        return
    a.sync.zero_()
    t = p.tiles
    stack_kernel[(p.programs,)](a, batch, _POLLS, p.sizes, t.qkv, t.o, t.gate_up, t.down, p.sync, **_cooperative(p))


def _cooperative(p: Plan) -> dict[str, Any]:
    return {"num_warps": p.warps, "num_stages": 1, **({} if interpreting() else {"launch_cooperative_grid": True})}
