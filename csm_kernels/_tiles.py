"""Which tile sizes a kernel is launched with: a measured table per op and GPU, a heuristic where it has no entry.

``tiles/<op>.json`` is a list of ``{"gpu": name or "sm_90", "shape": {...}, "tiles": {...}, "measured": "..."}``. An entry
fits when its GPU is the device's name or capability and each size it names is the launch's; the first that fits wins,
device names before capabilities. Nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from csm_kernels._target import device_facts

_overrides: dict[str, dict[str, int]] = {}


def tiles(op: str, tensor: Tensor, shape: dict[str, Any], default: dict[str, int]) -> dict[str, int]:
    """Tile sizes for one launch.

    Args:
        op: name of the table, ``tiles/<op>.json``.
        tensor: any tensor of the launch; says which device it is.
        shape: sizes and formats the table may tell apart, such as ``{"N": 8192, "K": 1024, "format": "int8"}``.
        default: the heuristic, complete: what a table entry or an override does not name keeps its value.
    """
    found = dict(default)
    if tensor.is_cuda:
        found.update(_measured(op, tensor.device.index or 0, tuple(sorted(shape.items()))))
    found.update(_overrides.get(op, {}))
    return found


@contextlib.contextmanager
def override_tiles(op: str, **sizes: int) -> Iterator[None]:
    """Launch one op with these tile sizes, for tests and tuning.

    Raises:
        ValueError: a size is not a positive power of two.
    """
    for name, size in sizes.items():
        if size < 1 or size & (size - 1):
            raise ValueError(f"tile size {name} must be a power of two, got {size}")
    before = _overrides.get(op)
    _overrides[op] = {**(before or {}), **sizes}
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


@functools.cache
def _table(op: str) -> list[dict[str, Any]]:
    path = Path(__file__).parent / "tiles" / f"{op}.json"
    return json.loads(path.read_text()) if path.exists() else []


@functools.cache
def _measured(op: str, device: int, shape: tuple[tuple[str, Any], ...]) -> dict[str, int]:
    facts = device_facts(device)
    sizes = dict(shape)
    for gpu in (facts.name, f"sm_{facts.capability}"):
        for entry in _table(op):
            if entry["gpu"] == gpu and all(sizes.get(key) == value for key, value in entry["shape"].items()):
                return entry["tiles"]
    return {}
