"""A kernel made to spill, to show that the compile report sees it. No case of its own: it has no budget."""

from __future__ import annotations

import torch

from csm_kernels._target import tl, triton

CASES: dict[str, object] = {}


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, KEPT: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    total = tl.load(x_ptr + offsets)
    for i in tl.static_range(KEPT):
        total = tl.cumsum(total * (i + 1.5), 0) + tl.load(x_ptr + offsets + i)
    tl.store(y_ptr + offsets, tl.sort(total) + total)


def spilling() -> None:
    """Launch it: 16384 values in one warp are 512 in each thread."""
    x = torch.zeros(1 << 15)
    _spilling_kernel[(1,)](x, torch.empty_like(x), SIZE=1 << 14, KEPT=1, num_warps=1)
