"""bnresearch.BatchNorm on many devices: named axes, groups of them, unequal counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_tools import close, draw
from batchnorm_tools import TRAIN, eager, pair
from jax.sharding import Mesh, PartitionSpec

import bnresearch


def blocks():
    """Rows of every device."""
    return draw((8, 6, 4))


def over_devices(module, variables, how, x, weights, mask=None):
    """Output, new statistics and gradient of every device, ``[8, ...]`` each."""

    def local(x, weights, mask):
        def loss(x):
            y, new = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return (y * weights).sum(), (y, new["batch_stats"])

        dx, (y, stats) = jax.grad(loss, has_aux=True)(x)
        return y, stats, dx

    if how == "pmap":
        return jax.pmap(local, axis_name="devices")(x, weights, mask)
    if how == "vmap":
        return jax.jit(jax.vmap(local, axis_name="devices"))(x, weights, mask)
    split, whole = PartitionSpec("devices"), PartitionSpec()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()), ("devices",)),
        in_specs=split,
        out_specs=(split, whole, split),
    )
    def sharded(x, weights, mask):
        y, stats, dx = local(x[0], weights[0], None if mask is None else mask[0])
        return y[None], stats, dx[None]

    y, stats, dx = sharded(x, weights, mask)
    return y, jax.tree.map(lambda s: jnp.stack([s] * 8), stats), dx


def whole_batch(variables, x, weights, mask=None):
    """The same of the rows of all devices in one batch."""
    module = bnresearch.BatchNorm(**TRAIN)

    def loss(x):
        mask_ = None if mask is None else mask.reshape(-1, 1)
        y, stats = eager(module, x, variables, mask=mask_)
        return (y * weights.reshape(y.shape)).sum(), (y, stats)

    dx, (y, stats) = jax.grad(loss, has_aux=True)(jnp.asarray(x.reshape(-1, x.shape[-1])))
    return y.reshape(x.shape), jax.tree.map(lambda s: np.stack([s] * 8), stats), dx.reshape(x.shape)


@pytest.mark.parametrize("how", ["pmap", "vmap", "shard_map"])
def test_axis_name_gives_the_statistics_of_the_whole_batch(how):
    x, weights = blocks()
    theirs, ours = pair(axis_name="devices")
    variables = theirs.init(jax.random.key(0), x[0])
    actual = over_devices(ours, variables, how, x, weights)
    close(actual, whole_batch(variables, x, weights), 2e-6)
    close(actual, over_devices(theirs, variables, how, x, weights), 2e-6)


@pytest.mark.parametrize("how", ["pmap", "vmap", "shard_map"])
def test_unequal_counts_are_weighted(how):
    x, weights = blocks()
    x = x + 5 * np.arange(8, dtype=np.float32)[:, None, None]
    mask = (np.arange(6) < np.array([6, 1, 2, 0, 6, 3, 5, 6])[:, None])[..., None]
    theirs, ours = pair(axis_name="devices")
    variables = theirs.init(jax.random.key(0), x[0])
    actual = over_devices(ours, variables, how, x, weights, mask)
    wanted = whole_batch(variables, x, weights, mask)
    close(actual, wanted, 3e-6)
    mask[3, 0] = True  # without a device of count 0, which flax makes NaN
    wrong = over_devices(theirs, variables, how, x, weights, mask)[1]
    right = whole_batch(variables, x, weights, mask)[1]
    assert np.abs(wrong["mean"] - right["mean"]).max() > 0.01


def test_groups_are_merged_apart():
    x, weights = blocks()
    theirs, ours = pair(axis_name="devices", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])
    variables = theirs.init(jax.random.key(0), x[0])
    actual = over_devices(ours, variables, "pmap", x, weights)
    close(actual, over_devices(theirs, variables, "pmap", x, weights), 2e-6)
    means = x.reshape(2, 24, 4).mean(1)
    close(actual[1]["mean"], 0.01 * np.repeat(means, 4, axis=0), 2e-6)
