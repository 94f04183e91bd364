"""SwiGLU gate: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in fp32.

    Args:
        gate: ``[..., F]``.
        up: ``[..., F]``.

    Returns:
        ``[..., F]`` fp32.

    Source: Shazeer, GLU Variants Improve Transformer (2020).
    """
    return torch.nn.functional.silu(gate.float()) * up.float()
