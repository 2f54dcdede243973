"""Gradient accumulation: exact whole-batch statistics, or one ghost batch per microbatch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import config as configs
from bnresearch.errors import UserError
from bnresearch.experiment import initial_state, prepare, train_feed
from bnresearch.step import make_gradients

# Three sites in sequence for the MLP; the ResNet has sites beside each other, too.
MODELS = {
    "mlp": ["model.name=mlp", "model.mlp.widths=(16, 16, 16)"],
    "resnet": ["model.name=resnet", "model.resnet.depth=8", "model.resnet.width=0.25"],
}

# Unrolled microbatches of convolutions take long to compile.
COUNTS = {"mlp": (2, 4), "resnet": (2,)}


# What several tests compare with is computed once, if one worker has them all.
TOGETHER = pytest.mark.xdist_group("accumulate")


@functools.cache
def gradients(*overrides, devices=1):
    """Loss, gradient and running statistics of the first step, and the layout's device count."""
    config = configs.load(
        "configs/digits_mlp.py",
        [
            f"parallel.devices={devices}",
            "data.batch_size=64",
            "train.duration=50st",
            "norm.batch.correction=1",
            *overrides,
        ],
    )
    experiment = prepare(config)
    layout, dataset = experiment.program.layout, experiment.program.dataset
    function = make_gradients(config, dataset, layout)

    def step(state, feed, numbers, count):
        loss, gradient, stats = function(state, feed, numbers)
        return (*layout.mean_over_devices((loss, gradient)), stats)

    compiled = layout.compile(step, sharded_feed=False, donate=False)
    feed = train_feed(experiment, 0, 1)
    state = initial_state(experiment)
    # Biases and scales of their own, or errors in what they are added to would not show.
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.shape[-1])), state.params)
    state = layout.put(state.replace(params=params))
    return layout.get(compiled(state, feed, experiment.numbers, jnp.int32(1)))


def assert_equal(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(y) / scale, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_exact_statistics_give_the_gradient_of_the_whole_batch(model):
    whole = gradients(*MODELS[model])
    for count in COUNTS[model]:
        exact = gradients(
            *MODELS[model], f"train.accumulate={count}", "train.accumulate_statistics=batch"
        )
        assert_equal(exact, whole, 1e-5)
    # The other meaning gives another gradient, or this comparison would show nothing.
    ghost = gradients(*MODELS[model], "train.accumulate=4")
    difference = max(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(ghost[1]), jax.tree.leaves(whole[1]), strict=True)
    )
    assert difference > 1e-3


@TOGETHER
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_exact_statistics_on_eight_devices(mode):
    whole = gradients(*MODELS["mlp"])
    exact = gradients(
        *MODELS["mlp"],
        f"parallel.mode={mode}",
        "train.accumulate=2",
        "train.accumulate_statistics=batch",
        devices=8,
    )
    assert_equal(exact, whole, 1e-5)


@pytest.mark.parametrize("scope", ["device", "group:4"])
def test_exact_statistics_are_those_of_the_whole_batch_or_refused(scope):
    overrides = ["train.accumulate=2", "train.accumulate_statistics=batch", f"norm.scope={scope}"]
    with pytest.raises(UserError, match=f"norm.scope={scope} asks for smaller sets"):
        gradients(*MODELS["mlp"], *overrides, devices=8)
    # Without batch statistics there is nothing to contradict.
    gradients(*MODELS["mlp"], *overrides, "norm.kind=layer", devices=8)


@TOGETHER
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_a_microbatch_is_a_ghost_batch_on_any_number_of_devices(mode):
    """Microbatch j is the rows [16 j, 16 j + 16): the same numbers as four groups of one device,
    because group g of four devices holds just these rows."""
    groups = gradients(*MODELS["mlp"], "norm.scope=device", devices=4)
    for devices in (1, 4):
        ghost = gradients(
            *MODELS["mlp"], f"parallel.mode={mode}", "train.accumulate=4", devices=devices
        )
        assert_equal(ghost, groups, 1e-5)


# Kinds with an `update`: their state must not depend on how a batch comes. Where the layer adds
# the bias of the linear map in front, the statistics are those of what the kind sees.
UPDATED = {
    "batch": (),
    "scale_only": ("norm.scale_only.bias=false",),
    "switchable": ("norm.switchable.bias=false",),
    "evonorm_b0": ("norm.evonorm_b0.bias=false",),
    "regularized": (),
    "renorm": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", UPDATED)
def test_a_microbatch_is_a_ghost_batch_for_kinds_that_follow_from_moments(kind):
    chosen = (f"norm.kind={kind}", *UPDATED[kind])
    ghost = gradients(*MODELS["mlp"], *chosen, "norm.scope=ghost:32")
    parts = gradients(*MODELS["mlp"], *chosen, "train.accumulate=2")
    assert_equal(parts[1:], ghost[1:], 1e-5)


def test_without_batch_statistics_accumulation_changes_nothing():
    whole = gradients(*MODELS["mlp"], "norm.kind=layer")
    parts = gradients(*MODELS["mlp"], "norm.kind=layer", "train.accumulate=4")
    assert_equal(parts, whole, 1e-6)
