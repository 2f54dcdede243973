"""Batch normalization, its masks and its running averages, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norm_tools import random

from bnresearch import averages
from bnresearch.errors import UserError
from bnresearch.norm import Scope, Stats, batch_norm, normalise, pool

ZERO_ONE = Stats(jnp.zeros(4), jnp.ones(4))
RUNNING = Stats(jnp.array([1.0, 2, 3, 4]), jnp.array([4.0, 4, 4, 4]))
SHAPES = [(6, 4), (6, 5, 4), (6, 3, 3, 4), (6, 2, 3, 2, 4)]


def training(x, running=ZERO_ONE, **changes):
    """Output and new running statistics of batch norm in training, without scale and bias."""
    return batch_norm(jnp.asarray(x), None, None, running, use="batch", **changes)


# ---- Batch normalization


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variance", ["two_pass", "fast", "shifted"])
def test_batch_norm_equals_float64(shape, variance):
    x = np.asarray(random(shape), np.float64) * 3 + 2
    scale, bias = np.arange(1.0, 5.0), np.arange(4.0)
    arrays = jnp.float32(x), jnp.float32(scale), jnp.float32(bias), ZERO_ONE
    y, new = batch_norm(*arrays, use="batch", correction=1, variance=variance)
    axes, n = tuple(range(x.ndim - 1)), x.size // 4
    expected = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, atol=5e-6)
    np.testing.assert_allclose(new.mean, 0.1 * x.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(new.var, 0.9 + 0.1 * x.var(axes) * n / (n - 1), rtol=2e-6)


def test_running_statistics_are_used_and_stay():
    x = random((5, 4))
    y, new = batch_norm(x, None, None, RUNNING, use="running", epsilon=0.0)
    np.testing.assert_allclose(y, (x - np.array([1.0, 2, 3, 4])) / 2, rtol=1e-6)
    assert new is RUNNING


def test_splits_are_normalised_apart_and_the_running_statistics_pool_them():
    x = np.concatenate([random((8, 4)), random((8, 4), seed=1) * 5 + 10])
    y, new = training(x, decay=0.0, scope=Scope(splits=2))
    for rows in (slice(0, 8), slice(8, 16)):
        expected = (x[rows] - x[rows].mean(0)) / np.sqrt(x[rows].var(0) + 1e-5)
        np.testing.assert_allclose(y[rows], expected, atol=1e-5)
    np.testing.assert_allclose(new.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, x.var(0), rtol=1e-5)


def test_pool_adds_the_variance_of_the_means():
    sets = Stats(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [3.0]]))
    assert [float(v[0]) for v in pool(sets)] == [1.0, 3.0]  # 2 within + 1 between
    assert [float(v[0]) for v in pool(sets, jnp.array([[3.0], [1.0]]))] == [0.5, 2.25]


def test_statistics_in_the_dtype_of_the_input_only_where_it_is_asked_for():
    """In bfloat16 a mean of 1,000 values around 1 is off by percents."""
    x = (1 + 0.1 * random((1000, 4))).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = training(x, decay=0.0)[1]
    np.testing.assert_allclose(exact.var, wide.var(0), rtol=1e-5)
    coarse = training(x, decay=0.0, stat_dtype="input")[1]
    assert np.abs(np.asarray(coarse.var, np.float64) / wide.var(0) - 1).max() > 1e-4
    with pytest.raises(UserError, match="float32, input|input, float32"):
        training(x, stat_dtype="bfloat16")


def test_single_values_are_refused_in_training_only():
    for x, scope in ((np.ones((1, 4)), Scope()), (np.ones((4, 4)), Scope(splits=4))):
        with pytest.raises(UserError, match="one single value"):
            training(np.float32(x), scope=scope)
        with pytest.warns(UserWarning, match="one single value"):
            training(np.float32(x), scope=scope, on_single="warn")
        np.testing.assert_array_equal(training(np.float32(x), on_single="beta", scope=scope)[0], 0)
    batch_norm(jnp.ones((1, 4)), None, None, ZERO_ONE, use="running")
    training(random((1, 3, 3, 4)))  # nine values
    with pytest.raises(UserError, match="on_single"):
        training(random((8, 4)), on_single="ignore")


def test_sets_that_do_not_divide_the_examples_are_refused():
    with pytest.raises(UserError, match="6 examples on this device do not divide into 4 sets"):
        training(random((6, 4)), scope=Scope(splits=4))


def test_normalise_keeps_the_dtype_of_its_input():
    y = normalise(jnp.ones((2, 4), jnp.bfloat16), ZERO_ONE, jnp.ones(4), jnp.zeros(4), 0.0)
    assert y.dtype == jnp.bfloat16
    with pytest.raises(UserError, match="floating-point"):
        normalise(jnp.ones((2, 4), int), ZERO_ONE, None, None, 0.0)


# ---- Masks


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_masks_cover_leading_axes_or_all(axes):
    x = random((6, 5, 4)) + 1
    shape = (*(6, 5)[:axes], *(1,) * (axes == 3))
    mask = np.random.default_rng(0).random(shape) < 0.6
    counted = np.broadcast_to(mask.reshape(shape + (1,) * (3 - axes)), x.shape)[..., 0]
    y, new = training(x, mask=mask, decay=0.0)
    there = np.float64(x[counted])
    np.testing.assert_allclose(new.mean, there.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, there.var(0), rtol=1e-5)
    np.testing.assert_allclose(
        y[counted], (there - there.mean(0)) / np.sqrt(there.var(0) + 1e-5), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(5,), (6, 4), (6, 5, 3), (1, 5), (6, 5, 4, 1), ()])
def test_other_masks_are_refused(shape):
    with pytest.raises(UserError, match=r"mask of shape .* does not fit .*\(6, 5, 4\)"):
        training(random((6, 5, 4)), mask=np.ones(shape, bool))


def test_a_set_without_any_value_is_given_the_running_statistics_which_stay():
    """Nothing is NaN, neither the output nor the gradient (flax: all of it)."""
    x, nothing = random((6, 4)), np.zeros(6, bool)
    y, new = training(x, RUNNING, mask=nothing, epsilon=0.0)
    np.testing.assert_allclose(y, (x - np.array([1.0, 2, 3, 4])) / 2, rtol=1e-6)
    np.testing.assert_array_equal(new, RUNNING)
    gradient = jax.grad(lambda x: training(x, RUNNING, mask=nothing)[0].sum())(x)
    np.testing.assert_allclose(gradient, 0.5, rtol=1e-5)
    # One of two sets: the statistics of the whole batch are those of the other one.
    half = np.arange(6) < 3
    _, new = training(x, RUNNING, mask=half, scope=Scope(splits=2), decay=0.0)
    np.testing.assert_allclose(new.mean, x[:3].mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, x[:3].var(0), rtol=1e-5)


def test_a_mask_that_leaves_one_value_is_refused_or_nan():
    x, one = random((6, 4)), np.arange(6) == 2
    with pytest.raises(UserError, match="one single value"):
        training(x, mask=one)
    y, new = jax.jit(lambda mask: training(x, mask=mask))(one)  # only the program knows
    assert np.isnan(y).all() and np.isnan(new.var).all()


# ---- Averages

BATCHES = [random((6, 4), seed=s) * (1 + s) + s for s in range(5)]
DECAY, WINDOW = 0.7, 3


def weights_of(average):
    """The weight of the start and of each of the five batches."""
    steps = len(BATCHES)
    geometric = np.array([(1 - DECAY) * DECAY ** (steps - 1 - t) for t in range(steps)])
    return {
        "ema": (DECAY**steps, geometric),
        "debiased": (0, geometric / (1 - DECAY**steps)),
        "cumulative": (0, np.full(steps, 1 / steps)),
        "last": (0, np.array([0, 0, 1, 1, 1]) / WINDOW),
    }[average]


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("track", averages.TRACKS)
@pytest.mark.parametrize("average", averages.AVERAGES)
def test_averages_are_weighted_sums_over_the_batches(average, track, correction):
    chosen = dict(average=average, track=track, correction=correction, decay=DECAY)
    running = averages.start(4, chosen | {"window": WINDOW})
    for batch in BATCHES:
        running = training(batch, running, **chosen)[1]
    start, weights = weights_of(average)
    means = np.stack([np.float64(b).mean(0) for b in BATCHES])
    variances = np.stack([np.float64(b).var(0, ddof=correction) for b in BATCHES])
    mean = weights @ means
    if track == "variance":
        var = start + weights @ variances
    else:  # the start has mean 0 and second moment 1
        var = start + weights @ (variances + means**2) - mean**2
    np.testing.assert_allclose(running.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(running.var, var, rtol=1e-5)
    if average != "ema":
        assert float(running.updates) == len(BATCHES)


def test_second_moments_are_exact_where_batches_differ_from_each_other():
    """All batches alike make one population; a mean of variances misses what is between them."""
    population = np.float64(np.concatenate(BATCHES))
    between = np.stack([np.float64(b).mean(0) for b in BATCHES]).var(0)
    for track, wanted in (
        ("second_moment", population.var(0)),
        ("variance", population.var(0) - between),
    ):
        running = averages.start(4, {"average": "cumulative"})
        for batch in BATCHES:
            running = training(batch, running, average="cumulative", track=track)[1]
        np.testing.assert_allclose(running.mean, population.mean(0), rtol=1e-5)
        np.testing.assert_allclose(running.var, wanted, rtol=1e-5)


def test_second_moments_do_not_cancel():
    running = Stats(jnp.full(4, 1e4), jnp.ones(4))
    for seed in range(3):
        running = training(random((512, 4), seed) + 1e4, running, track="second_moment")[1]
    np.testing.assert_allclose(running.var, 1, rtol=0.1)


@pytest.mark.parametrize("average", averages.AVERAGES)
def test_batches_without_values_count_for_nothing(average):
    move = functools.partial(averages.update, decay=0.5, average=average)
    before = move(averages.start(4, {"average": average, "window": 2}), Stats(*BATCHES[0][:2]), 6)
    for count in (0, jnp.zeros(1), jnp.zeros(4)):
        after = move(before, Stats(*BATCHES[1][:2]), count)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
        jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("average", averages.AVERAGES)
def test_masks_count_by_feature_in_every_average(average):
    """A feature that a batch has no value of keeps its average, the others move on."""
    train = functools.partial(training, average=average, decay=0.5)
    start = averages.start(4, {"average": average, "window": 2})
    one = train(BATCHES[0], start)[1]
    both = train(BATCHES[1], one)[1]
    feature_2 = np.broadcast_to(np.arange(4) == 2, (6, 4))
    masked = train(BATCHES[0], start, mask=np.ones(6, bool))[1]
    masked = train(BATCHES[1], masked, mask=~feature_2)[1]
    assert jax.tree.map(jnp.shape, masked) == jax.tree.map(jnp.shape, start)
    for name in ("mean", "var"):
        wanted = np.where(feature_2[0], getattr(one, name), getattr(both, name))
        np.testing.assert_allclose(getattr(masked, name), wanted, rtol=1e-6)


def test_unknown_averages_and_tracks_are_refused():
    for wrong in (dict(average="mean"), dict(track="deviation")):
        with pytest.raises(UserError, match="choose one of"):
            training(random((6, 4)), **wrong)
    with pytest.raises(UserError, match="window=0"):
        averages.start(4, {"average": "last", "window": 0})
