"""The batch family against float64 numpy that works set by set, with running statistics by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds_tools import (
    AFFINE,
    BIAS,
    DECAY,
    EPSILON,
    KINDS,
    MEAN,
    RUNNING,
    SCALE,
    VAR,
    assert_all_close,
    assert_close,
    call,
    expected,
    random,
)

from bnresearch.errors import UserError
from bnresearch.kinds import ablations, variants
from bnresearch.kinds.batch import batch_norm
from bnresearch.sets import Scope, Stats

SHAPES = [(8, 4), (8, 3, 4), (8, 2, 1, 3, 4)]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_running_statistics_equal_float64(kind, shape, splits, masked):
    x = np.float32(random(shape))
    mask = np.ones(shape[:-1] if masked else shape[:1], bool)
    if masked:
        mask[[1, 2, 6]] = False
    y, new = call(kind, x, scope=Scope(splits=splits), mask=mask if masked else None)
    counted = mask.reshape(mask.shape + (1,) * (x.ndim - 1 - mask.ndim)) & np.ones(shape[:-1], bool)
    wanted, running = expected(kind, x.astype(np.float64), counted, splits)
    assert_close(y, wanted)
    assert_close(new.mean, running.mean)
    assert_close(new.var, running.var)
    assert y.dtype == x.dtype and new.var.dtype == np.float32


@every_kind
def test_inference_uses_the_running_statistics_and_leaves_them(kind):
    x = np.float32(random((5, 3, 4)))
    y, new = call(kind, x, use="running")
    z = x.astype(np.float64)
    wanted = (
        (z - MEAN) / np.sqrt(VAR + EPSILON) if kind == "renorm" else KINDS[kind][2](z, MEAN, VAR)
    )
    assert_close(y, wanted * SCALE + BIAS)
    assert_all_close(new[:2], tuple(RUNNING), 0)


@every_kind
def test_half_precision_is_rounded_at_the_end_only(kind):
    x = jnp.asarray(random((64, 3, 4)) + 3, jnp.bfloat16)
    for use in ("batch", "running"):
        y, _ = call(kind, x, use=use)
        wide, _ = call(kind, x.astype(jnp.float32), use=use)
        np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def gradient(function, x, weights):
    return jax.grad(lambda x: (function(x)[0] * weights).sum())(x)


@every_kind
def test_gradients_equal_differences(kind):
    if kind == "stop_gradient":
        pytest.skip("no gradient of its values, see below")
    x, weights, direction = (random((8, 3, 4), seed) for seed in range(3))
    with jax.enable_x64(True):
        exact = gradient(partial(call, kind), x, weights)
        if kind == "renorm":  # r and d are held
            function = renorm_held(x)
        else:
            function = lambda x: call(kind, x)[0]  # noqa: E731
        h = 1e-6
        slope = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
        assert float((slope * weights).sum()) == pytest.approx(
            float((exact * direction).sum()), rel=1e-6
        )
    assert_close(gradient(partial(call, kind), np.float32(x), np.float32(weights)), exact, 1e-5)


def renorm_held(x):
    axes = tuple(range(x.ndim - 1))
    s, rs = np.sqrt(x.var(axes) + EPSILON), np.sqrt(VAR + EPSILON)
    r = np.clip(s / rs, 1 / 1.1, 1.1)
    d = np.clip((x.mean(axes) - MEAN) / rs, -0.2, 0.2)
    return lambda x: ((x - x.mean(axes)) / np.sqrt(x.var(axes) + EPSILON) * r + d) * SCALE + BIAS


def test_stop_gradient_multiplies_the_gradient_by_scale_over_deviation():
    x, weights = np.float32(random((8, 3, 4))), np.float32(random((8, 3, 4), 1))
    wanted = SCALE / np.sqrt(x.astype(np.float64).var((0, 1)) + EPSILON) * weights
    assert_close(gradient(partial(call, "stop_gradient"), x, weights), wanted)


def test_l2_is_batch_norm_and_a_constant_feature_keeps_its_gradient_finite():
    x, weights = np.float32(random((8, 3, 4))), np.float32(random((8, 3, 4), 1))
    x[..., 0] = 2
    arguments = dict(**AFFINE, running=RUNNING, use="batch")
    assert_all_close(ablations.lp_norm(x, p=2.0, **arguments), batch_norm(x, **arguments), 1e-6)
    wanted = gradient(partial(batch_norm, **arguments), x, weights)
    assert_close(gradient(partial(ablations.lp_norm, p=2.0, **arguments), x, weights), wanted, 1e-5)
    for p in (1.0, 3.0):
        new = gradient(partial(ablations.lp_norm, p=p, **arguments), x, weights)
        assert np.isfinite(new).all()


@pytest.mark.parametrize("p", [1.0, 1.5, 4.0, 12.0])
def test_lp_deviation_of_a_gaussian_is_its_standard_deviation(p):
    x = np.float32(np.random.default_rng(0).normal(size=(200_000, 1)) * 1e4)
    unit = Stats(jnp.zeros(1), jnp.ones(1))
    y, new = ablations.lp_norm(x, None, None, unit, use="batch", p=p, decay=0.0)
    assert float(y.std()) == pytest.approx(1, rel=0.05 if p > 4 else 0.01)
    assert float(new.var[0]) == pytest.approx(1e8, rel=0.1 if p > 4 else 0.02)
    traced = jax.jit(lambda p: ablations.lp_norm(x, None, None, unit, use="batch", p=p)[0])
    assert_close(traced(p), y, 1e-5)


def test_mean_only_is_centring_without_scale():
    x = np.float32(random((8, 3, 4)))
    y, new = ablations.mean_only_norm(x, AFFINE["bias"], RUNNING, use="batch")
    assert_close(y, x - x.mean((0, 1)) + BIAS)
    assert_close(new.mean, DECAY * MEAN + 0.1 * x.mean((0, 1)))


# Ghost batch norm.


def ghost(x, **changes):
    return variants.ghost_norm(x, **AFFINE, running=RUNNING, **{"use": "batch", **changes})


def test_ghosts_are_normalised_apart_and_the_running_statistics_see_the_batch():
    x = np.float32(random((8, 3, 4)) + np.arange(8)[:, None, None])
    y, new = ghost(x, size=2, correction=1)
    for rows in np.split(np.arange(8), 4):
        part = x[rows].astype(np.float64)
        wanted = (part - part.mean((0, 1))) / np.sqrt(part.var((0, 1)) + EPSILON)
        assert_close(y[rows], wanted * SCALE + BIAS)
    assert_close(new.mean, DECAY * MEAN + 0.1 * x.mean((0, 1)))
    assert_close(new.var, DECAY * VAR + 0.1 * x.reshape(-1, 4).var(0, ddof=1))
    assert_all_close(ghost(x, size=2, scope=Scope(splits=2), correction=1), (y, new), 0)
    assert_all_close(ghost(x, size=8), batch_norm(x, **AFFINE, running=RUNNING, use="batch"), 0)
    ghost(x[:5], size=2, use="running")


@pytest.mark.parametrize(("size", "splits"), [(3, 1), (16, 1), (0, 1), (8, 2)])
def test_ghosts_that_do_not_divide_are_refused(size, splits):
    with pytest.raises(
        UserError, match=rf"norm.ghost.size={size} does not divide the {8 // splits}"
    ):
        ghost(np.ones((8, 3, 4), np.float32), size=size, scope=Scope(splits=splits))


# Batch renormalization.


@pytest.mark.parametrize(
    ("updates", "r_limit", "d_limit"),
    [
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (10**6, 3, 5),
    ],
)
def test_renorm_limits_follow_the_paper(updates, r_limit, d_limit):
    limits = variants.renorm_limits(jnp.float32(updates), 3.0, 5.0, 5000, 40000, 25000)
    assert [float(limit) for limit in limits] == pytest.approx([r_limit, d_limit])


def test_renorm_is_batch_norm_while_it_warms_up_then_clips_and_counts():
    x = np.float32(random((8, 4)))
    state = variants.renorm_state(4, {})
    for step in range(4):
        y, state = variants.batch_renorm(
            x, None, None, state, use="batch", warm_up=2, r_ramp=4, d_ramp=3, r_max=1.5, d_max=0.5
        )
        plain, _ = batch_norm(x, None, None, Stats(*state[:2]), use="batch")
        assert float(state.updates) == step + 1
        assert np.allclose(y, plain, atol=1e-6) == (step <= 2)
    unlimited = dict(r_max=np.inf, d_max=np.inf, warm_up=0, r_ramp=0, d_ramp=0)
    y, _ = variants.batch_renorm(x, None, None, state, use="batch", **unlimited)
    assert_close(y, variants.batch_renorm(x, None, None, state, use="running")[0], 1e-5)


def test_renorm_update_without_values_or_decay():
    state = variants.Renormed(*RUNNING, jnp.float32(3))
    batch = Stats(jnp.float32(VAR), jnp.float32(MEAN + 1))
    update = partial(variants.renorm_update, state, batch, epsilon=EPSILON)
    assert_all_close(update(0, decay=0.5), state, 0)
    assert_all_close(update(2, decay=0.0), variants.Renormed(*batch, jnp.float32(4)), 1e-6)
    assert_all_close(update(jnp.array([2.0]), decay=0.5), update(2, decay=0.5), 0)


# Frozen, regularized, noisy.


@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_statistics_and_affine_are_two_switches(trainable):
    x, weights = np.float32(random((1, 3, 4))), np.float32(random((1, 3, 4), 1))

    def loss(affine, x):
        y, new = variants.frozen_norm(x, **affine, running=RUNNING, trainable=trainable)
        assert new is RUNNING
        return (y * weights).sum(), y

    (affine, dx), y = jax.grad(loss, (0, 1), has_aux=True)(AFFINE, x)
    normalised = (x - MEAN) / np.sqrt(VAR + EPSILON)
    assert_close(y, normalised * SCALE + BIAS)
    assert_close(dx, weights * SCALE / np.sqrt(VAR + EPSILON))
    assert_close(affine["scale"], trainable * (weights * normalised).sum((0, 1)))
    assert_close(affine["bias"], trainable * weights.sum((0, 1)))


@pytest.mark.parametrize("splits", [1, 2])
def test_penalty_is_the_distance_of_batch_and_running_statistics(splits):
    x = random((8, 3, 4))

    def penalty(x, **changes):
        options = dict(mean_penalty=0.3, std_penalty=2.0, scope=Scope(splits=splits), use="batch")
        return variants.regularized_norm(x, **AFFINE, running=RUNNING, **(options | changes))[2]

    def wanted(x):
        parts = x.reshape(splits, -1, 4)
        shift = parts.mean(1) - MEAN
        stretch = np.sqrt(parts.var(1) + EPSILON) - np.sqrt(VAR + EPSILON)
        return (0.3 * shift**2 + 2 * stretch**2).mean(0).sum()

    assert_close(penalty(np.float32(x)), wanted(x))
    assert penalty(np.float32(x), use="running") == 0
    direction, h = random((8, 3, 4), 1), 1e-6
    slope = (wanted(x + h * direction) - wanted(x - h * direction)) / (2 * h)
    assert (jax.grad(penalty)(np.float32(x)) * direction).sum() == pytest.approx(slope, rel=1e-4)


def test_noise_is_drawn_as_documented():
    x, key = np.float32(random((20_000, 4))), jax.random.key(1)
    call = partial(ablations.noisy_norm, x, None, None, RUNNING, use="batch", rng=key)
    plain, new = batch_norm(x, None, None, RUNNING, use="batch")
    off = dict(shift=0.0, stretch=1.0, shift_jitter=0.0, stretch_jitter=0.0)
    assert_all_close(call(**off), (plain, new), 0)

    def fit(y):  # y = a * plain + b with residuals
        a = (y * plain).mean(0) / (plain**2).mean(0)
        b = y.mean(0)
        return a, b, y - a * plain - b

    y, moved = call(shift_jitter=0.0, stretch_jitter=0.0)
    a, b, rest = fit(np.asarray(y, np.float64))
    assert ((a >= 1) & (a <= 1.25)).all() and (np.abs(b) <= 0.5).all() and len(set(b)) == 4
    assert np.abs(rest).max() < 1e-5
    assert_all_close(moved, new, 0)
    shifted, _ = call(stretch_jitter=0.0)
    jitter = np.asarray(shifted - y, np.float64)
    assert np.abs(jitter).max() <= 0.1 + 1e-6
    np.testing.assert_allclose(jitter.std(0), 0.1 / np.sqrt(3), rtol=0.02)
    stretched, _ = call(shift_jitter=0.0)
    np.testing.assert_allclose(np.asarray((stretched - y) / plain).std(0), 0.1, rtol=0.02)
    other, _ = call(rng=jax.random.key(2))
    assert not np.allclose(fit(np.asarray(other))[1], b, atol=0.01)


def test_noise_at_inference_is_its_mean():
    x = np.float32(random((5, 4)))
    y, new = ablations.noisy_norm(x, **AFFINE, running=RUNNING, use="running", stretch=1.5)
    plain, _ = batch_norm(x, **AFFINE, running=RUNNING, use="running")
    assert_close(y, 1.25 * plain)
    assert new is RUNNING


@every_kind
def test_one_single_value_is_refused(kind):
    with pytest.raises(UserError, match="one single value"):
        call(kind, np.ones((1, 4), np.float32))
    call(kind, np.ones((1, 4), np.float32), on_single="beta")
    with pytest.raises(UserError, match="floating-point"):
        call(kind, np.ones((8, 4), np.int32))
    with pytest.raises(UserError, match="floating-point"):
        call(kind, np.ones((8, 4), np.int32), use="running")
