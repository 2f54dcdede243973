"""The BatchNorm family as pure functions on arrays, and the table of every normaliser.

Conventions of the whole project:

* features last: ``x`` is ``[batch, ..., features]``; one set of statistics per feature;
* ``decay``: ``running <- decay * running + (1 - decay) * batch`` (torch: ``momentum = 1 - decay``);
* ``correction``: 0 stores the biased batch variance (divided by n), 1 the unbiased one (by n - 1).
  The batch itself is always normalised with the biased variance;
* statistics are float32, also for half-precision inputs (float64 stays float64), and the variance
  takes two passes: ``E[x^2] - E[x]^2`` in float32 loses everything at ``|mean| >> std``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch import rivals
from bnresearch.errors import UserError


class Stats(NamedTuple):
    """Mean and variance per feature: float32, ``[features]``."""

    mean: jax.Array
    var: jax.Array


@dataclass(frozen=True)
class Scope:
    """Over what one set of batch statistics is computed.

    Attributes:
      merge: named axis over which the statistics that normalise are merged (None: no merging).
      merge_groups: for ``pmap``, whose mesh has one axis only: the devices that merge together.
      pool: named axis over which the *running* statistics are pooled besides. The running ones
        always describe the whole batch, whatever normalised it.
      splits: equal contiguous parts of the leading axis that are normalised apart from each other.

    The default is the whole array: under ``jit`` that is the whole batch on however many devices.
    """

    merge: str | None = None
    merge_groups: tuple[tuple[int, ...], ...] | None = None
    pool: str | None = None
    splits: int = 1


def _merge(value: jax.Array, scope: Scope) -> jax.Array:
    if scope.merge is None:
        return value
    return jax.lax.pmean(value, scope.merge, axis_index_groups=scope.merge_groups)


def _merged_devices(scope: Scope) -> int:
    if scope.merge is None:
        return 1
    if scope.merge_groups is not None:
        return len(scope.merge_groups[0])
    return jax.lax.axis_size(scope.merge)


def _split(x: jax.Array, scope: Scope) -> jax.Array:
    """``[splits, batch / splits, ..., features]`` in float32; as it is where there is one set."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    if scope.splits == 1:  # a leading axis of 1 makes XLA's reductions on CPU twice as slow
        return x
    return x.reshape(scope.splits, x.shape[0] // scope.splits, *x.shape[1:])


def values_per_set(shape: tuple[int, ...], scope: Scope) -> int:
    """How many values one mean is taken over, for a local input of ``shape``."""
    return math.prod(shape[:-1]) // scope.splits * _merged_devices(scope)


def values_per_batch(shape: tuple[int, ...], scope: Scope) -> int:
    """How many values per feature the whole batch holds, for a local input of ``shape``."""
    axes = {scope.merge, scope.pool} - {None}
    return math.prod(shape[:-1]) * math.prod(jax.lax.axis_size(axis) for axis in axes)


def _centred(x: jax.Array, scope: Scope) -> tuple[jax.Array, Stats]:
    """``x - mean`` and the statistics, per set: ``[..., features]``, a leading axis for the splits.

    Every device and every split holds equally many values, so means of means are exact, and the
    variance is the mean square distance from the *merged* mean (never a mean of variances).
    """
    x = _split(x, scope)
    axes = tuple(range(0 if scope.splits == 1 else 1, x.ndim - 1))
    mean = _merge(x.mean(axes, keepdims=True), scope)
    centred = x - mean
    var = _merge(jnp.square(centred).mean(axes, keepdims=True), scope)
    return centred, Stats(mean, var)


def batch_stats(x: jax.Array, scope: Scope = Scope()) -> Stats:
    """Mean and biased variance of each set that is normalised together: as many values as
    ``splits * features``, broadcasting against the split input."""
    return _centred(x, scope)[1]


def pool(stats: Stats, axis: int = 0) -> Stats:
    """Statistics of the union of equally large sets stacked on ``axis``: mean of the means, and
    mean of the variances plus variance of the means."""
    mean = stats.mean.mean(axis)
    spread = jnp.square(stats.mean - jnp.expand_dims(mean, axis)).mean(axis)
    return Stats(mean, stats.var.mean(axis) + spread)


def whole_batch(stats: Stats, scope: Scope) -> Stats:
    """The sets of ``batch_stats`` pooled to the whole batch on all devices: ``[features]``."""
    features = stats.mean.shape[-1]
    pooled = pool(Stats(*(value.reshape(scope.splits, features) for value in stats)))
    if scope.pool is None:
        return pooled
    mean = jax.lax.pmean(pooled.mean, scope.pool)
    return Stats(mean, jax.lax.pmean(pooled.var + jnp.square(pooled.mean - mean), scope.pool))


def update_running(
    running: Stats, batch: Stats, count: Any, *, decay: Any, correction: int
) -> Stats:
    """``decay * running + (1 - decay) * batch``; of ``count`` values each."""
    var = batch.var * (count / (count - correction))
    return Stats(
        decay * running.mean + (1 - decay) * batch.mean,
        decay * running.var + (1 - decay) * var,
    )


def normalise(
    x: jax.Array,
    stats: Stats,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias``, in float32, given in the dtype of x."""
    centred = _split(x, Scope()) - stats.mean
    return _affine(centred, stats.var, scale, bias, epsilon).astype(x.dtype)


def _affine(
    centred: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    multiplier = jax.lax.rsqrt(var + epsilon)
    if scale is not None:
        multiplier = multiplier * scale
    y = centred * multiplier
    return y if bias is None else y + bias


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    decay: float | jax.Array = 0.9,
    epsilon: float = 1e-5,
    correction: int = 0,
    scope: Scope = Scope(),
) -> tuple[jax.Array, Stats]:
    """Batch Normalization (Ioffe & Szegedy, 2015).

    ``use="batch"``: ``y = scale * (x - m) / sqrt(v + epsilon) + bias`` with the mean m and biased
    variance v over all axes but the last, of each set that ``scope`` names; the new running
    statistics are the EMA of those of the whole batch (mean of means, pooled second moment).
    ``use="running"``: the same with the running statistics, which stay as they are.

    Args:
      x: ``[batch, ..., features]``, any float dtype.
      scale, bias: ``[features]`` float32, or None to leave them out.
      running: running mean and variance, ``[features]`` float32.
      use: which statistics normalise: "batch" or "running".
      decay: share of the old running statistics that is kept, in [0, 1].
      epsilon: added to the variance.
      correction: 0 for the biased, 1 for the unbiased running variance.
      scope: over what one set of batch statistics is computed.

    Returns:
      y in the shape and dtype of x, and the new running statistics.

    Raises:
      UserError: batch statistics over one single value: the output would be ``bias`` whatever x is.
    """
    if use == "running":
        return normalise(x, running, scale, bias, epsilon), running
    count = values_per_set(x.shape, scope)
    if count < 2:
        raise UserError(
            f"batch statistics over one single value (input {tuple(x.shape)}): the output would "
            "not depend on the input; use a larger batch, a wider norm.scope, or "
            "norm.kind=group|layer"
        )
    # Centred once for both the variance and the output: one sum less in the gradient.
    centred, stats = _centred(x, scope)
    y = _affine(centred, stats.var, scale, bias, epsilon).reshape(x.shape).astype(x.dtype)
    total = values_per_batch(x.shape, scope)
    new = update_running(
        running, whole_batch(stats, scope), total, decay=decay, correction=correction
    )
    return y, new


class Kind(NamedTuple):
    """A row of NORMS: the function, its options with their defaults, and what it owns."""

    function: Callable[..., Any]
    options: Mapping[str, Any]
    affine: bool  # owns 'scale' and 'bias'
    running: bool  # owns running statistics, takes and returns them


NORMS: dict[str, Kind] = {
    "batch": Kind(batch_norm, dict(decay=0.9, epsilon=1e-5, correction=0), True, True),
    "layer": Kind(rivals.layer_norm, dict(epsilon=1e-5, over="example"), True, False),
    "group": Kind(rivals.group_norm, dict(epsilon=1e-5, groups=32), True, False),
    "none": Kind(rivals.identity, {}, False, False),
}
