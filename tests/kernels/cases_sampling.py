"""Launches of the sampling kernel at CSM-1B's vocabulary, and at one that does not fit into registers."""

from __future__ import annotations

import torch

from csm_kernels import sampling


def _sample(vocab: int, dtype: torch.dtype) -> None:
    batch = 4
    params = sampling.SamplingParams(
        torch.ones(batch),
        torch.ones(batch, dtype=torch.int64),
        torch.ones(batch),
        torch.ones(batch, dtype=torch.bool),
    )
    key = sampling.NoiseKey(*torch.zeros(3, batch, dtype=torch.int64))
    codebook = torch.zeros(1, dtype=torch.int64)
    tokens, flags = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32)
    sampling.launch_sample(torch.zeros(batch, vocab, dtype=dtype), params, key, codebook, tokens, flags)


CASES = {
    "sample fp32 2051": lambda: _sample(2051, torch.float32),
    "sample bf16 2051": lambda: _sample(2051, torch.bfloat16),
    "sample fp32 65536": lambda: _sample(65536, torch.float32),
}
