"""A kernel made to spill, to show that the compile report sees it. No case of its own: it has no budget."""

from __future__ import annotations

import torch

from csm_kernels._target import tl, triton

CASES: dict[str, object] = {}


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x / tl.sum(x, 0))


def spilling() -> None:
    """Launch it: the values wait for their sum, and 16384 of them in one warp are 512 in each thread."""
    x = torch.zeros(1 << 14)
    _spilling_kernel[(1,)](x, torch.empty_like(x), SIZE=1 << 14, num_warps=1)
