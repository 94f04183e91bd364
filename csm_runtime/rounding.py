"""Calibrated int4: the stock model's own activations decide how each matrix is rounded.

The stock modules run on calibration calls, teacher-forced, and hooks add up the second moments of what each matrix
multiplies: only at positions that the packed weights will see, frames but no prompts. Of these sums only as many are held at
once as fit in a limit, and the pass is run again for the next ones: those of CSM-1B would be 6 GB together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csm_kernels.quant import QuantWeight, stacked
from csm_kernels.rounding import factor, quantize_gptq
from csm_runtime import calibration as measuring
from csm_runtime.adapters import hf
from csm_runtime.calibration import Passage
from csm_runtime.compiling import Progress
from csm_runtime.generate import plain_mode
from csm_runtime.precision import PrecisionPolicy, int4_layout
from csm_runtime.weights import checksum, fingerprint, named_sources

MAX_FRAMES = 512
"""Frames that are read by default: with more of them the sums change little and the passes take longer."""
_LIMIT = 1 << 30
"""Bytes of the sums held at once: three of CSM-1B's widest."""
_DAMPING = 0.01, 0.1, 0.3
"""At least, times columns over inputs, and at most: with few inputs the sums say less than they seem to. On the small trained
model, MLPs of the backbone after 52 made-up frames, 0.01 gave codebook 0 a KL of 3.9e-3 nats, 0.3 2.2e-3, nearest 2.7e-3."""
_CHUNK = 64
"""Frames that go through the depth decoder at once."""


class Rounded(NamedTuple):
    """One matrix as it was rounded."""

    format: str
    fingerprint: Tensor
    """Of the weight it was made from, on the CPU; of all heads for a head of the depth decoder."""
    codes: QuantWeight
    checksum: Tensor
    """Of the codes, on the CPU."""


@dataclass(frozen=True)
class Rounding:
    """Calibrated codes of int4 matrices; what ``accelerate(rounding=...)`` takes.

    Attributes:
        matrices: by the names that :class:`~csm_runtime.weights.PackedWeights` has, heads one by one: ``depth.head.1``.
        frames: how many were read.
    """

    matrices: Mapping[str, Rounded]
    frames: int

    def key(self) -> list[Any]:
        """What tells it from another rounding, as plain data."""
        return [[name, one.format, one.checksum.tolist()] for name, one in sorted(self.matrices.items())]

    def codes(self, names: Sequence[str], fmt: str, mark: Tensor) -> QuantWeight | None:
        """The codes of one matrix, or a stack of several, in memory that is shared for a single one.

        Args:
            names: of the matrix; several heads are a stack.
            fmt: the format wanted.
            mark: the fingerprint of the weight as it is now.

        Returns:
            None unless all of them were calibrated in this format, from this very weight, and the codes are still what they
            were.
        """
        found = [self.matrices.get(name) for name in names]
        parts: list[QuantWeight] = []
        for one in found:
            if one is None or one.format != fmt or not torch.equal(one.fingerprint, mark.cpu()):
                return None
            if not torch.equal(one.checksum, checksum(one.codes).cpu()):
                return None
            data, scale, padding = one.codes
            parts.append(QuantWeight(data.to(mark.device), scale.to(mark.device), padding))
        return parts[0] if not names[0].startswith("depth.head.") else stacked(parts)


class _Unit(NamedTuple):
    """Matrices that multiply the same inputs."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    """Each ``[N, K]``, live."""
    format: str
    marks: tuple[Tensor, ...]
    module: nn.Module
    """That gets the inputs."""
    pick: Callable[[Tensor], Tensor]
    """What of its argument they are."""


@dataclass
class _Moments:
    """What some matrices multiply."""

    sums: Tensor
    """``[K, K]`` fp32, the sum of ``x x'``."""
    count: int = 0
    """Inputs x."""


def calibrate_rounding(
    model: Any, policy: PrecisionPolicy, calls: Any = None, max_frames: int = MAX_FRAMES, progress: bool = True
) -> Rounding:
    """Round every matrix that a policy stores in int4 by GPTQ, on the stock model's own activations.

    Args:
        model: transformers' CSM with its own weights, stock or accelerated.
        policy: says which zones are int4, and their groups. Embeddings are looked up, not multiplied: nearest stays for
            them.
        calls: a :class:`~csm_runtime.calibration.Calibration`, a list of ``generate()`` inputs, or None for made-up text. The
            stock model makes the speech of calls that bring no ``codes``. Recordings of the use you have in mind are better.
        max_frames: frames that are read, over all calls; the first ones.
        progress: show progress bars on stderr.

    Returns:
        The codes, for ``accelerate(model, precision=policy, rounding=...)``.

    Raises:
        ValueError: calls that do not fit the model, ``max_frames`` below 2, a policy about heads that it does not have,
            dropped originals, a weight that is not finite, or activations that are not.

    Source: :func:`csm_kernels.rounding.quantize_gptq`.
    """
    if type(max_frames) is not int or max_frames < 2:
        raise ValueError(f"max_frames must be an integer of at least 2, got {max_frames!r}")
    policy.check_codebooks(hf.read_spec(model).codebooks)
    units = list(_units(model, policy))
    if not units:
        return Rounding({}, 0)
    passages = _passages(model, measuring.calibration_of(calls), max_frames, progress)
    matrices: dict[str, Rounded] = {}
    with closing(Progress(sum(len(unit.names) for unit in units), "rounding weights", progress)) as bar, plain_mode():
        hidden: list[Tensor] = []
        for batch in _batches(units):
            for unit, moments in zip(batch, _moments(model, passages, batch, hidden)):
                for name, one in _rounded(unit, moments):
                    matrices[name] = one
                    bar.advance(name)
    return Rounding(matrices, sum(len(passage.codes) for passage in passages))


def _units(model: Any, policy: PrecisionPolicy) -> Iterator[_Unit]:
    """What is stored in int4, grouped by inputs: the backbone first, whose hidden states the depth decoder reads."""
    live, modules = hf.live_weights(model), hf.linears(model)
    sources = named_sources(live)
    partners = {"k": "q", "v": "q", "up": "gate"}
    shared: dict[tuple[str, str], list[str]] = {}
    for name, (zone, weight) in sources.items():
        fmt = policy.format_of(zone)
        if name in modules and int4_layout(fmt) is not None:
            if weight.is_meta:
                raise ValueError(f"the original of {name} was dropped: nothing is left to round")
            prefix, _, part = name.rpartition(".")
            shared.setdefault((f"{prefix}.{partners.get(part, part)}", fmt), []).append(name)
    order = sorted(shared.items(), key=lambda item: item[0][0].startswith("depth"))
    for (first, fmt), names in order:
        weights = tuple(sources[name][1] for name in names)
        marks = tuple(fingerprint(weight).cpu() for weight in weights)
        yield _Unit(tuple(names), weights, fmt, marks, modules[first], lambda x: x)
    mark = None
    for k, head in enumerate(live.depth_heads, start=1):
        fmt = policy.format_of(f"depth.head.{k}")
        if int4_layout(fmt) is None:
            continue
        if head.is_meta:
            raise ValueError("the originals of the depth decoder's heads were dropped: nothing is left to round")
        mark = fingerprint(live.depth_heads).cpu() if mark is None else mark

        def pick(x: Tensor, k: int = k) -> Tensor:
            return x[:, k - 1]

        module = model.depth_decoder.codebooks_head
        yield _Unit((f"depth.head.{k}",), (head.t(),), fmt, (mark,), module, pick)


def _batches(units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
    """Neighbours whose sums fit the limit together, at least one; none has both stacks in it."""
    batch: list[_Unit] = []
    for unit in units:
        held = sum(4 * one.weights[0].shape[1] ** 2 for one in (*batch, unit))
        if batch and (held > _LIMIT or _in_depth(batch[0]) != _in_depth(unit)):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _in_depth(unit: _Unit) -> bool:
    return unit.names[0].startswith("depth.")


def _passages(model: Any, calibration: Any, max_frames: int, progress: bool) -> list[Passage]:
    """The calls with their speech, up to so many frames."""
    rows = measuring.rows_of(calibration.prompts or measuring.made_up_prompts(model))
    silent = sum("codes" not in row for row in rows)
    out: list[Passage] = []
    with closing(Progress(silent * calibration.frames, "speech of the stock model", progress and silent > 0)) as bar:
        for row in rows:
            room = max_frames - sum(len(passage.codes) for passage in out)
            if room < 2:
                break
            if "codes" not in row:
                wanted = min(room, calibration.frames)
                row["codes"] = measuring.speak(model, row, wanted, calibration.seed, measuring.Ticker(bar))
            passage = measuring.passage_of(model, row)
            out.append(passage._replace(codes=passage.codes[:room]))
    most, room = hf.read_spec(model).backbone.positions, max(p.x.shape[1] + len(p.codes) for p in out)
    if room > most:
        raise ValueError(f"calibration: a prompt and its frames take {room} positions, the model has {most}")
    return out


def _moments(model: Any, passages: Sequence[Passage], batch: Sequence[_Unit], hidden: list[Tensor]) -> list[_Moments]:
    """What the units of a batch multiply.

    Args:
        model: the stock modules.
        passages: what runs through them.
        batch: units of one stack.
        hidden: per passage the backbone's normalised hidden states ``[F, D]``, filled the first time.
    """
    device = batch[0].weights[0].device
    found = [_Moments(torch.zeros(2 * [unit.weights[0].shape[1]], device=device)) for unit in batch]
    frames = 0  # rows of a backbone layer's input that are fed frames

    def watch(unit: _Unit, total: _Moments) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = unit.pick(args[0]) if _in_depth(unit) else args[0][:, -frames:]
            x = x.reshape(-1, x.shape[-1]).float()
            total.sums.addmm_(x.t(), x)
            total.count += len(x)

        return hook

    depth = _in_depth(batch[0])
    with contextlib.ExitStack() as stack:
        hooks = [unit.module.register_forward_pre_hook(watch(unit, total)) for unit, total in zip(batch, found)]
        for handle in hooks:
            stack.callback(handle.remove)
        if not depth or not hidden:
            hidden.clear()
            for passage in passages:
                frames = len(passage.codes) - 1
                hidden.append(measuring.stock_hidden(model, passage))
                if not depth:
                    frames = len(passage.codes)
                    model.lm_head(hidden[-1][None])
        if depth:
            for passage, states in zip(passages, hidden):
                for i in range(0, len(states), _CHUNK):
                    fed = nn.functional.pad(passage.codes[i : i + _CHUNK, :-1], (1, 0))
                    model.depth_decoder(input_ids=fed, backbone_last_hidden_state=states[i : i + _CHUNK])
    return found


def _rounded(unit: _Unit, moments: _Moments) -> Iterator[tuple[str, Rounded]]:
    layout = int4_layout(unit.format)
    assert layout is not None
    least, share, most = _DAMPING
    damp = min(most, max(least, share * len(moments.sums) / max(1, moments.count)))
    try:
        shared = factor(moments.sums, damp)
    except ValueError as error:
        raise ValueError(f"the stock model's activations before {unit.names[0]} cannot be used: {error}") from error
    for name, weight, mark in zip(unit.names, unit.weights, unit.marks):
        try:
            codes = quantize_gptq(weight, moments.sums if shared is None else shared, *layout)
        except ValueError as error:
            raise ValueError(f"precision: {name} cannot be stored as {unit.format}: {error}") from error
        yield name, Rounded(unit.format, mark, codes, checksum(codes).cpu())
