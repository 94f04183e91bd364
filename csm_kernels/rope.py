"""Rotary position embedding in the half-split layout of transformers: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(i, i + D/2)`` of the last dimension, in fp32.

    Args:
        x: ``[B, H, D]``, queries or keys of one position per row.
        cos: ``[B, D]`` fp32, the cosines at each row's position, both halves equal.
        sin: ``[B, D]`` fp32, likewise.

    Returns:
        ``[B, H, D]`` fp32.

    Source: Su et al., RoFormer (2021); ``apply_rotary_pos_emb`` of transformers. The tables come from the stock
    model's own rotary module, so that Llama-3 scaling and every other static scaling is the stock one's.
    """
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None, :] + torch.cat([-second, first], dim=-1) * sin[:, None, :]
