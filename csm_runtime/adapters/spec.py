"""What the engine needs to know of a CSM, whoever's modules hold it. Imports nothing of ours.

An adapter reads a stock model into a :class:`ModelSpec` once, and into a :class:`ModelWeights` of live tensors before
every generation: the tensors share storage with the model's parameters, so an in-place update, a LoRA merge or a
``.to()`` is seen without anyone having to say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class StackSpec:
    """Shape of one Llama stack: the backbone or the depth decoder."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    positions: int
    """Positions its rotary table covers."""


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a CSM."""

    backbone: StackSpec
    depth: StackSpec
    codebooks: int
    vocab: int
    """Tokens per codebook of the backbone's audio embedding and codebook-0 head."""
    depth_vocab: int
    """Tokens per codebook of the depth decoder's embedding and heads."""

    def step_parameters(self) -> dict[str, int]:
        """Weights read once per frame at batch 1, by part, in elements."""

        def layer(s: StackSpec) -> int:
            attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
            return attention + 3 * s.hidden * s.ffn

        steps = self.codebooks  # position 0 holds the backbone's hidden state, the last codebook is never fed back
        b, d = self.backbone, self.depth
        return {
            "backbone": b.layers * layer(b),
            "backbone.head": self.vocab * b.hidden,
            "depth": steps * (d.layers * layer(d) + b.hidden * d.hidden),
            "depth.head": steps * self.depth_vocab * d.hidden,
        }


class LinearWeights(NamedTuple):
    """``weight`` ``[N, K]`` and ``bias`` ``[N]`` or None."""

    weight: Tensor
    bias: Tensor | None


class LayerWeights(NamedTuple):
    """One decoder layer, in the order of its forward pass."""

    input_norm: Tensor
    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    o: LinearWeights
    post_norm: Tensor
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights


class ModelWeights(NamedTuple):
    """Live weights of a CSM. The tensors share storage with the model's parameters and carry no gradient."""

    backbone: list[LayerWeights]
    backbone_norm: Tensor
    backbone_head: LinearWeights
    backbone_embedding: Tensor
    """``[codebooks * vocab, backbone hidden]``"""
    depth: list[LayerWeights]
    depth_norm: Tensor
    depth_projection: LinearWeights
    depth_heads: Tensor
    """``[codebooks - 1, depth hidden, depth_vocab]``, the stock layout; packed transposed."""
    depth_embedding: Tensor
    """``[codebooks * depth_vocab, backbone hidden]``"""


class RotaryTables(NamedTuple):
    """``cos`` and ``sin``, each ``[positions, head_dim]`` fp32, both halves equal."""

    cos: Tensor
    sin: Tensor
