"""PESQ, STOI and DNSMOS through the packages of the extra ``quality``: what a listener would say, by three models.

All run offline on the CPU, in seconds per clip: for reports and releases, not for the guard. They rate speech; of the noise
an untrained model makes they say nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from csm_runtime.extras import need
from csm_runtime.fidelity import SAMPLE_RATE, check_waveforms

METRICS = ("pesq", "stoi", "dnsmos")

_RATES = {"pesq": 16_000, "stoi": 10_000, "dnsmos": 16_000}
"""Hz each metric is defined at."""

_PESQ_SECONDS = 20.0
"""The ITU's code has room for 50 utterances and does not count them: a clip of two minutes overran it."""


def perceptual(
    reference: Tensor, degraded: Tensor, sample_rate: int = SAMPLE_RATE, metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Rate one clip of speech.

    ``pesq`` is wide-band PESQ (ITU-T P.862.2, MOS-LQO of 1.0 to 4.6; the mean over parts of at most 20 s), ``stoi`` the
    short-time objective intelligibility (Taal et al. 2011, at most 1), ``dnsmos`` DNSMOS P.835's overall quality (Reddy
    et al. 2022, MOS of 1 to 5), which hears ``degraded`` only and repeats a clip shorter than 9 s.

    Args:
        reference: ``[T]`` floats, full scale at 1; at least one second.
        degraded: the same shape. PESQ and STOI want it aligned with the reference: made from the same codes.
        sample_rate: Hz; both are resampled to what each metric is defined at.
        metrics: which to compute.

    Returns:
        The metrics by name, in the order asked for.

    Raises:
        ValueError: an unknown metric, waveforms that cannot be compared, or too little speech for a metric.
        ImportError: a package is missing; says which extra brings it.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(map(repr, unknown))}")
    if reference.ndim != 1:
        raise ValueError(f"reference must be one clip [T], got {tuple(reference.shape)}")
    check_waveforms(reference, degraded, sample_rate)
    for waveform, what in ((reference, "reference"), (degraded, "degraded")):
        if not bool(waveform.any()):
            raise ValueError(f"{what} must not be silent")
    rate_by = {"pesq": _pesq, "stoi": _stoi, "dnsmos": _dnsmos}
    return {
        name: rate_by[name](_resampled(reference, sample_rate, name), _resampled(degraded, sample_rate, name))
        for name in metrics
    }


def _resampled(waveform: Tensor, sample_rate: int, metric: str) -> Any:
    """A numpy array fp32 at the metric's rate, clipped to full scale as a sound file would."""
    import torchaudio

    plain = waveform.detach().float().cpu()
    return torchaudio.functional.resample(plain, sample_rate, _RATES[metric]).clamp(-1, 1).numpy()


def _pesq(reference: Any, degraded: Any) -> float:
    package, rate = need("pesq", "quality"), _RATES["pesq"]
    parts = math.ceil(len(reference) / (_PESQ_SECONDS * rate))
    scores = []
    for i in range(parts):
        part = slice(len(reference) * i // parts, len(reference) * (i + 1) // parts)
        try:
            scores.append(float(package.pesq(rate, reference[part], degraded[part], "wb")))
        except package.NoUtterancesError:
            continue
        except ValueError as error:  # of near silence its own level is NaN
            raise ValueError(
                f"reference and degraded must hold sound loud enough for pesq, got peaks of "
                f"{abs(reference[part]).max():.1g} and {abs(degraded[part]).max():.1g}: {error}"
            ) from error
    if not all(map(math.isfinite, scores)):
        raise ValueError("reference and degraded must hold sound loud enough for pesq, which has no score for them")
    if not scores:
        raise ValueError("reference must hold speech for pesq, which finds no utterance in it")
    return sum(scores) / len(scores)


def _stoi(reference: Any, degraded: Any) -> float:
    package = need("pystoi", "quality")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score = float(package.stoi(reference, degraded, _RATES["stoi"]))
    if any("Not enough STFT frames" in str(warning.message) for warning in caught):
        raise ValueError("reference must hold 0.4 s of speech for stoi, which finds less in it")
    return score


def _dnsmos(reference: Any, degraded: Any) -> float:
    score = float(need("speechmos.dnsmos", "quality").run(degraded, _RATES["dnsmos"])["ovrl_mos"])
    if not math.isfinite(score):
        raise ValueError("degraded must hold sound for dnsmos, which has no score for it")
    return score
