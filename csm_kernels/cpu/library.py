"""The shared library of the native CPU kernels and its structs, as src/csm_cpu.h has them."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

ABI = 2
PATH = Path(__file__).with_name("libcsm_cpu.so")
ISA_VARIABLE = "CSM_KERNELS_CPU_ISA"
"""Environment variable that forces an instruction set; the best that the machine has where it is empty."""


class CMatrix(ctypes.Structure):
    """CsmMatrix."""

    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("row_bytes", c_int64),
        *((name, c_int32) for name in ("rows", "cols", "format", "group", "symmetric", "bias_format")),
    ]


class CLayer(ctypes.Structure):
    """CsmLayer."""

    _fields_ = [
        *((name, CMatrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "keys", "values")),
    ]


class CStack(ctypes.Structure):
    """CsmStack."""

    _fields_ = [
        ("layers", POINTER(CLayer)),
        ("norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("capacity", c_int64),
        ("positions", c_int64),
        *(
            (name, c_int32)
            for name in ("count", "hidden", "ffn", "heads", "kv_heads", "head_dim", "norm_format", "cache_format")
        ),
        ("eps", c_float),
    ]


class CModel(ctypes.Structure):
    """CsmModel."""

    _fields_ = [
        ("backbone", CStack),
        ("depth", CStack),
        *((name, CMatrix) for name in ("head", "projection", "embedding", "depth_embedding")),
        ("heads", POINTER(CMatrix)),
        *((name, c_int32) for name in ("codebooks", "vocab", "depth_vocab")),
    ]


class CSampling(ctypes.Structure):
    """CsmSampling."""

    _fields_ = [(name, c_void_p) for name in ("temperature", "top_k", "top_p", "do_sample")]


class CState(ctypes.Structure):
    """CsmState."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in (
                *("hidden", "codes", "length", "position", "frame", "seed", "utterance", "allowed", "ended"),
                *("end_code", "judged", "pad_code", "pads", "faults", "first_logits", "logits"),
            )
        ),
        ("first", CSampling),
        ("others", CSampling),
        ("rows", c_int32),
    ]


def why_not() -> str | None:
    """Why the native kernels are not to be had here, or None."""
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def library() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it is not to be had; the message says why.
    """
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(f"the native CPU kernels are not available: {loaded}")
    return loaded


def instruction_sets() -> tuple[str, ...]:
    """Those this machine can run, best first: ``avx512``, ``avx2vnni``, ``avx2``, ``portable``; none without a library."""
    return () if why_not() else tuple(library().csm_isas().decode().split(","))


def chosen(isa: str | None = None) -> bytes:
    """The instruction set to ask the library for: the one named, that of ``CSM_KERNELS_CPU_ISA``, or the best.

    Raises:
        ValueError: this machine cannot run it.
        RuntimeError: there is no library.
    """
    library()
    wanted = isa or os.environ.get(ISA_VARIABLE) or instruction_sets()[0]
    if wanted not in instruction_sets():
        source = "isa" if isa else ISA_VARIABLE
        raise ValueError(f"{source} must be one of {', '.join(instruction_sets())} on this machine, got {wanted!r}")
    return wanted.encode()


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    if not PATH.exists():
        return (
            "they were not built when the package was installed: install g++ or clang++ and install the package again"
        )
    try:
        found = ctypes.CDLL(str(PATH))
        found.csm_abi.restype = c_int32
        built = found.csm_abi()
    except (OSError, AttributeError) as error:
        return f"{PATH.name} cannot be loaded: {error}"
    if built != ABI:
        return f"{PATH.name} is of another version of the package ({built}, not {ABI}): install the package again"
    pointers = (c_void_p,)
    for name, result, arguments in (
        ("csm_isas", c_char_p, ()),
        ("csm_sizes", None, (POINTER(c_int64),)),
        ("csm_new", c_void_p, (POINTER(CModel), POINTER(CState), c_int32, c_char_p)),
        ("csm_free", None, pointers),
        ("csm_emit", None, pointers),
        ("csm_depth", None, pointers),
        ("csm_advance", None, pointers),
        ("csm_gemv", c_int32, (POINTER(CMatrix), c_void_p, c_void_p, c_int32, c_int32, c_char_p)),
        (
            "csm_sample",
            None,
            (c_void_p, c_int32, c_int32, POINTER(CSampling), *3 * pointers, c_int32, *2 * pointers),
        ),
        ("csm_stream", c_double, (c_int64, c_int32, c_int32)),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    sizes = (c_int64 * 5)()
    found.csm_sizes(sizes)
    ours = [ctypes.sizeof(struct) for struct in (CMatrix, CLayer, CStack, CModel, CState)]
    if list(sizes) != ours:
        return f"{PATH.name} lays out its structs otherwise ({list(sizes)}, not {ours}): install the package again"
    return found
