"""PESQ, STOI and DNSMOS: what the packages are given, and that the real ones rank damaged speech below whole."""

from __future__ import annotations

import csv
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from csm_runtime.perceptual import METRICS, perceptual

SPEECH = Path(__file__).parents[1] / "examples" / "data" / "speech"


class NoUtterancesError(RuntimeError):
    pass


def noise(samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Stand-ins for the packages that keep what they were given."""
    calls: dict[str, list[Any]] = {name: [] for name in METRICS}

    def pesq(rate: int, reference: Any, degraded: Any, mode: str) -> float:
        calls["pesq"].append((rate, reference, degraded, mode))
        return float(len(calls["pesq"]))

    def stoi(reference: Any, degraded: Any, rate: int) -> Any:
        calls["stoi"].append((rate, reference, degraded))
        return numpy.float64(0.875)

    def run(sample: Any, sr: int) -> dict[str, Any]:
        calls["dnsmos"].append((sr, sample))
        return {"ovrl_mos": numpy.float64(3.5), "sig_mos": 1.0, "bak_mos": 2.0}

    monkeypatch.setitem(sys.modules, "pesq", SimpleNamespace(pesq=pesq, NoUtterancesError=NoUtterancesError))
    monkeypatch.setitem(sys.modules, "pystoi", SimpleNamespace(stoi=stoi))
    monkeypatch.setitem(sys.modules, "speechmos.dnsmos", SimpleNamespace(run=run))
    return calls


def sine(hertz: float, rate: int, seconds: float = 2.0) -> Tensor:
    return 0.5 * (2 * math.pi * hertz * torch.arange(round(rate * seconds)) / rate).sin()


def test_each_metric_gets_its_own_rate(given: dict[str, list[Any]]) -> None:
    reference, degraded = sine(440, 24_000), sine(1000, 24_000)
    got = perceptual(reference, degraded)
    assert got == {"pesq": 1.0, "stoi": 0.875, "dnsmos": 3.5}
    assert all(type(score) is float for score in got.values())
    (pesq,), (stoi,), (dnsmos,) = given["pesq"], given["stoi"], given["dnsmos"]
    assert (pesq[0], pesq[3], stoi[0], dnsmos[0]) == (16_000, "wb", 10_000, 16_000)
    heard = [(pesq[1], 440, 16_000), (pesq[2], 1000, 16_000), (stoi[1], 440, 10_000), (stoi[2], 1000, 10_000)]
    for wave, hertz, rate in [*heard, (dnsmos[1], 1000, 16_000)]:
        assert isinstance(wave, numpy.ndarray)
        assert wave.dtype == numpy.float32
        middle = slice(rate // 10, -rate // 10)  # a resampler rings at the ends
        numpy.testing.assert_allclose(wave[middle], sine(hertz, rate).numpy()[middle], atol=5e-3)


def test_at_the_right_rate_nothing_is_resampled(given: dict[str, list[Any]]) -> None:
    sound = noise(16_000)
    perceptual(sound, 0.5 * sound, 16_000, ("dnsmos",))
    assert torch.equal(torch.from_numpy(given["dnsmos"][0][1]), 0.5 * sound)


def test_only_what_was_asked_for(given: dict[str, list[Any]]) -> None:
    assert list(perceptual(noise(24_000), noise(24_000), metrics=["stoi", "pesq"])) == ["stoi", "pesq"]
    assert given["dnsmos"] == []


def test_sound_beyond_full_scale_is_clipped(given: dict[str, list[Any]]) -> None:
    """DNSMOS refuses it."""
    sound = sine(100, 24_000)
    perceptual(sound, 3 * sound, metrics=("dnsmos",))
    assert abs(given["dnsmos"][0][1]).max() == 1


def test_long_clips_are_rated_by_pesq_in_parts(given: dict[str, list[Any]]) -> None:
    sound = noise(16_000 * 45)
    assert perceptual(sound, sound, 16_000, ("pesq",)) == {"pesq": 2.0}, "the mean of 1, 2 and 3"
    parts = [call[1] for call in given["pesq"]]
    assert [len(part) for part in parts] == [16_000 * 15] * 3
    assert torch.equal(torch.from_numpy(numpy.concatenate(parts)), sound)


def test_half_precision_and_gradients(given: dict[str, list[Any]]) -> None:
    sound = noise(24_000).bfloat16().requires_grad_()
    assert perceptual(sound, sound)["stoi"] == 0.875


def test_no_speech(given: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*args: Any) -> float:
        raise NoUtterancesError

    def too_little(*args: Any) -> float:
        warnings.warn("Not enough STFT frames to compute intermediate intelligibility", RuntimeWarning, stacklevel=2)
        return 1e-5

    sound = noise(24_000)
    monkeypatch.setattr(sys.modules["pesq"], "pesq", nobody)
    with pytest.raises(ValueError, match="reference must hold speech for pesq"):
        perceptual(sound, sound)
    monkeypatch.setattr(sys.modules["pystoi"], "stoi", too_little)
    with pytest.raises(ValueError, match=r"reference must hold 0.4 s of speech for stoi"):
        perceptual(sound, sound, metrics=("stoi",))
    with pytest.raises(ValueError, match="reference must not be silent"):
        perceptual(torch.zeros(24_000), sound)
    with pytest.raises(ValueError, match="degraded must not be silent"):
        perceptual(sound, torch.zeros(24_000))


def test_a_part_without_speech_is_left_out(given: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([2.0, None, 4.0])

    def sometimes(*args: Any) -> float:
        score = next(scores)
        if score is None:
            raise NoUtterancesError
        return score

    monkeypatch.setattr(sys.modules["pesq"], "pesq", sometimes)
    sound = noise(16_000 * 45)
    assert perceptual(sound, sound, 16_000, ("pesq",)) == {"pesq": 3.0}


def test_errors(given: dict[str, list[Any]]) -> None:
    sound = noise(24_000)
    with pytest.raises(ValueError, match="metrics must be among pesq, stoi, dnsmos, got 'mos'"):
        perceptual(sound, sound, metrics=("stoi", "mos"))
    with pytest.raises(ValueError, match=r"reference must be one clip \[T\], got \(1, 24000\)"):
        perceptual(sound[None], sound[None])
    with pytest.raises(ValueError, match=r"at least 1.0 s, 24000 samples at 24000 Hz, got 1920"):
        perceptual(sound[:1920], sound[:1920])
    with pytest.raises(ValueError, match="same shape"):
        perceptual(sound, noise(24_001))
    assert not any(given.values())


@pytest.mark.parametrize(("metric", "module"), [("pesq", "pesq"), ("stoi", "pystoi"), ("dnsmos", "speechmos.dnsmos")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, metric: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module.partition(".")[0]} .*pip install "csm-kernels\[quality\]"'):
        perceptual(noise(24_000), noise(24_000), metrics=(metric,))


# ---------------------------------------------------------------------------------------------------- real packages


def clip() -> Tensor:
    """A sentence of the repository's speech at 16 kHz."""
    soundfile = pytest.importorskip("soundfile")
    with open(SPEECH / "transcripts.tsv") as file:
        name = next(row[0] for row in csv.reader(file, delimiter="\t") if row[0].endswith(".flac"))
    samples, rate = soundfile.read(SPEECH / name, dtype="float32")
    assert rate == 16_000
    return torch.from_numpy(samples)


@pytest.mark.parametrize(
    ("metric", "module", "best"),
    [
        ("pesq", "pesq", 4.64),
        ("stoi", "pystoi", 1.0),
        pytest.param("dnsmos", "speechmos.dnsmos", None, marks=pytest.mark.slow),  # importing librosa alone is 4 s
    ],
)
def test_damage_is_heard(metric: str, module: str, best: float | None) -> None:
    pytest.importorskip(module)
    sound = clip()
    whole, damaged = (
        perceptual(sound, sound + level * noise(len(sound), seed=3), 16_000, (metric,))[metric] for level in (0, 1)
    )
    assert whole > damaged + 0.1
    if best is not None:
        assert whole == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize("level", [1e-30, 1e-44])
@pytest.mark.parametrize("side", [0, 1])
def test_the_real_pesq_says_where_it_hears_nothing(level: float, side: int) -> None:
    pytest.importorskip("pesq")
    pair = [noise(16_000), noise(16_000)]
    pair[side] = level * pair[side] / pair[side].abs().max()
    with pytest.raises(ValueError, match="for pesq"):
        perceptual(*pair, 16_000, ("pesq",))


def test_the_real_stoi_says_where_there_is_too_little_speech() -> None:
    pytest.importorskip("pystoi")
    burst = torch.zeros(32_000)
    burst[100:200] = 0.3
    with pytest.raises(ValueError, match="speech for stoi"):
        perceptual(burst, burst, 16_000, ("stoi",))
