"""Launches of the RVQ decode kernel at Mimi's shapes: one frame of a stream, and a second of speech in one call."""

from __future__ import annotations

import torch

from csm_kernels import rvq

K, BINS, DIM, OUT = 32, 2048, 256, 512


def _decode(batch: int, frames: int, books: int, dtype: torch.dtype) -> None:
    codes = torch.zeros(batch, books, frames, dtype=torch.int64)
    semantic, acoustic = torch.zeros(2, OUT, DIM, dtype=dtype)
    codebooks = torch.empty(K, BINS, DIM, dtype=dtype)
    rvq.launch_decode(codes, codebooks, semantic, acoustic, 1, torch.zeros(batch, OUT, frames, dtype=dtype))


CASES = {
    "rvq_decode one frame fp32": lambda: _decode(1, 1, K, torch.float32),
    "rvq_decode one frame bf16": lambda: _decode(1, 1, K, torch.bfloat16),
    "rvq_decode many frames fp32": lambda: _decode(2, 125, K, torch.float32),
    "rvq_decode many frames semantic only": lambda: _decode(2, 125, 1, torch.float32),
}
