"""A run evaluated with every kind of statistics: values by hand, new folders, and refusals."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import DIGITS, snapshot

from bnresearch import __main__ as cli
from bnresearch import config as configs
from bnresearch import evaluate
from bnresearch.checkpoint import Checkpoints
from bnresearch.config import unresolve
from bnresearch.doctor.run import diagnose_run
from bnresearch.errors import UserError
from bnresearch.evaluate import evaluate_run, on_one_device
from bnresearch.experiment import initial_state, prepare
from bnresearch.rundir import open_run, read_config, read_status
from bnresearch.stats import GRID, STATS, Asked
from bnresearch.train import run

SHORT = (
    "parallel.devices=1",
    "model.mlp.widths=(16,)",
    "train.duration=30st",
    "train.log_every=10st",
    "train.checkpoint_every=20st",
    "train.average.name=ema",
    "train.average.ema.decay=0.9",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run that averages its weights, and its result."""
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    return workdir, run(configs.load(DIGITS, SHORT), workdir, show="off", tensorboard=False)


def template(workdir):
    experiment = prepare(on_one_device(unresolve(read_config(workdir))))
    return jax.eval_shape(experiment.program.init, experiment.numbers)


@pytest.fixture(scope="module")
def state(finished):
    checkpoints = Checkpoints(finished[0] / "checkpoints", read_only=True)
    _, state = checkpoints.restore(template(finished[0]))
    return jax.tree.map(lambda a: np.asarray(a, np.float64), state)


@pytest.fixture(scope="module")
def data():
    """Training batches 30 to 32, and the two batches of the test split with their masks."""
    dataset = prepare(configs.load(DIGITS, SHORT)).program.dataset
    train = [dataset.train_batch(dataset.feed(0, n), 0, n, jnp.arange(60)) for n in (30, 31, 32)]
    test = [dataset.eval_batch(dataset.eval_feed("test"), n, jnp.arange(256)) for n in (0, 1)]
    return jax.tree.map(np.asarray, (train, test))


@pytest.fixture
def command(monkeypatch, capsys):
    """``command(*argv)``: what it printed, as JSON; it must not fail."""

    def call(*argv):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["bnresearch", *map(str, argv)])
        assert cli.main() == 0
        return json.loads(capsys.readouterr().out)

    return call


def before_norm(params, batch):
    return (
        batch["image"].reshape(len(batch["image"]), -1).astype(float) @ params["dense1"]["kernel"]
    )


def logits(params, x, mean, var):
    z = (x - mean) / np.sqrt(var + 1e-5) * params["norm1"]["scale"] + params["norm1"]["bias"]
    return np.maximum(z, 0) @ params["head"]["kernel"] + params["head"]["bias"]


def metrics(params, test, statistics):
    """Loss and accuracy with ``statistics(x, mask) -> mean, var`` of each batch."""
    loss, correct, count = 0.0, 0, 0
    for batch in test:
        x, mask = before_norm(params, batch), batch["mask"]
        found, label = logits(params, x, *statistics(x, mask))[mask], batch["label"][mask]
        log_p = found - np.log(np.exp(found).sum(1, keepdims=True))
        loss -= log_p[np.arange(len(label)), label].sum()
        correct += (found.argmax(1) == label).sum()
        count += len(label)
    return {"loss": loss / count, "accuracy": correct / count, "count": count}


def assert_metrics(found, wanted):
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-5), name


def whole(params, batches):
    x = np.concatenate([before_norm(params, batch) for batch in batches])
    return x.mean(0), x.var(0)


def test_precise_statistics_are_those_of_the_batches_after_the_checkpoint(
    finished, state, data, command
):
    """With one site both ways are the same: nothing stands before it."""
    before = snapshot(finished[0])
    found = command("eval", f"--workdir={finished[0]}", "--stats=precise", "--batches=3")
    mean, var = whole(state.params, data[0])
    wanted = metrics(state.params, data[1], lambda x, mask: (mean, var))
    assert_metrics(found, wanted)
    assert_metrics(found["layer_after_layer"], wanted)
    running = state.batch_stats["norm1"]
    s, rs = np.sqrt(var + 1e-5), np.sqrt(running["var"] + 1e-5)
    far = np.sqrt(((s / rs - 1) ** 2 + ((mean - running["mean"]) / rs) ** 2).mean())
    assert "depends_on_batch" not in found
    assert found["recalibration"] == {
        "batches": 3,
        "examples": 180,
        "sites": {"pooled": ["norm1"]},
        "distance": {"largest": pytest.approx(far, rel=1e-4), "site": "norm1"},
    }
    assert (found["step"], found["stats"], found["split"]) == (30, "precise", "test")
    assert snapshot(finished[0]) == before


def test_blended_statistics_do_not_count_padding(finished, state, data, command):
    found = command("eval", f"--workdir={finished[0]}", "--stats=blend:16")
    running = state.batch_stats["norm1"]

    def blended(x, mask):
        a = 16 / (16 + mask.sum())
        own = x[mask]
        return a * running["mean"] + (1 - a) * own.mean(0), a * running["var"] + (1 - a) * own.var(
            0
        )

    assert data[1][1]["mask"].sum() == 14
    assert_metrics(found, metrics(state.params, data[1], blended))
    assert found["depends_on_batch"] is True


def test_examples_have_the_weight_that_was_given(finished, state, data, command):
    found = command("eval", f"--workdir={finished[0]}", "--stats=examples:0.2")
    running = state.batch_stats["norm1"]

    def weighed(x, mask):
        away = x - running["mean"]
        return running["mean"] + 0.2 * away, 0.8 * running["var"] + 0.16 * away**2

    assert_metrics(found, metrics(state.params, data[1], weighed))
    assert "chosen" not in found


def test_the_weight_of_an_example_is_chosen_on_validation(finished, command):
    found = command("eval", f"--workdir={finished[0]}", "--stats=examples")
    on = {
        w: evaluate_run(finished[0], f"examples:{w}", "validation") for w in (0.0, 0.05, 0.5, 1.0)
    }
    chosen = found["chosen"]
    assert chosen["weight"] in GRID
    best = chosen["validation"]
    for other in on.values():
        assert (-best["accuracy"], best["loss"]) <= (-other["accuracy"], other["loss"])
    again = evaluate_run(finished[0], f"examples:{chosen['weight']}", "test")
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_corrected_statistics_are_of_a_batch_of_training(finished, state, data, command):
    found = command("eval", f"--workdir={finished[0]}", "--stats=corrected", "--batches=3")
    mean, var = whole(state.params, data[0])  # of vectors: the spread of the examples is all

    def corrected(x, mask):
        w = 1 / 60
        return (1 - w) * mean + w * x, (1 - w) * var + w * (1 - w) * ((x - mean) ** 2 - var)

    assert_metrics(found, metrics(state.params, data[1], corrected))


def test_tent_with_a_rate_of_nothing_is_the_batch_and_otherwise_is_not(finished, command):
    batch = command("eval", f"--workdir={finished[0]}", "--stats=batch")
    still = command("eval", f"--workdir={finished[0]}", "--stats=tent:0")
    moved = command("eval", f"--workdir={finished[0]}", "--stats=tent:0.1")
    assert still["depends_on_batch"] and batch["depends_on_batch"]
    assert still["loss"] == pytest.approx(batch["loss"], rel=1e-6)
    # The first 256 examples are predicted before any step.
    assert moved["loss"] != pytest.approx(batch["loss"], rel=1e-4)
    assert moved["loss"] == pytest.approx(batch["loss"], rel=0.1)


def test_every_kind_of_statistics_is_listed_and_documented(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bnresearch", "list", "stats"])
    assert cli.main() == 0
    rows = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows if row[1]} == set(STATS)


def test_saved_statistics_are_a_run_of_their_own(finished, command, tmp_path):
    before, new = snapshot(finished[0]), tmp_path / "deep" / "new"
    argv = ["eval", f"--workdir={finished[0]}", "--stats=precise", "--batches=3", "--split=train"]
    found = command(*argv, f"--save={new}")
    again = command("eval", f"--workdir={new}", "--stats=running", "--split=train")
    for name in ("loss", "accuracy", "count", "step"):
        assert again[name] == found[name]
    assert read_config(new) == read_config(finished[0])
    status = read_status(new)
    assert (status["status"], status["step"]) == ("stopped", 30)
    assert str(finished[0]) in status["message"] and "3 training batches" in status["message"]
    assert snapshot(finished[0]) == before
    assert [path.name for path in new.parent.iterdir()] == ["new"]
    origin = {"workdir": str(finished[0]), "step": 30, "weights": "raw", "batches": 3}
    assert json.loads((new / "origin.json").read_text()) == origin
    with pytest.raises(UserError, match=r"saved by eval, from step 30 of .*evaluate it, or train"):
        open_run(new, read_config(new), [])


@pytest.mark.slow
def test_what_was_saved_can_be_diagnosed_and_not_trained_on(finished, tmp_path, refused):
    new = tmp_path / "new"
    evaluate_run(finished[0], "precise", batches=3, save=new)
    config = [f"--config={DIGITS}", *(f"--config.{change}" for change in SHORT)]
    refused(["train", *config, f"--workdir={new}"], "saved by eval, from step 30 of")
    assert diagnose_run(new, batches=10).findings == []


def test_a_folder_that_cannot_be_saved_whole_does_not_appear(finished, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(evaluate, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        evaluate_run(finished[0], "precise", batches=3, save=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rules", "passes"), [((), 3), (("norm1 -> lp",), 3), (("norm1 -> lp", "norm2 -> lp"), 2)]
)
def test_progress_counts_every_batch_of_both_ways(rules, passes):
    """One pass, then one for each pooled site and one for all that have their own update."""
    changes = [*SHORT[:1], "model.mlp.widths=(9, 7)", f"norm.rules={rules!r}"]
    experiment = prepare(configs.load(DIGITS, changes))
    totals, ticks = [], []

    def tick(total):
        totals.append(total)
        return lambda: ticks.append(1)

    asked = Asked(experiment, initial_state(experiment), "test", 2, tick)
    STATS["precise"].run(asked, None)
    assert totals == [len(ticks)] == [2 * passes]


def test_averaged_weights_are_evaluated_with_statistics_of_their_own(
    finished, state, data, command
):
    found = command("eval", f"--workdir={finished[0]}", "--weights=averaged", "--batches=3")
    assert (found["stats"], found["weights"]) == ("precise", "averaged")
    params = state.average["params"]
    stats = whole(params, data[0])
    assert_metrics(found, metrics(params, data[1], lambda x, mask: stats))
    # The loop has said the same, over 50 batches.
    raw = command("eval", f"--workdir={finished[0]}")
    assert raw["averaged_loss"] == finished[1]["metrics"]["test"]["averaged_loss"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--stats=precis"], ["unknown --stats 'precis'", "precise", "corrected"]),
        (["--stats=precise:5"], ["--stats=precise:5", "takes nothing"]),
        (["--stats=blend"], ["--stats=blend:", "how many examples"]),
        (["--stats=blend:many"], ["--stats=blend:many", "is a number, at least 0"]),
        (["--stats=blend:-1"], ["--stats=blend:-1", "at least 0"]),
        (["--stats=examples:1.5"], ["--stats=examples:1.5", "at most 1"]),
        (["--stats=tent:nan"], ["--stats=tent:nan", "the learning rate"]),
        (["--batches=0", "--stats=precise"], ["--batches=0", "at least 1"]),
        (["--batches=5"], ["--batches=5: running takes no", "precise or --stats", "corrected"]),
        (["--stats=examples", "--split=validation"], ["chooses its weight on the validation"]),
        (["--split=all"], ["unknown --split 'all'"]),
        (["--weights=mean"], ["unknown --weights 'mean'", "averaged, raw"]),
        (["--save=new", "--stats=blend:3"], ["--save", "--stats=precise", "blend has none"]),
        (["--save=new"], ["--save", "--stats=precise", "running has none"]),
        (["--save=.", "--stats=precise"], ["--save=. is there already"]),
        (["--weights=averaged", "--stats=running"], ["statistics are those of the raw weights"]),
    ],
)
def test_what_cannot_be_is_refused_in_words(flags, parts, finished, refused):
    refused(["eval", f"--workdir={finished[0]}", *flags], *parts)


def test_a_run_without_an_average_or_statistics_is_refused(tmp_path, refused):
    config = configs.load(DIGITS, [*SHORT[:5], "norm.kind=layer"])
    run(config, tmp_path / "run", show="off", tensorboard=False)
    workdir = "--workdir=run"
    refused(["eval", workdir, "--weights=averaged"], "kept no average", "--weights=raw")
    uses = {"precise": "taken anew", "blend:4": "put together", "corrected": "corrected"}
    for stats, use in {**uses, "examples": "put together"}.items():
        part = f"no running statistics that could be {use}"
        refused(["eval", workdir, f"--stats={stats}", "--progress=off"], part)
    # Its scales and biases can be adapted all the same.
    folder = tmp_path / "run"
    still, moved = (evaluate_run(folder, f"tent:{rate}")["loss"] for rate in (0, 0.1))
    assert still == pytest.approx(evaluate_run(folder)["loss"], rel=1e-6)
    assert moved != pytest.approx(still, rel=1e-4)


@pytest.mark.parametrize(
    ("statistics", "part"),
    [
        ({"norm1": {"mean"}}, "batch_stats/norm1/var: saved nothing, wanted float32[16]"),
        (
            {"norm1": {"mean", "var"}, "norm2": {"mean"}},
            "batch_stats/norm2/mean: saved float32[16], wanted nothing",
        ),
    ],
)
def test_a_checkpoint_with_other_statistics_is_refused_by_name(
    statistics, part, finished, tmp_path, refused
):
    checkpoints = Checkpoints(finished[0] / "checkpoints", read_only=True)
    _, state = checkpoints.restore(template(finished[0]))
    zeros = np.zeros(16, np.float32)
    stats = {site: dict.fromkeys(names, zeros) for site, names in statistics.items()}
    (tmp_path / "run").mkdir()
    shutil.copy(finished[0] / "config.json", tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(30, state.replace(batch_stats=stats))
    refused(["eval", "--workdir=run"], "misses running statistics", part, lines=2)
