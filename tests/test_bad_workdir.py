"""Bad flags and bad workdirs: exit code 2, one message that says what to do, nothing written."""

import json
import os

import pytest
from run_tools import DIGITS, train

from bnresearch import config as configs
from bnresearch.rundir import open_run

ONE = "parallel.devices=1"  # where devices do not matter

# What is given -> what the message has to name.
FLAGS = [
    (("trian",), ("verb 'trian'", "eval, list, report, study, train")),
    (("train", f"--config={DIGITS}"), ("--workdir is missing", "--help")),
    (("train", "--workdir=w"), ("--config is missing", "--help")),
    (("train", f"--config={DIGITS}", "--workdir="), ("--workdir is missing",)),
    (("train", f"--config={DIGITS}", "--workdir=w", "--seed=1"), ("--seed", "--help")),
    (("train", f"--config={DIGITS}", "--workdir=w", "again"), ("'again'", "--help")),
    (("train", f"--config={DIGITS}", "--workdir=w", "--progress=loud"), ("loud", "auto|bar|lines")),
    (("train", f"--config={DIGITS}", "--workdir=w", "--config.seed"), ("--config.seed", "--help")),
    (("train", "--config=no.py", "--workdir=w"), ("'no.py' does not exist", "list configs")),
    (("train", "--config=", "--workdir=w"), ("'' does not exist", "list configs")),
    (("train", f"--config={'x' * 300}.py", "--workdir=w"), ("does not exist", "list configs")),
    (("train", f"--config={DIGITS}", "--flagfile=no"), ("--flagfile is not read", "command line")),
    (("list", "norms", "--flagfile=no"), ("--flagfile is not read", "command line")),
    (("train", "--config", "no.py", "--workdir=w"), ("'no.py' does not exist", "list configs")),
    (("train", "--config=.", "--workdir=w"), ("'.' does not exist", "list configs")),
    (("train", "--config=notes.txt", "--workdir=w"), ("'notes.txt' is not a Python file",)),
    (("eval",), ("--workdir is missing",)),
    (("eval", "--workdir=absent"), ("absent is not a run folder", "config.json")),
    (("eval", "--workdir=empty"), ("empty is not a run folder", "config.json")),
    (("eval", "--workdir=notes.txt"), ("notes.txt is not a run folder",)),
    (("eval", "--workdir=run"), ("run has no checkpoint", "bnresearch train")),
    (("eval", "--workdir=run", "--stats=median"), ("--stats 'median'", "batch, blend, corrected")),
    (("eval", "--workdir=run", "--split=dev"), ("--split 'dev'", "test, train, validation")),
    (("eval", "--workdir=run", "--config.seed=1"), ("--config.seed", "--help")),
    (("eval", "--workdir=old"), ("schema 0", "status.json")),
    (("eval", "--workdir=torn"), ("config.json is not JSON",)),
    (("eval", "--workdir=retyped"), ("optim.learning_rate='x'", "type str, not float")),
    (("eval", "--workdir=cut"), ("lacks 'model.mlp.widths'", "Put the key back")),
    (("eval", "--workdir=unnamed"), ("lacks 'model.", "Put the key back")),
    (("list",), ("thing to list ''", "configs, datasets, inits, models")),
    (("list", "layers"), ("thing to list 'layers'", "norms")),
    (("list", "norms", "models"), ("'models'", "one thing")),
    (("list", "norms", "--all"), ("--all", "--help")),
]


def changed(change):
    """The text of a config.json after somebody's change to it."""
    resolved = configs.resolve(configs.default_config())
    change(resolved)
    return json.dumps(resolved)


CHANGED = {
    "retyped": changed(lambda resolved: resolved["optim"].update(learning_rate="x")),
    "cut": changed(lambda resolved: resolved["model"]["mlp"].pop("widths")),
    "unnamed": changed(lambda resolved: resolved.pop("model")),
}

WORKDIRS = {
    "~nobody_at_all/run": ("'~nobody_at_all/run' names no folder", "--workdir"),
    "/proc/bnresearch/run": ("/proc/bnresearch/run", "--workdir"),
    "notes.txt": ("notes.txt is a file", "--workdir"),
    "notes.txt/run": ("lies below", "which is a file", "--workdir"),
    "full": ("neither empty nor a run", "thesis.tex", "--workdir"),
    "other": ("another config", "seed: there 7, now 0", "optim.learning_rate: there 0.5, now 0.1"),
    "in_use": (f"in use by process {os.getpid()}", "--workdir"),
    "x" * 300: ("too long", "--workdir"),
}


@pytest.mark.parametrize(("argv", "parts"), FLAGS)
def test_a_bad_flag_is_refused(argv, parts, tmp_path, refused, compiled):
    (tmp_path / "notes.txt").write_text("not a config, not a folder")
    (tmp_path / "empty").mkdir()
    open_run(tmp_path / "run", configs.resolve(configs.default_config()), []).close()
    for name, text in (CHANGED | {"old": '{"schema": 0}', "torn": '{"schema": '}).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    refused(argv, *parts)
    assert compiled == []


@pytest.mark.parametrize("workdir", [pytest.param(name, id=name[:20]) for name in WORKDIRS])
def test_a_bad_workdir_is_refused(workdir, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    here = configs.load(DIGITS, [ONE, "train.duration=3st", "train.log_every=3st"])
    other = here.copy_and_resolve_references()
    other.update(seed=7)
    other.optim.learning_rate = 0.5
    open_run(tmp_path / "other", configs.resolve(other), []).close()
    with open_run(tmp_path / "in_use", configs.resolve(here), []):
        refused(
            train(ONE, workdir=workdir), *WORKDIRS[workdir], lines=3 if workdir == "other" else 1
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_without_permission_is_refused(tmp_path, refused):
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(train(ONE, workdir="locked/run"), "locked is not writable", "--workdir")


def broken_run(tmp_path, name, content):
    """The folder of the run that ``train(ONE, workdir="run")`` makes, with one more entry."""
    config = configs.load(DIGITS, [ONE, "train.duration=3st", "train.log_every=3st"])
    open_run(tmp_path / "run", configs.resolve(config), []).close()
    if content is None:
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).write_text(content)


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "result.json"])
def test_a_folder_where_a_file_should_be_is_refused(name, tmp_path, refused):
    broken_run(tmp_path, name, None)
    refused(train(ONE, workdir="run"), f"{name} is no file", "move it away", "--workdir")


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_where_a_folder_should_be_is_refused(name, tmp_path, refused):
    broken_run(tmp_path, name, "a file")
    refused(train(ONE, workdir="run"), f"{name} is no folder", "move it away", "--workdir")


@pytest.mark.parametrize("text", ["{}", '{"status": "fine", "step": 3}', '{"status": "done"}'])
def test_a_result_that_is_none_is_refused(text, tmp_path, refused):
    broken_run(tmp_path, "result.json", text)
    refused(train(ONE, workdir="run"), "result.json has no status or no step", "remove it to train")
