"""Facts about what a tensor's kernels run on, and Triton where it is installed."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: the references run

    class _Absent:
        """Stands in for Triton so that kernels can be defined, never launched."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton: Any = _Absent()  # type: ignore[no-redef]
    tl: Any = triton  # type: ignore[no-redef]

__all__ = ["Device", "device_facts", "has_triton", "inline_ptx", "interpreting", "runs_triton", "tl", "triton"]


class Device(NamedTuple):
    """What the tile table and the benchmarks want to know of a GPU."""

    name: str
    capability: int
    """Compute capability, 90 for sm_90."""
    processors: int
    cache_bytes: int
    """Of the second-level cache; 0 where torch does not say."""


def has_triton() -> bool:
    """Whether Triton is installed."""
    return getattr(triton, "__version__", None) is not None and isinstance(triton.__version__, str)


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, as the kernel tests do: ``TRITON_INTERPRET=1``.

    Triton reads the variable when a kernel is decorated, so it is set before this package is imported or not at all.
    """
    return _INTERPRETING


_INTERPRETING = has_triton() and os.environ.get("TRITON_INTERPRET", "0") == "1"
_INLINE_PTX = not _INTERPRETING and os.environ.get("CSM_KERNELS_PTX", "1") != "0"


def inline_ptx() -> bool:
    """Whether kernels may hold inline PTX: not under the interpreter, and not where ``CSM_KERNELS_PTX=0``.

    The variable is for tools that simulate Triton programs and do not know PTX.
    """
    return _INLINE_PTX


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors launches its Triton kernel; otherwise its reference runs."""
    if _INTERPRETING:
        return True
    return has_triton() and all(t.is_cuda for t in tensors if t is not None)


@functools.cache
def device_facts(index: int) -> Device:
    """Facts about one CUDA device."""
    found = torch.cuda.get_device_properties(index)
    cache = getattr(found, "L2_cache_size", 0)
    return Device(found.name, found.major * 10 + found.minor, found.multi_processor_count, cache)
