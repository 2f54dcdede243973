"""Kinds between batch norm and norms of one example: their corners are the norms of their parts."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from norm_tools import assert_close, assert_same_bits, random

from bnresearch.errors import UserError
from bnresearch.kinds import mixtures, rivals, starts
from bnresearch.kinds.batch import batch_norm
from bnresearch.sets import Scope, Stats

SCALE, BIAS = np.array([1.0, -2.0, 3.0, 0.5]), np.array([0.0, 0.5, -1.0, 2.0])
SHAPE = (6, 3, 2, 4)
MASK = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]], bool)


def shifted(shape, seed=0):
    return jnp.asarray(random(shape, seed) * 2 + 1 + random(shape[-1:], 9))


def running():
    return Stats(jnp.asarray(random((4,), 3)), jnp.asarray(1 + random((4,), 4) ** 2))


def per_example(function):
    """As a kind with running statistics."""

    def kind(x, scale, bias, state, *, use, scope=Scope(), **options):
        return function(x, scale, bias, **options), state

    return kind


PARTS = {
    "instance": per_example(rivals.instance_norm),
    "layer": per_example(rivals.layer_norm),
    "batch": batch_norm,
}


def switchable(x, mean_logits, var_logits, state, **context):
    logits = (jnp.asarray(logits, jnp.float32) for logits in (mean_logits, var_logits))
    return mixtures.switchable_norm(x, SCALE, BIAS, *logits, state, **context)


@pytest.mark.parametrize("use", ["batch", "running"])
@pytest.mark.parametrize("part", PARTS)
def test_switchable_with_extreme_logits_is_one_of_its_parts(part, use):
    x, logits = shifted(SHAPE), 100.0 * (np.array(list(PARTS)) == part)
    for context in ({}, {"scope": Scope(splits=2)}, {"mask": MASK}):
        y, new = switchable(x, logits, logits, running(), use=use, **context)
        wanted, _ = PARTS[part](x, SCALE, BIAS, running(), use=use, **context)
        keep = np.s_[:] if "mask" not in context else MASK
        assert_close(y[keep], wanted[keep], 1e-6)
        assert_same_bits(new, batch_norm(x, None, None, running(), use=use, **context)[1])


def test_switchable_mixes_means_and_variances():
    x = np.float64(shifted((6, 3, 4)))
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    axes = ((1,), (1, 2), (0, 1))
    m = sum(w * x.mean(a, keepdims=True) for w, a in zip(p, axes, strict=True))
    v = sum(w * x.var(a, keepdims=True) for w, a in zip(q, axes, strict=True))
    y, _ = switchable(jnp.float32(x), np.log(p), np.log(q), running(), use="batch")
    assert_close(y, (x - m) / np.sqrt(v + 1e-5) * SCALE + BIAS, 1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (6, 1, 4)])
def test_switchable_without_positions_mixes_layer_and_batch(shape):
    x = np.float64(shifted(shape))
    layer, batch = tuple(range(1, x.ndim)), tuple(range(x.ndim - 1))
    m, v = (
        0.25 * function(x, layer, keepdims=True) + 0.75 * function(x, batch, keepdims=True)
        for function in (np.mean, np.var)
    )
    logits = [50.0, 0.0, np.log(3)]
    y, _ = switchable(jnp.float32(x), logits, logits, running(), use="batch")
    assert_close(y, (x - m) / np.sqrt(v + 1e-5) * SCALE + BIAS, 1e-6)


def batch_group(x, state, **context):
    return mixtures.batch_group_norm(x, SCALE, BIAS, state, **context)


CORNERS = {
    "batch": (dict(), PARTS["batch"]),
    "ghost": (dict(examples_per_group=3), partial(batch_norm, scope=Scope(splits=2))),
    "group": (
        dict(examples_per_group=1, features_per_group=2),
        per_example(partial(rivals.group_norm, groups=2)),
    ),
    "layer": (dict(examples_per_group=1, features_per_group=0), PARTS["layer"]),
    "instance": (dict(examples_per_group=1), PARTS["instance"]),
}


@pytest.mark.parametrize("use", ["batch", "running"])
@pytest.mark.parametrize("corner", CORNERS)
def test_batch_group_corners(corner, use):
    options, function = CORNERS[corner]
    x = shifted(SHAPE)
    for context in ({}, {"mask": MASK}):
        y, new = batch_group(x, running(), use=use, **options, **context)
        wanted, _ = function(x, SCALE, BIAS, running(), use=use, **context)
        keep = np.s_[:] if not context else MASK
        assert_close(y[keep], wanted[keep], 1e-6)
        moved = batch_norm(x, None, None, running(), use=use, track="second_moment", **context)[1]
        assert_close(new, moved, 1e-6)


@pytest.mark.parametrize("scope", [Scope(), Scope(splits=3)])
def test_batch_group_between_its_corners(scope):
    x, before = shifted((6, 3, 4)), running()
    options = dict(examples_per_group=2, features_per_group=2)
    y, new = batch_group(x, before, use="batch", decay=0.8, scope=scope, **options)
    groups = np.float64(x).reshape(3, 2, 3, 2, 2)
    m, v = (f(groups, (1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    wanted = ((groups - m) / np.sqrt(v + 1e-5)).reshape(x.shape)
    assert_close(y, wanted * SCALE + BIAS, 1e-6)

    second = 0.8 * (before.var + before.mean**2) + 0.2 * (np.float64(x) ** 2).mean((0, 1))
    mean = 0.8 * before.mean + 0.2 * np.float64(x).mean((0, 1))
    assert_close((new.mean, new.var + new.mean**2), (mean, second), 1e-6)

    y, _ = batch_group(x, new, use="running", **options)
    mean, second = (np.repeat(a.reshape(2, 2).mean(1), 2) for a in (mean, second))
    assert_close(y, (x - mean) / np.sqrt(second - mean**2 + 1e-5) * SCALE + BIAS, 2e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(examples_per_group=4),
        dict(examples_per_group=-1),
        dict(examples_per_group=2, scope=Scope(splits=2)),
        dict(features_per_group=3),
        dict(features_per_group=-2),
    ],
)
def test_batch_group_refuses_groups_that_do_not_divide(options):
    with pytest.raises(UserError, match=r"norm.batch_group.*do not divide"):
        batch_group(shifted((6, 3, 4)), running(), use="batch", **options)


def test_batch_group_refuses_single_values():
    with pytest.raises(UserError, match="single value"):
        batch_group(shifted((6, 4)), running(), use="batch", examples_per_group=1)


@pytest.mark.parametrize("activates", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (6, 4)])
def test_evonorm_b0(shape, activates):
    x, v = np.float64(shifted(shape)), np.array([1.0, 0.3, -2.0, 0.0])
    axes = tuple(range(x.ndim - 1))
    function = partial(mixtures.evonorm_b0, activates=activates, epsilon=0.01, decay=0.8)
    args = jnp.float32(x), SCALE, BIAS, jnp.float32(v)
    instance = x.var(axes[1:], keepdims=True) if axes[1:] else np.zeros_like(x)
    y, new = function(*args, running(), use="batch", correction=1)
    count = x.size // 4
    variance = 0.8 * running().var + 0.2 * x.var(axes) * count / (count - 1)
    assert_close(new.var, variance, 1e-6)
    evaluated, same = function(*args, new, use="running")
    for found, var in ((y, x.var(axes)), (evaluated, variance)):
        root = np.sqrt(var + 0.01)
        if activates:
            root = np.maximum(root, v * x + np.sqrt(instance + 0.01))
        assert_close(found, x / root * SCALE + BIAS, 2e-6)
    assert same is new
    assert_close(starts.affine(4, {}) | {"v": jnp.ones(4)}, mixtures.evonorm_b0_start(4, {}), 0)
