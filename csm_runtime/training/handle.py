"""``accelerate(model, training=...)``: the stock model's ``forward(labels=...)`` with amortization, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from csm_runtime.adapters import hf, hf_training
from csm_runtime.training.config import CsmTrainingConfig


def accelerate_training(model: Any, config: CsmTrainingConfig | bool = True) -> Any:
    """Make ``model(**batch).loss`` cheap, in place; ``accelerate(model, training=config)`` is the same call.

    Args:
        model: transformers' ``CsmForConditionalGeneration``, in any floating dtype, before or after ``get_peft_model``
            (pass the CSM itself), and before DDP, ``fully_shard`` and ``torch.compile``.
        config: how to train; True is the default config, 1/16 of the frames.

    Returns:
        The same object, its codec frozen, which no loss reaches. ``model.training_acceleration`` is the handle. Without
        labels, in ``generate`` and after ``model.training_acceleration.restore()`` it computes what it did before. In eval
        mode labels mean all frames.

    Raises:
        TypeError: the model is not a CSM, or the config is of another type.
    """
    if not hf.matches(model):
        raise TypeError(
            f"model must be transformers' CsmForConditionalGeneration, got {type(model).__module__}."
            f"{type(model).__qualname__}; of a PEFT model pass model.get_base_model()"
        )
    if config is True:
        config = CsmTrainingConfig()
    if not isinstance(config, CsmTrainingConfig):
        raise TypeError(f"training must be True or a CsmTrainingConfig, got {config!r}")
    previous = model.__dict__.get(hf_training.HANDLE)
    if isinstance(previous, TrainingAcceleration):
        previous.restore()
    model.__dict__[hf_training.HANDLE] = TrainingAcceleration(model, config)
    return model


class TrainingAcceleration:
    """What ``model.training_acceleration`` is.

    Attributes:
        config: the training's config; may be replaced between steps.
    """

    def __init__(self, model: Any, config: CsmTrainingConfig) -> None:
        self.config = config
        self._model = model
        self._draws = torch.zeros((), dtype=torch.int64)
        self._changes = hf_training.install(model, config.fused_layers)
        # The codec gets no gradient in training; DDP would wait for one of every parameter that asks.
        self._frozen = [p for p in model.codec_model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a pickle of the model is a stock model: accelerate it again in its new process

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingAcceleration:
        twin = TrainingAcceleration.__new__(TrainingAcceleration)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def next_draw(self) -> Tensor:
        """Number of a draw that the model makes for itself, for a batch that came without one."""
        number = self._draws.clone()
        self._draws.add_(1)
        return number

    def state_dict(self) -> dict[str, int]:
        """Seed and draws made by the model itself, for an exact resume without the collator's draws."""
        return {"seed": self.config.seed, "draws": int(self._draws)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is of another seed, whose draws would not be these.
        """
        if state["seed"] != self.config.seed:
            raise ValueError(f"state is of a run with seed {state['seed']}, the config says seed={self.config.seed}")
        self._draws.fill_(state["draws"])

    def restore(self) -> None:
        """Give the stock model back: nothing of ours is left on it."""
        hf_training.remove(self._changes)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._model.__dict__.pop(hf_training.HANDLE, None)
