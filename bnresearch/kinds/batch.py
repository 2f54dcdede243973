"""Batch Normalization itself, and what every kind with batch statistics shares."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch import averages, native
from bnresearch.errors import UserError, lookup
from bnresearch.moments import KEPT, apart, moments, scaled
from bnresearch.native import batch_norm as fused
from bnresearch.native.batch_norm import SMALLEST
from bnresearch.sets import Scope, Sets, Stats, whole_batch, wide

ON_SINGLE = ("error", "warn", "beta")


def single_value(sets: Sets, shape: tuple[int, ...], on_single: str, parts: int = 1) -> None:
    """Refuse, warn of, or let pass a set (or a part of one, of so many equal ones) of one single
    value, whose output is the bias.

    With a mask the counts are data. Outside of jit they are looked at here; under jit a set of one
    value becomes NaN with "error" (see `batch_moments`), which the training loop reports.
    """
    lookup(dict.fromkeys(ON_SINGLE), on_single, "on_single")
    if isinstance(sets.count, jax.core.Tracer) or not (np.asarray(sets.count) == parts).any():
        return
    message = (
        f"batch statistics over one single value (input {tuple(shape)}): the output would "
        "not depend on the input; use a larger batch, a wider norm.scope, "
        "norm.kind=group|layer, or allow it with on_single=warn|beta"
    )
    if on_single == "error":
        raise UserError(message)
    if on_single == "warn":
        warnings.warn(message, stacklevel=3)


def batch_moments(
    x: jax.Array,
    running: Any,
    *,
    scope: Scope = Scope(),
    mask: Any = None,
    variance: str = "two_pass",
    stat_dtype: str = "float32",
    on_single: str = "error",
) -> tuple[Sets, jax.Array, Stats]:
    """The input in its sets, ``x - mean``, and mean and biased variance of each set.

    A set in which the mask leaves no value is given the running statistics, and counts for nothing
    in averages over sets.

    Raises:
      UserError: sets of one value with ``on_single="error"``, a mask that does not fit, an unknown
        algorithm or dtype.
    """
    sets = Sets(x, scope, mask, stat_dtype)
    single_value(sets, x.shape, on_single)
    stats = set_moments(sets, running, variance, on_single)
    return sets, sets.x - apart(stats.mean), stats


def set_moments(sets: Sets, running: Any, variance: str, on_single: str) -> Stats:
    """See `batch_moments`; single values are not looked for where they can be seen."""
    stats = moments(sets, variance)
    if sets.mask is None:
        return stats
    empty = sets.count == 0
    stats = Stats(*(jnp.where(empty, r, b) for r, b in zip(running[:2], stats, strict=True)))
    if on_single == "error":
        stats = stats._replace(var=jnp.where(sets.count == 1, jnp.nan, stats.var))
    return stats


Vectors = tuple[jax.Array, jax.Array, jax.Array]
Activation = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Standard:
    """The vectors of `normalised` for ``(x - mean) / sqrt(var + epsilon) * scale + bias``."""

    scale: jax.Array | None
    bias: jax.Array | None
    epsilon: Any

    def __call__(self, stats: Stats) -> Vectors:
        multiplier = affine(jax.lax.rsqrt(stats.var + self.epsilon), self.scale, None)
        return stats.mean, multiplier, jnp.zeros(1) if self.bias is None else self.bias


def normalised(
    x: jax.Array,
    running: Any,
    vectors: Callable[[Stats], Vectors],
    *,
    scope: Scope = Scope(),
    mask: Any = None,
    variance: str = "two_pass",
    stat_dtype: str = "float32",
    on_single: str = "error",
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Sets, Stats]:
    """``activation((x - m) * a + b + add)`` with ``(m, a, b) = vectors(moments of each set)``: the
    output, in the shape and dtype of x, the input in its sets, and the moments.

    For the backward pass it keeps its arguments and the moments; the normalised input, what goes
    into the activation, and the activation's derivative are computed again there.

    Raises:
      UserError: as `batch_moments`.
    """
    sets = Sets(x, scope, mask, stat_dtype)
    single_value(sets, x.shape, on_single)
    if isinstance(vectors, Standard) and variance == "two_pass" and _native(sets, x, activation):
        return _by_library(sets, vectors, activation, add)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    def body(x: jax.Array, mask: Any, add: jax.Array | None) -> tuple[jax.Array, Stats]:
        sets = Sets(x, scope, mask, stat_dtype)
        stats = set_moments(sets, running, variance, on_single)
        y = scaled(sets, *vectors(stats))
        return activated(y, activation, add).astype(x.dtype), stats

    y, stats = body(x, mask, add)
    return y, sets, stats


def _native(sets: Sets, x: jax.Array, activation: Activation | None) -> bool:
    """Whether the library of C++ is to compute this, if there is one: whole sets on one device,
    float32, nothing or ReLU behind them, and enough values to be worth its calls."""
    whole = sets.mask is None and sets.scope.merge is None and sets.scope.mesh is None
    plain = x.dtype == jnp.float32 and activation in (None, jax.nn.relu)
    return whole and plain and x.size >= SMALLEST and native.expected(sets.scope.kernels)


def _by_library(
    sets: Sets, vectors: Standard, activation: Activation | None, add: jax.Array | None
) -> tuple[jax.Array, Sets, Stats]:
    shape, splits = sets.whole.shape, sets.scope.splits
    x = sets.whole.reshape(splits, -1, shape[-1])

    def row(vector: jax.Array | None, otherwise: float) -> jax.Array:
        vector = jnp.asarray(otherwise if vector is None else vector, x.dtype)
        return jnp.broadcast_to(vector, (splits, shape[-1]))

    scale, bias = row(vectors.scale, 1), row(vectors.bias, 0)
    added = None if add is None else jnp.broadcast_to(add, shape).astype(x.dtype).reshape(x.shape)
    y, m, v = fused.batch_norm(x, scale, bias, vectors.epsilon, added, activation is not None)
    return y.reshape(shape), sets, Stats(sets.per_set(m), sets.per_set(v))


def activated(y: jax.Array, activation: Activation | None, add: jax.Array | None) -> jax.Array:
    """``activation(y + add)``, each left out where it is None."""
    y = y if add is None else y + add
    return y if activation is None else activation(y)


def affine(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """``y * scale + bias``, each left out where it is None."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def standardise(
    centred: jax.Array, var: Any, scale: jax.Array | None, bias: jax.Array | None, epsilon: Any
) -> jax.Array:
    """``centred / sqrt(var + epsilon) * scale + bias``, scale and deviation multiplied first: one
    product per value, not two."""
    multiplier = affine(jax.lax.rsqrt(var + epsilon), scale, None)
    return affine(centred * multiplier, None, bias)


def normalise(
    x: jax.Array,
    stats: Any,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: Any,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> jax.Array:
    """``activation((x - mean) / sqrt(var + epsilon) * scale + bias + add)`` with given statistics,
    in float32, in the dtype of x."""
    y = standardise(wide(x) - stats.mean, stats.var, scale, bias, epsilon)
    return activated(y, activation, add).astype(x.dtype)


def moved(running: Any, sets: Sets, stats: Stats, **how: Any) -> Any:
    """The running statistics after this batch: once, towards the moments of the whole batch;
    ``how`` is the keywords of `averages.update`."""
    return averages.update(running, whole_batch(sets, stats), sets.batch_count(), **how)


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Any,
    *,
    use: str,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    correction: int = 0,
    variance: str = "two_pass",
    stat_dtype: str = "float32",
    average: str = "ema",
    track: str = "variance",
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Batch normalization (Ioffe & Szegedy, 2015).

        y = scale * (x - m) / sqrt(v + epsilon) + bias

    m and v are mean and biased variance of each feature over all axes but the last: over the whole
    batch on all devices, or over each set that the scope names, weighted by counts. x is
    ``[batch, ..., features]``; scale, bias and the running mean and variance are ``[features]``,
    float32.

    Training: normalises with m and v of the batch. The running statistics move once, towards those
    of the whole batch whatever the scope (mean of the means, variance of the pooled values).
    Inference: normalises with the running mean and variance, which stay as they are.
    Options: ``decay`` of the running statistics, in [0, 1]; ``epsilon`` added to the variance;
    ``correction`` 1 for an unbiased running variance; ``variance`` two_pass, fast (E[x^2] - m^2,
    clamped) or shifted (one pass over x minus one of its values); ``stat_dtype`` float32, or input
    for that of the input; ``average`` ema, debiased, cumulative or last (``window`` batches);
    ``track`` variance or second_moment; ``on_single`` error, warn or beta; ``scale`` and ``bias``
    false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: the paper's inference takes the unbiased variance (``correction=1``, as torch does);
    flax, keras and ONNX keep the biased one, the default here. A bias before it is needless (its
    gradient is 0). One value per feature gives the bias
    whatever the input, hence it is refused; two give the sign of their difference, and no gradient.
    Weight decay on scale pulls the signal to zero. A mask that leaves a set no value gives it the
    running statistics; one value is refused, or NaN where only the compiled program knows it.
    Citation: Ioffe & Szegedy (2015), Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift, ICML, arXiv:1502.03167.

    Returns:
      y in the shape and dtype of x (with ``activation``, a function, or ``add``, an array like x:
      ``activation(y + add)``), and the new running statistics, of the type of ``running``. The
      backward pass keeps x, add and the statistics; see `normalised`.

    Raises:
      UserError: batch statistics over one single value with ``on_single="error"``; integer input; a
        mask or sets that do not fit; an unknown option value.
    """
    if use == "running":
        return normalise(x, running, scale, bias, epsilon, activation, add), running
    y, sets, stats = normalised(
        x,
        running,
        Standard(scale, bias, epsilon),
        scope=scope,
        mask=mask,
        variance=variance,
        stat_dtype=stat_dtype,
        on_single=on_single,
        activation=activation,
        add=add,
    )
    how = dict(decay=decay, correction=correction, average=average, track=track)
    return y, moved(running, sets, stats, **how)
