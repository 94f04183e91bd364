"""Recordings with transcripts: reading and writing them, and making a conversation of them."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_runtime.extras import need

SAMPLING_RATE = 24_000
"""Samples per second of CSM's codec."""

FRAME_RATE = 12.5
"""Frames per second of speech."""

DEFAULT_SPEECH = Path("../shared/data/speech")
"""A folder of recordings that is used if it exists; otherwise the recording inside the package is."""

TRANSCRIPTS = "transcripts.tsv"
"""File in a folder of recordings: file name, seconds and text, separated by tabs, a recording a line."""


@dataclass(frozen=True)
class Turn:
    """What one speaker said: the text and, where it is context, how it sounded, ``[S]`` mono at 24 kHz."""

    speaker: int
    text: str
    samples: Tensor | None = None


@dataclass(frozen=True)
class Recording:
    """A sound file and what is said in it."""

    path: Path
    transcript: str

    def turn(self, speaker: int) -> Turn:
        """Read the file."""
        return Turn(speaker, self.transcript, read_wav(self.path))


def conversation(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns in the form that a processor's ``apply_chat_template`` takes, the last one being what is to be said."""
    messages = []
    for turn in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.text}]
        if turn.samples is not None:
            content.append({"type": "audio", "path": turn.samples.numpy()})
        messages.append({"role": str(turn.speaker), "content": content})
    return messages


def read_wav(path: str | Path) -> Tensor:
    """Read a sound file as ``[S]`` fp32 mono at 24 kHz; channels are averaged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sound file, or it is empty.
    """
    soundfile, functional = need("soundfile"), need("torchaudio.functional")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sound file at {path}")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as a sound file: {error.error_string}") from error
    if not len(samples):
        raise ValueError(f"{path} holds no samples")
    return functional.resample(torch.from_numpy(samples.mean(axis=1)), rate, SAMPLING_RATE)


def write_wav(path: str | Path, samples: Tensor) -> None:
    """Write ``[S]`` samples at 24 kHz as 16-bit WAV; what exceeds -1..1 is clipped. Makes the folder."""
    soundfile = need("soundfile")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = samples.detach().float().cpu().clamp(-1.0, 1.0)
    soundfile.write(path, wave.numpy(), SAMPLING_RATE, format="WAV", subtype="PCM_16")


def find_reference(
    speech: str | Path | None = None, wav: str | Path | None = None, transcript: str | None = None
) -> Recording:
    """The voice reference: a given file, or the first recording of a folder.

    Args:
        speech: folder of recordings with a ``transcripts.tsv``. Default: :data:`DEFAULT_SPEECH` if it exists,
            otherwise the recording that comes with the package.
        wav: a sound file to use instead.
        transcript: what is said in ``wav``; may be missing where a ``transcripts.tsv`` beside it has it.

    Raises:
        FileNotFoundError: a file or folder that is not there.
        ValueError: no transcript, or an unreadable ``transcripts.tsv``.
    """
    if wav is not None:
        path = Path(wav)
        if not path.is_file():
            raise FileNotFoundError(f"no sound file at {path}")
        text = transcript or _transcripts(path.parent, missing_ok=True).get(path.name)
        if not text:
            raise ValueError(f"no transcript for {path}; CSM needs to know what is said in it")
        return Recording(path, text)
    if transcript is not None:
        raise ValueError("a transcript was given without the recording it belongs to")
    folder = Path(speech) if speech is not None else DEFAULT_SPEECH
    if speech is None and not (folder / TRANSCRIPTS).is_file():
        folder = Path(str(importlib.resources.files("csm_runtime") / "data"))
    name, text = next(iter(_transcripts(folder).items()))
    return Recording(folder / name, text)


def _transcripts(folder: Path, missing_ok: bool = False) -> dict[str, str]:
    """Text by file name."""
    path = folder / TRANSCRIPTS
    if not path.is_file():
        if missing_ok:
            return {}
        raise FileNotFoundError(f"no {TRANSCRIPTS} in {folder}")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"{path} must have lines of file name, seconds and text, separated by tabs")
    return {name: text for name, _, text in rows}
