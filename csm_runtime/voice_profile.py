"""What is remembered of a voice, and the digests it is found by: of a prompt's content, and of what read it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

Meta = Mapping[str, str | int | float]

SAMPLE_RATE = 24_000
"""Of the codec, in Hz."""
_HEX = re.compile(r"[0-9a-f]{32,128}")
_BYTES = 32
_IDS, _SOUND = 1 << 32, 2 << 32  # what kind of record of a digest begins; the lower half is free


def is_digest(text: object) -> bool:
    """Whether this can be a key or a fingerprint: 32 to 128 lower-case hexadecimal digits."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


@dataclass(frozen=True, eq=False)
class Profile:
    """A prompt prefix, such as a reference recording with its transcript, after its prefill. Nobody writes to its tensors.

    Args:
        key: :class:`Digest` of the content, hexadecimal.
        fingerprint: :func:`fingerprint_of` model, policy and tokenizer, hexadecimal.
        positions: ``T`` of the backbone that it stands for, at least 1.
        tensors: on one device: ``keys`` and ``values`` ``[L, KV, T, D]`` in one floating-point dtype, ``hidden`` ``[H]`` fp32
            and finite, the normalised hidden state of the last position, and where there is sound ``codes`` ``[F, K]`` int64.
        meta: whatever else is known of it, such as transcript, speaker and seconds; numbers are finite.

    Raises:
        ValueError: something of another type, shape or dtype.
    """

    key: str
    fingerprint: str
    positions: int
    tensors: Mapping[str, Tensor] = field(repr=False)
    meta: Meta = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("key", "fingerprint"):
            if not is_digest(getattr(self, name)):
                raise ValueError(f"{name} must be 32 to 128 hexadecimal digits, got {getattr(self, name)!r}")
        if type(self.positions) is not int or self.positions < 1:
            raise ValueError(f"positions must be an integer of at least 1, got {self.positions!r}")
        _check_tensors(self.tensors, self.positions)
        for name, value in self.meta.items():
            if type(name) is not str or type(value) not in (str, int, float):
                raise ValueError(f"meta must map texts to texts and numbers, got {name!r}: {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"meta[{name!r}] must be finite, got {value!r}")
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each backbone layer, ``[1, KV, T, D]``: views, as ``State.load_prompt`` takes them."""
        return [(keys[None], values[None]) for keys, values in zip(self.tensors["keys"], self.tensors["values"])]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Profile:
        """The same on a device, keys and values perhaps in another floating-point dtype; itself where nothing changes."""
        moved = {
            name: tensor.to(device, dtype if name in ("keys", "values") else None)
            for name, tensor in self.tensors.items()
        }
        if all(tensor is self.tensors[name] for name, tensor in moved.items()):
            return self
        return replace(self, tensors=moved)

    def copy(self) -> Profile:
        """The same in memory of its own."""
        own = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=own)


def _check_tensors(tensors: Mapping[str, Tensor], positions: int) -> None:
    names = set(tensors)
    if not {"keys", "values", "hidden"} <= names <= {"keys", "values", "hidden", "codes"}:
        raise ValueError(f"tensors must be keys, values, hidden and perhaps codes, got {sorted(names)}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    keys, values, hidden = (tensors[name] for name in ("keys", "values", "hidden"))
    if keys.ndim != 4 or keys.shape[2] != positions or not keys.numel() or not keys.is_floating_point():
        raise ValueError(
            f"keys must be floating-point [L, KV, {positions}, D], got {keys.dtype} {list(keys.shape)}; "
            f"positions is {positions}"
        )
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"values must be as keys are, {keys.dtype} {list(keys.shape)}, got {values.dtype} {list(values.shape)}"
        )
    if hidden.ndim != 1 or not hidden.numel() or hidden.dtype != torch.float32:
        raise ValueError(f"hidden must be float32 [H], got {hidden.dtype} {list(hidden.shape)}")
    codes = tensors.get("codes")
    if codes is not None and (codes.ndim != 2 or codes.dtype != torch.int64):
        raise ValueError(f"codes must be int64 [F, K], got {codes.dtype} {list(codes.shape)}")
    devices = {str(tensor.device) for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"tensors must be on one device, got {sorted(devices)}")
    if not bool(hidden.isfinite().all()):
        raise ValueError("hidden must be finite, it holds NaN or infinity")


# --------------------------------------------------------------------------------------------------------- digests


class Digest:
    """Of a prompt's content, taken piece by piece: the same on any device, and for ids in any integer dtype.

    Each position is a record of its own and says how long it is, so ids may come in pieces of any length, and no two prompts
    have the same records. With the same content in the same order comes the same digest, whatever was asked in between.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=_BYTES, person=b"csm prompt")

    def update_ids(self, ids: Tensor) -> None:
        """Append positions.

        Args:
            ids: ``[n]`` or ``[n, K]``, integers.

        Raises:
            ValueError: another shape or dtype.
        """
        numbers = not (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex())
        if not numbers or ids.ndim not in (1, 2) or 0 in ids.shape[1:]:
            raise ValueError(f"ids must be integers [n] or [n, K], got {ids.dtype} {list(ids.shape)}")
        width = ids.shape[1] if ids.ndim == 2 else 0  # so that [n] is not taken for [n, 1]
        rows = ids.detach().to("cpu", torch.int64).reshape(len(ids), max(1, width)).numpy()
        heads = np.full((len(rows), 1), _IDS + width)
        self._hash.update(np.hstack([heads, rows]).astype("<i8").tobytes())

    def update_sound(self, waveform: Tensor, rate: int, positions: int = 0) -> None:
        """Append a sound.

        Args:
            waveform: ``[samples]``, its bits in fp32 count.
            rate: samples per second.
            positions: that the sound takes, where that is known.

        Raises:
            ValueError: another shape or dtype.
        """
        if waveform.ndim != 1 or not waveform.is_floating_point():
            raise ValueError(f"waveform must be floating-point [samples], got {waveform.dtype} {list(waveform.shape)}")
        samples = waveform.detach().to("cpu", torch.float32).numpy()
        self._hash.update(np.array([_SOUND, rate, positions, len(samples)], "<i8").tobytes())
        self._hash.update(samples.astype("<f4").tobytes())

    def hexdigest(self) -> str:
        """Of all so far, 64 hexadecimal digits; more may follow."""
        return self._hash.hexdigest()


def prompt_digests(
    ids: Tensor, sounds: Sequence[tuple[int, int, Tensor]], lengths: Sequence[int], rate: int = SAMPLE_RATE
) -> dict[int, str]:
    """Keys of several prefixes of one prompt, in one pass.

    Args:
        ids: ``[T]`` or ``[T, K]``, integers.
        sounds: of each segment of sound its first position, the one after its last, and its waveform ``[samples]``.
        lengths: of the prefixes, in positions.
        rate: samples per second.

    Returns:
        Length to digest. Lengths that the prompt does not have, or that cut through a segment of sound, are left out: what a
        part of a sound becomes depends on all of it.

    Raises:
        ValueError: a segment outside the prompt, or two that overlap.
    """
    total, reached = len(ids), 0
    order = sorted(sounds, key=lambda sound: sound[0])
    for start, end, _ in order:
        if not reached <= start < end <= total:
            raise ValueError(
                f"sounds must be segments of the {total} positions that do not overlap, got {start} to {end}"
            )
        reached = end
    digest, reached, out, left = Digest(), 0, dict[int, str](), list(order)
    for length in sorted(set(lengths)):
        if not 0 < length <= total or any(start < length < end for start, end, _ in order):
            continue
        while left and left[0][0] < length:
            start, end, waveform = left.pop(0)
            digest.update_ids(ids[reached:start])
            digest.update_sound(waveform, rate, end - start)
            reached = start
        digest.update_ids(ids[reached:length])
        reached = length
        out[length] = digest.hexdigest()
    return out


def fingerprint_of(parts: Mapping[str, str | int | float | Tensor]) -> str:
    """Of everything that a profile depends on besides its content: weights, policy, tokenizer.

    Args:
        parts: by name, in any order; of a tensor dtype, shape and bits count, not its device. ``1``, ``1.0``, ``True`` and
            ``"1"`` differ.

    Raises:
        ValueError: a value of another type.
    """
    made = hashlib.blake2b(digest_size=_BYTES, person=b"csm fingerprint")
    for name in sorted(parts):
        for piece in (name.encode("utf-8", "surrogatepass"), *_pieces(name, parts[name])):
            made.update(len(piece).to_bytes(8, "little"))
            made.update(piece)
    return made.hexdigest()


def _pieces(name: str, value: object) -> Iterator[bytes]:
    """A value's kind and its bytes."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield raw_bytes(value).tobytes()
    elif isinstance(value, (str, int, float)):
        yield type(value).__name__.encode()
        yield (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")
    else:
        raise ValueError(f"parts[{name!r}] must be a text, a number or a tensor, got {type(value).__name__}")


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's elements as they lie in memory, ``[bytes]`` uint8; a copy only where it is not contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
