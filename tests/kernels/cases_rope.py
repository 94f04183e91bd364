"""Launches of the rotary kernel at CSM-1B's shapes."""

from __future__ import annotations

import torch

from csm_kernels import rope


def _rope(heads: int, width: int, dtype: torch.dtype, interleaved: bool = False, inverse: bool = False) -> None:
    x = torch.zeros(4, heads, width, dtype=dtype)
    table = torch.zeros(2048, width)
    rope.launch_rope(x, table, table, torch.zeros(4, dtype=torch.int64), torch.zeros_like(x), interleaved, inverse)


CASES = {
    "rope backbone bf16": lambda: _rope(40, 64, torch.bfloat16),
    "rope backbone fp32": lambda: _rope(40, 64, torch.float32),
    "rope backbone bf16 interleaved": lambda: _rope(40, 64, torch.bfloat16, interleaved=True),
    "rope backbone bf16 backward": lambda: _rope(32, 64, torch.bfloat16, inverse=True),
    "rope depth bf16": lambda: _rope(10, 128, torch.bfloat16),
    "rope depth bf16 interleaved": lambda: _rope(10, 128, torch.bfloat16, interleaved=True),
}
