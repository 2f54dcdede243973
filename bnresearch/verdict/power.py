"""Power of the tests of `estimate`, and the number of seeds that a power takes.

Everything here is about a future study whose true effect and spread are those given: estimates of
them from few seeds are rough, and so is the n that follows.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import special, stats
from statsmodels.stats.power import TTestPower

POWER = 0.8
MOST = 100_000  # seeds; more is "no number of seeds"
GRID = (np.arange(100) + 0.5) / 100  # quantiles at which the distribution of s is taken


def t_power(n: int, effect: float, alpha: float) -> float:
    """Power of the one-sided t test for a mean ``effect`` standard deviations beyond the bound.

    1 - F(t(1 - alpha, n - 1); n - 1, effect √n) with the noncentral t distribution
    (statsmodels TTestPower).
    """
    if effect <= 0 or n < 2:
        return 0.0
    # Beyond 100 standard deviations nothing changes but the numerics.
    return float(TTestPower().power(min(effect, 100.0), n, alpha, alternative="larger"))


def flips_power(n: int, effect: float, alpha: float) -> float:
    """Power of the one-sided sign-flip test, for normal samples.

    With so few that only the sample itself may be as far out (alpha 2**n < 2), all numbers must lie
    beyond the bound: Φ(effect)**n. With more, nearly that of the t test: simulated, 5 to 10 points
    less where two of the 2**n ways count, 4 where three do, 2 or less from n = 8 at 2.5 %.
    """
    ways = alpha * 2.0 ** min(n, 60)
    if ways < 1:
        return 0.0
    if ways < 2:
        return float(special.ndtr(effect)) ** n
    return t_power(n, effect, alpha)


def tost_power(n: int, mean: float, sd: float, margin: float, alpha: float) -> float:
    """Power of TOST with ±margin for normal samples of this mean and sd.

    Given s, both tests reject if |x̄| < margin - t(1 - alpha, n - 1) s / √n; x̄ is normal and
    s² (n - 1) / sd² is chi-square, over which this averages (Phillips 1990).
    """
    if abs(mean) >= margin or n < 2:
        return 0.0
    if sd == 0:
        return 1.0
    # scipy.special has the quantiles of chi-square and t without the cost of scipy.stats.
    s = sd * np.sqrt(2 * special.gammaincinv((n - 1) / 2, GRID) / (n - 1))
    half = np.maximum(0.0, margin - special.stdtrit(n - 1, 1 - alpha) * s / math.sqrt(n))
    scale = sd / math.sqrt(n)
    return float(
        np.mean(special.ndtr((half - mean) / scale) - special.ndtr((-half - mean) / scale))
    )


def sign_power(n: int, share: float, alpha: float) -> float:
    """Power of the one-sided exact sign test if a pair favours the side with probability share."""
    if share <= 0.5 or n < 1:
        return 0.0
    needed = stats.binom.isf(alpha, n, 0.5) + 1  # least count whose tail is at most alpha
    return float(stats.binom.sf(needed - 1, n, share))


def least_n(power: Callable[[int], float], least: int = 2) -> float:
    """The smallest n >= least with ``power(n)`` >= POWER; inf if it is above MOST.

    By doubling and bisection, for a power that grows with n.
    """
    low, high = least - 1, least
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > MOST:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def least_flips(alpha: float) -> int:
    """The least n whose smallest one-sided sign-flip p, 2**-n, is at most alpha."""
    return max(2, math.ceil(-math.log2(alpha) - 1e-9))
