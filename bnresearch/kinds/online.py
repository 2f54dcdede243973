"""Online normalization: one example after the other, in the forward and in the backward pass."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError, lookup
from bnresearch.kinds.batch import affine, normalise
from bnresearch.kinds.within import mean_square, prepared
from bnresearch.sets import Scope, Stats, masked_mean

GUARDS = ("clamp", "layer", "none")


class Online(NamedTuple):
    """State of `online_norm`, all ``[features]``: mean and variance of the stream of examples, and
    the controls of the backward pass: the sums of what was not orthogonal to ones and to z."""

    mean: jax.Array
    var: jax.Array
    backward_ones: jax.Array
    backward_output: jax.Array


def online_start(features: int, options: Mapping[str, Any]) -> Online:
    """Mean 0, variance 1, controls 0."""
    lookup(dict.fromkeys(GUARDS), options["guard"], "norm.online.guard")
    zeros = jnp.zeros(features)
    return Online(zeros, jnp.ones(features), zeros, zeros)


def online_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Online,
    *,
    use: str,
    decay: Any = 0.999,
    backward_decay: Any = 0.99,
    epsilon: Any = 1e-5,
    guard: str = "clamp",
    clamp: Any = 5.0,
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Online]:
    """Online normalization (Chiley et al., 2019).

        y = clip(scale * z + bias, -clamp, clamp),  z_t = (x_t - m_t) / s_t
        m_{t+1} = a m_t + (1 - a) mean(x_t),  d_t = mean(x_t) - m_t
        s^2_{t+1} = a s^2_t + (1 - a) var(x_t) + a (1 - a) d_t^2
        g'_t = g_t - (1 - b) v_t z_t,  dx_t = g'_t / s_t - (1 - b) u_t
        v_{t+1} = v_t + mean(g'_t z_t),  u_{t+1} = u_t + mean(dx_t)

    The examples of a batch come one after the other, in their order: each is normalised with mean
    and variance (plus epsilon) of those before it, this batch's and past ones', and its gradient is
    controlled by theirs. mean and var are over the positions of one example. a is ``decay``, b is
    ``backward_decay``. x is ``[batch, ..., features]``; scale, bias and the state (``mean``,
    ``var``, u: ``backward_ones``, v: ``backward_output``) are ``[features]``, float32.

    Training: as above; it works with batches of one example.
    Inference: z = (x - m) / sqrt(s^2 + epsilon), then as above.
    Options: ``guard`` against z that explode when m and s lag behind: clamp (with the bound
    ``clamp``), layer (divides by the root mean square of the example) or none; ``scale`` and
    ``bias`` false to leave them out. A mask leaves positions out of all averages, and an example
    without any is skipped.
    Pitfalls: the order of the examples matters, so it knows one set of statistics only. It starts
    at mean 0 and variance 1 and needs about 1 / (1 - decay) examples to arrive. The gradient is not
    the derivative of the forward pass. As slow as its loop over the examples.
    Citation: Chiley, Sharapov, Kosson, Koster, Reece, Samaniego de la Fuente, Subbiah & James
    (2019), Online Normalization for Training Neural Networks, NeurIPS, arXiv:1905.05894.

    Raises:
      UserError: a scope other than one set on one named device; an unknown guard; integer input; a
        mask that does not fit.
    """
    lookup(dict.fromkeys(GUARDS), guard, "norm.online.guard")
    wide, aligned = prepared(x, mask)
    if use == "running":
        y = normalise(wide, running, scale, bias, epsilon)
        return _guarded(y, guard, clamp, epsilon, aligned).astype(x.dtype), running
    if scope.splits > 1 or scope.axes():
        raise UserError(
            "online norm goes through the examples of the whole batch one after the other: they "
            "cannot be cut into sets or devices that work apart; choose norm.scope=global with "
            "parallel.mode=jit, or another norm.kind"
        )
    past = jax.lax.stop_gradient(running)
    before, after = _stream(jax.lax.stop_gradient(wide), aligned, past, decay)
    rate = 1 - jnp.asarray(backward_decay, wide.dtype)
    controls = running.backward_ones, running.backward_output
    inverse = jax.lax.rsqrt(before.var + epsilon)
    y = affine(_controlled(wide, aligned, before.mean, inverse, controls, rate), scale, bias)
    y = _guarded(y, guard, clamp, epsilon, aligned).astype(x.dtype)
    return y, running._replace(mean=after.mean, var=after.var)


def _guarded(y: jax.Array, guard: str, clamp: Any, epsilon: Any, mask: Any) -> jax.Array:
    if guard == "clamp":
        return jnp.clip(y, -clamp, clamp)
    if guard == "layer":
        return y * jax.lax.rsqrt(mean_square(y, tuple(range(1, y.ndim)), mask) + epsilon)
    return y


def _positions(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def _counted(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Which examples have any value, per feature: ``[batch, features or 1]``."""
    if mask is None:
        return jnp.ones((len(x), 1), bool)
    mask = jnp.broadcast_to(mask, (len(x), *mask.shape[1:]))
    return mask.any(_positions(x))


def _each(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean of each example over its positions, ``[batch, features]``."""
    return masked_mean(x, _positions(x), mask).reshape(len(x), x.shape[-1])


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """``[batch, features]`` so that it broadcasts against x."""
    return values.reshape(len(values), *(1,) * (x.ndim - 2), values.shape[-1])


def _stream(x: jax.Array, mask: jax.Array | None, start: Online, decay: Any) -> tuple[Stats, Stats]:
    """Mean and variance before each example, broadcasting against x, and those after the last."""
    mean = _each(x, mask)
    var = _each(jnp.square(x - _spread(mean, x)), mask)

    def example(stats: Stats, given: Any) -> tuple[Stats, Stats]:
        mean, var, counts = given
        away = mean - stats.mean
        new = Stats(
            stats.mean + (1 - decay) * away,
            decay * stats.var + (1 - decay) * (var + decay * jnp.square(away)),
        )
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, stats), stats

    first = Stats(start.mean.astype(x.dtype), start.var.astype(x.dtype))
    after, before = jax.lax.scan(example, first, (mean, var, _counted(x, mask)))
    return Stats(*(_spread(value, x) for value in before)), after


@jax.custom_vjp
def _controlled(
    x: jax.Array, mask: Any, mean: jax.Array, inverse: jax.Array, controls: Any, rate: Any
) -> jax.Array:
    """``z = (x - mean) * inverse``, whose gradient the controls ``(u, v)`` keep orthogonal to ones
    and to z over the stream."""
    return (x - mean) * inverse


def _forward(
    x: jax.Array, mask: Any, mean: jax.Array, inverse: jax.Array, controls: Any, rate: Any
) -> tuple[jax.Array, Any]:
    z = (x - mean) * inverse
    return z, (z, mask, inverse, controls, rate)


def _backward(kept: Any, g: jax.Array) -> tuple[Any, ...]:
    z, mask, inverse, controls, rate = kept
    start = tuple(control.astype(z.dtype) for control in controls)
    counts = _counted(z, mask)
    # The controls move by averages over one example, so that the loop needs nothing else.
    averages = (_each(g * z, mask), _each(z * z, mask), _each(g, mask), _each(z, mask))

    def example(controls: Any, given: Any) -> tuple[Any, Any]:
        u, v = controls
        (gz, zz, g, z), inverse, counts = given
        used = rate * u, rate * v
        moved = u + (g - used[1] * z) * inverse - used[0], v + gz - used[1] * zz
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), moved, controls), used

    flat = inverse.reshape(len(z), -1)
    end, (ones, output) = jax.lax.scan(example, start, (averages, flat, counts))
    free = g * inverse
    dx = (g - _spread(output, z) * z) * inverse - _spread(ones, z)
    steps = tuple((b - a).astype(c.dtype) for a, b, c in zip(start, end, controls, strict=True))
    return dx if mask is None else jnp.where(mask, dx, free), None, None, None, steps, None


_controlled.defvjp(_forward, _backward)
