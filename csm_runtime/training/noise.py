"""How noisy the depth decoder's gradient is, and so on how many frames a step it is worth computing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csm_kernels.frames import sample_frames


@dataclass(frozen=True)
class NoiseReading:
    """One answer of :class:`DepthGradientNoiseScale`."""

    noise_scale: float
    """Frames at which the noise of the mean gradient is as large as the gradient itself; NaN before any measurement."""
    depth_fraction: float
    """The fraction of the frames of a step that makes progress per computation largest."""
    depth_frames: int
    """The same as a number of frames."""


class DepthGradientNoiseScale:
    """Measures the gradient noise scale of the depth decoder and suggests ``depth_frames``.

    Two disjoint samples of the same batch give two gradients of the depth decoder. Their product estimates the squared
    gradient without bias and their distance its noise; both are averaged over measurements, and their ratio, in frames,
    is the noise scale. Far more frames per step than that are wasted, far fewer slow the run down. A measurement costs two
    more steps on ``num_frames`` frames each; ``.grad`` is left alone. End-of-speech frames, all alike, are left out.

    Args:
        model: an accelerated CSM, not wrapped.
        num_frames: frames of each sample.
        decay: of the moving averages.

    Example::

        meter = DepthGradientNoiseScale(model)
        meter.measure(batch, step)
        meter.reading(frames_per_step=16_384).depth_frames

    Source: McCandlish et al., An Empirical Model of Large-Batch Training (2018); docs/training.md for the fraction.
    """

    def __init__(self, model: Any, num_frames: int = 64, decay: float = 0.9) -> None:
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"num_frames must be a positive integer, got {num_frames!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be from 0 to below 1, got {decay!r}")
        if "training_acceleration" not in model.__dict__:
            raise ValueError("model is not accelerated for training; call accelerate(model, training=True) first")
        self._model, self._num_frames, self._decay = model, num_frames, decay
        self._signal = self._noise = self._weight = 0.0

    def measure(self, batch: Mapping[str, Tensor], step: int) -> None:
        """Take one measurement on a batch of the collator's; a batch with fewer than two frames is passed over."""
        model, config = self._model, self._model.training_acceleration.config
        frames = batch["labels"] == model.config.audio_token_id
        frames[:, 0] = False
        count = int(frames.sum())
        rows = min(self._num_frames, count // 2)
        if rows < 1:
            return
        sample = sample_frames(frames, 2 * rows, seed=config.seed, step=step, micro_step=-1, rank=config.rank)
        wanted = [p for p in model.depth_decoder.parameters() if p.requires_grad]
        inputs = {key: value for key, value in batch.items() if not key.startswith(("num_", "depth_"))}
        was_training = model.training
        model.train()
        try:
            halves = []
            for part in (sample.index[0::2], sample.index[1::2]):
                out = model(**inputs, depth_index=part)
                grads = torch.autograd.grad(out.depth_decoder_loss, wanted, allow_unused=True)
                halves.append([g.double() for g in grads if g is not None])
        finally:
            model.train(was_training)
        product = sum(float((a * b).sum()) for a, b in zip(*halves))
        distance = sum(float((a - b).square().sum()) for a, b in zip(*halves))
        # Drawn without replacement, the samples are as independent of each other as two of the whole data are.
        variance = distance / 2 * rows
        self._signal = self._decay * self._signal + (1 - self._decay) * product
        self._noise = self._decay * self._noise + (1 - self._decay) * variance
        self._weight = self._decay * self._weight + (1 - self._decay)

    def reading(self, frames_per_step: int) -> NoiseReading:
        """What the measurements say of steps of so many frames, over all ranks and micro-batches."""
        if not isinstance(frames_per_step, int) or frames_per_step < 1:
            raise ValueError(f"frames_per_step must be a positive integer, got {frames_per_step!r}")
        if not self._weight:
            return NoiseReading(math.nan, 1.0, frames_per_step)
        # A gradient lost in its noise has a product around zero or below: every frame counts.
        scale = self._noise / self._signal if self._signal > 0 else math.inf
        fraction = min(1.0, math.sqrt(self.cost_ratio() * scale / frames_per_step)) if math.isfinite(scale) else 1.0
        frames = max(1, min(frames_per_step, math.ceil(fraction * frames_per_step)))
        return NoiseReading(scale, fraction, frames)

    def cost_ratio(self) -> float:
        """Computation of the backbone per frame over that of the depth decoder, by their matrices' sizes."""
        model, config = self._model, self._model.config

        def size(stack: Any) -> int:
            return sum(p.numel() for p in stack.layers.parameters() if p.ndim > 1)

        backbone = size(model.backbone_model) + model.lm_head.weight.numel()
        depth = model.depth_decoder
        books = config.num_codebooks
        per_row = size(depth.model) + depth.model.inputs_embeds_projector.weight.numel()
        return backbone / (books * per_row + depth.codebooks_head.weight.numel())
