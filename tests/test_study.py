"""A study's plan: which runs it has, what they are made from, and what study.json says of it."""

import hashlib
import inspect
import json
import math

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from run_tools import DIGITS, ROOT

from bnresearch import claims, rundir, study
from bnresearch import config as configs
from bnresearch.experiment import initial_state, prepare
from bnresearch.study import (
    Arm,
    Difference,
    Ordering,
    Scale,
    Slope,
    Study,
    Tune,
    final,
    grid,
    log_range,
    settings,
    steps_to,
)

BATCH, NONE = {"norm.kind": "batch"}, {"norm.kind": "none"}
SCALES = {"smoke": Scale(seeds=1), "quick": Scale(seeds=3), "full": Scale(seeds=30)}
ANY = dict(question="Is it so?", source="nobody", prediction="It is.", scales=SCALES)


def a_study(**parts):
    arms = {"batch": BATCH, "none": NONE}
    measures = {"accuracy": final("accuracy")}
    return Study(**ANY | dict(base=DIGITS, arms=arms, measures=measures) | parts)


def planned(scale="quick", **parts):
    return study.plan(a_study(**parts), "mine.py", scale)


def identity(*overrides):
    """The run that the command line would train."""
    config = configs.load(DIGITS, ["parallel.devices=1", *overrides])
    return configs.config_hash(configs.resolve(config))[:16]


# ---- Runs


def test_the_runs_are_those_that_the_command_line_would_train():
    axis = {
        "rate": grid("optim.learning_rate", [0.1, 1]),
        "net": settings({"one": {"model.mlp.widths": [64]}, "two": {"model.mlp.widths": (32, 16)}}),
    }
    plan = planned(axes=axis, overrides={"train.duration": "5ep"})
    widths = {"one": "(64,)", "two": "(32, 16)"}
    expected = [
        (
            identity(
                "train.duration=5ep",
                f"norm.kind={arm}",
                f"optim.learning_rate={rate}",
                f"model.mlp.widths={widths[net]}",
                f"seed={seed}",
            ),
            arm,
            {"rate": rate, "net": net},
            seed,
        )
        for arm in ("batch", "none")
        for rate in (0.1, 1)
        for net in ("one", "two")
        for seed in (0, 1, 2)
    ]
    assert [run[:4] for run in plan.runs] == expected


def test_a_run_is_trained_under_its_own_name():
    rules = ("stage1/.* -> group groups=4",)
    parts = {"norm.kind": "ghost", "norm.scope": "ghost:20", "norm.ghost.decay": 0.9}
    for run in planned(arms={"a": parts, "b": {**BATCH, "norm.rules": rules}}).runs:
        config = configs.unresolve(run.resolved)
        configs.validate(config)
        assert configs.resolve(config) == run.resolved
        assert configs.config_hash(run.resolved)[:16] == run.id
        assert configs.program_key(run.resolved) == run.program


def test_runs_that_differ_in_numbers_share_a_program():
    plan = planned(axes={"rate": grid("optim.learning_rate", [0.1, 0.3])})
    assert len({run.id for run in plan.runs}) == 12
    assert len({run.program for run in plan.runs}) == 2
    assert len({(run.arm, run.program) for run in plan.runs}) == 2


def test_an_axis_that_does_not_matter_to_an_arm_shares_its_runs():
    plan = planned(axes={"decay": grid("norm.batch.decay", [0.9, 0.99])})
    ids = {arm: [run.id for run in plan.runs if run.arm == arm] for arm in ("batch", "none")}
    assert len(set(ids["batch"])) == 6
    assert ids["none"][:3] == ids["none"][3:] and len(set(ids["none"])) == 3


def test_what_overrides_what():
    keys = ("train.duration", "optim.weight_decay", "data.batch_size", "optim.learning_rate")
    scale = Scale(seeds=1, overrides={keys[0]: "2st", keys[1]: 0.2, "parallel.devices": 2})
    plan = planned(
        "smoke",
        overrides=dict(zip(keys, ("1st", 0.1, 30, 0.01), strict=True)),
        scales=SCALES | {"smoke": scale},
        arms={"a": {keys[1]: 0.3}, "b": {}},
        axes={"rate": grid(keys[3], [0.04])},
    )
    found = [configs.flatten(run.resolved) for run in plan.runs]
    assert [[flat[key] for key in keys] for flat in found] == [
        ["2st", 0.3, 30, 0.04],
        ["2st", 0.2, 30, 0.04],
    ]
    assert [flat["parallel.devices"] for flat in found] == [2, 2]
    assert {run.resolved["parallel"]["devices"] for run in planned().runs} == {1}


def test_a_scale_takes_part_of_a_study():
    scale = Scale(seeds=2, arms=("none",), axes={"rate": grid("optim.learning_rate", [7])})
    parts = dict(
        arms={"batch": BATCH, "none": NONE, "layer": {"norm.kind": "layer"}},
        axes={
            "rate": grid("optim.learning_rate", [0.1, 0.3]),
            "size": grid("data.batch_size", [20, 30]),
        },
        scales=SCALES | {"smoke": scale},
    )
    points = [(run.arm, *run.point.values(), run.seed) for run in planned("smoke", **parts).runs]
    assert points == [("none", 7, size, seed) for size in (20, 30) for seed in (0, 1)]
    assert study.count(a_study(**parts), "quick") == 3 * 2 * 2 * 3
    assert study.count(a_study(**parts), "quick", seeds=10) == 120


def test_seeds_are_paired_and_null_studies_take_others():
    plan = planned(arms={"a": Arm(first_seed=4), "b": Arm(first_seed=7, label="B")})
    pairs = [(run.arm, run.seed, run.resolved["seed"]) for run in plan.runs]
    assert pairs == [("a", 0, 4), ("a", 1, 5), ("a", 2, 6), ("b", 0, 7), ("b", 1, 8), ("b", 2, 9)]
    assert [run.id for run in plan.runs] == [identity(f"seed={seed}") for seed in range(4, 10)]
    assert {name: arm.label for name, arm in plan.arms.items()} == {"a": "a", "b": "B"}


def test_arms_of_a_pair_start_from_the_same_values_and_see_the_same_examples():
    """Of what they share; and all of them at the same points, with the same seeds."""
    plan = planned(
        arms={
            "batch": BATCH,
            "layer": {"norm.kind": "layer"},
            "none": NONE,
            "matched": {**NONE, "init.name": "matched"},
            "after": {"model.mlp.placement": "after_act", "optim.name": "adamw"},
        },
        axes={"rate": grid("optim.learning_rate", [0.1, 1])},
        overrides={"model.mlp.widths": (8,)},
        scales=SCALES | {"quick": Scale(seeds=2)},
    )
    places = {arm: [] for arm in plan.arms}
    found = {}
    for run in plan.runs:
        places[run.arm].append((run.point, run.seed))
        found.setdefault(run.seed, []).append(beginning(run))
    assert all(of_arm == places["batch"] and len(of_arm) == 4 for of_arm in places.values())
    for first, *others in found.values():
        for other in others:
            for path in first.keys() & other.keys():
                np.testing.assert_array_equal(first[path], other[path], err_msg=path)
    kept = {"head/kernel", "head/bias", "step 0", "step 30"}  # by matched kernels, too
    for begun in found.values():
        assert set.intersection(*(set(parts) for parts in begun)) == kept
        assert sum("dense1/kernel" in parts for parts in begun) == 8
    one, other = found[0][0], found[1][0]  # the comparison is not vacuous
    assert all(np.any(one[path] != other[path]) for path in one if "bias" not in path)


def beginning(run):
    """The parameters at the start of a run by path, but for those that `matched` rescales and the
    norms', and the pictures of two batches."""
    begun = prepare(configs.unresolve(run.resolved))
    flat = flatten_dict(initial_state(begun).params, sep="/")
    parts = {path: np.asarray(leaf) for path, leaf in flat.items() if "norm" not in path}
    if run.arm == "matched":
        del parts["dense1/kernel"]
    dataset, rows = begun.program.dataset, np.arange(60)
    for step in (0, 30):  # in the first and in the second epoch
        batch = dataset.train_batch(dataset.feed(begun.seed, step), begun.seed, step, rows)
        parts[f"step {step}"] = np.asarray(batch["image"])
    return parts


def test_values_become_what_the_config_takes():
    overrides = {
        "optim.learning_rate": 1,
        "data.batch_size": 30.0,
        "model.mlp.widths": [8, 9],
        "optim.weight_decay": np.float64(0.5),
        "norm.batch.decay": None,  # left to the preset
    }
    resolved = planned(overrides=overrides).runs[0].resolved
    assert resolved == configs.resolve(configs.unresolve(resolved))
    found = configs.flatten(resolved)
    assert [type(found[key]) for key in overrides] == [float, int, list, float, float]


def test_the_base_lies_beside_the_study(tmp_path, monkeypatch):
    (tmp_path / "configs" / "studies").mkdir(parents=True)
    base = (ROOT / "configs" / "digits_mlp.py").read_text()
    (tmp_path / "configs" / "mine.py").write_text(base.replace("batch_size = 60", "batch_size = 7"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "studies" / "s.py").write_text('"""A title."""')
    plan = study.plan(a_study(base="../mine.py"), "configs/studies/s.py", "smoke")
    assert plan.runs[0].resolved["data"]["batch_size"] == 7
    assert study.describe(plan, [])["base"] == "configs/mine.py"


def test_many_runs_are_planned_and_nothing_is_compiled(compiled):
    rates = {"rate": log_range("optim.learning_rate", 0.01, 1, 20)}
    scales = SCALES | {"full": Scale(seeds=50)}
    many = a_study(axes=rates, scales=scales)
    study.plan(many, "mine.py", "smoke")
    runs = study.plan(many, "mine.py", "full").runs
    assert len({run.id for run in runs}) == 2000
    assert compiled == []


# ---- Functions


def measure(seed, width, depth=2, shape=(1, 2)):
    return {"size": float(width * depth + seed)}


def test_a_study_of_a_function():
    function = dict(
        base=None, function=measure, overrides={"depth": 3}, arms={"a": {}, "b": {"shape": (5,)}}
    )
    plan = planned("smoke", axes={"width": grid("width", [10, 20])}, **function)
    source = hashlib.sha256(inspect.getsource(measure).encode()).hexdigest()
    resolved = [
        {
            "schema": 1,
            "function": "measure",
            "source": source,
            "arguments": {"width": width, "depth": 3, "shape": shape},
            "seed": 0,
        }
        for shape in ([1, 2], [5])
        for width in (10, 20)
    ]
    assert [run.resolved for run in plan.runs] == resolved
    assert [run.id for run in plan.runs] == [configs.config_hash(item)[:16] for item in resolved]
    assert {run.program for run in plan.runs} == {""}


# ---- study.json


def test_what_is_written_before_the_first_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""A title.\n\nWhat it is about,\nat length.\n"""\n')
    mine = a_study(
        arms={"batch": Arm(overrides=BATCH, label="BatchNorm"), "none": NONE},
        axes={
            "rate": log_range("optim.learning_rate", 0.1, 10, 3, "learning rate"),
            "net": settings({"wide": {"model.mlp.widths": (64,)}}),
        },
        tune=Tune("rate"),
        measures={"accuracy": final("accuracy"), "speed": steps_to(0.9, "accuracy")},
        claims=[
            Difference(treatment="batch", control="none", measure="accuracy", sesoi=0.5),
            Difference(
                treatment="batch", control="none", measure="speed", direction="less", at=0.1
            ),
            Slope(arm="batch", axis="rate", measure="speed", log_x="10"),
            Ordering(arms=("batch", {"arm": "none", "net": "wide"}), measure="speed"),
        ],
    )
    plan = study.plan(mine, file, "quick")
    definition = study.describe(plan, ["the", "command"])
    rundir.write_json(tmp_path / "study.json", definition)
    assert rundir.read_json(tmp_path / "study.json") == definition
    expected = {
        "schema": 1,
        "name": "mine",
        "file": str(file),
        "title": "A title.",
        "about": "What it is about,\nat length.",
        "question": "Is it so?",
        "source": "nobody",
        "prediction": "It is.",
        "overrides": {"parallel.devices": 1},
        "scale": "quick",
        "may_conclude": True,
        "arms": {
            "batch": {"label": "BatchNorm", "overrides": BATCH, "first_seed": 0},
            "none": {"label": "none", "overrides": NONE, "first_seed": 0},
        },
        "axes": {
            "rate": {
                "values": [0.1, 1.0, 10.0],
                "keys": ["optim.learning_rate"],
                "log": True,
                "label": "learning rate",
            },
            "net": {"values": ["wide"], "keys": ["model.mlp.widths"], "log": False, "label": "net"},
        },
        "seeds": [0, 1, 2],
        "computed": {},
        "command": ["the", "command"],
        "device": None,
        "finished": None,
        "seconds": None,
        "verdicts": None,
    }
    assert {key: definition[key] for key in expected} == expected
    assert list(definition["axes"]) == ["rate", "net"]
    assert len(definition["runs"]) == 18
    assert definition["runs"][4] == {
        "id": plan.runs[4].id,
        "arm": "batch",
        "point": {"rate": 1.0, "net": "wide"},
        "seed": 1,
    }
    tuned = claims.measure_from_json(definition["tune"]["measure"])
    assert (tuned.how, tuned.metric, tuned.split) == ("final", "accuracy", "validation")
    written = [claims.claim_from_json(claim) for claim in definition["claims"]]
    # The only value of an axis goes without saying; no effect is a ratio of 1.
    assert [claim.where for claim in written] == [{"net": "wide"}] * 3 + [{}]
    assert [claim.sesoi for claim in written] == [0.5, 1.0, 0.0, 1.0]
    assert [claim.at for claim in written] == ["best", 0.1, "best", "best"]


def test_a_smoke_run_may_not_conclude():
    claim = Difference(treatment="batch", control="none", measure="accuracy")
    plan = study.plan(a_study(claims=[claim]), __file__, "smoke")
    assert len(plan.seeds) == 1 and plan.notes == []
    assert study.describe(plan, [])["may_conclude"] is False


@pytest.mark.parametrize("number", [1, 3])
def test_a_note_says_when_there_are_too_few_pairs_for_a_verdict(number):
    claim = Difference(treatment="batch", control="none", measure="accuracy")
    mine = a_study(claims=[claim] * number)
    # 2 / 2**n may be 0.05 / number at most.
    enough = next(n for n in range(2, 20) if 2 * 0.5**n <= 0.05 / number)
    assert enough == {1: 6, 3: 7}[number]
    assert study.plan(mine, "mine.py", "quick", seeds=enough).notes == []
    (note,) = study.plan(mine, "mine.py", "quick", seeds=enough - 1).notes
    assert f"{enough} seeds are the fewest" in note
    assert math.isclose(
        float(note.split("here ")[1].split(",")[0]), 2 * 0.5 ** (enough - 1), rel_tol=0.05
    )


def test_every_study_of_the_source_can_be_planned():
    files = sorted((ROOT / "configs" / "studies").glob("*.py"))
    for file in files:
        mine = study.load(file)
        for scale in mine.scales:
            plan = study.plan(mine, file, scale, confirmed=True)
            json.dumps(study.describe(plan, []))
    assert files
