"""Kinds with moving averages in the backward pass, too.

The gradient of a norm with batch statistics contains averages over the batch; these kinds put
moving averages in their place. Such an average is running statistics that are known in the backward
pass only: it is an entry ``backward_...`` of the state, which comes back from the forward pass as
it was, and whose cotangent is the step it takes (see `bnresearch.accumulate`). Whoever
differentiates by the parameters alone leaves it where it is.

The gradients that arrive are those of the loss of the whole batch, in every mode of
`bnresearch.parallel`. Where one differentiates a device's own loss instead, these entries, and only
they, are larger by the number of devices.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError
from bnresearch.kinds.batch import affine, normalise, single_value
from bnresearch.kinds.within import grouped, prepared
from bnresearch.sets import Scope, Sets, Stats

# ``(sets, mean of g * z over each set, z, memory, numbers) -> (what stands for that mean in the
# gradient, the step of the memory)``
Moving = Callable[..., tuple[jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def divide(
    moving: Moving,
    scope: Scope,
    x: jax.Array,
    mask: Any,
    inverse: jax.Array,
    memory: jax.Array,
    numbers: Any,
) -> jax.Array:
    """``z = x * inverse`` in sets, where inverse is 1 / root mean square.

    With g the gradient that arrives at z, batch statistics would send ``(g - z * mean(g * z)) *
    inverse`` on to x. Here ``moving`` says what stands for mean(g * z), and how the memory moves.
    """
    return Sets(x, scope, mask).x * inverse


def _forward(
    moving: Moving,
    scope: Scope,
    x: jax.Array,
    mask: Any,
    inverse: jax.Array,
    memory: jax.Array,
    numbers: Any,
) -> tuple[jax.Array, Any]:
    z = divide(moving, scope, x, mask, inverse, memory, numbers)
    return z, (z.reshape(x.shape), mask, inverse, memory, numbers)


def _backward(moving: Moving, scope: Scope, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    z, mask, inverse, memory, numbers = kept
    sets = Sets(z, scope, mask)
    average, step = moving(sets, sets.mean(g * sets.x), sets.x, memory, numbers)
    through = sets.x * average
    if sets.mask is not None:
        through = jnp.where(sets.mask, through, 0)
    dx = ((g - through) * inverse).reshape(z.shape)
    some = jnp.asarray(sets.batch_count() > 0)
    return dx, None, None, jnp.where(some, step, 0), None


divide.defvjp(_forward, _backward)


def _squares(
    sets: Sets, empty: jax.Array, on_single: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean squares of each set and of the whole batch, and whether there is any value in it; those
    of ``empty`` for a set without a value, NaN for a refused single one (see `batch_moments`)."""
    own = sets.mean(jnp.square(jax.lax.stop_gradient(sets.x)))
    if sets.mask is not None:
        own = jnp.where(sets.count == 0, empty, own)
        own = jnp.where(sets.count == 1, jnp.nan, own) if on_single == "error" else own
    some = jnp.asarray(sets.batch_count() > 0, own.dtype)
    return own, sets.batch_mean(own), some


def _write(ring: jax.Array, updates: jax.Array, new: jax.Array, some: Any = 1) -> jax.Array:
    """The ring with ``new`` in the place of its oldest entry."""
    slot = updates.astype(jnp.int32) % len(ring)
    return jnp.where((jnp.arange(len(ring)) == slot)[:, None] & (some > 0), new, ring)


class Mabn(NamedTuple):
    """State of `moving_average_norm`: the running mean square (``[features]``), how often it moved,
    and ``window - 1`` past mean squares and past means of g * z, ``[past, features]``."""

    square: jax.Array
    updates: jax.Array
    recent_square: jax.Array
    backward_recent: jax.Array


def mabn_start(features: int, options: Mapping[str, Any]) -> Mabn:
    """Mean square 1, the past zeros, which do not count."""
    past = options["window"] - 1
    if past < 1:
        raise UserError(
            f"norm.mabn.window={past + 1} leaves nothing to average over: choose 2 or more (the "
            "batch size to imitate, divided by that of the batch)"
        )
    ring = jnp.zeros((past, features))
    return Mabn(jnp.ones(features), jnp.zeros(()), ring, ring)


def _window_mean(own: jax.Array, ring: jax.Array, updates: jax.Array, warm_up: int) -> jax.Array:
    """The mean over the newest batch and the ring; the newest alone until the ring is full and the
    warm-up over."""
    moving = (own + ring.sum(0)) / (len(ring) + 1)
    return jnp.where(updates >= max(len(ring), warm_up), moving, own)


def _mabn_moving(
    warm_up: int, sets: Sets, gz: jax.Array, z: jax.Array, ring: jax.Array, updates: jax.Array
) -> tuple[jax.Array, jax.Array]:
    average = _window_mean(gz, ring, updates, warm_up)
    return average, _write(ring, updates, sets.batch_mean(gz)) - ring


def moving_average_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Mabn,
    *,
    use: str,
    window: int = 16,
    decay: Any = 0.98,
    epsilon: Any = 1e-5,
    warm_up: int = 100,
    r_max: Any = 5.0,
    r_after: int = 1000,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Mabn]:
    """Moving average batch normalization (Yan, Wan, Zhang, Zhang, Wei & Sun, 2020).

        y = scale * r * z + bias,  z = x / s,  s^2 = mean of E[x^2] over window batches + epsilon
        dx = (g - z * mean of E[g * z] over window batches) / s,  g = scale * r * dy
        r = clip(s / sqrt(running square + epsilon), 1 / r_max, r_max), without gradient

    For batches too small for batch statistics: of the four averages in batch norm and its gradient
    two are left out (no mean is subtracted, the weights in front are centred instead), and two are
    taken over the last ``window`` batches. x is ``[batch, ..., features]``; scale, bias and the
    running mean square are ``[features]``, the past is ``[window - 1, features]``, float32. Past
    batches count with the averages over the whole batch, whatever the scope.

    Training: as above. During ``warm_up`` updates, and until the window is full, the batch alone is
    averaged over, in both passes; r is 1 for the first ``r_after`` updates. ``square`` moves
    towards s^2, ``recent_square`` in the forward, ``backward_recent`` in the backward pass.
    Inference: y = scale * x / sqrt(running square + epsilon) + bias.
    Options: ``window``, batches (the batch size to imitate, divided by the one at hand); ``decay``
    of the running mean square; ``warm_up`` and ``r_after``, updates; ``r_max``; ``on_single``
    error, warn or beta: after the warm-up one value in the batch is legitimate, so for batches of
    one value take beta; ``scale`` and ``bias`` false to leave them out. A mask leaves positions out
    of all averages, in both passes.
    Pitfalls: nothing is centred: it needs ``norm.weights=centred`` (which it brings along) and an
    input with means near 0. The gradient is not the derivative of the forward pass. During the
    warm-up one single value gives its sign, hence it is refused.
    Citation: Yan, Wan, Zhang, Zhang, Wei & Sun (2020), Towards Stabilizing Batch Statistics in
    Backward Propagation of Batch Normalization, ICLR, arXiv:2001.06838.

    Raises:
      UserError: a window below 2; statistics over one single value with ``on_single="error"``;
        integer input; a mask or sets that do not fit.
    """
    if use == "running":
        return normalise(x, Stats(jnp.zeros(()), running.square), scale, bias, epsilon), running
    sets = Sets(x, scope, mask)
    single_value(sets, x.shape, on_single)
    past = jax.lax.stop_gradient(running)
    own, batch, some = _squares(sets, past.square, on_single)
    square = _window_mean(own, past.recent_square, past.updates, warm_up)
    r = jnp.sqrt((square + epsilon) / (past.square + epsilon))
    r = jnp.where(past.updates >= max(r_after, warm_up), jnp.clip(r, 1 / r_max, r_max), 1)
    moving = functools.partial(_mabn_moving, warm_up)
    z = divide(
        moving,
        scope,
        prepared(x)[0],
        mask,
        jax.lax.rsqrt(square + epsilon),
        running.backward_recent,
        past.updates,
    )
    y = sets.join(affine(z * r, scale, bias))
    used = _window_mean(batch, past.recent_square, past.updates, warm_up)
    return y, running._replace(
        square=past.square + some * (1 - decay) * (used - past.square),
        updates=past.updates + some.max(),
        recent_square=_write(past.recent_square, past.updates, batch, some),
    )


class Power(NamedTuple):
    """State of `power_norm`: running mean square and number of updates; ``backward_product`` is
    the moving average of mean(g * z), all ``[features]`` but the number."""

    square: jax.Array
    updates: jax.Array
    backward_product: jax.Array


def power_start(features: int, options: Mapping[str, Any]) -> Power:
    """Mean square 1, the average of the backward pass 0."""
    return Power(jnp.ones(features), jnp.zeros(()), jnp.zeros(features))


def _power_moving(
    sets: Sets, gz: jax.Array, z: jax.Array, product: jax.Array, numbers: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    warm, rate = numbers
    square = sets.batch_mean(sets.mean(jnp.square(z)))
    # Not an average of mean(g * z), but of what is left of it once the memory has been taken away.
    step = rate * (sets.batch_mean(gz) - product * square)
    return jnp.where(warm, gz, product), step


def power_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Power,
    *,
    use: str,
    decay: Any = 0.9,
    backward_decay: Any = 0.9,
    epsilon: Any = 1e-5,
    groups: int = 1,
    warm_up: int = 10000,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Power]:
    """Power normalization (Shen, Yao, Gholami, Mahoney & Keutzer, 2020).

        y = scale * z + bias,  z = x' / psi,  psi^2 = running mean of E[x'^2] + epsilon
        dx' = (g - nu * z) / psi,  g = scale * dy
        nu <- nu + (1 - backward_decay) * (E[g * z] - nu * E[z^2])

    Batch norm for texts, whose batch statistics jump: no mean is subtracted, and the mean square is
    that of past batches, as it was before the batch at hand. x' is x divided by the root mean
    square over the features of each position (in ``groups`` groups). x is ``[batch, ...,
    features]``; scale, bias, the running mean square and nu are ``[features]``, float32.

    Training: as above after the first ``warm_up`` updates; during these, as in the paper's variant
    PN-V, with the mean square of the batch and its true gradient. Both averages move all the time.
    Inference: y = scale * x' / sqrt(running mean square + epsilon) + bias.
    Options: ``decay`` of the mean square, ``backward_decay`` of nu; ``groups`` of features, 0 for
    x' = x; ``warm_up``, updates (the authors' code has 10000; shorter trainings want less);
    ``on_single`` error, warn or beta: after the warm-up one value in the batch is legitimate, so
    for batches of one value take beta; ``scale`` and ``bias`` false to leave them out. A mask
    leaves positions out of all averages.
    Pitfalls: the gradient is not the derivative of the forward pass. The authors' code divides it
    by the root mean square of the batch, even where the forward pass used psi; here, as in the
    paper, by psi. Its ema_gz is nu / (1 - backward_decay). In the warm-up it also subtracts (1 -
    backward_decay) * ema_gz * z from the gradient, and takes a cumulative mean of the mean squares,
    then the exponential one; here the gradient there is the true one, and the average the
    exponential one throughout. Nothing bounds z when the mean square of a batch jumps. During the
    warm-up one single value gives its sign, hence it is refused.
    Citation: Shen, Yao, Gholami, Mahoney & Keutzer (2020), PowerNorm: Rethinking Batch
    Normalization in Transformers, ICML, arXiv:2003.07845.

    Raises:
      UserError: groups that do not divide the features; statistics over one single value with
        ``on_single="error"``; integer input; a mask or sets that do not fit.
    """
    scaled = _group_scaled(x, groups, epsilon)
    if use == "running":
        stats = Stats(jnp.zeros(()), running.square)
        return normalise(scaled, stats, scale, bias, epsilon).astype(x.dtype), running
    sets = Sets(scaled, scope, mask)
    single_value(sets, x.shape, on_single)
    past = jax.lax.stop_gradient(running)
    own, batch, some = _squares(sets, past.square, on_single)
    warm = past.updates < warm_up
    inverse = jax.lax.rsqrt(jnp.where(warm, own, past.square) + epsilon)
    numbers = (warm, 1 - jnp.asarray(backward_decay, scaled.dtype))
    z = divide(_power_moving, scope, scaled, mask, inverse, running.backward_product, numbers)
    y = sets.join(affine(z, scale, bias)).astype(x.dtype)
    return y, running._replace(
        square=past.square + some * (1 - decay) * (batch - past.square),
        updates=past.updates + some.max(),
    )


def _group_scaled(x: jax.Array, groups: int, epsilon: Any) -> jax.Array:
    """x in float32 over the root mean square of each position's group of features."""
    wide, _ = prepared(x)
    if groups == 0:
        return wide
    cut = grouped(wide, groups, "power")
    return (cut * jax.lax.rsqrt(jnp.square(cut).mean(-1, keepdims=True) + epsilon)).reshape(x.shape)
