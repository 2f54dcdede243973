"""Whitening norms against float64 numpy, and what whitening is by definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norm_tools import assert_close, random

from bnresearch.errors import UserError
from bnresearch.kinds import whitening
from bnresearch.kinds.batch import batch_norm
from bnresearch.parallel import MODES, make_layout
from bnresearch.sets import Scope, Stats

FEATURES, SIZE = 6, 3
SHAPES = [(40, 6), (10, 4, 6), (5, 2, 4, 6)]
SCALE, BIAS = np.linspace(-2, 3, 6), np.linspace(1, -1, 6)
EPSILON = 0.01

KINDS = {
    "zca": partial(whitening.decorrelated_norm, features_per_group=SIZE),
    "pca": partial(
        whitening.decorrelated_norm, features_per_group=SIZE, method="pca", track="covariance"
    ),
    "iterative": partial(whitening.iterative_norm, features_per_group=SIZE),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def correlated(shape=SHAPES[1], seed=0):
    return (random(shape, seed) @ random((6, 6), 99) + 3 * random((6,), 98)).astype(np.float32)


def start(size=SIZE):
    return whitening.whitening_start(FEATURES, dict(features_per_group=size))


def call(kind, x, running=None, **changes):
    running = start() if running is None else running
    return KINDS[kind](jnp.asarray(x), None, None, running, **dict(use="batch") | changes)


def moments(x):
    """Mean, and covariances ``[groups, size, size]``, in float64."""
    rows = np.float64(x).reshape(-1, FEATURES)
    groups = np.split(rows - rows.mean(0), FEATURES // SIZE, axis=1)
    return rows.mean(0), np.stack([group.T @ group / len(rows) for group in groups])


def matrix_of(kind, covariance, epsilon=EPSILON):
    covariance = covariance + epsilon * np.eye(len(covariance))
    if kind == "iterative":
        root = np.eye(len(covariance))
        for _ in range(5):
            root = 1.5 * root - 0.5 * root @ root @ root @ covariance / np.trace(covariance)
        return root / np.sqrt(np.trace(covariance))
    values, vectors = np.linalg.eigh(covariance)
    if kind == "zca":
        return vectors @ np.diag(values**-0.5) @ vectors.T
    rows = (vectors * values**-0.5).T[::-1]
    return rows * np.sign(np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1))


def whitened(x, mean, matrices):
    rows = np.split(np.float64(x).reshape(-1, FEATURES) - mean, FEATURES // SIZE, axis=1)
    parts = [group @ matrix.T for group, matrix in zip(rows, matrices, strict=True)]
    return np.concatenate(parts, axis=1).reshape(x.shape)


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_running_statistics(kind, shape):
    track = "covariance" if kind == "pca" else "whitening"
    running, wanted = start(), [np.zeros(FEATURES), np.stack([np.eye(SIZE)] * 2)]
    function = jax.jit(partial(KINDS[kind], use="batch", decay=0.8, epsilon=EPSILON))
    for seed in range(3):
        x = correlated(shape, seed)
        y, running = function(x, SCALE, BIAS, running)
        mean, covariances = moments(x)
        matrices = np.stack([matrix_of(kind, c) for c in covariances])
        assert_close(y, whitened(x, mean, matrices) * SCALE + BIAS, 5e-6)
        tracked = covariances if track == "covariance" else matrices
        wanted = [0.8 * w + 0.2 * new for w, new in zip(wanted, (mean, tracked), strict=True)]
        assert_close(tuple(running), tuple(wanted), 5e-6)
    y, same = call(kind, x, running, use="running", epsilon=EPSILON)
    matrices = wanted[1]
    if track == "covariance":
        matrices = np.stack([matrix_of(kind, c) for c in matrices])
    assert_close(y, whitened(x, wanted[0], matrices), 5e-6)
    assert same is running


@pytest.mark.parametrize("kind", ["zca", "pca"])
@pytest.mark.parametrize("case", ["plain", "offset", "splits", "mask"])
def test_the_output_has_the_identity_as_covariance(kind, case):
    x, keep, options = correlated((64, 4, 6)), np.ones((64, 4), bool), dict(epsilon=1e-9)
    tolerance = 1e-4
    if case == "offset":
        x, tolerance = x + np.float32(1e4), 2e-2  # what rounding has left of the input
    if case == "splits":
        options["scope"] = Scope(splits=2)
    if case == "mask":
        keep = random((64, 4), 1) > 0
        options["mask"], x[~keep] = keep, 1e3
    y = np.asarray(call(kind, x, **options)[0])
    for half in np.split(np.arange(64), 2 if case == "splits" else 1):
        mean, covariances = moments(y[half][keep[half]])
        assert np.abs(mean).max() < tolerance
        assert_close(covariances, np.stack([np.eye(SIZE)] * 2), tolerance)


def test_corner_cases():
    """One feature per group is batch norm, many iterations are zca, white data stay as they are."""
    x, stats = jnp.asarray(correlated()), Stats(jnp.zeros(6), jnp.ones(6))
    wanted, _ = batch_norm(x, SCALE, BIAS, stats, use="batch")
    for function in (whitening.decorrelated_norm, whitening.iterative_norm):
        y, _ = function(x, SCALE, BIAS, start(1), use="batch", features_per_group=1)
        assert_close(y, wanted, 2e-6)
    root, _ = call("iterative", x, iterations=30, epsilon=EPSILON)
    exact, _ = call("zca", x, epsilon=EPSILON)
    assert_close(root, exact, 1e-5)
    assert_close(call("zca", exact, epsilon=0.0)[0], exact, 2e-2)  # EPSILON away from white
    everything = whitening.decorrelated_norm(
        x, None, None, start(6), use="batch", features_per_group=64, epsilon=1e-7
    )[0]
    covariance = np.cov(np.float64(everything).reshape(-1, 6).T, bias=True)
    assert_close(covariance, np.eye(6), 1e-4)


@every_kind
def test_gradients_are_the_derivatives(kind):
    with jax.enable_x64(True):
        x, weights = np.float64(correlated()), np.float64(random(SHAPES[1], 5))
        running = jax.tree.map(lambda a: a.astype(jnp.float64), start())

        def loss_of(x):
            return (jnp.sin(call(kind, x, running)[0]) * weights).sum()

        direction = np.float64(random(x.shape, 6))
        found = float((jax.grad(loss_of)(x) * direction).sum())
        ends = [float(loss_of(x + sign * 1e-6 * direction)) for sign in (1, -1)]
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, 1e-6)


@pytest.mark.parametrize("kind", ["zca", "iterative"])
def test_equal_eigenvalues_do_not_harm_the_gradient(kind):
    """White data, whose eigenvectors are arbitrary."""
    with jax.enable_x64(True):
        base = np.linalg.qr(np.float64(random((40, 7))))[0]
        x = base[:, :6] - base[:, :6].mean(0)
        x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / 40)).T
        assert_close(x.T @ x / 40, np.eye(6), 1e-12)
        running = jax.tree.map(lambda a: a.astype(jnp.float64), start())
        weights, direction = (np.float64(random(x.shape, seed)) for seed in (7, 8))

        def loss_of(x):
            return (jnp.sin(call(kind, x, running)[0]) * weights).sum()

        found = float((jax.grad(loss_of)(x) * direction).sum())
        ends = [float(loss_of(x + sign * 1e-6 * direction)) for sign in (1, -1)]
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, 1e-6)
    assert np.isfinite(jax.grad(lambda x: call("pca", x)[0].sum())(np.float32(x))).all()


@every_kind
def test_sets_without_values_take_the_running_statistics(kind):
    _, running = call(kind, correlated())
    x, mask = correlated((6, 4, 6), 1), np.zeros((6, 4), bool)
    mask[:3] = True
    y, new = call(kind, x, running, mask=mask, scope=Scope(splits=2))
    alone, moved = call(kind, x[:3], running)
    assert_close(y[:3], alone, 2e-6)
    assert_close(tuple(new), tuple(moved), 2e-6)
    assert_close(y[3:], call(kind, x[3:], running, use="running")[0], 2e-6)
    _, still = call(kind, x, running, mask=np.zeros((6, 4), bool))
    assert_close(tuple(still), tuple(running), 1e-6)


def test_the_tracked_covariance_is_that_of_the_whole_batch():
    x = correlated((8, 4, 6))
    x[4:] = 2 * x[4:] + 5
    _, ghost = call("pca", x, scope=Scope(splits=2), decay=0.0)
    assert_close(tuple(ghost), moments(x), 2e-6)


@pytest.mark.parametrize("mode", MODES)
@every_kind
def test_covariances_merge_over_devices(kind, mode):
    layout = make_layout(mode, "group:4", 8, 16)
    axes = {"jit": None, "shard_map": ("group", "replica"), "pmap": "device"}[mode]
    x, weights = correlated((16, 4, 6)), random((16, 4, 6), 5)
    x[8:] = 2 * x[8:] + 1

    def run(running, feed, numbers, count):
        rows = layout.rows()

        def loss_of(shift):
            y, new = call(kind, feed["x"][rows] + shift[rows], running, scope=layout.scope)
            return layout.mean_loss((y * feed["weights"][rows]).mean()), (y, new)

        shift = jnp.zeros((16, 4, 6))
        dx, (y, new) = jax.grad(loss_of, has_aux=True)(shift)
        y = shift.at[rows].set(y)
        y = y if axes is None else jax.lax.psum(y, axes)
        return y, layout.mean_over_devices(dx), tuple(new)

    step = layout.compile(run, sharded_feed=False, donate=False)
    feed = layout.put({"x": x, "weights": weights})
    y, dx, new = layout.get(step(layout.put(start()), feed, {}, jnp.int32(1)))
    halves = [slice(0, 8), slice(8, 16)]
    assert_close(y, np.concatenate([call(kind, x[half])[0] for half in halves]), 1e-5)
    exact = [
        jax.grad(lambda x, w: (call(kind, x)[0] * w).sum())(x[half], weights[half])
        for half in halves
    ]
    assert_close(dx * x.size, np.concatenate(exact), 1e-4)
    assert_close(new, tuple(call(kind, x, scope=Scope(splits=2))[1]), 1e-5)


def test_refusals():
    with pytest.raises(
        UserError, match=r"features_per_group=4 of a whitening norm on 6 features.*1, 2, 3, 6"
    ):
        whitening.whitening_start(6, dict(features_per_group=4))
    with pytest.raises(UserError, match="track=covariance"):
        whitening.decorrelated_norm(
            correlated(), None, None, start(), use="batch", method="pca", features_per_group=SIZE
        )
    with pytest.raises(UserError, match="method"):
        call("zca", correlated(), method="cholesky")
    with pytest.raises(UserError, match="track"):
        call("zca", correlated(), track="both")
    with pytest.raises(UserError, match="one per feature"):
        call("zca", correlated(), mask=np.ones(SHAPES[1], bool))
    with pytest.raises(UserError, match="single value"):
        call("zca", correlated((1, 6)))
