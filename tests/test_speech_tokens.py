"""Recordings of the repository as tokens and back, and what is read where Debian's packages cannot be had."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("speech_clips")


@pytest.fixture
def tokens(clips: Any) -> Any:
    return importlib.import_module("speech_tokens")


@pytest.fixture
def waves(clips: Any) -> list[torch.Tensor]:
    return [clip.samples for clip in clips.repository_clips()]


@pytest.fixture
def fitted(tokens: Any, waves: list[torch.Tensor]) -> Any:
    return tokens.SpeechTokens.fit(waves, seed=0)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_codes_are_entries_of_every_whole_frame(tokens: Any, fitted: Any, waves: list[torch.Tensor]) -> None:
    for samples in (waves[0], waves[0][: tokens.FRAME], waves[0][: 3 * tokens.FRAME - 1]):
        codes = fitted.encode(samples)
        assert codes.shape == (len(samples) // 1280, 8)
        assert codes.dtype == torch.int64
        assert codes.min() >= 1 and codes.max() <= 64
    assert len(fitted.encode(torch.cat(waves)).unique()) == 64
    assert tokens.END_OF_SPEECH == 0 and tokens.PAD == 65 and tokens.VOCAB == 66


def test_the_seed_decides(tokens: Any, fitted: Any, waves: list[torch.Tensor]) -> None:
    state = torch.get_rng_state()
    same, other = (tokens.SpeechTokens.fit(waves, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same.codebooks, fitted.codebooks)
    assert not torch.equal(other.codebooks, fitted.codebooks)
    for samples in waves:
        assert torch.equal(same.encode(samples), fitted.encode(samples))


def test_every_codebook_explains_something(tokens: Any, fitted: Any, waves: list[torch.Tensor]) -> None:
    truth = torch.cat([tokens.log_mel(samples) for samples in waves])
    codes = torch.cat([fitted.encode(samples) for samples in waves])
    errors = [rms(fitted.decode_log_mel(codes, books) - truth) for books in range(9)]
    assert all(after < before for before, after in zip(errors, errors[1:])), errors
    assert errors[8] < 0.15 * errors[0], errors


def test_sound_made_of_log_mel_has_it(tokens: Any, fitted: Any, waves: list[torch.Tensor]) -> None:
    for samples in waves[:3]:
        codes = fitted.encode(samples)
        made = fitted.decode(codes)
        assert made.shape == (1280 * len(codes),)
        assert made.isfinite().all()
        wanted = fitted.decode_log_mel(codes)
        # Phases that agree with every spectrum do not exist; a wrong inverse of the mel scale costs 1.2 and more.
        assert rms(tokens.log_mel(made) - wanted) < 0.2 * rms(wanted - wanted.mean(0))
        assert torch.equal(fitted.decode(codes), made)


def test_save_and_load(tokens: Any, fitted: Any, waves: list[torch.Tensor], tmp_path: Path) -> None:
    fitted.save(tmp_path / "tokens.safetensors")
    loaded = tokens.SpeechTokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(loaded.encode(waves[0]), fitted.encode(waves[0]))


def test_cut_at_end(tokens: Any) -> None:
    codes = torch.randint(1, 65, (6, 8))
    assert torch.equal(tokens.cut_at_end(codes), codes)
    codes[4] = 0
    assert torch.equal(tokens.cut_at_end(codes), codes[:4])
    codes[1, 3] = 65
    assert torch.equal(tokens.cut_at_end(codes), codes[:1])
    codes[0, 0] = 0
    assert tokens.cut_at_end(codes).shape == (0, 8)


def test_odd_inputs_name_the_argument(tokens: Any, fitted: Any, waves: list[torch.Tensor]) -> None:
    for samples in (torch.zeros(0), torch.zeros(1279)):
        with pytest.raises(ValueError, match=rf"samples hold {len(samples)} values; a frame of 80 ms needs 1280"):
            fitted.encode(samples)
    for samples in (torch.zeros(2, 4000), torch.zeros(4000, dtype=torch.int16)):
        with pytest.raises(ValueError, match="samples must be mono floats"):
            fitted.encode(samples)
    with pytest.raises(ValueError, match="waves is empty"):
        tokens.SpeechTokens.fit([])
    with pytest.raises(ValueError, match="waves hold 63 frames"):
        tokens.SpeechTokens.fit([torch.cat(waves)[: 63 * 1280]])
    for codes in (torch.ones(3, 7, dtype=torch.long), torch.ones(3, 8)):
        with pytest.raises(ValueError, match=r"codes must be integers \[F, 8\]"):
            fitted.decode(codes)
    for codes in (torch.ones(0, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long), torch.full((3, 8), 65)):
        with pytest.raises(ValueError, match="codes must hold at least one frame, of tokens from 1 to 64"):
            fitted.decode(codes)
    with pytest.raises(ValueError, match="codebooks must have shape"):
        tokens.SpeechTokens(fitted.mean, fitted.scale, fitted.codebooks[:4])
    silent = fitted.encode(torch.zeros(4000))
    assert torch.equal(silent, silent[:1].expand_as(silent))


def test_clips_of_the_repository(clips: Any) -> None:
    found = clips.repository_clips()
    assert [clip.name for clip in found] == sorted(clip.name for clip in found)
    assert len(found) == 12 and 33 < sum(clip.seconds for clip in found) < 34
    by_name = {clip.name: clip for clip in found}
    assert by_name["en/tt-weasels"].text == "Weasels have eaten our phone system."
    assert all(clip.speaker == 0 and clip.samples.abs().max() > 0.1 for clip in found)


@pytest.mark.parametrize("failure", ["apt is missing", "apt fails", "no decoder"])
def test_without_packages_the_repository_stands_in(
    clips: Any, failure: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **options: Any) -> None:
        (Path(options["cwd"]) / "half.deb").write_bytes(b"half a download")
        if failure == "apt is missing":
            raise FileNotFoundError(2, "No such file", command[0])
        raise subprocess.CalledProcessError(100, command, stderr="W: noise\nE: no network today\n")

    def need(module: str, extra: str = "cli") -> Any:
        if module == "av" and failure == "no decoder":
            raise ImportError("av cannot be imported")
        return importlib.import_module("types" if module == "av" else module)

    monkeypatch.setattr(clips.subprocess, "run", run)
    monkeypatch.setattr(clips, "need", need)
    found = clips.load_clips(tmp_path)
    assert [clip.name for clip in found] == [clip.name for clip in clips.repository_clips()]
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    reason = {
        "apt is missing": "did not run",
        "apt fails": "E: no network today",
        "no decoder": "av cannot be imported",
    }
    assert said.count("\n") == 1 and "12 clips of the repository" in said and reason[failure] in said


def test_a_folder_that_cannot_be_made(clips: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clips, "need", lambda module, extra="cli": importlib.import_module("types"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(clips.Unreachable, match="file/speech cannot be written to"):
        clips.package_clips(tmp_path / "file" / "speech")


def test_packages_are_read_by_voice(clips: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unpacked packages as Debian lays them out, with a decoder that gives the file's length in samples."""
    for language in clips.VOICES:
        voice = tmp_path / f"asterisk-core-sounds-{language}-g722/usr/share/asterisk/sounds/{language}_XX_f_Voice"
        for name, size in (("digits/5", 8), ("conf-getpin", 9), ("silence/1", 10), ("empty", 0)):
            (voice / name).parent.mkdir(parents=True, exist_ok=True)
            (voice / f"{name}.g722").write_bytes(b"\0" * size)
    monkeypatch.setattr(clips, "decode_g722", lambda path: torch.zeros(path.stat().st_size))
    monkeypatch.setattr(clips, "need", lambda module, extra="cli": importlib.import_module("types"))
    found = clips.package_clips(tmp_path)
    assert [(clip.name, clip.speaker, clip.text, len(clip.samples)) for clip in found[:4]] == [
        ("en/conf-getpin", 0, "Please enter the conference pin number.", 9),
        ("en/digits/5", 0, "digits 5", 8),
        ("es/conf-getpin", 1, "conf getpin", 9),
        ("es/digits/5", 1, "digits 5", 8),
    ]
    assert len(found) == 10


def test_g722_is_decoded(clips: Any, tmp_path: Path) -> None:
    """A tone through PyAV's own encoder and back."""
    av = pytest.importorskip("av")
    tone = (8000 * torch.sin(torch.arange(16000) * 2 * torch.pi * 440 / 16000)).to(torch.int16)
    path = tmp_path / "tone.g722"
    with av.open(str(path), "w", format="g722") as file:
        stream = file.add_stream("g722", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None].numpy(), format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    samples = clips.decode_g722(path)
    assert abs(len(samples) - 16000) <= 320 and samples.dtype == torch.float32
    spectrum = torch.fft.rfft(samples[2000:10000]).abs()
    assert int(spectrum.argmax()) == 220  # bins of 2 Hz
    assert abs(float(samples.abs().max()) - 8000 / 32768) < 0.02
