"""Codebook embeddings of one frame, summed: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def embed_frame_ref(codes: Tensor, table: Tensor, vocab: int) -> Tensor:
    """The backbone's input for the next position: the sum of a frame's codebook embeddings, in fp32.

    Args:
        codes: ``[B, K]`` int64, each in ``[0, vocab)``.
        table: ``[K * vocab, D]``; codebook ``k`` owns rows ``k * vocab`` to ``(k + 1) * vocab - 1``.
        vocab: rows per codebook.

    Returns:
        ``[B, D]`` fp32.
    """
    offsets = torch.arange(codes.shape[1], device=codes.device) * vocab
    return table[codes + offsets].float().sum(dim=1)
