"""The machine that gives verdicts, tested as an instrument: how often does it err, or see nothing?

Studies are simulated whole: frames of values go in, verdicts come out. Arms of a study share their
seeds' luck and one of them is the control of all claims, so that claims are not independent.
"""

from collections import Counter

import numpy as np
import pytest
from scipy import stats
from verdict_tools import (
    at,
    decide,
    difference,
    equivalence,
    frame,
    light_garbage,  # noqa: F401
    ordering,
    tuned,
    value,
)

from bnresearch.verdict import deciding, power

SEEDS = 10
ALPHA = 0.05

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_needed(monkeypatch):
    """The seeds that an inconclusive claim would need decide nothing, and take a quarter of the
    time; test_verdict.py and test_verdict_values.py have them."""
    monkeypatch.setattr(deciding, "_needed", lambda case, family: None)


def limits(share, studies):
    """Between these a simulated share is, with 99 % probability, if the true one is ``share``."""
    return stats.binom.ppf([0.005, 0.995], studies, share) / studies


def normal(rng, size):
    return rng.normal(size=size)


def heavy(rng, size):
    """Student's t with 3 degrees of freedom, scaled to a standard deviation of 1."""
    return rng.standard_t(3, size) / np.sqrt(3)


def outliers(rng, size):
    """Runs that fail now and then: one in ten is 8 standard deviations too low."""
    return rng.normal(size=size) - 8 * (rng.random(size) < 0.1)


def arms(rng, noise, means, seeds=SEEDS):
    """{name: values}: the seed's luck, which all arms share, and as much of their own."""
    luck = noise(rng, seeds)
    return {name: mean + luck + noise(rng, seeds) for name, mean in means.items()}


def simulate(written, make, studies, which=slice(None), **options):
    """(share of studies with each verdict among the claims ``which``, and with "any" that decides;
    share of each verdict per claim)."""
    rng = np.random.default_rng(1)
    study, each = Counter(), [Counter() for _ in written]
    for _ in range(studies):
        made = make(rng)
        arms, more = made if isinstance(made, tuple) else (made, {})
        found = [verdict.verdict for verdict in decide(written, arms, **options, **more)]
        among = set(found[which])
        study.update(among)
        study["any"] += among != {"inconclusive"}
        for counter, name in zip(each, found, strict=True):
            counter[name] += 1
    return [Counter({k: v / studies for k, v in c.items()}) for c in (study, *each)]


NULL = [
    difference("a", "d"),
    difference("b", "d", direction="less", interval="bca"),
    difference("a", "c"),
]


def test_null_studies_get_a_false_verdict_as_rarely_as_promised():
    """2,000 studies of three claims, heavy-tailed: any verdict is a false one."""
    found, *_ = simulate(NULL, lambda rng: arms(rng, heavy, dict.fromkeys("abcd", 0.0)), 2000)
    assert found["any"] <= limits(ALPHA, 2000)[1]
    assert found["any"] > 0.01  # and the correction is not overdone


@pytest.mark.parametrize(
    ("claim", "studies"),
    [(difference(), 1000), (difference(estimator="iqm", interval="percentile"), 500)],
)
def test_a_single_claim_errs_just_as_often_as_promised(claim, studies):
    """The exact test has a level of 50 / 1024, the interval takes a little off."""
    means = dict.fromkeys("ab", 0.0)
    found, _ = simulate([claim], lambda rng: arms(rng, normal, means), studies)
    low, high = limits(50 / 1024, studies)
    assert low - 0.01 <= found["any"] <= high
    assert found["supported"] <= limits(ALPHA / 2, studies)[1]
    assert found["refuted"] <= limits(ALPHA / 2, studies)[1]


def test_at_the_boundary_neither_answer_is_given_too_often():
    """600 studies whose effects are just the sesoi, margin or tolerance. A hair below it, or at
    it, "supported" is false for a difference and "refuted" a hair above: each has its share."""
    written = [difference("a", "d", sesoi=1.0), equivalence(1.0, "b", "d"), value(0.0, 1.0, "c")]
    means = {"a": 1.0, "b": -1.0, "c": 1.0, "d": 0.0}
    found, *each = simulate(written, lambda rng: arms(rng, normal, means), 600)
    assert found["supported"] <= limits(ALPHA, 600)[1]
    assert found["refuted"] <= limits(ALPHA, 600)[1]
    assert all(claim["supported"] > 0 and claim["refuted"] > 0 for claim in each)


def test_true_effects_beside_them_do_not_spoil_null_claims():
    """Holm gives the others more room once a claim is decided: 500 studies where one always is."""
    written = [difference("a", "d"), difference("b", "d"), ordering(["b", "c"])]
    means = {"a": 9.0, "b": 0.0, "c": 0.0, "d": 0.0}
    found, first, *_ = simulate(
        written, lambda rng: arms(rng, normal, means), 500, which=slice(1, None)
    )
    assert first["supported"] == 1
    assert found["any"] <= limits(ALPHA, 500)[1]


def censored(rng, factors, share=0.4):
    """Times with a spread of 0.7 (log), ``share`` of them beyond the end of the runs."""
    luck = rng.normal(size=SEEDS) / 2
    end = np.exp(np.sqrt(0.5) * stats.norm.isf(share))
    times = {
        name: factor * np.exp(luck + rng.normal(size=SEEDS) / 2) for name, factor in factors.items()
    }
    return {name: [(min(t, end), int(t > end)) for t in x] for name, x in times.items()}


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_censored_times_err_no_more(factor):
    """400 studies with effects of just the factor of interest, 40 % of the runs cut off."""
    written = [difference("a", "d", sesoi=factor), equivalence(1.5, "b", "d")]
    factors = {"a": factor, "b": 1.5, "d": 1.0}
    found, *_ = simulate(written, lambda rng: censored(rng, factors), 400, given={"log": True})
    assert found["supported"] <= limits(ALPHA, 400)[1]
    assert found["refuted"] <= limits(ALPHA, 400)[1]


def by_rate(rng):
    """Two equal arms at three rates, each at the best on validation, which goes along with test."""
    luck = rng.normal(size=SEEDS)
    values, best = {}, {}
    for arm in "ab":
        means = {}
        for rate in (0.1, 0.3, 1.0):
            own = luck + rng.normal(size=SEEDS)
            means[rate] = (own + 0.5 * rng.normal(size=SEEDS)).mean()
            values[at(arm, rate=rate)] = own + 0.5 * rng.normal(size=SEEDS)
        best[arm] = max(means, key=means.__getitem__)
    return frame(values), {"tuning": tuned("rate", best)}


def test_tuning_each_arm_does_not_make_false_verdicts():
    """300 studies of equal arms, each at the rate that its seeds did best with."""
    found, _ = simulate([difference()], by_rate, 300)
    assert found["any"] <= limits(ALPHA, 300)[1]


def over_three_points(rng):
    """Two equal arms; what a seed makes of an arm is much the same at every point."""
    values = {}
    for arm in "ab":
        own = heavy(rng, SEEDS)
        values |= {at(arm, x=x): x + own + heavy(rng, SEEDS) / 2 for x in (1, 2, 4)}
    return frame(values)


def test_strata_with_the_same_seeds_are_not_taken_for_more_seeds():
    """400 studies: flips and resamples that broke the seeds up would err several times as often."""
    claim = difference(strata="x", estimator="iqm", interval="bca")
    found, _ = simulate([claim], over_three_points, 400)
    assert found["any"] <= limits(ALPHA, 400)[1]


# ---- Power

EFFECTS = {
    "difference": (difference(), 0.9, lambda n, d: power.t_power(n, d, ALPHA / 2)),
    "beyond": (difference(sesoi=0.5), 1.4, lambda n, d: power.t_power(n, d - 0.5, ALPHA / 2)),
    "iqm": (difference(estimator="iqm", interval="bca"), 0.9, None),
    "equivalence": (equivalence(1.2), 0.2, lambda n, d: power.tost_power(n, d, 1, 1.2, ALPHA)),
    "value": (value(0.0, 1.2), 0.2, lambda n, d: power.tost_power(n, d, 1, 1.2, ALPHA)),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_power_is_as_computed(name):
    """500 studies each with an effect in standard deviations of the differences."""
    claim, effect, computed = EFFECTS[name]
    found, _ = simulate(
        [claim], lambda rng: {"a": effect + rng.normal(size=SEEDS), "b": np.zeros(SEEDS)}, 500
    )
    if computed is None:  # an interquartile mean loses some of it where tails are not heavy
        assert 0.5 < found["supported"] < power.t_power(SEEDS, effect, ALPHA / 2)
        return
    low, high = limits(computed(SEEDS, effect), 500)
    assert low - 0.03 <= found["supported"] <= high + 0.01  # sign flips cost a little


def test_the_seeds_that_are_said_to_be_enough_are_enough():
    """Effect 0.5, sd 1, one of four claims: at the strictest level that Holm may ask of it, 80 % of
    20 studies with so many seeds support it."""
    n = power.least_n(lambda n: power.t_power(n, 0.5, ALPHA / 8))
    assert n == 48
    null = [difference("b", "c"), difference("c", "b"), difference("b", "c", direction="less")]
    zero = np.zeros(n)

    def make(rng):
        return {"a": 0.5 + rng.normal(size=n), "b": zero, "c": zero}

    found = simulate([difference("a", "b"), *null], make, 20)
    assert found[1]["supported"] >= stats.binom.ppf(0.005, 20, 0.8) / 20


def test_heavy_tails_are_where_an_interquartile_mean_pays():
    """40 studies with runs that fail now and then, 20 seeds: it decides more than a mean does."""
    written = [difference(), difference(estimator="iqm", interval="bca")]
    _, mean, middle = simulate(
        written, lambda rng: {"a": 1.2 + outliers(rng, 20), "b": normal(rng, 20)}, 40
    )
    assert middle["supported"] > mean["supported"] + 0.2
