"""What is trained on how many frames, with which weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed


@dataclass(frozen=True)
class CsmTrainingConfig:
    """How a CSM is trained.

    Attributes:
        depth_fraction: fraction of the frames the depth decoder is trained on, above 0, at most 1. transformers calls it
            ``depth_decoder_labels_ratio``.
        depth_frames: frames per micro-batch it is trained on, instead of a fraction: a fixed number of rows, whatever
            the batch holds. What is noise and what is not depends on this number, not on the fraction.
        min_depth_frames: with ``depth_fraction``, at least this many rows per micro-batch.
        backbone_loss_weight: factor of the mean loss of codebook 0.
        depth_loss_weight: factor of the mean loss of the other codebooks. 1 is what a stock ``forward`` adds up; the
            joint likelihood of a frame is the number of those codebooks, 31 for CSM-1B. The balance does not depend on
            the fraction.
        z_loss: factor of the squared log-partition of the depth decoder's heads, 0 for none.
        seed: of the frames drawn. A run is resumed exactly from its seed and step.
        data_parallel_rank: whose batch this process has; default: ``torch.distributed``'s rank. Tensor-parallel peers
            share it.
        fused_layers: replace RMSNorm, SwiGLU and, on CUDA, the rotation by ours, which keep less for the backward.

    Raises:
        ValueError: a value out of range; names it.
    """

    depth_fraction: float = 1 / 16
    depth_frames: int | None = None
    min_depth_frames: int = 1
    backbone_loss_weight: float = 1.0
    depth_loss_weight: float = 1.0
    z_loss: float = 0.0
    seed: int = 0
    data_parallel_rank: int | None = None
    fused_layers: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.depth_fraction <= 1.0:
            raise ValueError(
                f"depth_fraction must be above 0 and at most 1, got {self.depth_fraction!r}; to train the backbone alone set "
                "depth_loss_weight=0"
            )
        for name in ("depth_frames", "min_depth_frames"):
            value = getattr(self, name)
            if value is None and name == "depth_frames":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        rank = self.data_parallel_rank
        if rank is not None and (not isinstance(rank, int) or rank < 0):
            raise ValueError(f"data_parallel_rank must be an integer from 0 on, got {rank!r}")
        for name in ("backbone_loss_weight", "depth_loss_weight", "z_loss"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be a number from 0 on, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")

    def rows(self, frames: int) -> int:
        """Rows of the sample for a micro-batch of so many frames: at least one, even where there is no frame."""
        if self.depth_frames is not None:
            return self.depth_frames
        return max(1, self.min_depth_frames, math.ceil(self.depth_fraction * frames))

    @property
    def rank(self) -> int:
        """Data-parallel rank of this process."""
        if self.data_parallel_rank is not None:
            return self.data_parallel_rank
        return torch.distributed.get_rank() if _distributed() else 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
