"""Kinds with moving averages in the backward pass, against float64 numpy that goes step by step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norm_tools import assert_close, moved_backward, random

from bnresearch.errors import UserError
from bnresearch.kinds import backward, online
from bnresearch.sets import Scope

SCALE, BIAS = np.array([1.0, -2.0, 3.0, 0.5]), np.array([0.0, 0.5, -1.0, 2.0])
SHAPES = [(6, 4), (6, 3, 4), (6, 2, 2, 4)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


class Out(NamedTuple):
    """One training step: output, state after both passes, gradients of ``sum(y * weights)``."""

    y: Any
    state: Any
    dx: Any
    dscale: Any


@partial(jax.jit, static_argnums=0)
def step(function, x, weights, state, mask=None):
    def loss_of(x, scale, state):
        y, new = function(x, scale, jnp.asarray(BIAS, x.dtype), state, use="batch", mask=mask)
        return (y * weights).sum(), (y, new)

    gradient = jax.grad(loss_of, (0, 1, 2), has_aux=True)
    (*gradients, cotangent), (y, new) = gradient(x, jnp.asarray(SCALE, x.dtype), state)
    return Out(y, moved_backward(new, cotangent), *gradients)


def batches(shape, count):
    """Inputs whose scale and mean change, and the gradients that arrive; rounded to float32."""
    for seed in range(count):
        x = random(shape, seed) * (1 + seed % 3) + 0.3 * seed
        yield np.float64(x), np.float64(random(shape, 100 + seed))


def follow(function, options, start, reference, shape, tolerance=3e-6):
    """The kind and the reference, step after step; the last state of the kind, and input.

    The reference gives back y, dx and what dscale is the sum of. It fills ``kept``, which is the
    state by name, and ``past``, its own memory.
    """
    function, state, kept, past = partial(function, **options), start, {}, {}
    for x, weights in batches(shape, 7):
        out = step(function, np.float32(x), np.float32(weights), state)
        y, dx, dscale = reference(x, weights, kept, past, **options)
        wanted = Out(y, None, dx, dscale.reshape(-1, 4).sum(0))
        assert_close(out._replace(state=None), wanted, tolerance)
        for name, value in kept.items():
            assert_close(getattr(out.state, name), value, tolerance)
        state = out.state
    return state, np.float32(x)


def mean(values):
    return values.mean(tuple(range(values.ndim - 1)))


# ---- Moving averages in both passes


def mabn_step(x, dy, kept, past, window, decay, epsilon, warm_up, r_max, r_after):
    """With the past as lists, newest last."""
    squares, products = past.setdefault("squares", []), past.setdefault("products", [])
    running, t = kept.get("square", np.ones(4)), kept.get("updates", 0)
    newest = slice(-window if t >= max(window - 1, warm_up) else -1, None)
    squares.append(mean(x**2))
    square = np.mean(squares[newest], 0)
    s = np.sqrt(square + epsilon)
    r = s / np.sqrt(running + epsilon)
    r = np.clip(r, 1 / r_max, r_max) if t >= max(r_after, warm_up) else 1
    z, g = x / s, dy * SCALE * r
    products.append(mean(g * z))
    kept |= {"square": decay * running + (1 - decay) * square, "updates": t + 1}
    dx = (g - z * np.mean(products[newest], 0)) / s
    return z * r * SCALE + BIAS, dx, dy * z * r


MABN = dict(window=3, decay=0.7, epsilon=0.01, warm_up=1, r_max=1.3, r_after=4)


@every_shape
@pytest.mark.parametrize("warm_up", [0, 4])
def test_mabn_step_by_step(shape, warm_up):
    options = MABN | dict(warm_up=warm_up)
    start = backward.mabn_start(4, options)
    state, x = follow(backward.moving_average_norm, options, start, mabn_step, shape)
    y, same = backward.moving_average_norm(x, None, None, state, use="running", **options)
    assert_close(y, x / np.sqrt(state.square + 0.01), 1e-6)
    assert same is state


def power_step(x, dy, kept, past, decay, backward_decay, epsilon, groups, warm_up):
    cut = x.reshape(*x.shape[:-1], groups, -1)
    root = np.sqrt((cut**2).mean(-1, keepdims=True) + epsilon)
    root = np.broadcast_to(root, cut.shape).reshape(x.shape)
    running, t = kept.get("square", np.ones(4)), kept.get("updates", 0)
    nu = kept.get("backward_product", np.zeros(4))
    scaled = x / root
    psi = np.sqrt((mean(scaled**2) if t < warm_up else running) + epsilon)
    z, g = scaled / psi, dy * SCALE
    product = mean(g * z)
    d = (g - z * (product if t < warm_up else nu)) / psi
    inner = (d * scaled).reshape(cut.shape).mean(-1, keepdims=True)
    dx = (d - scaled * np.broadcast_to(inner, cut.shape).reshape(x.shape)) / root
    kept |= {
        "square": decay * running + (1 - decay) * mean(scaled**2),
        "updates": t + 1,
        "backward_product": nu + (1 - backward_decay) * (product - nu * mean(z**2)),
    }
    return z * SCALE + BIAS, dx, dy * z


POWER = dict(decay=0.8, backward_decay=0.7, epsilon=0.01, groups=2, warm_up=3)


@every_shape
def test_power_step_by_step(shape):
    start = backward.power_start(4, POWER)
    state, x = follow(backward.power_norm, POWER, start, power_step, shape)
    y, same = backward.power_norm(x, None, None, state, use="running", **POWER)
    cut = x.reshape(*x.shape[:-1], 2, 2)
    scaled = cut / np.sqrt((cut**2).mean(-1, keepdims=True) + 0.01)
    assert_close(y, scaled.reshape(x.shape) / np.sqrt(state.square + 0.01), 1e-6)
    assert same is state
    unscaled = backward.power_norm(x, None, None, state, use="running", **POWER | dict(groups=0))[0]
    assert_close(unscaled, x / np.sqrt(state.square + 0.01), 1e-6)


@pytest.mark.parametrize(
    ("function", "start"),
    [
        (backward.moving_average_norm, backward.mabn_start),
        (partial(backward.power_norm, groups=0), backward.power_start),
    ],
)
def test_the_gradient_of_the_warm_up_is_the_derivative(function, start):
    x, weights = (jnp.asarray(random(seed=seed)) for seed in (1, 2))

    def exact(x):
        return (x / jnp.sqrt(jnp.square(x).mean((0, 1)) + 1e-5) * SCALE * weights).sum()

    out = step(function, x, weights, start(4, dict(window=16)))
    assert_close(out.dx, jax.grad(exact)(x), 2e-6)


@pytest.mark.parametrize(
    ("function", "state"),
    [
        (backward.moving_average_norm, backward.mabn_start(4, dict(window=3))),
        (backward.power_norm, backward.power_start(4, {})),
    ],
)
def test_one_single_value_is_refused_unless_it_is_wanted(function, state):
    x = jnp.ones((1, 4))
    with pytest.raises(UserError, match="on_single=warn"):
        function(x, None, None, state, use="batch")
    # After the warm-up the past makes a value of it.
    settings = dict(use="batch", on_single="beta", warm_up=0)
    late = state._replace(square=jnp.full(4, 4.0), updates=jnp.float32(9))
    late = late._replace(**{n: jnp.full((2, 4), 4.0) for n in late._fields if n == "recent_square"})
    y = function(2 * x, None, None, late, **settings)[0]
    assert np.abs(y).max() < 1
    masked = jax.jit(
        lambda mask: function(jnp.ones((2, 4)), None, None, state, use="batch", mask=mask)[0]
    )
    assert np.isnan(masked(np.array([True, False]))).all()
    assert not np.isnan(masked(np.array([True, True]))).any()


def online_step(x, dy, kept, past, decay, backward_decay, epsilon, guard, clamp):
    """One example after the other, each with its positions."""
    m, var = kept.get("mean", np.zeros(4)), kept.get("var", np.ones(4))
    u, v = kept.get("backward_ones", np.zeros(4)), kept.get("backward_output", np.zeros(4))
    rate, ys, dxs, dscales = 1 - backward_decay, [], [], []
    for example, g in zip(x.reshape(len(x), -1, 4), dy.reshape(len(x), -1, 4), strict=True):
        s = np.sqrt(var + epsilon)
        z = (example - m) / s
        var = decay * var + (1 - decay) * (example.var(0) + decay * (example.mean(0) - m) ** 2)
        m = decay * m + (1 - decay) * example.mean(0)
        y = z * SCALE + BIAS
        if guard == "clamp":
            g, y = g * (np.abs(y) < clamp), np.clip(y, -clamp, clamp)
        if guard == "layer":
            root = np.sqrt((y**2).mean() + epsilon)
            g, y = (g - y * (g * y).mean() / root**2) / root, y / root
        ys.append(y)
        dscales.append(g * z)
        g = g * SCALE - rate * v * z
        v = v + (g * z).mean(0)
        dxs.append(g / s - rate * u)
        u = u + dxs[-1].mean(0)
    kept |= {"mean": m, "var": var, "backward_ones": u, "backward_output": v}
    return tuple(np.reshape(part, x.shape) for part in (ys, dxs, dscales))


ONLINE = dict(decay=0.75, backward_decay=0.8, epsilon=0.01, guard="none", clamp=4.0)


@every_shape
@pytest.mark.parametrize("guard", online.GUARDS)
def test_online_step_by_step(shape, guard):
    options = ONLINE | dict(guard=guard)
    start = online.online_start(4, options)
    state, x = follow(online.online_norm, options, start, online_step, shape, 1e-5)
    y, same = online.online_norm(x, None, None, state, use="running", **ONLINE)
    assert_close(y, (x - state.mean) / np.sqrt(state.var + 0.01), 1e-6)
    assert same is state


def test_online_skips_what_a_mask_leaves_out():
    mask = np.ones((6, 3, 1), bool)
    mask[2], mask[4, 1:] = False, False
    start = online.online_start(4, ONLINE)
    x, weights = random((6, 3, 4)), random((6, 3, 4), 1) * mask
    function = partial(online.online_norm, **ONLINE)
    out = step(function, x, weights, start, mask)
    first = np.array([0, 1, 3])
    rest = step(function, x[first], weights[first], start)
    assert_close(out.y[first], rest.y, 1e-6)
    last = step(function, x[4:5, :1], weights[4:5, :1], rest.state)
    assert_close((out.y[4, 0], out.dx[4, 0]), (last.y[0, 0], last.dx[0, 0]), 1e-5)
    assert_close(step(function, x[5:], weights[5:], last.state).state, out.state, 1e-5)
    assert not np.asarray(out.dx)[~np.broadcast_to(mask, x.shape)].any()


@pytest.mark.parametrize("scope", [Scope(splits=2), Scope(merge="a"), Scope(pool=("a", "b"))])
def test_online_knows_one_sequence_only(scope):
    start = online.online_start(4, ONLINE)
    with pytest.raises(UserError, match="norm.scope=global with parallel.mode=jit"):
        online.online_norm(random(), None, None, start, use="batch", scope=scope)
