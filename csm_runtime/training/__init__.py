"""Training and fine-tuning CSM with compute amortization: the depth decoder learns from a fraction of the frames.

    config = CsmTrainingConfig(depth_fraction=1 / 16, seed=0)
    model = accelerate(model, training=config)
    collate = CsmDataCollator(model.config, config)
    for batches in steps:                       # the micro-batches of one optimizer step, made by collate
        share_counts(batches)
        for batch in batches:
            model(**batch).loss.backward()

docs/training.md explains what is estimated, what is saved and what is not.
"""

from csm_runtime.training.collate import CsmDataCollator
from csm_runtime.training.config import CsmTrainingConfig
from csm_runtime.training.counts import share_counts
from csm_runtime.training.handle import TrainingAcceleration, accelerate_training
from csm_runtime.training.noise import DepthGradientNoiseScale, NoiseReading

from csm_runtime.adapters.hf_trainer import csm_trainer  # isort: skip  # it needs what is above

__all__ = [
    "CsmDataCollator",
    "CsmTrainingConfig",
    "DepthGradientNoiseScale",
    "NoiseReading",
    "TrainingAcceleration",
    "accelerate_training",
    "csm_trainer",
    "share_counts",
]
