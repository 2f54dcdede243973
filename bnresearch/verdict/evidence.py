"""What a sample says about its centre: an interval, tests against bounds, the seeds still needed.

The sample decides which tests are fit for it:

| sample                         | interval         | beyond a bound          | within a margin |
|--------------------------------|------------------|-------------------------|-----------------|
| differences within pairs       | t, or bootstrap  | sign flips              | TOST            |
| values of one arm, slopes      | t                | t test                  | TOST            |
| anything with censored numbers | order statistics | sign test of the median | two sign tests  |

TOST of an interquartile mean, or of differences without any spread, takes two sign-flip tests.
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import stats

from bnresearch.verdict import estimate, power
from bnresearch.verdict.estimate import Flips, Interval
from bnresearch.verdict.samples import Sample


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A sample, oriented so that a claim's direction is upwards.

    Attributes:
      sample: see `samples`.
      flips: whether sign flips test it (differences) or t tests (values).
      estimator: "mean" or "iqm"; interval: "t", "bca" or "percentile".
    """

    sample: Sample
    flips: bool
    estimator: str = "mean"
    interval: str = "t"

    @property
    def n(self) -> int:
        return self.sample.n

    @property
    def bounded(self) -> bool:
        """Whether bounds are among the values. Swapping the sides of a pair does not change it, so
        that choosing the test by it leaves the level of permutation tests as it is."""
        return self.sample.censored > 0

    @functools.cached_property
    def centre(self) -> Interval:
        """The estimate with its 95 % interval."""
        x = self.sample
        if self.bounded:
            return estimate.median_interval(x.at, x.low, x.high)
        if self.interval == "t":
            return estimate.t_interval(x.at)
        return estimate.bootstrap_interval(self._numbers, self.estimator, self.interval)

    @property
    def _numbers(self) -> np.ndarray:
        """[n], or [n, strata]."""
        return self.sample.at if self.sample.strata is None else self.sample.strata

    def test(self, bound: float) -> Flips:
        """One-sided p-values against ``bound``; without two numbers, 1."""
        if self.n < 2:
            return Flips(1.0, 1.0)
        if bound not in self._tests:
            self._tests[bound] = self._test(bound)
        return self._tests[bound]

    @functools.cached_property
    def _tests(self) -> dict[float, Flips]:
        return {}

    def _test(self, bound: float) -> Flips:
        x = self.sample
        if self.bounded:
            return estimate.sign_test(x.low, x.high, bound)
        if self.flips:
            return estimate.sign_flips(self._numbers, bound, self.estimator)
        return estimate.t_test(x.at, bound)

    def inside(self, margin: float) -> float:
        """p for a centre within ±margin."""
        if self.n < 2:
            return 1.0
        if self._takes_tost:
            return estimate.tost(self.sample.at, margin)
        return max(self.test(-margin).above, self.test(margin).below)

    @property
    def _takes_tost(self) -> bool:
        if self.bounded or self.estimator != "mean":
            return False
        return not (self.flips and estimate.constant(self.sample.at))

    @property
    def two_sided(self) -> float:
        """p against 0."""
        return min(1.0, 2 * min(self.test(0.0)))

    # ---- Seeds that would be enough

    @property
    def _sd(self) -> float:
        """The spread for which the interval would be a t interval: just s if it is one."""
        width = self.centre.high - self.centre.low
        return float(width / 2 / stats.t.ppf(0.975, self.n - 1) * math.sqrt(self.n))

    def needed_above(self, bound: float, alpha: float) -> float:
        """n for the one-sided test at level alpha to find the centre above ``bound``, if the effect
        and the spread are as estimated; inf if no n does."""
        gap = self.centre.estimate - bound
        return self._needed(gap, self.sample.low > bound, alpha)

    def needed_below(self, bound: float, alpha: float) -> float:
        """As `needed_above`, for the other side."""
        gap = bound - self.centre.estimate
        return self._needed(gap, self.sample.high < bound, alpha)

    def _needed(self, gap: float, favourable: np.ndarray, alpha: float) -> float:
        if self.bounded:
            return self._needed_signs(favourable, alpha)
        if gap <= 0:
            return math.inf
        effect = gap / self._sd if self._sd > 0 else math.inf
        if not self.flips:
            return power.least_n(lambda n: power.t_power(n, effect, alpha))
        least = power.least_flips(alpha)
        return power.least_n(lambda n: power.flips_power(n, effect, alpha), least)

    def needed_inside(self, margin: float, alpha: float) -> float:
        """n for the test within ±margin."""
        x = self.sample
        if self.bounded:
            above = self._needed_signs(x.low > -margin, alpha)
            return max(above, self._needed_signs(x.high < margin, alpha))
        least = 2 if self._takes_tost else power.least_flips(alpha)
        mean, sd = self.centre.estimate, self._sd
        if abs(mean) >= margin:
            return math.inf
        return power.least_n(lambda n: power.tost_power(n, mean, sd, margin, alpha), least)

    def _needed_signs(self, favourable: np.ndarray, alpha: float) -> float:
        # A share of 1 in a small sample is not 1: half a seed is held against it.
        share = (np.count_nonzero(favourable) + 0.5) / (self.n + 1)
        least = power.least_flips(alpha)
        return power.least_n(lambda n: power.sign_power(n, share, alpha), least)
