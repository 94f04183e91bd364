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
    rows = weight.float()
    peak = rows.abs().amax(dim=-1)
    if not torch.isfinite(peak).all():
        raise ValueError("weight holds NaN or infinity; int8 cannot represent it: keep this zone in its own dtype")
    scale = torch.where(peak > 0, peak / 127.0, torch.ones_like(peak))
    data = torch.round(rows / scale[..., None]).clamp_(-127, 127).to(torch.int8)
    return QuantWeight(data, scale)


def dequantize(weight: Tensor | QuantWeight) -> Tensor:
    """The fp32 matrix a weight stands for, ``[..., N, K]``."""
    if isinstance(weight, QuantWeight):
        return weight.data.float() * weight.scale[..., None]
    return weight.float()
