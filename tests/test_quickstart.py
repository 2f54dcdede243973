"""The quickstart as a user meets it: exit codes, what it prints, what it leaves, what it reuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnresearch import quickstart

ROOT = Path(__file__).parent.parent
SHORT = """
from bnresearch.config import default_config

def get_config():
    config = default_config()
    config.data.name = "digits"
    config.data.batch_size = 60
    config.model.name = "mlp"
    config.train.duration = "{}"
    return config
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "short.py"
    path.write_text(SHORT.format("2ep"))
    return path


def start(*arguments):
    command = [sys.executable, "-m", "bnresearch.quickstart", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, **pipes)


def call(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow
def test_runs_reports_and_reuses(tmp_path, config):
    out = tmp_path / "out"
    arguments = [f"--config={config}", f"--out={out}", "--seeds=2", "--rates=0.1,1e30"]
    code, text, errors = call(*arguments)
    assert code == 0, errors
    folders = sorted(path.parent.name for path in out.glob("*/result.json"))
    assert len(folders) == 8
    assert "batch-lr0.1-seed0" in folders
    results = {name: json.loads((out / name / "result.json").read_text()) for name in folders}
    diverged = [name for name, result in results.items() if result["status"] == "diverged"]
    assert diverged, "a learning rate of 1e30 has to diverge"
    assert "BatchNorm" in text
    assert "95 % interval" in text
    assert "8 of 8 runs done" in errors
    page = (out / "report" / "index.html").read_text()
    assert f"{8 - len(diverged)} of 8" in page
    assert f"{len(diverged)} diverged" in page

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    again, same_text, errors = call(*arguments)
    assert again == 0, errors
    assert same_text == text
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_ctrl_c_exits_75_and_the_same_command_goes_on(tmp_path, config):
    config.write_text(SHORT.format("2000ep"))
    out = tmp_path / "out"
    arguments = [f"--config={config}", f"--out={out}", "--seeds=1", "--rates=0.1"]
    process = start(*arguments)
    status = out / "batch-lr0.1-seed0" / "status.json"
    metrics = out / "batch-lr0.1-seed0" / "metrics.jsonl"
    # Steps have been taken once one is logged; how long compiling takes before that, who knows.
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    assert json.loads(status.read_text())["status"] == "stopped"
    assert json.loads(status.read_text())["step"] > 0


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--seeds=0", "not a number of seeds"),
        ("--seeds=two", "not a number of seeds"),
        ("--rates=0.1,fast", "positive numbers"),
        ("--rates=-1", "positive numbers"),
        ("--rates=nan", "positive numbers"),
        ("--rates=", "positive numbers"),
        ("--speed=11", "unrecognized"),
    ],
)
def test_wrong_options_are_refused_in_words(argument, words, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.main([argument])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_missing_config_is_refused_and_nothing_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert quickstart.main([f"--config={tmp_path}/none.py", f"--out={out}"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not out.exists()


def test_folder_of_another_config_is_refused_with_the_key(tmp_path, config, capsys):
    out = tmp_path / "out"
    run = out / "batch-lr0.1-seed0"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"seed": 7}')
    arguments = [f"--config={config}", f"--out={out}", "--seeds=1", "--rates=0.1"]
    assert quickstart.main(arguments) == 2
    assert "seed: there 7, now 0" in capsys.readouterr().err


def test_run_names_and_overrides():
    run = quickstart.Run("none", 0.03, 4)
    assert run.name == "none-lr0.03-seed4"
    assert run.overrides[:3] == ["norm.kind=none", "optim.learning_rate=0.03", "seed=4"]
