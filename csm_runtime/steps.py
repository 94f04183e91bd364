"""The functions one frame is made of, written once for every execution: compiled, captured, or eager.

Tensors and plain numbers in, tensors out; caches are written in place. Everything that changes from call to call is a
tensor, so that none of it is a guard. ``Ops`` says which implementation of the ops that matter to use.

One frame, in order: :func:`codebook0_step` on the backbone's hidden state, then :func:`depth_step` for positions 0 to
``codebooks - 1``, or :func:`depth_pair_step` for the first two of them at once; then, for the next frame,
:func:`embed_step`, :func:`layer_step` for each backbone layer and the final norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from csm_kernels.attention import attention_step_library, attention_step_ref
from csm_kernels.embed import embed_frame_ref
from csm_kernels.gemv import gemv_library, gemv_streamed
from csm_kernels.norm import rms_norm_ref
from csm_kernels.quant import QuantWeight, dequantize, take_rows
from csm_kernels.rope import apply_rope_ref
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample_bisected, sample_ref
from csm_kernels.swiglu import swiglu_ref
from csm_runtime.kv import Fault
from csm_runtime.weights import Layer, Linear, Stack


class Ops(NamedTuple):
    """The ops that have an execution of their own per backend."""

    gemv: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    sample: Callable[..., Tensor]


COMPILED_OPS = Ops(gemv_streamed, attention_step_ref, sample_bisected)
"""What Inductor turns into one loop per matrix on a CPU."""
LIBRARY_OPS = Ops(gemv_library, attention_step_library, sample_ref)
"""What eager execution and CUDA graphs of stock ops use."""


class Heads(NamedTuple):
    """Attention shape and norm epsilon of one stack."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float


def layer_step(
    x: Tensor,
    layer: Layer,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor,
    shape: Heads,
    ops: Ops,
) -> Tensor:
    """One decoder layer for ``P`` new positions per row of the cache, usually one.

    Args:
        x: ``[P * B, D]`` fp32 residual stream, the first position of every row first.
        layer: its weights.
        keys: ``[B, KV, C, head_dim]``, written at ``slot``.
        values: likewise.
        slot: ``[P * B]`` int64, where the new keys and values go.
        cos: ``[P * B, head_dim]`` fp32 at each rotary position.
        sin: likewise.
        bias: ``[P * B, C]`` fp32 mask, as :func:`~csm_kernels.attention_step_ref` takes it.
        shape: heads of the stack.
        ops: implementations to use.

    Returns:
        ``[P * B, D]`` fp32.
    """
    rows = x.shape[0]

    def linear(value: Tensor, matrix: Linear) -> Tensor:
        return ops.gemv(value, matrix.weight, matrix.bias)

    normed = rms_norm_ref(x, layer.input_norm, shape.eps)
    q = linear(normed, layer.q).view(rows, shape.heads, shape.head_dim)
    k = linear(normed, layer.k).view(rows, shape.kv_heads, shape.head_dim)
    v = linear(normed, layer.v).view(rows, shape.kv_heads, shape.head_dim)
    positions = rows // keys.shape[0]
    index = torch.arange(keys.shape[0], device=x.device).repeat(positions)
    keys[index, :, slot] = apply_rope_ref(k, cos, sin).to(keys.dtype)
    values[index, :, slot] = v.to(values.dtype)
    if positions > 1:
        keys, values = keys.repeat(positions, 1, 1, 1), values.repeat(positions, 1, 1, 1)
    x = x + linear(ops.attention(apply_rope_ref(q, cos, sin), keys, values, bias), layer.o)
    normed = rms_norm_ref(x, layer.post_norm, shape.eps)
    return x + linear(swiglu_ref(linear(normed, layer.gate), linear(normed, layer.up)), layer.down)


def _mask_bias(allowed: Tensor) -> Tensor:
    """0 where allowed, minus infinity elsewhere, fp32 whatever the caller's default dtype is."""
    return torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, float("-inf"))


def embed_step(
    codes: Tensor,
    table: Tensor | QuantWeight,
    vocab: int,
    allowed: Tensor,
    slot: Tensor,
    position: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backbone's input for the frame just made, its rotary values and its attention mask.

    Marks ``slot`` in ``allowed`` ``[B, C]``. Returns ``x`` ``[B, D]``, ``cos``, ``sin`` ``[B, head_dim]`` and ``bias``
    ``[B, C]``, all fp32.
    """
    index = torch.arange(codes.shape[0], device=codes.device)
    allowed[index, slot] = True
    return embed_frame_ref(codes, table, vocab), cos_table[position], sin_table[position], _mask_bias(allowed)


def codebook0_step(
    hidden: Tensor, head: Linear, params: SamplingParams, key: NoiseKey, faults: Tensor, ops: Ops
) -> tuple[Tensor, Tensor]:
    """Codebook 0 of every row, ``[B]`` int64, from the backbone's normalised hidden state ``[B, D]``; and its logits.

    ``faults`` ``[1]`` int32 gets the bit of logits that are NaN or infinite, here and in the depth decoder's steps.
    """
    logits = ops.gemv(hidden, head.weight, head.bias)
    codebook = torch.zeros(1, dtype=torch.int64, device=hidden.device)
    _judge(logits, faults)
    return ops.sample(logits, params, gumbel_noise_ref(key, codebook, logits.shape[-1])), logits


def _judge(logits: Tensor, faults: Tensor) -> None:
    """As the kernels do: a row is broken by NaN, by plus infinity, or by nothing but minus infinity."""
    broken = ~(logits < float("inf")).all() | ~(logits > float("-inf")).any(-1).all()
    faults.bitwise_or_(broken.to(torch.int32) * int(Fault.NOT_FINITE))


def depth_step(
    position: Tensor,
    row: Tensor,
    token: Tensor,
    hidden: Tensor,
    embedding: Tensor | QuantWeight,
    projection: Linear,
    stack: Stack,
    heads: Tensor | QuantWeight,
    keys: list[Tensor],
    values: list[Tensor],
    cos_table: Tensor,
    sin_table: Tensor,
    params: SamplingParams,
    key: NoiseKey,
    faults: Tensor,
    shape: Heads,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """One position of the depth decoder: embed, all layers, this position's head, sample.

    Position 0 takes the backbone's hidden state instead of an embedding and only fills the cache: it returns the token
    it was given. Position ``p >= 1`` takes the token of codebook ``p - 1`` and returns the token of codebook ``p``.

    Args:
        position: one-element int64 tensor.
        row: one-element int64 tensor, where in ``heads`` this position's head is; anything in range at position 0.
        token: ``[B]`` int64, the latest token of each row.
        hidden: ``[B, backbone D]`` fp32.
        embedding: ``[codebooks * V, backbone D]``, quantised or not.
        projection: backbone width to depth width.
        stack: the depth decoder's layers and final norm.
        heads: ``[heads, V, D]``, the heads of this position's format.
        keys: per layer ``[B, KV, codebooks, head_dim]``.
        values: likewise.
        cos_table: ``[codebooks, head_dim]`` fp32.
        sin_table: likewise.
        params: sampling parameters of each row.
        key: noise of each row.
        faults: see :func:`codebook0_step`.
        shape: heads of the depth decoder.
        ops: implementations to use.

    Returns:
        ``[B]`` int64, and the logits ``[B, V]`` fp32 it was drawn from (of no meaning at position 0).
    """
    vocab = heads.data.shape[1]
    before = (position - 1).clamp(min=0)
    first = position == 0
    x = torch.where(first, hidden, dequantize(take_rows(embedding, before * vocab + token)))
    slot = position.expand(token.shape[0])
    x = _depth_layers(x, slot, projection, stack, keys, values, cos_table, sin_table, shape, ops)
    drawn, logits = _draw(x, before + 1, row, heads, params, key, faults, ops)
    return torch.where(first, token, drawn), logits


def depth_pair_step(
    row: Tensor,
    token: Tensor,
    hidden: Tensor,
    embedding: Tensor | QuantWeight,
    projection: Linear,
    stack: Stack,
    heads: Tensor | QuantWeight,
    keys: list[Tensor],
    values: list[Tensor],
    cos_table: Tensor,
    sin_table: Tensor,
    params: SamplingParams,
    key: NoiseKey,
    faults: Tensor,
    shape: Heads,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """Positions 0 and 1 in one pass of two rows per utterance: the weights are read 31 times a frame, not 32.

    Arguments and results as :func:`depth_step` at position 1, ``token`` being codebook 0.
    """
    rows = token.shape[0]
    slot = torch.arange(2, device=token.device).repeat_interleave(rows)
    x = torch.cat([hidden, dequantize(take_rows(embedding, token))])
    x = _depth_layers(x, slot, projection, stack, keys, values, cos_table, sin_table, shape, ops)
    codebook = torch.ones(1, dtype=torch.int64, device=token.device)
    return _draw(x[rows:], codebook, row, heads, params, key, faults, ops)


def _depth_layers(
    x: Tensor,
    slot: Tensor,
    projection: Linear,
    stack: Stack,
    keys: list[Tensor],
    values: list[Tensor],
    cos_table: Tensor,
    sin_table: Tensor,
    shape: Heads,
    ops: Ops,
) -> Tensor:
    """Projection, all layers and the final norm at positions ``slot``, one per row of ``x``."""
    x = ops.gemv(x, projection.weight, projection.bias)
    cos, sin = cos_table[slot], sin_table[slot]
    bias = _mask_bias(torch.arange(keys[0].shape[2], device=x.device)[None, :] <= slot[:, None])
    for i, layer in enumerate(stack.layers):
        x = layer_step(x, layer, keys[i], values[i], slot, cos, sin, bias, shape, ops)
    return rms_norm_ref(x, stack.norm, shape.eps)


def _draw(
    x: Tensor,
    codebook: Tensor,
    row: Tensor,
    heads: Tensor | QuantWeight,
    params: SamplingParams,
    key: NoiseKey,
    faults: Tensor,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """Token and logits of a codebook, by the head in ``row``, from the normalised hidden state ``[B, D]``."""
    logits = ops.gemv(x, take_rows(take_rows(heads, row), 0))
    _judge(logits, faults)
    noise = gumbel_noise_ref(key, codebook, logits.shape[-1])
    return ops.sample(logits, params, noise), logits
