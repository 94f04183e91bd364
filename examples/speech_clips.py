"""Real speech to train on: Debian's Asterisk prompts in five voices, or the few clips in the repository.

    python examples/speech_clips.py [folder]

The packages asterisk-core-sounds-*-g722 hold 131 minutes at 16 kHz. They are fetched by ``apt-get download`` (no root, nothing
is installed), unpacked by ``dpkg-deb -x`` and decoded by PyAV. Where one of these is missing, the clips in
``examples/data/speech`` stand in, and one line says why.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from csm_runtime.compiling import cache_dir
from csm_runtime.extras import need

SAMPLING_RATE = 16_000
"""Samples per second of all clips."""

VOICES = {"en": "Allison Smith", "es": "Allison Smith", "fr": "June Wallack", "it": "Carlo Flora", "ru": "Maxim Topal"}
"""Language of each package and whom its copyright file credits; a clip's speaker is the place in this list."""

LICENCES = {"en": "CC-BY-SA-3.0", "es": "CC-BY-SA-3.0", "fr": "CC-BY-SA-3.0", "it": "CC-BY-3.0", "ru": "CC-BY-3.0"}
"""Licence of each package's recordings, from its copyright file."""

REPOSITORY_CLIPS = Path(__file__).parent / "data" / "speech"
"""Twelve of the English prompts as FLAC, with ``transcripts.tsv``: file, seconds, text."""

_PACKAGE = "asterisk-core-sounds-{}-g722"
_APT_SECONDS = 300


@dataclass(frozen=True)
class Clip:
    """A recording.

    Attributes:
        name: language and file name without suffix, ``en/conf-getpin``.
        speaker: number of the voice.
        text: what is said; where nobody wrote it down, the words of the file name.
        samples: ``[S]`` fp32 mono at 16 kHz in -1..1.
    """

    name: str
    speaker: int
    text: str
    samples: Tensor

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.samples) / SAMPLING_RATE


class Unreachable(Exception):
    """The packages cannot be had on this machine; says why."""


def load_clips(folder: str | Path | None = None) -> list[Clip]:
    """All recordings that can be had, sorted by language and name.

    Args:
        folder: where packages are kept unpacked between runs. Default: ``speech`` in the folder of docs/env.md.
    """
    folder = cache_dir() / "speech" if folder is None else Path(folder)
    try:
        return package_clips(folder)
    except Unreachable as reason:
        clips = repository_clips()
        print(f"speech: {len(clips)} clips of the repository instead of Debian's packages: {reason}", file=sys.stderr)
        return clips


def repository_clips() -> list[Clip]:
    """The clips in the repository, 34 seconds of one voice."""
    soundfile = need("soundfile")
    clips = []
    for name, text in _transcripts().items():
        samples, rate = soundfile.read(REPOSITORY_CLIPS / f"{name}.flac", dtype="float32")
        assert rate == SAMPLING_RATE, (name, rate)
        clips.append(Clip(f"en/{name}", 0, text, torch.from_numpy(samples)))
    return sorted(clips, key=lambda clip: clip.name)


def package_clips(folder: Path) -> list[Clip]:
    """The recordings of Debian's packages, fetched where ``folder`` does not have them yet.

    Raises:
        Unreachable: no apt, no network, no decoder or no place to keep them.
    """
    try:
        need("av", "train")
    except ImportError as error:
        raise Unreachable(str(error)) from error
    clips, texts = [], _transcripts()
    for speaker, language in enumerate(VOICES):
        root = _unpacked(language, folder)
        voice = next((root / "usr/share/asterisk/sounds").iterdir())
        for path in sorted(voice.rglob("*.g722")):
            name = path.relative_to(voice).with_suffix("").as_posix()
            if name.startswith("silence/"):
                continue
            samples = decode_g722(path)
            words = " ".join(re.findall(r"[a-z0-9]+", name.lower()))
            text = texts.get(name, words) if language == "en" else words
            if len(samples):
                clips.append(Clip(f"{language}/{name}", speaker, text, samples))
    return clips


def decode_g722(path: Path) -> Tensor:
    """A raw G.722 file as ``[S]`` fp32 at 16 kHz."""
    av = need("av", "train")
    with av.open(str(path), format="g722") as stream:
        frames = [frame.to_ndarray().reshape(-1) for frame in stream.decode(audio=0)]
    samples = numpy.concatenate(frames) if frames else numpy.zeros(0, numpy.int16)
    return torch.from_numpy(samples.astype(numpy.float32) / 32768)


def _unpacked(language: str, folder: Path) -> Path:
    """The package's files; a download cut short leaves nothing behind."""
    package = _PACKAGE.format(language)
    final = folder / package
    if final.is_dir():
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{package}.", dir=folder))
    except OSError as error:
        raise Unreachable(f"{folder} cannot be written to: {error}") from error
    try:
        _run(["apt-get", "-q", "download", package], work)
        (archive,) = work.glob("*.deb")
        _run(["dpkg-deb", "-x", archive.name, "files"], work)
        (work / "files").rename(final)
    finally:
        shutil.rmtree(work)
    return final


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_APT_SECONDS)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unreachable(f"{' '.join(command)} failed: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"{' '.join(command)} did not run: {error}") from error


def _transcripts() -> dict[str, str]:
    """Text by file name without suffix, of the clips in the repository."""
    lines = (REPOSITORY_CLIPS / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    return {Path(name).stem: text for name, _, text in rows}


if __name__ == "__main__":
    found = load_clips(*sys.argv[1:2])
    for number, voice in enumerate(VOICES):
        own = [clip.seconds for clip in found if clip.speaker == number]
        print(f"{voice}: {len(own)} clips, {sum(own) / 60:.1f} minutes")
