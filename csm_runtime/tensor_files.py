"""Tensors of safetensors files, read and written one by one, and clear words for files that are not what they should be.

The data are read into memory of their own, not mapped: of a mapped file all pages that were touched count as resident while it
is open, although what was packed from them is there as well; only memory of one's own can lie in huge pages; and a mapped
file that is cut short meanwhile kills the process. The format is a length, a JSON header and the data
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
_PIECE = 1 << 23
"""Elements that are converted at once: 32 MB in fp32."""
_AGAIN = "download or copy it again"


class StoredTensor(NamedTuple):
    """Where one tensor lies."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its data, in bytes from the beginning of the file."""
    nbytes: int

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor in a dtype, in memory of its own on the CPU.

        Raises:
            OSError: the file has become shorter, or cannot be read; names file and tensor.
        """
        out = torch.empty(self.shape, dtype=dtype)
        flat = out.view(-1)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                if dtype == self.dtype:
                    self._fill(cast(BinaryIO, file), flat)
                    return out
                for first in range(0, len(flat), _PIECE):
                    some = flat[first : first + _PIECE]
                    stored = torch.empty(len(some), dtype=self.dtype)
                    self._fill(cast(BinaryIO, file), stored)
                    some.copy_(stored)
        except OSError as error:
            raise OSError(f"{self.path}: tensor {self.name!r} cannot be read: {error}; {_AGAIN}") from error
        return out

    def _fill(self, file: BinaryIO, flat: Tensor) -> None:
        room = flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")
        done = 0
        while done < len(room):
            count = file.readinto(room[done:])  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"the file ends {len(room) - done} bytes too early, it has changed since it was opened")
            done += count


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, from the headers alone.

    Raises:
        FileNotFoundError: a file is not there; says whether a download was interrupted.
        ValueError: a file is truncated or no safetensors file, or two hold a tensor of the same name. Names the file, what
            came and what was wanted.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        for tensor in _tensors(path):
            if tensor.name in found:
                raise ValueError(f"{path} and {found[tensor.name].path} both hold a tensor {tensor.name!r}; {_AGAIN}")
            found[tensor.name] = tensor
    return found


def _tensors(path: Path) -> list[StoredTensor]:
    if not path.is_file():
        places = (path.parent, path.parent / ".cache" / "huggingface" / "download")
        halves = sorted(half.name for place in places for half in place.glob("*.incomplete"))
        why = f"; a download was interrupted ({halves[0]})" if halves else ""
        raise FileNotFoundError(f"{path} is missing{why}; {_AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            wanted = f"a header of {length} bytes" if size >= 8 else "8 bytes and a header"
            raise ValueError(
                f"{path} is truncated or no safetensors file: it has {size} bytes and should begin with {wanted}; {_AGAIN}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = [_tensor(path, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({type(error).__name__}: {error}); {_AGAIN}") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(
                f"{path} has a damaged header: tensor {tensor.name!r} begins at byte {tensor.start}, wanted {end}; {_AGAIN}"
            )
        end += tensor.nbytes
    if size != end:
        last = next((tensor.name for tensor in tensors if tensor.start + tensor.nbytes > size), None)
        what = "has bytes that belong to nothing" if last is None else f"is truncated, in tensor {last!r} first"
        raise ValueError(f"{path} {what}: it has {size} bytes, its header wants {end}; {_AGAIN}")
    return tensors


def _tensor(path: Path, base: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    """What a header says of one tensor. Raises one of several errors where that makes no sense."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"tensor {name!r} has an unknown dtype {entry['dtype']!r}")
    dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise ValueError(f"tensor {name!r} has shape {shape} and offsets {[first, last]}")
    nbytes = math.prod(shape) * dtype.itemsize
    if last - first != nbytes:
        raise ValueError(f"tensor {name!r} has {last - first} bytes, {nbytes} are wanted for {dtype} {list(shape)}")
    return StoredTensor(path, name, dtype, tuple(shape), base + first, nbytes)


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], read: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file of which no more than one tensor is in memory at a time.

    Args:
        path: a new file.
        layout: dtype and shape of every tensor, which lie in this order.
        read: gives the tensor of a name, when it is its turn.

    Raises:
        OSError: the file exists or cannot be written.
        ValueError: a dtype that the format does not have, or a tensor that is not what ``layout`` says.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    end = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in names:
            raise ValueError(f"tensor {name!r} is {dtype}, which safetensors files do not hold")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (dtype, shape) in layout.items():
            tensor = read(name)
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
                raise ValueError(f"tensor {name!r} is {found}, wanted {wanted}")
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
