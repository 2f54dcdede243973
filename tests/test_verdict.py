"""Claims to verdicts: the rule for every kind of claim, ratios, seeds still needed, the words."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from verdict_tools import (
    at,
    decide,
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
from bnresearch.rundir import finite, restored

ZERO = np.zeros(10)
LOG = {"log": True}
STEPS = {"log": True, "unit": "steps", "label": "steps to 90 %"}
NAN = math.nan


# ---- The rule

# One claim of each kind and verdict: (claim, {arm: values}, verdict).
RULE = {
    "above": (difference(), {"a": exactly(1, 1), "b": ZERO}, "supported"),
    "above, not enough": (difference(), {"a": exactly(0.5, 1), "b": ZERO}, "inconclusive"),
    "above, other way": (difference(), {"a": exactly(-1, 1), "b": ZERO}, "refuted"),
    "below": (difference(direction="less"), {"a": exactly(-1, 1), "b": ZERO}, "supported"),
    "below, other way": (difference(direction="less"), {"a": exactly(1, 1), "b": ZERO}, "refuted"),
    "beyond": (difference(sesoi=1), {"a": exactly(2, 1), "b": ZERO}, "supported"),
    "above, not beyond": (difference(sesoi=1), {"a": exactly(1.3, 0.8), "b": ZERO}, "inconclusive"),
    "there, but small": (difference(sesoi=1), {"a": exactly(0.4, 0.5), "b": ZERO}, "refuted"),
    "small on the other side": (
        difference(sesoi=1, direction="less"),
        {"a": exactly(0.1, 0.5), "b": ZERO},
        "refuted",
    ),
    "iqm": (
        difference(estimator="iqm", interval="bca"),
        {"a": [*exactly(1, 0.5, 19), -40], "b": np.zeros(20)},
        "supported",
    ),
    "mean of the same": (
        difference(),
        {"a": [*exactly(1, 0.5, 9), -40], "b": ZERO},
        "inconclusive",
    ),
    "equal": (equivalence(1), {"a": exactly(0.2, 1), "b": ZERO}, "supported"),
    "equal?": (equivalence(1), {"a": exactly(0.6, 1), "b": ZERO}, "inconclusive"),
    "unequal": (equivalence(1), {"a": exactly(-2, 1), "b": ZERO}, "refuted"),
    "value": (value(5, 1), {"a": exactly(5.2, 1)}, "supported"),
    "value?": (value(5, 1), {"a": exactly(5.6, 1)}, "inconclusive"),
    "another value": (value(5, 1), {"a": exactly(7, 1)}, "refuted"),
    "value of five": (value(5, 1), {"a": exactly(5, 0.5, 5)}, "supported"),
    "order": (
        ordering(["a", "b", "c"]),
        {"a": exactly(2, 1), "b": exactly(0, 0.3)[::-1], "c": ZERO - 1},
        "supported",
    ),
    "order with one tie": (
        ordering(["a", "b", "c"]),
        {"a": exactly(2, 1), "b": exactly(0.1, 1), "c": ZERO},
        "inconclusive",
    ),
    "order with one reversed": (
        ordering(["a", "b", "c"]),
        {"a": exactly(2, 1), "b": exactly(0, 1), "c": ZERO + 3},
        "refuted",
    ),
    "order too close": (
        ordering(["a", "b"], sesoi=1),
        {"a": exactly(0.1, 0.5), "b": ZERO},
        "refuted",
    ),
}


@pytest.mark.parametrize("name", RULE)
def test_the_rule(name):
    claim, arms, expected = RULE[name]
    found = one(claim, arms)
    assert found.verdict == expected
    assert (found.n_needed is None) == (expected != "inconclusive")


@pytest.mark.parametrize("name", RULE)
def test_a_claim_and_its_mirror_have_mirrored_effects(name):
    """Treatment and control, direction and order exchanged: the same verdict."""
    claim, arms, expected = RULE[name]
    if isinstance(claim, claims.Value):
        return
    if isinstance(claim, claims.Ordering):
        turned = {arm: -np.asarray(values) for arm, values in arms.items()}
        mirrored = one(ordering(claim.arms[::-1], sesoi=claim.sesoi), turned)
    elif isinstance(claim, claims.Equivalence):
        mirrored = one(equivalence(claim.margin, "b", "a"), arms)
    else:
        direction = {"greater": "less", "less": "greater"}[claim.direction]
        fields = {"sesoi": claim.sesoi, "estimator": claim.estimator, "interval": claim.interval}
        mirrored = one(difference("b", "a", direction=direction, **fields), arms)
        assert mirrored.estimate == pytest.approx(-one(claim, arms).estimate)
    assert mirrored.verdict == expected
    assert mirrored.p == pytest.approx(one(claim, arms).p)


def test_the_numbers_of_a_difference():
    a, b = exactly(97, 1), exactly(95, 0.5)[::-1]
    found = one(difference(sesoi=0.5), {"a": a, "b": b})
    d = a - b
    half = stats.t.ppf(0.975, 9) * d.std(ddof=1) / math.sqrt(10)
    assert (found.estimate, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    assert (found.n, found.confidence, found.unit) == (10, 0.95, "points")
    assert (found.null, found.boundary, found.interval, found.log) == (0, 0.5, "t", False)
    assert found.points == pytest.approx(dict(enumerate(d)))
    flips = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    beyond = np.mean((d - 0.5) @ flips >= (d - 0.5).sum() - 1e-9)
    assert found.p == found.p_holm == pytest.approx(2 * beyond)
    assert found.p_zero == pytest.approx(2 * np.mean(d @ flips >= d.sum() - 1e-9))
    assert found.runs[:2] == ["a-0", "b-0"] and len(found.runs) == 20
    assert claims.claim_from_json(found.claim) == difference(sesoi=0.5)


def test_effects_are_as_written_whatever_the_direction():
    found = one(difference(direction="less", sesoi=0.5), {"a": exactly(-2, 1), "b": ZERO})
    assert found.verdict == "supported"
    assert found.estimate == pytest.approx(-2)
    assert found.low < -2 < found.high < -0.5
    assert found.points == pytest.approx(dict(enumerate(exactly(-2, 1))))


def test_the_interval_has_a_say_beside_the_test():
    """Nine of ten a little above, one far: sign flips are not impressed, nor is the interval."""
    a = [0.1] * 9 + [9.0]
    found = one(difference(), {"a": a, "b": ZERO})
    assert found.p <= 0.05 and found.low < 0
    assert found.verdict == "inconclusive"


def test_many_ties_may_please_the_interval_alone():
    """Four of ten seeds differ, all in one direction: t is 2.4, but 2 / 2**4 is no evidence."""
    found = one(difference(), {"a": [1.0] * 4 + [0.0] * 6, "b": ZERO})
    assert found.low > 0 and found.p == 2 / 2**4
    assert (found.verdict, found.n_needed) == ("inconclusive", 16)
    assert "the exact test does not agree" in found.reason


def test_holm_runs_over_the_claims_of_the_study():
    d = exactly(0.87, 1)  # p by itself is between 0.05 / 3 and 0.05
    arms = {"a": d, "b": ZERO, "c": exactly(0, 1)}
    alone = one(difference(), arms)
    assert alone.verdict == "supported" and 0.05 / 3 < alone.p < 0.05
    among = decide([difference(), difference("c"), difference("c", "a", sesoi=9)], arms)
    assert among[0].p == alone.p
    assert among[0].p_holm > 0.05 and among[0].verdict == "inconclusive"
    assert among[2].p_holm == pytest.approx(min(1, 3 * among[2].p))
    assert "not with Holm's correction" in among[0].reason


def test_no_claims_no_verdicts():
    assert decide([], {"a": ZERO}) == []


# ---- Ratios


def test_measures_with_log_are_compared_as_ratios():
    a = 100 * np.exp(exactly(math.log(2), 0.3))
    found = one(difference(sesoi=1.25), {"a": a, "b": ZERO + 100}, given=LOG)
    half = stats.t.ppf(0.975, 9) * 0.3 / math.sqrt(10)
    assert found.verdict == "supported"
    assert found.estimate == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    assert (found.null, found.boundary, found.unit, found.log) == (1, 1.25, "times", True)
    assert found.points[3] == pytest.approx(a[3] / 100)


def test_a_ratio_without_a_smallest_effect():
    found = one(difference(direction="less"), {"a": ZERO + 50, "b": ZERO + 100}, given=LOG)
    assert (found.verdict, found.null, found.boundary) == ("supported", 1, 1)
    assert found.estimate == found.low == found.high == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.05, "supported"), (0.8, "inconclusive"), (2, "refuted")]
)
def test_equivalence_within_a_factor(ratio, expected):
    a = 100 * np.exp(exactly(math.log(ratio), 0.1))
    assert one(equivalence(1.25), {"a": a, "b": ZERO + 100}, given=LOG).verdict == expected


def test_a_value_within_a_factor():
    found = one(value(100, 1.1), {"a": 102 * np.exp(exactly(0, 0.05))}, given=STEPS)
    assert found.verdict == "supported"
    assert (found.null, found.boundary, found.unit) == (pytest.approx(100), 1.1, "steps")
    assert found.estimate == pytest.approx(102)


def test_what_has_no_logarithm_is_lost():
    found = one(difference(), {"a": [0, *ZERO[1:] + 2], "b": ZERO + 1}, given=LOG)
    assert found.missing == {"not positive": 1}
    assert found.n == 9


# ---- Seeds that would be enough


WIDE = [difference(sesoi=1), equivalence(1), value(0, 1)]


@pytest.mark.parametrize(
    ("claim", "mean"),
    [(difference(), -0.6), (difference(), 0.5)]
    + [(claim, mean) for claim in WIDE for mean in (-0.5, 0.2, 1.6)],
)
def test_n_needed_would_be_enough(claim, mean):
    """With just this mean and sd and as many seeds as asked for, there is a verdict."""
    found = one(claim, {"a": exactly(mean, 1.2, 7), "b": np.zeros(7)})
    assert found.verdict == "inconclusive" and found.n_needed > 7
    n = found.n_needed
    assert one(claim, {"a": exactly(mean, 1.2, n), "b": np.zeros(n)}).verdict != "inconclusive"


def test_n_needed_grows_with_the_claims_and_the_losses():
    a = exactly(0.5, 1)
    alone = one(difference(), {"a": a, "b": ZERO}).n_needed
    assert alone == 34  # Cohen 1988: d = 0.5, two-sided 5 %, power 80 %
    arms = {"a": a, "b": ZERO}
    assert decide([difference()] * 4, arms)[0].n_needed > alone
    lost = one(difference(), {"a": [*a, NAN], "b": np.zeros(11)})
    assert lost.n_needed == math.ceil(34 * 11 / 10)


def test_no_number_of_seeds_decides_what_is_just_at_the_edge():
    assert one(difference(), {"a": exactly(0, 1), "b": ZERO}).n_needed is None


# ---- Words and JSON


@pytest.mark.parametrize("name", RULE)
def test_every_verdict_is_json_and_a_sentence(name):
    claim, arms, expected = RULE[name]
    found = one(claim, arms)
    plain = restored(json.loads(json.dumps(finite(found.to_json()), allow_nan=False)))
    assert set(plain) >= {"claim", "text", "reason", "estimate", "p", "p_holm", "n_needed", "at"}
    assert plain["points"].keys() == {str(seed) for seed in found.points}
    sentence = verdict.answer(found)
    assert sentence == verdict.answer(plain)
    assert sentence.startswith(expected.capitalize())
    assert f"n = {found.n}" in sentence and "95 % interval" in sentence
    assert "nan" not in sentence


def test_a_sentence():
    found = one(difference(sesoi=0.5), {"a": exactly(97, 0.5), "b": ZERO + 95})
    assert verdict.answer(found) == (
        "Supported: a is above b in test accuracy by more than 0.5 points. The effect is +2.00 "
        "points (95 % interval +1.64 to +2.36, n = 10); it lies above +0.5 points (p = 0.002)."
    )


TEXTS = {
    "a is below b in test accuracy, at x 4": difference(direction="less", where={"x": 4}),
    "a and b differ by less than 0.5 points in test accuracy": equivalence(0.5),
    "the test accuracy of a is 97.5 %, within 1 point": value(97.5, 1),
    "the slope of log2 test accuracy over log2 x is -1 for a, within 0.05": slope(
        expected=-1.0, tolerance=0.05, log_x="2", log_y="2"
    ),
    "the slope of test accuracy over ln x is above 0 for a minus b": slope(control="b", log_x="e"),
    "a above b above c in test accuracy, each by more than 0.5 points": ordering("abc", sesoi=0.5),
    "as I said": difference(text="as I said"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_claims_in_words(text):
    claim = TEXTS[text]
    place = {"x": [1, 4]} if "x" in text else {}
    arms = {
        at(arm, **{axis: x}): ZERO + 1
        for arm in "abc"
        for axis, values in place.items()
        for x in values
    } or dict.fromkeys("abc", ZERO)
    assert one(claim, arms).text.replace("−", "-") == text


def test_labels_are_used():
    values = {at(arm, x=x, rate=0.1): exactly(x, 1) for arm in "ab" for x in (1.0, 4.0)}
    made = {"accuracy": claims.final("accuracy")}
    arms, axes = {"a": "BatchNorm", "b": "no norm"}, {"x": "batch size", "rate": "learning rate"}
    tuning = tuned("rate", {(arm, x): 0.1 for arm in "ab" for x in (1.0, 4.0)}, others=["x"])
    written = [difference(where={"x": 4.0}), difference({"arm": "a", "x": 4.0}, "b"), slope()]
    written[1] = claims.Difference(
        treatment={"arm": "a", "x": 4.0}, control={"arm": "b", "x": 1.0}, measure="accuracy"
    )
    texts = [
        "BatchNorm is above no norm in test accuracy, at batch size 4, at the best learning rate "
        "of each",
        "BatchNorm (batch size 4) is above no norm (batch size 1) in test accuracy, at the best "
        "learning rate of each",
        "the slope of test accuracy over batch size is above 0 for BatchNorm, at the best "
        "learning rate",
    ]
    found = verdict.decide(written, {"accuracy": frame(values)}, tuning, made, arms, axes)
    assert [one.text for one in found] == texts
    assert list(found[1].at) == ["BatchNorm (batch size 4)", "no norm (batch size 1)"]
    assert list(found[2].at) == ["BatchNorm, batch size 1", "BatchNorm, batch size 4"]


OPEN = {
    "includes 0 points": (difference(), {"a": exactly(0.5, 1), "b": ZERO}),
    "includes +1 point": (difference(sesoi=1), {"a": exactly(1.3, 0.8), "b": ZERO}),
    "includes 0 and +1 points": (difference(sesoi=1), {"a": exactly(0.6, 1), "b": ZERO}),
    "includes −1 and 0 points": (
        difference(sesoi=1, direction="less"),
        {"a": exactly(-0.6, 1), "b": ZERO},
    ),
    "includes −1 point": (equivalence(1), {"a": exactly(-0.6, 1), "b": ZERO}),
    "includes 6 %": (value(5, 1), {"a": exactly(5.6, 1)}),
}


@pytest.mark.parametrize("words", OPEN)
def test_what_is_open_is_said_by_the_interval(words):
    found = one(*OPEN[words])
    assert found.verdict == "inconclusive"
    assert found.reason == f"the interval {words}"


def test_open_ratios():
    a = 100 * np.exp(exactly(math.log(1.4), 0.8))
    found = one(difference(sesoi=2), {"a": a, "b": ZERO + 100}, given=LOG)
    assert found.reason == "the interval includes ratios of 1 and 2"


def test_an_ordering_says_which_pair_its_effect_is_of():
    arms = {"a": exactly(9, 1), "b": exactly(2, 1)[::-1], "c": ZERO}
    found = one(ordering(["a", "b", "c"]), arms)
    assert (found.verdict, found.of) == ("supported", "b over c")
    assert found.estimate == pytest.approx(2)
    assert verdict.answer(found).count("The effect of b over c is +2.00 points (95 %") == 1
    assert [(pair["of"], round(pair["estimate"], 9)) for pair in found.pairs] == [
        ("a over b", 7),
        ("b over c", 2),
    ]
    reversed_ = one(ordering(["a", "c", "b"]), arms)
    assert (reversed_.verdict, reversed_.of) == ("refuted", "c over b")
    assert one(difference(), arms).of == "" and one(difference(), arms).pairs == []


def test_an_answer_that_is_shown_counts_though_another_has_a_smaller_p():
    """All below 0 by the flips, not by the interval; within ±1 by two tests: refuted by these."""
    a = [-0.02] * 9 + [-0.4]
    found = one(difference(sesoi=1), {"a": a, "b": ZERO})
    assert found.p_zero == pytest.approx(2 / 1024) and found.high > 0
    assert (found.verdict, found.reason) == ("refuted", "it lies between −1 and +1 points")


# ---- The whole


def test_verdicts_need_no_jax():
    code = "import sys, bnresearch.verdict; print([m for m in sys.modules if m in ('jax', 'flax')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
