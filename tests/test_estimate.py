"""Intervals, tests and powers against formulas worked out here, and against other libraries."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.duration.survfunc import SurvfuncRight, survdiff

from bnresearch.verdict import estimate, power

X = np.array([1.3, 0.2, 2.1, -0.4, 0.9, 1.8, 0.1, 0.6])
POINT = np.array([3.0, 3.0, 3.0, 3.0])


def flips_by_hand(x, centre=np.mean):
    """All 2**n sign flips, one by one."""
    made = [centre(np.array(signs) * x) for signs in itertools.product((1, -1), repeat=len(x))]
    above = np.mean([m >= centre(x) - 1e-12 for m in made])
    below = np.mean([m <= centre(x) + 1e-12 for m in made])
    return above, below


# ---- Intervals


def test_t_interval_is_students():
    # 1, 2, 3, 4, 5: mean 3, s² 2.5, t(0.975, 4) = 2.776445.
    half = 2.776445 * math.sqrt(2.5 / 5)
    found = estimate.t_interval(np.arange(1.0, 6.0))
    assert found[:3] == pytest.approx((3, 3 - half, 3 + half), abs=1e-6)
    assert found.kind == "t"


INTERVALS = {
    "t": estimate.t_interval,
    "bca": estimate.bootstrap_interval,
    "percentile": lambda x: estimate.bootstrap_interval(x, method="percentile"),
    "iqm": lambda x: estimate.bootstrap_interval(x, estimator="iqm"),
    "median": lambda x: estimate.median_interval(x, x, x),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_every_interval_of_nothing_one_and_equal_numbers(name):
    make = INTERVALS[name]
    assert all(map(math.isnan, make(np.array([]))[:3]))
    one = make(np.array([7.0]))
    assert one.estimate == 7
    assert math.isnan(one.low) and math.isnan(one.high)
    eight = make(np.full(8, 3.0))
    assert eight[:3] == (3, 3, 3)


@pytest.mark.parametrize("name", INTERVALS)
def test_every_interval_shifts_and_turns_with_the_numbers(name):
    estimate_, low, high, _ = INTERVALS[name](X)
    # The ends of a bootstrap are among few values for so few numbers: rounding may choose the next.
    shifted = INTERVALS[name](X + 5)[:3]
    assert shifted == pytest.approx((estimate_ + 5, low + 5, high + 5), abs=0.03)
    turned = INTERVALS[name](-X)[:3]
    # Resamples are random, but the same ones: turned, their quantiles are those of the other end.
    assert turned == pytest.approx((-estimate_, -high, -low), abs=0.02)


def test_percentile_interval_has_the_quantiles_of_resampled_means():
    rng = np.random.default_rng(3)
    means = X[rng.integers(0, len(X), (200_000, len(X)))].mean(axis=1)
    found = INTERVALS["percentile"](X)
    assert found[1:3] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_bca_leans_to_the_long_tail():
    x = np.random.default_rng(0).exponential(size=30)
    plain, bca = INTERVALS["percentile"](x), INTERVALS["bca"](x)
    assert bca.low > plain.low and bca.high > plain.high


def test_bca_without_a_jackknife_says_that_it_takes_percentiles():
    x = np.array([1.0, 1, 1, 1, 5, 1, 1, 1])
    assert estimate.bootstrap_interval(x, estimator="iqm").kind == "percentile"
    assert estimate.bootstrap_interval(X).kind == "bca"


def test_every_resample_has_as_many_of_each_stratum():
    # Without spread within the strata there is none at all, far apart as they are.
    found = estimate.bootstrap_interval(np.tile([0.0, 100.0], (5, 1)))
    assert found[:3] == (50, 50, 50)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_numbers_of_a_seed_stay_together(method):
    x = np.random.default_rng(1).normal((0, 100, 7), size=(20, 3))
    strata = estimate.bootstrap_interval(x, method=method)
    assert strata == pytest.approx(estimate.bootstrap_interval(x.mean(axis=1), method=method))
    assert estimate.sign_flips(x, 35.5) == estimate.sign_flips(x.mean(axis=1), 35.5)


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    assert estimate.iqm(np.array([-900.0, 1, 2, 3, 4, 5, 6, 900])) == 3.5
    assert estimate.iqm(np.array([[1.0, 2, 3, 400], [5, 7, 9, 0]])) == pytest.approx([2.5, 6])


def test_wilson_interval():
    p, n, z = 8 / 10, 10, 1.959964
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert estimate.wilson(8, 10)[:3] == pytest.approx((0.8, middle - half, middle + half))
    none, every = estimate.wilson(0, 10), estimate.wilson(10, 10)
    assert (none.low, every.high) == pytest.approx((0, 1), abs=1e-12)
    assert none.low >= 0 and every.high <= 1
    assert none.high == pytest.approx(z**2 / (10 + z**2))
    assert math.isnan(estimate.wilson(0, 0).estimate)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("t", 0.92), ("bca", 0.86), ("iqm", 0.83)])
def test_how_often_an_interval_of_ten_covers(name, least):
    rng = np.random.default_rng(0)
    found = [INTERVALS[name](x) for x in rng.normal(size=(500, 10))]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert least <= covered <= 0.98


# ---- Censored numbers


def test_median_interval_is_exact():
    # Of 10 numbers the 2nd and the 9th: P(Bin(10, 1/2) <= 1) = 11/1024 <= 0.025, not so for 2.
    x = np.arange(10.0) ** 2
    assert estimate.median_interval(x, x, x)[:3] == (20.5, 1, 64)


def test_median_interval_of_few_numbers_is_open():
    x = np.arange(5.0)
    assert estimate.median_interval(x, x, x)[:3] == (2, -math.inf, math.inf)


def test_bounds_open_the_interval_on_their_side():
    at = np.arange(10.0)
    high = np.where(at > 7, math.inf, at)
    assert estimate.median_interval(at, at, high)[:3] == (4.5, 1, math.inf)
    high = np.where(at > 8, math.inf, at)
    assert estimate.median_interval(at, at, high)[:3] == (4.5, 1, 8)


def test_median_of_runs_cut_off_at_the_same_step_is_that_of_kaplan_and_meier():
    times = np.array([120.0, 80, 500, 310, 500, 95, 240])
    reached = times < 500
    found = estimate.median_interval(times, times, np.where(reached, times, math.inf))
    assert found.estimate == SurvfuncRight(times, reached.astype(int)).quantile(0.5) == 240


def test_censored_median_by_hand():
    # S is 1 - i/7 after the i-th exact number, and below 1/2 first at the fourth.
    times, censored = np.array([80.0, 95, 120, 240, 310, 500, 500]), np.array([0, 0, 0, 0, 0, 1, 1])
    found = estimate.censored_median(times, censored)
    assert (found.estimate, found.kind) == (240, "kaplan-meier")
    # |log(-log S) - log(log 2)| <= 1.96 se, with Greenwood's se of S by |S log S|: at each time
    # the sum of 1 / (n (n - 1)) over the numbers at risk.
    s = 1 - np.arange(1, 6) / 7
    se = np.sqrt(np.cumsum([1 / (n * (n - 1)) for n in (7, 6, 5, 4, 3)])) / np.abs(np.log(s))
    inside = np.abs(np.log(-np.log(s)) - np.log(np.log(2))) <= 1.959964 * se
    assert found.low == times[:5][inside][0] == 80
    assert found.high == (math.inf if inside[-1] else times[:5][~inside][-1])
    turned = estimate.censored_median(-times, -censored)
    assert turned[:3] == (-240, -found.high, -found.low)


def test_a_median_that_is_not_reached_is_infinite():
    at = np.array([100.0, 500, 500, 500])
    assert estimate.censored_median(at, np.array([0, 1, 1, 1]))[::2] == (math.inf, math.inf)
    assert estimate.censored_median(at, np.array([1, 1, 1, 1])).estimate == math.inf
    assert math.isnan(estimate.censored_median(at[:1], np.array([1])).low)


def test_bounds_on_either_side_leave_order_statistics():
    at, censored = np.arange(10.0), np.array([-1, *[0] * 8, 1])
    assert estimate.censored_median(at, censored) == (4.5, 1, 8, "median")


def test_sign_test_is_the_log_rank_test_stratified_by_pair():
    """With an exact distribution: chi-square says 0.0114 where the binomial one says 0.0215."""
    a = np.array([100.0, 120, 90, 200, 150, 80, 60, 210, 170, 300])
    b = np.array([150.0, 500, 95, 230, 160, 120, 500, 300, 500, 250])
    seen = b < 500
    low, high = b - a, np.where(seen, b - a, math.inf)
    assert estimate.sign_test(low, high).above == pytest.approx(11 / 1024)
    chi2, p = survdiff(
        np.concatenate([a, b]),
        np.concatenate([np.ones(10), seen]).astype(int),
        np.repeat([0, 1], 10),
        strata=np.tile(np.arange(10), 2),
    )
    assert chi2 == pytest.approx((9 - 1) ** 2 / 10)
    assert p == pytest.approx(stats.chi2.sf(6.4, 1))


def test_a_bound_counts_only_for_the_side_it_lies_on():
    low = np.array([1.0, 1, 1, 1, 1, -math.inf])
    high = np.array([1.0, 1, math.inf, 1, 1, 1])
    found = estimate.sign_test(low, high)
    assert found.above == pytest.approx(7 / 64)  # 5 of 6
    assert found.below == 1
    assert estimate.sign_test(low, high, bound=2).below == pytest.approx(7 / 64)


# ---- p-values


@pytest.mark.parametrize("n", [2, 5, 8])
@pytest.mark.parametrize("bound", [0.0, 0.7])
def test_sign_flips_are_all_sign_flips(n, bound):
    found = estimate.sign_flips(X[:n], bound)
    assert found == pytest.approx(flips_by_hand(X[:n] - bound))


def test_sign_flips_of_the_interquartile_mean():
    found = estimate.sign_flips(X, estimator="iqm")
    assert found == pytest.approx(flips_by_hand(X, lambda x: np.sort(x)[2:-2].mean()))


def test_the_least_p_of_sign_flips():
    assert estimate.sign_flips(np.arange(1.0, 11.0)) == (2**-10, 1)
    assert estimate.sign_flips(POINT) == (1 / 16, 1)
    assert estimate.sign_flips(np.zeros(4)) == (1, 1)


def test_sign_flips_of_many_are_drawn():
    x = np.random.default_rng(2).normal(0.4, 1, 25)
    found = estimate.sign_flips(x)
    assert found.above == pytest.approx(estimate.t_test(x).above, abs=0.004)
    assert found.above + found.below == pytest.approx(1, abs=1e-3)
    assert found == estimate.sign_flips(x)  # the same draws each time
    assert 0 < estimate.sign_flips(x + 9).above <= 1e-4


def test_t_test_by_its_formula():
    t = (X.mean() - 0.3) / (X.std(ddof=1) / math.sqrt(8))
    assert estimate.t_test(X, 0.3) == pytest.approx((stats.t.sf(t, 7), stats.t.cdf(t, 7)))
    assert estimate.t_test(POINT, 2.0) == (0, 1)
    assert estimate.t_test(POINT, 3.0) == (1, 1)
    assert estimate.t_test(np.array([1, 1 + 2e-16]), 0.5) == (0, 1)  # rounding is no spread


@pytest.mark.parametrize("margin", [0.3, 1.0, 1.5, 4.0])
def test_tost_is_the_larger_of_two_t_tests(margin):
    se = X.std(ddof=1) / math.sqrt(8)
    p = [stats.t.sf((X.mean() + margin) / se, 7), stats.t.cdf((X.mean() - margin) / se, 7)]
    assert estimate.tost(X, margin) == pytest.approx(max(p))


def test_tost_agrees_with_the_90_percent_interval():
    low, high = stats.t.interval(0.9, 7, loc=X.mean(), scale=stats.sem(X))
    assert low > 0
    assert estimate.tost(X, high + 1e-9) < 0.05 < estimate.tost(X, high - 1e-9)
    assert (estimate.tost(POINT, 3.1), estimate.tost(POINT, 3.0)) == (0, 1)


def test_holm_by_hand():
    assert estimate.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert estimate.holm([0.6, 0.9]) == pytest.approx([1, 1])
    assert estimate.holm([]) == []


# ---- Power


@pytest.mark.slow
def test_powers_as_simulated():
    """20,000 samples each, with tests by their formulas; also where sd is not 1."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 10))
    t = (z.mean(1) + 0.8) / (z.std(1, ddof=1) / math.sqrt(10))
    rejected = np.mean(t > stats.t.ppf(0.975, 9))
    assert power.t_power(10, 0.8, 0.025) == pytest.approx(rejected, abs=0.01)
    x = 0.2 + 0.5 * z
    se = x.std(1, ddof=1) / math.sqrt(10)
    inside = np.abs(x.mean(1)) + stats.t.ppf(0.95, 9) * se < 0.6
    assert power.tost_power(10, 0.2, 0.5, 0.6, 0.05) == pytest.approx(inside.mean(), abs=0.01)


def test_sign_power_by_hand():
    # At level 0.025, 9 of 10 are needed: 11/1024; with 8 it would be 56/1024.
    expected = 10 * 0.9**9 * 0.1 + 0.9**10
    assert power.sign_power(10, 0.9, 0.025) == pytest.approx(expected)
    assert power.sign_power(5, 0.9, 0.025) == 0  # 1/32 is the least p
    assert power.sign_power(10, 0.5, 0.025) == 0


def test_least_n_is_the_textbooks():
    # Cohen 1988: a paired t test, d = 0.5, two-sided 5 %, power 80 %: 34 pairs.
    assert power.least_n(lambda n: power.t_power(n, 0.5, 0.025)) == 34
    assert power.least_n(lambda n: power.t_power(n, math.inf, 0.025), 6) == 6
    assert power.least_n(lambda n: power.t_power(n, -1, 0.025)) == math.inf
    assert power.least_n(lambda n: power.t_power(n, 1e-4, 0.025)) == math.inf
    # TOST: (z(0.95) + z(0.9)) sd / margin, squared: 8.56, and some more for t.
    n = power.least_n(lambda n: power.tost_power(n, 0, 1, 1, 0.05))
    assert 9 <= n <= 11


@pytest.mark.parametrize(("alpha", "n"), [(0.025, 6), (0.05, 5), (0.0025, 9), (2**-10, 10)])
def test_sign_flips_need_as_many(alpha, n):
    assert power.least_flips(alpha) == n
    assert 2.0**-n <= alpha < 2.0 ** (1 - n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "effect", "alpha", "off"),
    [(6, 1.5, 0.025, 0.03), (9, 2, 0.0025, 0.03), (8, 1.2, 0.025, 0.04), (10, 1, 0.025, 0.03)],
)
def test_power_of_sign_flips_as_simulated(n, effect, alpha, off):
    signs = np.array(list(itertools.product((1, -1), repeat=n)))
    x = np.random.default_rng(0).normal(effect, 1, (3000, n))
    p = np.mean(x @ signs.T >= x.sum(axis=1)[:, None] - 1e-9, axis=1)
    assert power.flips_power(n, effect, alpha) == pytest.approx(np.mean(p <= alpha), abs=off)


def test_too_few_for_sign_flips_have_no_power():
    assert power.flips_power(5, 99.0, 0.025) == 0


def test_powers_of_extremes_are_numbers():
    assert power.t_power(3, 1e9, 0.025) == pytest.approx(1)
    assert power.tost_power(10, 0.0, 0.0, 1.0, 0.05) == 1
    assert power.tost_power(10, 2.0, 1.0, 1.0, 0.05) == 0
    assert power.tost_power(3, 0.0, 50.0, 1.0, 0.05) == pytest.approx(0, abs=1e-3)


def test_flips_that_are_equal_up_to_rounding_count_as_equal():
    """0.1 + 0.2 - 0.3 is not 0 in floating point: whole numbers say which flips are ties."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        whole = rng.integers(-5, 6, size=7)
        whole[-1] = -whole[:-1].sum()
        signs = 1 - 2 * (np.arange(2**7)[:, None] >> np.arange(7) & 1)
        sums = (signs * whole).sum(1)
        above, below = estimate.sign_flips(whole / 10)
        assert (above, below) == ((sums >= 0).mean(), (sums <= 0).mean())
