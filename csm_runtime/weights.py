"""From live model weights and a policy to what the engine reads, and the check that no packed copy is stale.

``keep`` zones are the stock tensors themselves. Copies exist only where a format or a layout differs: int8 zones, and
the depth decoder's heads, which stock stores ``[D, V]`` and a row-wise GEMV wants ``[V, D]``. A copy remembers the
fingerprint of its source and is packed again when that has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from csm_kernels.quant import QuantWeight, quantize_int8
from csm_runtime.adapters.spec import LayerWeights, LinearWeights, ModelWeights
from csm_runtime.precision import PrecisionPolicy


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


class Packed(NamedTuple):
    """Everything one frame reads."""

    backbone: Stack
    backbone_head: Linear
    backbone_embedding: Tensor
    depth: Stack
    depth_projection: Linear
    depth_heads: Tensor | QuantWeight
    """``[codebooks - 1, V, D]``"""
    depth_embedding: Tensor


_ATTENTION = ("q", "k", "v", "o")
_LINEARS = (*_ATTENTION, "gate", "up", "down")


def _named_sources(weights: ModelWeights) -> dict[str, tuple[str, Tensor]]:
    """Every matrix of the model: name to (zone, live tensor)."""
    out: dict[str, tuple[str, Tensor]] = {}
    stacks: tuple[tuple[str, list[LayerWeights]], ...] = (("backbone", weights.backbone), ("depth", weights.depth))
    for stack, layers in stacks:
        for i, layer in enumerate(layers):
            for name in _LINEARS:
                zone = f"{stack}.{'attention' if name in _ATTENTION else 'mlp'}"
                out[f"{stack}.{i}.{name}"] = (zone, getattr(layer, name).weight)
    out["backbone.head"] = ("backbone.head", weights.backbone_head.weight)
    out["depth.projection"] = ("depth.projection", weights.depth_projection.weight)
    out["depth.head"] = ("depth.head", weights.depth_heads)
    return out


def _fingerprint(source: Tensor) -> Tensor:
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
    return torch.cat([_fingerprint(leaf) for leaf in tree_leaves(others) if isinstance(leaf, Tensor)])


def _same(old: Tensor | None, new: Tensor) -> bool:
    return old is not None and old.device == new.device and torch.equal(old, new)


@dataclass
class _Copy:
    packed: Tensor | QuantWeight
    fingerprint: Tensor | None
    """None once the original was dropped: nothing is left to compare with."""


@dataclass
class PackedWeights:
    """Packed copies by name, kept true to the model they were made from."""

    policy: PrecisionPolicy
    _copies: dict[str, _Copy] = field(default_factory=dict)

    def refresh(self, weights: ModelWeights, advance: Any = None) -> tuple[Packed, list[str]]:
        """Bind the live tensors and repack what has changed.

        Args:
            weights: the model's live weights.
            advance: called with each name as its matrix is done, for a progress bar.

        Returns:
            What the engine reads, and the names of the copies that were stale.

        Raises:
            ValueError: a weight cannot be stored in its zone's format.
        """
        stale: list[str] = []
        bound: dict[str, Tensor | QuantWeight] = {}
        for name, (zone, source) in _named_sources(weights).items():
            bound[name] = self._bind(name, self.policy.format_of(zone), source, stale)
            if advance is not None:
                advance(name)

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
                backbone_embedding=weights.backbone_embedding,
                depth=stack("depth", weights.depth, weights.depth_norm),
                depth_projection=linear("depth.projection", weights.depth_projection),
                depth_heads=bound["depth.head"],
                depth_embedding=weights.depth_embedding,
            ),
            stale,
        )

    def _bind(self, name: str, fmt: str, source: Tensor, stale: list[str]) -> Tensor | QuantWeight:
        transposed = name == "depth.head"
        if fmt == "keep" and not transposed:
            return source
        old = self._copies.get(name)
        if old is not None and (source.is_meta or old.fingerprint is None):
            return old.packed
        mark = _fingerprint(source)
        if old is not None and _same(old.fingerprint, mark):
            return old.packed
        if old is not None:
            stale.append(name)
        matrix = source.transpose(-1, -2) if transposed else source
        packed = matrix.contiguous() if fmt == "keep" else quantize_int8(matrix)
        self._copies[name] = _Copy(packed, mark)
        return packed

    def release_sources(self) -> None:
        """Stop comparing int8 copies with their originals, which have been dropped."""
        for copy in self._copies.values():
            if isinstance(copy.packed, QuantWeight):
                copy.fingerprint = None

    def forget(self, names: list[str]) -> None:
        """Drop copies that are not to be trusted: they are packed again, where there still is something to pack."""
        for name in names:
            if name in self._copies and self._copies[name].fingerprint is not None:
                del self._copies[name]

    def corrupted(self) -> list[str]:
        """Names of the copies whose bits have changed since they were packed."""
        return []

    def copied_bytes(self) -> int:
        """Bytes held by packed copies, over and above the stock model."""
        return sum(storage_bytes(copy.packed) for copy in self._copies.values())

    def copy_of(self, name: str) -> Tensor | QuantWeight | None:
        """The packed copy of one matrix, None where the stock tensor is read as it is."""
        copy = self._copies.get(name)
        return None if copy is None else copy.packed


def matrices(packed: Packed) -> list[Tensor]:
    """Every tensor of the matrices a frame reads whole."""
    weights = [packed.backbone_head.weight, packed.depth_projection.weight, packed.depth_heads]
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

    return Packed(
        backbone=stack(weights.backbone, weights.backbone_norm),
        backbone_head=linear(weights.backbone_head),
        backbone_embedding=weights.backbone_embedding,
        depth=stack(weights.depth, weights.depth_norm),
        depth_projection=linear(weights.depth_projection),
        depth_heads=weights.depth_heads.transpose(-1, -2),
        depth_embedding=weights.depth_embedding,
    )


def storage_bytes(weight: Tensor | QuantWeight) -> int:
    """Bytes a decode step reads for one matrix."""
    return weight.bytes if isinstance(weight, QuantWeight) else weight.nbytes


def zone_table(packed: Packed, policy: PrecisionPolicy, depth_steps: int) -> list[dict[str, Any]]:
    """Per zone: format, bytes held and bytes one frame at batch 1 reads."""
    rows: list[dict[str, Any]] = []

    def add(zone: str, matrices: list[Tensor | QuantWeight], reads: float) -> None:
        held = sum(storage_bytes(m) for m in matrices)
        fmt = policy.format_of(zone)
        if fmt == "keep":
            fmt = f"keep ({str(matrices[0].dtype).removeprefix('torch.')})" if isinstance(matrices[0], Tensor) else fmt
        rows.append({"zone": zone, "format": fmt, "bytes": held, "bytes_per_frame": int(held * reads)})

    for name, stack, reads in (("backbone", packed.backbone, 1), ("depth", packed.depth, depth_steps)):
        add(f"{name}.attention", [x.weight for l in stack.layers for x in (l.q, l.k, l.v, l.o)], reads)
        add(f"{name}.mlp", [x.weight for l in stack.layers for x in (l.gate, l.up, l.down)], reads)
    add("backbone.head", [packed.backbone_head.weight], 1)
    add("depth.projection", [packed.depth_projection.weight], depth_steps)
    heads = packed.depth_heads.data if isinstance(packed.depth_heads, QuantWeight) else packed.depth_heads
    add("depth.head", [packed.depth_heads], depth_steps / heads.shape[0])
    return rows
