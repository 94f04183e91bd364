"""The backbone's step on the decode kernels, and what a frame needs beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from csm_kernels.depth import make_workspace, plan
from csm_kernels.depth.args import Pointers
from csm_kernels.depth.frame import launch_advance, launch_finish
from csm_kernels.depth.kernel import Plan, launch_stack, stack_pointers
from csm_kernels.depth.pack import PackedStack, Workspace, poison
from csm_kernels.depth.reference import StackReference
from csm_kernels.testing import assert_close
from kernels.depth_models import ODD, ONE_GROUP, TINY, backbone_model, few_programs, same
from kernels.test_depth import moved

BF16, F32 = torch.bfloat16, torch.float32
CAPACITY = 40


class Backbone(NamedTuple):
    """A planned step, its cache and where each row stands."""

    packed: PackedStack
    workspace: Workspace
    pointers: Pointers
    plan: Plan


def made(
    packed: PackedStack, batch: int, splits: int, dtype: torch.dtype, device: torch.device, **options: Any
) -> Backbone:
    """Rows 0, 1, ... hold 30, 17, 4, 21, ... positions, of which the first few are left padding."""
    shape = packed.shape
    generator = torch.Generator().manual_seed(5)
    size = (shape.layers, batch, shape.groups, CAPACITY, shape.dim)
    keys, values = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    length = torch.tensor([30 - 13 * b % 37 for b in range(batch)]) % 31
    pads = length // 4
    c = torch.arange(CAPACITY)
    allowed = (c < length[:, None]) & (c >= pads[:, None])
    workspace = make_workspace(packed, batch, splits, device)
    poison(workspace)
    # What lies beyond a row's positions must not matter.
    keys.masked_fill_((c >= length[:, None])[None, :, None, :, None], float("nan"))
    values.masked_fill_((c >= length[:, None])[None, :, None, :, None], float("nan"))
    pointers = stack_pointers(packed, workspace, keys.to(device), values.to(device))._replace(
        allowed=allowed.to(device), length=length.to(device), position=(length - pads).to(device)
    )
    with few_programs(16):
        chosen = plan(packed, batch, workspace, CAPACITY, **options)
    workspace.buffers.stream.copy_(torch.randn(batch, shape.width, generator=generator))
    return Backbone(packed, workspace, pointers, chosen)


def reference(b: Backbone, dtype: torch.dtype) -> StackReference:
    one = StackReference(b.packed, len(b.pointers.length), CAPACITY, b.pointers.k_cache.dtype, dtype)
    one.keys.copy_(b.pointers.k_cache.nan_to_num())
    one.values.copy_(b.pointers.v_cache.nan_to_num())
    one.allowed = b.pointers.allowed.clone()
    one.stream = b.workspace.buffers.stream.clone()
    return one


def run_reference(one: StackReference, slot: Tensor, position: Tensor) -> Tensor:
    for l in range(one.stack.shape.layers):
        one.layer(l, slot, position)
    return one.stream


@pytest.mark.parametrize("persistent", [False, True], ids=["launches", "persistent"])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("shape", "dtype", "fmt", "batch"),
    [
        (TINY, F32, None, 1),
        (TINY, F32, None, 3),
        (ODD, BF16, None, 1),
        (TINY, BF16, None, 4),
        (ONE_GROUP, BF16, "int8", 1),
        (TINY, BF16, "fp8", 2),
        (TINY, BF16, "int4", 1),
    ],
    ids=["fp32", "fp32 batch", "bf16 odd", "bf16 batch", "int8", "fp8 batch", "int4"],
)
def test_one_step(
    persistent: bool, splits: int, shape: Any, dtype: torch.dtype, fmt: str | None, batch: int, device: torch.device
) -> None:
    packed = moved(
        backbone_model(shape, dtype, {k: v for k, v in same(fmt).items() if k in ("attention", "mlp")}), device
    )
    b = made(packed, batch, splits, dtype, device, persistent=persistent, programs=1)
    truth, eager = reference(b, torch.float64), reference(b, dtype)
    slot, position = b.pointers.length.clone(), b.pointers.position.clone()
    launch_stack(b.plan, b.pointers, batch)
    ours = b.workspace.buffers.stream
    exact, same_dtype = run_reference(truth, slot, position), run_reference(eager, slot, position)
    assert_close(ours, exact, same_dtype.to(dtype), name="stream", terms=shape.width)
    rows = torch.arange(batch, device=device)
    for cache, attribute in ((b.pointers.k_cache, "keys"), (b.pointers.v_cache, "values")):
        new, wanted, plain = (
            t[:, rows, :, slot] for t in (cache, getattr(truth, attribute), getattr(eager, attribute))
        )
        assert_close(new, wanted, plain, name=attribute, terms=shape.width)


def test_drivers_and_splits_agree(device: torch.device) -> None:
    """The same bits from both drivers; other splits only sum in another order."""
    packed = moved(backbone_model(TINY, BF16), device)
    results = {}
    for splits in (1, 2, 8):
        tiles = None
        for persistent in (True, False):
            b = made(packed, 2, splits, BF16, device, persistent=persistent, programs=1)
            sizes, tiles = b.plan.sizes._replace(BC=8), tiles or b.plan.tiles
            launch_stack(b.plan._replace(sizes=sizes, tiles=tiles), b.pointers, 2)
            results[splits, persistent] = b.workspace.buffers.stream.clone()
    for splits in (1, 2, 8):
        assert torch.equal(results[splits, True], results[splits, False])
        assert torch.allclose(results[splits, True], results[1, True], atol=1e-2)


def test_three_steps_in_a_row(device: torch.device) -> None:
    """The position just computed is seen by the next step, padding never is."""
    packed = moved(backbone_model(TINY, F32), device)
    b = made(packed, 3, 2, F32, device, persistent=False)
    truth = reference(b, torch.float64)
    frame = torch.zeros(3, dtype=torch.int64, device=device)
    for step in range(3):
        slot, position = b.pointers.length.clone(), b.pointers.position.clone()
        x = torch.randn(3, TINY.width, generator=torch.Generator().manual_seed(step)).to(device)
        b.workspace.buffers.stream.copy_(x)
        truth.stream = x
        launch_stack(b.plan, b.pointers, 3)
        exact = run_reference(truth, slot, position)
        assert torch.allclose(b.workspace.buffers.stream.double(), exact, atol=2e-5), f"step {step}"
        launch_advance(b.pointers.allowed, b.pointers.length, b.pointers.position, frame)
        truth.allowed[torch.arange(3, device=device), slot] = True
        assert torch.equal(b.pointers.allowed, truth.allowed)
        assert b.pointers.length.tolist() == (slot + 1).tolist()
        assert b.pointers.position.tolist() == (position + 1).tolist()
        assert frame.tolist() == [step + 1] * 3


def test_a_full_cache_is_not_overrun(device: torch.device) -> None:
    allowed = torch.zeros(2, 8, dtype=torch.bool, device=device)
    length = torch.tensor([8, 7], device=device)
    launch_advance(allowed, length, length.clone(), length.clone())
    assert allowed.nonzero().tolist() == [[1, 7]]
    packed = moved(backbone_model(TINY, F32), device)
    b = made(packed, 1, 1, F32, device, persistent=False)
    b.pointers.length.fill_(CAPACITY + 3)
    b.pointers.allowed.zero_()
    before = b.pointers.k_cache[:, :, :, :-1].clone()
    launch_stack(b.plan, b.pointers, 1)
    assert torch.equal(b.pointers.k_cache[:, :, :, :-1].nan_to_num(), before.nan_to_num())
    assert torch.isfinite(b.workspace.buffers.stream).all()


@pytest.mark.parametrize("judged", [3, 4])
@pytest.mark.parametrize("pads", [False, True])
def test_end_of_speech(judged: int, pads: bool, device: torch.device) -> None:
    codes = torch.tensor([[5, 5, 5, 1], [5, 5, 5, 5], [5, 2, 5, 5], [1, 2, 3, 4]], device=device)
    ended = torch.tensor([False, False, False, True], device=device)

    def one(value: Any) -> Tensor:
        return torch.tensor([value], device=device)

    fine, late = (torch.tensor([7, word], dtype=torch.int32, device=device) for word in (0, 1))
    faults, flags = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 4))
    syncs = fine, late if pads else fine
    launch_finish(codes, ended, one(5), one(judged), one(9), one(pads), syncs, flags, faults, (6, 6))
    assert faults.tolist() == [int(pads)]
    assert ended.tolist() == [judged == 3, True, False, True]
    assert codes[3].tolist() == ([9] * 4 if pads else [1, 2, 3, 4])
    assert codes[:3].tolist() == [[5, 5, 5, 1], [5, 5, 5, 5], [5, 2, 5, 5]]


@pytest.mark.parametrize(("code", "flag", "word"), [(5, 0, 0), (5, 1, 2), (-1, 0, 4), (6, 0, 4), (6, 1, 6)], ids=str)
def test_what_went_wrong_in_a_frame(code: int, flag: int, word: int, device: torch.device) -> None:
    """Broken logits and codes out of range in one row of four, judged before an ended row is padded; bits stay."""
    codes = torch.tensor([[7, 1, 2], [7, 5, 0], [0, 0, 0], [7, 1, 2]], device=device)
    codes[1, 2] = code
    ended = torch.tensor([False, True, False, False], device=device)
    flags, faults = torch.tensor([0, flag, 0, 0], dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32)
    faults = faults.to(device)

    def one(value: Any) -> Tensor:
        return torch.tensor([value], device=device)

    fine = torch.zeros(2, dtype=torch.int32, device=device)
    for _ in range(2):
        launch_finish(codes, ended, one(9), one(3), one(2), one(True), (fine, fine), flags, faults, (8, 6))
    assert faults.tolist() == [word]
    assert codes[1].tolist() == [2, 2, 2]
