"""Both drivers of the depth decode and of the backbone's step at CSM-1B's shapes; a layer and each phase is launched once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from csm_kernels.depth import PackedDepth, PackedStack, StackShape, make_workspace, plan
from csm_kernels.depth.frame import launch_advance, launch_finish
from csm_kernels.depth.kernel import (
    Plan,
    depth_launches,
    depth_pointers,
    launch_depth,
    launch_stack,
    layer_launches,
    run_launches,
    stack_pointers,
)
from csm_kernels.depth.pack import Matrix
from csm_kernels.quant import QuantWeight
from csm_kernels.sampling import NoiseKey, SamplingParams

BF16 = torch.bfloat16
CPU = torch.device("cpu")
DEPTH = StackShape(layers=4, width=1024, ffn=8192, heads=8, groups=2, dim=128, eps=1e-5)
BACKBONE = StackShape(layers=16, width=2048, ffn=8192, heads=32, groups=8, dim=64, eps=1e-5)
CODEBOOKS, VOCAB, POSITIONS = 32, 2051, 2048


def matrix(kind: str, *size: int) -> Matrix:
    """A matrix nobody reads: launches only compile."""
    if kind == "bf16":
        return torch.empty(1, dtype=BF16).expand(size)
    if kind == "int4":
        codes = torch.empty(1, dtype=torch.uint8).expand(*size[:-1], size[-1] // 2)
        return QuantWeight(codes, torch.empty(1, dtype=BF16).expand(*size[:-1], size[-1] // 128))
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return QuantWeight(torch.empty(1, dtype=dtype).expand(size), torch.empty(1).expand(size[:-1]))


def stack(kind: str, shape: StackShape, segments: int) -> PackedStack:
    layers, across = shape.layers, shape.heads * shape.dim
    o = matrix(kind, layers, segments * shape.width, across // segments)
    if isinstance(o, QuantWeight) and kind != "int4":
        o = QuantWeight(o.data, torch.empty(1).expand(layers, shape.width))
    norms = torch.empty(layers, shape.width)
    table = torch.empty(POSITIONS, shape.dim)
    return PackedStack(
        shape,
        segments,
        matrix(kind, layers, (shape.heads + 2 * shape.groups) * shape.dim, shape.width),
        o,
        matrix(kind, layers, 2 * shape.ffn, shape.width),
        matrix(kind, layers, shape.width, shape.ffn),
        *(None,) * 4,
        norms,
        norms,
        norms[0],
        table,
        table,
    )


def ints(batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64)


def once(chosen: Plan, launches: list[tuple[str, object, int, tuple[object, ...]]], pdl: bool) -> None:
    """Each phase once, as a launch that may start early where the target can do that."""
    phases = {launch[0]: launch for launch in reversed(launches)}
    first = next(iter(launches))
    run_launches(chosen._replace(sync=3 if pdl else 0), iter([first, *phases.values()]))


def depth(kind: str, batch: int, persistent: bool, pdl: bool = False) -> None:
    embedding = torch.empty(1, dtype=BF16).expand(CODEBOOKS * VOCAB, BACKBONE.width)
    packed = PackedDepth(
        stack(kind, DEPTH, DEPTH.groups),
        matrix(kind, 1, DEPTH.width, BACKBONE.width),
        None,
        matrix(kind, CODEBOOKS - 1, VOCAB, DEPTH.width),
        embedding,
        torch.empty(1, dtype=BF16).expand((CODEBOOKS - 1) * VOCAB, DEPTH.width),
    )
    workspace = make_workspace(packed.stack, batch, 1, CPU, depth=packed)
    params = SamplingParams(torch.ones(batch), ints(batch), torch.ones(batch), torch.ones(batch, dtype=torch.bool))
    key = NoiseKey(ints(batch), ints(batch), ints(batch))
    codes = torch.zeros(batch, CODEBOOKS, dtype=torch.int64)
    pointers = depth_pointers(packed, workspace, torch.zeros(batch, BACKBONE.width), codes, params, key)
    chosen = plan(packed, batch, workspace, CODEBOOKS, persistent=persistent)
    if persistent:
        launch_depth(chosen, pointers, batch)
    else:
        once(chosen, list(depth_launches(chosen, pointers, batch, 0)), pdl)


def backbone(kind: str, batch: int, persistent: bool, pdl: bool = False) -> None:
    packed = stack(kind, BACKBONE, 1)
    workspace = make_workspace(packed, batch, 16 if batch == 1 else 1, CPU)
    cache = torch.empty(1, dtype=BF16).expand(BACKBONE.layers, batch, BACKBONE.groups, POSITIONS, BACKBONE.dim)
    pointers = stack_pointers(packed, workspace, cache, cache)._replace(
        allowed=torch.ones(batch, POSITIONS, dtype=torch.bool), length=ints(batch), position=ints(batch)
    )
    chosen = plan(packed, batch, workspace, POSITIONS, persistent=persistent)
    if persistent:
        launch_stack(chosen, pointers, batch)
    else:
        once(chosen, list(layer_launches(chosen, pointers, batch, batch, 2, 0, 0)), pdl)


def frame() -> None:
    """What a frame needs beside the two stacks."""
    flag, sync = torch.zeros(1, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    ended, codes = torch.zeros(4, dtype=torch.bool), torch.zeros(4, CODEBOOKS, dtype=torch.int64)
    flags, faults = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch_finish(codes, ended, ints(1), ints(1), ints(1), flag, (sync, sync), flags, faults, (VOCAB, VOCAB))
    launch_advance(torch.ones(4, POSITIONS, dtype=torch.bool), ints(4), ints(4), ints(4))


CASES = {
    "frame bookkeeping": frame,
    **{f"depth persistent {kind} x1": partial(depth, kind, 1, True) for kind in ("bf16", "int8", "fp8", "int4")},
    **{f"depth persistent bf16 x{batch}": partial(depth, "bf16", batch, True) for batch in (4, 16)},
    "depth persistent int8 x16": partial(depth, "int8", 16, True),
    **{f"depth phases {kind} x1": partial(depth, kind, 1, False) for kind in ("bf16", "int8", "fp8", "int4")},
    "depth phases bf16 x16": partial(depth, "bf16", 16, False),
    "depth phases with PDL bf16 x1": partial(depth, "bf16", 1, False, True),
    **{f"backbone persistent {kind} x1": partial(backbone, kind, 1, True) for kind in ("bf16", "int8")},
    "backbone persistent bf16 x16": partial(backbone, "bf16", 16, True),
    "backbone phases bf16 x1": partial(backbone, "bf16", 1, False),
    "backbone phases with PDL int8 x1": partial(backbone, "int8", 1, False, True),
}

UNSUPPORTED = {name: (80,) for name in CASES if "fp8" in name} | {name: (80, 89) for name in CASES if "PDL" in name}
