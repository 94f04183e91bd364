"""Launches of the embedding kernel at CSM-1B's shapes; the text table, half a gigabyte, has fewer rows."""

from __future__ import annotations

import torch

from csm_kernels import embed

K, VOCAB, D = 32, 2051, 2048


def _embed(dtype: torch.dtype, text: bool, masked: bool) -> None:
    codes = torch.zeros(2, K, dtype=torch.int64)
    table = torch.empty(K * VOCAB, D, dtype=dtype)
    mask = torch.ones(2, K + 1, dtype=torch.bool) if masked else None
    out = torch.zeros(2, D, dtype=dtype)
    embed.launch_embed(codes, table, VOCAB, codes[:, 0] if text else None, table if text else None, mask, out)


CASES = {
    "embed_frame bf16": lambda: _embed(torch.bfloat16, False, False),
    "embed_frame fp32": lambda: _embed(torch.float32, False, False),
    "embed_frame bf16 text and mask": lambda: _embed(torch.bfloat16, True, True),
}
