"""Weight formats: int8 and fp8 with a scale per row, int4 with a scale per group of a row; weights only.

``dequantize`` is the specification of every quantised op: a kernel is compared with the op on dequantised weights, and
the quantisers have their own error tests. Signal to quantisation noise on normal weights, measured on 512 x 1024: int8
42 dB, fp8 31.5, int4 in groups of 128, 64, 32: 20.1, 20.7, 21.5 symmetric and 20.0, 20.9, 22.1 asymmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "fp8")
GROUPS = (32, 64, 128)

_FP8_MAX = 448.0
_BLOCK = 1 << 18
"""Elements quantised at once on a CPU, 1 MB in fp32, which stays in its caches: int4 of 8192 x 2048 takes 46 ms, whole 168
(2 cores); 2^16 are 72, 2^19 are 45."""
_SCALE_DTYPE = torch.bfloat16
_NAMES = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}


class QuantWeight(NamedTuple):
    """A quantised weight matrix ``[N, K]``, or a stack of them; the format is what the dtype of ``data`` says.

    int8 and fp8
        ``data`` is ``[..., N, K]`` int8 or float8_e4m3fn, ``scale`` is ``[..., N]`` fp32; row ``n`` stands for
        ``data[n] * scale[n]``.

    int4
        ``data`` is ``[..., N, P / 2]`` uint8, where P is K padded to whole groups. A group of ``2 * h`` columns is h
        bytes in a row: byte ``j`` holds column ``j`` of the group in its low nibble and column ``h + j`` in its high one,
        so that both halves of a run of bytes meet a run of activations and nothing is interleaved. ``scale`` is bf16,
        ``[..., N, G]`` symmetric: a nibble stands for ``(nibble - 8) * scale``; or ``[..., N, G, 2]`` asymmetric, a step
        and an offset: ``nibble * step + offset``. A weight costs 4.125 or 4.25 bits in groups of 128. The group's size
        is ``P / G``.
    """

    data: Tensor
    scale: Tensor
    padding: int = 0
    """How many columns int4 added to fill a row's last group."""

    @property
    def width(self) -> int:
        """K, the columns of the matrix it stands for."""
        stored = self.data.shape[-1]
        return 2 * stored - self.padding if self.data.dtype == torch.uint8 else stored

    @property
    def group(self) -> int:
        """Columns that share a scale: a group of int4, a whole row otherwise."""
        if self.data.dtype != torch.uint8:
            return self.data.shape[-1]
        return 2 * self.data.shape[-1] // self.scale.shape[self.data.ndim - 1]

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def symmetric(self) -> bool:
        """Whether zero is one of the levels and no offsets are kept."""
        return self.data.dtype != torch.uint8 or self.scale.ndim == self.data.ndim


def quantize(weight: Tensor, format: str, group: int = 128, symmetric: bool = True) -> QuantWeight:
    """Quantise a matrix or a stack of them.

    Args:
        weight: ``[..., N, K]`` float.
        format: ``"int8"``, ``"fp8"`` (e4m3) or ``"int4"``.
        group: int4 only: 32, 64 or 128 columns share a scale. A last group that K does not fill is padded with zeros.
        symmetric: int4 only: False keeps an offset per group, for rows whose values are not spread around zero.

    Returns:
        The packed weight, contiguous, on the device of ``weight``.

    Raises:
        ValueError: an unknown format or group, a weight that is not floating point, has no columns, or holds NaN or
            infinity (no scale could stand for it).

    Example:
        >>> packed = quantize(torch.randn(64, 1000), "int4", group=64)
        >>> packed.data.shape, packed.scale.shape, dequantize(packed).shape
        (torch.Size([64, 512]), torch.Size([64, 16]), torch.Size([64, 1000]))

    Source: the int4 step that maps the largest magnitude to level -8 is that of llama.cpp's Q4_0.
    """
    _check(weight, format, group)
    if weight.ndim > 2:  # one matrix at a time: the fp32 scratch of a whole stack may be larger than the stack itself
        return stacked([quantize(matrix, format, group, symmetric) for matrix in weight])
    step = max(1, _BLOCK // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    if len(weight) <= step:
        whole = _rows(weight, format, group, symmetric)
        return QuantWeight(whole.data.contiguous(), whole.scale.contiguous(), whole.padding)
    made: QuantWeight | None = None
    for first in range(0, len(weight), step):
        part = _rows(weight[first : first + step], format, group, symmetric)
        if made is None:
            data, scale = (each.new_empty(len(weight), *each.shape[1:]) for each in part[:2])
            made = QuantWeight(data, scale, part.padding)
        made.data[first : first + step] = part.data
        made.scale[first : first + step] = part.scale
    assert made is not None
    return made


def quantize_int8(weight: Tensor) -> QuantWeight:
    """Symmetric int8 with one scale per row: ``scale = max|row| / 127``, round to nearest even.

    Args:
        weight: ``[..., N, K]`` float. A row of zeros keeps scale 1 and dequantises to zeros.

    Raises:
        ValueError: the weight is not floating point, or holds NaN or infinity (no scale could stand for it).
    """
    return quantize(weight, "int8")


def format_of(weight: Tensor | QuantWeight) -> str:
    """``"int8"``, ``"int4"`` or ``"fp8"``; for a plain tensor the name of its dtype, such as ``"bfloat16"``.

    Raises:
        ValueError: the dtype of ``data`` is that of no format.
    """
    if not isinstance(weight, QuantWeight):
        return str(weight.dtype).removeprefix("torch.")
    if weight.data.dtype not in _NAMES:
        raise ValueError(f"data of a QuantWeight must be int8, uint8 or float8_e4m3fn, got {weight.data.dtype}")
    return _NAMES[weight.data.dtype]


def dequantize(weight: Tensor | QuantWeight) -> Tensor:
    """The fp32 matrix a weight stands for, ``[..., N, K]``."""
    if not isinstance(weight, QuantWeight):
        return weight.float()
    if format_of(weight) != "int4":
        return weight.data.float() * weight.scale[..., None]
    codes = weight.data.unflatten(-1, (-1, weight.group // 2))
    nibbles = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    if weight.symmetric:
        values = (nibbles - 8.0) * weight.scale.float()[..., None]
    else:
        step, offset = weight.scale.float().unbind(-1)
        values = nibbles * step[..., None] + offset[..., None]
    return values.flatten(-2)[..., : weight.width]


def widen(weight: Tensor | QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``dequantize(weight).to(dtype)``, ``[N, K]`` contiguous, with scratch for a few rows only on a CPU."""
    if not isinstance(weight, QuantWeight) or weight.data.device.type != "cpu" or weight.data.ndim != 2:
        return dequantize(weight).to(dtype)
    out = torch.empty(len(weight.data), weight.width, dtype=dtype)
    step = max(1, _BLOCK // weight.width)
    for first in range(0, len(out), step):
        out[first : first + step] = dequantize(take_rows(weight, slice(first, first + step)))
    return out


def take_rows(weight: Tensor | QuantWeight, index: Tensor | slice | int) -> Tensor | QuantWeight:
    """``weight[index]``, along the first dimension, in its own format."""
    if isinstance(weight, QuantWeight):
        return QuantWeight(weight.data[index], weight.scale[index], weight.padding)
    return weight[index]


def stacked(parts: Sequence[QuantWeight]) -> QuantWeight:
    """Matrices of one shape and format as one stack; copies."""
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return QuantWeight(data, scale, parts[0].padding)


def _rows(weight: Tensor, format: str, group: int, symmetric: bool) -> QuantWeight:
    """Some rows of a matrix: no row depends on another."""
    rows = checked_rows(weight, format, group)
    if format == "int4":
        groups = int4_padded(rows, group, symmetric)
        return int4_stored(*int4_codes(groups, symmetric), -rows.shape[-1] % group)
    return _int8(rows) if format == "int8" else _fp8(rows)


def checked_rows(weight: Tensor, format: str, group: int) -> Tensor:
    """A matrix ``[N, K]`` in fp32, a copy; raises ValueError as :func:`quantize` does."""
    _check(weight, format, group)
    rows = weight.to(torch.float32, copy=True)
    if not torch.isfinite(_peak(rows)).all():
        raise ValueError(f"weight holds NaN or infinity; {format} cannot represent it: keep this zone in its own dtype")
    return rows


def _check(weight: Tensor, format: str, group: int) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "int4" and group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group}")
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point to be quantised, got {weight.dtype}")
    if weight.ndim < 2 or weight.shape[-1] == 0 or 0 in weight.shape[:-2]:
        raise ValueError(f"weight must be [..., N, K] with columns, got {tuple(weight.shape)}")


def _peak(rows: Tensor) -> Tensor:
    return torch.maximum(rows.amax(dim=-1), -rows.amin(dim=-1))


def _not_zero(scale: Tensor) -> Tensor:
    """1 in place of 0: rows and groups of zeros stand for zeros at any scale."""
    return torch.where(scale != 0, scale, torch.ones_like(scale))


def _int8(rows: Tensor) -> QuantWeight:
    scale = _not_zero(_peak(rows) / 127.0)
    # The clamp is for rows around 1e-43, whose scale has so few bits left that a quotient may be 140.
    return QuantWeight(rows.div_(scale[..., None]).round_().clamp_(-127, 127).to(torch.int8), scale)


def _fp8(rows: Tensor) -> QuantWeight:
    scale = _not_zero(_peak(rows) / _FP8_MAX)
    rows.div_(scale[..., None]).clamp_(-_FP8_MAX, _FP8_MAX)  # e4m3fn has no infinity: beyond 464 it rounds to NaN
    return QuantWeight(rows.to(torch.float8_e4m3fn), scale)


def int4_padded(rows: Tensor, group: int, symmetric: bool) -> Tensor:
    """Rows ``[N, K]`` in whole groups, ``[N, G, group]``."""
    extra = -rows.shape[-1] % group
    if extra and symmetric:
        rows = torch.nn.functional.pad(rows, (0, extra))
    elif extra:  # repeats of a value the group has: zeros would widen its range
        rows = torch.cat([rows, rows[:, -1:].expand(-1, extra)], dim=1)
    return rows.unflatten(-1, (-1, group))


def int4_codes(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Nibbles ``[N, G, group]`` fp32 nearest to groups, and their scales as :class:`QuantWeight` has them.

    Scales are 16 bits wide: bf16 has the weights' whole range, and codes are chosen for the rounded scale. That way it
    costs nothing: 19.72 dB with bf16, fp16 and fp32 scales on normal weights in groups of 128.
    """
    return _symmetric_codes(groups) if symmetric else _asymmetric_codes(groups)


def int4_stored(codes: Tensor, scale: Tensor, padding: int) -> QuantWeight:
    """Nibbles ``[N, G, group]`` packed in pairs."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return QuantWeight((low | high << 4).flatten(-2).contiguous(), scale.contiguous(), padding)


def int4_levels(scale: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, int]:
    """Step, offset and lowest level of groups: a nibble n stands for ``(n + lowest) * step + offset``, all fp32."""
    if symmetric:
        return scale.float(), torch.zeros_like(scale, dtype=torch.float32), -8
    step, offset = scale.float().unbind(-1)
    return step, offset, 0


def _symmetric_codes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Level -8 at the largest magnitude, whichever its sign, or a tenth further in, where that errs less.

    Groups of 128 normal weights: 18.6 dB with ``max / 7``, 19.7 with the signed maximum at -8, 20.1 with the choice of
    two; seven candidates reach 20.3.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    peak = torch.where(high > -low, high, low)
    best = chosen = error = None
    for shrink in (1.0, 0.9):
        scale = _not_zero((peak * (-shrink / 8.0)).to(_SCALE_DTYPE))
        wide = scale.float()[..., None]
        codes = (groups / wide).round_().clamp_(-8, 7)
        off = (codes * wide).sub_(groups).square_().sum(-1)
        if best is None or chosen is None or error is None:
            best, chosen, error = codes, scale, off
        else:
            better = off < error
            best, chosen = torch.where(better[..., None], codes, best), torch.where(better, scale, chosen)
    assert best is not None and chosen is not None
    return best.add_(8.0), chosen


def _asymmetric_codes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sixteen levels from the group's least to its largest value."""
    high = groups.amax(-1)
    limit = torch.finfo(_SCALE_DTYPE).max
    offset = groups.amin(-1).clamp(-limit, limit).to(_SCALE_DTYPE)
    # Divided before they are subtracted: the range of a group may be beyond fp32.
    step = _not_zero((high / 15.0 - offset.float() / 15.0).clamp(min=0.0).to(_SCALE_DTYPE))
    codes = ((groups - offset.float()[..., None]) / step.float()[..., None]).round_().clamp_(0, 15)
    return codes, torch.stack([step, offset], dim=-1)
