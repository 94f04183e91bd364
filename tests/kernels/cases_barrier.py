"""Launches of the litmus kernel: the grid barrier and programmatic dependent launch with next to nothing around them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from csm_kernels.depth import barrier


def _load() -> Any:
    """``bench/litmus.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location("bench_litmus", Path(__file__).parents[2] / "bench" / "litmus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


litmus = _load()


def launch(sync: int, warps: int = 8) -> None:
    """One launch, as it would be on a GPU of 132 processors."""
    litmus.exchange(litmus.prepare(132, warps, "cpu"), 1, sync, warps=warps)


CASES = {
    "barrier litmus": lambda: launch(barrier.GRID),
    "barrier litmus ptx": lambda: launch(barrier.GRID_PTX),
    "barrier litmus pdl": lambda: launch(barrier.PDL),
}
UNSUPPORTED = {"barrier litmus pdl": (80, 89)}
