"""Stage 9: a training step. The loss op against its traffic bound, the step against stock at all frames and at its ratio."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csm_kernels import loss as losses
from csm_runtime import accelerate
from csm_runtime.training import CsmTrainingConfig
from stages import end_to_end
from stages.common import Stage, ratio

FRACTION = 1 / 16


def run(stage: Stage) -> None:
    """The op first, which is quick, then whole steps."""
    rows, books, width, vocab = (8, 3, 32, 67) if stage.rehearse else (128, 31, 1024, 2051)
    stream = (stage.earlier(1).get("summary") or {}).get("stream_gb_per_s")
    dtype = torch.bfloat16
    generator = torch.Generator(stage.device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=stage.device) * scale).to(dtype)

    hidden, weight = normal(rows, books, width), normal(books, width, vocab, scale=width**-0.5)
    targets = torch.randint(vocab, (rows, books), generator=generator, device=stage.device)
    stage.measure("loss against fp64", lambda: _error(hidden, weight, targets))
    # Confident rows, where a softmax rounded before the one-hot is taken off would be garbage.
    picked = weight.transpose(1, 2)[torch.arange(books, device=stage.device), targets]
    stage.measure("loss against fp64, confident rows", lambda: _error((20 * picked).to(dtype), weight, targets))
    stage.measure("loss", lambda: _loss_time(stage, hidden, weight, targets, stream))
    frames = 32 if stage.rehearse else 2048
    base = end_to_end.build(stage).train()
    base.codec_model.requires_grad_(False)
    codes = torch.randint(1, 32, (1, frames, base.config.num_codebooks), generator=generator, device=stage.device)
    labels = codes.clone()
    labels[:, 0] = -100
    some = labels.clone()
    kept = torch.randperm(frames - 1, generator=generator, device=stage.device)[: int(frames * FRACTION)] + 1
    outside = torch.ones(frames, dtype=torch.bool, device=stage.device).index_fill_(0, kept, False)
    some[:, outside, 1:] = -100
    ours = accelerate(copy.deepcopy(base), training=CsmTrainingConfig(depth_frames=len(kept)))
    everything = accelerate(copy.deepcopy(base), training=CsmTrainingConfig(depth_fraction=1.0))
    for name, model, inputs in (
        ("step, ours at 1/16", ours, {"labels": labels, "depth_index": kept}),
        ("step, stock at 1/16", base, {"labels": some}),
        ("step, stock at all frames", base, {"labels": labels}),
        (
            "step, ours at all frames",
            everything,
            {"labels": labels, "depth_index": torch.arange(1, frames, device=stage.device)},
        ),
    ):
        stage.measure(name, lambda m=model, i=inputs: _step(stage, m, {"input_ids": codes, **i}))


def _error(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, float]:
    """Relative errors of the loss and both gradients, ours and those of the same in the low precision throughout."""

    def grads(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        value = function(x, w)
        return [value.detach(), *torch.autograd.grad(value, (x, w))]

    def plain(x: Tensor, w: Tensor) -> Tensor:
        logits = torch.einsum("mcd,cdv->mcv", x, w).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def exact(x: Tensor, w: Tensor) -> Tensor:
        return losses.fused_codebook_linear_cross_entropy_ref(x, w, targets).loss

    truth = grads(exact, torch.float64)
    found: dict[str, float] = {}
    for name, values in (
        ("ours", grads(lambda x, w: losses.fused_codebook_linear_cross_entropy(x, w, targets).loss, hidden.dtype)),
        ("stock", grads(plain, hidden.dtype)),
    ):
        for part, value, wanted in zip(("loss", "hidden", "weight"), values, truth):
            found[f"{name} {part}"] = float((value.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return found


def _loss_time(stage: Stage, hidden: Tensor, weight: Tensor, targets: Tensor, stream: float | None) -> dict[str, Any]:
    """Forward and backward of the op in one graph; the bound: states and matrices read twice, both gradients written."""
    options = (None, weight.shape[2], -100, 0.0, hidden.dtype)
    one = torch.ones((), device=hidden.device)

    def work() -> None:
        *_, lse = losses._op(hidden, weight, targets, *options)
        losses._backward_op(hidden, weight, targets, options[0], lse, one, *options[1:], True, True)

    took = stage.timed(work)
    least = 3 * (hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size())
    bound = None if stream is None else least / stream / 1e6
    return {**took, "bytes": least, "bound_ms": bound, "over_bound": ratio(took["ms"], bound)}


def _step(stage: Stage, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Forward and backward, the median of five, and the most memory a step takes above the weights."""

    def work() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()

    if stage.rehearse:
        work()
        return {"ms": None, "peak_gb": None}
    for _ in range(2):
        work()
    times = []
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for _ in range(5):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() - held
    model.zero_grad()
    return {"ms": statistics.median(times), "peak_gb": peak / 1e9}
