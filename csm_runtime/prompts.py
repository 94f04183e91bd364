"""A call's prompt through the backbone, without the part of it that has been there before.

A prompt with references is text and sound in turn. It goes through the backbone up to the end of each of its sounds and then
to its end, whether any of it is known or not: what a hit leaves out has been computed in the same pieces before, so that keys,
values and tokens of a hit are those of a miss, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csm_runtime.adapters import hf_call
from csm_runtime.adapters.hf_passes import Passes, Prefilled
from csm_runtime.metrics import Metrics
from csm_runtime.voices import Profile, Voices, prompt_digests

logger = logging.getLogger("csm_runtime")


@dataclass
class Prompt:
    """A prompt after its prefill, with the frames that had been made of its answer."""

    filled: Prefilled
    mask: Tensor | None
    """``[N, T]`` 1 where a position counts, or None for all."""
    positions: Tensor
    """``[N, T]`` or ``[1, T]``, rotary."""


class Prompts:
    """Prompts of one model, and the voices in them.

    Args:
        model: transformers' CSM.
        voices: where prefixes are kept, or None.
        fingerprint: of everything that keys and values depend on besides the prompt; asked for at each prompt with sound.
        metrics: where faults are counted.
    """

    def __init__(self, model: Any, voices: Voices | None, fingerprint: Callable[[], str], metrics: Metrics) -> None:
        self._model, self.voices, self._fingerprint, self._metrics = model, voices, fingerprint, metrics

    def prefill(self, passes: Passes, request: hf_call.Request, made: Tensor, known: bool = True) -> Prompt:
        """Run a call's prompt through the backbone.

        Args:
            passes: what it goes through.
            request: the call.
            made: ``[N, n, codebooks]`` frames that have been made for it.
            known: whether what is known of the prompt may be used, and what is new be kept.
        """
        sounds = hf_call.sounds_of(self._model, request.input_ids, request.prompt, request.mask)
        if known and self.voices is not None and sounds:
            try:
                return self._from_voices(passes, request, made, sounds)
            except Exception as error:  # the prompt can go through whole, as it does without voices
                what = f"voices cannot be used: {type(error).__name__}: {str(error).strip()[:200]}"
                if self._metrics.fault(what):
                    logger.warning(what, exc_info=True)
        x, mask, positions = hf_call.prompt_with_frames(self._model, request, made)
        return Prompt(passes.prefill(x, mask, positions), mask, positions)

    def add(self, passes: Passes, inputs: dict[str, Any], meta: dict[str, str | int | float], pinned: bool) -> Profile:
        """Keep a reference before anybody speaks.

        Args:
            passes: what it goes through.
            inputs: of ``generate()``: a single row that ends with the end of a sound.
            meta: whatever else is to be known of it.
            pinned: keep it whatever else is put.

        Raises:
            ValueError: another prompt than that.
        """
        assert self.voices is not None
        ids = inputs["input_ids"]
        sounds = hf_call.sounds_of(self._model, ids, inputs, inputs.get("attention_mask"))
        if not sounds:
            raise ValueError(
                "a voice must be one row of text and sound in turn, with input_values and input_values_cutoffs, as the "
                f"processor makes it of one conversation; got input_ids {tuple(ids.shape)}"
            )
        end = hf_call.after(sounds[-1])
        if end != ids.shape[1]:
            raise ValueError(
                f"a voice must end with the end of its last sound, got {ids.shape[1] - end} more positions; leave out the "
                "text that is to be spoken"
            )
        positions = torch.arange(end, device=ids.device)[None]
        mark = self._fingerprint()
        found, profile = self._prefix(passes, ids, positions, sounds, mark, inputs.get("embeds"))
        return self._keep(found, profile, ids, sounds, mark, meta, pinned)

    # ------------------------------------------------------------------------------------------------------ inside

    def _from_voices(
        self, passes: Passes, request: hf_call.Request, made: Tensor, sounds: list[hf_call.Sound]
    ) -> Prompt:
        model, ids, positions = self._model, request.input_ids, request.positions
        mark = self._fingerprint()
        embeds = request.prompt.get("embeds")
        filled, profile = self._prefix(passes, ids, positions, sounds, mark, embeds)
        end = hf_call.after(sounds[-1])
        known = profile is not None and profile.positions == end
        if not known and bool(filled.hidden.isfinite().all()):  # what NaN means is for others to say
            self._keep(filled, profile, ids, sounds, mark, {}, False)
        x = hf_call.embedded_with(model, ids[:, end:], []) if embeds is None else embeds[:, end:]
        if made.shape[1]:
            x = torch.cat([x, model.backbone_model.embed_tokens(made)], dim=1)
            steps = torch.arange(1, made.shape[1] + 1, device=positions.device)
            positions = torch.cat([positions, positions[:, -1:] + steps], dim=1)
        if x.shape[1]:
            filled = passes.prefill(x, None, positions[:, end:], filled)
        return Prompt(filled, None, positions)

    def _prefix(
        self,
        passes: Passes,
        ids: Tensor,
        positions: Tensor,
        sounds: list[hf_call.Sound],
        mark: str,
        embeds: Tensor | None,
    ) -> tuple[Prefilled, Profile | None]:
        """Everything up to the end of the last sound, and the profile that it began with."""
        assert self.voices is not None
        ends = [hf_call.after(sound) for sound in sounds]
        stored = self.voices.lengths(mark, ends[-1])
        digests = _digests(ids, sounds, [length for length in stored if length in ends])
        profile = self.voices.longest(mark, digests.get, ends[-1])
        filled, start = Prefilled([], ids.new_zeros(0)), 0
        if profile is not None:
            profile, start = profile.to(ids.device), profile.positions
            filled = Prefilled(profile.layers(), profile.tensors["hidden"][None])
        for sound, end in zip(sounds, ends):
            if end <= start:
                continue
            if embeds is None:
                x = hf_call.embedded_with(self._model, ids[:, start:end], [hf_call.codes_of(self._model, sound)])
            else:
                x = embeds[:, start:end]
            filled = passes.prefill(x, None, positions[:, start:end], filled if start else None)
            start = end
        return filled, profile

    def _keep(
        self,
        filled: Prefilled,
        profile: Profile | None,
        ids: Tensor,
        sounds: list[hf_call.Sound],
        mark: str,
        meta: dict[str, str | int | float],
        pinned: bool,
    ) -> Profile:
        assert self.voices is not None
        end = hf_call.after(sounds[-1])
        if profile is None or profile.positions < end or meta:
            profile = Profile(
                key=_digests(ids, sounds, [end])[end],
                fingerprint=mark,
                positions=end,
                tensors={
                    "keys": torch.stack([keys[0] for keys, _ in filled.layers]),
                    "values": torch.stack([values[0] for _, values in filled.layers]),
                    "hidden": filled.hidden[0].float(),
                },
                meta={"sounds": len(sounds), **meta},
            )
            self.voices.put(profile, pinned)
        elif pinned:
            self.voices.pin(profile.key)
        return profile


def _digests(ids: Tensor, sounds: list[hf_call.Sound], lengths: list[int]) -> dict[int, str]:
    # Of a codec in bf16 the sound comes in bf16: another digest than fp32 of the same recording, and another encoding.
    # Codes are exact in fp32.
    contents = [sound.content if sound.content.is_floating_point() else sound.content.float() for sound in sounds]
    segments = [(sound.start, sound.end, content.reshape(-1)) for sound, content in zip(sounds, contents)]
    return prompt_digests(ids[0], segments, lengths)
