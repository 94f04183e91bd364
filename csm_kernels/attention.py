"""Single-step grouped-query attention over a KV cache: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_step_ref(q: Tensor, k_cache: Tensor, v_cache: Tensor, bias: Tensor) -> Tensor:
    """One query position per row against the cached keys and values, softmax and sums in fp32.

    Args:
        q: ``[B, H, D]`` fp32, already rotated.
        k_cache: ``[B, KV, C, D]``, any float dtype; KV divides H, query head ``h`` reads KV head ``h // (H // KV)``.
        v_cache: ``[B, KV, C, D]``.
        bias: ``[B, C]`` fp32, 0 where row ``b`` may look and ``-inf`` elsewhere: lengths, left padding and holes in a
            prompt's mask are all said here. Every row must be allowed at least one position.

    Returns:
        ``[B, H * D]`` fp32.
    """
    batch, heads, dim = q.shape
    groups = k_cache.shape[1]
    grouped = q.reshape(batch, groups, heads // groups, 1, dim)
    scores = (grouped * k_cache[:, :, None].float()).sum(-1) * dim**-0.5
    weights = torch.softmax(scores + bias[:, None, None, :], dim=-1)
    out = (weights[..., None] * v_cache[:, :, None].float()).sum(-2)
    return out.reshape(batch, heads * dim)


def attention_step_library(q: Tensor, k_cache: Tensor, v_cache: Tensor, bias: Tensor) -> Tensor:
    """The same by ``scaled_dot_product_attention``, queries rounded to the cache's dtype. Shapes as the reference."""
    batch, heads, dim = q.shape
    groups = k_cache.shape[1]
    # The queries that share a KV head stand as rows of one block: no copy of the cache is made for them.
    grouped = q.reshape(batch, groups, heads // groups, dim).to(k_cache.dtype)
    mask = bias[:, None, None, :].to(k_cache.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k_cache, v_cache, attn_mask=mask)
    return out.reshape(batch, heads * dim).float()
