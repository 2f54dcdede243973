"""A study folder read back: the numbers that were written; damage is named and left out."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from study_tools import DAMAGE, STEPS, made_up_verdict, make_study

import bnresearch
from bnresearch import claims, config, rundir, runs
from bnresearch.errors import UserError
from bnresearch.records import conclude, load_study


def accuracy(arm, point, seed):
    """(validation, test), all different and exact in binary."""
    base = {"batch": 0.5, "none": 0.25}[arm] + seed / 64
    return base, base + (0.125 if point["rate"] == 0.1 else 0.0)


@pytest.fixture
def folder(tmp_path):
    """Two arms, two rates, three seeds; none at 0.3 diverged for seed 1 and failed for seed 2."""

    def status(arm, point, seed):
        bad = {1: "diverged", 2: "failed"}
        return bad.get(seed, "done") if (arm, point["rate"]) == ("none", 0.3) else "done"

    def curve(arm, point, seed):
        return [0.0, 0.25, accuracy(arm, point, seed)[0], accuracy(arm, point, seed)[0]]

    return make_study(
        tmp_path / "study",
        axes={"rate": [0.1, 0.3]},
        accuracy=accuracy,
        status=status,
        curve=curve,
    )


def run_folder(folder, number=0):
    return folder / "runs" / json.loads((folder / "study.json").read_text())["runs"][number]["id"]


# ---- Frames


def test_one_row_per_planned_run_in_the_order_of_the_plan(folder):
    frame = load_study(folder).runs
    assert list(frame["arm"]) == ["batch"] * 6 + ["none"] * 6
    assert list(frame["rate"]) == [0.1] * 3 + [0.3] * 3 + [0.1] * 3 + [0.3] * 3
    assert list(frame["seed"]) == [0, 1, 2] * 4
    assert list(frame["status"]) == ["done"] * 10 + ["diverged", "failed"]
    assert list(frame["test/accuracy"][:6]) == [0.625, 0.640625, 0.65625, 0.5, 0.515625, 0.53125]
    assert list(frame["validation/accuracy"][6:10]) == [0.25, 0.265625, 0.28125, 0.25]
    assert frame[["test/accuracy", "validation/loss"]].isna().all(axis=1).tolist()[10:] == [1, 1]
    assert frame["message"].tolist()[9:] == ["", "the loss is NaN", "MemoryError: out of memory"]
    assert frame["step"].tolist()[9:] == [STEPS, STEPS // 2, STEPS // 2]
    assert frame["id"].is_unique


def test_curves_are_long_with_every_point(folder):
    frame = load_study(folder).curves("validation", "accuracy")
    assert list(frame) == ["arm", "rate", "seed", "step", "value"]
    assert len(frame) == 10 * 4 + 2 * 2
    one = frame[(frame["arm"] == "none") & (frame["rate"] == 0.1) & (frame["seed"] == 2)]
    assert list(one["step"]) == [125, 250, 375, 500]
    assert list(one["value"]) == [0.0, 0.25, 0.28125, 0.28125]
    diverged = frame[(frame["arm"] == "none") & (frame["rate"] == 0.3) & (frame["seed"] == 1)]
    assert list(diverged["value"]) == [0.0, 0.25]


def test_curves_that_nobody_kept_are_an_empty_frame(folder):
    frame = load_study(folder).curves("nowhere", "accuracy")
    assert list(frame) == ["arm", "rate", "seed", "step", "value"] and frame.empty


def test_a_metric_that_was_not_recorded_is_named_with_those_that_were(folder):
    with pytest.raises(UserError, match="'acuracy'.*accuracy, .*loss.*did you mean accuracy"):
        load_study(folder).curves("validation", "acuracy")


def test_values_are_in_the_unit_of_the_measure_and_lost_ones_say_why(folder):
    frame = load_study(folder).values["accuracy"]
    assert list(frame) == ["arm", "rate", "seed", "value", "censored", "status", "id"]
    assert list(frame["value"][:10]) == [
        *(62.5, 64.0625, 65.625, 50, 51.5625, 53.125),
        *(37.5, 39.0625, 40.625, 25),
    ]
    assert frame["value"].isna().tolist()[10:] == [True, True]
    assert list(frame["status"][9:]) == ["done", "diverged", "failed"]


def test_a_run_has_what_its_folder_has(folder):
    run = load_study(folder).records[0]
    assert (run.arm, run.point, run.seed, run.status) == ("batch", {"rate": 0.1}, 0, "done")
    assert run.config["norm"]["kind"] == "batch" and run.config["optim"]["learning_rate"] == 0.1
    assert run.result["digest"] and run.path == folder / "runs" / run.id
    assert run.final("test", "accuracy") == 0.625
    assert run.final("train", "loss") == 2.2 * (1 - 0.5)  # the last one recorded
    steps, values = run.curve("validation", "accuracy")
    assert steps.dtype == int and values.tolist() == [0.0, 0.25, 0.5, 0.5]


def test_not_a_number_comes_back_as_one(folder):
    path = run_folder(folder)
    lines = [{"step": 5, "split": "train", "loss": "NaN"}, {"step": 6, "split": "train", "loss": 1}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = load_study(folder).records[0].curve("train", "loss")[1]
    assert np.isnan(values[0]) and values[1] == 1.0


def test_a_run_at_two_places_is_there_twice(tmp_path):
    """An axis that one arm does not look at: its points share their runs."""
    axis = {"values": ["a", "b"], "keys": []}
    results = load_study(make_study(tmp_path, arms=["batch"], axes={"x": axis}, seeds=2))
    assert len(list((tmp_path / "runs").iterdir())) == 2
    frame = results.values["accuracy"]
    assert list(frame["x"]) == ["a", "a", "b", "b"]
    assert frame["id"].tolist()[:2] == frame["id"].tolist()[2:]
    assert frame["value"].tolist()[:2] == frame["value"].tolist()[2:]


def test_verdicts_are_a_row_per_claim(tmp_path):
    claim = claims.Difference(treatment="batch", control="none", measure="accuracy")
    verdicts = [made_up_verdict(claim), made_up_verdict(claim, verdict="refuted", low=float("nan"))]
    results = load_study(make_study(tmp_path, claims=[claim], verdicts=verdicts))
    assert list(results.verdicts["verdict"]) == ["supported", "refuted"]
    assert results.verdicts["estimate"].tolist() == [2.0, 2.0]
    assert np.isnan(results.verdicts["low"][1])
    assert results.claims == [claim]


def test_before_the_verdicts_there_are_none(folder):
    frame = load_study(folder).verdicts
    assert frame.empty and "verdict" in frame


# ---- Runs that are missing, damaged, or of another kind


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_named_and_left_out(tmp_path, damage):
    make_study(tmp_path, status=lambda arm, point, seed: damage if seed == 1 else "done")
    results = load_study(tmp_path)
    ids = [run.id for run in results.records if run.seed == 1]
    assert sorted(results.damaged) == sorted(ids) and len(ids) == 2
    assert all(reason and str(tmp_path) not in reason for reason in results.damaged.values())
    assert list(results.runs["status"]) == ["done", "damaged", "done"] * 2
    assert results.runs["test/accuracy"].notna().tolist() == [True, False, True] * 2
    assert results.values["accuracy"]["value"].notna().tolist() == [True, False, True] * 2
    assert set(results.curves("validation", "accuracy")["seed"]) == {0, 2}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no config", "no config.json"),
        ("config not json", "config.json is not JSON"),
        ("other schema", "schema 99"),
        ("other config", "that of another run"),
        ("torn result", "result.json is not JSON"),
        ("result without step", "result.json has no status or no step"),
        ("torn status", "status.json is not JSON"),
        ("a file", "a file, not a folder"),
    ],
)
def test_the_reason_says_what_is_wrong(tmp_path, damage, says):
    make_study(tmp_path, arms=["batch"], seeds=1, status=lambda *place: damage)
    (reason,) = load_study(tmp_path).damaged.values()
    assert says in reason


@pytest.mark.parametrize("text", ['{"step": 1}\nnonsense\n{"step": 2}\n', '{"step": 1, "x": []}\n'])
def test_damaged_metrics_are_damage_too(folder, text):
    (run_folder(folder) / "metrics.jsonl").write_text(text)
    (reason,) = load_study(folder).damaged.values()
    assert "metrics.jsonl" in reason


def test_a_result_of_another_schema_is_damage(folder):
    path = run_folder(folder) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    assert list(load_study(folder).damaged.values()) == [
        "result.json has schema 2, this version reads 1"
    ]


def test_a_torn_last_line_of_a_run_that_goes_on_is_no_damage(folder):
    with (run_folder(folder) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 600, "spl')
    results = load_study(folder)
    assert not results.damaged and len(results.records[0].curve("validation", "accuracy")[0]) == 4


@pytest.mark.parametrize("left", [None, "folder", "lock"])
def test_a_run_that_never_began_is_missing(folder, left):
    path = run_folder(folder)
    shutil.rmtree(path)
    if left:
        path.mkdir()
    if left == "lock":
        (path / "lock").touch()
    results = load_study(folder)
    assert results.runs["status"][0] == "missing" and not results.damaged
    assert results.values["accuracy"]["status"][0] == "missing"


@pytest.mark.parametrize("status", ["running", "stopped"])
def test_a_run_that_has_not_ended_has_its_curve_and_no_value(tmp_path, status):
    results = load_study(make_study(tmp_path, status=lambda *place: status))
    assert set(results.runs["status"]) == {status} and not results.damaged
    assert results.values["accuracy"]["value"].isna().all()
    assert len(results.curves("validation", "accuracy")) == 2 * 3 * 2


def test_a_study_that_trained_nothing(tmp_path):
    make_study(tmp_path, arms={"a": {"n": 1}, "b": {"n": 2}}, function=True, accuracy=half_seed)
    results = load_study(tmp_path)
    assert results.values["accuracy"]["value"].tolist() == [0, 50, 100] * 2
    assert results.records[0].config["function"] == "measure"
    assert results.curves("validation", "accuracy").empty


def half_seed(arm, point, seed):
    return seed / 2


def test_no_runs_at_all(tmp_path):
    results = load_study(make_study(tmp_path, seeds=0))
    assert results.runs.empty and {"arm", "seed", "status"} <= set(results.runs)
    assert results.values["accuracy"].empty and results.curves("test", "loss").empty


# ---- What it rests on


def test_a_config_with_nan_keeps_its_identity(tmp_path):
    resolved = {"schema": 3, "seed": 0, "x": float("inf")}
    path = tmp_path / config.config_hash(resolved)[:16]
    path.mkdir()
    rundir.write_json(path / "config.json", resolved)
    assert runs.read_run(path).config == resolved


def test_reading_a_study_needs_neither_jax_nor_flax(folder):
    code = (
        "import sys, bnresearch; r = bnresearch.load_study(sys.argv[1]); "
        "r.runs, r.values, r.verdicts, r.curves('test', 'loss'); "
        "assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)


def test_it_is_exported_and_nothing_else_is():
    assert bnresearch.load_study is load_study
    with pytest.raises(AttributeError, match="no attribute 'load_studies'"):
        _ = bnresearch.load_studies


def test_two_thousand_runs_are_read(tmp_path):
    axes = {"rate": [0.01, 0.03, 0.1, 0.3, 1.0], "batch size": [2, 4, 8, 16, 32]}
    make_study(tmp_path, arms=list("abcd"), axes=axes, seeds=20, curve_points=20)
    results = load_study(tmp_path)
    assert len(results.runs) == len(results.values["accuracy"]) == 2000
    assert len(results.curves("validation", "accuracy")) == 40_000


# ---- Verdicts from files


def test_verdicts_are_worked_out_from_the_files_alone(tmp_path):
    """Differences by hand: 10 points less 0.2 times the mean of 0, 2, 4, 1, 3; at the best rate."""

    def accuracy(arm, point, seed):
        ahead = 0.1 - 0.002 * (2 * seed % 5) if arm == "batch" else 0.0
        return 0.8 + ahead - (0.2 if point["rate"] == 0.1 else 0.0)

    make_study(
        tmp_path,
        axes={"rate": [0.1, 0.3, 1.0]},
        seeds=10,
        accuracy=accuracy,
        status=lambda arm, point, seed: "diverged" if point["rate"] == 1.0 else "done",
        claims=[
            claims.Difference(treatment="batch", control="none", measure="accuracy"),
            claims.Difference(treatment="none", control="batch", measure="accuracy", at=0.1),
            claims.Equivalence(treatment="batch", control="none", measure="accuracy", margin=10),
        ],
        tune={"axis": "rate", "measure": claims.final("accuracy", "validation")},
    )
    above, below, equal = conclude(load_study(tmp_path))
    assert (above.verdict, above.n, above.at) == ("supported", 10, {"batch": 0.3, "none": 0.3})
    assert above.estimate == pytest.approx(10 - 0.2 * 2)
    assert above.p == pytest.approx(2 / 2**10)  # all signs alike
    assert (below.verdict, below.n) == ("refuted", 10)
    assert below.estimate == pytest.approx(-9.6)
    assert equal.verdict == "supported"


def test_lost_pairs_are_counted_with_their_reason(tmp_path):
    bad = {("none", 0): "diverged", ("batch", 1): "torn result", ("batch", 2): "missing"}
    make_study(
        tmp_path,
        seeds=10,
        status=lambda arm, point, seed: bad.get((arm, seed), "done"),
        claims=[claims.Difference(treatment="batch", control="none", measure="accuracy")],
    )
    (verdict,) = conclude(load_study(tmp_path))
    assert verdict.missing == {"diverged": 1, "damaged": 1, "missing": 1}
    assert (verdict.verdict, verdict.n) == ("inconclusive", 7)
