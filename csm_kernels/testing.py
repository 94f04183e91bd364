"""The one tolerance rule, for kernels, for the runtime's guard and for users' own checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float, int]:
    error = (value.double() - truth.double()).abs().flatten()
    if error.numel() == 0:
        return 0.0, 0.0, -1
    worst = int(error.argmax())
    return float(error[worst]), math.sqrt(float((error * error).mean())), worst


def assert_close(ours: Tensor, truth: Tensor, eager: Tensor, *, name: str = "value", terms: int = 1) -> None:
    """Assert that an implementation is as near the truth as eager PyTorch in the same dtype.

    ``err(ours, truth) <= 2 * err(eager, truth) + rounding``, on both maximum and root mean square; the rounding term is
    one unit in the last place of the eager dtype at the truth's largest magnitude for the maximum, at its root mean
    square for the RMS, each times ``sqrt(terms)``, the number of rounded terms a value sums.

    Args:
        ours: the result under test, any dtype.
        truth: the same quantity from fp64 or fp32 arithmetic on the same inputs.
        eager: the same quantity from eager PyTorch in the dtype the stock model would use.
        name: what the message calls it.
        terms: how many rounded products enter one value.

    Raises:
        AssertionError: with both errors, both limits and the worst index.
        ValueError: shapes differ.
    """
    if not ours.shape == truth.shape == eager.shape:
        raise ValueError(
            f"shapes differ: ours {tuple(ours.shape)}, truth {tuple(truth.shape)}, eager {tuple(eager.shape)}"
        )
    if not torch.equal(torch.isfinite(ours), torch.isfinite(truth)):
        where = (torch.isfinite(ours) != torch.isfinite(truth)).flatten().nonzero()[0].item()
        raise AssertionError(f"{name}: finite and non-finite values differ from the truth, first at flat index {where}")
    finite = torch.isfinite(truth)
    ours, truth, eager = ours[finite], truth[finite], eager[finite]
    if truth.numel() == 0:
        return
    step = torch.finfo(eager.dtype).eps * math.sqrt(terms)
    ours_max, ours_rms, worst = _errors(ours, truth)
    eager_max, eager_rms, _ = _errors(eager, truth)
    limit_max = 2 * eager_max + step * float(truth.abs().max())
    limit_rms = 2 * eager_rms + step * float(truth.double().square().mean().sqrt())
    if ours_max > limit_max or ours_rms > limit_rms:
        raise AssertionError(
            f"{name}: max error {ours_max:.3e} (limit {limit_max:.3e}, eager {eager_max:.3e}), rms {ours_rms:.3e} "
            f"(limit {limit_rms:.3e}, eager {eager_rms:.3e}), worst at flat index {worst}: "
            f"ours {ours.flatten()[worst].item():.6g}, truth {truth.flatten()[worst].item():.6g}"
        )


def sqnr_db(value: Tensor, truth: Tensor) -> float:
    """Signal to quantisation noise ratio in dB; infinite when equal, minus infinite for a zero signal."""
    noise = float((value.double() - truth.double()).square().sum())
    signal = float(truth.double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0 else -math.inf
