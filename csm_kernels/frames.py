"""Which frames a pass over a fraction of them looks at: a sample of fixed size with weights, drawn on the device.

The training loss and the guard's analysis both look at 1/16 of the frames. A sample of a fixed number of rows keeps
shapes static, whatever the batch holds; Horvitz-Thompson weights make the sum over it an unbiased estimate of the sum
over all frames. Nothing here waits for the device, and the draw is integer arithmetic: the same on every device, in
eager mode and under ``torch.compile``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_KEPT = 1 << 62
_SIGN = 1 << 63


class FrameSample(NamedTuple):
    """Rows of a flattened ``[B, S]`` and what each stands for."""

    index: Tensor  # type: ignore[assignment]  # the field's name, which tuple's method has too
    """``[M]`` int64 into ``B * S``; 0 where the row is empty."""
    weight: Tensor
    """``[M]`` fp32, one over the chance the frame had of being drawn; 0 where the row is empty."""


def sample_frames(
    mask: Tensor,
    num_frames: int,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    micro_step: int | Tensor = 0,
    rank: int | Tensor = 0,
    keep: Tensor | None = None,
) -> FrameSample:
    """Draw a fixed number of frames, uniformly and without replacement.

    ``(weight * x.flatten()[index]).sum()`` is an unbiased estimate of ``x[mask].sum()``. Where there are fewer frames than
    rows all are taken once with weight 1 and the other rows are empty, down to no frame at all.

    Args:
        mask: ``[B, S]``, or any shape, bool: the frames there are.
        num_frames: M, rows of the sample, at least 1.
        seed: of the run. The four numbers are integers or scalar int64 tensors; nothing else is remembered between
            draws, so a run is resumed exactly from its seed and step.
        step: of the optimizer.
        micro_step: of gradient accumulation.
        rank: data-parallel rank; peers that share a batch pass the same.
        keep: like ``mask``, bool: frames that are always taken with weight 1, as end-of-speech frames are. They get at
            most M // 2 of the rows unless other frames leave more; where they are more than that, they are drawn from
            as well. With M = 1 they are frames like all others.

    Returns:
        A :class:`FrameSample` on the device of ``mask``.

    Raises:
        ValueError: ``mask`` or ``keep`` is not bool or their shapes differ, or ``num_frames`` is no positive integer.

    Example:
        >>> sample = sample_frames(torch.ones(2, 100, dtype=torch.bool), 8, seed=0)
        >>> sample.weight
        tensor([25., 25., 25., 25., 25., 25., 25., 25.])

    Source: Horvitz and Thompson (1952); compute amortization as in Sesame's post of February 2025.
    """
    kept, others = _groups(mask, keep, num_frames)
    size = kept.numel()
    if size == 0:
        return FrameSample(
            torch.zeros(num_frames, dtype=torch.int64, device=mask.device), torch.zeros(num_frames, device=mask.device)
        )
    stream = torch.zeros((), dtype=torch.int64, device=mask.device)
    for number in (seed, step, micro_step, rank):
        stream = _mixed(stream ^ _scalar(number, mask.device))
    # Not the usual odd multiple of the place: Inductor of torch 2.11 takes that for an address and writes out of bounds.
    noise = _mixed(stream ^ _mixed(~torch.arange(size, device=mask.device))) & (_KEPT - 1)
    keys = torch.where(kept, noise | _KEPT, torch.where(others, noise, -1))
    order = keys.argsort(descending=True, stable=True)
    num_kept, num_others = kept.sum(), others.sum()
    # How many rows go to either group: at least one to each that has a frame.
    rows_kept = torch.minimum(num_kept, (num_frames - num_others).clamp(min=num_frames // 2))
    rows_others = torch.minimum(num_others, num_frames - rows_kept)
    row = torch.arange(num_frames, device=mask.device)
    place = torch.where(row < rows_kept, row, num_kept + row - rows_kept)
    filled = row < rows_kept + rows_others
    index = torch.where(filled, order[place.clamp(max=size - 1)], 0)
    weight = torch.where(row < rows_kept, _ratio(num_kept, rows_kept), _ratio(num_others, rows_others))
    return FrameSample(index, torch.where(filled, weight, 0.0))


def frame_weights(index: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
    """The weights of a sample whose ``index`` alone was handed on, with -1 in its empty rows.

    Args:
        index: ``[M]`` int64 into the flattened ``mask``, each frame at most once; -1 in empty rows.
        mask: as :func:`sample_frames`.
        keep: as :func:`sample_frames`.

    Returns:
        ``[M]`` fp32; 0 in empty rows and where the index is no frame of ``mask``.
    """
    kept, others = _groups(mask, keep, index.numel())
    if kept.numel() == 0:
        return torch.zeros(index.shape, device=index.device)
    place = index.clamp(0, kept.numel() - 1)
    filled = (index >= 0) & (index < kept.numel())
    of_kept, of_others = kept[place] & filled, others[place] & filled
    weight = torch.where(of_others, _ratio(others.sum(), of_others.sum()), 0.0)
    return torch.where(of_kept, _ratio(kept.sum(), of_kept.sum()), weight)


def _groups(mask: Tensor, keep: Tensor | None, num_frames: int) -> tuple[Tensor, Tensor]:
    """Frames to keep and the others, flat."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != mask.shape):
        raise ValueError(f"keep must be bool of shape {tuple(mask.shape)}, got {keep.dtype} of {tuple(keep.shape)}")
    if not isinstance(num_frames, int) or isinstance(num_frames, bool) or num_frames < 1:
        raise ValueError(f"num_frames must be a positive integer, got {num_frames!r}")
    flat = mask.reshape(-1)
    if keep is None or num_frames == 1:
        return torch.zeros_like(flat), flat
    kept = keep.reshape(-1) & flat
    return kept, flat & ~kept


def _ratio(total: Tensor, taken: Tensor) -> Tensor:
    return total.float() / taken.clamp(min=1)


def _scalar(number: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device=device, dtype=torch.int64)
    return torch.full((), _signed(number), dtype=torch.int64, device=device)  # a fill, which waits for nothing


def _signed(number: int) -> int:
    return (number + _SIGN) % (2 * _SIGN) - _SIGN


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64 bits that leaves no pattern (the finalizer of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)
