"""``precision="auto"``: the smallest policy whose fidelity holds, found by measuring it zone by zone.

It starts at the most aggressive preset, without formats that save nothing in this model, and measures how much each lowered
zone costs alone. While thresholds fail, the zone that costs most per byte it saves goes one step up, int4 to int8 to kept.
Then raises are taken back, the latest first, wherever the thresholds hold without them. Everything is measured on
teacher-forced logits, see :mod:`csm_runtime.calibration`, and deterministic.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_kernels import __version__
from csm_runtime import calibration as measuring
from csm_runtime.adapters import hf
from csm_runtime.adapters.spec import ModelSpec, StackSpec
from csm_runtime.calibration import Calibration, Fidelity, Figures, Reference, Thresholds
from csm_runtime.checks import groups
from csm_runtime.compiling import Progress
from csm_runtime.generate import plain_mode
from csm_runtime.precision import SAFE_ZONES, ZONES, PrecisionPolicy, resolve_policy, strict_json, zones_of
from csm_runtime.weights import DTYPES, Packed, PackedWeights, Stack, fingerprints, planned_table, unlowered

logger = logging.getLogger("csm_runtime")

AUTO = "auto"
_STATE, _RESULT = "csm tuning in progress", "csm tuned policy"
_SCHEMA = 2

_LINEARS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
_FIELDS = {
    "backbone.head": "backbone_head",
    "backbone.embedding": "backbone_embedding",
    "depth.projection": "depth_projection",
    "depth.head": "depth_heads",
    "depth.embedding": "depth_embedding",
}

Formats = dict[str, str]
"""The format of each zone that is lowered; the depth decoder's heads are one zone here, ``depth.head``."""


@dataclass(frozen=True)
class TunedPolicy:
    """A policy that was found, and how.

    ``sensitivity`` has the fidelity of each zone lowered alone, by zone and format; ``raised`` and ``reverted`` the zones in
    that order, each with its format before and after; ``bytes_per_frame`` the bytes that one frame at batch 1 reads, weights
    and the KV cache of the longest passage, with the ``stock`` weights, the ``start`` policy and this one (``auto``);
    ``evaluations`` everything that was measured, by policy; ``spec`` and ``weights`` are the model's shape and a hash of its
    weights.
    """

    policy: PrecisionPolicy
    thresholds: Thresholds
    fidelity: Fidelity
    frames: int
    start: str
    sensitivity: dict[str, dict[str, Fidelity]]
    raised: list[tuple[str, str, str]]
    reverted: list[tuple[str, str, str]]
    bytes_per_frame: dict[str, int]
    evaluations: dict[str, Fidelity]
    spec: dict[str, Any]
    weights: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "kind": _RESULT,
            "schema": _SCHEMA,
            "policy": self.policy.to_dict(),
            "thresholds": asdict(self.thresholds),
            "fidelity": _plain(self.fidelity),
            "frames": self.frames,
            "start": self.start,
            "sensitivity": {zone: {f: _plain(x) for f, x in one.items()} for zone, one in self.sensitivity.items()},
            "raised": [list(step) for step in self.raised],
            "reverted": [list(step) for step in self.reverted],
            "bytes_per_frame": self.bytes_per_frame,
            "evaluations": {key: _plain(found) for key, found in self.evaluations.items()},
            "spec": self.spec,
            "weights": self.weights,
        }

    @classmethod
    def from_dict(cls, data: Any) -> TunedPolicy:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: something else.
        """
        if not _is_ours(data, _RESULT):
            raise ValueError(f"not a tuned policy: kind must be {_RESULT!r} and schema {_SCHEMA}")
        wanted = set(cls.__dataclass_fields__) | {"kind", "schema"}
        if set(data) != wanted:
            raise ValueError(f"a tuned policy must have the fields {sorted(wanted)}, got {sorted(data)}")
        codebooks = _check_spec(data["spec"])
        policy = PrecisionPolicy.from_dict(data["policy"])
        policy.check_codebooks(codebooks)
        for name, kind in (("start", str), ("weights", str), ("frames", int)):
            if type(data[name]) is not kind or not data[name] or (kind is int and data[name] < 1):
                raise ValueError(f"a tuned policy's {name} must be {kind.__name__}, and something, got {data[name]!r}")
        return cls(
            policy=policy,
            thresholds=_thresholds(data["thresholds"]),
            fidelity=_fidelity("fidelity", data["fidelity"], codebooks),
            frames=data["frames"],
            start=data["start"],
            sensitivity=_sensitivity(data["sensitivity"], codebooks),
            raised=_raises("raised", data["raised"]),
            reverted=_raises("reverted", data["reverted"]),
            bytes_per_frame=_bytes_per_frame(data["bytes_per_frame"]),
            evaluations=_evaluations(data["evaluations"], codebooks),
            spec=data["spec"],
            weights=data["weights"],
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON; ``accelerate(precision="auto", calibration=path)`` takes it."""
        _write(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> TunedPolicy:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not JSON, or not a tuned policy; names the file.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_dict(strict_json(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __str__(self) -> str:
        read, stock = self.bytes_per_frame["auto"], self.bytes_per_frame["stock"]
        costs = ", ".join(f"KL of {group} {one.kl_nats:.2g} nats" for group, one in self.fidelity.items())
        return (
            f"precision 'auto' reads {read / stock:.1%} of the bytes of a stock frame; {costs}, over {self.frames} "
            f"frames; {len(self.raised)} raises from {self.start!r}, {len(self.reverted)} of them taken back"
        )


def resolve(model: Any, calibration: Any, progress: bool = True) -> TunedPolicy:
    """The policy that ``accelerate(model, precision="auto", calibration=...)`` uses.

    Args:
        model: transformers' CSM, with its own weights.
        calibration: a :class:`~csm_runtime.calibration.Calibration`; a list of prompts, which is one with all else as it is
            by default; the path of a saved result, for which nothing is measured (weights that have changed since
            are warned of); or None, two prompts of made-up text, whose speech the stock model makes. That is better than
            nothing and no more: text without meaning is not what the model will be asked to say.
        progress: show progress bars.

    Raises:
        ValueError: something else, an empty list, or a result for a model of another shape, or a state that is damaged or of
            another model.
        OSError: a file cannot be read.
    """
    if isinstance(calibration, (str, Path)):
        tuned = TunedPolicy.load(calibration)
        spec = asdict(hf.read_spec(model))
        if tuned.spec != spec:
            raise ValueError(f"{calibration}: tuned for a model of another shape, {_difference(tuned.spec, spec)}")
        if tuned.weights != _digest_of_weights(model):
            logger.warning(
                "%s: tuned for other weights of this shape (or the same in another dtype): what it says of fidelity was not "
                "measured on these; tune again",
                calibration,
            )
        return tuned
    return tune(model, measuring.calibration_of(calibration), progress)


def load_policy(path: str | Path) -> PrecisionPolicy:
    """The policy in a file that :meth:`PrecisionPolicy.save` or :meth:`TunedPolicy.save` wrote.

    Raises:
        ValueError: something else is in it; names the file.
        OSError: it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    return TunedPolicy.load(path).policy if f'"{_RESULT}"' in text else PrecisionPolicy.load(path)


def tune(model: Any, calibration: Calibration, progress: bool = True) -> TunedPolicy:
    """Find a policy; see the module's docstring.

    It takes one teacher-forced pass over all frames for each of the policies it tries, some twenty, with matrices widened to
    fp32 one at a time. A zone is packed once for each format it is tried in: all of them together are smaller than the
    model in bf16.

    Raises:
        ValueError: prompts or codes that do not fit the model, a start whose depth heads have several formats, or a state
            file that is damaged or of another model, other prompts, versions or another device.
    """
    start = resolve_policy(calibration.start)
    rows = measuring.rows_of(calibration.prompts or measuring.made_up_prompts(model))
    state = _State(model, calibration, rows)
    passages = [measuring.passage_of(model, row) for row in _spoken(model, calibration, rows, state, progress)]
    trial = _Trial(model, Reference(model, passages), calibration.thresholds.tie, state)
    return _search(trial, start, calibration.thresholds, _digest_of_weights(model), progress)


def _spoken(
    model: Any, calibration: Calibration, rows: list[dict[str, Tensor]], state: _State, progress: bool
) -> list[dict[str, Tensor]]:
    """The rows with codes: their own, those of the state, or new ones."""
    silent = [i for i, row in enumerate(rows) if "codes" not in row and str(i) not in state.codes]
    shown = progress and bool(silent)
    with closing(Progress(len(silent) * calibration.frames, "speech of the stock model", shown)) as bar:
        for i in silent:
            codes = measuring.speak(model, rows[i], calibration.frames, calibration.seed, measuring.Ticker(bar))
            state.codes[str(i)] = codes.tolist()
            state.save()
    made = {int(i): {"codes": torch.tensor(codes)} for i, codes in state.codes.items()}
    return [{**row, **made.get(i, {})} for i, row in enumerate(rows)]


def _search(trial: _Trial, start: PrecisionPolicy, thresholds: Thresholds, weights: str, progress: bool) -> TunedPolicy:
    wanted = formats_of(start, trial.spec.codebooks)
    ladders = {zone: trial.worth_having(zone, fmt) for zone, fmt in wanted.items()}
    first = {zone: ladder[0] for zone, ladder in ladders.items() if ladder[0] != "keep"}
    policy = dict(first)
    alone: dict[str, dict[str, Fidelity]] = {zone: {} for zone in first}

    def above(zone: str) -> str:
        """The next safer format of those that save something."""
        return ladders[zone][ladders[zone].index(policy[zone]) + 1]

    def failing_of(found: Fidelity) -> dict[str, str]:
        return thresholds.excess(found, trial.spec.codebooks)

    def cost_alone(zone: str) -> Fidelity:
        fmt = policy[zone]
        if fmt not in alone[zone]:
            alone[zone][fmt] = trial({zone: fmt})
        return alone[zone][fmt]

    def raised_next(failing: dict[str, str]) -> str:
        """The zone whose cost, in the groups that fail, is largest for each byte it saves; the first of equals."""

        def worth(zone: str) -> float:
            found = cost_alone(zone)
            limits = {group: max(thresholds.max_kl_of(group), 1e-12) for group in failing}
            cost = sum(found[group].kl_nats / limits[group] for group in failing)
            saved = trial.bytes({**policy, zone: above(zone)}) - trial.bytes(policy)
            return cost / max(saved, 1)

        return max((zone for zone in policy if policy[zone] != "keep"), key=worth)

    with closing(Progress(len(first), "zones alone", progress)) as bar:
        for zone in first:
            cost_alone(zone)
            bar.advance(zone)

    raised: list[tuple[str, str, str]] = []
    found = trial(policy)
    with closing(Progress(sum(len(ladders[zone]) - 1 for zone in first), "raising zones", progress)) as bar:
        while failing := failing_of(found):
            # With everything kept the logits are the reference's own, bit by bit: this ends.
            zone = raised_next(failing)
            raised.append((zone, policy[zone], above(zone)))
            policy[zone] = above(zone)
            found = trial(policy)
            bar.advance(f"{zone} to {policy[zone]}")

    reverted: list[tuple[str, str, str]] = []
    with closing(Progress(len(raised), "taking raises back", progress)) as bar:
        for zone, old, new in reversed(raised):
            if policy[zone] == new:
                without = trial({**policy, zone: old})
                if not failing_of(without):
                    policy[zone], found = old, without
                    reverted.append((zone, new, old))
            bar.advance(zone)

    return TunedPolicy(
        policy=policy_of(policy, AUTO),
        thresholds=thresholds,
        fidelity=found,
        frames=len(trial.reference.codes),
        start=start.name,
        sensitivity=alone,
        raised=raised,
        reverted=reverted,
        bytes_per_frame={"stock": trial.bytes({}), "start": trial.bytes(wanted), "auto": trial.bytes(policy)},
        evaluations=trial.evaluations,
        spec=asdict(trial.spec),
        weights=weights,
    )


def _safer(fmt: str) -> list[str]:
    """A format and the safer ones, in order."""
    return [fmt] if fmt == "keep" else [fmt, *_safer("int8" if fmt == "fp8" or fmt.startswith("int4") else "keep")]


def formats_of(policy: PrecisionPolicy, codebooks: int) -> Formats:
    """The zones that a policy lowers, safe ones left out.

    Raises:
        ValueError: the depth decoder's heads have several formats, or it is about heads that a model with this many
            codebooks does not have.
    """
    policy.check_codebooks(codebooks)
    heads = {policy.format_of(zone) for zone in zones_of(codebooks) if zone.startswith("depth.head.")}
    if len(heads) > 1:
        raise ValueError(
            f"precision {policy.name!r} gives the depth decoder's heads {sorted(heads)}; one format is needed"
        )
    out = {}
    for zone in ZONES:
        fmt = next(iter(heads)) if zone == "depth.head" else policy.format_of(zone)
        if zone not in SAFE_ZONES and fmt not in ("keep", "fp32"):
            out[zone] = fmt
    return out


def policy_of(formats: Formats, name: str) -> PrecisionPolicy:
    """The policy with one rule for each zone that is lowered."""
    return PrecisionPolicy(tuple((zone, fmt) for zone, fmt in formats.items() if fmt != "keep"), name)


def _key(lowered: Formats) -> str:
    return ", ".join(f"{zone}={lowered[zone]}" for zone in ZONES if zone in lowered) or "exact"


class _Trial:
    """Fidelity of policies on some frames, each measured once.

    Args:
        model: a CSM with its own weights.
        reference: the frames.
        tie: see :class:`~csm_runtime.calibration.Thresholds`.
        state: where what was measured is noted.

    Attributes:
        evaluations: by policy, those of an earlier run included.
    """

    def __init__(self, model: Any, reference: Reference, tie: float, state: _State) -> None:
        self.reference, self.spec = reference, reference.spec
        self.evaluations: dict[str, Fidelity] = {}
        self._live, self._tie, self._state = hf.live_weights(model), tie, state
        self._parts: dict[tuple[str, str], Any] = {}
        self._hidden: dict[tuple[tuple[str, str], ...], Tensor] = {}

    def __call__(self, formats: Formats) -> Fidelity:
        """The fidelity with these zones lowered."""
        lowered = {zone: fmt for zone, fmt in formats.items() if fmt != "keep"}
        key = _key(lowered)
        if key not in self.evaluations:
            known = self._state.evaluations.get(key)
            self.evaluations[key] = self.measure(lowered) if known is None else known
            self._state.note(key, self.evaluations[key])
        return self.evaluations[key]

    def measure(self, formats: Formats) -> Fidelity:
        """One teacher-forced pass over all frames."""
        reference = self.reference
        cache = DTYPES.get(formats.get("kv", "keep"), reference.dtype)
        packed = reference.stock
        with plain_mode():
            for zone, fmt in formats.items():
                if zone != "kv":
                    packed = _grafted(packed, zone, self._part(zone, fmt))
            # The depth decoder comes after the backbone and changes nothing in it.
            key = tuple((zone, fmt) for zone, fmt in formats.items() if not zone.startswith("depth"))
            if key not in self._hidden:
                self._hidden[key] = reference.backbone(packed, cache)
            made = reference.logits(packed, self._hidden[key], cache)
        return measuring.compare((reference.first, reference.rest), made, self._tie)

    def bytes(self, formats: Formats) -> int:
        """Weight bytes of one frame at batch 1, and the KV cache at the length of the longest passage."""
        table = planned_table(self.spec, policy_of(formats, ""), self.reference.dtype)
        stack, cache = self.spec.backbone, DTYPES.get(formats.get("kv", "keep"), self.reference.dtype)
        most = max(passage.x.shape[1] + len(passage.codes) for passage in self.reference.passages)
        cached = 2 * stack.layers * stack.kv_heads * stack.head_dim * most * cache.itemsize
        return sum(row["bytes_per_frame"] for row in table) + cached

    def worth_having(self, zone: str, fmt: str) -> list[str]:
        """A zone's format and the safer ones, each only where it takes fewer bytes than all that are safer.

        Narrow matrices do not: int4 pads rows to its groups, and int8 adds a scale to each.
        """
        out: list[str] = []
        for one in reversed(_safer(fmt)):
            if not out or self.bytes({zone: one}) < min(self.bytes({zone: other}) for other in out):
                out.insert(0, one)
        return out

    def _part(self, zone: str, fmt: str) -> Any:
        if (zone, fmt) not in self._parts:
            packed, _ = PackedWeights(PrecisionPolicy(((zone, fmt),))).refresh(self._live)
            self._parts[zone, fmt] = _part_of(packed, zone)
        return self._parts[zone, fmt]


def _part_of(packed: Packed, zone: str) -> Any:
    stack, _, kind = zone.partition(".")
    if kind in _LINEARS:
        return [{name: getattr(layer, name) for name in _LINEARS[kind]} for layer in getattr(packed, stack).layers]
    return getattr(packed, _FIELDS[zone])


def _grafted(packed: Packed, zone: str, part: Any) -> Packed:
    """The same weights, with the matrices of one zone replaced."""
    name, _, kind = zone.partition(".")
    if kind not in _LINEARS:
        return packed._replace(**{_FIELDS[zone]: part})
    stack: Stack = getattr(packed, name)
    stack = Stack([layer._replace(**matrices) for layer, matrices in zip(stack.layers, part)], stack.norm)
    return packed._replace(backbone=stack) if name == "backbone" else packed._replace(depth=stack)


class _State:
    """What has been measured so far, on disk where a path is given.

    Attributes:
        codes: of rows whose speech the stock model made, by number.
        evaluations: by policy.
    """

    def __init__(self, model: Any, calibration: Calibration, rows: list[dict[str, Tensor]]) -> None:
        self._path = None if calibration.state is None else Path(calibration.state)
        self.codes: dict[str, list[list[int]]] = {}
        self.evaluations: dict[str, Fidelity] = {}
        if self._path is None:
            return
        how = f"{calibration.frames} {calibration.seed} {calibration.thresholds.tie}"
        self._silent = {str(i) for i, row in enumerate(rows) if "codes" not in row}
        self._frames = calibration.frames
        spec = hf.read_spec(model)
        self._shape = spec.codebooks, spec.vocab, spec.depth_vocab
        self._header = {
            "kind": _STATE,
            "schema": _SCHEMA,
            "model": {"spec": asdict(spec), "weights": _digest_of_weights(model)},
            "prompts": f"{measuring.digest(rows)} {how}",
            # Both decide what a format does to a weight, and how its logits are rounded.
            "versions": {"csm_kernels": __version__, "torch": torch.__version__},
            "device": _device_name(model.device),
        }
        if self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            data = strict_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not _is_ours(data, _STATE):
            raise ValueError(f"{path}: not the state of a tuning: kind must be {_STATE!r} and schema {_SCHEMA}")
        for name, what in (
            ("model", "another model"),
            ("prompts", "other prompts, frames, seed or tie"),
            ("versions", "other versions"),
            ("device", "another device"),
        ):
            if data.get(name) != self._header[name]:
                raise ValueError(f"{path}: a tuning of {what}; give another path, or remove the file")
        try:
            wanted = {*self._header, "codes", "evaluations"}
            if set(data) != wanted:
                raise ValueError(f"must have the fields {sorted(wanted)}, got {sorted(data)}")
            self.codes = self._checked(data["codes"])
            self.evaluations = _evaluations(data["evaluations"], self._shape[0])
        except ValueError as error:
            raise ValueError(f"{path}: a damaged state of a tuning, remove it: {error}") from error

    def _checked(self, codes: Any) -> dict[str, list[list[int]]]:
        """The codes, if they are some of the rows that have none of their own."""
        if not isinstance(codes, dict) or not set(codes) <= self._silent:
            raise ValueError(f"codes must be by the number of a prompt without codes, {sorted(self._silent)}")
        codebooks, vocab, depth_vocab = self._shape

        def is_frame(frame: Any) -> bool:
            if not isinstance(frame, list) or len(frame) != codebooks or any(type(code) is not int for code in frame):
                return False
            return all(0 <= code < (depth_vocab if k else vocab) for k, code in enumerate(frame))

        for number, frames in codes.items():
            if not isinstance(frames, list) or not 1 <= len(frames) <= self._frames or not all(map(is_frame, frames)):
                raise ValueError(
                    f"codes of prompt {number} must be 1 to {self._frames} frames of {codebooks} codes below {vocab}, in "
                    f"codebook 0, and {depth_vocab}"
                )
        return codes

    def note(self, key: str, found: Fidelity) -> None:
        """Keep an evaluation."""
        self.evaluations[key] = found
        self.save()

    def save(self) -> None:
        """Write everything, where there is a path."""
        if self._path is not None:
            evaluations = {key: _plain(found) for key, found in self.evaluations.items()}
            _write(self._path, {**self._header, "codes": self.codes, "evaluations": evaluations})


def _digest_of_weights(model: Any) -> str:
    live = hf.live_weights(model)
    packed, none = unlowered(live), Stack([], live.backbone_norm)
    # fingerprints() leaves the backbone's embedding out.
    embedding = packed._replace(backbone=none, depth=none, depth_embedding=live.backbone_embedding)
    out = hashlib.sha256(str(live.backbone_norm.dtype).encode())
    for part in (packed, embedding):
        out.update(fingerprints(part).cpu().numpy().tobytes())
    return out.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _plain(found: Fidelity) -> dict[str, Any]:
    return {group: figures.to_dict() for group, figures in found.items()}


# -------------------------------------------------------------------------------------------- reading what was written


def _is_ours(data: Any, kind: str) -> bool:
    if not isinstance(data, dict) or data.get("kind") != kind:
        return False
    return type(data.get("schema")) is int and data["schema"] == _SCHEMA


def _object(name: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be an object, got {data!r:.60}")
    return data


def _fidelity(name: str, data: Any, codebooks: int) -> Fidelity:
    """Figures of every group: with one missing nothing could be said to hold."""
    wanted = list(groups(codebooks))
    if sorted(_object(name, data)) != sorted(wanted):
        raise ValueError(f"{name} must have figures of {wanted}, got {sorted(data)}")
    try:
        return {group: Figures.from_dict(data[group]) for group in wanted}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _evaluations(data: Any, codebooks: int) -> dict[str, Fidelity]:
    for key in _object("evaluations", data):
        pairs = [part.partition("=") for part in key.split(", ")]
        formats = {zone: fmt for zone, _, fmt in pairs}
        known = key == "exact" or (
            all(_is_lowered(zone, fmt) for zone, _, fmt in pairs)
            and len(formats) == len(pairs)
            and key == _key(formats)
        )
        if not known:
            raise ValueError(f"evaluations: {key!r} is no policy")
    return {key: _fidelity(f"the evaluation of {key!r}", found, codebooks) for key, found in data.items()}


def _is_lowered(zone: str, fmt: str) -> bool:
    """Whether a trial can have a zone in a format."""
    if zone not in ZONES or zone in SAFE_ZONES or fmt in ("keep", "fp32", "int4:128", "int4:asymmetric"):
        return False
    try:
        PrecisionPolicy(((zone, fmt),))
    except ValueError:
        return False
    return True


def _sensitivity(data: Any, codebooks: int) -> dict[str, dict[str, Fidelity]]:
    for zone, one in _object("sensitivity", data).items():
        for fmt in _object(f"sensitivity of {zone!r}", one):
            if not _is_lowered(zone, fmt):
                raise ValueError(f"sensitivity: {zone!r} cannot be tried in {fmt!r}")
    return {
        zone: {fmt: _fidelity(f"the sensitivity of {zone!r}", found, codebooks) for fmt, found in one.items()}
        for zone, one in data.items()
    }


def _raises(name: str, data: Any) -> list[tuple[str, str, str]]:
    def is_step(step: Any) -> bool:
        if not isinstance(step, list) or len(step) != 3 or not all(isinstance(part, str) for part in step):
            return False
        return step[1] != step[2] and all(fmt == "keep" or _is_lowered(step[0], fmt) for fmt in step[1:])

    if not isinstance(data, list) or not all(map(is_step, data)):
        raise ValueError(f"{name} must be a list of [zone, format, format], got {data!r:.60}")
    return [(zone, old, new) for zone, old, new in data]


def _bytes_per_frame(data: Any) -> dict[str, int]:
    wanted = ("stock", "start", "auto")
    if set(_object("bytes_per_frame", data)) != set(wanted) or not all(type(n) is int and n > 0 for n in data.values()):
        raise ValueError(f"bytes_per_frame must be the bytes of {wanted}, got {data!r:.90}")
    return {name: data[name] for name in wanted}


def _thresholds(data: Any) -> Thresholds:
    wanted = {one.name for one in fields(Thresholds)}
    if set(_object("thresholds", data)) != wanted:
        raise ValueError(f"thresholds must be {sorted(wanted)}, got {sorted(data)}")
    return Thresholds(**data)


def _check_spec(data: Any) -> int:
    """The codebooks of a model's shape, all of whose fields are there."""

    def check(name: str, shape: Any, kind: type[ModelSpec] | type[StackSpec]) -> None:
        wanted = [one.name for one in fields(kind)]
        if sorted(_object(name, shape)) != sorted(wanted):
            raise ValueError(f"{name} must have the fields {wanted}, got {sorted(shape)}")
        for field, value in shape.items():
            if kind is ModelSpec and field in ("backbone", "depth"):
                check(f"{name} {field}", value, StackSpec)
            elif type(value) is not int and not (field == "eps" and type(value) is float):
                raise ValueError(f"{name}: {field} must be a number, got {value!r}")

    check("spec", data, ModelSpec)
    if data["codebooks"] < 2:
        raise ValueError(f"spec: codebooks must be at least 2, got {data['codebooks']}")
    return int(data["codebooks"])


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first field of two shapes that differs."""
    for name, value in ours.items():
        if isinstance(value, dict) and isinstance(theirs.get(name), dict):
            if theirs[name] != value:
                return f"{name}: {_difference(theirs[name], value)}"
        elif theirs.get(name) != value:
            return f"{name} is {value}, there {theirs.get(name)}"
    return "with other fields"
