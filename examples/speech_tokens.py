"""Speech as tokens without a neural codec: residual k-means over log-mel frames, and Griffin-Lim to listen to them.

    python examples/speech_tokens.py [out]

fits the tokenizer, says how much every codebook explains and writes a recording beside what its tokens make of it.
A frame is 80 ms, like one of CSM's codec: four log-mel columns of 20 ms. Token 0 of every codebook is the end-of-speech
frame's, as in CSM; 1 to 64 are the entries, 65 pads.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from speech_clips import SAMPLING_RATE, load_clips
from torch import Tensor

from csm_runtime.extras import need

HOP = 320
"""Samples between log-mel columns, 20 ms."""

MELS = 40
COLUMNS = 4
"""Log-mel columns per frame."""

FRAME = HOP * COLUMNS
"""Samples per frame, 80 ms."""

CODEBOOKS = 8
ENTRIES = 64
END_OF_SPEECH = 0
PAD = ENTRIES + 1
VOCAB = ENTRIES + 2

_FFT = 1024
_WINDOW = 640
_FLOOR = 1e-2
_FIT_FRAMES = 60_000
_FIT_ROUNDS = 15
_GRIFFIN_LIM_ROUNDS = 60
_INVERSE_ROUNDS = 100


class SpeechTokens:
    """The tokenizer.

    Args:
        mean: ``[160]`` fp32, of a frame's log-mel values, column after column.
        scale: their deviation, one number.
        codebooks: ``[8, 64, 160]`` fp32, in units of ``scale``.

    Example::

        tokens = SpeechTokens.fit([clip.samples for clip in clips], seed=0)
        codes = tokens.encode(samples)  # [F, 8] int64, 1..64
        samples = tokens.decode(codes)  # [F * 1280] at 16 kHz
    """

    def __init__(self, mean: Tensor, scale: Tensor, codebooks: Tensor) -> None:
        wanted = {"mean": (MELS * COLUMNS,), "scale": (), "codebooks": (CODEBOOKS, ENTRIES, MELS * COLUMNS)}
        for (name, shape), value in zip(wanted.items(), (mean, scale, codebooks)):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        self.mean, self.scale, self.codebooks = mean, scale, codebooks

    @classmethod
    def fit(cls, waves: Sequence[Tensor], seed: int = 0) -> SpeechTokens:
        """Fit the codebooks one after another, each to what those before it leave over.

        Args:
            waves: recordings ``[S]`` fp32 at 16 kHz; at least 64 frames together.
            seed: of the frames drawn and the entries begun with.

        Raises:
            ValueError: not enough frames.
        """
        if not waves:
            raise ValueError("waves is empty; the codebooks are fitted to recordings")
        frames = torch.cat([_frames(log_mel(wave)) for wave in waves])
        if len(frames) < ENTRIES:
            raise ValueError(f"waves hold {len(frames)} frames of 80 ms; at least {ENTRIES} are needed")
        generator = torch.Generator().manual_seed(seed)
        frames = frames[torch.randperm(len(frames), generator=generator)[:_FIT_FRAMES]]
        mean, scale = frames.mean(0), frames.std()
        rest, books = (frames - mean) / scale, []
        for _ in range(CODEBOOKS):
            book = _k_means(rest, generator)
            rest = rest - book[_nearest(rest, book)]
            books.append(book)
        return cls(mean, scale, torch.stack(books))

    def encode(self, samples: Tensor) -> Tensor:
        """Tokens ``[F, 8]`` int64 of samples ``[S]`` fp32 at 16 kHz; what is left over after the last whole frame is dropped.

        Raises:
            ValueError: not mono samples, or less than a frame of them.
        """
        rest = (_frames(log_mel(samples)) - self.mean) / self.scale
        codes = []
        for book in self.codebooks:
            codes.append(_nearest(rest, book))
            rest = rest - book[codes[-1]]
        return torch.stack(codes, dim=1) + 1

    def decode_log_mel(self, codes: Tensor, books: int = CODEBOOKS) -> Tensor:
        """Log-mel ``[F * 4, 40]`` of tokens ``[F, 8]``, of the first ``books`` codebooks alone if fewer.

        Raises:
            ValueError: another shape, or tokens that are no entry: cut at the end-of-speech frame first.
        """
        if codes.ndim != 2 or codes.shape[1] != CODEBOOKS or codes.is_floating_point():
            raise ValueError(f"codes must be integers [F, {CODEBOOKS}], got {codes.dtype} {tuple(codes.shape)}")
        if not len(codes) or int(codes.min()) < 1 or int(codes.max()) > ENTRIES:
            raise ValueError(f"codes must hold at least one frame, of tokens from 1 to {ENTRIES}")
        frames = torch.zeros(len(codes), MELS * COLUMNS)
        for book, column in zip(self.codebooks[:books], codes.T):
            frames = frames + book[column - 1]
        return (frames * self.scale + self.mean).view(-1, MELS)

    def decode(self, codes: Tensor) -> Tensor:
        """Samples ``[F * 1280]`` fp32 at 16 kHz of tokens ``[F, 8]``, with phases by Griffin-Lim."""
        mel = (self.decode_log_mel(codes).exp() - _FLOOR).clamp(min=0.0)
        mel = torch.cat([mel, mel[-1:]])  # a centred transform of S samples has S / hop + 1 columns
        griffin_lim = need("torchaudio.transforms").GriffinLim(
            _FFT, _GRIFFIN_LIM_ROUNDS, win_length=_WINDOW, hop_length=HOP, rand_init=False
        )
        return griffin_lim(_spectrum(mel.T))

    def save(self, path: str | Path) -> None:
        """Write the tensors as safetensors."""
        from safetensors.torch import save_file

        save_file({"mean": self.mean, "scale": self.scale, "codebooks": self.codebooks}, path)

    @classmethod
    def load(cls, path: str | Path) -> SpeechTokens:
        """Read what :meth:`save` wrote."""
        from safetensors.torch import load_file

        return cls(**load_file(path))


def log_mel(samples: Tensor) -> Tensor:
    """Log-mel columns ``[F * 4, 40]`` of samples ``[S]`` fp32 at 16 kHz, F whole frames.

    Raises:
        ValueError: not mono samples, or less than a frame of them.
    """
    if samples.ndim != 1 or not samples.is_floating_point():
        raise ValueError(f"samples must be mono floats [S], got {samples.dtype} {tuple(samples.shape)}")
    count = len(samples) // FRAME
    if not count:
        raise ValueError(f"samples hold {len(samples)} values; a frame of 80 ms needs {FRAME}")
    mel = _mel_spectrogram()(samples)
    return (mel[:, : count * COLUMNS] + _FLOOR).log().T


def cut_at_end(codes: Tensor) -> Tensor:
    """Frames ``[F, 8]`` before the first that holds a token which is no entry: the end of speech, as a rule."""
    spoken = ((codes >= 1) & (codes <= ENTRIES)).all(1)
    return codes[: int(spoken.cumprod(0).sum())]


@functools.cache
def _mel_spectrogram() -> Any:
    transforms = need("torchaudio.transforms")
    return transforms.MelSpectrogram(SAMPLING_RATE, _FFT, win_length=_WINDOW, hop_length=HOP, n_mels=MELS)


def _spectrum(mel: Tensor) -> Tensor:
    """A power spectrum ``[513, T]``, nowhere negative, that has this mel spectrum ``[40, T]``.

    Multiplicative updates (Lee and Seung, 1999). torchaudio's ``InverseMelScale`` cuts a least-squares solution at zero,
    which alone costs 1.2 of log-mel (rms, 5.6 s of speech); this costs 0.02.
    """
    bank = _mel_spectrogram().mel_scale.fb  # [513, 40]
    spectrum = bank @ (mel / bank.sum(0)[:, None])
    reach = bank.sum(1)[:, None].clamp(min=1e-9)
    for _ in range(_INVERSE_ROUNDS):
        spectrum = spectrum * (bank @ (mel / (bank.T @ spectrum).clamp(min=1e-9))) / reach
    return spectrum


def _frames(columns: Tensor) -> Tensor:
    return columns.reshape(-1, COLUMNS * MELS)


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    return (book.square().sum(1) - 2 * x @ book.T).argmin(1)


def _k_means(x: Tensor, generator: torch.Generator) -> Tensor:
    """Centres ``[64, D]`` of ``x`` ``[N, D]``; a centre nothing is nearest to begins again at a random row."""

    def random_rows(count: int) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:count]]

    book = random_rows(ENTRIES)
    for _ in range(_FIT_ROUNDS):
        near = _nearest(x, book)
        count = torch.bincount(near, minlength=ENTRIES)[:, None]
        total = torch.zeros_like(book).index_add_(0, near, x)
        book = torch.where(count > 0, total / count.clamp(min=1), random_rows(ENTRIES))
    return book


def main() -> None:
    """Fit, report and let listen."""
    soundfile = need("soundfile")
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "speech_tokens_out")
    out.mkdir(parents=True, exist_ok=True)
    clips = [clip for clip in load_clips() if len(clip.samples) >= FRAME]
    tokens = SpeechTokens.fit([clip.samples for clip in clips])
    clip = next(clip for clip in clips if clip.name == "en/vm-intro")
    codes, truth = tokens.encode(clip.samples), log_mel(clip.samples)
    for books in range(CODEBOOKS + 1):
        error = (tokens.decode_log_mel(codes, books) - truth).square().mean().sqrt()
        print(
            f"{books} codebooks: rms error of the log-mel {error:.2f}, {10 / torch.tensor(10.0).log() * error:.1f} dB"
        )
    tokens.save(out / "tokens.safetensors")
    soundfile.write(out / "original.wav", clip.samples.numpy(), SAMPLING_RATE)
    soundfile.write(out / "from_tokens.wav", tokens.decode(codes).clamp(-1, 1).numpy(), SAMPLING_RATE)
    print(f"{clip.text!r}: {out / 'original.wav'}, {out / 'from_tokens.wav'}")


if __name__ == "__main__":
    main()
