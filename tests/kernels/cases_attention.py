"""Launches of the attention kernels at CSM-1B's shapes."""

from __future__ import annotations

import torch

from csm_kernels import attention


def _step(
    heads: int,
    groups: int,
    dim: int,
    capacity: int,
    dtype: torch.dtype,
    *,
    starts: bool = True,
    mask: torch.dtype | None = None,
) -> None:
    batch = 2
    q = torch.zeros(batch, heads, dim)
    k, v = (torch.zeros(batch, groups, capacity, dim, dtype=dtype) for _ in "kv")
    k_scale, v_scale = (torch.ones(batch, groups, capacity) if dtype == torch.int8 else None for _ in "kv")
    window = torch.ones(batch, dtype=torch.int64)
    attention.launch_attention_step(
        q,
        k,
        v,
        window,
        window if starts else None,
        k_scale,
        v_scale,
        None if mask is None else torch.zeros(batch, capacity, dtype=mask),
        torch.zeros(attention.workspace_size(q, k)),
        torch.zeros(batch, heads * dim),
    )


CASES = {
    "attention_step backbone bf16": lambda: _step(32, 8, 64, 2048, torch.bfloat16),
    "attention_step backbone fp32": lambda: _step(32, 8, 64, 2048, torch.float32),
    "attention_step backbone int8": lambda: _step(32, 8, 64, 2048, torch.int8),
    "attention_step backbone bf16 masked": lambda: _step(32, 8, 64, 2048, torch.bfloat16, mask=torch.bool),
    "attention_step backbone bf16 mask added": lambda: _step(32, 8, 64, 2048, torch.bfloat16, mask=torch.bfloat16),
    "attention_step depth bf16": lambda: _step(8, 2, 128, 32, torch.bfloat16, starts=False),
    "attention_step depth fp32": lambda: _step(8, 2, 128, 32, torch.float32, starts=False),
    "attention_step depth int8": lambda: _step(8, 2, 128, 32, torch.int8, starts=False),
}
