"""What the comparisons with other libraries share: training steps of a kind of the table."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from norm_tools import assert_close

from bnresearch import norm
from bnresearch.norm import NORMS, Scope
from bnresearch.sites import standard

SHAPES = [(8, 6), (4, 5, 6), (3, 4, 5, 6), (2, 3, 4, 2, 6)]


class Step(NamedTuple):
    """One step's results, and the gradients of ``sum(weights * y)``."""

    y: Any
    running: Any
    dx: Any
    dparams: Any


def step(kind, given, x, weights, params=None, running=None, use="batch", mask=None):
    """A step of the kind with the options ``given``, preset and all."""
    if running is None and NORMS[kind].state is not None:
        running = NORMS[kind].state(x.shape[-1], standard(kind, given))
    run = _compiled(kind, tuple(given.items()), use)
    return jax.tree.map(np.asarray, run(x, weights, params or {}, running, mask))


@functools.cache
def _compiled(kind, given, use):
    options = standard(kind, dict(given))
    context = {"use": use, "scope": Scope(), "rng": None, "activates": False}

    def call(x, params, running, mask):
        given = context | {"mask": mask}
        return norm.apply(NORMS[kind], x, params, running, given, options)[:2]

    return with_gradients(call)


def with_gradients(call):
    """``(x, weights, params, state, mask) -> Step``, compiled, of a function ``call(x, params,
    state, mask) -> y, new state``."""

    def run(x, weights, params, state, mask=None):
        def loss(x, params):
            y, new = call(x, params, state, mask)
            return (y * weights).sum(), (y, new)

        (_, results), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
        return Step(*results, *gradients)

    return jax.jit(run)


def draw(shape, seed=0, offset=0.7, spread=1.6):
    """Input and weights of the loss: float32, ``[batch, ..., features]``."""
    rng = np.random.default_rng(seed)
    x = offset + spread * rng.normal(size=shape)
    return x.astype(np.float32), rng.normal(size=shape).astype(np.float32)


def draw_params(features, seed=9, names=("scale", "bias")):
    rng = np.random.default_rng(seed)
    start = {"scale": 1.0, "bias": 0.0}
    return {n: (start[n] + 0.4 * rng.normal(size=features)).astype(np.float32) for n in names}


def draw_mask(shape, seed=4):
    """About two thirds of the examples or positions, ``shape[:-1]``, two of each example at least
    where there are positions."""
    mask = np.random.default_rng(seed).random(shape[:-1]) < 0.66
    mask[:2] = True
    mask.reshape(shape[0], -1)[:, :2] = True
    if len(shape) == 2:
        mask[2:4] = False
    return mask


def close(actual, wanted, tolerance):
    """Trees within ``tolerance``, relative to the largest value of each leaf; None matches None."""
    assert_close(jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, wanted), tolerance)


def compare(ours, wanted):
    """Steps equal up to the rounding of float32."""
    close((ours.y, ours.running), (wanted.y, wanted.running), 1e-6)
    close((ours.dx, ours.dparams), (wanted.dx, wanted.dparams), 3e-6)
