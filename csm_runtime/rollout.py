"""Optimisations one at a time: fidelity and speed before and after each, kept or rolled back.

Every optimisation can be switched on alone, by ``accelerate()``'s own arguments. :func:`verify` walks the list: a step goes on
top of what has been kept so far; its decode steps are fed frames of the stock model, one by one, and their logits are held
against the stock weights' in fp32; its frames are timed in turns with those of the side before it. It stays where fidelity
holds and it is not slower.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from csm_runtime import __version__, fidelity
from csm_runtime.accelerate import OPTIONAL, Acceleration
from csm_runtime.calibration import Calibration, Fidelity, Thresholds
from csm_runtime.compiling import Progress
from csm_runtime.doctor import machine
from csm_runtime.engine import MODES
from csm_runtime.optimisations import Options, Step, steps
from csm_runtime.precision import PrecisionPolicy, resolve_policy, strict_json
from csm_runtime.sides import FRAME, SOUND, Accelerated, Case, Stock

_SCHEMA = 1
_TOGETHER = "all that was kept"


@dataclass(frozen=True)
class Limits:
    """What a step has to hold to be kept.

    Args:
        fidelity: of everything that is switched on, against the stock model.
        max_kl_added: nats that a step which lowers no format may add to any group's KL divergence: its logits should be
            those of the step before, up to rounding.
        min_sound_db: least SQNR of the sound after a step that changes the codec against that before it, for the same codes.
        min_speed: time before over time after.
    """

    fidelity: Thresholds = field(default_factory=Thresholds)
    max_kl_added: float = 1e-4
    min_sound_db: float = 60.0
    min_speed: float = 0.98

    def __post_init__(self) -> None:
        for name in ("max_kl_added", "min_sound_db", "min_speed"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"limits: {name} must be a finite number of at least 0, got {value!r}")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Limits:
        """From ``name=value`` texts, with the names of both classes.

        Raises:
            ValueError: another form, name or value.
        """
        parts = [part.strip() for text in texts for part in text.split(",")]
        own = {one.name for one in fields(cls)} - {"fidelity"}
        mine = [part.partition("=") for part in parts if part.partition("=")[0].strip() in own]
        try:
            values = {name.strip(): float(value) for name, _, value in mine}
        except ValueError as error:
            raise ValueError(f"limits must be NAME=NUMBER: {error}") from error
        return cls(Thresholds.parse([p for p in parts if p.partition("=")[0].strip() not in own]), **values)


@dataclass(frozen=True)
class Outcome:
    """What became of a step. Times are milliseconds of what ``timed`` says; None where it was not measured."""

    name: str
    kept: bool
    reason: str
    """Why it was not kept; empty where it was."""
    failed: bool = False
    """Whether it raised."""
    timed: str = FRAME
    before: Fidelity | None = None
    after: Fidelity | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    speed: float | None = None
    """Time before over time after, the median of what each pair of runs, one after the other, says."""
    sound_db: float | None = None
    seconds: float = 0.0
    """What it took to find out, compiling included."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        sides = {
            name: None if side is None else {group: figures.to_dict() for group, figures in side.items()}
            for name, side in (("before", self.before), ("after", self.after))
        }
        sound = (
            None
            if self.sound_db is None
            else str(self.sound_db)
            if abs(self.sound_db) == float("inf")
            else self.sound_db
        )
        return {**asdict(self), **sides, "sound_db": sound}


@dataclass(frozen=True)
class Rollout:
    """The outcome of every step, and what to call ``accelerate()`` with: ``accelerate(model, **rollout.options)``.

    ``options`` is None where nothing could be kept: leave the model as it is. ``together`` is everything that was kept
    against the stock model.
    """

    outcomes: list[Outcome]
    together: Outcome | None
    options: Options | None
    limits: Limits
    frames: int
    alone: bool
    model: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """Names of the steps that raised, what was kept measured together included."""
        return [one.name for one in (*self.outcomes, self.together) if one is not None and one.failed]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; :func:`load_options` reads the options back."""
        options = self.options
        if options is not None:
            options = {**options, "precision": options["precision"].to_dict(), "without": list(options["without"])}
        return {
            "schema": _SCHEMA,
            "versions": {"csm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "machine": machine(),
            "model": self.model,
            "frames": self.frames,
            "alone": self.alone,
            "limits": asdict(self.limits),
            "steps": [one.to_dict() for one in self.outcomes],
            "together": None if self.together is None else self.together.to_dict(),
            "options": options,
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def load_options(path: str | Path) -> Options:
    """The options of a saved rollout.

    Raises:
        ValueError: not a rollout, or one that kept nothing.
        OSError: the file cannot be read.
    """
    try:
        return _options_in(strict_json(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_FIELDS = {"schema", "versions", "machine", "model", "frames", "alone", "limits", "steps", "together", "options"}
_OPTIONS = {"mode", "precision", "without", "codec_batch_frames"}


def _options_in(data: Any) -> Options:
    if not isinstance(data, dict) or type(data.get("schema")) is not int or data["schema"] != _SCHEMA:
        raise ValueError(f"not a rollout of schema {_SCHEMA}")
    if set(data) != _FIELDS:
        raise ValueError(f"a rollout must have the fields {sorted(_FIELDS)}, got {sorted(data)}")
    options = data["options"]
    if options is None:
        raise ValueError("nothing was kept in this rollout, leave the model as it is")
    if not isinstance(options, dict) or set(options) | {"codec_batch_frames"} != _OPTIONS:
        got = sorted(options) if isinstance(options, dict) else options
        raise ValueError(
            f"options must be mode, precision, without and at most codec_batch_frames besides, got {got!r}"
        )
    mode, without, together = options["mode"], options["without"], options.get("codec_batch_frames", 0)
    if mode not in MODES:
        raise ValueError(f"options: mode must be one of {MODES}, got {mode!r}")
    if not isinstance(without, list) or not all(name in OPTIONAL for name in without):
        raise ValueError(f"options: without must be a list of names from {OPTIONAL}, got {without!r}")
    if type(together) is not int or together < 0:
        raise ValueError(f"options: codec_batch_frames must be an integer of at least 0, got {together!r}")
    return {**options, "precision": PrecisionPolicy.from_dict(options["precision"]), "without": tuple(without)}


# --------------------------------------------------------------------------------------------------------- the walk


def verify(
    model: Any,
    calibration: Any = None,
    *,
    policy: str | PrecisionPolicy = "fast",
    limits: Limits | None = None,
    repeats: int = 3,
    alone: bool = False,
    skip: Sequence[str] = (),
    progress: bool = True,
) -> Rollout:
    """Walk the list of optimisations; the model is the stock model afterwards.

    Args:
        model: transformers' CSM with its own weights; if it is accelerated, that ends.
        calibration: a :class:`~csm_runtime.calibration.Calibration`, a list of prompts, or None for made-up text. Its
            thresholds and state are not used.
        policy: whose zones that are not kept are steps, each by itself; safe zones only where it names them.
        limits: what a step has to hold.
        repeats: times that both sides are timed, in turns.
        alone: each step on top of static buffers (and of the compiled step, where it needs that) instead of what has been
            kept so far; what was kept is then measured together.
        skip: names of steps to leave out.
        progress: show progress bars.

    Raises:
        ValueError: a bad argument, or prompts to none of which the stock model says more than one frame.
    """
    limits = limits or Limits()
    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"repeats must be an integer of at least 1, got {repeats!r}")
    if calibration is None:
        calibration = Calibration()
    elif not isinstance(calibration, Calibration):
        if isinstance(calibration, Sequence) and not len(calibration):
            raise ValueError("calibration must hold prompts, got an empty list; None takes made-up text")
        calibration = Calibration(calibration)
    # Near ties are judged by the rollout's own limits.
    calibration = replace(calibration, thresholds=limits.fidelity, state=None)
    walk = steps(resolve_policy(policy), model.config.num_codebooks)
    unknown = set(skip) - {step.name for step in walk}
    if unknown:
        raise ValueError(f"skip: no step is called {sorted(unknown)[0]!r}; there are {[step.name for step in walk]}")
    handle = model.__dict__.get("acceleration")
    if isinstance(handle, Acceleration):
        handle.restore()
    case = Case(model, calibration, progress)
    with closing(Progress(len(walk) + 1, "optimisations", progress)) as bar:
        return _Walk(case, walk, limits, repeats, alone, frozenset(skip), progress).run(bar)


class _Walk:
    def __init__(
        self,
        case: Case,
        walk: list[Step],
        limits: Limits,
        repeats: int,
        alone: bool,
        skip: frozenset[str],
        progress: bool,
    ) -> None:
        self._case, self._walk, self._limits, self._repeats = case, walk, limits, repeats
        self._alone, self._skip, self._progress = alone, skip, progress
        self._stock = Stock(case)
        self._sides: dict[str, Accelerated] = {}
        self._kept: dict[str, Options] = {}
        """By step: the options that it was kept with."""

    def run(self, bar: Progress) -> Rollout:
        options: Options | None = None
        outcomes = []
        for step in self._walk:
            outcome, options = self._tried(step, options)
            outcomes.append(outcome)
            bar.advance(step.name)
        together = None
        if options is not None:
            together = self._together(options)
            if not together.kept:
                options = None
        bar.advance(_TOGETHER)
        case, spec = self._case, self._case.reference.spec
        facts = {
            "spec": asdict(spec),
            "dtype": str(case.reference.dtype).removeprefix("torch."),
            "device": str(case.model.device),
        }
        return Rollout(outcomes, together, options, self._limits, len(case.reference.codes), self._alone, facts)

    def _tried(self, step: Step, options: Options | None) -> tuple[Outcome, Options | None]:
        """A step's outcome, and the options after it."""
        reason = "left out by request" if step.name in self._skip else step.unfit(self._case.model)
        if reason is None and step.needs is not None and step.needs not in self._kept:
            reason = f"means nothing without {step.needs!r}, which was not kept"
        if reason is not None:
            return Outcome(step.name, False, reason, timed=step.timed), options
        start = time.perf_counter()
        under = self._kept[step.needs] if self._alone and step.needs is not None else options
        changed = step.change(under or {})
        before: Stock | Accelerated = self._stock
        try:
            if under is not None:
                before = self._side(under)
            outcome = self._measured(step, before, changed)
        except Exception as error:  # whatever it was, the step is off again
            outcome = Outcome(step.name, False, _said(error), True, step.timed, before.fidelity)
        outcome = replace(outcome, seconds=time.perf_counter() - start)
        if outcome.kept:
            self._kept[step.name] = changed
            options = changed if not self._alone or options is None else step.change(options)
        self._forget_others(options)
        return outcome, options

    def _measured(self, step: Step, before: Stock | Accelerated, options: Options) -> Outcome:
        timed = step.timed
        early = [before.times(timed, i) for i in self._turns(timed)] if step.stays else []
        after = self._sides[_key(options)] = Accelerated(self._case, options, step.timed == SOUND, self._progress)
        seen = Outcome(step.name, False, "", timed=timed, before=before.fidelity, after=after.fidelity)
        idle = step.idle(after.handle)
        if idle is not None:
            return replace(seen, reason=idle)
        seen = self._timed(seen, before, after, early)
        if timed == SOUND:
            assert isinstance(before, Accelerated)
            pairs = zip(after.sound(), before.sound())
            seen = replace(seen, sound_db=min(float(fidelity.audio_sqnr_db(b, a)) for a, b in pairs))
        reason = self._too_bad(seen, step.lowers, 0.0 if step.founds else self._limits.min_speed)
        return replace(seen, kept=not reason, reason=reason)

    def _turns(self, timed: str) -> list[int]:
        """The passages whose runs are timed, one after the other; all sound is one run."""
        numbers = {SOUND: [0], FRAME: self._case.timed}.get(timed, list(range(len(self._case.passages))))
        return self._repeats * numbers

    def _timed(
        self, seen: Outcome, before: Stock | Accelerated, after: Accelerated, early: list[list[float]] | None = None
    ) -> Outcome:
        """With the times of both sides, taken in turns: what else the machine does, it does to both of a pair."""
        theirs, ours = list(early or ()), []
        for turn, i in enumerate(self._turns(seen.timed)):
            if early:
                ours.append(after.times(seen.timed, i))
            elif turn % 2:
                ours.append(after.times(seen.timed, i))
                theirs.append(before.times(seen.timed, i))
            else:
                theirs.append(before.times(seen.timed, i))
                ours.append(after.times(seen.timed, i))
        # Where codes were given, the stock model's own speech, which is what it is timed on, may still end at once.
        pairs = [(a, b) for a, b in zip(theirs, ours) if a and b]
        if not pairs:
            raise ValueError("nothing to time: the stock model ends its speech after the first frame of every prompt")
        theirs, ours = ([pair[i] for pair in pairs] for i in range(2))
        one, other = (1000 * statistics.median(x for run in runs for x in run) for runs in (theirs, ours))
        speed = statistics.median(statistics.median(a) / statistics.median(b) for a, b in zip(theirs, ours))
        return replace(seen, ms_before=one, ms_after=other, speed=speed)

    def _too_bad(self, seen: Outcome, lowers: bool, min_speed: float) -> str:
        """Why it is not to be kept, or nothing."""
        limits, after, before, speed = self._limits, seen.after or {}, seen.before or {}, seen.speed
        reasons = list(limits.fidelity.excess(after, self._case.reference.spec.codebooks).values())
        for group in () if lowers else after:
            added = after[group].kl_nats - before[group].kl_nats
            if not added <= limits.max_kl_added:
                reasons.append(f"adds {added:.2g} nats to the KL of {group}, the limit {limits.max_kl_added:.2g}")
        if seen.sound_db is not None and not seen.sound_db >= limits.min_sound_db:
            reasons.append(f"its sound is {seen.sound_db:.1f} dB from that before, the limit {limits.min_sound_db:g}")
        if speed is not None and not speed >= min_speed:
            reasons.append(f"{speed:.2f} times as fast as before, the limit {min_speed:g}")
        return "; ".join(reasons)

    def _together(self, options: Options) -> Outcome:
        start = time.perf_counter()
        seen = Outcome(_TOGETHER, False, "", before=self._stock.fidelity)
        try:
            side = self._side(options)
            seen = self._timed(replace(seen, after=side.fidelity), self._stock, side)
            reason = self._too_bad(seen, True, self._limits.min_speed)
            seen = replace(seen, kept=not reason, reason=reason)
        except Exception as error:  # what the steps have shown is worth a table all the same
            seen = replace(seen, failed=True, reason=_said(error))
        return replace(seen, seconds=time.perf_counter() - start)

    def _side(self, options: Options) -> Accelerated:
        key = _key(options)
        if key not in self._sides:
            self._sides[key] = Accelerated(self._case, options, False, self._progress)
        return self._sides[key]

    def _forget_others(self, options: Options | None) -> None:
        """Packed copies and compiled steps of sides that nothing is compared with any more."""
        if self._alone:
            needed = {step.needs for step in self._walk}
            held = [one for name, one in self._kept.items() if name in needed]
        else:
            held = [] if options is None else [options]
        wanted = {_key(one) for one in held}
        self._sides = {key: side for key, side in self._sides.items() if key in wanted}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _key(options: Options) -> str:
    plain = {**options, "precision": options["precision"].rules, "without": sorted(options["without"])}
    return json.dumps(plain, sort_keys=True)


# -------------------------------------------------------------------------------------------------------- the table

_HEADINGS = (
    "optimisation",
    "KL of codebook 0",
    "KL of others",
    "greedy tokens kept",
    "ms before",
    "ms after",
    "speed",
    "",
)


def rows(rollout: Rollout) -> list[tuple[str, ...]]:
    """The table, one row for each step, then what was kept against stock; times are of a frame unless the name says."""
    out: list[tuple[str, ...]] = []
    for one in (*rollout.outcomes, *(() if rollout.together is None else (rollout.together,))):
        figures = list((one.after or {}).values())
        others = figures[1:]
        verdict = "kept" if one.kept else f"failed: {one.reason}" if one.failed else f"off: {one.reason}"
        out.append(
            (
                one.name if one.timed == FRAME else f"{one.name} ({one.timed})",
                f"{figures[0].kl_nats:.2g}" if figures else "",
                f"{max(part.kl_nats for part in others):.2g}" if others else "",
                f"{min(part.top1 for part in figures):.1%}" if figures else "",
                "" if one.ms_before is None else f"{one.ms_before:.2f}",
                "" if one.ms_after is None else f"{one.ms_after:.2f}",
                "" if one.speed is None else f"{one.speed:.2f}",
                verdict,
            )
        )
    return out


def show(rollout: Rollout) -> None:
    """Print the table, with rich where it is installed, and what to call ``accelerate()`` with."""
    title = f"{rollout.model['device']}, {rollout.model['dtype']}, {rollout.frames} frames of the stock model's speech"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in (_HEADINGS, *rows(rollout)):
            print(f"{row[0]:<32} " + " ".join(f"{cell:>18}" for cell in row[1:7]) + f"  {row[7]}")
    else:
        drawn = Table(title=title)
        for i, heading in enumerate(_HEADINGS):
            drawn.add_column(heading, justify="left" if i in (0, 7) else "right")
        for row in rows(rollout):
            drawn.add_row(*row)
        console = Console()
        (console if console.is_terminal else Console(width=150)).print(drawn)
    if rollout.options is None:
        print("nothing was kept: leave the model as it is")
        return
    options = rollout.options
    print("KL in nats against the stock weights in fp32; times are medians, both sides in turns")
    print(
        f"accelerate(model, mode={options['mode']!r}, precision={options['precision']}, without={options['without']})"
    )
