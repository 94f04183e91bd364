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


@pytest.mark.parametrize(("m", "n"), [(10, 10), (10, 300), (50, 20)])
def test_welch_and_student_are_scipys(m: int, n: int) -> None:
    rng = np.random.default_rng(0)
    b, c = rng.normal(5, 1, m), rng.normal(4, 3, n)
    wanted = stats.ttest_ind(c, b, equal_var=False).confidence_interval(0.99)
    got = unpaired([(b.tolist(), c.tolist())], 0.99)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    pairs = min(m, n)
    wanted = stats.ttest_rel(c[:pairs], b[:pairs]).confidence_interval(0.9)
    got = paired(b[:pairs].tolist(), c[:pairs].tolist(), 0.9)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_scale_and_offset_change_nothing() -> None:
    """Microseconds on top of a large number, and squares that vanish."""
    rng = np.random.default_rng(1)
    b, c = rng.normal(0, 1, 30), rng.normal(0.5, 1, 40)
    plain = unpaired([(b.tolist(), c.tolist())], 0.95)
    for scale, offset in ((1e-150, 0.0), (1e150, 0.0), (1.0, 1e9)):
        got = unpaired([((b * scale + offset).tolist(), (c * scale + offset).tolist())], 0.95)
        assert (got.low / scale, got.high / scale) == pytest.approx((plain.low, plain.high), rel=1e-5)


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
