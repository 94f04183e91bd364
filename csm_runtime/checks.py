"""What the guard measures: frames made again by :mod:`csm_runtime.replay`, compared with what the decode steps made.

Two errors are kept apart. The decode steps against fp32 on the very weights they read finds bugs, and is small; those
weights against the stock model's is the price of the policy's formats, and is larger. One limit for both would have to let
a lost tile pass wherever it lets fp8 pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from csm_kernels.sampling import NoiseKey, SamplingParams
from csm_runtime.fidelity import kl_divergence, sqnr_db
from csm_runtime.replay import Replay, noise_of, redraw
from csm_runtime.weights import Packed

_LONGEST_CHUNK = 32
"""Frames that one pass through the backbone checks at most."""
_LEAST_BOOKS = 7
"""A group of fewer codebooks is drawn with more noises in calibration."""
_MOST_EVIDENCE = 64 << 20
"""Bytes of keys and values that an event takes along."""


class Sample(NamedTuple):
    """One frame as it was made, kept for a check."""

    frame: int
    """Number of the frame in its utterance."""
    hidden: Tensor
    """``[N, D]`` fp32, the backbone's normalised hidden state."""
    codes: Tensor
    """``[N, codebooks]`` int64."""
    first_logits: Tensor
    """``[N, vocab]`` fp32, what codebook 0 was drawn from."""
    logits: Tensor
    """``[N, codebooks - 1, depth_vocab]`` fp32, what the others were drawn from."""
    alive: Tensor
    """``[N]`` bool, rows that had not ended before."""


@dataclass
class Measures:
    """What a check found, by name; entry ``i`` of every list is about frame ``frames[i]`` and those after it."""

    frames: list[int] = field(default_factory=list)
    least: dict[str, list[float]] = field(default_factory=dict)
    """Signal-to-noise ratios in dB: bad where they are low."""
    most: dict[str, list[float]] = field(default_factory=dict)
    """Divergences in nats and margins in logits: bad where they are high."""
    differing: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens that came out differently with the same noise, and tokens looked at, by group of codebooks."""
    broken: list[str] = field(default_factory=list)
    """Copies of weights whose bits have changed since they were packed."""


def groups(codebooks: int) -> dict[str, slice]:
    """Codebooks that are judged together: a wrong codebook 0 is a wrong word, a wrong codebook 31 is a breath of noise."""
    cuts = {"codebook 0": (0, 1), "codebooks 1 to 7": (1, 8), "codebooks from 8": (8, codebooks)}
    return {name: slice(a, min(b, codebooks)) for name, (a, b) in cuts.items() if a < min(b, codebooks)}


@dataclass
class Scene:
    """Where the frames of one call stand: what a check reads besides the frames themselves."""

    packed: Packed
    """The weights that the decode steps read."""
    stock: Callable[[], Packed | None]
    """The stock model's weights in the same form, or None where they are gone."""
    stock_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Codebook 0's and the depth decoder's logits by the stock modules, from hidden states and codes."""
    corrupted: Callable[[], list[str]]
    """Names of packed copies whose bits have changed."""
    keys: list[Tensor]
    """Per layer ``[B, KV, C, head_dim]``, the cache that the decode steps write."""
    values: list[Tensor]
    allowed: Tensor
    """``[B, C]`` bool."""
    prompt: int
    """Cached positions of the prompt; frame ``j`` goes to slot ``prompt + j``."""
    first: int
    """The first frame of these decode steps: what is cached of those before it comes from a prefill by the stock layers."""
    position: Tensor
    """``[N]`` int64, rotary position of the prompt's last position."""
    params: tuple[SamplingParams, SamplingParams]
    """Of codebook 0 and of the others, ``[B]`` each."""
    seed: Tensor
    """``[B]`` int64."""
    utterance: Tensor


class Checks:
    """The guard's checks for one call.

    Args:
        replay: teacher-forced passes of the model.
        scene: where the call stands.
        tolerances: by how much a logit may differ, by group, once that is known: a token that differs by less is a tie.
    """

    def __init__(self, replay: Replay, scene: Scene, tolerances: dict[str, float] | None = None) -> None:
        self._replay, self._scene = replay, scene
        self._tolerances = tolerances or {}

    def __call__(self, name: str, samples: Sequence[Sample], codes: Sequence[Tensor]) -> Measures:
        """One check by name; ``codes`` are all frames of the call so far, ``[N, codebooks]`` each."""
        with torch.inference_mode(False), torch.no_grad():
            if name == "depth":
                return self.depth(samples)
            if name == "backbone":
                return self.backbone(samples[-1], codes)
            if name == "formats":
                return self.formats(samples)
            if name == "backbone formats":
                return self.backbone_formats(samples[-1], codes)
            assert name == "copies", name
            return Measures(broken=self._scene.corrupted())

    def depth(self, samples: Sequence[Sample], noises: int = 1) -> Measures:
        """The depth decoder and codebook 0's head against fp32 on the same weights, and the tokens they drew.

        Args:
            samples: frames.
            noises: 1 for the noise the tokens were drawn with, or more for made-up ones, which only counts tokens.
        """
        rows = _Rows(samples)
        packed, books = self._scene.packed, rows.codes.shape[1]
        first = self._replay.first_logits(packed, rows.hidden)
        others = self._replay.depth_logits(packed, rows.hidden, rows.codes)
        found = Measures(rows.frames)
        for name, part in groups(books).items():
            ours, wanted = _part(rows.first_logits, rows.logits, part), _part(first, others, part)
            found.least[f"logits of {name}"] = _db(ours, wanted)
            tolerance = self._tolerances.get(name)
            if noises > 1:
                found.most[f"error of {name}"] = (ours - wanted).abs().flatten(1).amax(1).tolist()
                found.most[f"size of {name}"] = wanted.flatten(1).square().mean(1).sqrt().tolist()
            elif tolerance is None:
                continue
            found.differing[name], margins = self._drawn(rows, ours, wanted, part, noises, tolerance or 0.0)
            if noises == 1:
                found.most[f"margin of {name}"] = margins
        return found

    def _drawn(
        self, rows: _Rows, ours: Tensor, wanted: Tensor, part: slice, noises: int, tolerance: float
    ) -> tuple[tuple[int, int], list[float]]:
        scene, count = self._scene, wanted.shape[1]
        params = SamplingParams(*(t[rows.row] for t in scene.params[0 if part.start == 0 else 1]))
        if noises > 1:  # a group of one codebook would say little of how rarely its tokens differ
            noises *= max(1, _LEAST_BOOKS // count)
        near = torch.full((count,), tolerance, device=ours.device)
        differing, looked, margins = 0, 0, torch.zeros(len(rows.frames), device=ours.device)
        for number in range(noises):
            key = NoiseKey(scene.seed[rows.row] + number, scene.utterance[rows.row], rows.number)
            codes, noise = rows.codes[:, part], torch.zeros_like(wanted)
            if bool(params.do_sample.any()):
                noise = noise_of(key, part.start, count, wanted.shape[2])
            if noises > 1:
                codes = redraw(ours, codes, params, noise, near).drawn
            drawn = redraw(wanted, codes, params, noise, near)
            differing += int((~drawn.same).sum())
            looked += drawn.same.numel()
            margins = torch.maximum(margins, drawn.margin.amax(1))
        return (differing, looked), margins.tolist()

    def formats(self, samples: Sequence[Sample]) -> Measures:
        """The depth decoder's weights, and codebook 0's head, against the stock modules."""
        if self._scene.stock() is None:
            return Measures()
        rows = _Rows(samples)
        packed = self._scene.packed
        theirs = self._scene.stock_logits(rows.hidden, rows.codes)
        ours = (
            self._replay.first_logits(packed, rows.hidden),
            self._replay.depth_logits(packed, rows.hidden, rows.codes),
        )
        found = Measures(rows.frames)
        for name, part in groups(rows.codes.shape[1]).items():
            made, wanted = _part(*ours, part), _part(*theirs, part)
            found.least[f"formats of {name}"] = _db(made, wanted)
            found.most[f"divergence of {name}"] = kl_divergence(wanted, made).mean(1).tolist()
        return found

    def backbone(self, sample: Sample, codes: Sequence[Tensor]) -> Measures:
        """The positions before a frame through the backbone again: its hidden state, and what is in the cache for them."""
        scene = self._scene
        chunk = self._chunk(sample, codes)
        if chunk is None:
            return Measures()
        start, stop, args = chunk
        made = self._replay.backbone(scene.packed, *args)
        alive = sample.alive.nonzero()[:, 0]
        found = Measures()
        stored = slice(scene.prompt + start, scene.prompt + stop)
        for name, cache, wanted in (("keys", scene.keys, made.keys), ("values", scene.values, made.values)):
            ours = torch.stack([layer[alive, :, stored].float() for layer in cache])
            truth = torch.stack([layer[alive].float() for layer in wanted])
            # [layers, rows, KV, positions, head_dim] to rows x positions
            found.least[name] = _db(*(t.permute(1, 3, 0, 2, 4).flatten(0, 1) for t in (ours, truth)))
        last = made.hidden[alive, -1]
        hidden = _db(sample.hidden[alive], last)
        # A position's keys and values are the cause of what comes after it, not of its own frame.
        found.frames = [start + 1 + j for _ in alive for j in range(stop - start)]
        positions = len(found.frames) // max(1, len(alive))
        spread = [float("inf")] * len(found.frames)
        for i, value in enumerate(hidden):
            spread[(i + 1) * positions - 1] = value
        found.least["hidden state"] = spread
        return found

    def backbone_formats(self, sample: Sample, codes: Sequence[Tensor]) -> Measures:
        """The backbone's weights against the stock model's over the positions before a frame, where they are not the same."""
        stock, chunk = self._scene.stock(), self._chunk(sample, codes)
        if stock is None or chunk is None or _same_tensors(self._scene.packed.backbone, stock.backbone):
            return Measures()
        start, stop, args = chunk
        ours, theirs = (self._replay.backbone(weights, *args).hidden for weights in (self._scene.packed, stock))
        alive = sample.alive.nonzero()[:, 0]
        a, b = ours[alive].flatten(0, 1), theirs[alive].flatten(0, 1)
        frames = [start + 1 + j for _ in alive for j in range(stop - start)]
        return Measures(frames, least={"formats of the backbone": _db(a, b)})

    def _chunk(self, sample: Sample, codes: Sequence[Tensor]) -> tuple[int, int, tuple[Any, ...]] | None:
        scene, stop = self._scene, sample.frame
        start = max(scene.first, stop - _LONGEST_CHUNK)
        if stop <= start:
            return None
        rows, past = sample.codes.shape[0], scene.prompt + start
        fed = torch.stack(list(codes[start:stop]), dim=1)
        steps = torch.arange(start + 1, stop + 1, device=fed.device)
        cached = tuple([layer[:rows, :, :past] for layer in cache] for cache in (scene.keys, scene.values))
        allowed = scene.allowed[:rows, : scene.prompt + stop]
        x = self._replay.embed(scene.packed, fed)
        return start, stop, (x, scene.position[:, None] + steps, allowed, cached)

    def evidence(self, samples: Sequence[Sample], codes: Sequence[Tensor]) -> dict[str, Tensor]:
        """What it takes to run the checks again elsewhere, on the CPU: frames, noise, sampling, and the chunk before."""
        scene, out = self._scene, {}
        if not samples:
            return {}
        rows = samples[-1].codes.shape[0]
        for name in ("hidden", "codes", "first_logits", "logits", "alive"):
            out[name] = torch.stack([getattr(sample, name) for sample in samples])
        out["frame"] = torch.tensor([sample.frame for sample in samples])
        out["first_frame"] = torch.tensor([scene.first])
        for whose, params in zip(("first", "other"), scene.params):
            out |= {f"{whose}.{name}": value[:rows] for name, value in params._asdict().items()}
        out |= {"seed": scene.seed[:rows], "utterance": scene.utterance[:rows], "position": scene.position}
        stop = samples[-1].frame
        caches = [layer[:rows, :, : scene.prompt + stop] for layer in (*scene.keys, *scene.values)]
        if stop and sum(layer.nbytes for layer in caches) <= _MOST_EVIDENCE:
            half = len(caches) // 2
            out |= {"keys": torch.stack(caches[:half]), "values": torch.stack(caches[half:])}
            out |= {"allowed": scene.allowed[:rows, : scene.prompt + stop], "made": torch.stack(list(codes[:stop]))}
        return {name: value.detach().clone().cpu() for name, value in out.items()}


def scene_of(evidence: dict[str, Tensor], scene: Scene) -> tuple[Scene, list[Sample], list[Tensor]]:
    """The call that evidence is of, with the weights of another scene: what :class:`Checks` takes to run again."""
    device = scene.allowed.device
    at = {name: value.to(device) for name, value in evidence.items()}
    samples = [
        Sample(int(frame), *(at[name][i] for name in ("hidden", "codes", "first_logits", "logits", "alive")))
        for i, frame in enumerate(evidence["frame"])
    ]
    params = tuple(
        SamplingParams(*(at[f"{whose}.{name}"] for name in SamplingParams._fields)) for whose in ("first", "other")
    )
    made, prompt = list(at.get("made", at["codes"][:0])), 0
    if "keys" in at:
        prompt = at["keys"].shape[3] - len(made)
    there = Scene(
        packed=scene.packed,
        stock=scene.stock,
        stock_logits=scene.stock_logits,
        corrupted=scene.corrupted,
        keys=list(at["keys"]) if "keys" in at else [],
        values=list(at["values"]) if "values" in at else [],
        allowed=at.get("allowed", at["alive"]),
        prompt=prompt,
        first=int(at.get("first_frame", torch.zeros(1))),
        position=at["position"],
        params=(params[0], params[1]),
        seed=at["seed"],
        utterance=at["utterance"],
    )
    return there, samples, made


class _Rows:
    """Every row of every sample that had not ended, one behind the other."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        picks = [sample.alive.nonzero()[:, 0] for sample in samples]
        self.row = torch.cat(picks)
        self.frames = [sample.frame for sample, pick in zip(samples, picks) for _ in range(len(pick))]
        self.number = torch.tensor(self.frames, dtype=torch.int64, device=self.row.device)

        def joined(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([tensor[pick] for tensor, pick in zip(tensors, picks)])

        self.hidden = joined(sample.hidden for sample in samples)
        self.codes = joined(sample.codes for sample in samples)
        self.first_logits = joined(sample.first_logits for sample in samples)
        self.logits = joined(sample.logits for sample in samples)


def _same_tensors(a: Any, b: Any) -> bool:
    """Whether two stacks of weights lie in the same memory."""
    ours, theirs = ([leaf.data_ptr() for leaf in tree_leaves(stack) if isinstance(leaf, Tensor)] for stack in (a, b))
    return ours == theirs


def _part(first: Tensor, others: Tensor, part: slice) -> Tensor:
    """``[n, K, V]`` logits of the codebooks of one group; codebook 0 is one of its own."""
    return first[:, None].float() if part.start == 0 else others[:, part.start - 1 : part.stop - 1].float()


def _db(value: Tensor, truth: Tensor) -> list[float]:
    """Signal-to-noise ratio of each entry of the first dimension."""
    return sqnr_db(value.flatten(1), truth.flatten(1)).tolist()
