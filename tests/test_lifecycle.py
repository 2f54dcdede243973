"""A run from start to end: killed, stopped, damaged, doubled, diverged, finished, and its files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from run_tools import (
    DIGITS,
    EVERY,
    ROOT,
    SHORT,
    STEPS,
    After,
    command,
    metrics,
    read,
    snapshot,
)

from bnresearch import __main__ as cli
from bnresearch import config as configs
from bnresearch import native
from bnresearch.errors import Stopped, UserError
from bnresearch.evaluate import evaluate_run
from bnresearch.train import run

DEADLINE = 60  # seconds that any one process may take


class Process:
    """``python -m bnresearch train`` in a process of its own, which ends with the ``with``."""

    def __init__(self, workdir, *overrides):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bnresearch", *command(workdir, *overrides)],
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def end(self):
        """Its exit code, stdout and stderr once it has ended by itself."""
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err

    def wait_for(self, condition):
        """``condition()`` as soon as it is true; fails if the process ends before."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end and self.process.poll() is None:
            value = condition()
            if value:
                return value
            time.sleep(0.01)
        raise AssertionError(f"never came: {self.process.communicate()[1]}")

    def started_from(self):
        """The step that this process went on from, once it trains."""
        status = self.wait_for(lambda: self._status("running"))
        return status["step"]

    def _status(self, wanted):
        path = self.workdir / "status.json"
        status = read(path) if path.exists() else {}
        mine = status.get("pid") == self.process.pid and status["status"] == wanted
        return status if mine else None

    def wait_for_checkpoint(self, step):
        self.wait_for(lambda: newest_checkpoint(self.workdir) >= step)


def newest_checkpoint(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def assert_same_run(workdir, other):
    mine, theirs = read(workdir / "result.json"), read(other / "result.json")
    assert mine | {"seconds": 0} == theirs | {"seconds": 0}
    assert metrics(workdir) == metrics(other)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("untouched") / "run"
    with Process(workdir) as process:
        code, out, _ = process.end()
    assert code == 0
    assert json.loads(out)["digest"] == read(workdir / "result.json")["digest"]
    return workdir


def in_process(workdir, *overrides):
    return run(configs.load(DIGITS, [*SHORT, *overrides]), workdir, show="off")


# ---- Killed, stopped, damaged, doubled


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_untouched(untouched, tmp_path):
    workdir, draw, started = tmp_path / "run", random.Random(0), []
    for new_checkpoints in (0, 1, 3, 0, 2, 3):
        with Process(workdir) as process:
            started.append(process.started_from())
            process.wait_for_checkpoint(started[-1] + EVERY * new_checkpoints)
            time.sleep(draw.uniform(0.0, 0.3))
            process.process.send_signal(signal.SIGKILL)
            assert process.end()[0] == -signal.SIGKILL
    assert not (workdir / "result.json").exists()
    assert read(workdir / "status.json")["status"] == "running"
    with Process(workdir) as process:
        started.append(process.started_from())
        assert process.end()[0] == 0
    # It was not started from the beginning every time, and never went back.
    assert started == sorted(started)
    assert 9 * EVERY <= started[-1] < STEPS
    assert_same_run(workdir, untouched)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on_later(number, untouched, tmp_path):
    workdir = tmp_path / "run"
    with Process(workdir) as process:
        process.wait_for_checkpoint(EVERY)
        process.process.send_signal(number)
        code, out, err = process.end()
    status = read(workdir / "status.json")
    assert (code, out) == (75, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == status["message"]
    assert "run the same command to go on" in status["message"]
    assert status["status"] == "stopped"
    assert 0 < status["step"] < STEPS
    assert (workdir / "checkpoints" / str(status["step"])).is_dir()
    assert not (workdir / "result.json").exists()
    with Process(workdir) as process:
        assert process.started_from() == status["step"]
        assert process.end()[0] == 0
    assert_same_run(workdir, untouched)


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_runs(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    with Process(workdir, "train.duration=1000ep") as first:
        first.started_from()
        argv = ["bnresearch", *command(workdir, "train.duration=1000ep")]
        monkeypatch.setattr(sys, "argv", argv)
        assert cli.main() == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert f"in use by process {first.process.pid}" in printed.err
        assert printed.err.count("\n") == 1
        assert first.process.poll() is None


@pytest.mark.slow
def test_the_digest_depends_on_the_seed_and_not_on_checkpoints(untouched, tmp_path):
    rarely = "train.checkpoint_every=1000st"
    same = in_process(tmp_path / "same", rarely)
    other = in_process(tmp_path / "other", rarely, "seed=1")
    assert same["digest"] == read(untouched / "result.json")["digest"]
    assert other["digest"] != same["digest"]


@pytest.fixture
def unfinished(untouched, tmp_path):
    """A copy of the untouched run as it is just before its result is written."""
    workdir = tmp_path / "run"
    shutil.copytree(untouched, workdir)
    (workdir / "result.json").unlink()
    return workdir


def test_a_damaged_checkpoint_is_warned_of_and_the_one_before_is_used(untouched, unfinished, capfd):
    folder = unfinished / "checkpoints"
    # Arrays are written as one file or several, which may hold bytes that nothing refers to.
    for path in (folder / str(STEPS) / "state" / "ocdbt.process_0" / "d").iterdir():
        content = bytearray(path.read_bytes())
        content[::64] = (byte ^ 1 for byte in content[::64])
        path.write_bytes(content)
    in_process(unfinished)
    err = capfd.readouterr().err
    assert err.startswith(f"warning: checkpoint {folder / str(STEPS)} is damaged")
    assert err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        str(STEPS - EVERY),
        str(STEPS),
        f"damaged-{STEPS}",
    ]
    assert_same_run(unfinished, untouched)


def test_killed_just_before_its_result_it_writes_no_record_twice(untouched, unfinished):
    in_process(unfinished)
    assert_same_run(unfinished, untouched)


def test_a_torn_line_of_metrics_is_written_anew(untouched, unfinished):
    shutil.rmtree(unfinished / "checkpoints" / str(STEPS))
    path = unfinished / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    in_process(unfinished)
    assert_same_run(unfinished, untouched)


def test_a_finished_run_returns_at_once_and_touches_nothing(untouched):
    before = snapshot(untouched)
    result = in_process(untouched)
    assert result == read(untouched / "result.json")
    assert snapshot(untouched) == before


def test_killed_just_after_its_result_it_is_done_and_says_of_what(untouched, tmp_path):
    shutil.copytree(untouched, folder := tmp_path / "run")
    before = read(folder / "status.json")
    assert before["values"]["fewest"] and before["device"]["platform"] == "cpu"
    (folder / "status.json").write_text(json.dumps(before | {"status": "running"}))
    in_process(folder)
    after = read(folder / "status.json")
    same = before.keys() - {"heartbeat", "started", "pid", "command"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


# ---- Its files


def test_the_run_folder_describes_itself(untouched):
    names = {path.name for path in untouched.iterdir()}
    assert names == {
        "config.json",
        "status.json",
        "result.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "lock",
    }
    config = configs.load(DIGITS, SHORT)
    assert read(untouched / "config.json") == configs.resolve(config)
    assert read(untouched / "config.json")["schema"] == configs.SCHEMA
    status = read(untouched / "status.json")
    assert (status["status"], status["step"], status["message"]) == ("done", STEPS, None)
    assert {"heartbeat", "started", "pid", "host", "commit"} <= status.keys()
    assert status["started"] < status["heartbeat"]
    assert status["command"] == ["python", "-m", "bnresearch", *command(untouched)]
    assert status["device"] == {"platform": "cpu", "kind": "cpu", "count": 1}
    assert status["versions"]["jax"] == jax.__version__
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint", "python"} <= status["versions"].keys()


@pytest.mark.parametrize(
    ("overrides", "may"),
    [
        (["model.name=mlp"], True),
        (["model.name=plain"], True),
        (["model.name=plain", "parallel.kernels=xla"], False),
        (["model.name=plain", "dtype=bfloat16"], False),  # the library is for float32 alone
        (["model.name=plain", "parallel.devices=2", "data.batch_size=64"], False),
    ],
)
def test_the_status_says_what_computes_convolutions_and_norms(tmp_path, overrides, may):
    few = ["train.duration=1st", "parallel.devices=1", "train.checkpoint_every=never"]
    small = ["model.mlp.widths=(4,)", "model.plain.widths=(4,)", "model.plain.convs=(1,)"]
    run(configs.load(DIGITS, [*few, *small, *overrides]), tmp_path, show="off")
    wanted = native.choose("auto") if may else "xla"
    assert read(tmp_path / "status.json")["kernels"] == wanted


def test_the_result_has_the_metrics_and_the_digest(untouched):
    result = read(untouched / "result.json")
    assert {"schema", "status", "step", "metrics", "digest", "seconds"} == result.keys()
    assert (result["schema"], result["status"], result["step"]) == (1, "done", STEPS)
    assert len(result["digest"]) == 64
    counts = {split: values["count"] for split, values in result["metrics"].items()}
    assert counts == {"validation": 229, "test": 270}
    last = [record for record in metrics(untouched) if record["step"] == STEPS]
    for record in last:
        if record["split"] != "train":
            wanted = result["metrics"][record["split"]]
            assert {name: record[name] for name in wanted} == wanted


def test_the_metrics_have_a_record_wherever_one_is_due(untouched):
    steps = {"train": [], "validation": [], "test": []}
    for record in metrics(untouched):
        steps[record["split"]].append(record["step"])
        # 1298 training examples in batches of 60.
        assert record["epoch"] == round(record["step"] * 60 / 1298, 4)
    assert steps["train"] == [*range(7, STEPS, 7), STEPS]
    assert steps["validation"] == [*range(50, STEPS, 50), STEPS]
    assert steps["test"] == [STEPS]


def test_the_newest_checkpoints_are_kept(untouched):
    kept = sorted(int(path.name) for path in (untouched / "checkpoints").iterdir())
    assert kept == [STEPS - EVERY, STEPS]


# ---- Without checkpoints, and stopped by the caller


def test_a_run_that_never_saves_is_saved_where_it_is_stopped(untouched, tmp_path):
    config = configs.load(DIGITS, [*SHORT, "train.checkpoint_every=never"])
    with pytest.raises(Stopped) as stopped:
        run(config, tmp_path / "run", show="off", stop=After(10), tensorboard=False)
    step = stopped.value.step
    assert 0 < step < STEPS
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(step)]
    assert not (tmp_path / "run" / "tensorboard").exists()
    result = run(config, tmp_path / "run", show="off", tensorboard=False)
    assert result["digest"] == read(untouched / "result.json")["digest"]
    assert metrics(tmp_path / "run") == metrics(untouched)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_never_saves_leaves_no_checkpoint(untouched, tmp_path):
    result = in_process(tmp_path / "run", "train.checkpoint_every=never")
    assert result["digest"] == read(untouched / "result.json")["digest"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(UserError, match="checkpoint_every=never it gets none"):
        evaluate_run(tmp_path / "run", "running", "test")
