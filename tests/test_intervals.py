"""Quantiles against scipy, intervals against published examples and against what they promise: coverage, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from csm_runtime.intervals import MIN_MEASUREMENTS, Interval, paired, t_quantile, unpaired, wilson

Draw = Callable[[np.random.Generator, int], np.ndarray]

DRAWS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "stars": lambda rng, n: rng.choice([1.0, 2, 3, 4, 5], p=[0.02, 0.05, 0.13, 0.4, 0.4], size=n),
    "seconds": lambda rng, n: rng.lognormal(0, 0.4, n),
    "thumbs": lambda rng, n: rng.binomial(1, 0.8, n).astype(float),
}


UNEVEN: dict[str, Draw] = {
    "one or five stars": lambda rng, n: rng.choice([1.0, 5], p=[0.05, 0.95], size=n),
    "a few bad stars": lambda rng, n: rng.choice([1.0, 2, 3, 5], p=[0.01, 0.02, 0.02, 0.95], size=n),
    "long waits": lambda rng, n: rng.lognormal(0, 1, n),
    "stalls": lambda rng, n: rng.normal(1, 0.1, n) + 5 * (rng.random(n) < 0.03),
}
"""What a small arm may show nothing of."""


def holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


# ---------------------------------------------------------------------------------------------------- quantiles


@pytest.mark.parametrize("df", [0.5, 1, 1.7, 2, 5, 20.3, 333, 9.9e4, 1.1e5, 1e9])
def test_quantiles_are_scipys(df: float) -> None:
    for probability in (0.5001, 0.6, 0.9, 0.975, 0.9995, 1 - 1e-9):
        assert t_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=2e-9), probability
    assert t_quantile(0.5, df) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("probability", "df", "name"), [(0.4, 3, "probability"), (1.0, 3, "probability"), (0.9, 0, "df")]
)
def test_quantiles_out_of_range(probability: float, df: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        t_quantile(probability, df)


# ------------------------------------------------------------------------------------ against scipy and the papers


def floored(b: np.ndarray, c: np.ndarray, confidence: float) -> tuple[float, float]:
    """Welch's interval with each arm's variance estimated from as many more values of the common one as four times the
    kurtosis, where that is larger."""
    within = np.concatenate([b - b.mean(), c - c.mean()])
    common = (within**2).sum() / (len(within) - 2)
    more = 4 * stats.kurtosis(within, fisher=False)
    squares = []
    for arm in (b, c):
        own, df = arm.var(ddof=1), len(arm) - 1
        squares.append(max(own, (df * own + more * common) / (df + more)) / len(arm))
    df = sum(squares) ** 2 / (squares[0] ** 2 / (len(b) - 1) + squares[1] ** 2 / (len(c) - 1))
    half = stats.t.ppf((1 + confidence) / 2, df) * math.sqrt(sum(squares))
    return c.mean() - b.mean() - half, c.mean() - b.mean() + half


@pytest.mark.parametrize(("m", "n"), [(10, 10), (10, 300), (50, 20)])
def test_welch_and_student_against_scipy(m: int, n: int) -> None:
    rng = np.random.default_rng(0)
    b, c = rng.normal(5, 1, m), rng.normal(4, 3, n)
    got = unpaired([(b.tolist(), c.tolist())], 0.99)
    assert (got.low, got.high) == pytest.approx(floored(b, c, 0.99), rel=1e-9)
    even = (b - b.mean()) * c.std(ddof=1) / b.std(ddof=1)  # of one variance: nothing is raised
    wanted = stats.ttest_ind(c, even, equal_var=False).confidence_interval(0.99)
    got = unpaired([(even.tolist(), c.tolist())], 0.99)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    pairs = min(m, n)
    wanted = stats.ttest_rel(c[:pairs], b[:pairs]).confidence_interval(0.9)
    got = paired(b[:pairs].tolist(), c[:pairs].tolist(), 0.9)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_the_floor_fades_as_the_arms_grow() -> None:
    """A candidate steadier than the baseline, with a ninth of its requests."""
    rng = np.random.default_rng(13)
    for size, least, most in ((10, 1.5, 4.0), (10_000, 1.0, 1.02)):
        b, c = rng.normal(0, 1, 9 * size), rng.normal(0, 0.3, size)
        welch = stats.ttest_ind(c, b, equal_var=False).confidence_interval(0.95)
        got = unpaired([(b.tolist(), c.tolist())], 0.95)
        assert least < (got.high - got.low) / (welch.high - welch.low) < most


def test_scale_and_offset_change_nothing() -> None:
    """Microseconds on top of a large number, and squares that vanish."""
    rng = np.random.default_rng(1)
    b, c = rng.normal(0, 1, 30), rng.normal(0.5, 1, 40)
    plain = unpaired([(b.tolist(), c.tolist())], 0.95)
    pairs = paired(b.tolist(), c[:30].tolist(), 0.95)
    for scale, offset in ((1e-300, 0.0), (1e-150, 0.0), (1e200, 0.0), (1e307, 0.0), (1.0, 1e9)):
        many, few = (b * scale + offset).tolist(), (c * scale + offset).tolist()
        for got, wanted in ((unpaired([(many, few)], 0.95), plain), (paired(many, few[:30], 0.95), pairs)):
            assert (got.low / scale, got.high / scale) == pytest.approx((wanted.low, wanted.high), rel=1e-5)
            assert got.mean_candidate / scale == pytest.approx(wanted.mean_candidate + offset)


def test_the_largest_numbers() -> None:
    """Sums and squares of which are no floats any more."""
    b, c = [1.7e308, -1.7e308, 1.2e308] * 5, [1.7e308, 1.6e308, -1e308] * 5
    for got in (unpaired([(b, c)], 0.95), paired(b, c, 0.95), unpaired([(b, c[:6])], 0.95)):
        assert got.low <= 0 <= got.high
        assert math.isfinite(got.mean_baseline) and math.isfinite(got.mean_candidate)
    apart = unpaired([(b, c), ([1e200, 2.0, 3.0] * 5, [1.0] * 14 + [2.0])], 0.95)
    assert (apart.strata, apart.low <= 0 <= apart.high) == (2, True)


def ones(count: int, size: int) -> list[float]:
    return [1.0] * count + [0.0] * (size - count)


@pytest.mark.parametrize(
    ("candidate", "baseline", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_newcombe_unpaired(candidate: tuple[int, int], baseline: tuple[int, int], low: float, high: float) -> None:
    """Table II of Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10."""
    got = unpaired([(ones(*baseline), ones(*candidate))], 0.95)
    assert (round(got.low, 4), round(got.high, 4)) == (low, high)
    assert got.method == "Newcombe"


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (-3.0, 0.0), (0.1, 0.3), (1e200, 3e200)])
def test_two_values_are_shares_whatever_they_are(low: float, high: float) -> None:
    bits, other = ones(12, 40), ones(33, 40)
    b, c = ([high if bit else low for bit in arm] for arm in (bits, other))
    for got, wanted in (
        (unpaired([(b, c)], 0.95), unpaired([(bits, other)], 0.95)),
        (paired(b, c, 0.95), paired(bits, other, 0.95)),
    ):
        assert got.method == wanted.method and "Newcombe" in got.method
        step = high - low
        assert (got.low / step, got.high / step) == pytest.approx((wanted.low, wanted.high))
        assert got.mean_candidate == pytest.approx(np.mean(c))


def test_newcombe_against_scipys_wilson() -> None:
    for successes, size in ((0, 10), (3, 17), (50, 50), (400, 1000)):
        wanted = stats.binomtest(successes, size).proportion_ci(0.95, method="wilson")
        got = wilson(successes, size, stats.norm.ppf(0.975))
        assert got == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_newcombe_paired(table: tuple[int, int, int, int], low: float, high: float) -> None:
    """Table III of Newcombe 1998, "Improved confidence intervals for the difference between ... paired data", method 10; the
    second, of an odd number, is what the R package contingencytables gives for Cavo et al. 2012.

    The table is both, the first alone, the second alone, neither; the first is our candidate.
    """
    both, first, second, neither = table
    candidate = [1.0] * (both + first) + [0.0] * (second + neither)
    baseline = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither
    got = paired(baseline, candidate, 0.95)
    assert (got.low, got.high) == pytest.approx((low, high), abs=5e-5)
    assert got.method == "paired Newcombe"


def test_arms_that_change_places_change_the_sign() -> None:
    rng = np.random.default_rng(2)
    for draw in DRAWS.values():
        b, c = draw(rng, 20).tolist(), draw(rng, 30).tolist()
        for there, back in (
            (unpaired([(b, c)], 0.9), unpaired([(c, b)], 0.9)),
            (paired(b, c[:20], 0.9), paired(c[:20], b, 0.9)),
            (unpaired([(b, c)], 0.9, sequential=True), unpaired([(c, b)], 0.9, sequential=True)),
        ):
            assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-12)


def test_one_stratum_split_in_equal_halves_is_about_the_same() -> None:
    rng = np.random.default_rng(3)
    for draw in (DRAWS["normal"], DRAWS["thumbs"]):
        b, c = draw(rng, 2000).tolist(), draw(rng, 2000).tolist()
        whole, halves = unpaired([(b, c)], 0.95), unpaired([(b[:1000], c[:1000]), (b[1000:], c[1000:])], 0.95)
        assert halves.strata == 2
        assert (halves.low, halves.high) == pytest.approx((whole.low, whole.high), abs=2e-3)
    b, c = DRAWS["normal"](rng, 40).tolist(), DRAWS["normal"](rng, 40).tolist()
    for sequential in (False, True):
        whole, halves = unpaired([(b + b, c + c)], 0.95, sequential), unpaired([(b, c), (b, c)], 0.95, sequential)
        assert halves.high - halves.low == pytest.approx(whole.high - whole.low, rel=0.02)


@pytest.mark.parametrize("size", [0, 1, MIN_MEASUREMENTS - 1])
def test_too_little(size: int) -> None:
    values = [float(i) for i in range(size)]
    for got in (
        unpaired([(values, values)], 0.95),
        paired(values, values, 0.95),
        unpaired([(values, [1.0] * 50)], 0.95),
    ):
        assert (got.low, got.high, got.method) == (-math.inf, math.inf, "none")
        assert f"{size}, wanted" in got.reason or f"{size} of the smaller arm" in got.reason
    assert unpaired([], 0.95).reason == f"too few requests: 0 of the smaller arm, wanted {MIN_MEASUREMENTS}"


def test_no_variance_claims_nothing() -> None:
    for got in (unpaired([([0.1] * 30, [0.3] * 30)], 0.95), paired([0.1, 0.7] * 10, [1.1, 1.7] * 10, 0.95)):
        assert not got.reason or got.low == -math.inf
    assert unpaired([([0.1] * 30, [0.3] * 30)], 0.95).reason.startswith("no variance")
    assert paired([1.0, 2.0] * 10, [2.0, 3.0] * 10, 0.95).reason.startswith("no variance")


def test_pairs_of_unequal_number() -> None:
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0], 0.95)


# ------------------------------------------------------------------------------------------- what intervals promise


@pytest.mark.parametrize("name", list(DRAWS))
def test_coverage(name: str) -> None:
    """2000 experiments with 20 requests of each arm: 95 % of the intervals hold the truth, within four standard errors and
    the point of skewness and steps."""
    rng, count = np.random.default_rng(4), 2000
    shift = 0.0 if name == "thumbs" else 1.5
    apart = pairs = 0
    for _ in range(count):
        b, c = DRAWS[name](rng, 20).tolist(), (DRAWS[name](rng, 20) + shift).tolist()
        apart += holds(unpaired([(b, c)], 0.95), shift)
        pairs += holds(paired(b, c, 0.95), shift)
    assert 0.93 <= apart / count <= 0.985
    assert 0.93 <= pairs / count <= 0.985


def test_an_arm_without_the_rare_value_proves_nothing() -> None:
    """Nobody of 10 was unhappy, 4 of 90 were: Welch's interval is [0.02, 0.34]."""
    for bad in ([1.0] * 4, [1.0, 1.0, 1.0, 2.0]):
        assert holds(unpaired([([5.0] * 86 + bad, [5.0] * 10)], 0.95), 0.0)
        assert holds(unpaired([([5.0] * 10, [5.0] * 86 + bad)], 0.95, sequential=True), 0.0)
    assert not holds(unpaired([([5.0] * 30 + [1.0] * 60, [5.0] * 30)], 0.95), 0.0)


def test_one_of_few_proves_nothing() -> None:
    """One failure among 10 requests, ten among 990: Newcombe's own interval is [0.008, 0.39]."""
    assert holds(unpaired([(ones(10, 990), ones(1, 10))], 0.95), 0.0)
    assert holds(unpaired([(ones(980, 990), ones(9, 10))], 0.95), 0.0)
    assert unpaired([(ones(10, 990), ones(8, 10))], 0.95).low > 0


@pytest.mark.parametrize("name", list(UNEVEN))
def test_unequal_arms_without_a_difference(name: str) -> None:
    """Welch's alone finds one in 11 to 40 % of these."""
    rng, count = np.random.default_rng(11), 250
    for m, n in ((90, 10), (200, 20)):
        draws = ((UNEVEN[name](rng, m).tolist(), UNEVEN[name](rng, n).tolist()) for _ in range(count))
        found = sum(not holds(unpaired([draw], 0.95), 0.0) for draw in draws)
        assert found / count < 0.085, (m, n)


@pytest.mark.parametrize("name", ["one or five stars", "a few bad stars"])
def test_peeking_at_a_small_share(name: str) -> None:
    """Of 40 experiments, sequential Welch intervals find a difference in 6."""
    rng = np.random.default_rng(12)
    found = 0
    for _ in range(40):
        values, arm = UNEVEN[name](rng, 1500), rng.random(1500) < 0.1
        looks = ((values[:n][~arm[:n]].tolist(), values[:n][arm[:n]].tolist()) for n in range(50, 1501, 50))
        found += any(not holds(unpaired([look], 0.95, sequential=True), 0.0) for look in looks)
    assert found <= 1


def test_coverage_of_correlated_thumbs() -> None:
    """Two in three pairs agree because both follow the request; the shares are 0.85 and 0.75."""
    rng, count = np.random.default_rng(10), 2000
    held = 0
    for _ in range(count):
        b, c = (rng.random(40) < 0.75, rng.random(40) < 0.85)
        common = rng.random(40)
        follows = rng.random(40) < 2 / 3
        b, c = np.where(follows, common < 0.75, b), np.where(follows, common < 0.85, c)
        held += holds(paired(b.astype(float).tolist(), c.astype(float).tolist(), 0.95), 0.1)
    assert 0.94 <= held / count <= 0.985


def test_coverage_of_strata() -> None:
    """Shares of 0.2 and 0.7 and a difference in level between the times they were in force."""
    rng, count = np.random.default_rng(5), 1500
    for name in ("normal", "thumbs"):
        held = 0
        for _ in range(count):
            strata = []
            for share, level in ((0.2, 0.0), (0.7, 0.0 if name == "thumbs" else 4.0)):
                arm = rng.random(80) < share
                values = DRAWS[name](rng, 80) + level
                strata.append((values[~arm].tolist(), values[arm].tolist()))
            held += holds(unpaired(strata, 0.95), 0.0)
        assert 0.93 <= held / count <= 0.98, name


def test_power() -> None:
    """A difference of one standard deviation, 50 of each arm: scipy's power is 0.9989."""
    rng = np.random.default_rng(6)
    found = sum(
        unpaired([(rng.normal(0, 1, 50).tolist(), rng.normal(1, 1, 50).tolist())], 0.95).low > 0 for _ in range(300)
    )
    assert found > 290


def test_pairs_see_what_single_requests_do_not() -> None:
    """Requests differ by 4 s, arms by 0.1 s: the length of the text is common to both arms."""
    rng = np.random.default_rng(7)
    seen = missed = 0
    for _ in range(100):
        length = rng.gamma(2, 3, 60)
        b, c = length + rng.normal(0, 0.1, 60), length - 0.1 + rng.normal(0, 0.1, 60)
        seen += paired(b.tolist(), c.tolist(), 0.95).high < 0
        missed += unpaired([(b.tolist(), c.tolist())], 0.95).high < 0
    assert seen > 95
    assert missed < 10


PEEKS = sorted({int(20 * 1.15**k) for k in range(34)})
"""Sizes from 20 to 2015 at which an impatient reader looks."""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(DRAWS))
def test_peeking(name: str) -> None:
    """No difference, looked at 30 times: fixed intervals find one in a quarter of all experiments, sequential
    in 5 % at most."""
    rng, count = np.random.default_rng(8), 100
    fixed = sequential = 0
    for _ in range(count):
        values, arm = DRAWS[name](rng, PEEKS[-1]), rng.random(PEEKS[-1]) < 0.3
        found = [False, False]
        for size in PEEKS:
            strata = [(values[:size][~arm[:size]].tolist(), values[:size][arm[:size]].tolist())]
            for way in (0, 1):
                found[way] = found[way] or not holds(unpaired(strata, 0.95, sequential=bool(way)), 0.0)
        fixed, sequential = fixed + found[0], sequential + found[1]
    assert fixed / count > 0.12
    assert sequential / count < 0.05


def test_sequential_intervals_cost_width_and_still_decide() -> None:
    rng = np.random.default_rng(9)
    for size, most in ((20, 4.5), (100, 1.95), (1000, 1.6), (20_000, 1.75)):
        strata = [(rng.normal(size=size).tolist(), rng.normal(0.6, 1, size).tolist())]
        plain, always = unpaired(strata, 0.95), unpaired(strata, 0.95, sequential=True)
        assert 1.5 < (always.high - always.low) / (plain.high - plain.low) < most
        assert (always.low > 0) == (size > 50)
