"""Confidence intervals of candidate minus baseline: pure arithmetic in the standard library, imports nothing of ours.

Means are compared by Student's t (pairs) or Welch's t with a floor under the smaller variance, values of which only two occur
by Newcombe's score intervals. What was measured while the odds of the two arms were different goes in as strata, which are
compared one by one and then averaged: pooled, a slow hour in which few requests got the candidate would look like a slow
baseline.

With ``sequential=True`` the interval holds at all sizes at once, so that a report may be read after every request and acted
on at any time; without it, at one size that was fixed before. It is 1.55 to 1.9 times as wide between 100 and 20,000 of
each arm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

MIN_MEASUREMENTS = 10
"""Of each arm, or pairs: below this no interval is claimed. With two of each, Newcombe's finds a difference between fair coins
in 13% of all cases (2000 simulations)."""

_BORROWED = 4.0
"""How many values' worth of the variance common to both arms an arm takes on, in units of the kurtosis. A variance is known to
about the kurtosis over the number of values: where one score of a hundred is bad, a small arm often has none of them, and by
its own variance knows its mean exactly. Welch's alone then finds a difference between equal arms of 200 and 20 in 12% of all
cases, of 2000 and 20 in 82%; docs/experiments.md has the rates with this."""

_UNEQUAL = 10
"""From arms more unequal than this on, Newcombe's interval is made no narrower than the t interval: where one of a hundred is
bad, one bad among 10 against 990 would else be a difference, in 9% of all cases between equal arms."""

_TIGHTEST_AT = 50.0
"""Where the sequential interval spends its error, ``n0`` in the boundary below: its width relative to the fixed one is least at
about ten times as many pairs, or twenty times as many of each arm."""

_NORMAL_ABOVE = 1e5
"""Degrees of freedom from which on the expansion of Student's quantile about the normal one is exact to 1e-9."""


@dataclass(frozen=True)
class Interval:
    """An estimate of candidate minus baseline; infinite, with the reason, where there is too little to say."""

    n_baseline: int
    n_candidate: int
    mean_baseline: float
    mean_candidate: float
    """Of the values used, averages over strata; NaN where there are none."""
    low: float = -math.inf
    high: float = math.inf
    method: str = "none"
    reason: str = ""
    strata: int = 1
    """How many were used."""

    @property
    def difference(self) -> float:
        """Candidate minus baseline."""
        return self.mean_candidate - self.mean_baseline


@dataclass(frozen=True)
class _Unit:
    """What values are computed in, so that no square overflows; 0 and 1 where only two values occur."""

    scale: float
    """A power of two, as division by it rounds nothing."""
    low: float = 0.0
    high: float = 1.0
    shares: bool = False
    """Whether ``low`` and ``high`` are the only values, after scaling."""

    @classmethod
    def of(cls, arms: Sequence[Sequence[float]]) -> _Unit:
        """Of arms that are compared. Two values that never occur in one arm are no shares: they have no variance."""
        values = {value for arm in arms for value in arm}
        if values <= {0, 1}:
            return cls(1.0, shares=True)
        scale = 2.0 ** (math.frexp(max(map(abs, values)))[1] - 1)
        if len(values) == 2 and any(len(set(arm)) == 2 for arm in arms):
            return cls(scale, min(values) / scale, max(values) / scale, shares=True)
        return cls(scale)

    def into(self, values: Sequence[float]) -> list[float]:
        """Values in this unit."""
        scaled = [value / self.scale for value in values]
        return [float(value == self.high) for value in scaled] if self.shares else scaled

    def back(self, interval: Interval) -> Interval:
        """An interval in the unit of the values."""
        step = self.high - self.low
        return replace(
            interval,
            mean_baseline=(self.low + step * interval.mean_baseline) * self.scale,
            mean_candidate=(self.low + step * interval.mean_candidate) * self.scale,
            low=step * interval.low * self.scale,
            high=step * interval.high * self.scale,
        )


@dataclass(frozen=True)
class _Part:
    """One stratum, or the pairs: both arms' values, and what its difference rests on."""

    baseline: Sequence[float]
    candidate: Sequence[float]
    requests: int
    effective: float
    """Pairs that would tell as much if all values had one variance and pairs no correlation: n for pairs, m n / (m + n)."""
    variances: tuple[tuple[float, int], ...]
    """Squared standard errors of the means in it, each with its degrees of freedom."""


def t_quantile(probability: float, df: float) -> float:
    """Quantile of Student's t, to 1e-9 relative, by bisection of the regularised incomplete beta function.

    Args:
        probability: in [0.5, 1).
        df: degrees of freedom, positive, need not be whole.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability={probability!r}: wanted 0.5 <= probability < 1")
    if not df > 0:
        raise ValueError(f"df={df!r}: wanted a positive number")
    return _upper_t_quantile(1 - probability, df)


def _upper_t_quantile(tail: float, df: float) -> float:
    """The value that Student's t exceeds with probability ``tail``; exact for tails that 1 - tail would round away."""
    if df > _NORMAL_ABOVE:
        z = -NormalDist().inv_cdf(tail)
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    low, high = 0.0, 1.0
    while _t_tail(high, df) > tail:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tail(middle, df) > tail else (low, middle)
    return (low + high) / 2


def _t_tail(t: float, df: float) -> float:
    """P(T > t) for t >= 0: half the incomplete beta function at df / (df + t^2)."""
    x, rest = df / (df + t * t), t * t / (df + t * t)
    a, b = df / 2, 0.5
    front = math.exp(
        math.lgamma(a + b)
        - math.lgamma(a)
        - math.lgamma(b)
        + a * math.log(x)
        + (b * math.log(rest) if rest else -math.inf)
    )
    if x < (a + 1) / (a + b + 2):
        return 0.5 * front * _beta_fraction(a, b, x) / a
    return 0.5 * (1 - front * _beta_fraction(b, a, rest) / b)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function by Lentz's method (Numerical Recipes, 6.4)."""
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    result = d
    m = 0
    step = 0.0
    while abs(step - 1) > 1e-15 and m < 10_000:
        m += 1
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            step = c * d
            result *= step
    return result


def wilson(successes: int, size: int, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share, for a critical value of the normal distribution."""
    p = successes / size
    middle = (p + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(p * (1 - p) / size + (z / (2 * size)) ** 2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def unpaired(
    strata: Sequence[tuple[Sequence[float], Sequence[float]]], confidence: float, sequential: bool = False
) -> Interval:
    """Candidate minus baseline from requests that were measured on one arm each.

    Args:
        strata: values of the baseline and of the candidate, of requests that were assigned by the same odds. Those with too
            few of either are left out; the others count by their requests.
        confidence: of the two-sided interval, in (0, 1).
        sequential: whether it must hold at all sizes at once.

    Returns:
        Welch's t interval, in which each arm's variance is at least what :func:`_variances` says; Newcombe's (1998, method 10)
        if only two values occur, and both in one arm, or zeros and ones alone.
    """
    used = [(b, c) for b, c in strata if min(len(b), len(c)) >= MIN_MEASUREMENTS]
    unit = _Unit.of([arm for stratum in used or strata for arm in stratum])
    if not used:
        baseline, candidate = (unit.into([v for stratum in strata for v in stratum[arm]]) for arm in (0, 1))
        most = max((min(len(b), len(c)) for b, c in strata), default=0)
        reason = f"too few requests: {most} of the smaller arm, wanted {MIN_MEASUREMENTS}"
        return unit.back(Interval(len(baseline), len(candidate), _mean(baseline), _mean(candidate), reason=reason))
    parts = []
    for b, c in ((unit.into(b), unit.into(c)) for b, c in used):
        variances = tuple((v / len(arm), len(arm) - 1) for v, arm in zip(_variances(b, c), (b, c)))
        parts.append(_Part(b, c, len(b) + len(c), len(b) * len(c) / (len(b) + len(c)), variances))
    z = _critical(parts, confidence, sequential)
    if unit.shares:
        return unit.back(_newcombe(parts, [_strata_of_shares(part, z) for part in parts], "Newcombe"))
    return unit.back(_t_interval(parts, z, "Welch t"))


def paired(
    baseline: Sequence[float], candidate: Sequence[float], confidence: float, sequential: bool = False
) -> Interval:
    """Candidate minus baseline from requests that were measured on both arms.

    Args:
        baseline: a value for each request.
        candidate: as many, in the same order.
        confidence: of the two-sided interval, in (0, 1).
        sequential: whether it must hold at all sizes at once.

    Returns:
        Student's t interval of the differences; Newcombe's for paired shares (1998, method 10) if only two values occur, and
        both in one arm, or zeros and ones alone.
    """
    unit = _Unit.of((baseline, candidate))
    baseline, candidate = unit.into(baseline), unit.into(candidate)
    differences = [c - b for b, c in zip(baseline, candidate, strict=True)]
    size = len(differences)
    if size < MIN_MEASUREMENTS:
        reason = f"too few pairs: {size}, wanted {MIN_MEASUREMENTS}"
        return unit.back(Interval(size, size, _mean(baseline), _mean(candidate), reason=reason))
    part = _Part(baseline, candidate, size, size, ((_variance(differences) / size, size - 1),))
    z = _critical([part], confidence, sequential)
    if unit.shares:
        return unit.back(_newcombe([part], [_shares_of_pairs(baseline, candidate, z)], "paired Newcombe"))
    return unit.back(_t_interval([part], z, "paired t"))


def _weights(parts: Sequence[_Part]) -> list[float]:
    total = sum(part.requests for part in parts)
    return [part.requests / total for part in parts]


def _estimate(parts: Sequence[_Part], method: str) -> Interval:
    """Sizes and means, not yet an interval."""
    weights = _weights(parts)
    return Interval(
        n_baseline=sum(len(part.baseline) for part in parts),
        n_candidate=sum(len(part.candidate) for part in parts),
        mean_baseline=math.fsum(w * _mean(part.baseline) for w, part in zip(weights, parts)),
        mean_candidate=math.fsum(w * _mean(part.candidate) for w, part in zip(weights, parts)),
        method=method,
        strata=len(parts),
    )


def _critical(parts: Sequence[_Part], confidence: float, sequential: bool) -> float:
    """Standard errors on each side of the estimate, were they known.

    Sequential: Robbins' normal mixture, ``sqrt((1 + n0 / n) log((1 + n / n0) / alpha^2))``, with estimated variance an
    asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and
    asymptotic confidence sequences", 2021).
    """
    if not sequential:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    effective = 1 / sum(weight**2 / part.effective for weight, part in zip(_weights(parts), parts))
    ratio = effective / _TIGHTEST_AT
    return math.sqrt((1 + 1 / ratio) * (math.log1p(ratio) - 2 * math.log(1 - confidence)))


def _t_interval(parts: Sequence[_Part], z: float, method: str) -> Interval:
    """Mean over the parts, with what Student's t says of it."""
    estimate, half = _estimate(parts, method), _half_width(parts, z)
    if half == 0:
        return replace(estimate, reason="no variance: all values of an arm, or all differences of pairs, are the same")
    return replace(estimate, low=estimate.difference - half, high=estimate.difference + half)


def _half_width(parts: Sequence[_Part], z: float) -> float:
    """Degrees of freedom by Satterthwaite, over as many variances as there are; zero without variance."""
    errors = [(w * w * square, df) for w, part in zip(_weights(parts), parts) for square, df in part.variances]
    square = math.fsum(error for error, _ in errors)
    if square == 0:
        return 0.0
    # the shares of the errors are squared, not the errors: those of 1e-200 would vanish
    df = 1 / math.fsum((error / square) ** 2 / df for error, df in errors)
    return _upper_t_quantile(NormalDist().cdf(-z), df) * math.sqrt(square)


def _newcombe(parts: Sequence[_Part], distances: Sequence[tuple[float, float]], method: str) -> Interval:
    """Strata's intervals put together by the squares of their arms (Yan and Su 2010, with weights of our own)."""
    estimate, weights = _estimate(parts, method), _weights(parts)
    below = math.sqrt(math.fsum((w * down) ** 2 for w, (down, _) in zip(weights, distances)))
    above = math.sqrt(math.fsum((w * up) ** 2 for w, (_, up) in zip(weights, distances)))
    return replace(estimate, low=estimate.difference - below, high=estimate.difference + above)


def _strata_of_shares(part: _Part, z: float) -> tuple[float, float]:
    """How far the interval of a stratum reaches below and above the difference of its shares."""
    below, above = _shares_apart(part.baseline, part.candidate, z)
    sizes = sorted((len(part.baseline), len(part.candidate)))
    if sizes[1] <= _UNEQUAL * sizes[0]:
        return below, above
    half = _half_width([part], z)
    return max(below, half), max(above, half)


def _shares_apart(
    baseline: Sequence[float], candidate: Sequence[float], z: float, phi: float = 0.0
) -> tuple[float, float]:
    """How far Newcombe's interval reaches below and above the difference of two shares of correlation ``phi``."""
    (low_b, high_b), (low_c, high_c) = (wilson(round(sum(v)), len(v), z) for v in (baseline, candidate))
    p_b, p_c = _mean(baseline), _mean(candidate)

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    return distance(p_c - low_c, high_b - p_b), distance(high_c - p_c, p_b - low_b)


def _shares_of_pairs(baseline: Sequence[float], candidate: Sequence[float], z: float) -> tuple[float, float]:
    """As above for pairs, with the correlation of the four-fold table, corrected towards zero as Newcombe has it."""
    n = len(baseline)
    both = sum(1 for b, c in zip(baseline, candidate) if b and c)
    only_b, only_c = round(sum(baseline)) - both, round(sum(candidate)) - both
    neither = n - both - only_b - only_c
    product: float = both * neither - only_b * only_c
    if product > 0:
        product = max(product - n / 2, 0.0)
    margins = (both + only_b) * (both + only_c) * (neither + only_b) * (neither + only_c)
    return _shares_apart(baseline, candidate, z, product / math.sqrt(margins) if margins else 0.0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _residuals(values: Sequence[float]) -> list[float]:
    """About the mean; exactly zero where all values are the same, which rounding of the mean would hide."""
    mean = values[0] if min(values) == max(values) else _mean(values)
    return [value - mean for value in values]


def _variance(values: Sequence[float]) -> float:
    return math.fsum(r * r for r in _residuals(values)) / (len(values) - 1)


def _variances(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Variances of two arms, each with ``_BORROWED`` times the kurtosis more values of the variance common to both, where
    that makes it larger: what one arm alone shows of rare values, or of a long tail, the other may have as well."""
    arms = [_residuals(one), _residuals(other)]
    largest = max(abs(r) for arm in arms for r in arm)
    if largest == 0:
        return 0.0, 0.0
    squares = [math.fsum((r / largest) ** 2 for r in arm) for arm in arms]
    size, total = len(one) + len(other), math.fsum(squares)
    common = total / (size - 2)
    borrowed = _BORROWED * size * math.fsum((r / largest) ** 4 for arm in arms for r in arm) / total**2
    first, second = (
        max(square / (len(arm) - 1), (square + borrowed * common) / (len(arm) - 1 + borrowed)) * largest * largest
        for square, arm in zip(squares, arms)
    )
    return first, second
