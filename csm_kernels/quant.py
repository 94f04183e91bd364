"""Weight formats: int8 per row, weight only.

``dequantize`` is the specification of every quantised op: a kernel is compared with the op on dequantised weights, and
the quantiser has its own error test.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantWeight(NamedTuple):
    """A quantised weight matrix, or a stack of them.

    ``data`` is ``[..., N, K]`` int8, ``scale`` is ``[..., N]`` fp32; row ``n`` stands for ``data[n] * scale[n]``.
    """

    data: Tensor
    scale: Tensor


def quantize_int8(weight: Tensor) -> QuantWeight:
    """Symmetric int8 with one scale per row: ``scale = max|row| / 127``, round to nearest even.

    Args:
        weight: ``[..., N, K]`` float. A row of zeros keeps scale 1 and dequantises to zeros.

    Raises:
        ValueError: the weight is not floating point, or holds NaN or infinity (no scale could stand for it).
    """
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point to be quantised, got {weight.dtype}")
    if weight.ndim > 2:  # one matrix at a time: the fp32 scratch of a whole stack may be larger than the stack itself
        parts = [quantize_int8(matrix) for matrix in weight]
        return QuantWeight(torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts]))
    rows = weight.to(torch.float32, copy=True)
    peak = torch.maximum(rows.amax(dim=-1), -rows.amin(dim=-1))
    if not torch.isfinite(peak).all():
        raise ValueError("weight holds NaN or infinity; int8 cannot represent it: keep this zone in its own dtype")
    scale = peak / 127.0
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return QuantWeight(rows.div_(scale[..., None]).round_().to(torch.int8), scale)


def dequantize(weight: Tensor | QuantWeight) -> Tensor:
    """The fp32 matrix a weight stands for, ``[..., N, K]``."""
    if isinstance(weight, QuantWeight):
        return weight.data.float() * weight.scale[..., None]
    return weight.float()
