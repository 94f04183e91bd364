"""The guard: sampled verification of the frames, limits, suspicion, and how far the fast path is trusted.

It is given checks as callables and imports no kernels. It never changes a frame: it reads, judges, and says from which
frame on an utterance is to be made again, and on which rung. What it cannot afford it skips, and counts that.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from csm_kernels import sample_frames
from csm_runtime.events import GuardEvent
from csm_runtime.metrics import Metrics

logger = logging.getLogger("csm_runtime")

FALLBACKS = ("ladder", "forbid")
FAST, STOCK = "fast", "stock"
BLOCK = 16
"""One frame of each block of this many is verified."""
_KEPT = 2 * BLOCK
"""Frames kept for a closer look: two samples may be as far apart."""
CHECKS = ("copies", "depth", "backbone", "formats", "backbone formats")
"""In the order in which a sampled frame gets them: the one that says most comes first. They share the budget equally, and
what one cannot use goes to the others."""

_STRICT = "codebook 0"
_MARGIN_DB = {_STRICT: 6.0}
_USUAL_MARGIN_DB = 10.0
"""Below the worst of the calibrated frames: ten times the noise power of health, four times where codebook 0 is judged."""
_CEILING_DB = {"float32": 60.0, "float16": 50.0, "bfloat16": 40.0}
"""Limits above these would find roundings, not bugs. A fp32 decode step stands at 110 dB. With a cache in bf16 most frames do
too, but in some a key rounds the other way and they stand at 50: six healthy frames say nothing of that. A lost tile has 26."""
_SOUND_DB = 20.0
"""A decode step that stands below this when it is calibrated is wrong: eager bf16 has 36 on random weights, a lost tile 26."""
_MARGIN_NATS = 4.0
_TIE = {_STRICT: 3.0}
_USUAL_TIE = 6.0
"""Times the largest error of a logit seen in calibration: by how much a token may lose that was drawn all the same."""
_PEAK = {_STRICT: 4.0}
_USUAL_PEAK = 8.0
"""Times the error that the limit of the same logits lets pass: a token within it is no evidence of more."""
_LEAST_RATE = 0.004
_WORSE = 5.0
"""The rate of differing tokens that is to be told from the calibrated one: 10 % from 2 % takes 4.6 s of speech."""
_ALARM = 20.0
"""Of Wald's log likelihood ratio. Starting over at 0, it takes exp(20) tokens of health on average to get there."""
_MOST_EVENT_BYTES = 512 << 20
"""Of tensors that all events in memory hold together: beyond that, the oldest keep their words only."""


class Interrupted(RuntimeError):
    """Raised by the guard with ``fallback="forbid"``: the fast path failed, or its frames failed verification."""


@dataclass(frozen=True)
class GuardConfig:
    """How much the guard may cost and what it does.

    Args:
        verify: False leaves only the checks of every frame and the fallback.
        budget: share of the generation time that verification may take; what would exceed it is skipped and counted.
        fallback: ``"ladder"`` goes one rung down, finally to the stock path; ``"forbid"`` raises instead, for benchmarks.
        healthy_frames: frames without an incident on a lower rung after which the fast path is tried again, once; 0: never.
        events: incidents that are kept in memory, with their tensors.
        events_dir: where they are written as well, each as a JSON and a safetensors file.
        seed: of the draw of frames.
    """

    verify: bool = True
    budget: float = 0.03
    fallback: str = "ladder"
    healthy_frames: int = 10_000
    events: int = 16
    events_dir: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.budget, (int, float)) and self.budget > 0):
            raise ValueError(f"guard.budget must be a share above 0, such as 0.03, got {self.budget!r}")
        _check_fallback(self.fallback)
        for name in ("healthy_frames", "events"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"guard.{name} must be an integer of at least 0, got {value!r}")


def _check_fallback(value: Any) -> None:
    if value not in FALLBACKS:
        raise ValueError(f"guard.fallback must be one of {FALLBACKS}, got {value!r}")


class Verifier(Protocol):
    """Runs a check by name on samples, given all frames of the call: see :class:`csm_runtime.checks.Checks`."""

    def __call__(self, name: str, samples: Sequence[Any], codes: Sequence[Tensor]) -> Found:
        """Run a check."""
        ...

    def evidence(self, samples: Sequence[Any], codes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors that an event keeps."""
        ...


class Found(Protocol):
    """What a check returns: see :class:`csm_runtime.checks.Measures`."""

    frames: list[int]
    least: dict[str, list[float]]
    most: dict[str, list[float]]
    differing: dict[str, tuple[int, int]]
    broken: list[str]


@dataclass(frozen=True)
class Finding:
    """One measure beyond its limit."""

    check: str
    measure: str
    frame: int
    """The first frame it speaks against."""
    value: float
    limit: float

    def __str__(self) -> str:
        if self.check == "copies":
            return f"packed copy {self.measure} has changed in memory"
        unit = "nats" if self.measure.startswith("divergence") else "in logits" if "margin" in self.measure else "dB"
        if self.measure.startswith("differing"):
            return f"{self.measure}: {self.value:.1%} of them, healthy is {self.limit:.1%}"
        side = "above" if unit != "dB" else "below"
        return f"{self.measure} at {self.value:.3g} {unit}, {side} the limit of {self.limit:.3g}"


@dataclass(frozen=True)
class Floors:
    """Limits for one policy on one rung, calibrated on frames of the model's own.

    ``least`` in dB, ``most`` in nats and logits, ``rates`` of tokens that differ in health, ``seconds`` that each check
    took, all by name.
    """

    policy: str
    mode: str
    dtype: str
    frames: int
    least: dict[str, float]
    most: dict[str, float]
    ties: dict[str, float]
    rates: dict[str, float]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Floors:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: fields are missing or unknown.
        """
        wanted = set(cls.__dataclass_fields__)
        if set(data) != wanted:
            raise ValueError(f"floors must have the fields {sorted(wanted)}, got {sorted(data)}")
        return cls(**data)

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Floors:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))


def floors_of(
    measured: Mapping[str, Sequence[Found]],
    seconds: dict[str, float],
    *,
    policy: str,
    mode: str,
    dtype: str,
    rounded: str = "float32",
) -> Floors:
    """Limits from what healthy frames measured.

    Args:
        measured: by check, what it found on healthy frames; ``depth`` with made-up noises.
        seconds: that each check took, for one frame.
        policy: name of the precision policy.
        mode: how the frames were run.
        dtype: of the model.
        rounded: the coarsest dtype that the decode steps round to: the model's or the cache's.

    Raises:
        ArithmeticError: they were not healthy: a decode step far off its own reference.
    """
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    ties: dict[str, float] = {}
    rates: dict[str, float] = {}
    scales: dict[str, float] = {}
    for check, results in measured.items():
        for found in results:
            for name, values in found.least.items():
                worst = min(values, default=math.inf)
                if check in ("depth", "backbone") and worst < _SOUND_DB:
                    raise ArithmeticError(
                        f"{name} at {worst:.1f} dB, where a sound decode step has {_SOUND_DB:.0f} or more"
                    )
                margin = next((db for group, db in _MARGIN_DB.items() if name.endswith(group)), _USUAL_MARGIN_DB)
                least[name] = min(least.get(name, math.inf), worst - margin, _CEILING_DB[rounded])
            for name, values in found.most.items():
                worst = max(values, default=0.0)
                if name.startswith("error of "):
                    group = name.removeprefix("error of ")
                    tie = max(worst, 1e-6) * _TIE.get(group, _USUAL_TIE)
                    ties[group] = max(ties.get(group, 0.0), tie)
                elif name.startswith("size of "):
                    scales[name.removeprefix("size of ")] = worst
                elif name.startswith("divergence"):
                    most[name] = max(most.get(name, 0.0), _MARGIN_NATS * worst + 1e-4)
            for group, (differing, looked) in found.differing.items():
                rates[group] = max(_LEAST_RATE, (differing + 2) / max(1, looked))
    for group, size in scales.items():
        allowed = size * 10 ** (-least[f"logits of {group}"] / 20) * _PEAK.get(group, _USUAL_PEAK)
        ties[group] = max(ties[group], allowed)
    most |= {f"margin of {group}": tie for group, tie in ties.items()}
    count = max((len(set(found.frames)) for results in measured.values() for found in results), default=0)
    return Floors(policy, mode, dtype, count, least, most, ties, rates, dict(seconds))


def too_many(check: str, found: Found, floors: Floors, frame: int, measures: Collection[str]) -> list[Finding]:
    """Which of the suspected ``differing tokens of ...`` still are too many over all the frames looked at.

    The bar lies halfway, on a log scale, between the rate in health and the one that the sequential test tells from it.
    """
    out = []
    for group, (differing, looked) in found.differing.items():
        rate, what = floors.rates[group], f"differing tokens of {group}"
        worse = min(0.95, _WORSE * rate)
        if what in measures and looked and differing / looked > math.sqrt(worse * rate):
            out.append(Finding(check, what, frame, differing / looked, rate))
    return out


def judge(check: str, found: Found, floors: Floors) -> list[Finding]:
    """Every measure beyond its limit, the earliest frame first."""
    out = []
    for name, values in found.least.items():
        limit = floors.least.get(name, -math.inf)
        out += [Finding(check, name, f, v, limit) for f, v in zip(found.frames, values) if not v >= limit]
    for name, values in found.most.items():
        limit = floors.most.get(name, math.inf)
        out += [Finding(check, name, f, v, limit) for f, v in zip(found.frames, values) if not v <= limit]
    out += [Finding(check, name, 0, 0.0, 0.0) for name in found.broken]
    return sorted(out, key=lambda finding: finding.frame)


class Wald:
    """Whether tokens differ more often than in health, group by group: Wald's sequential test, started over at 0.

    Args:
        rates: share of tokens that differ in health, by group.
    """

    def __init__(self, rates: dict[str, float]) -> None:
        self._rates = rates
        self.ratio: dict[str, float] = dict.fromkeys(rates, 0.0)

    def add(self, group: str, differing: int, looked: int) -> float | None:
        """Count tokens; the observed rate where the test says that they differ too often, else None."""
        if group not in self._rates or not looked:
            return None
        healthy = self._rates[group]
        worse = min(0.95, _WORSE * healthy)
        gain = differing * math.log(worse / healthy) + (looked - differing) * math.log((1 - worse) / (1 - healthy))
        self.ratio[group] = max(0.0, self.ratio[group] + gain)
        if self.ratio[group] <= _ALARM:
            return None
        self.ratio[group] = 0.0  # the test has ended; whoever looks closer decides
        return differing / looked


@dataclass(frozen=True)
class Breach:
    """Why an utterance is to be made again on another rung, and from which frame on."""

    reason: str
    kind: str
    """``verification``, ``calibration``, ``frame`` (the checks of every frame), ``memory``, ``codec`` or ``exception``."""
    first_bad: int
    """The first frame that is not to be trusted."""
    suspect: str | None = None
    """``depth``, ``backbone`` or None."""
    formats: bool = False
    """Whether the weights' formats are to blame, not the decode steps."""
    findings: tuple[Finding, ...] = ()


class Purse:
    """What one check may cost: earned by generation, spent by checks, never hoarded beyond two of them."""

    def __init__(self, price: float) -> None:
        self.credit, self.price = 0.0, price

    def room(self) -> float:
        """Seconds that it can still take."""
        return max(0.0, 2 * self.price - self.credit)

    def affords(self) -> bool:
        """Whether the check may run now."""
        return self.credit >= self.price

    def pay(self, seconds: float) -> None:
        """The check has run for so long."""
        self.credit -= seconds
        self.price = 0.7 * self.price + 0.3 * seconds


def share_out(purses: Sequence[Purse], seconds: float) -> None:
    """Divide seconds equally among the purses that have room for them."""
    waiting = sorted(purses, key=Purse.room)
    for i, purse in enumerate(waiting):
        taken = min(purse.room(), seconds / (len(waiting) - i))
        purse.credit += taken
        seconds -= taken


class Guard:
    """What ``model.acceleration.guard`` is: limits, incidents, and the rung that calls start on.

    Attributes:
        config: what it was made with.
        floors: limits by rung, calibrated when a rung is first used.
        unverifiable: rungs whose calibration failed, and why: their frames go unverified until :meth:`rearm`.
        events: the latest incidents, :class:`~csm_runtime.events.GuardEvent`, oldest first.
        rung: where the next call starts: ``fast``, ``plain depth`` or ``plain backbone`` (the suspect's steps run
            eagerly), ``kept depth`` or ``kept backbone`` (its weights as the stock model has them), ``eager`` (all of that)
            or ``stock``.
        reason: why it is not ``fast``.
        codec_trusted: whether sound may be decoded in another way than by the stock codec, row by row.
    """

    def __init__(self, config: GuardConfig, metrics: Metrics) -> None:
        self.config, self._metrics = config, metrics
        self.floors: dict[str, Floors] = {}
        self.unverifiable: dict[str, str] = {}
        self.events: deque[GuardEvent] = deque(maxlen=config.events)
        self.rung, self.reason = FAST, ""
        self.codec_trusted = True
        self._fallback = config.fallback
        self._healthy, self._climbed = 0, False
        self._purses: dict[str, Purse] = {}
        self._blocks = 0
        self._tests: dict[str, Wald] = {}

    @property
    def fallback(self) -> str:
        """``"ladder"`` or ``"forbid"``; may be set."""
        return self._fallback

    @fallback.setter
    def fallback(self, value: str) -> None:
        _check_fallback(value)
        self._fallback = value

    def rearm(self) -> None:
        """Trust the fast path again: calls start on it, and its evidence starts from nothing."""
        self.rung, self.reason = FAST, ""
        self.codec_trusted = True
        self._healthy, self._climbed = 0, False
        self._tests.clear()
        self.unverifiable.clear()

    def forget_floors(self) -> None:
        """The weights or the engine have changed: limits are to be found again."""
        self.floors.clear()
        self.unverifiable.clear()

    def set_floors(self, rung: str, floors: Floors) -> None:
        """Use these limits on a rung; the checks' prices are those of its calibration."""
        self.floors[rung] = floors
        self._tests[rung] = Wald(floors.rates)
        if rung == FAST or not self._purses:
            for name, seconds in floors.seconds.items():
                self._purses.setdefault(name, Purse(seconds)).price = seconds

    def healthy(self, frames: int) -> None:
        """Count frames made without an incident; a long healthy time on a lower rung leads up again, once."""
        if self.rung == FAST or self._climbed or not self.config.healthy_frames:
            return
        self._healthy += frames
        if self._healthy >= self.config.healthy_frames:
            logger.warning("%d healthy frames on rung %r: the fast path is tried again", self._healthy, self.rung)
            self._metrics.count("guard.climbed")
            self.rung, self.reason, self._healthy, self._climbed = FAST, "", 0, True

    def step_down(self, breach: Breach, rung: str, event: GuardEvent, error: Exception | None = None) -> None:
        """Leave the present rung for good: later calls start on ``rung`` until :meth:`rearm`.

        Args:
            breach: why.
            rung: where to.
            event: what is kept of it.
            error: whose traceback the log line shows, where nobody has shown it yet.

        Raises:
            Interrupted: ``fallback`` is ``"forbid"``.
        """
        self._record(breach, event)
        if rung != self.rung:
            self._metrics.count(f"guard.rung.{rung}")
            # by the decode loop, with its traceback
            said = error is None and breach.kind in ("exception", "memory", "frame")
            logger.log(
                logging.INFO if said else logging.WARNING,
                "the guard goes from rung %r to %r at frame %d: %s; model.acceleration.guard.rearm() goes back",
                self.rung,
                rung,
                breach.first_bad,
                breach.reason,
                exc_info=error,
            )
        self.rung, self.reason, self._healthy = rung, breach.reason, 0

    def distrust_codec(self, breach: Breach, event: GuardEvent) -> None:
        """Leave decoding to the stock codec until :meth:`rearm`.

        Raises:
            Interrupted: as :meth:`step_down`.
        """
        self.codec_trusted = False
        self._record(breach, event)

    def _record(self, breach: Breach, event: GuardEvent) -> None:
        """Count and keep an incident; raise where fallback is forbidden."""
        self._metrics.count("guard.breaches")
        self._metrics.count(f"guard.breaches.{breach.kind}")
        self.events.append(event)
        self._shed()
        if self.config.events_dir is not None:
            try:
                event.save(self.config.events_dir)
            except Exception as error:  # a full disk must not cost the utterance
                what = f"an incident could not be written to {self.config.events_dir}: {error}"
                if self._metrics.fault(what):
                    logger.warning(what)
        if self._fallback == "forbid":
            raise Interrupted(
                f'{breach.reason} (frame {breach.first_bad}, rung {self.rung!r}); guard.fallback is "forbid", set it to '
                '"ladder" to go on by a safer path'
            )

    def _shed(self) -> None:
        """Let the oldest events go without their tensors where all of them hold too much; the latest keeps its own."""
        held = 0
        for i in range(len(self.events) - 1, -1, -1):
            held += sum(value.nbytes for value in self.events[i].tensors.values())
            if held > _MOST_EVENT_BYTES and i < len(self.events) - 1:
                self.events[i] = replace(self.events[i], tensors={})

    def status(self) -> dict[str, Any]:
        """Rung, reason, counts and limits as plain data."""
        counters: Counter[str] = self._metrics.counters
        return {
            "rung": self.rung,
            "reason": self.reason,
            "codec_trusted": self.codec_trusted,
            "fallback": self._fallback,
            "verify": self.config.verify,
            "unverifiable": dict(self.unverifiable),
            "budget": self.config.budget,
            "counters": {name: n for name, n in sorted(counters.items()) if name.startswith("guard.")},
            "floors": {rung: floors.to_dict() for rung, floors in self.floors.items()},
            "events": len(self.events),
        }

    def earn(self, seconds: float) -> None:
        """So long has been generated since the last time: a share of it may go to checks."""
        share_out(list(self._purses.values()), self.config.budget * seconds)

    def affords(self, check: str) -> bool:
        """Whether a check is within the budget now."""
        return self._purses[check].affords()

    def pay(self, check: str, seconds: float) -> None:
        """A check has taken so long."""
        self._purses[check].pay(seconds)

    def draw(self) -> int:
        """Which frame of the next block is verified, 0 to 15."""
        mask = torch.ones(BLOCK, dtype=torch.bool)
        self._blocks += 1
        return int(sample_frames(mask, 1, seed=self.config.seed, step=self._blocks).index)


@dataclass
class Watch:
    """The guard's eye on one stretch of frames of one call, all made on one rung.

    Args:
        guard: limits and purses.
        rung: that the frames are made on.
        checks: run a check by name on samples, given all frames so far.
        metrics: where counts and times go.
        first: number of the first frame.
        share: of the time between two frames that is this stretch's own, where several are made at once.
    """

    guard: Guard
    rung: str
    checks: Verifier
    metrics: Metrics
    first: int = 0
    share: float = 1.0
    kept: deque[Any] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _left: int = 0
    _chosen: int = 0
    _closely: int = 0
    """Frames that are all to be looked at, after a suspicion."""
    _last: float = 0.0
    _passed: dict[str, int] = field(default_factory=dict)
    """The latest frame at which each check found nothing."""

    def __post_init__(self) -> None:
        self._last = time.perf_counter()

    def look(self, sample: Any, codes: Sequence[Tensor]) -> Breach | None:
        """Judge a frame that has just been read, if it is one of the sampled ones.

        Args:
            sample: the frame, see :class:`csm_runtime.checks.Sample`; kept for a while.
            codes: ``[N, codebooks]`` of all frames of the call up to this one.
        """
        now = time.perf_counter()
        self.guard.earn((now - self._last) * self.share)
        self.kept.append(sample)
        if self._left == 0:
            self._left, self._chosen = BLOCK, self.guard.draw()
        self._left -= 1
        sampled = BLOCK - 1 - self._left == self._chosen
        breach = None
        if sampled or self._closely:
            self._closely = max(0, self._closely - 1)
            breach = self._verify(sample, codes)
            self.metrics.observe("guard", time.perf_counter() - now)
        self._last = time.perf_counter()
        return breach

    def _verify(self, sample: Any, codes: Sequence[Tensor]) -> Breach | None:
        guard, floors = self.guard, self.guard.floors.get(self.rung)
        if floors is None:
            return None
        done = 0
        for name in CHECKS:
            if name not in floors.seconds:
                continue
            if not guard.affords(name):
                self.metrics.count(f"guard.skipped.{name}")
                continue
            start = time.perf_counter()
            found = self._run(name, [sample], codes)
            findings = [] if found is None else self._judged(name, found, floors)
            guard.pay(name, time.perf_counter() - start)
            if found is None:
                continue
            done += name != "copies"  # which say nothing of the frame
            self.metrics.count(f"guard.checked.{name}")
            if findings:
                self.metrics.count("guard.suspicions")
                breach = self._confirmed(name, findings, codes, floors)
                if breach is not None:
                    return breach
                self._closely = BLOCK
            else:
                self._passed[name] = sample.frame
        self.metrics.count("guard.verified" if done else "guard.skipped")
        return None

    def _run(self, name: str, samples: Sequence[Any], codes: Sequence[Tensor]) -> Found | None:
        """A check's result; one that fails itself says nothing of the frames, and is counted."""
        try:
            return self.checks(name, samples, codes)
        except Exception as error:  # the guard never raises into generation
            what = f"the guard's check {name!r} failed: {type(error).__name__}: {str(error).strip()[:200]}"
            self.metrics.count("guard.failed")
            if self.metrics.fault(what):
                logger.warning(what, exc_info=True)
            return None

    def _judged(self, name: str, found: Found, floors: Floors) -> list[Finding]:
        findings = judge(name, found, floors)
        test = self.guard._tests.setdefault(self.rung, Wald(floors.rates))
        for group, (differing, looked) in found.differing.items():
            rate = test.add(group, differing, looked)
            if rate is not None:
                first = min(found.frames)
                findings.append(Finding(name, f"differing tokens of {group}", first, rate, floors.rates[group]))
        return findings

    def _confirmed(
        self, name: str, suspicions: list[Finding], codes: Sequence[Tensor], floors: Floors
    ) -> Breach | None:
        """Look at every frame that is still kept, whatever it costs: the breach, and where it begins; or None."""
        samples = list(self.kept)
        found = self._run(name, samples, codes)
        if found is None:
            return None
        findings = judge(name, found, floors)
        if "formats" in name and findings:
            # Formats are wrong for good or not at all: the median says which, a single frame does not.
            measures = {f.measure for f in findings}
            middle = {m: sorted(found.least.get(m) or [-v for v in found.most[m]]) for m in measures}
            limit = {m: floors.least.get(m, -floors.most.get(m, math.inf)) for m in measures}
            findings = [f for f in findings if not _median(middle[f.measure]) >= limit[f.measure]]
        elif not findings:
            # Too many differing tokens: still so over all frames that are left, or it was chance.
            findings = too_many(name, found, floors, samples[0].frame, {f.measure for f in suspicions})
        if not findings:
            return None
        first, well = min(f.frame for f in findings), self._passed.get(name, self.first - 1)
        if "formats" in name or name == "copies":  # they say nothing of when it began: all since it was last well
            first = min(well + 1, samples[-1].frame)
        elif first <= min(found.frames):  # the oldest frame that could be looked at: it may have begun before
            first = min(well + 1, first)
        first = max(self.first, first)
        return Breach(
            reason="; ".join(dict.fromkeys(str(f) for f in findings[:3])),
            kind="verification",
            first_bad=first,
            suspect="backbone" if "backbone" in name else None if name == "copies" else "depth",
            formats="formats" in name or name == "copies",
            findings=tuple(findings),
        )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.inf
