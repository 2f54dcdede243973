"""A study from its file to its page, by the command line; its folder, and what is refused."""

import json
import sys

import pytest
from run_tools import DIGITS, assert_one_message, read

from bnresearch import __main__ as cli
from bnresearch import errors, lab, rundir, study
from bnresearch.study import planning

# Without training: the arm adds to what the seed gives. 0.1 * (-1)^seed is noise for all arms.
ADDING = '''"""Adding: is three more than one?

    a second paragraph"""
from bnresearch.study import Difference, Scale, Study, computed, final, grid

def add(seed, amount, scale=1.0):
    if amount == 13 and seed == 1:
        raise ValueError("an unlucky number")
    return {"sum": amount * scale + 0.1 * (-1) ** seed}

def get_study():
    return Study(
        question="Is three more than one?",
        source="arithmetic",
        prediction="Yes.",
        function=add,
        arms={"three": {"amount": 3}, "one": {"amount": OTHER}},
        axes={"scale": grid("scale", [1.0, 2.0])},
        measures={"sum": final("sum"),
                  "twice": computed(lambda run: 2 * run.final("test", "sum"), "twice the sum")},
        claims=[
            Difference(treatment="three", control="one", measure="sum", where={"scale": 2.0}),
            Difference(treatment="one", control="three", measure="twice", where={"scale": 1.0}),
        ],
        scales={"smoke": Scale(seeds=1), "quick": Scale(seeds=10), "full": Scale(seeds=20)},
    )
'''


@pytest.fixture
def adding(tmp_path):
    """Writes the study file; the name and the amount of the other arm may differ."""

    def write(name="adding", other=1):
        path = tmp_path / f"{name}.py"
        path.write_text(ADDING.replace("OTHER", str(other)))
        return path

    return write


@pytest.fixture
def no_page(monkeypatch):
    """For tests of other things: a page takes a second."""
    monkeypatch.setattr(lab.report, "write", lambda results, out: out / "index.html")


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["bnresearch", *map(str, argv)])
    return cli.main()


def test_the_command_runs_decides_and_writes_the_page(tmp_path, adding, monkeypatch, capsys):
    argv = ["study", adding(), "--scale=quick", f"--out={tmp_path / 'out'}", "--launcher=inline"]
    assert command(monkeypatch, *argv) == 0
    printed = capsys.readouterr()
    assert "Is three more than one?" in printed.out
    assert "supported" in printed.out
    assert f"Page: {tmp_path / 'out' / 'report' / 'index.html'}" in printed.out
    assert "40 of 40 runs" in printed.err
    definition = read(tmp_path / "out" / "study.json")
    assert [verdict["verdict"] for verdict in definition["verdicts"]] == ["supported", "refuted"]
    # Per seed (3 - 1) * 2, and 2 * (1 - 3), whatever the noise.
    assert [verdict["estimate"] for verdict in definition["verdicts"]] == pytest.approx([4, -4])
    assert (definition["title"], definition["scale"]) == (
        "Adding: is three more than one?",
        "quick",
    )
    assert definition["command"] == ["python", "-m", "bnresearch", *map(str, argv)]
    assert definition["started"] < definition["finished"]
    assert definition["seconds"] > 0
    assert definition["device"]["platform"] == "cpu"
    assert len(definition["computed"]["twice"]) == 40
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 40
    assert (tmp_path / "out" / "report" / "index.html").exists()


def test_the_same_command_again_does_nothing_twice(tmp_path, adding, no_page):
    first = lab.run_study(adding(), "quick", tmp_path / "out", launcher="inline", show="off")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*.json")}
    assert len(times) == 3 * 40
    outcome = lab.conduct(adding(), "quick", tmp_path / "out", show="off")
    assert outcome.counts == (40, 0, {}, 40)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert json.dumps(outcome.definition["verdicts"]) == json.dumps(first["verdicts"])
    # More seeds of the same study use the runs that are there.
    more = lab.conduct(adding(), "quick", tmp_path / "out", seeds=11, launcher="inline", show="off")
    assert more.counts == (44, 0, {}, 40)


def test_the_smoke_scale_gives_no_verdicts(tmp_path, adding, monkeypatch, capsys):
    argv = ["study", adding(), "--scale=smoke", f"--out={tmp_path / 'out'}", "--progress=off"]
    assert command(monkeypatch, *argv) == 0
    assert "No verdicts at scale smoke" in capsys.readouterr().out
    definition = read(tmp_path / "out" / "study.json")
    assert definition["verdicts"] is None
    assert definition["may_conclude"] is False


def test_failed_runs_are_named_and_the_rest_is_decided(
    tmp_path, adding, monkeypatch, capsys, no_page
):
    out = tmp_path / "out"
    argv = ["study", adding(other=13), "--scale=quick", f"--out={out}", "--launcher=inline"]
    assert command(monkeypatch, *argv, "--progress=off") == 1
    printed = capsys.readouterr()
    failed = [path.parent.name for path in out.glob("runs/*/status.json") if failure(path)]
    assert len(failed) == 2
    for name in failed:
        assert f"({name}): ValueError: an unlucky number" in printed.err
    *_, first, last = printed.err.splitlines()
    assert first.startswith("2 runs have no result; the same command tries again what failed")
    assert last in [
        f"  ValueError: an unlucky number (runs {a}, {b})" for a, b in (failed, failed[::-1])
    ]
    assert [verdict["n"] for verdict in read(out / "study.json")["verdicts"]] == [9, 9]


def failure(path):
    return read(path)["status"] == "failed"


def test_a_stopped_study_has_its_plan_and_goes_on(tmp_path, adding, monkeypatch, capsys, no_page):
    def stop(*arguments, **options):
        raise errors.SweepStopped(7)

    with monkeypatch.context() as patch:
        patch.setattr(lab, "sweep", stop)
        argv = ["study", adding(), "--scale=quick", f"--out={tmp_path / 'out'}"]
        assert command(patch, *argv) == 75
    assert "stopped with 7 runs to go" in capsys.readouterr().err
    definition = read(tmp_path / "out" / "study.json")
    assert definition["verdicts"] is None
    assert len(definition["runs"]) == 40
    done = lab.run_study(adding(), "quick", tmp_path / "out", launcher="inline", show="off")
    assert len(done["verdicts"]) == 2


def test_two_scales_in_one_folder_at_once_decide_on_their_own_runs(
    tmp_path, adding, monkeypatch, no_page
):
    """The other call writes its plan while this one runs."""
    sweep = lab.sweep

    def meanwhile(*arguments, **options):
        monkeypatch.setattr(lab, "sweep", sweep)
        other = lab.run_study(adding(), "full", tmp_path / "out", launcher="inline", show="off")
        assert [verdict["n"] for verdict in other["verdicts"]] == [20, 20]
        return sweep(*arguments, **options)

    monkeypatch.setattr(lab, "sweep", meanwhile)
    mine = lab.run_study(adding(), "quick", tmp_path / "out", launcher="inline", show="off")
    assert [verdict["n"] for verdict in mine["verdicts"]] == [10, 10]
    assert len(mine["computed"]["twice"]) == 40
    assert read(tmp_path / "out" / "study.json")["seeds"] == [*range(10)]


def test_a_damaged_run_is_named_and_left_out_and_keeps_nobody_from_deciding(
    tmp_path, adding, monkeypatch, capsys, no_page
):
    out = tmp_path / "out"
    first = lab.run_study(adding(), "quick", out, launcher="inline", show="off")
    run = out / "runs" / first["runs"][0]["id"]
    (run / "status.json").write_text("{")
    argv = ["study", adding(), "--scale=quick", f"--out={out}", "--progress=off"]
    assert command(monkeypatch, *argv) == 1
    *_, before, last = capsys.readouterr().err.splitlines()
    assert before.startswith("1 run has no result; ") and "move it away" in before
    assert last.startswith("  status.json is not JSON") and last.endswith(f"(run {run.name})")
    definition = read(out / "study.json")
    assert [verdict["n"] for verdict in definition["verdicts"]] == [10, 9]
    assert definition["device"] == first["device"]
    assert (run / "status.json").read_text() == "{"


def test_the_commit_of_a_study_is_that_of_its_runs(tmp_path, adding, no_page):
    first = lab.run_study(adding(), "quick", tmp_path / "out", launcher="inline", show="off")
    path = tmp_path / "out" / "runs" / first["runs"][-1]["id"] / "status.json"
    rundir.write_json(path, read(path) | {"commit": "older"})
    again = lab.run_study(adding(), "quick", tmp_path / "out", show="off")
    assert again["commit"] == f"{first['commit']}, older"


def test_a_study_file_has_its_helpers_beside_it(tmp_path, adding, monkeypatch, no_page):
    path = adding("helped")
    path.write_text(path.read_text().replace("amount * scale", "times(amount, scale)"))
    path.write_text(path.read_text().replace("def add", "from helping import times\n\ndef add", 1))
    (tmp_path / "helping.py").write_text("def times(a, b):\n    return a * b\n")
    monkeypatch.chdir("/")
    done = [
        lab.run_study(path, "quick", tmp_path / name, launcher=name, show="off")
        for name in ("inline", "local")
    ]
    for definition in done:
        assert [v["estimate"] for v in definition["verdicts"]] == pytest.approx([4, -4])


@pytest.mark.slow
def test_a_study_that_trains_is_the_same_by_both_launchers(tmp_path, monkeypatch, no_page):
    text = f'''"""Trains."""
from bnresearch.study import Difference, Scale, Study, final

def get_study():
    return Study(
        question="?", source="none", prediction="none", base={DIGITS!r},
        overrides={{"model.mlp.widths": (8,), "train.duration": "12st", "train.log_every": "12st",
                   "train.checkpoint_every": "never"}},
        arms={{"batch": {{}}, "none": {{"norm.kind": "none"}}}},
        measures={{"accuracy": final("accuracy")}},
        claims=[Difference(treatment="batch", control="none", measure="accuracy")],
        scales={{name: Scale(seeds=3) for name in ("smoke", "quick", "full")}},
    )
'''
    path = tmp_path / "trains.py"
    path.write_text(text)
    found = [
        lab.run_study(path, "quick", tmp_path / launcher, launcher=launcher, show="off")
        for launcher in ("inline", "local")
    ]
    assert found[0]["runs"] == found[1]["runs"]
    assert json.dumps(found[0]["verdicts"]) == json.dumps(found[1]["verdicts"])
    for run in found[0]["runs"]:
        digests = {
            read(tmp_path / launcher / "runs" / run["id"] / "result.json")["digest"]
            for launcher in ("inline", "local")
        }
        assert len(digests) == 1


TRAINS = f'''"""Trains."""
from bnresearch.study import Scale, Study, final, grid

def get_study():
    return Study(
        question="?", source="none", prediction="none", base={DIGITS!r},
        arms={{"batch": {{}}, "other": OTHER}},
        axes={{"rate": grid("optim.learning_rate", [0.1, 0.2])}},
        measures={{"accuracy": final("accuracy")}},
        scales={{name: Scale(seeds=3) for name in ("smoke", "quick", "full")}},
    )
'''


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"norm.kind": "group"}, ("norm.group.groups=32", "100 features")),
        ({"data.batch_size": 5000}, ("data.batch_size is 5000", "1298 training examples")),
        ({"data.batch_size": 1}, ("one single value", "larger batch")),
        ({"data.name": "digit"}, ("dataset 'digit'", "did you mean digits?")),
        (
            {"model.name": "plain", "model.plain.widths": (8,) * 5, "model.plain.convs": (1,) * 5},
            ("8x8", "fewer stages"),
        ),
        ({"norm.rules": ("stem/.* -> none",)}, ("stem/.*", "norm1")),
    ],
)
def test_what_no_run_could_begin_with_is_refused(tmp_path, refused, compiled, other, parts):
    (tmp_path / "trains.py").write_text(TRAINS.replace("OTHER", repr(other)))
    refused(["study", "trains.py", "--scale=quick", "--out=o"], "arm 'other', rate=0.1: ", *parts)
    assert compiled == []


def test_runs_that_are_done_are_not_asked_for_their_data(tmp_path, monkeypatch, no_page):
    path = tmp_path / "trains.py"
    path.write_text(TRAINS.replace("OTHER", repr({"data.name": "no_such_set"})))
    plan = study.plan(study.load(path), path, "quick")
    lab._check_programs(plan._replace(runs=plan.runs[:6]), tmp_path)
    with pytest.raises(errors.UserError, match="no_such_set"):
        lab._check_programs(plan, tmp_path)
    for run in plan.runs:
        (tmp_path / "runs" / run.id).mkdir(parents=True)
        (tmp_path / "runs" / run.id / "result.json").touch()
    lab._check_programs(plan, tmp_path)


# ---- The report by itself


def test_the_report_of_a_folder_of_studies(tmp_path, adding, monkeypatch, capsys):
    for name in ("adding", "again"):
        out = tmp_path / "all" / name
        lab.run_study(adding(name), "quick", out, launcher="inline", show="off")
    assert command(monkeypatch, "report", tmp_path / "all") == 0
    page = tmp_path / "all" / "report" / "index.html"
    assert capsys.readouterr().out == f"Page: {page}\n"
    assert page.read_text().count("Is three more than one?") >= 2
    assert (
        command(monkeypatch, "report", tmp_path / "all" / "again", f"--out={tmp_path / 'r'}") == 0
    )
    assert (tmp_path / "r" / "index.html").exists()


# ---- What is refused


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["study"], ["one study file, 0 given"]),
        (["study", "a.py", "b.py"], ["one study file, 2 given"]),
        (["study", "none.py", "--scale=quick", "--out=o"], ["none.py", "does not exist"]),
        (["study", "a.py", "--out=o"], ["--scale is missing"]),
        (["study", "a.py", "--scale=quick"], ["--out is missing"]),
        (["study", "a.py", "--launcher.workers=-1"], ["launcher.workers"]),
        (["study", "a.py", "--seeds=0"], ["seeds"]),
        (["study", "a.py", "--config.seed=1"], ["unknown flag --config.seed"]),
        (["report"], ["one folder, 0 given"]),
        (["report", "nowhere"], ["nowhere is no folder"]),
        (["report", "."], ["holds no study"]),
    ],
)
def test_bad_commands_are_refused(argv, parts, refused):
    refused(argv, *parts)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--scale=quik"], "did you mean quick?"),
        (["--scale=quick", "--launcher=loca"], "did you mean local?"),
        (["--scale=quick", "--progress=br"], "progress"),
        (["--scale=quick", "--out=adding.py"], "adding.py"),
        (["--scale=quick", "--out=adding.py/x"], "adding.py"),
        (["--scale=quick", "--out=~no-such-user/x"], "cannot write to ~no-such-user/x"),
        (["--scale=quick", "--launcher=inline", "--launcher.workers=2"], "take the launcher local"),
    ],
)
def test_bad_flags_of_a_study_are_refused(tmp_path, adding, refused, flags, part):
    adding()
    refused(["study", "adding.py", "--out=o", *flags], part)


def test_the_folder_of_another_study_is_refused(tmp_path, adding, refused, no_page):
    lab.run_study(adding("other"), "smoke", tmp_path / "out", launcher="inline", show="off")
    adding()
    argv = ["study", "adding.py", "--scale=quick", "--out=out"]
    refused(argv, "holds the study 'other', this one is 'adding'", "--out")


def test_a_folder_of_something_else_is_refused(tmp_path, adding, refused):
    adding()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    argv = ["study", "adding.py", "--scale=quick", "--out=out"]
    refused(argv, "neither empty nor a study", "thesis.tex")


def test_a_folder_whose_runs_are_no_folder_is_refused(tmp_path, adding, refused):
    adding()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").write_text("precious")
    refused(["study", "adding.py", "--scale=quick", "--out=out"], "cannot write to out", "--out")


def test_a_folder_of_another_schema_is_refused(tmp_path, adding, refused, no_page):
    lab.run_study(adding(), "smoke", tmp_path / "out", launcher="inline", show="off")
    path = tmp_path / "out" / "study.json"
    rundir.write_json(path, read(path) | {"schema": 99})
    refused(["study", "adding.py", "--scale=smoke", "--out=out"], "schema 99")


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 2), ("", 2)])
def test_a_great_many_runs_are_asked_for(
    tmp_path, adding, monkeypatch, capsys, no_page, answer, code
):
    monkeypatch.setattr(planning, "LIMIT", 3)
    argv = ["study", adding(), "--scale=smoke", f"--out={tmp_path / 'out'}", "--progress=off"]
    assert command(monkeypatch, *argv) == 2  # no terminal to ask at
    assert_one_message(capsys.readouterr().err, ["4 runs", "--yes"])

    class Terminal:
        isatty = staticmethod(lambda: True)
        readline = staticmethod(lambda: answer)

    monkeypatch.setattr(sys, "stdin", Terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert command(monkeypatch, *argv) == code
    assert "4 runs: go on? [y/N]" in capsys.readouterr().err
    assert command(monkeypatch, *argv, "--yes") == 0
