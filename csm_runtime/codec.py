"""From the codes of one ``generate()`` call to sound, through the stock codec or a faster way that falls back to it.

The default is the stock loop, one row at a time, and its samples are the stock samples bit for bit. Two things change that
by request: a codec in another precision, and several rows in one call. Neither can lose a caller their sound: what fails,
makes NaN or makes the wrong number of samples is reported and decoded again, row by row, by the stock codec.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csm_runtime.weights import DTYPES, fingerprint

FORMATS = ("keep", *DTYPES)

_ENCODING_ONLY = ("encoder", "encoder_transformer", "downsample")
_WASTE = 1.25
"""Padded frames of a batch over real ones: 8 rows of 10 to 45 frames in one batch took 1.9 times the loop's time, in two
batches within this bound 1.2 times (Mimi's own size, fp32, one CPU core, 2026-11)."""


def cut_at_end(sequences: Tensor, eos: int) -> list[Tensor]:
    """The codes of each row before its end of speech, by the stock rule: the first frame whose codes are all ``eos``.

    Args:
        sequences: ``[N, F, K]`` int64, what ``generate()`` made.
        eos: ``config.codebook_eos_token_id``.

    Returns:
        Views ``[F_n, K]``; ``F_n`` is 0 where the first frame is the end.
    """
    ended = (sequences == eos).all(dim=-1)
    frames = torch.where(ended, 0, 1).cumprod(dim=1).sum(dim=1)
    return [row[:count] for row, count in zip(sequences, frames.tolist())]


class CodecPath:
    """Decodes codes with a stock codec, or faster and then with the stock codec where that goes wrong.

    Holds no tensor of its own in the default settings and leaves nothing on the codec.

    Args:
        codec: transformers' ``MimiModel``, as ``model.codec_model``.
        format: as in :meth:`use`.
        batch_frames: as in :meth:`use`.
        on_fault: called with a line of text for every call that had to be made again with the stock codec, and for every
            exception of the stock codec itself.

    Raises:
        ValueError: as :meth:`use`.
    """

    def __init__(
        self,
        codec: nn.Module,
        format: str = "keep",
        batch_frames: int = 0,
        on_fault: Callable[[str], None] | None = None,
    ) -> None:
        self.codec: Any = codec
        self._report = on_fault or (lambda what: None)
        self._copy: Any = None
        self._mark: Tensor | None = None
        self.use(format=format, batch_frames=batch_frames)

    def use(self, *, format: str | None = None, batch_frames: int | None = None) -> None:
        """Change how codes are decoded from the next call on.

        Args:
            format: ``"keep"`` is the stock codec itself; ``"fp32"``, ``"bf16"`` and ``"fp16"`` are its decoding half in
                that dtype, a copy made at the next :meth:`decode` unless the codec is in it already. Sound is fp32 with
                ``"fp32"`` and the stock codec's dtype with every other format. None changes nothing.
            batch_frames: most frames, padding included, that one call of the codec decodes; rows of similar length share
                a call. 0 is the stock loop. Samples then differ from the loop's in the last bits. Saves reading the weights
                once per row, which shows where rows are short: on one CPU core 8 rows take 0.5 of the loop's time at 2
                frames each, 0.6 at 5, 0.8 at 10 and 1.2 at 25. None changes nothing.

        Raises:
            ValueError: another format, a negative number, or a codec other than a causal Mimi with either.
        """
        if format is not None and format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if batch_frames is not None and batch_frames < 0:
            raise ValueError(f"batch_frames must be at least 0, got {batch_frames}")
        if (format not in (None, "keep") or batch_frames) and not _causal_mimi(self.codec):
            raise ValueError(
                f"format and batch_frames must be 'keep' and 0 for a codec that is no causal Mimi, got {format!r} and"
                f" {batch_frames!r} for {type(self.codec).__name__}"
            )
        if format is not None:
            self.format = format
            self._copy = self._mark = None
        if batch_frames is not None:
            self.batch_frames = batch_frames

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples."""
        return torch.float32 if self.format == "fp32" else self.codec.dtype

    def bytes(self) -> int:
        """Bytes held over and above the stock codec: its converted copy, once there is one."""
        if self._copy is None:
            return 0
        tables = (module._embed for module in self._copy.modules() if hasattr(module, "_embed"))
        tensors = {id(x): x for x in (*self._copy.parameters(), *self._copy.buffers(), *tables)}
        return sum(x.nbytes for x in tensors.values())

    @staticmethod
    def bytes_in(codec: nn.Module, format: str) -> int:
        """Bytes of the codec that decodes in a format, whether its copy has been made or not.

        All of the stock codec's parameters with ``"keep"`` and with the dtype it has; otherwise what :meth:`bytes` says once
        there is a copy, which is of the decoding half alone.
        """
        if format == "keep" or DTYPES[format] == codec.dtype:
            return sum(parameter.nbytes for parameter in codec.parameters())
        half = [part for name, part in codec.named_children() if name not in _ENCODING_ONLY]
        modules: Any = {id(module): module for part in half for module in part.modules()}.values()
        tables = {id(x): x for module in modules if hasattr(module, "_embed") for x in [module.embed_sum]}
        kept = {id(x): x for m in modules if not hasattr(m, "_embed") for x in m.buffers(recurse=False)}
        cast = {id(parameter): parameter for part in half for parameter in part.parameters()}
        numbers = sum(x.numel() for x in (*tables.values(), *cast.values()))
        return numbers * DTYPES[format].itemsize + sum(x.nbytes for x in kept.values())

    @torch.no_grad()
    def decode(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Sound of each row.

        Args:
            rows: ``[F, K]`` int64 each, cut at the end of speech.

        Returns:
            ``[samples]`` each, in ``dtype``.

        Raises:
            IndexError: a code the codec has no vector for, which on a GPU would abort the process.
            RuntimeError: the stock codec failed on a row, twice; or a row has no frame, which Mimi refuses.
        """
        self._check_codes(rows)
        sounds: list[Tensor | None] = [None] * len(rows)
        if self.batch_frames or self._converts():
            for group in self._groups(rows):
                for i, sound in zip(group, self._fast([rows[i] for i in group]) or ()):
                    sounds[i] = sound
        return [
            (self._stock(row, i) if sound is None else sound).to(self.dtype)
            for i, (row, sound) in enumerate(zip(rows, sounds))
        ]

    # -------------------------------------------------------------------------------------------------- stock codec

    def _check_codes(self, rows: Sequence[Tensor]) -> None:
        size = self.codec.config.codebook_size
        if not rows or bool(((flat := torch.cat([row.flatten() for row in rows])) >= 0).logical_and(flat < size).all()):
            return
        for i, row in enumerate(rows):
            outside = ((row < 0) | (row >= size)).nonzero().tolist()
            if outside:
                frame, codebook = outside[0]
                raise IndexError(
                    f"row {i} holds the code {int(row[frame, codebook])} in frame {frame}, codebook {codebook}: the codec"
                    f" has vectors for 0 to {size - 1}"
                )

    def _stock(self, row: Tensor, number: int) -> Tensor:
        """One row as the stock loop decodes it. Its exceptions are no fault of the codes: tried once more, then named."""
        if not len(row):
            return decode_offline(self.codec, row.unsqueeze(0))[0]
        try:
            return decode_offline(self.codec, row.unsqueeze(0))[0]
        except Exception as error:
            self._report(f"the stock codec failed on row {number}: {_said(error)}")
        try:
            return decode_offline(self.codec, row.unsqueeze(0))[0]
        except Exception as error:
            raise RuntimeError(
                f"the codec failed twice on the {len(row)} frames of row {number} ({_said(error)}); the codes are intact:"
                " generate(output_audio=False) returns them"
            ) from error

    # -------------------------------------------------------------------------------------------------- faster ways

    def _converts(self) -> bool:
        return self.format != "keep" and DTYPES[self.format] != self.codec.dtype

    def _groups(self, rows: Sequence[Tensor]) -> list[list[int]]:
        """Which rows share a call: of similar length, and not more frames than ``batch_frames``. Empty rows share none."""
        groups: list[list[int]] = []
        real = 0
        for i in sorted((i for i, row in enumerate(rows) if len(row)), key=lambda i: -len(rows[i])):
            if groups:
                padded = len(rows[groups[-1][0]]) * (len(groups[-1]) + 1)
                if padded <= min(self.batch_frames, _WASTE * (real + len(rows[i]))):
                    groups[-1].append(i)
                    real += len(rows[i])
                    continue
            groups.append([i])
            real = len(rows[i])
        return groups if self._converts() else [group for group in groups if len(group) > 1]

    def _fast(self, rows: list[Tensor]) -> list[Tensor] | None:
        """The rows in one call, or None and a report where its samples are not to be trusted."""
        lengths, converts = [len(row) for row in rows], self._converts()
        try:
            codec = self.in_format()
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            with torch.autocast(padded.device.type, enabled=False) if converts else contextlib.nullcontext():
                made = decode_offline(codec, padded)
            wanted = padded.shape[1] * _frame_samples(self.codec)
            if made.shape != (len(rows), wanted):
                raise RuntimeError(f"{tuple(made.shape)} samples instead of {(len(rows), wanted)}")
            sounds = [wave[: n * _frame_samples(self.codec)] for wave, n in zip(made, lengths)]
            broken = sum(int((~sound.isfinite()).sum()) for sound in sounds)
            if broken:
                raise RuntimeError(f"{broken} samples that are not finite")
        except Exception as error:
            self._copy = self._mark = None
            frames = ", ".join(map(str, lengths))
            self._report(f"codec ({self.format}, {len(rows)} rows of {frames} frames): {_said(error)}")
            return None
        return sounds

    def in_format(self) -> Any:
        """The codec that decodes in ``format``: the stock one, or a copy, made again where the stock weights have changed."""
        return self._refreshed() if self._converts() else self.codec

    def _refreshed(self) -> Any:
        mark = torch.cat([fingerprint(x) for x in _decoding_tensors(self.codec)])
        if self._mark is None or self._mark.device != mark.device or not torch.equal(self._mark, mark):
            self._copy = self._mark = None
            self._copy = _converted(self.codec, DTYPES[self.format])
            self._mark = mark
        return self._copy


@torch.no_grad()
def decode_offline(codec: Any, codes: Tensor) -> Tensor:
    """``[N, F, K]`` to ``[N, samples]``, called as the stock loop calls it."""
    return codec.decode(codes.transpose(1, 2)).audio_values[:, 0]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _causal_mimi(codec: Any) -> bool:
    """Whether the codec's pieces are those of Mimi, and no sample depends on later frames, so that padding cannot reach it."""
    parts = ("quantizer", "upsample", "decoder_transformer", "decoder", "encoder")
    return all(hasattr(codec, name) for name in parts) and bool(codec.config.use_causal_conv)


def _frame_samples(codec: Any) -> int:
    return math.prod(codec.config.upsampling_ratios) * codec.upsample.conv.stride[0]


def _decoding_tensors(codec: Any) -> list[Tensor]:
    named = (*codec.named_parameters(), *codec.named_buffers())
    return [tensor for name, tensor in named if name.partition(".")[0] not in _ENCODING_ONLY]


def _converted(codec: Any, dtype: torch.dtype) -> Any:
    """A copy of a Mimi in eval mode that decodes in ``dtype`` and cannot encode.

    Codebook vectors are divided out in fp32, for a count of uses need not fit fp16, and only the result is kept. Rotary
    frequencies are fp32 in any dtype.
    """
    left_out = {id(getattr(codec, name)): nn.Identity() for name in _ENCODING_ONLY}
    copied = copy.deepcopy(codec, left_out).eval().requires_grad_(False)
    for module in copied.modules():
        if hasattr(module, "_embed"):
            module._embed = None
            module.float()
            module._embed = module.embed.to(dtype)
            module._buffers.clear()
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied
