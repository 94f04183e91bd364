"""How far logits or sound lie from the truth: pure metrics, which know nothing of models.

Logit metrics take ``[..., V]``, work in fp64 where the device has it (fp32 where not) and answer for every leading index at
once. What is broken is never taken for healthy: NaN gives the worst value of each metric, so that any floor catches it.

Sound metrics take waveforms ``[..., T]`` and answer ``[...]``. Those that look at spectra want at least one second: no
standard audio metric works on one 80 ms frame. To find the worst second of a long clip, cut both with :func:`windows`::

    distances = log_mel_distance(windows(reference), windows(degraded))
    distances.mean(-1), distances.amax(-1)
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

SAMPLE_RATE = 24_000
"""Hz, of CSM's codec."""

RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
"""FFT size, hop and window in samples at 24 kHz: those of Parallel WaveGAN."""

_MEL_BANDS = 64
_MEL_FFT = 1024
_MEL_FLOOR = 1e-8
"""Power of a mel band below which sound counts as silence: a full-scale sine stands 103 dB above, the noise of 16-bit
rounding (1e-5 rms) lies some 13 dB below."""

_STFT_FLOOR = 1e-7
"""Power, as in Parallel WaveGAN."""

_LEAST_RATE = 1000
"""Hz: below, a hop of the shortest spectrum is no sample."""

_LOUDEST = 1e6
"""120 dB beyond full scale: squares of spectra fit fp32 up to some 1e13."""

# ---------------------------------------------------------------------------------------------------------- logits


def sqnr_db(value: Tensor, truth: Tensor, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """Signal to quantisation noise ratio in dB, ``10 log10(sum truth^2 / sum (value - truth)^2)``.

    Args:
        value: ``[...]``, what was computed.
        truth: the same shape, what it should be.
        dims: dimensions summed over; None is the last one.

    Returns:
        fp64, ``value``'s shape without ``dims``: ``inf`` where both are equal, ``-inf`` where the truth is zero and the
        value is not, where either holds NaN, and where an infinity stands against anything else. An infinity on both
        sides counts as equal and is no part of the signal.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("value", value, "truth", truth)
    over = -1 if dims is None else dims
    value, truth = _precise(value), _precise(truth)
    noise = torch.where(value == truth, 0.0, value - truth).square().sum(over)
    signal = torch.where(truth.isinf(), 0.0, truth).square().sum(over)
    ratio = 10 * (signal / noise).log10()
    return torch.where(noise == 0, math.inf, ratio).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def kl_divergence(truth_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(truth || candidate) in nats of two rows of logits, each under softmax.

    Args:
        truth_logits: ``[..., V]``
        logits: the same shape. A token that is ``-inf`` on both sides contributes nothing.

    Returns:
        ``[...]`` fp64, at least 0: ``inf`` where the candidate rules out a token the truth allows, where a row holds NaN
        or ``+inf``, and where all of a row is ``-inf``.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("truth_logits", truth_logits, "logits", logits)
    p, q = _precise(truth_logits).log_softmax(-1), _precise(logits).log_softmax(-1)
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    # A NaN anywhere in q's row is in all of it; where p is -inf throughout its log-softmax is NaN and nothing is masked.
    return terms.sum(-1).clamp(min=0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def top1_agreement(truth_logits: Tensor, logits: Tensor, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """Share of rows whose largest logit is the same token's.

    Args:
        truth_logits: ``[..., V]``
        logits: the same shape.
        dims: which leading dimensions to take the share over; None is all of them.

    Returns:
        fp32 in 0 to 1, the leading shape without ``dims``. A row that holds NaN does not agree.

    Raises:
        ValueError: the shapes differ, or there is no row.
    """
    return _share(_same_top1(truth_logits, logits), dims)


def near_tie(truth_logits: Tensor, token: Tensor, tolerance: float | Tensor) -> Tensor:
    """Whether the truth scores a token as good as its best one, to a tolerance.

    Args:
        truth_logits: ``[..., V]``
        token: ``[...]`` int64, the token that was chosen.
        tolerance: in logits, at least 0; a number, or a tensor that broadcasts to ``[...]``.

    Returns:
        ``[...]`` bool: the best score minus the token's is at most ``tolerance``.

    Raises:
        ValueError: ``token`` has not the leading shape.
    """
    if token.shape != truth_logits.shape[:-1]:
        raise ValueError(
            f"token must have the logits' leading shape {tuple(truth_logits.shape[:-1])}, got {tuple(token.shape)}"
        )
    truth = _precise(truth_logits)
    return truth.amax(-1) - truth.gather(-1, token.unsqueeze(-1)).squeeze(-1) <= tolerance


def near_tie_agreement(
    truth_logits: Tensor, logits: Tensor, tolerance: float | Tensor, dims: int | tuple[int, ...] | None = None
) -> Tensor:
    """Share of rows whose largest logit is the truth's best token or a near tie with it.

    Args:
        truth_logits: ``[..., V]``
        logits: the same shape.
        tolerance: as in :func:`near_tie`.
        dims: which leading dimensions to take the share over; None is all of them.

    Returns:
        fp32 in 0 to 1, the leading shape without ``dims``. A row that holds NaN does not agree.

    Raises:
        ValueError: the shapes differ, or there is no row.
    """
    same = _same_top1(truth_logits, logits)
    tied = near_tie(truth_logits, logits.argmax(-1), tolerance) & ~logits.isnan().any(-1)
    return _share(same | tied, dims)


def _same_top1(truth_logits: Tensor, logits: Tensor) -> Tensor:
    _same_shape("truth_logits", truth_logits, "logits", logits)
    broken = truth_logits.isnan().any(-1) | logits.isnan().any(-1)
    return (truth_logits.argmax(-1) == logits.argmax(-1)) & ~broken


def _share(agree: Tensor, dims: int | tuple[int, ...] | None) -> Tensor:
    if agree.numel() == 0:
        raise ValueError(f"a share needs at least one row of logits, got the leading shape {tuple(agree.shape)}")
    return agree.float().mean(dims)


def _same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {tuple(tensor.shape)} and {tuple(other.shape)}"
        )


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


# ----------------------------------------------------------------------------------------------------------- sound


def windows(waveform: Tensor, seconds: float = 1.0, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Cut a waveform into windows of one length that cover all of it, evenly spaced, overlapping as little as they must.

    Args:
        waveform: ``[..., T]``
        seconds: length of a window.
        sample_rate: Hz.

    Returns:
        ``[..., windows, samples]``, a view where the windows do not overlap.

    Raises:
        ValueError: the waveform is shorter than one window, or ``seconds`` or ``sample_rate`` is not positive and finite.
    """
    if not 0 < seconds < math.inf or not 0 < sample_rate < math.inf:
        raise ValueError(f"seconds and sample_rate must be positive, got {seconds} and {sample_rate}")
    samples, total = max(1, round(seconds * sample_rate)), waveform.shape[-1]
    if total < samples:
        raise ValueError(
            f"waveform must last at least {seconds} s, {samples} samples at {sample_rate} Hz, got {total} samples"
        )
    count = -(-total // samples)
    if count * samples == total:
        return waveform.unflatten(-1, (count, samples))
    starts = torch.linspace(0, total - samples, count, dtype=torch.float64, device=waveform.device).round().long()
    return waveform[..., starts.unsqueeze(-1) + torch.arange(samples, device=waveform.device)]


def check_waveforms(reference: Tensor, degraded: Tensor, sample_rate: int, seconds: float = 1.0) -> None:
    """Refuse what cannot be compared.

    Args:
        reference: ``[..., T]`` floats.
        degraded: the same shape.
        sample_rate: Hz.
        seconds: least length.

    Raises:
        ValueError: the shapes differ, a sample is not finite, the samples are no floats, the clip is too short, or the sample
            rate is no integer of at least 1000.
    """
    if not isinstance(sample_rate, numbers.Integral) or sample_rate < _LEAST_RATE:
        raise ValueError(f"sample_rate must be an integer of at least {_LEAST_RATE} Hz, got {sample_rate!r}")
    _same_shape("reference", reference, "degraded", degraded)
    for name, waveform in (("reference", reference), ("degraded", degraded)):
        if waveform.ndim == 0 or not waveform.is_floating_point():
            raise ValueError(f"{name} must be floats [..., T], got {waveform.dtype} {tuple(waveform.shape)}")
        if not bool(waveform.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {int((~waveform.isfinite()).sum())} samples that are not")
    wanted = math.ceil(seconds * sample_rate)
    if reference.shape[-1] < wanted:
        raise ValueError(
            f"reference and degraded must last at least {seconds} s, {wanted} samples at {sample_rate} Hz, got"
            f" {reference.shape[-1]}: no standard audio metric works on one 80 ms frame"
        )


def audio_sqnr_db(reference: Tensor, degraded: Tensor) -> Tensor:
    """:func:`sqnr_db` of waveforms: of any length, for two decodings of the same codes.

    Args:
        reference: ``[..., T]``
        degraded: the same shape.

    Returns:
        dB ``[...]``. Says nothing of two clips that were not made from the same codes: a delay of one sample ruins it.

    Raises:
        ValueError: the shapes differ or a sample is not finite.
    """
    check_waveforms(reference, degraded, SAMPLE_RATE, seconds=0.0)
    return sqnr_db(degraded, reference)


def log_mel_distance(reference: Tensor, degraded: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Mean absolute difference of two log-mel spectrograms in dB: 64 bands, windows of 43 ms, a floor at -80 dB.

    Args:
        reference: ``[..., T]``, full scale at 1.
        degraded: the same shape.
        sample_rate: Hz.

    Returns:
        dB ``[...]``, 0 for equal sound, the same both ways round.

    Raises:
        ValueError: shorter than one second, different shapes, another sample rate than an integer of at least 1000, or a
            sample that is not finite or beyond a million times full scale.
    """
    import torchaudio

    _check_loudness(reference, degraded, sample_rate)
    size = _scaled(_MEL_FFT, sample_rate)
    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate, n_fft=size, hop_length=size // 4, n_mels=_MEL_BANDS, normalized=True
    ).to(reference.device)
    ours, theirs = (10 * transform(wave.float()).clamp(min=_MEL_FLOOR).log10() for wave in (reference, degraded))
    return (ours - theirs).abs().mean((-2, -1))


def multi_resolution_stft_distance(reference: Tensor, degraded: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Spectral convergence and log magnitude of short-time spectra, averaged over three resolutions.

    Yamamoto, Song and Kim, "Parallel WaveGAN", 2020, equations 4 to 6: ``|R - D|_F / |R|_F`` plus the mean of
    ``|log R - log D|`` in nats, with the window sizes of the paper.

    Args:
        reference: ``[..., T]``, full scale at 1.
        degraded: the same shape.
        sample_rate: Hz; the windows keep their length in milliseconds.

    Returns:
        ``[...]``, 0 for equal sound. Not symmetric: the convergence is relative to the reference.

    Raises:
        ValueError: shorter than one second, different shapes, another sample rate than an integer of at least 1000, or a
            sample that is not finite or beyond a million times full scale.
    """
    import torchaudio

    _check_loudness(reference, degraded, sample_rate)
    total = torch.zeros(reference.shape[:-1], device=reference.device)
    for size, hop, window in RESOLUTIONS:
        scale = _scaled(size, sample_rate) / size
        transform = torchaudio.transforms.Spectrogram(
            round(size * scale), win_length=round(window * scale), hop_length=round(hop * scale), power=2
        ).to(reference.device)
        truth, other = (transform(wave.float()).clamp(min=_STFT_FLOOR).sqrt() for wave in (reference, degraded))
        convergence = (truth - other).square().sum((-2, -1)).sqrt() / truth.square().sum((-2, -1)).sqrt()
        total += convergence + (truth.log() - other.log()).abs().mean((-2, -1))
    return total / len(RESOLUTIONS)


def _check_loudness(reference: Tensor, degraded: Tensor, sample_rate: int) -> None:
    check_waveforms(reference, degraded, sample_rate)
    for name, waveform in (("reference", reference), ("degraded", degraded)):
        if waveform.numel() and (peak := float(waveform.abs().max())) > _LOUDEST:
            raise ValueError(f"{name} must have full scale at 1, and no peak beyond {_LOUDEST:g}, got {peak:g}")


def _scaled(size: int, sample_rate: int) -> int:
    """A power of two that lasts about as long at another sample rate as ``size`` does at 24 kHz."""
    return 2 ** round(math.log2(size * sample_rate / SAMPLE_RATE))
