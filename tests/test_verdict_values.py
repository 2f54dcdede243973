"""What values do to verdicts: slopes, what is lost, what is censored, tuned axes, single arms."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from verdict_tools import (
    at,
    difference,
    equivalence,
    exactly,
    frame,
    light_garbage,  # noqa: F401
    one,
    ordering,
    slope,
    tuned,
    value,
)

from bnresearch import claims, verdict
from bnresearch.errors import UserError
from bnresearch.rundir import finite

ZERO = np.zeros(10)
LOG = {"log": True}
STEPS = {"log": True, "unit": "steps", "label": "steps to 90 %"}
NAN = math.nan


# ---- Slopes


def line(rate, noise=0.0):
    rng = np.random.default_rng(0)
    return {at("a", x=x): rate * x + noise * rng.normal(size=10) for x in (1, 2, 4)}


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (slope(expected=3.0, tolerance=0.5), "supported"),
        (slope(expected=4.0, tolerance=0.5), "refuted"),
        (slope(expected=3.1, tolerance=0.2), "inconclusive"),
        (slope(sesoi=2.0), "supported"),
        (slope(direction="less"), "refuted"),
        (slope(sesoi=3.0), "inconclusive"),
    ],
)
def test_slopes(claim, expected):
    arms = line(3.0, 1.0)
    found = one(claim, arms)
    y = np.array(list(arms.values()))
    x = np.array([1, 2, 4]) - 7 / 3
    assert found.points == pytest.approx(dict(enumerate(x @ y / (x @ x))))
    assert found.verdict == expected
    assert len(found.runs) == 30


def test_a_slope_on_logarithms_is_an_exponent():
    arms = {at("a", x=x): 7 * x**-1.5 * np.exp(exactly(0, 0.01)) for x in (1.0, 2.0, 8.0)}
    found = one(slope(expected=-1.5, tolerance=0.01, log_x="2", log_y="2"), arms)
    assert found.verdict == "supported"
    assert found.estimate == pytest.approx(-1.5)


@pytest.mark.parametrize(
    ("log_x", "log_y", "unit"),
    [("", "", "points per unit"), ("2", "", "points per doubling"), ("2", "2", "")],
)
def test_the_unit_of_a_slope(log_x, log_y, unit):
    arms = {at("a", x=x): 90 + x + exactly(0, 0.01) for x in (1.0, 2.0, 4.0)}
    found = one(slope(log_x=log_x, log_y=log_y), arms)
    assert found.unit == unit


def test_the_slope_of_a_difference_is_paired():
    luck = np.random.default_rng(0).normal(size=10) * 5
    arms = {at("a", x=x): luck * x + 2 * x for x in (1, 2, 3)}
    arms |= {at("b", x=x): luck * x for x in (1, 2, 3)}
    assert one(slope(control="b", sesoi=1.5), arms).estimate == pytest.approx(2)
    assert one(slope(control="b", sesoi=1.5), arms).verdict == "supported"
    assert one(slope(sesoi=1.5), arms).verdict == "inconclusive"


def test_a_seed_without_a_point_has_no_slope():
    values = frame(line(1.0))
    values.loc[(values["seed"] == 4) & (values["x"] == 2), ["value", "status"]] = (NAN, "failed")
    found = one(slope(sesoi=0.5), values)
    assert (found.n, found.missing) == (9, {"failed": 1})


# ---- What is lost


def test_lost_pairs_are_counted_by_reason():
    values = frame({"a": exactly(5, 1, 20), "b": np.zeros(20)})
    values.loc[values["id"] == "a-3", ["value", "status"]] = (NAN, "diverged")
    values.loc[values["id"] == "b-7", ["value", "status"]] = (NAN, "failed")
    found = one(difference(), values)
    assert (found.n, found.missing, found.verdict) == (
        18,
        {"diverged": 1, "failed": 1},
        "supported",
    )
    assert sorted(set(range(20)) - set(found.points)) == [3, 7]
    values.loc[values["id"] == "b-8", ["value", "status"]] = (NAN, "failed")
    found = one(difference(), values)
    assert (found.n, found.verdict) == (17, "inconclusive")
    assert "3 of 20 seeds are lost (1 diverged, 2 failed), more than a tenth" in found.reason
    assert found.n_needed is None  # more seeds would not help


def test_a_run_that_was_never_begun_is_missing():
    values = frame({"a": exactly(5, 1), "b": ZERO})
    found = one(difference(), values[values["id"] != "b-9"])
    assert (found.n, found.missing) == (9, {"missing": 1})


def test_nothing_can_be_said_of_less_than_two():
    for n in (0, 1):
        found = one(difference(), {"a": [1.0] * n + [NAN] * (3 - n), "b": np.zeros(3)})
        assert (found.verdict, found.n, found.p, found.n_needed) == ("inconclusive", n, 1, None)
        assert math.isnan(found.low)
        assert "2 are the least" in found.reason
        assert verdict.answer(found)


@pytest.mark.parametrize("claim", [difference(), equivalence(1), value(3, 1), ordering("ab")])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_numbers_without_spread(claim, n):
    found = one(claim, {"a": [3.0] * n, "b": [3.0] * n})
    assert found.low == found.estimate == found.high
    if isinstance(claim, claims.Value):
        assert (found.verdict, found.p) == ("supported", 0)
    if isinstance(claim, claims.Equivalence):  # of differences, sign flips are asked
        assert found.p == 0.5**n
    if isinstance(claim, claims.Difference):
        assert (found.verdict, found.p) == ("inconclusive", 1)


def test_the_same_difference_in_every_pair():
    found = one(difference(), {"a": ZERO + 1, "b": ZERO})
    assert (found.low, found.high, found.p, found.verdict) == (1, 1, 2 / 1024, "supported")
    found = one(difference(), {"a": [1] * 5, "b": [0] * 5})
    assert (found.p, found.verdict, found.n_needed) == (2 / 32, "inconclusive", 6)


# ---- Bounds


def test_runs_that_never_get_there_are_censored():
    """b reaches the target in no run, a in all but one: a is faster, by at least 2.5 or so."""
    a = [100, 120, 90, 200, 150, 80, 60, 210, 170, (500, 1)]
    arms = {"a": a, "b": [(500, 1)] * 10}
    found = one(difference(direction="less"), arms, given=STEPS)
    assert (found.n, found.censored, found.interval) == (9, 11, "median")
    assert found.verdict == "supported"
    assert found.p == pytest.approx(2 / 512)
    assert found.estimate == pytest.approx(120 / 500)
    assert (found.low, found.high) == pytest.approx((0, 200 / 500))
    assert "of 11 values only a bound is known; set aside: 1 pair with bounds" in found.reason
    assert one(difference(), arms, given=STEPS).verdict == "refuted"
    assert one(difference(direction="less", sesoi=2), arms, given=STEPS).verdict == "supported"
    assert one(difference(direction="less", sesoi=9), arms, given=STEPS).verdict == "inconclusive"


def test_both_sides_of_a_scale_may_be_open():
    """Usable at the largest rate tried against usable at none: the ratio is a least one."""
    arms = {"a": [(3.0, 1)] * 10, "b": [(0.01, -1)] * 10}
    found = one(difference(sesoi=10), arms, given=LOG)
    assert (found.verdict, found.estimate) == ("supported", pytest.approx(300))
    assert (found.low, found.high) == (pytest.approx(300), math.inf)


def test_the_same_bound_everywhere_says_nothing():
    found = one(difference(), {"a": [(3.0, 1)] * 10, "b": [(3.0, 1)] * 10}, given=LOG)
    assert (found.verdict, found.n, found.n_needed) == ("inconclusive", 0, None)
    assert "set aside: 10 pairs with bounds on both sides" in found.reason


def test_one_bound_makes_the_median_the_estimate():
    a = exactly(1, 0.2)
    exact = one(difference(), {"a": a, "b": ZERO})
    bound = one(difference(), {"a": [(x, int(i == 2)) for i, x in enumerate(a)], "b": ZERO})
    assert (exact.interval, bound.interval) == ("t", "median")
    assert bound.estimate == pytest.approx(np.median(a))
    assert bound.p == pytest.approx(2 / 1024)


def test_a_value_that_is_a_bound():
    at = [5, 6, 4, 5, 6, 4, 5, 6, 4, (5, 1)]
    assert one(value(5, 3), {"a": at}).verdict == "supported"
    assert one(value(5, 0.5), {"a": at}).verdict == "inconclusive"
    assert one(value(50, 5), {"a": at}).verdict == "refuted"


def test_a_slope_through_a_bound_is_lost():
    arms = line(1.0)
    first = next(iter(arms))
    arms[first] = [(1.0, 1), *arms[first][1:]]
    assert one(slope(), arms).missing == {"censored": 1}


# ---- Strata

POOLED = {
    ("a", 1): [1.0, 2, 3, 4, 5, 6, 7, 9],
    ("a", 2): [10.0, 11, 13, 12, 14, 19, 15, 16],
    ("b", 1): [0.0] * 8,
    ("b", 2): [8.0] * 8,
}


def pooled(**changed):
    arms = {at(arm, x=x): list(values) for (arm, x), values in POOLED.items()}
    return frame(arms | changed)


def test_the_mean_over_strata_is_that_of_the_means_per_seed():
    found = one(difference(strata="x"), pooled())
    per_seed = [(a + b - 8) / 2 for a, b in zip(POOLED["a", 1], POOLED["a", 2], strict=True)]
    assert found.points == pytest.approx(dict(enumerate(per_seed)))
    plain = one(difference(), {"a": per_seed, "b": np.zeros(8)})
    for name in ("estimate", "low", "high", "p", "verdict", "n"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name)), name
    assert found.text == "a is above b in test accuracy, over every x"
    assert len(found.runs) == 32


def test_the_interquartile_mean_is_that_of_the_numbers_of_all_strata():
    claim = difference(strata="x", estimator="iqm", interval="percentile")
    found = one(claim, pooled())
    numbers = np.sort([*POOLED["a", 1], *(np.array(POOLED["a", 2]) - 8)])
    assert found.estimate == pytest.approx(numbers[4:-4].mean())
    parts = np.array([POOLED["a", 1], np.array(POOLED["a", 2]) - 8])
    signs = itertools.product((1, -1), repeat=8)  # of seeds: both points of one are flipped
    flipped = [np.sort((parts * s).ravel())[4:-4].mean() for s in signs]
    assert found.p == 2 * np.mean(np.array(flipped) >= found.estimate - 1e-9)
    assert (found.n, found.verdict) == (8, "supported")
    rng = np.random.default_rng(5)
    drawn = parts[:, rng.integers(0, 8, (50_000, 8))]  # seeds, the same at both points
    together = np.sort(np.moveaxis(drawn, 0, -1).reshape(50_000, 16))[:, 4:-4].mean(axis=1)
    expected = np.quantile(together, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(expected, abs=0.1)


def test_a_seed_that_is_lost_at_one_point_is_lost():
    values = pooled()
    values.loc[3, ["value", "status"]] = (NAN, "failed")
    values.loc[9, "censored"] = 1
    found = one(difference(strata="x"), values)
    assert (found.n, found.missing) == (6, {"failed": 1, "censored": 1})


def test_strata_at_the_best_rate_of_each():
    arms = {
        at(arm, x=x, rate=rate): exactly(x + rate, 0.1)
        for arm in "ab"
        for x in (1, 2)
        for rate in (10, 20)
    }
    best = {("a", 1): 20, ("a", 2): 10, ("b", 1): 10, ("b", 2): 10}
    found = one(difference(strata="x"), frame(arms), tuning=tuned("rate", best, others=["x"]))
    assert found.at == {"a, x 1": 20, "b, x 1": 10, "a, x 2": 10, "b, x 2": 10}
    assert found.estimate == pytest.approx(5)
    assert [row["estimate"] for row in found.same_rate] == pytest.approx([0, 0])


# ---- Tuned axes

RATES = {
    ("a", (0.1,)): exactly(90, 1),
    ("a", (0.3,)): exactly(95, 1),
    ("b", (0.1,)): exactly(93, 1)[::-1],
    ("b", (0.3,)): exactly(60, 1),
}


def rates():
    return frame({at(arm, rate=rate): x for (arm, (rate,)), x in RATES.items()})


def test_each_side_at_its_best_value():
    tuning = tuned("rate", {"a": 0.3, "b": 0.1})
    found = one(difference(sesoi=0.1), rates(), tuning=tuning)
    assert found.at == {"a": 0.3, "b": 0.1}
    assert found.estimate == pytest.approx(2)
    assert found.text.endswith("at the best rate of each")
    at_same = {row["value"]: row for row in found.same_rate}
    assert list(at_same) == [0.1, 0.3]
    json.dumps(finite(found.to_json()))
    assert at_same[0.1]["estimate"] == pytest.approx(-3)
    assert at_same[0.3]["estimate"] == pytest.approx(35)
    assert at_same[0.3] == one(difference(at=0.3), rates(), tuning=tuning).same_rate[1]
    assert at_same[0.3]["p"] == pytest.approx(2 / 1024) and at_same[0.3]["n"] == 10


def test_both_sides_at_one_value():
    found = one(difference(at=0.1), rates(), tuning=tuned("rate", {"a": 0.3, "b": 0.1}))
    assert found.at == {"a": 0.1, "b": 0.1}
    assert (found.verdict, found.estimate) == ("refuted", pytest.approx(-3))
    assert found.text == "a is above b in test accuracy, at rate 0.1"


def test_a_slope_takes_the_best_value_at_each_point():
    values = frame(
        {
            at("a", x=x, rate=rate): exactly(x if good else 9, 0.01)
            for x, best in ((1, 0.1), (2, 0.3))
            for rate, good in ((0.1, best == 0.1), (0.3, best == 0.3))
        }
    )
    tuning = tuned("rate", {("a", 1): 0.1, ("a", 2): 0.3}, others=["x"])
    found = one(slope(expected=1.0, tolerance=0.1), values, tuning=tuning)
    assert found.verdict == "supported"
    assert found.at == {"a, x 1": 0.1, "a, x 2": 0.3}


def test_a_measure_that_took_the_tuned_axis_together():
    tuning = tuned("rate", {"a": 0.3, "b": 0.1})
    found = one(difference(), {"a": exactly(1, 1), "b": ZERO}, tuning=tuning)
    assert (found.at, found.same_rate, found.verdict) == ({}, [], "supported")


def test_places_differ_in_axes():
    values = frame({at("a", size=2, net="mlp"): ZERO, at("a", size=64, net="mlp"): exactly(3, 1)})
    places = {"arm": "a", "size": 64}, {"arm": "a", "size": 2}
    claim = claims.Difference(treatment=places[0], control=places[1], measure="accuracy")
    found = one(claim, values)  # net has one value, which need not be given
    assert (found.estimate, found.verdict) == (pytest.approx(3), "supported")
    assert found.text == "a (size 64) is above a (size 2) in test accuracy"
    with pytest.raises(UserError, match="'a' at {'size': 3}, where there are no values"):
        one(difference({"arm": "a", "size": 3}, places[1]), values)


# ---- Single arms


def test_cells():
    values = frame({at("a", x=1): exactly(90, 1), at("b", x=1): [*exactly(50, 1, 9), NAN]})
    table = verdict.cells(values, claims.final("accuracy"))
    assert table[["arm", "x", "n", "diverged", "lost", "kind"]].to_dict("records") == [
        {"arm": "a", "x": 1, "n": 10, "diverged": 0, "lost": 0, "kind": "t"},
        {"arm": "b", "x": 1, "n": 9, "diverged": 1, "lost": 0, "kind": "t"},
    ]
    half = stats.t.ppf(0.975, 9) / math.sqrt(10)
    assert tuple(table.loc[0, ["mean", "low", "high"]]) == pytest.approx((90, 90 - half, 90 + half))
    assert table.loc[1, "diverged_share"] == 0.1
    assert tuple(table.loc[1, ["diverged_low", "diverged_high"]]) == pytest.approx(
        stats.binomtest(1, 10).proportion_ci(method="wilson")
    )


def test_cells_of_rates_bounds_and_ratios():
    percent = claims.final("works", factor=100, binary=True)
    row = verdict.cells(frame({"a": [100.0] * 8 + [0.0] * 2}), percent).loc[0]
    low, high = stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert row["kind"] == "wilson"
    assert tuple(row[["mean", "low", "high"]]) == pytest.approx((80, 100 * low, 100 * high))
    row = verdict.cells(frame({"a": [1.0, 2, 3, 4, 5, 6, 7, 8, (9, 1), (9, 1)]}), percent).loc[0]
    # S falls below 1/2 at the sixth; for the interval see test_estimate.
    assert (row["kind"], row["mean"], row["censored"]) == ("kaplan-meier", 6, 2)
    row = verdict.cells(frame({"a": [100.0] * 8}), claims.final("accuracy")).loc[0]
    assert (row["kind"], row["low"]) == ("t", 100)  # all right, but no share of runs
    row = verdict.cells(frame({"a": [1.0, 100.0]}), claims.final("steps", log=True)).loc[0]
    assert row["mean"] == pytest.approx(10)
    row = verdict.cells(frame({"a": [NAN, NAN]}, lost="failed"), percent).loc[0]
    assert (row["n"], row["lost"], row["diverged"]) == (0, 2, 0)
    assert math.isnan(row["mean"])


def test_cells_count_diverged_runs_that_have_a_value():
    values = frame({at("a", x=1): [90.0] * 6 + [10.0] * 4})
    values.loc[values["value"] == 10, "status"] = "diverged"
    values.loc[0, ["value", "status"]] = (NAN, "failed")
    (row,) = verdict.cells(values, claims.final("accuracy", diverged=10.0)).to_dict("records")
    assert (row["n"], row["diverged"], row["lost"]) == (9, 4, 1)
    assert row["diverged_share"] == pytest.approx(4 / 9)  # of those that ended


def test_cells_by_fewer_columns_pool_the_others():
    values = frame({at("a", x=1): [1.0, 2], at("a", x=2): [3.0, 6]})
    (row,) = verdict.cells(values, claims.final("reward"), ["arm"]).to_dict("records")
    assert (row["arm"], row["n"], row["mean"]) == ("a", 4, 3)


def test_cells_of_an_axis_taken_together_say_nothing_of_single_runs():
    made = claims.largest_usable("rate", 0.9)
    (row,) = verdict.cells(frame({"a": [(3.0, 1), 1.0, 1.0]}), made).to_dict("records")
    assert "diverged" not in row and row["censored"] == 1


def test_cells_of_nothing():
    empty = pd.DataFrame(columns=["arm", "seed", "value", "censored", "status", "id"])
    assert verdict.cells(empty, claims.final("accuracy")).empty
