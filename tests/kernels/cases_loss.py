"""Launches of the loss kernels at CSM-1B's shapes: 31 codebooks of 2051 tokens."""

from __future__ import annotations

import torch

from csm_kernels.loss import launch_backward, launch_forward

ROWS, CODEBOOKS, VOCAB = 2, 31, 2051


def _forward(weighted: bool) -> None:
    logits, targets = torch.zeros(CODEBOOKS, ROWS, VOCAB), torch.zeros(ROWS, CODEBOOKS, dtype=torch.int64)
    nll, lse = torch.zeros(2, ROWS, CODEBOOKS)
    launch_forward(logits, targets, torch.ones(ROWS) if weighted else None, VOCAB, -100, nll, lse)


def _backward(dtype: torch.dtype) -> None:
    logits, targets = torch.zeros(CODEBOOKS, ROWS, VOCAB), torch.zeros(ROWS, CODEBOOKS, dtype=torch.int64)
    grad = logits if dtype == torch.float32 else torch.zeros(logits.shape, dtype=dtype)
    lse, weight = torch.zeros(ROWS, CODEBOOKS), torch.ones(ROWS)
    launch_backward(logits, targets, weight, lse, torch.ones(()), VOCAB, -100, 0.0, grad)


CASES = {
    "codebook_loss": lambda: _forward(True),
    "codebook_loss unweighted": lambda: _forward(False),
    "codebook_loss backward fp32 in place": lambda: _backward(torch.float32),
    "codebook_loss backward bf16": lambda: _backward(torch.bfloat16),
}
