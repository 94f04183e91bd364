"""ggml's product of a matrix and a few rows, through the package ggml-python, for :mod:`kernels` to race against.

Not among the extras: it is built from source when it is installed, for AVX2 unless it is told otherwise, and versions
after 0.0.37 need several minutes. ``CFLAGS=-march=native pip install ggml-python==0.0.37`` builds the fastest one.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from csm_runtime import hugepages

FORMATS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""Ours and the format of ggml's nearest to it: its groups are of 32 columns, with an fp16 scale each."""


def products(rows: int, height: int, width: int, fmt: str, copies: int, at_once: int) -> Callable[[], Any] | None:
    """Products with ``copies`` matrices ``[height, width]``, ``at_once`` of them per call and in one graph.

    A graph starts its threads when it is computed; several products in one pay for them once, as a model's graph does.

    Returns:
        What computes the next graph, ``at_once`` as its attribute ``products``; None where the package or format is missing.
    """
    try:
        import ggml
    except ImportError:
        return None
    kind = getattr(ggml, f"GGML_TYPE_{FORMATS[fmt]}", None) if fmt in FORMATS else None
    if kind is None or width % 32:
        return None
    size = ggml.ggml_row_size(kind, width) * height
    tensors, count = 2 * copies + 1, copies // at_once
    results = 4 * rows * (height * copies + width)
    overhead = (tensors + 8) * (ggml.ggml_tensor_overhead() + 64) + count * (ggml.ggml_graph_overhead() + 64)
    memory = torch.empty(copies * size + results + overhead + (1 << 20), dtype=torch.uint8)
    memory.zero_()
    hugepages.collapse([memory])
    context = ggml.ggml_init(
        ggml.ggml_init_params(mem_size=memory.numel(), mem_buffer=memory.data_ptr(), no_alloc=False)
    )
    plain = (torch.randn(height, width) * width**-0.5).contiguous()
    source = ctypes.cast(plain.data_ptr(), ctypes.POINTER(ctypes.c_float))
    weights = [ggml.ggml_new_tensor_2d(context, kind, width, height) for _ in range(copies)]
    first = ggml.ggml_get_data(weights[0])
    if fmt in ("fp32", "bf16"):
        stored = plain.to(torch.float32 if fmt == "fp32" else torch.bfloat16)
        ctypes.memmove(first, stored.data_ptr(), size)
    else:
        ggml.ggml_quantize_chunk(kind, source, first, 0, height, width, None)
    for weight in weights[1:]:
        ctypes.memmove(ggml.ggml_get_data(weight), first, size)
    x = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, width, rows)
    values = torch.randn(rows, width)
    ctypes.memmove(ggml.ggml_get_data(x), values.data_ptr(), values.nbytes)
    graphs = []
    for start in range(0, copies - at_once + 1, at_once):
        graph = ggml.ggml_new_graph(context)
        for weight in weights[start : start + at_once]:
            out = ggml.ggml_mul_mat(context, weight, x)
            ggml.ggml_build_forward_expand(graph, out)
        plan = ggml.ggml_graph_plan(graph, torch.get_num_threads())
        work = (ctypes.c_uint8 * max(plan.work_size, 1))()
        plan.work_data = ctypes.cast(work, ctypes.POINTER(ctypes.c_uint8))
        graphs.append((graph, plan, work, out))
    turn = itertools.cycle(graphs)

    def run() -> None:
        graph, plan, _, _ = next(turn)
        ggml.ggml_graph_compute(graph, ctypes.byref(plan))

    run()
    found = torch.frombuffer(
        (ctypes.c_float * (rows * height)).from_address(ggml.ggml_get_data(graphs[0][3])), dtype=torch.float32
    ).view(rows, height)
    wanted = values @ plain.T
    assert (found - wanted).norm() < 0.2 * wanted.norm(), "ggml computed something else"
    run.products = at_once  # type: ignore[attr-defined]
    weakref.finalize(run, _free, context, memory)
    return run


def _free(context: Any, memory: torch.Tensor) -> None:
    import ggml

    ggml.ggml_free(context)  # there are 64 of them at most; the memory is ours, and may go now
    del memory
