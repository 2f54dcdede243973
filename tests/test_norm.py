"""Normalisers against float64 numpy, and the linen module around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnresearch.errors import UserError
from bnresearch.layers import make_norm
from bnresearch.norm import NORMS, Scope, Stats, batch_norm, normalise, pool, values_per_set
from bnresearch.rivals import group_norm, layer_norm

ZERO_ONE = Stats(jnp.zeros(4), jnp.ones(4))
SHAPES = [(6, 4), (6, 5, 4), (6, 3, 3, 4), (6, 2, 3, 2, 4)]


def random(shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def options(kind):
    changed = {"group": {"groups": 2}}
    return dict(NORMS[kind].options) | changed.get(kind, {})


class Net(nn.Module):
    """One site with a dense layer before it."""

    norm: object

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, name="dense")(x)
        return self.norm(name="norm")(x)


def net(kind, **switches):
    return Net(make_norm(kind, options(kind), **switches))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_equals_float64(shape):
    x = np.asarray(random(shape), np.float64) * 3 + 2
    scale, bias = np.arange(1.0, 5.0), np.arange(4.0)
    y, new = batch_norm(
        jnp.float32(x), jnp.float32(scale), jnp.float32(bias), ZERO_ONE, use="batch", correction=1
    )
    axes, n = tuple(range(x.ndim - 1)), x.size // 4
    expected = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, atol=5e-6)
    np.testing.assert_allclose(new.mean, 0.1 * x.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(new.var, 0.9 + 0.1 * x.var(axes) * n / (n - 1), rtol=1e-6)


def test_running_statistics_are_used_and_stay():
    running = Stats(jnp.array([1.0, 2, 3, 4]), jnp.array([4.0, 4, 4, 4]))
    x = random((5, 4))
    y, new = batch_norm(x, None, None, running, use="running", epsilon=0.0)
    np.testing.assert_allclose(y, (x - jnp.array([1.0, 2, 3, 4])) / 2, rtol=1e-6)
    assert new is running


def test_large_mean_does_not_cancel():
    """At |mean| / std = 1e4, E[x^2] - E[x]^2 in float32 is off by a factor of eight."""
    x = random((4096, 4)) + 1e4
    _, new = batch_norm(x, None, None, ZERO_ONE, use="batch", decay=0.0)
    np.testing.assert_allclose(new.var, np.asarray(x, np.float64).var(0), rtol=1e-5)
    one_pass = (x**2).mean(0) - x.mean(0) ** 2
    assert np.abs(one_pass - 1).max() > 0.5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_are_float32_under_half_precision(dtype):
    x = (random((512, 4)) + 3).astype(dtype)
    y, new = batch_norm(x, jnp.ones(4), jnp.zeros(4), ZERO_ONE, use="batch", decay=0.0)
    assert y.dtype == dtype
    assert new.mean.dtype == new.var.dtype == jnp.float32
    np.testing.assert_allclose(new.var, np.asarray(x, np.float64).var(0), rtol=1e-5)


def test_splits_are_normalised_apart_and_the_running_statistics_pool_them():
    x = np.concatenate([np.asarray(random((8, 4))), np.asarray(random((8, 4), seed=1)) * 5 + 10])
    y, new = batch_norm(
        jnp.asarray(x), None, None, ZERO_ONE, use="batch", decay=0.0, scope=Scope(splits=2)
    )
    for rows in (slice(0, 8), slice(8, 16)):
        expected = (x[rows] - x[rows].mean(0)) / np.sqrt(x[rows].var(0) + 1e-5)
        np.testing.assert_allclose(y[rows], expected, atol=1e-5)
    np.testing.assert_allclose(new.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, x.var(0), rtol=1e-5)


def test_pool_adds_the_variance_of_the_means():
    sets = Stats(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [3.0]]))
    assert [float(v[0]) for v in pool(sets)] == [1.0, 3.0]  # 2 within + 1 between


def test_single_value_is_refused_in_training_only():
    with pytest.raises(UserError, match="one single value"):
        batch_norm(jnp.ones((1, 4)), None, None, ZERO_ONE, use="batch")
    with pytest.raises(UserError, match="one single value"):
        batch_norm(jnp.ones((4, 4)), None, None, ZERO_ONE, use="batch", scope=Scope(splits=4))
    batch_norm(jnp.ones((1, 4)), None, None, ZERO_ONE, use="running")
    assert values_per_set((1, 3, 3, 4), Scope()) == 9


def test_two_values_become_plus_and_minus_one():
    """With n = 2 and epsilon 0 the output is the sign of the difference, and the gradient is 0."""
    x = random((2, 4))

    def output(x):
        return batch_norm(x, None, None, ZERO_ONE, use="batch", epsilon=0.0)[0]

    np.testing.assert_allclose(output(x), np.sign(x - x[::-1]), atol=1e-6)
    gradient = jax.grad(lambda x: (output(x) * random((2, 4), seed=2)).sum())(x)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_group_and_layer_norm_equal_float64(shape):
    x = np.asarray(random(shape), np.float64) * 2 + 1
    scale, bias = np.arange(1.0, 5.0), np.arange(4.0)
    affine = jnp.float32(scale), jnp.float32(bias)
    flat = x.reshape(6, -1, 2, 2)  # batch, positions, groups, features of a group

    def standardised(a, axes):
        return (a - a.mean(axes, keepdims=True)) / np.sqrt(a.var(axes, keepdims=True) + 1e-5)

    expected = standardised(flat, (1, 3)).reshape(shape) * scale + bias
    y = group_norm(jnp.float32(x), *affine, epsilon=1e-5, groups=2)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    expected = standardised(x.reshape(6, -1), (1,)).reshape(shape) * scale + bias
    y = layer_norm(jnp.float32(x), *affine, epsilon=1e-5, over="example")
    np.testing.assert_allclose(y, expected, atol=1e-5)
    expected = standardised(x, (x.ndim - 1,)) * scale + bias
    y = layer_norm(jnp.float32(x), *affine, epsilon=1e-5, over="features")
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_against_flax():
    x = random((8, 3, 3, 4)) * 2 + 1
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables = theirs.init(jax.random.key(0), x)
    expected, updated = theirs.apply(variables, x, mutable=["batch_stats"])
    y, new = batch_norm(x, jnp.ones(4), jnp.zeros(4), ZERO_ONE, use="batch")
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(new.var, updated["batch_stats"]["var"], rtol=1e-5)
    group = nn.GroupNorm(num_groups=2, epsilon=1e-5)
    y = group_norm(x, jnp.ones(4), jnp.zeros(4), epsilon=1e-5, groups=2)
    np.testing.assert_allclose(y, group.apply(group.init(jax.random.key(0), x), x), atol=1e-5)


def test_group_norm_names_the_numbers_that_divide():
    with pytest.raises(UserError, match=r"groups=3 on 4 features.*1, 2, 4"):
        group_norm(jnp.ones((2, 4)), jnp.ones(4), jnp.zeros(4), epsilon=1e-5, groups=3)


def test_unknown_layer_norm_axes():
    with pytest.raises(UserError, match="norm.layer.over"):
        layer_norm(jnp.ones((2, 4)), jnp.ones(4), jnp.zeros(4), epsilon=1e-5, over="batch")


# ---- The contract of every entry of the table


@pytest.mark.parametrize("kind", NORMS)
def test_contract_initialisation_and_evaluation_update_nothing(kind):
    x = random((6, 3)) + 5
    variables = net(kind).init(jax.random.key(0), x)
    if NORMS[kind].running:
        np.testing.assert_array_equal(variables["batch_stats"]["norm"]["mean"], 0)
        np.testing.assert_array_equal(variables["batch_stats"]["norm"]["var"], 1)
    _, mutated = net(kind, use="running").apply(variables, x, mutable=["batch_stats"])
    for before, after in zip(
        jax.tree.leaves(variables.get("batch_stats", {})),
        jax.tree.leaves(mutated.get("batch_stats", {})),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_contract_shapes_dtypes_and_jit(kind, dtype):
    for shape in SHAPES:
        x = random(shape, dtype)
        module = make_norm(kind, options(kind))(name="norm")
        variables = module.init(jax.random.key(0), x)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
        y, _ = module.apply(variables, x, mutable=["batch_stats"])
        jitted, _ = jax.jit(lambda v, x: module.apply(v, x, mutable=["batch_stats"]))(variables, x)  # noqa: B023
        assert y.shape == shape
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(
            np.asarray(y, np.float32), np.asarray(jitted, np.float32), atol=tolerance
        )


@pytest.mark.parametrize("kind", NORMS)
def test_contract_gradient_against_finite_differences(kind):
    with jax.enable_x64(True):
        x = random((6, 3, 4), jnp.float64)
        module = make_norm(kind, options(kind))(name="norm")
        variables = module.init(jax.random.key(0), x)
        weights, direction = random(x.shape, jnp.float64, 1), random(x.shape, jnp.float64, 2)

        def f(x):
            y, _ = module.apply(variables, x, mutable=["batch_stats"])
            return (y * weights).sum()

        h = 1e-5
        difference = (f(x + h * direction) - f(x - h * direction)) / (2 * h)
        assert float((jax.grad(f)(x) * direction).sum()) == pytest.approx(
            float(difference), rel=1e-7
        )


@pytest.mark.parametrize("kind", NORMS)
def test_contract_same_initial_weights_and_biases_where_needed(kind):
    x = random((6, 3))
    variables = net(kind).init(jax.random.key(3), x)
    reference = net("batch").init(jax.random.key(3), x)
    np.testing.assert_array_equal(
        variables["params"]["dense"]["kernel"], reference["params"]["dense"]["kernel"]
    )
    assert "bias" in variables["params"]["norm"]
    bare = make_norm(kind, options(kind))(name="norm", after_linear=False)
    assert bool(bare.init(jax.random.key(0), random((6, 4)))) == (kind != "none")


def test_moments_are_observed_for_every_kind_and_match_numpy():
    x = random((6, 3, 3))
    for kind in NORMS:
        variables = net(kind).init(jax.random.key(0), x)
        _, seen = net(kind).apply(variables, x, mutable=["moments", "batch_stats"])
        inside = np.asarray(x @ variables["params"]["dense"]["kernel"], np.float64)
        moments = seen["moments"]["norm"]
        np.testing.assert_allclose(moments["mean"], inside.mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(moments["var"], inside.var((0, 1)), rtol=1e-5)
        assert float(moments["count"]) == 18


def test_normalise_keeps_the_dtype_of_its_input():
    y = normalise(jnp.ones((2, 4), jnp.bfloat16), ZERO_ONE, jnp.ones(4), jnp.zeros(4), 0.0)
    assert y.dtype == jnp.bfloat16
