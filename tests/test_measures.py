"""Measures and tuning on made-up runs, against numbers worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from study_tools import make_study

from bnresearch import claims, measures
from bnresearch.errors import UserError
from bnresearch.records import load_study
from bnresearch.runs import Run, RunFiles


def run(status="done", *, step=400, validation=(), test=0.5, arm="a", seed=0, **point):
    """A run with validation accuracies at steps 100, 200, ..."""
    steps = 100 * np.arange(1, len(validation) + 1)
    curves = {("validation", "accuracy"): (steps, np.array(validation, float))}
    last = float(validation[-1]) if len(validation) else math.nan
    result = {"metrics": {"validation": {"accuracy": last}, "test": {"accuracy": test}}}
    files = RunFiles(
        path=Path("nowhere"),
        status=status,
        result=result if status == "done" else {},
        step=step,
        curves=curves if len(validation) else {},
    )
    place = "-".join(map(str, (arm, *point.values(), seed)))
    return Run(id=place, arm=arm, point=point, seed=seed, files=files)


def only(runs, measure, axes=()):
    """(value, censored) of runs that make one row."""
    frame = measures.values(runs, measure, axes)
    assert len(frame) == 1
    return frame["value"][0], frame["censored"][0]


CURVE = [0.2, 0.8, 0.6, 0.6]

# One curve, at steps 100 to 400, and what each measure makes of it.
BY_HAND = [
    (claims.final("accuracy"), 50.0),
    (claims.final("accuracy", split="validation"), 60.0),
    (claims.final("accuracy", split="validation", factor=1.0), 0.6),
    (claims.best("accuracy"), 80.0),
    (claims.best("accuracy", higher_is_better=False), 20.0),
    # (0.2 + 0.8) / 2 + (0.8 + 0.6) / 2 + (0.6 + 0.6) / 2 = 1.8 over three equal stretches
    (claims.area("accuracy"), 60.0),
    (claims.steps_to(0.2, "accuracy"), 100.0),
    (claims.steps_to(0.6, "accuracy"), 200.0),
    (claims.steps_to(0.8, "accuracy"), 200.0),
]


@pytest.mark.parametrize(("measure", "value"), BY_HAND)
def test_measures_of_a_curve(measure, value):
    assert only([run(validation=CURVE)], measure) == (pytest.approx(value, rel=1e-12), 0)


def test_every_measure_is_tried_here():
    tried = {measure.how for measure, _ in BY_HAND}
    assert tried | {"largest_usable", "function"} == set(measures.MEASURES)


def test_area_weighs_by_steps():
    uneven = run(validation=[0.0, 1.0, 1.0])
    curve = (np.array([0, 100, 400]), np.array([0.0, 1.0, 1.0]))
    uneven.files.curves["validation", "accuracy"] = curve
    value, _ = only([uneven], claims.area("accuracy", factor=1.0))
    assert value == pytest.approx((0.5 * 100 + 1.0 * 300) / 400, rel=1e-12)


def test_one_point_is_its_own_mean():
    assert only([run(validation=[0.25])], claims.area("accuracy")) == (25.0, 0)


@pytest.mark.parametrize("make", [claims.best, claims.area])
def test_no_curve_no_value(make):
    value, censored = only([run()], make("accuracy"))
    assert math.isnan(value) and censored == 0


def test_best_passes_over_nan():
    assert only([run(validation=[0.5, math.nan, 0.25])], claims.best("accuracy")) == (50.0, 0)


def test_falling_metrics_reach_their_target_from_above():
    falling = run(validation=[0.9, 0.4, 0.3])
    measure = claims.steps_to(0.4, "accuracy", options={"target": 0.4, "rising": False})
    assert only([falling], measure) == (200.0, 0)


# ---- Censored


def test_a_run_that_ends_before_the_target_needs_at_least_its_steps():
    measure = claims.steps_to(0.9, "accuracy")
    assert only([run(validation=CURVE)], measure) == (400.0, measures.AT_LEAST)


def test_one_that_diverged_never_gets_there():
    """It counts as long as the others of its point, not as one that was watched for 100 steps."""
    runs = [
        run("diverged", step=100, validation=[0.1], rate=1, seed=0),
        run("diverged", step=250, validation=[0.1, 0.95], rate=1, seed=1),
        run("done", step=400, validation=[0.1, 0.2, 0.3, 0.95], rate=1, seed=2),
        run("done", step=900, validation=[0.95], rate=2, seed=0),
        run("diverged", step=30, rate=3, seed=0),
        run("failed", step=300, validation=[0.1, 0.2], rate=1, seed=3),
    ]
    frame = measures.values(runs, claims.steps_to(0.9, "accuracy"), ["rate"])
    assert frame["value"].tolist()[:5] == [400, 200, 400, 100, 900]
    assert frame["censored"].tolist() == [1, 0, 0, 0, 1, 0]
    assert math.isnan(frame["value"][5]) and frame["status"][5] == "failed"


def test_a_study_may_say_what_a_diverged_run_counts():
    measure = claims.final("accuracy", diverged=10.0)
    frame = measures.values([run("diverged"), run("failed"), run()], measure, [])
    assert frame["value"].tolist()[::2] == [10.0, 50.0] and math.isnan(frame["value"][1])
    steps = claims.steps_to(0.9, "accuracy", diverged=1000.0)
    assert only([run("diverged", validation=[0.1])], steps) == (1000.0, 0)


# ---- The largest usable value

USABLE = claims.largest_usable("rate", 0.5)
D, F, M = "diverged", "failed", "missing"


@pytest.mark.parametrize(
    ("finals", "value", "censored", "status"),
    [
        # accuracies at rates 1, 2, 4, 8 (or how the run ended)
        ([0.9, 0.5, 0.4, D], 2, 0, "done"),
        ([0.9, 0.9, 0.9, 0.9], 8, 1, "done"),
        ([0.1, 0.1, D, D], 1, -1, "done"),
        ([D, D, D, D], 1, -1, "done"),
        ([0.9, 0.1, 0.9, D], 4, 0, "done"),  # the largest, whatever happened below it
        ([0.9, math.nan, D, D], 1, 0, "done"),
        ([F, 0.9, D, D], 2, 0, "done"),  # a run lost below it changes nothing
        ([0.9, 0.9, F, D], math.nan, 0, "failed"),  # one above it might have been usable
        ([0.9, 0.9, 0.9, M], math.nan, 0, "missing"),
        ([F, 0.1, D, D], math.nan, 0, "failed"),
    ],
)
def test_largest_usable(finals, value, censored, status):
    runs = [
        run(end, rate=rate) if isinstance(end, str) else run(validation=[end], rate=rate)
        for rate, end in zip((1, 2, 4, 8), finals, strict=True)
    ]
    frame = measures.values(list(reversed(runs)), USABLE, ["rate"])
    assert list(frame) == ["arm", "seed", "value", "censored", "status", "id"]
    (row,) = frame.to_dict("records")
    assert row["value"] == value or (math.isnan(value) and math.isnan(row["value"]))
    assert (row["censored"], row["status"]) == (censored, status)
    assert row["id"].split() == [run.id for run in reversed(runs)]


def test_largest_usable_keeps_the_other_axes(tmp_path):
    """One number per arm, batch size and seed: usable up to 0.3, with batch 2 up to 0.1."""

    def accuracy(arm, point, seed):
        return 0.9 if point["rate"] * (2 / point["batch size"]) <= 0.1 else 0.3

    make_study(
        tmp_path,
        axes={"batch size": [2, 8], "rate": [0.03, 0.1, 0.3]},
        accuracy=accuracy,
        measures={"usable": USABLE},
    )
    frame = load_study(tmp_path).values["usable"]
    assert list(frame) == ["arm", "batch size", "seed", "value", "censored", "status", "id"]
    assert len(frame) == 2 * 2 * 3
    assert set(zip(frame["batch size"], frame["value"], frame["censored"], strict=True)) == {
        (2, 0.1, 0),
        (8, 0.3, 1),
    }
    assert all(len(ids.split()) == 3 for ids in frame["id"])


# ---- Functions


def test_functions_are_worked_out_of_runs_that_are_done_and_read_from_the_study(tmp_path):
    def status(arm, point, seed):
        return "diverged" if seed == 1 else "done"

    twice = claims.computed(lambda run: 2 * run.final("test", "accuracy"), "twice", factor=100.0)
    make_study(tmp_path, status=status, accuracy=lambda *place: 0.25, measures={"twice": twice})
    results = load_study(tmp_path)
    found = measures.compute({"twice": twice, "other": claims.final("loss")}, results.records)
    done = [run.id for run in results.records if run.status == "done"]
    assert found == {"twice": dict.fromkeys(done, 0.5)}
    frame = measures.values(results.records, results.measures["twice"], [], found["twice"])
    assert frame["value"].dropna().tolist() == [50.0] * 4
    assert results.values["twice"]["value"].isna().all()  # nothing was worked out there


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda run: run.nothing, "AttributeError.*'nothing'"),
        (lambda run: "many", "ValueError"),
        (lambda run: None, "TypeError"),
        (None, "has none"),
    ],
)
def test_a_function_that_fails_is_named_with_the_run(function, says):
    with pytest.raises(UserError, match=f"measure 'mine'.*{says}"):
        measures.compute({"mine": claims.computed(function, "mine")}, [run()])


def test_an_unknown_measure():
    with pytest.raises(UserError, match="unknown kind of measure 'finale'.*did you mean final"):
        measures.values([run()], claims.Measure(how="finale"), [])


def test_an_unknown_axis():
    with pytest.raises(UserError, match="unknown axis of measure largest_usable 'rate'"):
        measures.values([run(depth=1)], USABLE, ["depth"])


# ---- Tuning


def tuned(accuracies, **given):
    """Tuning over rates; ``accuracies`` {rate: what each seed ended with, or how}."""
    runs = [
        run(end, rate=rate, seed=seed) if isinstance(end, str) else run(validation=[end], rate=rate)
        for rate, ends in accuracies.items()
        for seed, end in enumerate(ends)
    ]
    measure = claims.final("accuracy", "validation", **given)
    return measures.tuning(runs, "rate", measure, ["rate"])


@pytest.mark.parametrize(
    ("accuracies", "best", "edge"),
    [
        ({1: [0.5, 0.6], 2: [0.7, 0.8], 4: [0.6, 0.8]}, 2, ""),
        ({1: [0.9, 0.9], 2: [0.7, 0.8], 4: [0.6, 0.8]}, 1, "lowest"),
        ({1: [0.5, 0.6], 2: [0.7, 0.8], 4: [0.9, 0.8]}, 4, "highest"),
        ({4: [0.5], 2: [0.9], 1: [0.5]}, 2, ""),  # in whatever order
        ({1: [0.5, 0.6], 2: [0.5, 0.6], 4: [D, D]}, 1, "lowest"),  # of equals the first
        # fewest diverged comes first, whatever the others reach
        ({1: [0.5, 0.6], 2: [0.3, 0.4], 4: [0.9, D]}, 1, "lowest"),
        ({1: [D, D], 2: [0.3, D], 4: [D, D]}, 2, ""),
        ({1: [0.5, 0.6], 2: [0.9, F], 4: [0.1, 0.1]}, 1, "lowest"),
        ({1: [D, D], 2: [D, D]}, 1, "lowest"),
        ({1: [0.5]}, 1, ""),
        ({"low": [0.5], "high": [0.6]}, "high", ""),
    ],
)
def test_the_fewest_diverged_then_the_best_mean(accuracies, best, edge):
    found = tuned(accuracies)
    assert found.best("a", {}) == best
    (row,) = found.chosen.to_dict("records")
    assert (row["rate"], row["edge"]) == (best, edge)


def test_tuning_keeps_its_books():
    rows = tuned({1: [0.5, 0.75, D], 2: [D, F, M]}).candidates.to_dict("records")
    assert [(r["mean"], r["n"], r["diverged"], r["lost"]) for r in rows[:1]] == [(62.5, 2, 1, 0)]
    assert math.isnan(rows[1]["mean"])
    assert (rows[1]["n"], rows[1]["diverged"], rows[1]["lost"]) == (0, 1, 2)
    assert [r["chosen"] for r in rows] == [True, False]


def test_lower_can_be_better():
    assert tuned({1: [0.5], 2: [0.25], 4: [0.75]}, higher_is_better=False).best("a", {}) == 2


def test_a_diverged_run_counts_as_diverged_even_if_it_has_a_value():
    found = tuned({1: [0.5, 0.5], 2: [0.9, D]}, diverged=99.0)
    assert found.best("a", {}) == 1


def test_each_arm_and_point_is_tuned_by_itself_and_on_validation(tmp_path):
    """Validation prefers 0.3 for batch with batch size 8, else 0.1; test says the opposite."""

    def accuracy(arm, point, seed):
        high = (arm, point["batch size"]) == ("batch", 8)
        good = point["rate"] == (0.3 if high else 0.1)
        return (0.8, 0.2) if good else (0.7, 0.9)

    tune = {"axis": "rate", "measure": claims.final("accuracy", "validation")}
    axes = {"rate": [0.1, 0.3], "batch size": [2, 8]}
    results = load_study(make_study(tmp_path, axes=axes, accuracy=accuracy, tune=tune))
    found = results.tuning
    assert found.axis == "rate" and len(found.candidates) == 8 and len(found.chosen) == 4
    chosen = {
        (arm, size): found.best(arm, {"batch size": size})
        for arm in ("batch", "none")
        for size in (2, 8)
    }
    assert chosen == {("batch", 2): 0.1, ("batch", 8): 0.3, ("none", 2): 0.1, ("none", 8): 0.1}
    assert found.best("batch", {"batch size": 8, "rate": 0.1}) == 0.3  # its own axis is passed over


def test_a_place_that_was_not_run_has_no_tuned_value():
    with pytest.raises(UserError, match="arm 'b' at .* has no tuned value of 'rate'"):
        tuned({1: [0.5]}).best("b", {})


def test_a_study_that_tunes_nothing(tmp_path):
    assert load_study(make_study(tmp_path)).tuning is None


def test_only_measures_of_single_runs_can_tune():
    with pytest.raises(UserError, match="kind of measure to tune by 'largest_usable'"):
        measures.tuning([run(rate=1)], "rate", USABLE, ["rate"])
