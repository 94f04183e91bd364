"""Launches of the norm kernels at CSM-1B's shapes."""

from __future__ import annotations

import torch

from csm_kernels import norm


def _forward(width: int, dtype: torch.dtype, residual: bool) -> None:
    x = torch.zeros(4, width, dtype=dtype)
    other = torch.zeros_like(x) if residual else None
    total = torch.zeros_like(x) if residual else None
    norm.launch_forward(x, other, torch.ones(width, dtype=dtype), 1e-5, torch.zeros_like(x), total, torch.zeros(4))


def _backward(width: int, residual: bool) -> None:
    x = torch.zeros(4, width, dtype=torch.bfloat16)
    sum_grad = torch.zeros_like(x) if residual else None
    norm.launch_backward(x, torch.ones(width, dtype=torch.bfloat16), torch.ones(4), x, sum_grad, torch.zeros_like(x))


CASES = {
    "rms_norm bf16 2048": lambda: _forward(2048, torch.bfloat16, False),
    "rms_norm fp32 1024": lambda: _forward(1024, torch.float32, False),
    "add_rms_norm bf16 2048": lambda: _forward(2048, torch.bfloat16, True),
    "rms_norm backward bf16 2048": lambda: _backward(2048, False),
    "add_rms_norm backward bf16 1024": lambda: _backward(1024, True),
}
