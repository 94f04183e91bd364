"""Bad input to ``generate`` of transformers' CSM, refused before anything is touched.

The stock model answers most of these with an index error inside an embedding, a shape mismatch inside a mask, or noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csm_runtime.adapters.spec import ModelSpec


def check_arguments(model: Any, spec: ModelSpec, arguments: dict[str, Any]) -> None:
    """Refuse bad input before anything of the model or its generation configs is touched.

    Args:
        model: the model.
        spec: its shape.
        arguments: what ``generate`` was called with, by name.

    Raises:
        ValueError: names the argument, what came and what was wanted.
    """
    _check_sampling(model, arguments)
    ids = arguments.get("input_ids")
    for name in ("input_ids", "attention_mask", "input_values", "input_values_cutoffs"):
        value = arguments.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ids is None:
        return
    if ids.ndim not in (2, 3):
        raise ValueError(f"input_ids must have 2 dimensions (text) or 3 (codes), got shape {tuple(ids.shape)}")
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"input_ids is empty, got shape {tuple(ids.shape)}; at least one position is needed")
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must hold integer token ids, got {ids.dtype}")
    if ids.ndim == 3 and ids.shape[2] != spec.codebooks:
        raise ValueError(
            f"input_ids has {ids.shape[2]} codebooks in its last dimension, the model has {spec.codebooks}"
        )
    limit, what = (spec.vocab, "codes") if ids.ndim == 3 else (model.config.text_vocab_size, "text token ids")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"input_ids holds {what} from {low} to {high}; they must be from 0 to {limit - 1}")
    tokens, most = ids.shape[1], spec.backbone.positions
    if tokens > most:
        raise ValueError(
            f"input_ids has {tokens} positions, the model was made for {most} (config.max_position_embeddings); drop old "
            "turns of the conversation"
        )
    _check_mask(arguments.get("attention_mask"), ids)
    _check_audio(model, ids, arguments)


def _check_sampling(model: Any, arguments: dict[str, Any]) -> None:
    backbone = arguments.get("generation_config") or model.generation_config
    for prefix, config in (("", backbone), ("depth_decoder_", model.depth_decoder.generation_config)):
        names = ("do_sample", "temperature", "top_k", "top_p")
        given = [arguments.get(prefix + name) for name in names]
        values = [getattr(config, name, None) if value is None else value for name, value in zip(names, given)]
        do_sample, temperature, top_k, top_p = values
        if not do_sample:
            continue
        if temperature is not None and not (isinstance(temperature, (int, float)) and temperature > 0):
            raise ValueError(
                f"{prefix}temperature must be a number above 0, got {temperature!r}; for greedy pass {prefix}do_sample=False"
            )
        if top_k is not None and not (isinstance(top_k, int) and top_k >= 0):
            raise ValueError(f"{prefix}top_k must be an integer of at least 0 (0 switches it off), got {top_k!r}")
        if top_p is not None and not (isinstance(top_p, (int, float)) and 0.0 <= top_p <= 1.0):
            raise ValueError(f"{prefix}top_p must be a number from 0 to 1, got {top_p!r}")


def _check_mask(mask: Any, ids: Tensor) -> None:
    if mask is None:
        return
    if mask.shape != ids.shape[:2]:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids needs {tuple(ids.shape[:2])}")
    empty = (mask == 0).all(-1).nonzero()
    if len(empty):
        raise ValueError(f"attention_mask hides every position of row {int(empty[0])}; at least one must be 1")


def _check_audio(model: Any, ids: Tensor, arguments: dict[str, Any]) -> None:
    audio, cutoffs = arguments.get("input_values"), arguments.get("input_values_cutoffs")
    if audio is None and cutoffs is None:
        return
    if audio is None or cutoffs is None:
        missing = "input_values" if audio is None else "input_values_cutoffs"
        raise ValueError(f"input_values and input_values_cutoffs belong together, {missing} is missing")
    if ids.ndim != 2:
        raise ValueError(f"input_values needs text input_ids of 2 dimensions, got shape {tuple(ids.shape)}")
    if audio.ndim != 3 or audio.shape[0] != ids.shape[0]:
        raise ValueError(f"input_values must be [{ids.shape[0]}, channels, samples], got shape {tuple(audio.shape)}")
    if cutoffs.ndim != 2 or cutoffs.shape[0] != ids.shape[0]:
        raise ValueError(f"input_values_cutoffs must be [{ids.shape[0]}, segments], got shape {tuple(cutoffs.shape)}")
    for row, (padded, tokens) in enumerate(zip(cutoffs.tolist(), ids)):
        ends = [end for end in padded if end >= 0]
        if any(b <= a for a, b in zip([0, *ends], ends)):
            raise ValueError(f"input_values_cutoffs of row {row} must be positive and increasing, got {ends}")
        if ends and ends[-1] > audio.shape[-1]:
            raise ValueError(
                f"input_values_cutoffs of row {row} ends at sample {ends[-1]}, input_values has {audio.shape[-1]}"
            )
        lengths = torch.tensor([b - a for a, b in zip([0, *ends], ends)], dtype=torch.long)
        frames = int(model.codec_model.get_encoded_length(lengths).sum()) if ends else 0
        slots = int((tokens == model.config.audio_token_id).sum())
        if frames != slots:
            raise ValueError(
                f"input_values_cutoffs of row {row} gives {frames} frames of audio, input_ids has {slots} audio tokens "
                f"(id {model.config.audio_token_id}); prepare both with the model's processor"
            )
