"""Decode matrix-vector product, M = 1 to 16 rows.

``gemv_ref`` is the specification. ``gemv_streamed`` is the same sum written for ``torch.compile`` on a CPU: as
multiply-and-sum it becomes one loop that reads the weights once, converts in registers and never writes a widened copy.

Numbers behind the form, 2 cores of a Xeon with AVX-512, torch 2.11, 2026-11-22, machine streaming 25 to 28 GB/s:

- One row of 1024 at a time is one chain of dependent adds and one memory stream, 18 GB/s in bf16 and 9.5 in int8; two
  rows from far apart are two of each, and gate and up, which Inductor fuses into one loop, four: 27 GB/s in bf16, where
  four rows of each, eight streams, spill registers and reach 24. Neighbouring rows lose: the prefetchers want distance.
- A sum over more than 4096 terms makes Inductor add in cascades: 19 GB/s at 1024 x 8192, 28 without.
- What is computed before (norm, SwiGLU) must be in memory, or every row of the product computes it again.
- ``F.linear`` in bf16: 14 GB/s. Native code with software prefetch: 32 to 36.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels._compiled import in_memory
from csm_kernels.quant import QuantWeight, dequantize

_MAX_UNROLLED_ROWS = 16
_LONGEST_SUM = 4096


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
    x = in_memory(x)
    height = data.shape[0]
    streams = 2 if rows <= 2 and height > 1 else 1
    # One reduction per (row, block): Inductor puts reductions of equal size over the same input into one loop, so that
    # a weight is loaded and widened once for all rows. The odd row that is left over is a block of its own.
    blocks = [data[i * (height // streams) : (i + 1) * (height // streams)] for i in range(streams)]
    if height % streams:
        blocks.append(data[height // streams * streams :])
    parts = [_chunked_sums(block, x[m]) for m in range(rows) for block in blocks]
    out = torch.cat(parts).view(rows, height)
    if isinstance(weight, QuantWeight):
        out = out * weight.scale
    return out if bias is None else out + bias.float()


def _chunked_sums(block: Tensor, row: Tensor) -> Tensor:
    """Row sums in pieces of at most 4096 terms: beyond that Inductor adds in cascades, at two thirds of the speed."""
    width = row.shape[0]
    least = -(-width // _LONGEST_SUM)
    chunks = next((n for n in range(least, 16 * least) if width % n == 0), 1)
    pieces = block.view(block.shape[0], chunks, width // chunks).float() * row.view(chunks, width // chunks)
    return pieces.sum(-1).sum(-1)


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
