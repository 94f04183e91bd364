"""From live model weights and a policy to what the engine reads, and the check that no packed copy is stale.

``keep`` zones are the stock tensors themselves, and so are casts to the dtype a zone already has. Copies exist only where
a format or a layout differs; among the latter are the depth decoder's heads, which stock stores ``[D, V]`` and a row-wise
GEMV wants ``[V, D]``. A copy remembers the fingerprint of its source and is packed again when that has changed; it also
remembers its own, so that :meth:`PackedWeights.corrupted` can tell whether it is still what was packed.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from csm_kernels.quant import QuantWeight, dequantize, quantize, take_rows
from csm_runtime.adapters.spec import LayerWeights, LinearWeights, ModelSpec, ModelWeights
from csm_runtime.precision import PrecisionPolicy, int4_layout

if TYPE_CHECKING:  # it stands on this file
    from csm_runtime.rounding import Rounding

_T = TypeVar("_T")


class Linear(NamedTuple):
    """A matrix as the decode step reads it."""

    weight: Tensor | QuantWeight
    bias: Tensor | None


class Layer(NamedTuple):
    """One decoder layer as the decode step reads it."""

    input_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    post_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


class Stack(NamedTuple):
    """All layers of one stack and its final norm."""

    layers: list[Layer]
    norm: Tensor


class DepthHeads(NamedTuple):
    """The depth decoder's heads: those of one format are a bank, one stacked matrix."""

    banks: list[Tensor | QuantWeight]
    """Each ``[heads, V, D]``."""
    places: tuple[tuple[int, int], ...]
    """Bank and row of codebooks 1, 2, ..."""

    def one(self, codebook: int) -> Tensor | QuantWeight:
        """The head ``[V, D]`` of one codebook, from 1 on; a view."""
        bank, row = self.places[codebook - 1]
        return take_rows(self.banks[bank], row)


class Packed(NamedTuple):
    """Everything one frame reads."""

    backbone: Stack
    backbone_head: Linear
    backbone_embedding: Tensor | QuantWeight
    depth: Stack
    depth_projection: Linear
    depth_heads: DepthHeads
    depth_embedding: Tensor | QuantWeight


_ATTENTION = ("q", "k", "v", "o")
_LINEARS = (*_ATTENTION, "gate", "up", "down")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The formats that are casts."""
_CHUNK = 1 << 18
"""Elements whose error is summed at once, 1 MB in fp32: 16.8 million take 44 ms, in steps of 4 MB 100 (1 core)."""


def head_banks(policy: PrecisionPolicy, codebooks: int) -> dict[str, list[int]]:
    """The depth decoder's heads by format, in order of appearance: format to codebooks."""
    banks: dict[str, list[int]] = {}
    for k in range(1, codebooks):
        banks.setdefault(policy.format_of(f"depth.head.{k}"), []).append(k)
    return banks


def spans(codebooks: Iterable[int]) -> str:
    """Numbers in words: ``1-3,5``."""
    runs: list[list[int]] = []
    for k in codebooks:
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def named_sources(weights: ModelWeights) -> dict[str, tuple[str, Tensor]]:
    """Every matrix of the model but the depth decoder's heads and embedding: name to (zone, live tensor)."""
    out: dict[str, tuple[str, Tensor]] = {}
    stacks: tuple[tuple[str, list[LayerWeights]], ...] = (("backbone", weights.backbone), ("depth", weights.depth))
    for stack, layers in stacks:
        for i, layer in enumerate(layers):
            for name in _LINEARS:
                zone = f"{stack}.{'attention' if name in _ATTENTION else 'mlp'}"
                out[f"{stack}.{i}.{name}"] = (zone, getattr(layer, name).weight)
    for zone, live in (
        ("backbone.head", weights.backbone_head.weight),
        ("backbone.embedding", weights.backbone_embedding),
        ("depth.projection", weights.depth_projection.weight),
    ):
        out[zone] = (zone, live)
    return out


def fingerprint(source: Tensor) -> Tensor:
    """A bit pattern that changes with any change of a weight, ``[n]`` int64.

    Exact integer sums of the raw 64-bit words in blocks of 64, the block sums of 32 kB then added with odd weights; what
    is left over stands as it is. Any changed value changes it, and so do moved rows; only a permutation of words within
    one block does not. It reads at 24 of 27 GB/s here, 0.1 s for CSM-1B in bf16, where a matrix-vector product through
    fp32 took 1.1 s. ``_version`` is not enough: ``param.data += delta``, which LoRA merges use, does not move it.
    """
    flat = source.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64)
    blocks = words.numel() // 4096
    odd = torch.arange(1, 129, 2, device=flat.device)
    sums = (words[: blocks * 4096].view(blocks, 64, 64).sum(2) * odd).sum(1)
    return torch.cat([sums, words[blocks * 4096 :], raw[whole:].long()])


def fingerprints(packed: Packed) -> Tensor:
    """One pattern for everything the fused kernels hold a copy of, ``[n]`` int64; the backbone's embedding is not."""
    others = packed._replace(backbone_embedding=packed.backbone.norm)
    return torch.cat([fingerprint(leaf) for leaf in tree_leaves(others) if isinstance(leaf, Tensor)])


def _memory_of(source: Tensor) -> tuple[Any, ...]:
    return source.data_ptr(), source.dtype, source.shape, source.stride()


def _same(old: Tensor | None, new: Tensor) -> bool:
    return old is not None and old.device == new.device and torch.equal(old, new)


def checksum(packed: Tensor | QuantWeight) -> Tensor:
    """The fingerprint of a packed copy."""
    if isinstance(packed, QuantWeight):
        return torch.cat([fingerprint(packed.data), fingerprint(packed.scale)])
    return fingerprint(packed)


class Energy(NamedTuple):
    """Sums of squares over a matrix: of its values, and of what its format changed in them."""

    signal: float
    noise: float


def _energy(source: Tensor, packed: Tensor | QuantWeight) -> Energy:
    """Of ``[..., N, K]``, some rows at a time, a fraction of what packing takes."""
    if source.ndim > 2:
        parts = [_energy(source[i], take_rows(packed, i)) for i in range(len(source))]
        return Energy(sum(part.signal for part in parts), sum(part.noise for part in parts))
    signal, noise, step = 0.0, 0.0, max(1, _CHUNK // max(1, source.shape[1]))
    for first in range(0, len(source), step):
        some = slice(first, first + step)
        truth = source[some].to(torch.float32, copy=True)
        signal += _norm(truth) ** 2
        noise += _norm(truth.sub_(dequantize(take_rows(packed, some)))) ** 2
    return Energy(signal, noise)


def _norm(values: Tensor) -> float:
    """In fp32 while the squares fit that: fp64, which some devices lack, takes several times as long."""
    norm = float(torch.linalg.vector_norm(values))
    if 1e-12 < norm < math.inf:
        return norm
    return float(torch.linalg.vector_norm(values.cpu(), dtype=torch.float64))


@dataclass(frozen=True)
class _Copy:
    packed: Tensor | QuantWeight
    format: str
    zones: tuple[str, ...]
    energy: Energy | None
    """None where nothing was rounded."""
    checksum: Tensor
    fingerprint: Tensor | None
    """None once the original was dropped: nothing is left to compare with."""


def _converted(
    name: str, matrix: Tensor, fmt: str, rounded: QuantWeight | None = None
) -> tuple[Tensor | QuantWeight, Energy | None]:
    """A matrix in a format, in memory of its own or as it was rounded before, and what that cost."""
    if rounded is not None:
        return rounded, _energy(matrix, rounded)
    if fmt == "keep" or DTYPES.get(fmt) == matrix.dtype:
        return matrix.clone(memory_format=torch.contiguous_format), None
    if fmt in DTYPES:
        cast = matrix.to(DTYPES[fmt], memory_format=torch.contiguous_format)
        if fmt != "fp32" and not torch.isfinite(cast).all():
            instead = ", or store it as bf16" if fmt == "fp16" else ""
            raise ValueError(f"precision: {name} holds values beyond {fmt} (or NaN): keep it{instead}")
        return cast, None if fmt == "fp32" else _energy(matrix, cast)
    try:
        layout = int4_layout(fmt)
        packed = quantize(matrix, fmt) if layout is None else quantize(matrix, "int4", *layout)
    except ValueError as error:
        raise ValueError(f"precision: {name} cannot be stored as {fmt}: {error}") from error
    return packed, _energy(matrix, packed)


class _Want(NamedTuple):
    """A copy that the policy asks for."""

    format: str
    zones: tuple[str, ...]
    source: Tensor
    """What it is true to; on the meta device where it was dropped."""
    matrix: Callable[[], Tensor]
    """``[..., N, K]``, as it is packed."""


def _made(name: str, want: _Want, mark: Tensor | None, rounded: QuantWeight | None) -> _Copy:
    with torch.no_grad():
        packed, energy = _converted(name, want.matrix(), want.format, rounded)
        return _Copy(packed, want.format, want.zones, energy, checksum(packed), mark)


def side_by_side(jobs: Mapping[str, Callable[[], _T]], threads: bool) -> Iterator[tuple[str, _T]]:
    """Results in the order of the jobs, whatever the order in which they are done.

    Args:
        jobs: to run, by name; what one raises comes out where its result would.
        threads: as many at once as PyTorch has threads, each with one for its own ops. Packing runs dozens of short ops
            per block, and threads that meet after each of them wait for the slowest: 146 million weights to int4 take
            0.73 s so, at best 1.0 s with two threads inside every op as well, and without workers 1.8 s or, where other
            processes want the cores, 8 to 46 instead of 1.3 (2 cores, 2026-11-28).
    """
    count = min(torch.get_num_threads(), len(jobs)) if threads else 1
    if count < 2:
        yield from ((name, job()) for name, job in jobs.items())
        return
    with single_threaded_pool(count) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        try:
            for name, future in futures.items():
                yield name, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def single_threaded_pool(count: int) -> ThreadPoolExecutor:
    """Workers whose own ops run in one thread; what PyTorch uses elsewhere is as before."""
    before, ready = torch.get_num_threads(), threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "csm-pack", torch.set_num_threads, (1,))
    for _ in range(count):
        pool.submit(ready.wait)
    ready.wait()
    torch.set_num_threads(before)  # for threads that start later; the workers keep theirs
    return pool


@dataclass
class PackedWeights:
    """Packed copies by name, kept true to the model they were made from.

    :class:`csm_runtime.packed_store.PackedStore` reads and writes the copies.
    """

    policy: PrecisionPolicy
    _copies: dict[str, _Copy] = field(default_factory=dict)
    rounding: Rounding | None = None
    """Calibrated codes of int4 matrices."""
    unrounded: set[str] = field(default_factory=set)
    """Names of copies for which ``rounding`` had none of the weights as they are: rounded to nearest."""
    _marks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    """Fingerprints that the latest refresh took, by the memory they are of."""

    def mark_of(self, source: Tensor) -> Tensor:
        """The fingerprint of a live weight, read once per :meth:`refresh`: what copies are compared with is not read again."""
        mark = self._marks.get(_memory_of(source))
        return fingerprint(source) if mark is None else mark

    def with_policy(self, policy: PrecisionPolicy) -> PackedWeights:
        """For another policy; copies whose format is the same in both are shared, not made again.

        :meth:`refresh` makes the others. Neither changes what the other holds: a copy that is made again is its maker's.
        """
        shared = {
            name: copy
            for name, copy in self._copies.items()
            if all(policy.format_of(zone) == copy.format for zone in copy.zones)
        }
        return PackedWeights(policy, shared, self.rounding)

    def refresh(self, weights: ModelWeights, advance: Callable[[str], None] | None = None) -> tuple[Packed, list[str]]:
        """Bind the live tensors and repack what has changed, on a CPU several matrices at once.

        Args:
            weights: the model's live weights.
            advance: called with each name as its matrix is done, for a progress bar; ``depth.head`` once for all heads.

        Returns:
            What the engine reads, and the names of the copies that were stale.

        Raises:
            ValueError: a weight cannot be stored in its zone's format, or the policy is about heads the model does not
                have, or asks another format of a matrix whose original was dropped.
        """
        self.policy.check_codebooks(len(weights.depth_heads) + 1)
        done = advance or (lambda _: None)
        wanted, banks = self._wanted(weights), self._banks(weights.depth_heads)
        for name in list(self._copies):
            if name not in banks and name.startswith("depth.head.") or wanted.get(name) is None and name in wanted:
                del self._copies[name]
        tied = self._tied_embeddings(weights, wanted)
        asked = {name: want for name, want in {**wanted, **banks}.items() if want is not None}
        if tied:
            del asked["depth.embedding"]
        stale = self._make(asked, lambda name: None if name in banks else done(name))
        if tied:
            self._tie()
        for name in wanted:
            if name not in asked:
                done(name)
        done("depth.head")
        sources = {**named_sources(weights), "depth.embedding": ("depth.embedding", weights.depth_embedding)}
        bound = {
            name: live if wanted[name] is None else self._copies[name].packed for name, (_, live) in sources.items()
        }

        def linear(name: str, live: LinearWeights) -> Linear:
            return Linear(bound[name], live.bias)

        def layer(prefix: str, live: LayerWeights) -> Layer:
            parts = {name: linear(f"{prefix}.{name}", getattr(live, name)) for name in _LINEARS}
            return Layer(input_norm=live.input_norm, post_norm=live.post_norm, **parts)

        def stack(prefix: str, layers: list[LayerWeights], norm: Tensor) -> Stack:
            return Stack([layer(f"{prefix}.{i}", live) for i, live in enumerate(layers)], norm)

        return (
            Packed(
                backbone=stack("backbone", weights.backbone, weights.backbone_norm),
                backbone_head=linear("backbone.head", weights.backbone_head),
                backbone_embedding=bound["backbone.embedding"],
                depth=stack("depth", weights.depth, weights.depth_norm),
                depth_projection=linear("depth.projection", weights.depth_projection),
                depth_heads=self._bound_heads(banks),
                depth_embedding=bound["depth.embedding"],
            ),
            stale,
        )

    def pack(self, weights: ModelWeights, names: Collection[str]) -> dict[str, Tensor | QuantWeight]:
        """Make some of the copies that :meth:`refresh` would make, while other weights are not there yet.

        Threads may call this at once for different names.

        Args:
            weights: live weights; those that are not named may be on the meta device.
            names: of matrices, as ``advance`` of :meth:`refresh` gets them. What is read where it lies makes no copy. Tied
                embeddings have to come together.

        Returns:
            The copies by name; banks of heads as in :meth:`quantized`.

        Raises:
            ValueError: a weight cannot be stored in its zone's format.
        """
        wanted = self._wanted(weights)
        asked = {name: want for name in names if (want := wanted.get(name)) is not None}
        if "depth.head" in names:
            asked |= self._banks(weights.depth_heads)
        tied = {"backbone.embedding", "depth.embedding"} <= asked.keys() and self._tied_embeddings(weights, wanted)
        made = list(asked)
        if tied:
            del asked["depth.embedding"]
        self._make(asked, lambda _: None)
        if tied:
            self._tie()
        return {name: self._copies[name].packed for name in made}

    def _tie(self) -> None:
        self._copies["depth.embedding"] = replace(self._copies["backbone.embedding"], zones=("depth.embedding",))

    def _wanted(self, weights: ModelWeights) -> dict[str, _Want | None]:
        """What is to be a copy, by name; None for what is read where it lies. Without the heads."""
        out: dict[str, _Want | None] = {}
        for name, (zone, live) in named_sources(weights).items():
            out[name] = self._want(zone, live)
        out["depth.embedding"] = self._want("depth.embedding", weights.depth_embedding)
        return out

    def _want(self, zone: str, live: Tensor) -> _Want | None:
        fmt = self.policy.format_of(zone)
        if not live.is_meta and (fmt == "keep" or DTYPES.get(fmt) == live.dtype):
            return None
        return _Want(fmt, (zone,), live, lambda: live)

    def _tied_embeddings(self, weights: ModelWeights, wanted: dict[str, _Want | None]) -> bool:
        """Whether the model has one table for both and the policy one format: then one copy does."""
        live, other = weights.depth_embedding, weights.backbone_embedding
        mine, theirs = wanted["depth.embedding"], wanted["backbone.embedding"]
        tied = not live.is_meta and live.data_ptr() == other.data_ptr() and live.shape == other.shape
        return tied and mine is not None and theirs is not None and mine.format == theirs.format

    def _banks(self, live: Tensor) -> dict[str, _Want]:
        """The heads ``[codebooks - 1, D, V]`` by format, always copies; one that changes repacks them all."""
        out = {}
        for books in head_banks(self.policy, len(live) + 1).values():
            zones = tuple(f"depth.head.{k}" for k in books)

            def stacked(books: list[int] = books) -> Tensor:
                whole = live if len(books) == len(live) else live[[k - 1 for k in books]]
                return whole.transpose(-1, -2)

            out[f"depth.head.{spans(books)}"] = _Want(self.policy.format_of(zones[0]), zones, live, stacked)
        return out

    def depth_heads(self, live: Tensor) -> DepthHeads:
        """The packed heads of the stock ``[codebooks - 1, D, V]``, of which only the shape counts here."""
        return self._bound_heads(self._banks(live))

    def _bound_heads(self, banks: dict[str, _Want]) -> DepthHeads:
        places = {zone: (i, row) for i, want in enumerate(banks.values()) for row, zone in enumerate(want.zones)}
        in_order = (places[f"depth.head.{k}"] for k in range(1, len(places) + 1))
        return DepthHeads([self._copies[name].packed for name in banks], tuple(in_order))

    def _make(self, asked: dict[str, _Want], done: Callable[[str], None]) -> list[str]:
        """Make the copies that are missing or out of date; names of the latter."""
        stale: list[str] = []
        jobs: dict[str, Callable[[], _Copy]] = {}
        marks = self._marks = dict[tuple[Any, ...], Tensor]()
        for name, want in asked.items():
            mark = None
            if not want.source.is_meta:
                key = _memory_of(want.source)
                mark = marks[key] = fingerprint(want.source) if key not in marks else marks[key]
            old = self._copies.get(name)
            if old is not None and old.format != want.format:
                old = None
            if mark is None and old is None:
                raise ValueError(
                    f"precision: the original of {name} was dropped, so it cannot be stored as {want.format} any more"
                )
            if old is not None and (mark is None or old.fingerprint is None or _same(old.fingerprint, mark)):
                done(name)
                continue
            if old is not None:
                stale.append(name)
            rounded = self._rounded(name, want.format, want.zones, mark)
            jobs[name] = functools.partial(_made, name, want, mark, rounded)
        on_cpu = all(asked[name].source.device.type == "cpu" for name in jobs)
        for name, copy in side_by_side(jobs, on_cpu):
            self._copies[name] = copy
            done(name)
        return stale

    def _rounded(self, name: str, fmt: str, zones: tuple[str, ...], mark: Tensor | None) -> QuantWeight | None:
        """Calibrated codes, where there are any for the weight as it is. Embeddings are not multiplied and have none."""
        if self.rounding is None or mark is None or int4_layout(fmt) is None or name.endswith(".embedding"):
            return None
        codes = self.rounding.codes(zones if name.startswith("depth.head.") else (name,), fmt, mark)
        (self.unrounded.add if codes is None else self.unrounded.discard)(name)
        return codes

    def corrupted(self) -> list[str]:
        """Names of the copies whose bits are no longer those that were packed; reads all of them once."""
        return [name for name, copy in self._copies.items() if not _same(copy.checksum, checksum(copy.packed))]

    def checksums(self) -> dict[str, Tensor]:
        """What each copy's bits were when it was packed, ``[n]`` int64 by name."""
        return {name: copy.checksum for name, copy in self._copies.items()}

    def release_sources(self, names: Iterable[str]) -> None:
        """Stop comparing copies with their originals, which have been dropped."""
        self._marks = {}
        for name in names:
            self._copies[name] = replace(self._copies[name], fingerprint=None)

    def forget(self, names: list[str]) -> None:
        """Drop copies that are not to be trusted: they are packed again, where there still is something to pack."""
        for name in names:
            if name in self._copies and self._copies[name].fingerprint is not None:
                del self._copies[name]

    def copied_bytes(self) -> int:
        """Bytes held by packed copies, over and above the stock model."""
        held = {id(copy.packed): copy.packed for copy in self._copies.values()}  # tied embeddings are one
        return sum(map(storage_bytes, held.values()))

    def quantized(self) -> dict[str, QuantWeight]:
        """The copies in int8, fp8 or int4 by name; a bank of heads is named by its codebooks, such as ``depth.head.1-31``."""
        return {name: copy.packed for name, copy in self._copies.items() if isinstance(copy.packed, QuantWeight)}

    def sqnr_db(self, zone: str) -> float | None:
        """Signal to rounding noise over all matrices of a zone; None where nothing was rounded.

        A head's is that of its bank, all heads of its format.
        """
        parts = [copy.energy for copy in self._copies.values() if zone in copy.zones and copy.energy is not None]
        signal, noise = sum(part.signal for part in parts), sum(part.noise for part in parts)
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def matrices(packed: Packed) -> list[Tensor]:
    """Every tensor of the matrices a frame reads whole."""
    weights = [packed.backbone_head.weight, packed.depth_projection.weight, *packed.depth_heads.banks]
    for stack in (packed.backbone, packed.depth):
        weights += [value.weight for layer in stack.layers for value in layer if isinstance(value, Linear)]
    return [weight.data if isinstance(weight, QuantWeight) else weight for weight in weights]


def unlowered(weights: ModelWeights) -> Packed:
    """The stock model's own tensors in the same form, nothing copied."""

    def linear(live: LinearWeights) -> Linear:
        return Linear(live.weight, live.bias)

    def stack(layers: list[LayerWeights], norm: Tensor) -> Stack:
        made = [
            Layer(
                input_norm=live.input_norm,
                post_norm=live.post_norm,
                **{name: linear(getattr(live, name)) for name in _LINEARS},
            )
            for live in layers
        ]
        return Stack(made, norm)

    heads = weights.depth_heads.transpose(-1, -2)
    return Packed(
        backbone=stack(weights.backbone, weights.backbone_norm),
        backbone_head=linear(weights.backbone_head),
        backbone_embedding=weights.backbone_embedding,
        depth=stack(weights.depth, weights.depth_norm),
        depth_projection=linear(weights.depth_projection),
        depth_heads=DepthHeads([heads], tuple((0, row) for row in range(len(heads)))),
        depth_embedding=weights.depth_embedding,
    )


def storage_bytes(weight: Tensor | QuantWeight) -> int:
    """Bytes a decode step reads for one matrix."""
    return weight.bytes if isinstance(weight, QuantWeight) else weight.nbytes


def _head_rows(policy: PrecisionPolicy, codebooks: int) -> list[tuple[str, list[int]]]:
    """Neighbouring heads of one format: what to call them, and their codebooks."""
    runs = itertools.groupby(range(1, codebooks), lambda k: policy.format_of(f"depth.head.{k}"))
    books = [list(run) for _, run in runs]
    return [("depth.head" if len(books) == 1 else f"depth.head.{spans(run)}", run) for run in books]


def zone_table(
    packed: Packed, weights: PackedWeights, kv: tuple[torch.dtype, int], codec: tuple[torch.dtype, int]
) -> list[dict[str, Any]]:
    """Per zone: ``format``, ``bytes`` held, ``bytes_per_frame`` read at batch 1, ``sqnr_db``, and ``shared_with``.

    Args:
        packed: what the engine reads.
        weights: where it comes from.
        kv: dtype and bytes of the KV buffers.
        codec: likewise of the codec.

    ``bytes_per_frame`` is None for ``kv`` and ``codec``: what is read of a cache depends on the context, and the codec runs
    on many frames at once. ``sqnr_db`` is None where nothing was rounded. ``shared_with`` is the zone whose bytes these are
    as well, for embeddings that are tied; None for others. Neighbouring heads of one format share a row.
    """
    rows: list[dict[str, Any]] = []
    policy, codebooks = weights.policy, len(packed.depth_heads.places) + 1
    steps = codebooks - 1  # passes of the depth decoder: positions 0 and 1 in one
    one, other = (table.data for table in (packed.backbone_embedding, packed.depth_embedding))
    tied = one.data_ptr() == other.data_ptr() and one.shape == other.shape

    def add(name: str, zone: str, held: int, dtype: torch.dtype | None, read: int | None) -> None:
        fmt = policy.format_of(zone)
        if fmt == "keep" and dtype is not None:
            fmt = f"keep ({str(dtype).removeprefix('torch.')})"
        sqnr = weights.sqnr_db(zone)
        shared = "backbone.embedding" if zone == "depth.embedding" and tied else None
        rows.append(
            {
                **{"zone": name, "format": fmt, "bytes": held, "bytes_per_frame": read},
                **{"sqnr_db": sqnr, "shared_with": shared},
            }
        )

    def add_matrices(name: str, parts: list[Tensor | QuantWeight], reads: float, zone: str | None = None) -> None:
        held = sum(storage_bytes(part) for part in parts)
        add(name, zone or name, held, parts[0].dtype if isinstance(parts[0], Tensor) else None, int(held * reads))

    for name, stack, reads in (("backbone", packed.backbone, 1), ("depth", packed.depth, steps)):
        add_matrices(f"{name}.attention", [x.weight for l in stack.layers for x in (l.q, l.k, l.v, l.o)], reads)
        add_matrices(f"{name}.mlp", [x.weight for l in stack.layers for x in (l.gate, l.up, l.down)], reads)
    add_matrices("backbone.head", [packed.backbone_head.weight], 1)
    add_matrices("depth.projection", [packed.depth_projection.weight], steps)
    for name, books in _head_rows(policy, codebooks):
        add_matrices(name, [packed.depth_heads.one(k) for k in books], 1, f"depth.head.{books[0]}")
    tables = (("backbone", packed.backbone_embedding, codebooks), ("depth", packed.depth_embedding, codebooks - 1))
    for name, table, reads in tables:
        add_matrices(f"{name}.embedding", [table], reads / len(table.data))
    for zone, (dtype, held) in (("kv", kv), ("codec", codec)):
        add(zone, zone, held, dtype, None)
    return rows


def planned_table(spec: ModelSpec, policy: PrecisionPolicy, dtype: torch.dtype) -> list[dict[str, Any]]:
    """``zone``, ``format``, ``bytes`` and ``bytes_per_frame`` as :func:`zone_table` will have them, without a model.

    ``kv`` and ``codec`` are left out. ``dtype`` is that of the model.
    """
    rows: list[dict[str, Any]] = []
    steps = spec.codebooks - 1

    def add(name: str, sizes: list[tuple[int, int]], reads: float, zone: str | None = None) -> None:
        fmt = policy.format_of(zone or name)
        held = sum(_bytes_in(fmt, height, width, dtype) for height, width in sizes)
        rows.append({"zone": name, "format": fmt, "bytes": held, "bytes_per_frame": int(held * reads)})

    for name, stack, reads in (("backbone", spec.backbone, 1), ("depth", spec.depth, steps)):
        query, key = stack.heads * stack.head_dim, stack.kv_heads * stack.head_dim
        attention = [(query, stack.hidden), (key, stack.hidden), (key, stack.hidden), (stack.hidden, query)]
        mlp = [(stack.ffn, stack.hidden), (stack.ffn, stack.hidden), (stack.hidden, stack.ffn)]
        add(f"{name}.attention", attention * stack.layers, reads)
        add(f"{name}.mlp", mlp * stack.layers, reads)
    width = spec.backbone.hidden
    add("backbone.head", [(spec.vocab, width)], 1)
    add("depth.projection", [(spec.depth.hidden, width)], steps)
    for name, books in _head_rows(policy, spec.codebooks):
        add(name, [(spec.depth_vocab, spec.depth.hidden)] * len(books), 1, f"depth.head.{books[0]}")
    for name, vocab, reads in (("backbone", spec.vocab, spec.codebooks), ("depth", spec.depth_vocab, steps)):
        rows_held = spec.codebooks * vocab
        add(f"{name}.embedding", [(rows_held, width)], reads / rows_held)
    return rows


def _bytes_in(fmt: str, height: int, width: int, dtype: torch.dtype) -> int:
    if fmt in ("int8", "fp8"):
        return height * (width + 4)
    layout = int4_layout(fmt)
    if layout is not None:
        group, symmetric = layout
        return height * -(-width // group) * (group // 2 + (2 if symmetric else 4))
    return height * width * DTYPES.get(fmt, dtype).itemsize
