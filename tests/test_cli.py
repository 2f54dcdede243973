"""The command line: help, lists, and what train and eval print."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import __main__ as cli
from bnresearch import config as configs
from bnresearch import initialise, models, norm, optim, parallel, reparam, tasks
from bnresearch.average import AVERAGES
from bnresearch.checkpoint import Checkpoints
from bnresearch.data import DATASETS
from bnresearch.evaluate import STATS
from bnresearch.experiment import initial_state, prepare
from bnresearch.probes import PROBES
from bnresearch.train import run

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits_mlp.py")
TABLES = {
    "norms": norm.NORMS,
    "presets": norm.PRESETS,
    "weights": reparam.REPARAMS,
    "models": models.MODELS,
    "inits": initialise.INITS,
    "datasets": DATASETS,
    "tasks": tasks.TASKS,
    "optimizers": optim.OPTIMIZERS,
    "schedules": optim.SCHEDULES,
    "averages": AVERAGES,
    "modes": parallel.MODES,
    "stats": STATS,
    "probes": PROBES,
}
SHORT = (
    "parallel.devices=1",
    "model.mlp.widths=(16,)",
    "train.duration=30st",
    "train.log_every=10st",
    "train.checkpoint_every=20st",
)


@pytest.fixture
def command(monkeypatch, capsys):
    """``command(*argv)``: runs it and returns exit code, stdout and stderr."""

    def call(*argv):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["bnresearch", *argv])
        code = cli.main()
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and its result."""
    workdir = tmp_path_factory.mktemp("cli") / "run"
    return workdir, run(configs.load(DIGITS, SHORT), workdir, show="off")


def snapshot(folder):
    paths = sorted(folder.rglob("*"))
    return [(path, path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths]


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_names_verbs_and_exit_codes(argv, command):
    code, out, err = command(*argv)
    assert (code, err) == (0, "")
    for verb in cli.VERBS:
        assert f"python -m bnresearch {verb}" in out
    for meaning in ("0 done", "2 the input was wrong", "3 the run diverged", "75 stopped"):
        assert meaning in out


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ("train", "--help"),
            ("--config=FILE", "--workdir", "--config.a.b=v", "--progress", "auto", "goes on where"),
        ),
        (
            ("eval", "--help"),
            ("--workdir", "--stats", "running", "batch", "--split", "train, validation or test"),
        ),
        (("list", "-h"), tuple(cli.LISTS)),
    ],
)
def test_the_help_of_a_verb_names_what_it_takes(argv, parts, command):
    code, out, err = command(*argv)
    assert (code, err) == (0, "")
    assert f"python -m bnresearch {argv[0]}" in out
    for part in parts:
        assert part in out


def test_the_help_with_a_config_shows_every_key_with_its_value(command):
    code, out, _ = command("train", f"--config={DIGITS}", "--config.seed=7", "--help")
    assert code == 0
    flat = configs.flatten(configs.load(DIGITS)) | {"seed": 7}
    lines = [line.strip() for line in out.splitlines()]
    for key, value in flat.items():
        assert f"--config.{key}={value}" in lines


@pytest.mark.parametrize("table", TABLES)
def test_a_list_has_every_name_of_its_table_with_a_summary(table, command):
    code, out, err = command("list", table)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split(None, 1)[1:] for line in out.splitlines()}
    assert TABLES[table].keys() <= rows.keys()
    for name in TABLES[table]:
        assert rows[name] != [], f"{name} has no summary"


def test_the_list_of_configs_has_every_file_with_its_first_line(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, out, _ = command("list", "configs")
    assert [line.split()[0] for line in out.splitlines()] == [
        str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").glob("*.py"))
    ]
    for line in out.splitlines():
        assert len(line.split(None, 1)) == 2


def test_the_list_of_configs_says_which_cannot_be_read(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "folder.py").mkdir(parents=True)
    files = {
        "fine": b'"""Fine."""',
        "latin": b'# coding: latin-1\n"""Gr\xfcn."""',
        "syntax": b"def get_config(:",
        "bytes": b'"""Gr\xfcn."""',
        "null": b"\0",
    }
    for name, content in files.items():
        (tmp_path / "configs" / f"{name}.py").write_bytes(content)
    code, out, err = command("list", "configs")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err, len(rows)) == (0, "", 6)
    assert rows["configs/fine.py"] == "Fine."
    assert rows["configs/latin.py"] == "Grün."
    for name in ("syntax", "bytes", "null", "folder"):
        assert rows[f"configs/{name}.py"].startswith("(cannot be read: ")


def test_the_list_of_configs_is_found_from_elsewhere(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, out, _ = command("list", "configs")
    assert "digits_mlp.py" in out
    assert (tmp_path / out.split()[0]).is_file()


def test_train_prints_one_line_of_json_with_the_digest(finished, command, tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--config.{item}" for item in SHORT]
    code, out, err = command("train", f"--config={DIGITS}", f"--workdir={workdir}", *flags)
    assert code == 0
    assert out.count("\n") == 1
    printed = json.loads(out)
    result = json.loads((workdir / "result.json").read_text())
    assert printed == {"workdir": str(workdir), **result}
    assert printed["digest"] == finished[1]["digest"]
    assert "step 30" in err  # progress goes to stderr
    # Again: the same line, at once and quietly.
    assert command("train", f"--config={DIGITS}", f"--workdir={workdir}", *flags) == (0, out, "")


def test_train_takes_its_flags_with_a_space_as_well(command, tmp_path):
    workdir = tmp_path / "run"
    flags = [part for item in SHORT for part in f"--config.{item}".split("=", 1)]
    argv = ["train", "--config", DIGITS, "--workdir", str(workdir), *flags]
    code, out, err = command(*argv, "--progress", "off")
    assert (code, err) == (0, "")
    assert json.loads(out)["step"] == 30
    written = json.loads((workdir / "config.json").read_text())
    assert written == configs.resolve(configs.load(DIGITS, SHORT))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_eval_gives_the_metrics_of_the_result(split, finished, command):
    workdir, result = finished
    before = snapshot(workdir)
    code, out, err = command("eval", f"--workdir={workdir}", f"--split={split}")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "step": 30,
        "stats": "running",
        "split": split,
        **result["metrics"][split],
    }
    assert snapshot(workdir) == before


def test_eval_is_of_the_test_split_with_running_statistics_unless_told_otherwise(finished, command):
    workdir, _ = finished
    default = command("eval", f"--workdir={workdir}")
    assert default == command("eval", f"--workdir={workdir}", "--split=test", "--stats=running")
    _, out, _ = command("eval", f"--workdir={workdir}", "--split=train")
    assert json.loads(out)["count"] == 1298


def forward_by_hand(params, image):
    """Logits of an MLP of one layer that normalises with the statistics of this very batch."""
    x = image.reshape(len(image), -1) @ params["dense1"]["kernel"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = np.maximum(x * params["norm1"]["scale"] + params["norm1"]["bias"], 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_eval_with_batch_statistics_is_of_the_examples_of_each_batch(split, finished, command):
    """Also of the last batch, which begins the part again: 229 and 270 examples by 256."""
    workdir, result = finished
    code, out, err = command("eval", f"--workdir={workdir}", "--stats=batch", f"--split={split}")
    assert (code, err) == (0, "")
    experiment = prepare(configs.load(DIGITS, SHORT))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        _, state = checkpoints.restore(initial_state(experiment))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    dataset, correct, loss, count = experiment.program.dataset, 0, 0.0, 0
    for step in range(dataset.eval_steps(split)):
        batch = dataset.eval_batch(dataset.eval_feed(split, step), step, jnp.arange(256))
        image, label, mask = (np.asarray(batch[name]) for name in ("image", "label", "mask"))
        whole = np.asarray(dataset.eval_feed(split, step)["label"])
        np.testing.assert_array_equal(label, whole[(256 * step + np.arange(256)) % len(whole)])
        # All 256 make the statistics, those of the mask the metrics.
        label, logits = label[mask], forward_by_hand(params, image.astype(np.float64))[mask]
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        loss -= log_p[np.arange(len(label)), label].sum()
        correct += (logits.argmax(1) == label).sum()
        count += len(label)
    printed = json.loads(out)
    assert (printed["stats"], printed["split"], printed["count"]) == ("batch", split, count)
    assert printed["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert printed["accuracy"] == pytest.approx(correct / count)
    assert printed["loss"] != result["metrics"][split]["loss"]


def test_eval_takes_the_newest_checkpoint_of_an_unfinished_run(finished, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "30")
    code, out, _ = command("eval", f"--workdir={workdir}")
    assert (code, json.loads(out)["step"]) == (0, 20)
