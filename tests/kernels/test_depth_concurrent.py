"""The persistent kernels with several programs and grid barriers, in many schedules; weak barriers are noticed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from csm_kernels._target import interpreting
from csm_kernels.depth import phases
from csm_kernels.depth.kernel import launch_stack
from csm_kernels.depth.pack import poison
from csm_kernels.depth.reference import DepthReference
from kernels.depth_models import TINY, backbone_model, depth_model, few_programs, inputs, reference, same
from kernels.interpreter import Deadlock, concurrent
from kernels.test_backbone import made
from kernels.test_depth import Step, moved

pytestmark = pytest.mark.skipif(not interpreting(), reason="interleaves the programs of Triton's interpreter")

CPU = torch.device("cpu")
SCHEDULES = 16
SMALL = TINY._replace(layers=1)


def step_of(fmt: str | None = None, batch: int = 1, table: bool = True, programs: int = 3, rows: int = 16) -> Step:
    """A poisoned step of one layer and three codebooks, with tiles for every program."""
    packed = depth_model(SMALL, torch.float32 if fmt is None else torch.bfloat16, same(fmt), codebooks=3, table=table)
    with few_programs(rows):
        return Step(packed, inputs(packed, batch, sample=True), persistent=True, programs=programs, device=CPU)


def again(step: Step) -> None:
    """Everything but the inputs back to NaN."""
    token = step.codes[:, 0].clone() if int(step.codes[0, 0]) >= 0 else step.workspace.buffers.token.clone()
    poison(step.workspace)
    step.workspace.buffers.token.copy_(token)
    step.logits.fill_(float("nan"))


def barriers(step: Step) -> int:
    """Grid barriers of a frame: every phase but the last."""
    s = step.plan.sizes
    layer = 4 if s.FUSE_O else 5
    drawn = 0 if s.FUSE_DRAW else (s.CODEBOOKS - 2) * (1 if s.TABLE else 2)
    return 1 + drawn + (s.CODEBOOKS - 1) * (s.LAYERS * layer + 1)


@pytest.mark.parametrize(
    ("fmt", "batch", "table", "programs"),
    [(None, 1, True, 3), (None, 2, False, 4), ("int8", 1, True, 2), ("int4", 1, False, 3), ("fp8", 3, True, 3)],
    ids=["fp32", "fp32 batch without table", "int8", "int4 without table", "fp8 batch"],
)
def test_every_schedule_gives_the_same_bits(fmt: str | None, batch: int, table: bool, programs: int) -> None:
    alone = step_of(fmt, batch, table, programs=1)
    alone.run()
    step = step_of(fmt, batch, table, programs)
    for seed in range(SCHEDULES):
        with concurrent(seed) as run:
            step.run()
        assert torch.equal(step.codes, alone.codes), f"schedule {seed}"
        assert torch.equal(step.logits, alone.logits), f"schedule {seed}"
        arrivals, failed = step.workspace.buffers.sync.tolist()
        assert arrivals == programs * (barriers(step) + 1), "as many arrivals as phases"
        assert failed == 0
        assert run.switches[0] > arrivals
        again(step)


def test_the_backbone_in_every_schedule() -> None:
    packed = backbone_model(TINY, torch.float32)
    expected = None
    for seed in range(SCHEDULES):
        b = made(packed, 2, 2, torch.float32, CPU, persistent=True, programs=1 if expected is None else 3)
        with concurrent(seed):
            launch_stack(b.plan, b.pointers, 2)
        stream = b.workspace.buffers.stream
        expected = stream.clone() if expected is None else expected
        assert torch.isfinite(stream).all()
        assert torch.equal(stream, expected), f"schedule {seed}"
        assert b.workspace.buffers.sync.tolist()[1] == 0


# ------------------------------------------------------------------------------------------------ weakened barriers

PHASES = {
    "qkv": {},
    "attend_project": {},
    "gate_up": {},
    "down": {},
    "head": {},
    "draws": dict(batch=2),
    "attend": dict(batch=2),
    "project": dict(batch=2),
    "start": dict(batch=2, table=False),
}


@pytest.fixture
def weakened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``weakened(phase, less)``: from then on that phase waits for ``less`` fewer arrivals; None for not at all."""
    stock = phases.wait

    def weaken(phase: str, less: int | None) -> None:
        def wait(sync: Any, target: Any, limit: Any, SYNC: Any) -> None:
            frame = inspect.currentframe()
            assert frame is not None and frame.f_back is not None
            if frame.f_back.f_code.co_name == phase:
                target = 0 if less is None else target - less
            stock(sync, target, limit, SYNC)

        monkeypatch.setattr(phases, "wait", wait)

    yield weaken


@pytest.mark.parametrize("less", [None, 1], ids=["skipped", "one short"])
@pytest.mark.parametrize("phase", list(PHASES))
def test_a_weak_wait_is_noticed(phase: str, less: int | None, weakened: Any) -> None:
    """Each wait in turn: in at least one of the schedules the frame comes out wrong."""
    alone = step_of(**PHASES[phase], programs=1, rows=8)
    alone.run()
    step = step_of(**PHASES[phase], programs=3, rows=8)
    weakened(phase, less)

    def wrong(seed: int) -> bool:
        with concurrent(seed):
            step.run()
        same = torch.equal(step.codes, alone.codes) and torch.equal(step.logits, alone.logits)
        again(step)
        return not same

    assert any(wrong(seed) for seed in range(SCHEDULES)), f"no schedule of {SCHEDULES} noticed"


def test_the_unweakened_wait_is_not(weakened: Any) -> None:
    """The net of the test above lets a right kernel through."""
    alone = step_of(programs=1, rows=8)
    alone.run()
    step = step_of(programs=3, rows=8)
    weakened("qkv", 0)
    for seed in range(4):
        with concurrent(seed):
            step.run()
        assert torch.equal(step.logits, alone.logits)
        again(step)


def test_a_wait_for_too_many_ends_with_the_error_word(weakened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a hang: every program gives up after so many looks, and the frame is marked as broken."""
    from csm_kernels.depth import kernel

    monkeypatch.setattr(kernel, "_POLLS", 50)
    step = step_of()
    weakened("down", -1)
    with concurrent(0):
        step.run()
    arrivals, failed = step.workspace.buffers.sync.tolist()
    assert failed == 1
    assert arrivals >= 1 << 30


def test_a_hang_is_reported(weakened: Any) -> None:
    step = step_of()
    weakened("down", -1)
    with pytest.raises(Deadlock, match="still running: programs"), concurrent(0, limit=5000):
        step.run()


def test_programs_that_are_not_resident_together_end_with_the_error_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as the interpreter runs them, is a grid that does not fit the device."""
    from csm_kernels.depth import kernel

    monkeypatch.setattr(kernel, "_POLLS", 20)
    step = step_of()
    step.run()
    assert step.workspace.buffers.sync.tolist()[1] == 1
    monkeypatch.undo()
    again(step)
    with concurrent(1):
        step.run()
    assert step.workspace.buffers.sync.tolist()[1] == 0, "the next frame begins with a clean slate"


def test_reading_before_writing_shows() -> None:
    """Poison reaches the logits when a phase reads a buffer nobody has written: the tests above rest on it."""
    step = step_of(programs=1)
    step.run()
    assert torch.isfinite(step.logits).all()
    given = inputs(step.packed, 1, sample=True)
    assert step.codes.tolist() == reference(step.packed, given).run()[0].tolist()
    assert isinstance(reference(step.packed, given), DepthReference)


def test_moved_keeps_nested_tuples() -> None:
    packed = depth_model(SMALL)
    assert type(moved(packed, CPU)) is type(packed)
