"""Decode matrix-vector product, M = 1 to 16 rows.

``gemv_ref`` is the specification. ``gemv_streamed`` is the same sum written for ``torch.compile`` on a CPU: as
multiply-and-sum it becomes one loop that reads the weights once, converts in registers and never writes a widened copy.

Numbers behind the form, 2 cores of a Xeon with AVX-512, weights 8192 x 1024, 2026-11-22, machine streaming 27 GB/s:
one row at a time 18 GB/s in bf16 and 9.5 in int8; four row blocks at once 21 and 19. One row is one chain of dependent
adds and one memory stream; four are four of each. Eight blocks gained nothing more, four *neighbouring* rows lost
(14 and 12): the streams must be far apart for the prefetchers. ``F.linear`` in bf16: 14.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels.quant import QuantWeight, dequantize

_MAX_UNROLLED_ROWS = 16


def gemv_streamed(x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with fp32 accumulation, one pass over the weights for all rows.

    Args:
        x: ``[M, K]`` fp32, M from 1 to 16.
        weight: ``[N, K]`` fp32, bf16 or fp16, or a :class:`~csm_kernels.quant.QuantWeight`.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]`` fp32.

    Meant to be traced by ``torch.compile``; eagerly it is correct and slow.
    """
    rows, width = x.shape
    data = weight.data if isinstance(weight, QuantWeight) else weight
    if rows > _MAX_UNROLLED_ROWS:
        out = x @ dequantize(weight).t()
        return out if bias is None else out + bias.float()
    height = data.shape[0]
    streams = 4 if rows <= 2 else 2 if rows <= 4 else 1
    while height % streams:
        streams //= 2
    block = height // streams
    # One reduction per (row, block): Inductor puts reductions of equal size over the same input into one loop, so that
    # a weight is loaded and widened once for all rows.
    parts = [
        torch.cat([(data[i * block : (i + 1) * block].float() * x[m]).sum(-1) for i in range(streams)])
        for m in range(rows)
    ]
    out = torch.stack(parts)
    if isinstance(weight, QuantWeight):
        out = out * weight.scale
    return out if bias is None else out + bias.float()


def gemv_library(x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> Tensor:
    """The same product by the vendor's matrix library, for eager execution and CUDA graphs of stock ops.

    Activations are rounded to the weight's dtype, as the stock model does; int8 weights are widened to fp32 first.
    Shapes as :func:`gemv_streamed`.
    """
    if isinstance(weight, QuantWeight):
        out = torch.nn.functional.linear(x, weight.data.to(x.dtype)) * weight.scale
    else:
        out = torch.nn.functional.linear(x.to(weight.dtype), weight).float()
    return out if bias is None else out + bias.float()


def gemv_ref(x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> Tensor:
    """The specification: ``x @ dequantize(weight).T + bias`` in fp32. Shapes as :func:`gemv_streamed`."""
    out = x.float() @ dequantize(weight).t()
    return out if bias is None else out + bias.float()
