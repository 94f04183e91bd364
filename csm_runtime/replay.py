"""Frames made again from what is known of them: parallel teacher-forced passes in fp32 on the packed weights.

Codes are known once a frame is made, so all its positions are rows of a few large products. Nothing here shares code with
the decode steps: weights are dequantised one matrix at a time and multiplied by the library, in fp32, and keys and values
are rounded to the cache's dtype as the steps round them. What differs from it is the decode step's own error; what differs
between it and the stock model is the error of the weights' formats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from csm_kernels.quant import dequantize, take_rows, widen
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref
from csm_runtime.adapters.spec import ModelSpec, RotaryTables, StackSpec
from csm_runtime.weights import Layer, Linear, Packed


class Pass(NamedTuple):
    """What the backbone makes of some positions."""

    hidden: Tensor
    """``[N, T, D]`` fp32, normalised."""
    keys: list[Tensor]
    """Per layer ``[N, KV, T, head_dim]`` in the cache's dtype."""
    values: list[Tensor]


class Replay:
    """Teacher-forced passes of one model.

    Args:
        spec: the model's shape.
        rotary: tables of the backbone and the depth decoder.
        cache_dtypes: dtype of the backbone's cached keys and values, and of the depth decoder's.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rotary: tuple[RotaryTables, RotaryTables],
        cache_dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self._spec, self._rotary, self._cache_dtypes = spec, rotary, cache_dtypes

    def first_logits(self, packed: Packed, hidden: Tensor) -> Tensor:
        """Codebook 0's logits ``[..., vocab]`` fp32 from hidden states ``[..., D]``."""
        return _product(hidden, packed.backbone_head)

    def depth_logits(self, packed: Packed, hidden: Tensor, codes: Tensor) -> Tensor:
        """Logits of codebooks 1 to the last, each given the true codes before it.

        Args:
            packed: weights.
            hidden: ``[n, D]`` fp32, the backbone's hidden states of n frames.
            codes: ``[n, codebooks]`` int64; the last one is not read.

        Returns:
            ``[n, codebooks - 1, depth_vocab]`` fp32.
        """
        spec, (_, tables) = self._spec, self._rotary
        # Codebook 0 may have more tokens than the others: it then reads rows of the next one, as in the stock model.
        fed = codes[:, :-1] + torch.arange(spec.codebooks - 1, device=codes.device) * spec.depth_vocab
        fed = fed.clamp(0, spec.codebooks * spec.depth_vocab - 1)
        x = torch.cat([hidden.float()[:, None], dequantize(take_rows(packed.depth_embedding, fed))], dim=1)
        x = _product(x, packed.depth_projection)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        cos, sin = (table[: x.shape[1]] for table in tables)
        for layer in packed.depth.layers:
            x, _, _ = self._layer(x, layer, (cos, sin), causal, None, spec.depth, self._cache_dtypes[1])
        x = _norm(x[:, 1:], packed.depth.norm, spec.depth.eps)
        heads = [linear(x[:, k - 1], widen(packed.depth_heads.one(k))) for k in range(1, spec.codebooks)]
        return torch.stack(heads, dim=1)

    def embed(self, packed: Packed, codes: Tensor) -> Tensor:
        """``[..., D]`` fp32, the backbone's input for frames ``[..., codebooks]``."""
        offsets = torch.arange(self._spec.codebooks, device=codes.device) * self._spec.vocab
        places = codes.clamp(0, self._spec.vocab - 1) + offsets
        return dequantize(take_rows(packed.backbone_embedding, places)).sum(-2)

    def backbone(
        self,
        packed: Packed,
        x: Tensor,
        positions: Tensor,
        allowed: Tensor,
        before: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> Pass:
        """Consecutive positions through the backbone.

        Args:
            packed: weights.
            x: ``[N, T, D]`` embeddings, any float dtype.
            positions: ``[N, T]`` int64 rotary positions.
            allowed: ``[N, P + T]`` bool, which positions count at all, the P cached ones first.
            before: per layer cached keys and values ``[N, KV, P, head_dim]``, or None where P is 0.
        """
        spec, (tables, _) = self._spec, self._rotary
        new, past = x.shape[1], allowed.shape[1] - x.shape[1]
        causal = torch.ones(new, past + new, dtype=torch.bool, device=x.device).tril(past)
        seen = causal & allowed[:, None, :]
        # A padded position sees itself, as in the stock mask: a row of nothing but minus infinity would be NaN.
        seen = (seen | torch.eye(new, past + new, dtype=torch.bool, device=x.device).roll(past, 1))[:, None]
        cos, sin = (table[positions][:, None] for table in tables)
        keys, values = [], []
        x = x.float()
        for i, layer in enumerate(packed.backbone.layers):
            cached = None if before is None else (before[0][i], before[1][i])
            x, k, v = self._layer(x, layer, (cos, sin), seen, cached, spec.backbone, self._cache_dtypes[0])
            keys.append(k)
            values.append(v)
        return Pass(_norm(x, packed.backbone.norm, spec.backbone.eps), keys, values)

    @staticmethod
    def _layer(
        x: Tensor,
        layer: Layer,
        tables: tuple[Tensor, Tensor],
        seen: Tensor,
        cached: tuple[Tensor, Tensor] | None,
        shape: StackSpec,
        cache_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over ``[N, T, D]``: the stream, and this pass's keys and values in the cache's dtype."""

        def heads(matrix: Linear) -> Tensor:
            return _product(normed, matrix).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

        normed = _norm(x, layer.input_norm, shape.eps)
        q, k, v = (heads(matrix) for matrix in (layer.q, layer.k, layer.v))
        k, v = _turned(k, *tables).to(cache_dtype), v.to(cache_dtype)
        keys, values = k, v
        if cached is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(cached, (k, v)))
        out = scaled_dot_product_attention(
            _turned(q, *tables), keys.float(), values.float(), attn_mask=seen, enable_gqa=True
        )
        x = x + _product(out.transpose(1, 2).flatten(2), layer.o)
        normed = _norm(x, layer.post_norm, shape.eps)
        return x + _product(silu(_product(normed, layer.gate)) * _product(normed, layer.up), layer.down), k, v


def _product(x: Tensor, matrix: Linear) -> Tensor:
    bias = None if matrix.bias is None else matrix.bias.float()
    return linear(x.float(), widen(matrix.weight), bias)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Redraw(NamedTuple):
    """Tokens drawn again from other logits with the same noise."""

    drawn: Tensor
    """``[n, K]`` int64, what these logits draw."""
    same: Tensor
    """``[n, K]`` bool: the token that came out is the token that was drawn."""
    margin: Tensor
    """``[n, K]`` fp32, in units of the logits: how far the other logits are from drawing it too; 0 where they do."""


def noise_of(key: NoiseKey, first_codebook: int, books: int, vocab: int) -> Tensor:
    """The noise ``[n, books, vocab]`` fp32 of consecutive codebooks of ``n`` frames.

    Frame by frame: the generator's 64-bit words of one frame stay in the cache, those of six take ten times as long each.
    """
    codebook = torch.arange(first_codebook, first_codebook + books, device=key.seed.device)
    rows = [NoiseKey(*(value[i : i + 1].expand(books) for value in key)) for i in range(len(key.seed))]
    return torch.stack([gumbel_noise_ref(row, codebook, vocab) for row in rows])


def redraw(logits: Tensor, codes: Tensor, params: SamplingParams, noise: Tensor, tolerance: Tensor) -> Redraw:
    """Draw codebooks again and say by how much each token that differs has lost.

    Args:
        logits: ``[n, K, V]`` fp32.
        codes: ``[n, K]`` int64, what was drawn from logits that should have been nearly these.
        params: one entry for each of the n.
        noise: ``[n, K, V]`` fp32, see :func:`noise_of`.
        tolerance: ``[K]`` fp32, by how much a logit may differ: a token that near a top-k or top-p limit may stand on
            either side of it.
    """
    _, books, vocab = logits.shape
    temperature = torch.where(params.do_sample, params.temperature, torch.ones_like(params.temperature))
    scores = logits / temperature[:, None, None]
    room = (tolerance[None, :] / temperature[:, None])[..., None]
    noise = torch.where(params.do_sample[:, None, None], noise, 0.0)
    ranked, _ = scores.sort(dim=-1, descending=True, stable=True)
    whole = ~params.do_sample
    last = torch.where(whole, vocab, params.top_k.clamp(1, vocab))[:, None, None].expand(-1, books, 1) - 1
    limit = ranked.gather(-1, last)
    mass = torch.softmax(ranked.masked_fill(ranked < limit, float("-inf")), dim=-1)
    sums = mass.cumsum(-1)
    reached = sums - mass
    share = torch.where(whole | (params.top_p >= 1.0), 2.0, params.top_p)[:, None, None]
    # Logits that are off by the tolerance shift a share of mass by at most this factor.
    slack = torch.expm1(2.0 * room).clamp(max=1.0)
    # Tokens that these logits cannot tell from one that is better count as better than it: what is kept even so is kept
    # by any logits within the tolerance.
    ahead = torch.searchsorted((-ranked).contiguous(), (2.0 * room - ranked).contiguous(), right=True)
    sure = (ahead <= last + 1) & (sums.gather(-1, ahead - 1) - mass < share - slack)
    kept, loose = ((reached < top).sum(-1, keepdim=True).clamp(min=1) for top in (share, share + slack))
    least, least_loose = (torch.maximum(limit, ranked.gather(-1, n - 1)) for n in (kept, loose))
    # Where nothing is sure no score is above the floor.
    least_sure = torch.where(sure, ranked, float("inf")).amin(-1, keepdim=True)
    raced = scores + noise

    def best(floor: Tensor) -> tuple[Tensor, Tensor]:
        top = raced.masked_fill(scores < floor, float("-inf")).max(-1)
        return top.values, top.indices

    _, drawn = best(least)
    drawn = torch.where(params.do_sample[:, None], drawn, logits.argmax(-1))
    same = drawn == codes
    certain, _ = best(least_sure)
    place = codes.clamp(0, vocab - 1)[..., None]
    lost_race = certain[..., None] - raced.gather(-1, place)
    outside = least_loose - scores.gather(-1, place)
    margin = torch.maximum(lost_race, outside)[..., 0].clamp(min=0.0) * temperature[:, None]
    margin = torch.where((codes < 0) | (codes >= vocab), float("inf"), margin)
    return Redraw(drawn, same, torch.where(same, 0.0, margin))
