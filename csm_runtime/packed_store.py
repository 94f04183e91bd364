"""Packed copies in a safetensors file, so that a second start reads them instead of packing.

A file is taken for what it claims to be only after everything about it has been checked: the format's version, the policy,
the model's shapes and the package's version it was written for, a digest of what it says about its copies, each copy's
dtypes and shapes, and each copy's checksum. Whether a copy is still true to the model's weights is for
:meth:`~csm_runtime.weights.PackedWeights.refresh` to say, which compares fingerprints as it does with copies of its own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import stat
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csm_kernels._version import __version__
from csm_kernels.quant import QuantWeight
from csm_runtime.adapters.spec import ModelWeights
from csm_runtime.extras import need
from csm_runtime.metrics import Metrics
from csm_runtime.precision import PrecisionPolicy, int4_layout
from csm_runtime.rounding import Rounding
from csm_runtime.weights import (
    DTYPES,
    Energy,
    PackedWeights,
    _Copy,
    _same,
    checksum,
    head_banks,
    named_sources,
    spans,
)

logger = logging.getLogger("csm_runtime")

FORMAT = 1
"""Of the file; another number is another file name."""
_KEY = "csm_packed"
"""The entry of the file's metadata that holds the JSON."""
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class PackedStore:
    """The file of one policy and one model shape in a folder.

    Args:
        folder: made with the first file where it is absent. One checkpoint a folder: two of the same shapes under the same
            policy share a name, and each start of one packs again and replaces what the other wrote.
        policy: in force; its rules count, not its name.
        weights: the model's live weights, of which shapes and dtypes count.
        metrics: counts ``packed_cache.loaded``, copies taken from the file; ``packed_cache.refused``, files that were not
            what they should be; ``packed_cache.written`` and ``packed_cache.unwritable``.
        mapped: leave the tensors in the file's mapping instead of reading them.
        rounding: calibrated codes of int4 matrices; a file belongs to one rounding.

    Attributes:
        path: the file, ``csm-packed-<32 hex digits>.safetensors``.

    Raises:
        ImportError: safetensors is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        policy: PrecisionPolicy,
        weights: ModelWeights,
        metrics: Metrics,
        mapped: bool = False,
        rounding: Rounding | None = None,
    ) -> None:
        need("safetensors.torch", "hf")
        self._shapes = _shapes(policy, weights)
        sources = {name: live for name, (_, live) in named_sources(weights).items()}
        sources |= {"depth.embedding": weights.depth_embedding, "depth.head": weights.depth_heads}
        self._key = _digest(
            {
                "format": FORMAT,
                "version": __version__,
                "rules": policy.rules,
                "rounding": [] if rounding is None else rounding.key(),
                "sources": {name: [str(live.dtype), *live.shape] for name, live in sources.items()},
            }
        )
        self._device = weights.backbone_norm.device
        self._loaded: dict[str, Tensor | QuantWeight] = {}
        self._rounding = rounding
        self._metrics, self._mapped = metrics, mapped and self._device.type == "cpu"
        self.path = Path(folder) / f"csm-packed-{self._key[:32]}.safetensors"

    def load(self, policy: PrecisionPolicy) -> PackedWeights:
        """The copies of the file, checked but not yet compared with the model's weights; none where it is absent or refused.

        Mapped tensors are views of one private mapping of the file: what is written to them, by whomever, never reaches it.
        """
        if not self.path.is_file():
            return PackedWeights(policy, rounding=self._rounding)
        try:
            copies = self._copies()
        except Exception as error:  # whatever a foreign or damaged file makes of its readers
            self._metrics.count("packed_cache.refused")
            why = str(error).strip().splitlines()
            logger.warning(
                "packed weights in %s are not used, they are packed again: %s: %s",
                self.path,
                type(error).__name__,
                why[0][:200] if why else "",
            )
            return PackedWeights(policy, rounding=self._rounding)
        self._loaded = {name: copy.packed for name, copy in copies.items()}
        return PackedWeights(policy, copies, self._rounding)

    def save(self, weights: PackedWeights) -> None:
        """Count what came from the file, and write it anew where something did not.

        Args:
            weights: the copies now in force, refreshed; those without an original to compare with are left out.

        A folder that cannot be written is a warning. The file appears whole or not at all, so that of two processes that
        write at once one wins and neither harms the other.
        """
        before, self._loaded = self._loaded, {}  # no longer than needed: they may be replaced
        copies = {name: copy for name, copy in weights._copies.items() if copy.fingerprint is not None}
        kept = [name for name, copy in copies.items() if before.get(name) is copy.packed]
        self._metrics.count("packed_cache.loaded", len(kept))
        if len(kept) == len(copies) == len(before):
            return
        try:
            tensors, metadata = self._contents(copies)
            save_whole(self.path, tensors, {_KEY: json.dumps(metadata)})
        except Exception as error:  # safetensors has errors of its own for a full disk or a folder without permission
            self._metrics.count("packed_cache.unwritable")
            logger.warning("packed weights could not be saved as %s: %s: %s", self.path, type(error).__name__, error)
            return
        self._metrics.count("packed_cache.written")

    def _contents(self, copies: dict[str, _Copy]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        homes: dict[int, str] = {}
        for name, copy in copies.items():
            assert copy.fingerprint is not None
            packed = copy.packed
            home = homes.setdefault(id(packed), name)  # tied embeddings are one
            if home == name:
                tensors[name] = (packed.data if isinstance(packed, QuantWeight) else packed).contiguous()
                if isinstance(packed, QuantWeight):
                    tensors[f"{name}.scale"] = packed.scale.contiguous()
            entries[name] = {
                "home": home,
                "format": copy.format,
                "zones": copy.zones,
                "padding": packed.padding if isinstance(packed, QuantWeight) else 0,
                "quantised": isinstance(packed, QuantWeight),
                "energy": copy.energy,
                "fingerprint": _text(copy.fingerprint),
                "checksum": _text(copy.checksum),
            }
        return tensors, {"format": FORMAT, "key": self._key, "copies": entries, "digest": _digest(entries)}

    def _copies(self) -> dict[str, _Copy]:
        """Of the file; any exception refuses all of it."""
        safe_open = need("safetensors", "hf").safe_open
        with safe_open(self.path, framework="pt") as file:
            said = json.loads((file.metadata() or {})[_KEY])
            if said["format"] != FORMAT or said["key"] != self._key or said["digest"] != _digest(said["copies"]):
                raise ValueError("it was written for something else, or its metadata are damaged")
            mapping = file if self._mapped else None
            copies: dict[str, _Copy] = {}
            for name, entry in said["copies"].items():
                home = entry["home"]
                packed = copies[home].packed if home != name else self._packed(name, entry, mapping)
                copy = _Copy(
                    packed,
                    entry["format"],
                    tuple(entry["zones"]),
                    None if entry["energy"] is None else Energy(*entry["energy"]),
                    _numbers(entry["checksum"]).to(self._device),
                    _numbers(entry["fingerprint"]).to(self._device),
                )
                self._check(name, copy)
                copies[name] = copy
        return copies

    def _packed(self, name: str, entry: dict[str, Any], mapping: Any) -> Tensor | QuantWeight:
        """The tensors of one copy: in the mapping, or in memory of their own on the model's device."""

        def tensor(key: str) -> Tensor:
            if mapping is not None:
                return mapping.get_tensor(key)
            # A file of its own for each: what is mapped counts as resident until it is closed.
            with need("safetensors", "hf").safe_open(self.path, framework="pt") as file:
                return file.get_tensor(key).to(self._device, copy=True)

        data = tensor(name)
        return QuantWeight(data, tensor(f"{name}.scale"), entry["padding"]) if entry["quantised"] else data

    def _check(self, name: str, copy: _Copy) -> None:
        """Raise ValueError for a copy that is not of that matrix, or whose bits are not those that were written."""
        fmt, shape, dtype = self._shapes[name]
        if copy.format != fmt or _layout(copy.packed) != _expected(fmt, shape, dtype):
            raise ValueError(f"{name} has another format or shape")
        if not _same(copy.checksum, checksum(copy.packed)):
            raise ValueError(f"{name} is damaged: its checksum is another one")


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all, in a folder that is made where it is absent.

    Until then it is ``.{name}.{process}.{32 hex digits}`` beside its place, which only a process that dies leaves behind.

    Raises:
        Exception: of whatever kind safetensors has for a full disk or a folder without permission.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:  # safetensors lets nobody else read what it writes
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        need("safetensors.torch", "hf").save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _shapes(policy: PrecisionPolicy, weights: ModelWeights) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    """Format, shape and source dtype of every copy there can be."""
    sources = {name: (zone, live) for name, (zone, live) in named_sources(weights).items()}
    sources["depth.embedding"] = ("depth.embedding", weights.depth_embedding)
    out = {name: (policy.format_of(zone), tuple(live.shape), live.dtype) for name, (zone, live) in sources.items()}
    heads = weights.depth_heads
    for fmt, books in head_banks(policy, len(heads) + 1).items():
        out[f"depth.head.{spans(books)}"] = fmt, (len(books), heads.shape[2], heads.shape[1]), heads.dtype
    return out


def _expected(fmt: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """What :func:`_layout` says of a matrix of that shape and dtype in a format."""
    if fmt in _CODES:
        return _CODES[fmt], shape, torch.float32, shape[:-1], 0
    layout = int4_layout(fmt)
    if layout is not None:
        group, symmetric = layout
        groups = -(-shape[-1] // group)
        scales = (*shape[:-1], groups) if symmetric else (*shape[:-1], groups, 2)
        return torch.uint8, (*shape[:-1], groups * group // 2), torch.bfloat16, scales, groups * group - shape[-1]
    return DTYPES.get(fmt, dtype), shape


def _layout(packed: Tensor | QuantWeight) -> tuple[Any, ...]:
    if not isinstance(packed, QuantWeight):
        return packed.dtype, tuple(packed.shape)
    return packed.data.dtype, tuple(packed.data.shape), packed.scale.dtype, tuple(packed.scale.shape), packed.padding


def _digest(value: Any) -> str:
    """Of what JSON makes of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _text(numbers: Tensor) -> str:
    """``[n]`` int64 in base64, little-endian."""
    return base64.b64encode(numbers.cpu().numpy().astype("<i8").tobytes()).decode()


def _numbers(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<i8").astype(np.int64))
