"""The metrics against closed forms, against loops over single rows, and on what must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from csm_runtime import fidelity

Metric = Callable[[Tensor, Tensor], Tensor]
SECOND = fidelity.SAMPLE_RATE
SOUND = {
    "log-mel": fidelity.log_mel_distance,
    "stft": fidelity.multi_resolution_stft_distance,
    "sqnr": fidelity.audio_sqnr_db,
}
SPECTRA = [SOUND["log-mel"], SOUND["stft"]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def speech_like(*leading: int, seconds: float = 1.5, seed: int = 0) -> Tensor:
    """A gliding harmonic tone under a slow envelope, with a little noise."""
    time = torch.arange(round(seconds * SECOND)) / SECOND
    phase = 2 * math.pi * (120 * time + 20 * time.square())
    tone = sum((k * phase).sin() / k for k in range(1, 20)) * (0.5 - 0.5 * (2 * math.pi * 3 * time).cos())
    return 0.1 * tone + 0.001 * normal(*leading, len(time), seed=seed)


# ----------------------------------------------------------------------------------------------------------- SQNR


@pytest.mark.parametrize("wanted", [-20.0, 0.0, 26.5, 100.0])
def test_sqnr_of_noise_of_known_power(wanted: float) -> None:
    truth, noise = normal(3, 2051).double(), normal(3, 2051, seed=1).double()
    noise *= truth.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True) * 10 ** (-wanted / 20)
    torch.testing.assert_close(fidelity.sqnr_db(truth + noise, truth), torch.full((3,), wanted).double())


def test_sqnr_of_scaled_logits() -> None:
    """A gain error of 1 % is 40 dB whatever the signal."""
    truth = normal(4, 5, 33).double()
    torch.testing.assert_close(fidelity.sqnr_db(1.01 * truth, truth), torch.full((4, 5), 40.0).double())
    whole = fidelity.sqnr_db(1.01 * truth, truth, dims=(1, 2))
    torch.testing.assert_close(whole, torch.full((4,), 40.0).double())


def test_sqnr_at_its_ends() -> None:
    truth = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [1.0, -math.inf], [1.0, -math.inf], [1.0, 2.0]])
    value = torch.tensor([[1.0, 2.0], [0.0, 0.1], [0.0, 0.0], [1.0, -math.inf], [1.0, -9.0], [math.nan, 2.0]])
    got = fidelity.sqnr_db(value, truth)
    assert got.tolist() == [math.inf, -math.inf, math.inf, math.inf, -math.inf, -math.inf]
    assert fidelity.sqnr_db(truth[5], value[5]) == -math.inf, "a broken truth passes no floor either"
    half = fidelity.sqnr_db(torch.tensor([1.1, -math.inf]), torch.tensor([1.0, -math.inf]))
    torch.testing.assert_close(half, torch.tensor(20.0).double(), atol=1e-4, rtol=0)


def test_sqnr_of_half_precision_is_that_of_its_numbers() -> None:
    truth = normal(64).bfloat16()
    value = truth * 1.25
    torch.testing.assert_close(fidelity.sqnr_db(value, truth), fidelity.sqnr_db(value.double(), truth.double()))


# ------------------------------------------------------------------------------------------------------------- KL


def test_kl_against_torch_distributions() -> None:
    p, q = 3 * normal(7, 3, 2051), 3 * normal(7, 3, 2051, seed=1)
    made = [torch.distributions.Categorical(logits=x.double()) for x in (p, q)]
    torch.testing.assert_close(fidelity.kl_divergence(p, q), torch.distributions.kl_divergence(*made))


def test_kl_of_two_tokens() -> None:
    """KL(1/2, 1/2 || 1/4, 3/4) = ln(4/3)/2."""
    got = fidelity.kl_divergence(torch.zeros(2), torch.tensor([0.0, math.log(3)]))
    torch.testing.assert_close(got, torch.tensor(0.5 * math.log(4 / 3)).double())
    back = fidelity.kl_divergence(torch.tensor([0.0, math.log(3)]), torch.zeros(2))
    torch.testing.assert_close(back, torch.tensor(0.25 * math.log(0.5) + 0.75 * math.log(1.5)).double())


def test_kl_ignores_an_offset_and_is_never_negative() -> None:
    p = 5 * normal(200, 51)
    got = fidelity.kl_divergence(p, p.double() + 7)
    assert (got >= 0).all()
    assert got.max() < 1e-12
    nearly = fidelity.kl_divergence(p, p.double() + 1e-9 * normal(200, 51, seed=1).double())
    assert (nearly >= 0).all(), "1e-18, which rounding hides"
    huge = fidelity.kl_divergence(torch.tensor([3e38, 0.0, -3e38]), torch.tensor([3e38, -3e38, 0.0]))
    assert huge == 0


def test_kl_with_tokens_ruled_out() -> None:
    p, q = normal(51), normal(51, seed=1)
    p[5:], q[5:] = -math.inf, -math.inf
    torch.testing.assert_close(fidelity.kl_divergence(p, q), fidelity.kl_divergence(p[:5], q[:5]))
    q[5] = 0.0
    assert 0 < fidelity.kl_divergence(p, q) < math.inf
    assert fidelity.kl_divergence(q, p) == math.inf, "the candidate rules out what the truth allows"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_broken_logits_are_as_far_as_can_be(broken: float, side: int) -> None:
    pair = [normal(2, 9), normal(2, 9)]
    pair[side][1, 4] = broken
    got = fidelity.kl_divergence(*pair)
    assert got[0] == 0
    assert got[1] == math.inf


def test_rows_of_nothing_but_minus_infinity() -> None:
    nothing = torch.full((9,), -math.inf)
    assert fidelity.kl_divergence(nothing, normal(9)) == math.inf
    assert fidelity.kl_divergence(normal(9), nothing) == math.inf
    assert fidelity.kl_divergence(nothing, nothing) == math.inf


# ---------------------------------------------------------------------------------------------- top 1 and near ties

TRUTH = torch.tensor([[4.0, 1.0, 0.0], [2.0, 1.9, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.9]])
CHOSEN = torch.tensor([0, 1, 2, 0])


def scores(tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens, 3).float()


def test_top1() -> None:
    assert fidelity.top1_agreement(TRUTH, scores(CHOSEN)) == 0.5
    by_row = fidelity.top1_agreement(TRUTH.view(2, 2, 3), scores(CHOSEN).view(2, 2, 3), dims=0)
    assert by_row.tolist() == [0.5, 0.5]
    assert fidelity.top1_agreement(TRUTH.view(2, 2, 3), scores(CHOSEN).view(2, 2, 3), dims=1).tolist() == [0.5, 0.5]


def test_near_tie() -> None:
    assert fidelity.near_tie(TRUTH, CHOSEN, 0.2).tolist() == [True, True, False, True]
    assert fidelity.near_tie(TRUTH, CHOSEN, 0.05).tolist() == [True, False, False, True]
    assert fidelity.near_tie(TRUTH, CHOSEN, 2.0).tolist() == [True] * 4, "the tolerance itself is near"
    per_row = torch.tensor([0.0, 0.2, 1.9, 0.0])
    assert fidelity.near_tie(TRUTH, CHOSEN, per_row).tolist() == [True, True, False, True]


@pytest.mark.parametrize(("tolerance", "wanted"), [(0.0, 0.5), (0.2, 0.75), (2.0, 1.0)])
def test_near_tie_agreement(tolerance: float, wanted: float) -> None:
    assert fidelity.near_tie_agreement(TRUTH, scores(CHOSEN), tolerance) == wanted


@pytest.mark.parametrize("side", [0, 1])
def test_nan_agrees_with_nothing(side: int) -> None:
    """``argmax`` takes NaN for the largest number: at index 0 it would agree with rows 0, 1 and 3."""
    pair = [TRUTH.clone(), TRUTH.clone()]
    pair[side][:, 0] = math.nan
    assert fidelity.top1_agreement(*pair) == 0
    assert fidelity.near_tie_agreement(*pair, 10.0) == 0


# --------------------------------------------------------------------------------------------- vectorised, and errors


@pytest.mark.parametrize(
    "metric",
    [
        fidelity.sqnr_db,
        fidelity.kl_divergence,
        lambda a, b: fidelity.near_tie(a, b.argmax(-1), 0.5),
    ],
    ids=["sqnr", "kl", "near tie"],
)
def test_leading_dimensions_are_loops(metric: Metric) -> None:
    a, b = normal(2, 3, 4, 19), normal(2, 3, 4, 19, seed=1)
    one_by_one = [metric(x, y) for x, y in zip(a.flatten(0, 2), b.flatten(0, 2))]
    got = metric(a, b)
    assert got.shape == (2, 3, 4)
    assert torch.equal(got.flatten(), torch.stack(one_by_one))


def test_logit_errors() -> None:
    a, b = normal(2, 9), normal(2, 8)
    for metric in (fidelity.sqnr_db, fidelity.kl_divergence, fidelity.top1_agreement):
        with pytest.raises(ValueError, match=r"same shape, got \(2, 9\) and \(2, 8\)"):
            metric(a, b)
    with pytest.raises(ValueError, match=r"token must have the logits' leading shape \(2,\), got \(3,\)"):
        fidelity.near_tie(a, torch.zeros(3, dtype=torch.int64), 0.0)
    with pytest.raises(ValueError, match="at least one row"):
        fidelity.top1_agreement(a[:0], a[:0])


# ---------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("metric", SPECTRA)
def test_equal_sound_is_at_no_distance(metric: Metric) -> None:
    sound = speech_like(2)
    assert torch.equal(metric(sound, sound), torch.zeros(2))
    assert torch.equal(metric(torch.zeros(SECOND), torch.zeros(SECOND)), torch.tensor(0.0))


@pytest.mark.parametrize("metric", SPECTRA)
def test_distance_grows_with_noise(metric: Metric) -> None:
    sound, noise = speech_like(), normal(3 * SECOND // 2, seed=9)
    distances = torch.stack([metric(sound, sound + level * noise) for level in (1e-4, 1e-3, 1e-2, 1e-1)])
    assert (distances[1:] > 1.5 * distances[:-1]).all(), distances


def test_log_mel_is_symmetric() -> None:
    a, b = speech_like(), speech_like(seed=1) * 0.7
    torch.testing.assert_close(fidelity.log_mel_distance(a, b), fidelity.log_mel_distance(b, a))


def test_log_mel_of_a_gain_is_that_gain_in_db() -> None:
    sound = normal(2 * SECOND)
    torch.testing.assert_close(fidelity.log_mel_distance(sound, sound / 2), torch.tensor(20 * math.log10(2)))


def test_stft_of_a_gain() -> None:
    """Half the amplitude: convergence 1/2 and a log magnitude difference of ln 2 at every resolution."""
    sound = normal(2 * SECOND)
    got = fidelity.multi_resolution_stft_distance(sound, sound / 2)
    torch.testing.assert_close(got, torch.tensor(0.5 + math.log(2)))


def test_what_is_below_the_floor_is_silence() -> None:
    quiet = 1e-6 * normal(SECOND)
    assert fidelity.log_mel_distance(quiet, torch.zeros(SECOND)) == 0
    assert fidelity.log_mel_distance(1000 * quiet, torch.zeros(SECOND)) > 10


@pytest.mark.filterwarnings("error")  # torchaudio warns of mel bands that no FFT bin falls into
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
@pytest.mark.parametrize("metric", SPECTRA)
def test_other_sample_rates(metric: Callable[..., Tensor], rate: int) -> None:
    sound = normal(rate)
    assert metric(sound, sound / 2, rate) > 0.5
    with pytest.raises(ValueError, match=f"at least 1.0 s, {rate} samples at {rate} Hz, got {rate - 1}"):
        metric(sound[1:], sound[1:], rate)


@pytest.mark.parametrize("metric", SOUND.values(), ids=SOUND)
def test_waveforms_are_loops(metric: Metric) -> None:
    a, b = speech_like(2, 3), speech_like(2, 3, seed=1)
    got = metric(a, b)
    assert got.shape == (2, 3)
    one_by_one = torch.stack([metric(x, y) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))])
    torch.testing.assert_close(got.flatten(), one_by_one)


def test_audio_sqnr() -> None:
    sound = speech_like()
    torch.testing.assert_close(
        fidelity.audio_sqnr_db(sound, sound * 1.001), torch.tensor(60.0).double(), atol=0.01, rtol=0
    )
    frame = sound[:1920]
    assert fidelity.audio_sqnr_db(frame, frame) == math.inf


@pytest.mark.parametrize("metric", SPECTRA)
def test_one_frame_is_refused(metric: Metric) -> None:
    frame = speech_like()[:1920]
    with pytest.raises(
        ValueError, match="at least 1.0 s, 24000 samples at 24000 Hz, got 1920: no standard audio metric"
    ):
        metric(frame, frame)


@pytest.mark.parametrize("metric", SOUND.values(), ids=SOUND)
def test_sound_errors(metric: Metric) -> None:
    sound = speech_like()
    with pytest.raises(ValueError, match=r"same shape, got \(36000,\) and \(35999,\)"):
        metric(sound, sound[1:])
    for side, bad in ((0, math.nan), (1, math.inf)):
        pair = [sound.clone(), sound.clone()]
        pair[side][7] = bad
        with pytest.raises(ValueError, match=f"{('reference', 'degraded')[side]} must be finite, got 1 samples"):
            metric(*pair)
    with pytest.raises(ValueError, match="reference must be floats"):
        metric(sound.short(), sound.short())


@pytest.mark.parametrize("metric", SPECTRA)
@pytest.mark.parametrize("rate", [0, 1, -24000, 999, 24000.0, True, "24000", math.nan])
def test_sample_rates_that_are_none(metric: Callable[..., Tensor], rate: object) -> None:
    with pytest.raises(ValueError, match="sample_rate must be an integer of at least 1000 Hz, got"):
        metric(normal(SECOND), normal(SECOND), rate)


def test_the_least_sample_rate() -> None:
    assert fidelity.multi_resolution_stft_distance(normal(1000), normal(1000) / 2, 1000) > 0.5


@pytest.mark.parametrize("metric", SPECTRA)
def test_sound_whose_squares_do_not_fit(metric: Metric) -> None:
    """In fp32 the spectrum of a peak of 1e20 is infinite and the distance NaN."""
    sound = speech_like()
    for side in range(2):
        pair = [sound, sound]
        pair[side] = sound * 1e20
        with pytest.raises(ValueError, match=f"{('reference', 'degraded')[side]} must have full scale at 1"):
            metric(*pair)
    loud = sound / sound.abs().max() * 1e6
    assert 0 < metric(loud, loud * 0.5) < math.inf


# -------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("total", [SECOND, 2 * SECOND, SECOND + 1, 3 * SECOND - 1, 3 * SECOND + 12345])
def test_windows_cover_everything_evenly(total: int) -> None:
    numbers = torch.arange(total).expand(2, -1)
    got = fidelity.windows(numbers)
    assert got.shape == (2, math.ceil(total / SECOND), SECOND)
    assert torch.equal(got[0].unique(), numbers[0])
    assert torch.equal(got.diff(dim=-1), torch.ones_like(got[..., 1:]))
    starts = got[0, :, 0]
    if len(starts) > 1:
        assert starts.diff().max() - starts.diff().min() <= 1
        assert got[0, -1, -1] == total - 1


def test_windows_show_the_worst_second() -> None:
    sound = speech_like(seconds=4.0)
    damaged = sound.clone()
    damaged[2 * SECOND : 3 * SECOND] += 0.1 * normal(SECOND)
    got = fidelity.log_mel_distance(fidelity.windows(sound), fidelity.windows(damaged))
    assert got.argmax() == 2
    assert got[0] == 0
    assert fidelity.log_mel_distance(sound, damaged) < got.max() / 2


def test_window_errors() -> None:
    with pytest.raises(ValueError, match=r"at least 1.0 s, 24000 samples at 24000 Hz, got 1920"):
        fidelity.windows(torch.zeros(1920))
    for seconds, rate in ((-1, SECOND), (math.inf, SECOND), (math.nan, SECOND), (1.0, 0), (1.0, math.inf)):
        with pytest.raises(ValueError, match=f"must be positive, got {seconds} and {rate}"):
            fidelity.windows(torch.zeros(1920), seconds, rate)
