"""What two arms' measurements of one metric say: the numbers, an interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from csm_runtime.intervals import MIN_MEASUREMENTS, Interval, paired, unpaired

BASELINE, CANDIDATE = "baseline", "candidate"
ARMS = (BASELINE, CANDIDATE)

_MISSING_CONFIDENCE = 0.999
"""Of the warning that one arm lacks more measurements than the other."""


@dataclass(frozen=True)
class Comparison:
    """One metric of the candidate against the baseline; ``str()`` gives a small table."""

    experiment: str
    metric: str
    higher_is_better: bool
    method: str
    """"Welch t", "paired t", "Newcombe", "paired Newcombe" or "none"."""
    sequential: bool
    confidence: float
    margin: float
    n_baseline: int
    n_candidate: int
    """Requests compared; for pairs both are their number."""
    mean_baseline: float
    mean_candidate: float
    """Of those; averages over the shares that were in force, where there were several. NaN where there is none."""
    difference: float
    """Candidate minus baseline."""
    low: float
    high: float
    """Confidence interval of the difference; infinite where there is too little."""
    verdict: str
    """"better", "worse" or "undecided"."""
    reason: str
    """Why undecided."""
    notes: tuple[str, ...] = ()
    """What was left out, and what makes the numbers doubtful."""

    @property
    def not_worse(self) -> bool:
        """Whether the candidate is shown to be at most ``margin`` worse: what a cheaper candidate must be."""
        return self.low > -self.margin if self.higher_is_better else self.high < self.margin

    def to_dict(self) -> dict[str, Any]:
        """Plain values that strict JSON takes: what is infinite or NaN becomes None."""
        values = {**asdict(self), "not_worse": self.not_worse, "notes": list(self.notes)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        direction = "higher" if self.higher_is_better else "lower"
        always = ", at all sizes at once" if self.sequential else ""
        lines = [
            f"{self.metric} ({direction} is better)",
            f"  {BASELINE:<11}{self.n_baseline:>8}  {self.mean_baseline:>10.4g}",
            f"  {CANDIDATE:<11}{self.n_candidate:>8}  {self.mean_candidate:>10.4g}",
            f"  {'difference':<11}{'':>8}  {self.difference:>+10.4g}",
        ]
        if self.low > -math.inf:
            lines[-1] += (
                f"  [{self.low:+.4g}, {self.high:+.4g}] {self.method}, {self.confidence:.6g} confidence{always}"
            )
        lines.append(f"  {self.verdict}" + (f": {self.reason}" if self.reason else ""))
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class Measured:
    """Values of one metric, by request."""

    def __init__(self, rows: Iterable[tuple[str, str, float, str, float]]) -> None:
        """From request, its own arm, the share it was assigned by, the arm measured, and the value; one row a measurement."""
        by_request: dict[str, dict[str, float]] = {}
        assigned: dict[str, tuple[str, float]] = {}
        for request, arm, share, measured, value in rows:
            by_request.setdefault(request, {})[measured] = value
            assigned[request] = (arm, share)
        self.pairs = [(v[BASELINE], v[CANDIDATE]) for v in by_request.values() if len(v) == 2]
        self.own = [(*assigned[r], v[assigned[r][0]]) for r, v in by_request.items() if assigned[r][0] in v]
        """Arm, share and value of the requests that were measured on their own arm: the random ones."""
        self.alone = len(by_request) - len(self.pairs)
        """Requests measured on one arm only."""
        single = [next(iter(v)) for v in by_request.values() if len(v) == 1]
        self.are_paired = bool(self.pairs) and len(self.pairs) >= min(single.count(arm) for arm in ARMS)

    def strata(self) -> list[tuple[list[float], list[float]]]:
        """Values of the baseline and of the candidate, by the share that was in force."""
        groups: dict[float, tuple[list[float], list[float]]] = {}
        for arm, share, value in self.own:
            groups.setdefault(share, ([], []))[ARMS.index(arm)].append(value)
        return [groups[share] for share in sorted(groups)]

    def interval(self, pairs: bool, confidence: float, sequential: bool) -> tuple[Interval, list[str]]:
        """The interval, and notes on what it leaves out."""
        if pairs:
            left, right = [b for b, _ in self.pairs], [c for _, c in self.pairs]
            notes = [f"{self.alone} requests measured on one arm only are left out"] if self.alone else []
            return paired(left, right, confidence, sequential), notes
        strata = self.strata()
        interval = unpaired(strata, confidence, sequential)
        notes = []
        if interval.strata > 1:
            notes.append(f"{interval.strata} shares were in force: requests of each are compared apart, then averaged")
        if left_out := len(self.own) - interval.n_baseline - interval.n_candidate:
            few = f"fewer than {MIN_MEASUREMENTS} requests of one arm"
            notes.append(f"{left_out} requests are left out, assigned by shares that gave {few}")
        return interval, notes

    def missing(self, assigned: dict[str, int]) -> list[str]:
        """A note if one arm's requests lack the metric more often than the other's: the rest are then no random sample."""
        flags = []
        for arm in ARMS:
            present = sum(1 for own, _, _ in self.own if own == arm)
            flags.append([1.0] * present + [0.0] * (assigned[arm] - present))
        interval = unpaired([(flags[0], flags[1])], _MISSING_CONFIDENCE)
        if interval.low <= 0 <= interval.high:
            return []
        have = f"{interval.mean_baseline:.1%} of the baseline's requests and {interval.mean_candidate:.1%} of the candidate's"
        return [f"{have} have this metric: what is missing may explain the difference"]


def judge(interval: Interval, higher_is_better: bool, margin: float) -> tuple[str, str]:
    """The verdict of an interval, and why if it is "undecided"."""
    low, high = (interval.low, interval.high) if higher_is_better else (-interval.high, -interval.low)
    if low > margin:
        return "better", ""
    if high < -margin:
        return "worse", ""
    if interval.reason:
        return "undecided", interval.reason
    if -margin < low and high < margin:
        return "undecided", f"the interval lies within the margin of {margin:g}: no difference that matters"
    return "undecided", f"the interval reaches into the margin of {margin:g}" if margin else "the interval holds zero"
