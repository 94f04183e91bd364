"""Repairs of Triton 3.6's CPU interpreter, applied once when kernels run interpreted.

- numpy from 2.4 on refuses ``int(np.array([3]))``, which every ``range(0, argument)`` needs.
- fp32 to bf16 truncates where a GPU rounds to nearest even, fp32 to fp8 is off by one code: torch casts instead.
- ``tl.dot`` multiplies the raw bits of bf16: widened first.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from csm_kernels._target import interpreting
from csm_kernels._tiles import override_tiles


def large_tiles(op: str, **sizes: int) -> contextlib.AbstractContextManager[None]:
    """Tiles so large that few programs are left, which is what interpreting one costs; compiled they would be absurd."""
    return override_tiles(op, **sizes) if interpreting() else contextlib.nullcontext()


def repair() -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    floats = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }
    stored_as_bits = (tl.bfloat16, tl.float8e4nv, tl.float8e5, tl.float16)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.float64}
    host = {1: np.uint8, 2: np.int16, 4: np.float32, 8: np.float64}

    def cast(data: Any, source: Any, target: Any) -> Any:
        raw = np.ascontiguousarray(data)
        value = torch.from_numpy(raw.view(host[raw.itemsize])).view(floats[source]).to(floats[target])
        value = value.view(bits[value.element_size()]) if target in stored_as_bits else value
        return value.numpy().view(interpreter._get_np_dtype(target)).reshape(np.shape(data))

    stock_cast, stock_float, stock_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    stock_patch = interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if a in floats and b in floats:
            return handle(cast(source.data, a, b), b)
        if a == tl.bfloat16:
            return handle(cast(source.data, a, tl.float32).astype(interpreter._get_np_dtype(target)), b)
        if b == tl.bfloat16:
            return handle(cast(source.data.astype(np.float32), tl.float32, b), b)
        return stock_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if a in floats and b in floats:
            return handle(cast(source.data, a, b), b)
        return stock_float(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        def wide(x: Any) -> Any:
            kind = x.dtype.scalar
            narrow = kind in (tl.bfloat16, tl.float8e4nv, tl.float8e5)
            return handle(cast(x.data, kind, tl.float32), tl.float32) if narrow else x

        return stock_dot(self, wide(a), wide(b), c, precision, imprecise)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    interpreter._patch_lang_tensor = patch_tensor
