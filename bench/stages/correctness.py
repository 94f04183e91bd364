"""Stage 4: every format, both drivers and batch 1, 4, 16 at the real shapes against fp64, and the drivers bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from csm_kernels.depth.reference import DepthReference, StackReference
from csm_kernels.testing import assert_close
from stages import models
from stages.common import Stage

_TINY = (("float32", 2), ("bfloat16", 2), ("int8", 2))
_REHEARSED = (("bfloat16", 1), ("int8", 2), ("fp8", 1), ("int4", 1), ("float32", 2))


def run(stage: Stage) -> None:
    """The tiny shapes first: they fail fastest."""
    tiny = _REHEARSED if stage.rehearse else _TINY
    for fmt, batch in tiny:
        stage.measure(f"tiny {fmt} batch {batch}", lambda f=fmt, b=batch: _compared(_build("tiny", f, stage.device), b))
    if stage.rehearse:
        return
    for batch in models.BATCHES:
        for fmt in models.FORMATS:
            name = f"real {fmt} batch {batch}"
            stage.measure(name, lambda f=fmt, b=batch: _compared(_build("real", f, stage.device), b))


@functools.cache
def _build(size: str, fmt: str, device: torch.device) -> models.Model:
    return models.build(models.REAL if size == "real" else models.TINY, fmt, device)


def _compared(model: models.Model, batch: int) -> dict[str, Any]:
    """Both drivers within the tolerance rule, and with equal tiles equal in every bit."""
    found: dict[str, Any] = {}
    made = {}
    for driver in (*models.DRIVERS, "matched"):
        frame = models.Frame(model, batch, driver)
        before = (frame.state.all_keys.clone(), frame.state.all_values.clone())
        frame.logits.fill_(float("nan"))
        frame.depth()
        frame.stack()
        frame.check_flags()
        made[driver] = (frame.codes.clone(), frame.logits.clone(), frame.stream.clone())
        if driver != "matched":
            truth, eager = (_logits(frame, dtype) for dtype in (torch.float64, model.dtype))
            found[f"{driver} logits"] = _judged(frame.logits, truth, eager, model.size.depth.width)
            truth, eager = (_stream(frame, before, dtype) for dtype in (torch.float64, model.dtype))
            found[f"{driver} stream"] = _judged(frame.stream, truth, eager, model.size.backbone.width)
    for name, one, two in zip(("codes", "logits", "stream"), made["persistent"], made["matched"]):
        assert torch.equal(one, two), f"{name} of the two drivers differ at equal tiles"
    return found | {"drivers": "equal bits at equal tiles"}


def _judged(ours: Tensor, truth: Tensor, eager: Tensor, terms: int) -> dict[str, float]:
    """The errors, after the rule has been asserted."""
    assert_close(ours, truth, eager, terms=terms)
    return {
        "error": float((ours.double() - truth).abs().max()),
        "eager_error": float((eager.double() - truth).abs().max()),
        "largest": float(truth.abs().max()),
    }


def _logits(frame: models.Frame, dtype: torch.dtype) -> Tensor:
    """``[codebooks - 1, B, V]`` of the reference that is told our codes."""
    codes = frame.codes

    class Told(DepthReference):
        """Draws what we have drawn: one other token would make everything after it another."""

        def draws(self, p: int) -> None:
            self.codes[:, p - 1] = codes[:, p - 1]

    given = (frame.hidden, frame.token, frame.params, frame.key)
    told = Told(frame.model.weights.depth, *given, cache_dtype=frame.model.dtype, dtype=dtype)
    return told.run()[1].transpose(0, 1).to(dtype)


def _stream(frame: models.Frame, before: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The backbone's stream after one step of the reference, on the caches as they were."""
    size, stack = frame.model.size, frame.model.weights.backbone
    reference = StackReference(stack, frame.batch, size.capacity, frame.model.dtype, dtype)
    reference.keys.copy_(before[0])
    reference.values.copy_(before[1])
    reference.allowed = frame.state.allowed.clone()
    reference.stream = frame.hidden
    for l in range(stack.shape.layers):
        reference.layer(l, frame.state.length, frame.state.position)
    return reference.stream.to(dtype)
