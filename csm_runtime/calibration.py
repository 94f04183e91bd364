"""What fidelity is measured on, against and with: prompts, speech after them, the stock model's word on every frame of it.

The word is that of :mod:`csm_runtime.replay` on the stock model's own weights, teacher-forced and in fp32: the truth that
whatever is lowered, compiled or fused is held against.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_runtime import fidelity
from csm_runtime.adapters import hf, hf_call
from csm_runtime.adapters.hf_passes import Passes
from csm_runtime.checks import groups
from csm_runtime.compiling import Progress
from csm_runtime.generate import plain_mode
from csm_runtime.metrics import Metrics
from csm_runtime.precision import PrecisionPolicy
from csm_runtime.replay import Pass, Replay
from csm_runtime.weights import Packed, unlowered

_CHUNK = 64
"""Frames whose depth logits are made at once: 64 MB of activations and 16 MB of logits at CSM-1B's size."""
_STRICT = "codebook 0"
_PROMPTS, _PROMPT = 2, 12
"""Made-up prompts, and text tokens of each, where nobody gives any."""


@dataclass(frozen=True)
class Figures:
    """How far logits of some codebooks lie from the truth."""

    kl_nats: float
    """KL divergence from the truth, mean over frames and codebooks."""
    top1: float
    """Share of frames and codebooks whose greedy token is the truth's."""
    near: float
    """Share where it is, or a near tie with it."""
    sqnr_db: float
    """Of the logits; infinite where they are equal."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON, which has no infinity: a string then."""
        return {name: value if math.isfinite(value) else str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Any) -> Figures:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: other fields, or a figure that cannot be.
        """
        names = tuple(one.name for one in fields(cls))
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"figures must be {names}, got {sorted(data) if isinstance(data, Mapping) else data!r}")
        least = {"kl_nats": 0.0, "top1": 0.0, "near": 0.0, "sqnr_db": -math.inf}
        most = {"kl_nats": math.inf, "top1": 1.0, "near": 1.0, "sqnr_db": math.inf}
        values = {name: _number(value) for name, value in data.items()}
        for name, value in values.items():
            if not least[name] <= value <= most[name]:
                raise ValueError(f"{name} must be from {least[name]:g} to {most[name]:g}, got {data[name]!r}")
        return cls(**values)


def _number(value: Any) -> float:
    """A figure as :meth:`Figures.to_dict` writes it; NaN for whatever else."""
    if value in ("inf", "-inf") or (type(value) in (int, float) and abs(value) <= sys.float_info.max):
        return float(value)
    return math.nan


Fidelity = dict[str, Figures]
"""Figures by group of codebooks, see :func:`csm_runtime.checks.groups`."""


@dataclass(frozen=True)
class Thresholds:
    """What fidelity has to hold. Codebook 0, the words, has limits of its own; the others hold for every other group.

    Args:
        max_kl0: nats, mean KL divergence of codebook 0's logits from the stock model's.
        max_kl: likewise of the other codebooks'.
        min_top1_0: share of frames whose greedy codebook 0 is the stock model's.
        min_top1: likewise of the other codebooks.
        min_near: share of greedy tokens, of any codebook, that are the stock model's or near ties with it.
        tie: nats by which the stock model may like a near tie less than its own choice: 0.5 is 0.6 times as likely.
    """

    max_kl0: float = 1e-3
    max_kl: float = 5e-3
    min_top1_0: float = 0.95
    min_top1: float = 0.9
    min_near: float = 0.99
    tie: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"thresholds: {name} must be a finite number of at least 0, got {value!r}")
            if name.startswith("min_") and value > 1:
                raise ValueError(f"thresholds: {name} is a share, at most 1, got {value!r}")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Thresholds:
        """From ``name=value`` texts, each one or several with commas.

        Raises:
            ValueError: another form, name or value.
        """
        given = [part.partition("=") for text in texts for part in text.split(",")]
        names = {one.name for one in fields(cls)}
        for name, equals, value in given:
            if name.strip() not in names or not equals:
                raise ValueError(f"thresholds must be NAME=VALUE with a name of {sorted(names)}, got {name + equals!r}")
            try:
                float(value)
            except ValueError:
                raise ValueError(f"thresholds: {name.strip()} must be a number, got {value!r}") from None
        return cls(**{name.strip(): float(value) for name, _, value in given})

    def max_kl_of(self, group: str) -> float:
        """The limit of one group's KL divergence."""
        return self.max_kl0 if group == _STRICT else self.max_kl

    def excess(self, found: Fidelity, codebooks: int = 2) -> dict[str, str]:
        """What does not hold, in words, by group of codebooks; empty where all of it holds.

        A group that a model with this many codebooks has, and that nothing was measured of, does not hold.
        """
        out = {group: f"nothing was measured of {group}" for group in groups(codebooks) if group not in found}
        for group, one in found.items():
            least = self.min_top1_0 if group == _STRICT else self.min_top1
            if not one.kl_nats <= self.max_kl_of(group):
                out[group] = f"KL of {group} is {one.kl_nats:.2g} nats, the limit {self.max_kl_of(group):.2g}"
            elif not one.top1 >= least:
                out[group] = (
                    f"{one.top1:.1%} of the greedy tokens of {group} are the stock model's, the limit {least:.1%}"
                )
            elif not one.near >= self.min_near:
                out[group] = (
                    f"{one.near:.1%} of those of {group} are or nearly tie with them, the limit {self.min_near:.1%}"
                )
        return out


@dataclass(frozen=True)
class Calibration:
    """What to measure fidelity on, and how much of it to keep.

    Args:
        prompts: keyword arguments of the stock ``generate()`` each, as a processor makes them: ``input_ids`` and, where
            there are any, ``attention_mask``, ``input_values`` and ``input_values_cutoffs``. A prompt may bring ``codes``
            as well, ``[F, codebooks]`` of the speech that follows it; for prompts of several rows ``[N, F, codebooks]``.
            Recordings of the use you have in mind are worth more than anything else. Empty: made-up text.
        frames: of speech that the stock model makes for each row of a prompt without codes, on the stock path.
        seed: of that speech; None makes it greedily.
        thresholds: what to hold.
        start: the policy that tuning starts from, by name or as such; its depth heads must have one format.
        state: a JSON file in which tuning notes every evaluation, so that one that was interrupted goes on there.
    """

    prompts: Sequence[Mapping[str, Any]] = ()
    frames: int = 32
    seed: int | None = 0
    thresholds: Thresholds = field(default_factory=Thresholds)
    start: str | PrecisionPolicy = "smallest"
    state: str | Path | None = None

    def __post_init__(self) -> None:
        if type(self.frames) is not int or self.frames < 2:
            raise ValueError(f"calibration: frames must be an integer of at least 2, got {self.frames!r}")
        if not isinstance(self.thresholds, Thresholds):
            raise ValueError(f"calibration: thresholds must be Thresholds, got {self.thresholds!r}")
        if isinstance(self.prompts, (str, Mapping)) or not isinstance(self.prompts, Sequence):
            raise ValueError(
                f"calibration: prompts must be a list of generate() inputs, got {type(self.prompts).__name__}"
            )
        for prompt in self.prompts:
            if not isinstance(prompt, Mapping) or "input_ids" not in prompt:
                raise ValueError("calibration: a prompt must be a dict of generate() inputs with input_ids")
            unknown = set(prompt) - set(_INPUTS)
            if unknown:
                raise ValueError(f"calibration: a prompt may hold {_INPUTS}, got {sorted(unknown)[0]!r} as well")
            _check_prompt(prompt)


def calibration_of(given: Any) -> Calibration:
    """A calibration as such, from a list of prompts, or the default one from None.

    Raises:
        ValueError: something else, or an empty list.
    """
    if given is None or isinstance(given, Calibration):
        return given or Calibration()
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise ValueError(
            "calibration must be a Calibration, a list of generate() inputs, the path of a saved result or None, got "
            f"{type(given).__name__}"
        )
    if not len(given):
        raise ValueError("calibration must hold prompts, got an empty list; None takes made-up text")
    return Calibration(given)


def _check_prompt(prompt: Mapping[str, Any]) -> None:
    for name, value in prompt.items():
        if not isinstance(value, Tensor) and (value is not None or name == "input_ids"):
            raise ValueError(f"calibration: {name} of a prompt must be a tensor, got {type(value).__name__}")
    ids = prompt["input_ids"]
    if ids.ndim not in (2, 3) or ids.numel() == 0:
        raise ValueError(
            "calibration: input_ids of a prompt must be [N, T], or [N, T, codebooks], of at least one row and one token, "
            f"got {tuple(ids.shape)}"
        )
    for name in ("attention_mask", "input_values_cutoffs"):
        value, wanted = prompt.get(name), ids.shape[: 2 if name == "attention_mask" else 1]
        if value is not None and value.shape[: len(wanted)] != wanted:
            raise ValueError(
                f"calibration: {name} of a prompt must begin with {tuple(wanted)} as input_ids does, got "
                f"{tuple(value.shape)}"
            )


_INPUTS = ("input_ids", "attention_mask", "input_values", "input_values_cutoffs", "codes")


class Passage(NamedTuple):
    """One row: a prompt and the speech after it."""

    x: Tensor
    """``[1, T, D]`` the prompt's embeddings, in the model's dtype."""
    mask: Tensor
    """``[1, T]`` int64, 1 where a position counts."""
    positions: Tensor
    """``[1, T]`` int64 rotary positions."""
    codes: Tensor
    """``[F, codebooks]`` int64."""


def made_up_prompts(model: Any) -> list[dict[str, Tensor]]:
    """A few text tokens that mean nothing, none of them special."""
    config, device = model.config, model.device
    special = {config.bos_token_id, config.pad_token_id, config.audio_token_id, config.audio_eos_token_id}
    ids = [k for k in (37 * i % config.text_vocab_size for i in range(8 * _PROMPT)) if k not in special]
    rows = [ids[k * _PROMPT : (k + 1) * _PROMPT] for k in range(_PROMPTS)]
    return [{"input_ids": torch.tensor([row], device=device)} for row in rows]


def rows_of(prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Every row of every prompt as a prompt of its own; ``codes`` of each ``[F, codebooks]``.

    Raises:
        ValueError: codes that do not fit.
    """
    rows = []
    for prompt in prompts:
        inputs = {name: value for name, value in prompt.items() if value is not None}
        count, codes = len(inputs["input_ids"]), inputs.pop("codes", None)
        if codes is not None and codes.ndim == 2:
            codes = codes[None]
        if codes is not None and (codes.ndim != 3 or len(codes) != count or codes.shape[1] < 2):
            raise ValueError(
                f"calibration: codes must be [F, codebooks] of at least 2 frames, one such for each of the {count} rows of "
                f"the prompt, got {tuple(prompt['codes'].shape)}"
            )
        for i in range(count):
            row = {name: value[i : i + 1] for name, value in inputs.items()}
            if "input_values_cutoffs" in row and int(row["input_values_cutoffs"].max()) < 0:
                del row["input_values"], row["input_values_cutoffs"]  # a row without sound in a batch with some
            rows.append(row if codes is None else {**row, "codes": codes[i]})
    return rows


def digest(rows: Sequence[Mapping[str, Tensor]]) -> str:
    """A hash of the prompts."""
    out = hashlib.sha256()
    for row in rows:
        for name, value in sorted(row.items()):
            out.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
            out.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


class Ticker:
    """A streamer that moves a progress bar, once for each frame: the prompt comes first."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._prompt_seen = bar, False

    def put(self, value: Tensor) -> None:
        """Take the prompt or a frame."""
        if self._prompt_seen:
            self._bar.advance("frame")
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


def speak(model: Any, row: Mapping[str, Tensor], frames: int, seed: int | None, streamer: Any) -> Tensor:
    """Speech of the stock model after a prompt, ``[F, codebooks]``; fewer than ``frames`` where it ends before.

    Args:
        model: stock or accelerated: the stock path makes it either way.
        row: a prompt of one row.
        frames: at most.
        seed: of the sampling, at temperature 0.9 from the best 50; None is greedy.
        streamer: gets the prompt, and each frame as it is made.
    """
    how: dict[str, Any] = {"do_sample": seed is not None}
    if seed is not None:
        how |= {"temperature": 0.9, "top_k": 50}
    how |= {f"depth_decoder_{name}": value for name, value in how.items()}
    depth = model.depth_decoder.generation_config
    before = dict(vars(depth))
    with torch.random.fork_rng(), plain_mode():
        torch.manual_seed(seed or 0)
        try:
            made = type(model).generate(model, **row, **how, max_new_tokens=frames, streamer=streamer)
        finally:  # the stock generate writes depth_decoder_* arguments into the model's own config
            vars(depth).clear()
            vars(depth).update(before)
    return made[0] if row["input_ids"].ndim == 2 else made[0, row["input_ids"].shape[1] :]


def passage_of(model: Any, row: Mapping[str, Tensor]) -> Passage:
    """A row with its codes, ready to be fed.

    Raises:
        ValueError: codes that are none of the model's.
    """
    codes, config = row["codes"].to(model.device).long(), model.config
    if codes.shape[1] != config.num_codebooks:
        raise ValueError(f"calibration: codes must have {config.num_codebooks} codebooks, got {codes.shape[1]}")
    first, rest = config.vocab_size, config.depth_decoder_config.vocab_size
    limits = torch.tensor([first] + [rest] * (codes.shape[1] - 1), device=codes.device)
    if bool(((codes < 0) | (codes >= limits)).any()):
        raise ValueError(
            f"calibration: codes must be from 0 to {first - 1} in codebook 0 and to {rest - 1} in the others, got "
            f"{int(codes.min())} to {int(codes.max())}"
        )
    with plain_mode():
        x, mask, positions = hf_call.embedded(model, {name: v for name, v in row.items() if name != "codes"})
    return Passage(x, mask, positions, codes)


class Reference:
    """The stock model's word on every frame of some passages, and the way to ask other weights for theirs.

    All frames stand in one row, passage after passage.

    Args:
        model: a CSM with its own weights.
        passages: to be fed.

    Attributes:
        codes: ``[F, codebooks]`` int64.
        hidden: ``[F, D]`` fp32, the backbone's normalised hidden states.
        first: ``[F, vocab]`` fp32, codebook 0's logits.
        rest: ``[F, codebooks - 1, depth_vocab]`` fp32.

    Raises:
        ValueError: more positions than the model has, or logits that are not finite.
    """

    def __init__(self, model: Any, passages: Sequence[Passage]) -> None:
        self.spec, self.dtype = hf.read_spec(model), hf.read_dtype(model)
        self.passages = list(passages)
        most = max(p.x.shape[1] + len(p.codes) for p in self.passages)
        if most > self.spec.backbone.positions:
            raise ValueError(
                f"calibration: a prompt and its frames take {most} positions, the model has {self.spec.backbone.positions}"
            )
        with plain_mode():
            self._rotary = hf.rotary_tables(model, most)
            self.stock = unlowered(hf.live_weights(model))
            self._prompts = [self._prompt(passage) for passage in self.passages]
            self.codes = torch.cat([passage.codes for passage in self.passages])
            self.hidden = self.backbone(self.stock, self.dtype)
            self.first, self.rest = self.logits(self.stock, self.hidden, self.dtype)
        if not (torch.isfinite(self.first).all() and torch.isfinite(self.rest).all()):
            raise ValueError(
                "the stock model's own logits are not finite on these prompts: nothing can be held against them"
            )

    def _replay(self, cache: torch.dtype) -> Replay:
        return Replay(self.spec, self._rotary, (cache, cache))

    def _prompt(self, passage: Passage) -> Pass:
        """Prompts run through the stock weights whatever the policy, as in ``generate()``."""
        args = (passage.x, passage.positions, passage.mask.bool())
        return self._replay(self.dtype).backbone(self.stock, *args)

    def backbone(self, packed: Packed, cache: torch.dtype) -> Tensor:
        """Hidden states ``[F, D]`` fp32 of all frames with these weights and a KV cache in a dtype."""
        replay, out = self._replay(cache), []
        with plain_mode():
            for passage, prompt in zip(self.passages, self._prompts):
                count = len(passage.codes) - 1
                steps = torch.arange(1, count + 1, device=passage.codes.device)
                allowed = torch.cat([passage.mask.bool(), torch.ones_like(steps, dtype=torch.bool)[None]], dim=1)
                cached = tuple([layer.to(cache) for layer in layers] for layers in (prompt.keys, prompt.values))
                fed = replay.embed(packed, passage.codes[None, :-1])
                at = passage.positions[:, -1:] + steps
                later = replay.backbone(packed, fed, at, allowed, (cached[0], cached[1]))
                out += [prompt.hidden[0, -1:], later.hidden[0]]
        return torch.cat(out)

    def logits(
        self, packed: Packed, hidden: Tensor, cache: torch.dtype, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codebook 0's and the others' logits from hidden states ``[F, D]``; after ``codes``, or after the frames' own."""
        replay, codes = self._replay(cache), self.codes if codes is None else codes
        with plain_mode():
            rest = [
                replay.depth_logits(packed, hidden[i : i + _CHUNK], codes[i : i + _CHUNK])
                for i in range(0, len(codes), _CHUNK)
            ]
            return replay.first_logits(packed, hidden), torch.cat(rest)


def stock_hidden(model: Any, passage: Passage) -> Tensor:
    """The stock backbone's normalised hidden states of a passage's frames, ``[F, D]`` in its own dtype."""
    count = len(passage.codes) - 1
    steps = torch.arange(1, count + 1, device=passage.codes.device)
    with plain_mode():
        return model.backbone_model(
            inputs_embeds=torch.cat([passage.x, model.backbone_model.embed_tokens(passage.codes[None, :-1])], dim=1),
            attention_mask=torch.cat([passage.mask, torch.ones_like(steps)[None]], dim=1),
            position_ids=torch.cat([passage.positions, passage.positions[:, -1:] + steps], dim=1),
        ).last_hidden_state[0, -count - 1 :]


def stock_logits(model: Any, passage: Passage) -> tuple[Tensor, Tensor]:
    """What the stock modules themselves say of a passage, in their own dtype: codebook 0's logits and the others', fp32."""
    passes, hidden = Passes(model, False, Metrics()), stock_hidden(model, passage)
    with plain_mode():
        return model.lm_head(hidden).float(), passes.codebook_logits(hidden, passage.codes[:, :-1])


def compare(truth: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor], tie: float) -> Fidelity:
    """Figures by group of codebooks.

    Args:
        truth: codebook 0's logits ``[F, vocab]`` and the others' ``[F, codebooks - 1, depth_vocab]``.
        made: likewise, what is held against them.
        tie: see :class:`Thresholds`.
    """
    found = {}
    for group, part in groups(truth[1].shape[1] + 1).items():
        wanted, ours = (
            first[:, None] if part.start == 0 else rest[:, part.start - 1 : part.stop - 1]
            for first, rest in (truth, made)
        )
        found[group] = Figures(
            float(fidelity.kl_divergence(wanted, ours).mean()),
            float(fidelity.top1_agreement(wanted, ours)),
            float(fidelity.near_tie_agreement(wanted, ours, tie)),
            float(fidelity.sqnr_db(ours, wanted, dims=(0, 1, 2))),
        )
    return found
