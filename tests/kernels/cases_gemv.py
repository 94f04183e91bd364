"""Launches of the decode products at CSM-1B's shapes: the depth decoder's, the backbone's and the heads'."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from csm_kernels.gemv_kernel import launch_gemv, launch_gemv_swiglu, workspace_size
from csm_kernels.quant import QuantWeight

SHAPES = {
    "down": (1024, 8192),
    "q": (1024, 1024),
    "kv": (256, 1024),
    "backbone q": (2048, 2048),
    "backbone gate": (8192, 2048),
    "backbone down": (2048, 8192),
    "head": (2051, 1024),
}
NORMED = ("q", "kv", "backbone q", "backbone gate", "head")


def _weight(kind: str, height: int, width: int) -> Tensor | QuantWeight:
    if kind == "int4":
        groups = width // 128
        return QuantWeight(
            torch.zeros(height, width // 2, dtype=torch.uint8), torch.zeros(height, groups, dtype=torch.bfloat16)
        )
    if kind == "int4 asymmetric":
        packed = _weight("int4", height, width)
        return QuantWeight(packed.data, torch.zeros(height, width // 128, 2, dtype=torch.bfloat16))
    if kind in ("int8", "fp8"):
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        return QuantWeight(torch.empty(height, width, dtype=dtype), torch.ones(height))
    return torch.empty(height, width, dtype=getattr(torch, kind))


def _gemv(kind: str, name: str, rows: int, dtype: torch.dtype = torch.float32) -> None:
    height, width = SHAPES[name]
    x, weight, normed = torch.zeros(rows, width, dtype=dtype), _weight(kind, height, width), name in NORMED
    size = workspace_size(x, weight, normed)
    launch_gemv(
        x,
        weight,
        None,
        None if normed else torch.zeros(rows, height),
        torch.ones(width, dtype=torch.bfloat16) if normed else None,
        1e-5,
        torch.empty(rows, height),
        torch.empty(size) if size else None,
    )


def _transposed(kind: str, rows: int) -> None:
    height, width = SHAPES["head"]
    weight = torch.empty(width, height, dtype=getattr(torch, kind)).t()
    launch_gemv(torch.zeros(rows, width), weight, None, None, None, 0.0, torch.empty(rows, height))


def _swiglu(kind: str, rows: int, evict_first: bool = False) -> None:
    x, norm_weight = torch.zeros(rows, 1024), torch.ones(1024, dtype=torch.bfloat16)
    gate, up = _weight(kind, 8192, 1024), _weight(kind, 8192, 1024)
    launch_gemv_swiglu(x, gate, up, norm_weight, 1e-5, torch.empty(rows, 8192, dtype=torch.bfloat16), evict_first)


FORMATS = {1: ("bfloat16", "int8", "fp8", "int4"), 8: ("bfloat16", "int4")}
CASES = {
    f"gemv {name} {kind} M={rows}": partial(_gemv, kind, name, rows)
    for rows, kinds in FORMATS.items()
    for kind in kinds
    for name in SHAPES
}
CASES |= {
    f"gemv_swiglu {kind} M={rows}": partial(_swiglu, kind, rows) for rows, kinds in FORMATS.items() for kind in kinds
}
CASES |= {
    "gemv_swiglu bfloat16 M=1 evict_first": partial(_swiglu, "bfloat16", 1, True),
    "gemv_swiglu bfloat16 M=16": partial(_swiglu, "bfloat16", 16),
    "gemv_swiglu int4 asymmetric M=1": partial(_swiglu, "int4 asymmetric", 1),
    "gemv head transposed bfloat16 M=1": partial(_transposed, "bfloat16", 1),
    "gemv head transposed bfloat16 M=16": partial(_transposed, "bfloat16", 16),
    "gemv down float32 M=1": partial(_gemv, "float32", "down", 1),
    "gemv head float32 M=4": partial(_gemv, "float32", "head", 4),
    "gemv q float16 M=8": partial(_gemv, "float16", "q", 8),
    "gemv q int8 M=8": partial(_gemv, "int8", "q", 8),
    "gemv q fp8 M=8": partial(_gemv, "fp8", "q", 8),
    "gemv q bfloat16 M=2 of bf16": partial(_gemv, "bfloat16", "q", 2, torch.bfloat16),
}
UNSUPPORTED = {name: (80,) for name in CASES if " fp8 " in name}
