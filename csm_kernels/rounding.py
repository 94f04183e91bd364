"""int4 codes chosen for what a matrix multiplies: GPTQ, from the second moments of its inputs.

Nearest rounding makes the error of each weight small; a layer's output has the sum of a row's errors, each times its input.
Where inputs are correlated the error of one column can be made up for in those that are not rounded yet. The storage is
that of :func:`csm_kernels.quant.quantize`: whatever reads int4 reads these codes at the same speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csm_kernels.quant import QuantWeight, checked_rows, int4_codes, int4_levels, int4_padded, int4_stored

_BLOCK = 128
"""Columns that are finished before the columns after them are updated, by one product; whole groups fit in."""
_MOST_DAMPING = 1.0


class Factor(NamedTuple):
    """The inverse of a damped Hessian as GPTQ reads it, good for every matrix that multiplies the same inputs."""

    upper: Tensor
    """``[K, K]`` fp32, upper triangular: U with ``U' U`` the inverse."""
    damp: float
    """The damping that made it positive definite."""


def factor(hessian: Tensor, damp: float = 0.01) -> Factor | None:
    """Factorise the Hessian of a layer's squared output error.

    Args:
        hessian: ``[K, K]`` fp32 or fp64, symmetric: the sum of ``x x'`` over the inputs x, at any scale.
        damp: added to the diagonal, as a share of its mean; ten times as much, up to 1, while the result is not positive
            definite.

    Returns:
        The factor, or None where no damping makes one: not a sum of ``x x'``. Takes 4 matrices of the Hessian's size. An
        input that was always zero is independent of the others: its column is rounded to nearest.

    Raises:
        ValueError: not a square fp32 or fp64 matrix, NaN or infinity in it, or damping that is not above 0 and at most 1.
    """
    if hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"hessian must be fp32 or fp64, got {hessian.dtype}")
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or 0 in hessian.shape:
        raise ValueError(f"hessian must be [K, K], got {tuple(hessian.shape)}")
    if not 0 < damp <= _MOST_DAMPING:
        raise ValueError(f"damp must be above 0 and at most {_MOST_DAMPING:g}, got {damp!r}")
    if not torch.isfinite(hessian).all():
        raise ValueError("hessian holds NaN or infinity")
    # Its inverse is U' U. With rows and columns in reverse an upper factor is a lower one: H = R R' with R = inverse of U,
    # one Cholesky and one triangular inverse where the paper inverts in between.
    reverse = hessian.flip(0, 1)
    diagonal = reverse.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.sum()) / max(1, int((~dead).sum()))
    reverse[dead, dead] = mean if mean > 0 else 1.0
    share, added = damp, 0.0
    while share <= _MOST_DAMPING:
        reverse.diagonal().add_(share * mean - added)
        added = share * mean
        lower, info = torch.linalg.cholesky_ex(reverse)
        if int(info) == 0:
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
            if torch.isfinite(inverse).all():
                return Factor(inverse.flip(0, 1).float(), share)
        share *= 10
    return None


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor | Factor,
    group: int = 128,
    symmetric: bool = True,
    damp: float = 0.01,
) -> QuantWeight:
    """Quantise one matrix to int4 such that its products with typical inputs err least.

    Column by column: each is rounded on the scale of its group, and what that cost is spread over the columns after it by
    the inverse Hessian. A group's scale is chosen as :func:`csm_kernels.quant.quantize` chooses it, when the group is
    reached, from its weights as they are by then; codes are chosen for the scale as rounded to bf16.

    Args:
        weight: ``[N, K]`` float.
        hessian: ``[K, K]`` fp32 or fp64, the sum of ``x x'`` over the layer's inputs x on the weight's device, or what
            :func:`factor` made of it. Fewer inputs than columns leave directions that nothing was seen of; the damping decides
            what is done there.
        group: 32, 64 or 128 columns share a scale.
        symmetric: False keeps an offset per group.
        damp: see :func:`factor`; not read where a factor is given.

    Returns:
        The packed weight, laid out as ``quantize(weight, "int4", group, symmetric)``; the very same where the Hessian is
        diagonal, or has no factor.

    Raises:
        ValueError: as :func:`csm_kernels.quant.quantize` and :func:`factor`, a stack of matrices, or a Hessian that does not
            fit the weight.

    Example:
        >>> x = torch.randn(500, 64) @ torch.randn(64, 64)
        >>> quantize_gptq(torch.randn(32, 64), x.t() @ x, group=32).scale.shape
        torch.Size([32, 2])

    Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", ICLR 2023, algorithm 1, without reordering columns.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got {tuple(weight.shape)}")
    rows = checked_rows(weight, "int4", group)
    known = hessian if isinstance(hessian, Factor) else factor(hessian, damp)
    if known is not None and (len(known.upper) != weight.shape[1] or known.upper.device != weight.device):
        raise ValueError(
            f"hessian must be [{weight.shape[1]}, {weight.shape[1]}] on {weight.device} as the weight has columns, got "
            f"{tuple(known.upper.shape)} on {known.upper.device}"
        )
    width = rows.shape[1]
    groups = int4_padded(rows, group, symmetric)
    if known is None:
        return int4_stored(*int4_codes(groups, symmetric), -width % group)
    codes, scale = _rounded(groups.flatten(1).t().contiguous(), known.upper, width, group, symmetric)
    return int4_stored(codes, scale, -width % group)


def _rounded(columns: Tensor, upper: Tensor, width: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Codes ``[N, G, group]`` and scales of ``[P, N]`` fp32, which is overwritten; columns are its rows, to be contiguous."""
    padded, height = columns.shape
    codes = torch.empty_like(columns)
    scales = []
    for first in range(0, padded, _BLOCK):
        last = min(first + _BLOCK, padded)
        block, real = columns[first:last], min(last, width) - first
        errors = torch.zeros(real, height, dtype=columns.dtype, device=columns.device)
        for at in range(first, last):
            if at % group == 0:
                _, scale = int4_codes(columns[at : at + group].t()[:, None], symmetric)
                scales.append(scale[:, 0])
                step, offset, lowest = int4_levels(scales[-1], symmetric)
            here = at - first
            code = ((block[here] - offset) / step).round_().clamp_(lowest, lowest + 15)
            codes[at] = code - lowest
            if here < real:
                row = upper[at, at : first + real]
                errors[here] = (block[here] - (code * step + offset)) / row[0]
                # A matrix product: 20 us here for [127, 1024], where addr_ waits for threads (2 busy cores, 2026-11-28).
                block[here + 1 : real].addmm_(row[1:, None], errors[here : here + 1], alpha=-1.0)
        if last < width:
            columns[last:width].addmm_(upper[first:last, last:].t(), errors, alpha=-1.0)
    return codes.t().contiguous().unflatten(1, (-1, group)), torch.stack(scales, dim=1)
