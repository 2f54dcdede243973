"""Intervals and p-values for a handful of seeds, from scipy and statsmodels.

A sample is one number per seed: a difference within a pair, or a value of one arm. What the
libraries leave undefined is settled here: a sample without spread has an interval that is a point,
and fewer than two numbers have none (NaN). All p-values of this module are one-sided unless they
say otherwise. Random resamples have a fixed seed: the same numbers give the same verdict.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

CONFIDENCE = 0.95
RESAMPLES = 9_999  # of a bootstrap
FLIPS = 2**15  # all sign flips of up to 15 numbers; this many at random beyond
AT_ONCE = 2**22  # numbers held in memory

NAN = float("nan")


class Interval(NamedTuple):
    """An estimate with its confidence interval, and what kind of interval that is."""

    estimate: float
    low: float
    high: float
    kind: str

    def through(self, function: Callable[[float], float]) -> "Interval":
        """With an increasing function applied: of a mean of logarithms, a geometric mean."""
        estimate, low, high = (float(function(end)) for end in self[:3])
        return Interval(estimate, low, high, self.kind)


class Flips(NamedTuple):
    """One-sided p-values: for a centre above the bound, and for one below it."""

    above: float
    below: float


def constant(x: np.ndarray) -> bool:
    """Whether ``x`` has no spread beyond rounding, so that no t statistic is defined."""
    return bool(np.ptp(x) <= 1e-13 * np.abs(x).max())


def iqm(x: np.ndarray, axis: int = -1) -> Any:
    """Interquartile mean: that of the middle half, floor(n / 4) numbers cut off at either end.

    Robust like a median, with less variance; Agarwal et al. 2021 (arXiv:2108.13264) recommend it
    for runs whose distribution has heavy tails.
    """
    return stats.trim_mean(x, 0.25, axis=axis)


ESTIMATORS: Mapping[str, Any] = {"mean": np.mean, "iqm": iqm}


# ---- Intervals


def t_interval(x: np.ndarray) -> Interval:
    """mean ± t(n - 1) s / √n, the Student interval: exact for normal samples, about right else."""
    mean = float(x.mean()) if len(x) else NAN
    if len(x) < 2:
        return Interval(mean, NAN, NAN, "t")
    if constant(x):
        return Interval(mean, mean, mean, "t")
    low, high = stats.t.interval(CONFIDENCE, len(x) - 1, loc=mean, scale=stats.sem(x))
    return Interval(mean, float(low), float(high), "t")


def bootstrap_interval(x: np.ndarray, estimator: str = "mean", method: str = "bca") -> Interval:
    """Bootstrap interval of the estimator (Efron 1987; scipy).

    Args:
      x: [n] a number per seed; or [n, strata], whose estimate is that of all numbers together, as
        in Agarwal et al. 2021. Every resample has n numbers of each stratum. They are those of the
        same seeds, since the numbers of a seed are not independent.
      estimator: a key of ESTIMATORS.
      method: "bca" (bias-corrected and accelerated) or "percentile". Where the jackknife that bca
        rests on has no spread, the percentiles are taken, and ``kind`` says so.

    With 10 seeds it covers less than it says (some 90 % of the time instead of 95 for a mean of
    normal numbers): verdicts ask the sign-flip test as well.
    """
    centre = ESTIMATORS[estimator]
    strata = tuple(np.atleast_2d(x.T))

    def statistic(*samples: np.ndarray, axis: int = -1) -> Any:
        return centre(np.concatenate(samples, axis=axis), axis=axis)

    value = float(statistic(*strata)) if len(x) else NAN
    if len(x) < 2:
        return Interval(value, NAN, NAN, method)
    if all(map(constant, strata)):
        return Interval(value, value, value, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bca without spread: it says so by NaN as well
        low, high = stats.bootstrap(
            strata,
            statistic,
            method={"bca": "BCa", "percentile": "percentile"}[method],
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            vectorized=True,
            paired=True,
            rng=np.random.default_rng(0),
        ).confidence_interval
    if method == "bca" and np.isnan([low, high]).any():
        return bootstrap_interval(x, estimator, "percentile")
    return Interval(value, float(low), float(high), method)


def median_interval(at: np.ndarray, low: np.ndarray, high: np.ndarray) -> Interval:
    """Median of numbers of which some are only bounds, with its exact interval.

    Args:
      at: [n] the numbers, censored ones at their bound.
      low, high: [n] what each is at least and at most; equal to ``at`` unless it is censored, else
        -inf or inf on its open side.

    The ends are order statistics (the inverse of the sign test, scipy.stats.quantile_test): the
    lower one of ``low``, the upper one of ``high``. So they hold whatever the censored numbers are,
    and without any assumption on their distribution; open (infinite) where the data do not bound
    the median, as always with fewer than 6 numbers.
    """
    if len(at) < 2:
        return Interval(float(at[0]) if len(at) else NAN, NAN, NAN, "median")
    side = (1 + CONFIDENCE) / 2
    least = stats.quantile_test(low, p=0.5, alternative="greater").confidence_interval(side).low
    most = stats.quantile_test(high, p=0.5, alternative="less").confidence_interval(side).high
    ends = -np.inf if np.isnan(least) else least, np.inf if np.isnan(most) else most
    return Interval(float(np.median(at)), float(ends[0]), float(ends[1]), "median")


def censored_median(at: np.ndarray, censored: np.ndarray) -> Interval:
    """Median of numbers of which some are only bounds: Kaplan and Meier's (1958), with the interval
    of Brookmeyer and Crowley (1982) on the scale of log(-log S); statsmodels SurvfuncRight.

    Args:
      at: [n] the numbers, censored ones at their bound.
      censored: [n] 1 for "at least so much", -1 for "at most", 0 for exact.

    Infinite where it is not reached. With bounds on either side, see `median_interval`.
    """
    if len(at) < 2 or set(censored) >= {1, -1}:
        low, high = np.where(censored < 0, -np.inf, at), np.where(censored > 0, np.inf, at)
        return median_interval(at, low, high)
    sign = censored[censored != 0][0]
    curve = SurvfuncRight(sign * at, (censored == 0).astype(int))
    with np.errstate(divide="ignore", invalid="ignore"):  # where S is 0 or 1
        ends = [curve.quantile(0.5), *curve.quantile_ci(0.5)]
    median, low, high = (
        sign * float(np.nan_to_num(end, nan=np.inf, posinf=np.inf)) for end in ends
    )
    return Interval(median, min(low, high), max(low, high), "kaplan-meier")


def wilson(count: int, n: int) -> Interval:
    """A share with the Wilson score interval (Wilson 1927; statsmodels): count of n."""
    if n == 0:
        return Interval(NAN, NAN, NAN, "wilson")
    low, high = proportion_confint(count, n, alpha=1 - CONFIDENCE, method="wilson")
    # Rounding puts the ends a hair beyond 0 and 1.
    return Interval(count / n, max(0.0, float(low)), min(1.0, float(high)), "wilson")


# ---- p-values


def sign_flips(x: np.ndarray, bound: float = 0.0, estimator: str = "mean") -> Flips:
    """Sign-flip permutation test of the centre of ``x`` against ``bound``.

    Under the null hypothesis x - bound is symmetric around 0, as it is for the differences of two
    arms that do not differ (bound 0): then each of the 2**n ways to flip signs is equally likely,
    and p is the share of them whose estimate is at least as far out. Exact up to n = 15; beyond
    that from FLIPS random ones. The least possible p is 2**-n. Of x [n, strata] all numbers of a
    seed are flipped together. scipy.stats.permutation_test with permutation_type="samples", which
    lists the flips anew in each call: a handful of seeds takes all of them at once, in a thirtieth
    of the time.
    """
    centre, rows = ESTIMATORS[estimator], np.atleast_2d(x.T).T - bound

    def statistic(signs: np.ndarray, axis: int = -1) -> Any:
        flipped = np.moveaxis(signs, axis, -1)[..., None] * rows
        return centre(flipped.reshape(*flipped.shape[:-2], -1), axis=-1)

    drawn = int(2 ** len(x) > FLIPS)
    if drawn or x.size * 2 ** len(x) > AT_ONCE:
        null = stats.permutation_test(
            (np.ones(len(x)),),
            statistic,
            permutation_type="samples",
            n_resamples=FLIPS,
            batch=max(1, AT_ONCE // x.size),
            vectorized=True,
            rng=np.random.default_rng(0),
        ).null_distribution
    else:
        bits = np.arange(2 ** len(x))[:, None] >> np.arange(len(x)) & 1
        null = statistic(1.0 - 2.0 * bits)
    # The flips of the estimate are symmetric around 0, so both sides are counted in the same list;
    # ties within rounding count, and of random flips the sample itself is one, as scipy has it.
    here = statistic(np.ones(len(x)))
    tie = 1e-12 * np.abs(rows).max()
    counts = np.count_nonzero(null >= here - tie), np.count_nonzero(null <= here + tie)
    return Flips(*(float((count + drawn) / (len(null) + drawn)) for count in counts))


def t_test(x: np.ndarray, bound: float = 0.0) -> Flips:
    """Student's t test of the mean of ``x`` against ``bound`` (scipy.stats.ttest_1samp).

    Without spread the mean is what it is: p is 0 on its side of the bound, else 1.
    """
    if constant(x):
        return Flips(float(x.mean() <= bound), float(x.mean() >= bound))
    above = float(stats.ttest_1samp(x - bound, 0.0, alternative="greater").pvalue)
    return Flips(above, 1.0 - above)


def sign_test(low: np.ndarray, high: np.ndarray, bound: float = 0.0) -> Flips:
    """Sign test of the median against ``bound``, of numbers known to lie in [low, high].

    A number counts for a side only if all of its interval lies there; scipy.stats.quantile_test.
    For pairs of runs with right-censored times this is the log-rank test stratified by pair, with
    the exact binomial distribution in place of chi-square.
    """
    above = stats.quantile_test(low, q=bound, p=0.5, alternative="greater").pvalue
    below = stats.quantile_test(high, q=bound, p=0.5, alternative="less").pvalue
    return Flips(float(above), float(below))


def tost(x: np.ndarray, margin: float) -> float:
    """Two one-sided t tests of |mean| < margin (Schuirmann 1987; statsmodels ttost_mean).

    p is the larger of the two: below alpha just if the 1 - 2 alpha interval is within the margin.
    """
    if constant(x):
        return float(abs(x.mean()) >= margin)
    return float(DescrStatsW(x).ttost_mean(-margin, margin)[0])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the k-th smallest of m times m - k + 1, made monotone."""
    return [float(q) for q in multipletests(p, method="holm")[1]] if len(p) else []
