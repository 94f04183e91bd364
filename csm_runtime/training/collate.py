"""From pre-tokenised conversations to a batch: sequences, labels, counts, and the frames drawn for the depth decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils.data
from torch import Tensor

from csm_kernels.frames import sample_frames
from csm_runtime.training.config import CsmTrainingConfig

IGNORED = -100


class CsmDataCollator:
    """Makes batches of conversations whose audio is codes already; give it to a ``DataLoader`` as ``collate_fn``.

    An example is one turn, ``{"text_ids": [n], "codes": [frames, codebooks]}``, or a conversation, ``{"turns": [turn, ...]}``
    with ``"train": False`` in turns that are context only: they are read and no loss is taken of them. A turn becomes its
    text ids as they are, an audio token per frame and an end-of-speech token, whose target is the end-of-speech frame.
    Rows are padded on the right, where a causal model needs no mask.

    The frames of the depth decoder are drawn here, anew for every batch and never in a dataset, as a pure function of
    (seed, step, micro-step, rank). In the worker processes of a ``DataLoader``, which do not know the step, nothing is
    drawn and the model draws for itself.

    Args:
        model_config: ``model.config``.
        config: the training's.
        rank: data-parallel rank; default: the config's.
        gradient_accumulation: micro-batches per optimizer step; the step counts up after so many batches.
        pad_to_multiple_of: widths are rounded up to it, for fewer shapes.

    A batch holds ``input_ids`` ``[B, S]``, ``audio_codes`` ``[B, S, K]`` (0 where there is no audio), ``labels`` ``[B, S]``
    as stock has them (the audio and end-of-speech tokens or -100), ``depth_index`` ``[M]`` int64 (-1 in empty rows), and
    the scalars ``num_backbone_targets``, ``num_depth_targets`` and ``num_ranks`` (1), which
    :func:`~csm_runtime.training.share_counts` makes those of the whole step.

    Example::

        collate = CsmDataCollator(model.config, config)
        loader = DataLoader(examples, batch_size=8, shuffle=True, collate_fn=collate)
    """

    def __init__(
        self,
        model_config: Any,
        config: CsmTrainingConfig,
        *,
        rank: int | None = None,
        gradient_accumulation: int = 1,
        pad_to_multiple_of: int = 1,
    ) -> None:
        for name, value in (
            ("gradient_accumulation", gradient_accumulation),
            ("pad_to_multiple_of", pad_to_multiple_of),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.config = config
        self._model = model_config
        self._rank = rank
        self._accumulation = gradient_accumulation
        self._multiple = pad_to_multiple_of
        self._calls = 0

    @property
    def step(self) -> int:
        """The optimizer step the next batch belongs to."""
        return self._calls // self._accumulation

    def set_step(self, step: int) -> None:
        """Go on from the beginning of an optimizer step, as after a resume."""
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an integer from 0 on, got {step!r}")
        self._calls = step * self._accumulation

    def state_dict(self) -> dict[str, int]:
        """Seed and batches so far: all that an exact resume needs of the draws."""
        return {"seed": self.config.seed, "batches": self._calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is of another seed, whose draws would not be these.
        """
        if state["seed"] != self.config.seed:
            raise ValueError(f"state is of a run with seed {state['seed']}, the config says seed={self.config.seed}")
        self._calls = int(state["batches"])

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch.

        Raises:
            ValueError: no examples, or one of another form; names it and says what came and what was wanted.
        """
        if not examples:
            raise ValueError("examples is empty; a batch needs at least one")
        rows = [self._row(example, place) for place, example in enumerate(examples)]
        width = max(len(ids) for ids, _, _ in rows)
        width += -width % self._multiple
        books, pad = self._model.num_codebooks, self._model.pad_token_id
        ids = torch.full((len(rows), width), 0 if pad is None else pad)
        labels = torch.full((len(rows), width), IGNORED)
        codes = torch.zeros(len(rows), width, books, dtype=torch.int64)
        for place, (row_ids, row_labels, row_codes) in enumerate(rows):
            ids[place, : len(row_ids)] = row_ids
            labels[place, : len(row_ids)] = row_labels
            codes[place, : len(row_ids)] = row_codes
        return self._finished({"input_ids": ids, "audio_codes": codes, "labels": labels})

    def _finished(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the counts and the draw."""
        trained = batch["labels"] != IGNORED
        trained[:, 0] = False  # there is no state before the first position that could predict it
        frames = int(trained.sum())
        batch["num_backbone_targets"] = torch.tensor(frames)
        batch["num_depth_targets"] = torch.tensor(frames * (self._model.num_codebooks - 1))
        batch["num_ranks"] = torch.tensor(1)
        if torch.utils.data.get_worker_info() is not None:
            return batch
        step, micro_step = divmod(self._calls, self._accumulation)
        self._calls += 1
        sample = sample_frames(
            trained,
            self.config.rows(frames),
            seed=self.config.seed,
            step=step,
            micro_step=micro_step,
            rank=self.config.rank if self._rank is None else self._rank,
            keep=batch["labels"] == self._model.audio_eos_token_id,
        )
        batch["depth_index"] = torch.where(sample.weight > 0, sample.index, -1)
        return batch

    def _row(self, example: Mapping[str, Any], place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and codes of one example."""
        name = f"examples[{place}]"
        if not isinstance(example, Mapping):
            raise ValueError(f"{name} must be a dict, got {type(example).__name__}")
        turns = example.get("turns", [example])
        if not isinstance(turns, Sequence) or not turns:
            raise ValueError(f"{name}['turns'] must be a list of at least one turn, got {turns!r}")
        model, parts = self._model, []
        for number, turn in enumerate(turns):
            here = f"{name}['turns'][{number}]" if "turns" in example else name
            text = _ids(turn, "text_ids", here)
            frames = self._codes(turn, here)
            marks = torch.tensor([model.audio_token_id] * len(frames) + [model.audio_eos_token_id])
            marks = marks[: len(frames) + 1 if len(frames) else 0]  # a turn of text alone has no audio to end
            ends = torch.full((len(marks) - len(frames), model.num_codebooks), model.codebook_eos_token_id)
            silent = torch.zeros(len(text), model.num_codebooks, dtype=torch.int64)
            labels = torch.full((len(text) + len(marks),), IGNORED)
            if turn.get("train", True):
                labels[len(text) :] = marks
            parts.append((torch.cat([text, marks]), labels, torch.cat([silent, frames, ends])))
        ids, labels, codes = (torch.cat(tensors) for tensors in zip(*parts))
        if not len(ids):
            raise ValueError(f"{name} has neither text nor audio")
        return ids, labels, codes

    def _codes(self, turn: Mapping[str, Any], name: str) -> Tensor:
        books = self._model.num_codebooks
        if turn.get("codes") is None:
            return torch.zeros(0, books, dtype=torch.int64)
        codes = torch.as_tensor(turn["codes"])
        if codes.ndim != 2 or codes.shape[1] != books or codes.is_floating_point():
            raise ValueError(
                f"{name}['codes'] must be integers [frames, {books}], got {codes.dtype} {tuple(codes.shape)}"
            )
        vocab = min(self._model.vocab_size, self._model.depth_decoder_config.vocab_size)
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < vocab):
            raise ValueError(
                f"{name}['codes'] must be from 0 to {vocab - 1}, got values from {int(codes.min())} to {int(codes.max())}"
            )
        return codes.long()


def _ids(turn: Mapping[str, Any], key: str, name: str) -> Tensor:
    if key not in turn:
        raise ValueError(f"{name} has no {key!r}; it has {sorted(turn)}")
    ids = torch.as_tensor(turn[key])
    if ids.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"{name}[{key!r}] must be integers [n], got {ids.dtype} {tuple(ids.shape)}")
    return ids.long()
