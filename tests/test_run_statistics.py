"""The running statistics of runs, taken anew: in the sets of training, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import DIGITS

from bnresearch import config as configs
from bnresearch.evaluate import on_one_device
from bnresearch.experiment import initial_state, prepare
from bnresearch.norm import Scope
from bnresearch.pooled import merged
from bnresearch.precise import layer_after_layer, one_pass
from bnresearch.run_statistics import of_training, run_statistics
from bnresearch.step import build_model


def assert_close(actual, wanted, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


RUN = ("parallel.devices=1", "model.mlp.widths=(9, 7)", "train.duration=30st", "data.batch_size=60")


@pytest.fixture(scope="module")
def state():
    """What all of these runs begin with."""
    return jax.device_get(initial_state(experiment_of()))


def experiment_of(*overrides, one=False):
    config = configs.load(DIGITS, [*RUN, *overrides])
    return prepare(on_one_device(config) if one else config)


def statistics(experiment, state):
    return run_statistics(experiment, state.params, state.batch_stats, 5, 3)


@pytest.mark.parametrize(
    ("overrides", "splits"),
    [
        (("norm.scope=ghost:15",), 4),
        (("parallel.devices=4", "parallel.mode=shard_map", "norm.scope=group:2"), 2),
        (("train.accumulate=3",), 3),
        (("train.accumulate=3", "train.accumulate_statistics=batch"), 1),
    ],
)
def test_a_run_is_normalised_in_the_sets_of_training(overrides, splits, state):
    """By hand: the model with that many sets per batch, whose norms look at the whole batch."""
    experiment = experiment_of(*overrides)
    found = statistics(experiment, state)
    dataset, config = experiment.program.dataset, experiment.config
    model = build_model(config, 10, use="batch", scope=Scope(splits=splits))
    given = {"params": state.params, "batch_stats": state.batch_stats}
    look = jax.jit(lambda image: model.apply(given, image, train=False, mutable="moments")[1])
    seen = []
    for step in (5, 6, 7):
        batch = dataset.train_batch(dataset.feed(0, step), 0, step, jnp.arange(60))
        seen.append(jax.device_get(look(batch["image"])["moments"]))
    for site, stats in found.items():
        rows = [[one[site][name] for one in seen] for name in ("mean", "var")]
        whole = merged([*rows, np.full((3, 1), 60.0)])
        assert_close(stats, {"mean": whole.mean, "var": whole.var}, 1e-5)
    if experiment.program.layout.device_count > 1:  # as an evaluation has it
        assert_close(statistics(experiment_of(*overrides, one=True), state), found, 1e-5)


def test_numbers_are_arguments_and_a_second_time_compiles_nothing(compiled, state):
    experiment = experiment_of()
    first = statistics(experiment, state)
    other = experiment_of("norm.batch.epsilon=0.5", "seed=3")
    statistics(other, state)  # the order of its epochs
    compiled.clear()
    again, changed = statistics(experiment, state), statistics(other, state)
    assert compiled == []
    assert_close(again, first, 0)
    assert np.abs(changed["norm2"]["var"] - first["norm2"]["var"]).max() > 1e-4


def test_what_is_kept_is_left_alone_and_what_has_an_update_of_its_own_moves():
    experiment = experiment_of("norm.rules=('norm1 -> frozen', 'norm2 -> lp')")
    state = initial_state(experiment)
    found = statistics(experiment, state)
    assert_close(found["norm1"], jax.device_get(state.batch_stats["norm1"]), 0)
    assert np.abs(found["norm2"]["mean"]).min() > 1e-4
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    sites = of_training(experiment, variables).prepared.sites
    assert {path: site.how for path, site in sites.items()} == {"norm1": "kept", "norm2": "moved"}


def test_layer_after_layer_goes_on_from_what_had_an_update_of_its_own(state):
    """By hand: norm1 as one pass has moved it, and norm2 from what then comes out of it."""
    experiment = experiment_of("norm.rules=('norm1 -> lp',)")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    training = of_training(experiment, variables)
    over = training.batches(experiment, 5, 3)
    ways = [way(training.prepared, variables, over) for way in (one_pass, layer_after_layer)]
    first, other = (way.batch_stats for way in ways)
    assert_close(other["norm1"], first["norm1"], 0)
    model = build_model(experiment.config, 10, use="running")
    given = {"params": state.params, "batch_stats": {**first, "norm2": state.batch_stats["norm2"]}}
    look = jax.jit(lambda image: model.apply(given, image, train=False, mutable="moments")[1])
    dataset = experiment.program.dataset
    seen = []
    for step in (5, 6, 7):
        batch = dataset.train_batch(dataset.feed(0, step), 0, step, jnp.arange(60))
        seen.append(jax.device_get(look(batch["image"])["moments"]["norm2"]))
    rows = [[one[name] for one in seen] for name in ("mean", "var")]
    whole = merged([*rows, np.full((3, 1), 60.0)])
    assert_close(other["norm2"], {"mean": whole.mean, "var": whole.var}, 1e-5)
    assert [len(way.moments) for way in ways] == [2, 2]


def test_a_run_without_statistics_to_take_anew_keeps_those_it_has():
    experiment = experiment_of("norm.kind=frozen")
    state = jax.eval_shape(experiment.program.init, experiment.numbers)
    assert statistics(experiment, state) is state.batch_stats
