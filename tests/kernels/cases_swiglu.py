"""Launches of the SwiGLU kernels at CSM-1B's shapes."""

from __future__ import annotations

import torch

from csm_kernels.swiglu import launch_backward, launch_forward


def _forward(dtype: torch.dtype) -> None:
    gate, up = torch.zeros(4, 2 * 8192, dtype=dtype).chunk(2, dim=-1)
    launch_forward(gate, up, torch.zeros(4, 8192, dtype=dtype))


def _backward(dtype: torch.dtype) -> None:
    gate, up = torch.zeros(4, 2 * 8192, dtype=dtype).chunk(2, dim=-1)
    grad, gate_grad, up_grad = torch.zeros(3, 4, 8192, dtype=dtype)
    launch_backward(gate, up, grad, gate_grad, up_grad)


CASES = {
    "swiglu bf16": lambda: _forward(torch.bfloat16),
    "swiglu fp32": lambda: _forward(torch.float32),
    "swiglu backward bf16": lambda: _backward(torch.bfloat16),
}
