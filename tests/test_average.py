"""Averages of the weights: their values, what they leave alone, and how they are evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import DIGITS, After, metrics

from bnresearch import average
from bnresearch import config as configs
from bnresearch.checkpoint import digest
from bnresearch.claims import final
from bnresearch.errors import Diverged, Stopped, UserError
from bnresearch.evaluate import averaged, with_average
from bnresearch.experiment import evaluator, initial_state, prepare, train_feed
from bnresearch.parallel import MODES
from bnresearch.step import make_train_step, single
from bnresearch.study.subjects import Training
from bnresearch.train import run

STEPS = 12
SHORT = (
    "parallel.devices=1",
    "data.batch_size=64",
    "model.mlp.widths=(6,)",
    f"train.duration={STEPS}st",
    "train.log_every=5st",
    "train.eval_every=4st",
    "train.checkpoint_every=3st",
)
EMA = ("train.average.name=ema", "train.average.ema.decay=0.8")
SWA = ("train.average.name=swa", "train.average.swa.start=0.5", "train.average.swa.every=2st")


def load(*overrides):
    return configs.load(DIGITS, [*SHORT, *overrides])


def states(*overrides):
    """The states after each step of a run."""
    experiment = prepare(load(*overrides))
    layout = experiment.program.layout
    state, found = layout.put(initial_state(experiment)), []
    for step in range(STEPS):
        feed = train_feed(experiment, step, 1)
        state = experiment.program.train(state, feed, experiment.numbers, jnp.int32(1))
        found.append(jax.tree.map(np.array, layout.get(state)))
    return found


@pytest.fixture(scope="module")
def plain():
    return states()


@pytest.fixture(scope="module")
def ema():
    return states(*EMA)


@pytest.fixture(scope="module")
def swa():
    return states(*SWA)


def assert_average(state, plain, weights, atol=1e-6):
    """It is the mean of the weights of those states, in float64."""
    leaves = zip(*(jax.tree.leaves(one.params) for one in plain), strict=True)
    wanted = [np.average(np.float64(of_one), axis=0, weights=weights) for of_one in leaves]
    for leaf, value in zip(jax.tree.leaves(state.average["params"]), wanted, strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, value, atol=atol)
    assert int(state.average["count"]) == np.count_nonzero(weights)


# ---- Values


def test_the_exponential_average_is_that_of_the_weights_after_every_step(ema, plain):
    for count, state in enumerate(ema, 1):
        assert_average(state, plain[:count], 0.8 ** np.arange(count)[::-1])


def test_the_stochastic_average_is_the_mean_of_every_other_step_from_the_middle_on(swa, plain):
    for count, state in enumerate(swa, 1):
        steps = np.arange(1, count + 1)
        weights = (steps >= 6) & (steps % 2 == 0)
        if count < 6:
            assert int(state.average["count"]) == 0
        else:
            assert_average(state, plain[:count], weights)


def followed(values, config, decay=0.0):
    """The averages of one number that takes these values, after each step, and their counts."""
    update = average.make_update(config.train, 20.0)
    numbers = {"train.average.ema.decay": jnp.float32(decay)}
    state, found = average.start(config.train.average.name, {"w": jnp.zeros(())}), []
    for step, value in enumerate(values, 1):
        state = update(state, {"w": jnp.float32(value)}, jnp.int32(step), numbers)
        found.append((float(state["params"]["w"]), int(state["count"])))
    return found


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 0.9999999])
def test_the_exponential_average_of_any_decay_forgets_the_start(decay):
    values = [3.0, -1.0, 4.0]
    for step, (found, count) in enumerate(followed(values, load(*EMA), decay), 1):
        weights = np.float64(np.float32(decay)) ** np.arange(step)[::-1]
        assert found == pytest.approx(np.average(values[:step], weights=weights), rel=1e-6)
        assert count == step


def test_from_the_start_on_the_first_weights_are_those_after_the_first_period():
    config = load(*SWA, "train.average.swa.start=0.0", "train.average.swa.every=0.25ep")
    found = followed(range(1, STEPS + 1), config)
    assert found == [(0.0, 0)] * 4 + [(5.0, 1)] * 5 + [(7.5, 2)] * 3


def test_a_sweep_over_the_decay_compiles_once(ema, plain, compiled):
    first = prepare(load(*EMA))
    for decay in (0.8, 0.3):
        experiment = prepare(load(*EMA, f"train.average.ema.decay={decay}"))
        assert experiment.program is first.program
        state = experiment.program.layout.put(initial_state(experiment))
        feed = train_feed(experiment, 0, STEPS)
        state = experiment.program.train(state, feed, experiment.numbers, jnp.int32(STEPS))
        assert_average(jax.device_get(state), plain, decay ** np.arange(STEPS)[::-1])
    assert compiled.count("jit(run)") <= 1


# ---- What they leave alone


def test_training_never_sees_the_average(plain, ema, swa):
    """Nor has the state of a run without one anything of it: its digest is that of old."""
    for without, *others in zip(plain, ema, swa, strict=True):
        assert without.average == {}
        for state in others:
            assert digest(state.replace(average={})) == digest(without)
            assert digest(state) != digest(without)


def test_a_refused_step_does_not_move_the_average(ema):
    experiment, state = prepare(load(*EMA)), ema[4]
    program = experiment.program
    kernel = state.params["head"]["kernel"] * np.float32(1e38)
    state = state.replace(params=state.params | {"head": state.params["head"] | {"kernel": kernel}})
    bare = make_train_step(experiment.config, program.dataset, program.layout, program.schedule)
    feed = train_feed(experiment, 5, 1)
    for train in (program.train, jax.jit(single(bare))):
        given = program.layout.put(jax.tree.map(np.array, state))
        after = train(given, feed, experiment.numbers, jnp.int32(1))
        assert bool(after.meter["bad"])
        assert digest(after.average) == digest(state.average)


# ---- Evaluation


def batch_of(experiment, step):
    """Images as rows and labels of a training batch, in float64."""
    dataset = experiment.program.dataset
    batch = dataset.train_batch(dataset.feed(0, step), 0, step, jnp.arange(64))
    return np.float64(batch["image"]).reshape(64, -1), np.asarray(batch["label"])


def loss_by_hand(experiment, params, mean, var):
    """Cross-entropy and accuracy on the test split with given statistics, in float64."""
    feed = experiment.program.dataset.eval_feed("test")
    batch = experiment.program.dataset.eval_batch(feed, 0, jnp.arange(len(feed["label"])))
    p = jax.tree.map(np.float64, params)
    x = np.float64(batch["image"]).reshape(len(feed["label"]), -1) @ p["dense1"]["kernel"]
    x = (x - mean) / np.sqrt(var + 1e-5) * p["norm1"]["scale"] + p["norm1"]["bias"]
    logits = np.maximum(x, 0) @ p["head"]["kernel"] + p["head"]["bias"]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    label = np.asarray(batch["label"])
    return -log_p[np.arange(len(label)), label].mean(), (logits.argmax(1) == label).mean()


def test_the_average_is_evaluated_with_statistics_of_its_own(ema):
    """Those of the batches to come, against numpy; the run's own are of other weights."""
    experiment, state = prepare(load(*EMA, "train.average.batches=4")), ema[-1]
    params = state.average["params"]
    x = np.concatenate([batch_of(experiment, step)[0] for step in range(STEPS, STEPS + 4)])
    z = x @ np.float64(params["dense1"]["kernel"])
    found = averaged(experiment, state)
    np.testing.assert_allclose(found.batch_stats["norm1"]["mean"], z.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.batch_stats["norm1"]["var"], z.var(0), rtol=1e-5)
    evaluate = evaluator(experiment, "running")
    measured = with_average(experiment, evaluate)(state, "test")
    loss, accuracy = loss_by_hand(experiment, params, z.mean(0), z.var(0))
    assert measured["averaged_loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["averaged_accuracy"] == pytest.approx(accuracy)
    assert measured.items() >= evaluate(state, "test").items()
    stale = evaluate(state.replace(params=params), "test")
    assert abs(stale["loss"] - loss) > 0.01


@pytest.mark.slow
def test_a_residual_net_needs_them():
    config = ["parallel.devices=1", "train.average.name=ema", "train.average.ema.decay=0.98"]
    experiment = prepare(configs.load("configs/digits_resnet.py", config))
    state = experiment.program.layout.put(initial_state(experiment))
    for step in range(80):
        feed = train_feed(experiment, step, 1)
        state = experiment.program.train(state, feed, experiment.numbers, jnp.int32(1))
    evaluate = evaluator(experiment, "running")
    measured = with_average(experiment, evaluate)(state, "test")
    stale = evaluate(state.replace(params=state.average["params"]), "test")
    assert measured["averaged_accuracy"] > stale["accuracy"] + 0.05
    assert measured["averaged_loss"] < 0.5 * stale["loss"]


def test_a_run_that_diverges_does_so_as_without_an_average(tmp_path):
    far = ("optim.learning_rate=1e30", "train.eval_every=1st")
    ends = []
    for name, overrides in {"a": EMA, "b": ()}.items():
        with pytest.raises(Diverged) as diverged:
            run(load(*far, *overrides), tmp_path / name, show="off", tensorboard=False)
        ends.append((diverged.value.step, diverged.value.reason))
    assert ends[0] == ends[1]
    (of_first_step,) = metrics(tmp_path / "a")
    assert of_first_step["averaged_loss"] == "NaN"


# ---- Runs


@pytest.mark.parametrize("overrides", [EMA, SWA])
def test_a_resumed_run_has_the_average_of_an_untouched_one(overrides, tmp_path, compiled):
    config = load(*overrides)
    untouched = run(config, tmp_path / "a", show="off", tensorboard=False)
    compiled.clear()
    with pytest.raises(Stopped) as stopped:
        run(config, tmp_path / "b", show="off", stop=After(9), tensorboard=False)
    assert 6 <= stopped.value.step < STEPS
    result = run(config, tmp_path / "b", show="off", tensorboard=False)
    assert result["digest"] == untouched["digest"]
    assert result["metrics"] == untouched["metrics"]
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    assert compiled == []


# ---- On eight devices


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_all_modes_have_the_same_average(mode, plain):
    state = states(*EMA, f"parallel.mode={mode}", "parallel.devices=8")[-1]
    assert_average(state, plain, 0.8 ** np.arange(STEPS)[::-1], atol=2e-5)


# ---- Refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.average.name=emma", "unknown train.average.name 'emma'; choose one of: ema, none"),
        ("train.average.ema.decay=1.0", r"decay=1.0 is out of range; give a number in \[0, 1\)"),
        ("train.average.ema.decay=-0.1", "decay=-0.1 is negative"),
        ("train.average.swa.start=1.0", r"start=1.0 is out of range; give a number in \[0, 1\)"),
        ("train.average.swa.every=often", "every='often' is no duration; write epochs as '10ep'"),
        ("train.average.swa.every=0ep", "every='0ep' must be longer than nothing"),
        ("train.average.batches=0", "train.average.batches=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        configs.validate(load(override))


def test_an_average_of_nothing_is_refused():
    config = load(*SWA, "train.average.swa.start=0.0", "train.average.swa.every=13st")
    with pytest.raises(UserError, match=r"\(13 steps\) is longer than the training \(12 steps\)"):
        prepare(config)


def test_measures_of_averages_are_known_where_there_are_some():
    subject = Training(DIGITS)
    known = subject.metrics(subject.settle({}), "test")
    assert known == ("loss", "accuracy", "ece", "count")
    averaged = subject.metrics(subject.settle({"train.average.name": "swa"}), "test")
    assert averaged == (*known, "averaged_loss", "averaged_accuracy", "averaged_ece")


@pytest.mark.parametrize(
    ("metric", "label", "unit", "higher"),
    [
        ("ece", "test ece", "%", False),
        ("averaged_ece", "test averaged ece", "%", False),
        ("averaged_accuracy", "test averaged accuracy", "%", True),
        ("averaged_loss", "test averaged loss", "", False),
    ],
)
def test_measures_of_averages_look_like_those_of_the_run(metric, label, unit, higher):
    measure = final(metric)
    assert (measure.label, measure.unit, measure.higher_is_better) == (label, unit, higher)
    assert measure.factor == (100.0 if unit else 1.0)
    assert measure.geometric == (metric == "averaged_loss")
