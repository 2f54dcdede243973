"""Batch statistics with something from outside the batch: a reference batch, or past batches."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch import averages
from bnresearch.errors import UserError, lookup
from bnresearch.kinds.batch import batch_moments, normalise, standardise
from bnresearch.sets import Scope, Sets, Stats, align_mask, masked_mean, whole_batch, wide


def places(scope: Scope, examples: int) -> jax.Array | np.ndarray:
    """The place of each example of this device in its set of statistics, ``[examples]``."""
    local = examples // scope.splits
    place = np.arange(examples) % local
    if scope.merge is None:
        return place
    device = jax.lax.axis_index(scope.merge)
    if scope.merge_groups is not None:
        in_group = np.zeros(sum(map(len, scope.merge_groups)), np.int32)
        for group in scope.merge_groups:
            in_group[list(group)] = np.arange(len(group))
        device = jnp.asarray(in_group)[device]
    return device * local + place


def _reference_size(reference: int, shape: tuple[int, ...], scope: Scope) -> int:
    """How many examples of each set are the reference: ``reference``, or half of the set for 0."""
    size = shape[0] // scope.splits * scope.merged_devices()
    chosen = reference or size // 2
    if not 0 < chosen < size:
        raise UserError(
            f"virtual batch norm with norm.virtual.reference={reference} on sets of {size} "
            "examples: the first ones are the reference and the rest is normalised by it, so there "
            f"must be a rest; put the reference batch in front, and choose 1 to {size - 1}"
        )
    return chosen


def virtual_batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    reference: int = 0,
    own: bool = True,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Virtual batch normalization (Salimans et al., 2016).

        y = scale * (x - m) / sqrt(v + epsilon) + bias
        m, v: of the values of the reference batch and of the example itself, together

    The first ``reference`` examples of a set are the reference batch: **the caller puts the same
    fixed examples in front of every batch**, and leaves their outputs out of the loss. Every other
    example counts as one more of them, with the weight 1 / (reference + 1), over its positions. The
    reference itself is normalised with its own statistics. x is ``[batch, ..., features]``; scale,
    bias and the running mean and variance (those of the reference) are ``[features]``, float32.

    Training: no example sees any other outside of the reference; gradients flow through the
    statistics of both. The reference is the beginning of the set also where the scope merges
    devices: on the first of them.
    Inference: normalises with the running statistics of the reference, which stay as they are.
    Options: ``reference``, examples of a set; 0 for its first half (a reference batch as large as
    the batch). ``own`` false leaves the example itself out of its statistics; ``decay`` of the
    running statistics; ``on_single`` error, warn or beta where the reference is one single value;
    ``scale`` and ``bias`` false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: a config alone puts no reference in front: the first examples of each new batch are it
    then, and count in the loss. Inference drops the example's own share of its statistics. A
    network runs twice as long, on the reference and on the batch. Not the "virtual batch size" of
    other libraries, which is ghost batch norm. Shuffling must not move the reference; with
    statistics per device, every device needs one in front.
    Citation: Salimans, Goodfellow, Zaremba, Cheung, Radford & Chen (2016), Improved Techniques for
    Training GANs, NeurIPS, arXiv:1606.03498.

    Raises:
      UserError: a reference that leaves no other example, or that is one single value; integer
        input; a mask or sets that do not fit.
    """
    if use == "running":
        return normalise(x, running, scale, bias, epsilon), running
    sets = Sets(x, scope, mask)
    size = _reference_size(reference, x.shape, scope)
    first = jnp.asarray(places(scope, len(x)) < size).reshape(-1, *(1,) * (x.ndim - 1))
    counted = first if mask is None else first & align_mask(mask, x.shape)
    referring, centred, stats = batch_moments(
        x, running, scope=scope, mask=counted, on_single=on_single
    )
    batch = whole_batch(referring, stats)
    new = averages.update(running, batch, referring.batch_count(), decay=decay)
    if own:
        axes = tuple(range(1 - x.ndim, -1))[: x.ndim - 2]
        centred, stats = _with_own(sets, referring, centred, stats, axes)
    return sets.join(standardise(centred, stats.var, scale, bias, epsilon)), new


def _with_own(
    sets: Sets, referring: Sets, centred: jax.Array, stats: Stats, axes: tuple[int, ...]
) -> tuple[jax.Array, Stats]:
    """``x - mean`` and statistics of the reference merged with those of each example over its
    positions, ``axes``; those of the reference alone for its own examples."""
    assert referring.mask is not None
    mask = jnp.ones_like(referring.mask) if sets.mask is None else sets.mask
    mask = jnp.broadcast_to(mask, (*centred.shape[:-1], mask.shape[-1]))
    shift = masked_mean(centred, axes, mask)
    var = masked_mean(jnp.square(centred - shift), axes, mask)
    alone = referring.mask.any(axes, keepdims=True)
    count = jnp.where(alone, 0, mask.sum(axes, keepdims=True, dtype=centred.dtype))
    share = count / jnp.maximum(referring.count + count, 1)
    # A merge of variances, which does not cancel: E[x^2] - m^2 would.
    var = (1 - share) * stats.var + share * (var + (1 - share) * jnp.square(shift))
    return centred - share * shift, Stats(stats.mean + share * shift, var)


class History(NamedTuple):
    """Running statistics and the newest batches, ``window - 1`` of them.

    ``mean`` and ``var`` (``[features]``) are what inference uses; ``updates`` is a scalar;
    ``recent_mean`` and ``recent_var`` are ``[past, features]``. With compensation besides, for each
    past batch: the derivatives of its mean and variance by the kernel before the site,
    ``..._slope`` (``[past, *kernel]``), and those times the kernel of that time, ``..._along``
    (``[past, features]``).
    """

    mean: jax.Array
    var: jax.Array
    updates: jax.Array
    recent_mean: jax.Array
    recent_var: jax.Array
    mean_slope: Any = None
    var_slope: Any = None
    mean_along: Any = None
    var_along: Any = None


COMPENSATIONS = ("taylor", "none")


def history_start(features: int, options: Mapping[str, Any]) -> History:
    """Mean 0, variance 1, and room for the past batches: the derivatives where there is a linear
    map (``options["linear"]``) and they are wanted."""
    past, linear = options["window"] - 1, options.get("linear")
    lookup(dict.fromkeys(COMPENSATIONS), options["compensation"], "compensation")
    if past < 1:
        raise UserError(
            f"cross-iteration batch norm with window={past + 1} looks at no past batch: choose 2 "
            "or more, or norm.kind=batch"
        )
    zeros = jnp.zeros((past, features))
    start = History(jnp.zeros(features), jnp.ones(features), jnp.zeros(()), zeros, zeros)
    if options["compensation"] == "none" or linear is None:
        return start
    slope = jnp.zeros((past, *linear.kernel.shape))
    return start._replace(mean_slope=slope, var_slope=slope, mean_along=zeros, var_along=zeros)


def cross_iteration_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: History,
    *,
    use: str,
    window: int = 8,
    compensation: str = "taylor",
    warm_up: int = 100,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    linear: Any = None,
) -> tuple[jax.Array, History]:
    """Cross-iteration batch normalization (Yao, Cao, Zheng, Huang & Lin, 2021).

        y = scale * (x - m) / sqrt(v + epsilon) + bias
        m = mean of m_i, v = mean of max(E_i[x^2], m_i^2) - m^2, over the last window batches
        m_i = m_i(W_i) + <dm_i/dW, W - W_i>, and E_i[x^2] likewise

    The batch at hand and the ``window - 1`` before it count alike. The past ones were made with
    other weights; to first order, and for the weights W of the linear map directly in front of the
    site, that is compensated. Past batches count with the moments of the whole batch, whatever the
    scope. x is ``[batch, ..., features]``; scale, bias and the running mean and variance are
    ``[features]``, float32. The state holds two arrays of the kernel's shape per past batch.

    Training: as above, computed from variances, so that nothing cancels; gradients flow through the
    batch at hand only. The running mean and variance move towards those of the batch at hand alone.
    Inference: normalises with the running mean and variance, which stay as they are.
    Options: ``window``, batches; ``compensation`` taylor, or none to take past moments as they are;
    ``warm_up``, updates before past batches count (while weights move fast they are worth little);
    ``decay`` of the running statistics; ``on_single`` error, warn or beta; ``scale`` and ``bias``
    false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: the default of ``warm_up`` is ours; the authors' code has 0. That code drops past
    moments whose compensated variance is negative; here it counts as 0 (the max in the formula).
    Costs two more backward passes through the linear map. Only a site that directly follows a
    linear map can be compensated. Large learning rates make the old moments wrong however
    compensated; what changes in earlier layers is not compensated at all.
    Citation: Yao, Cao, Zheng, Huang & Lin (2021), Cross-Iteration Batch Normalization, CVPR,
    arXiv:2002.05712.

    Raises:
      UserError: compensation="taylor" without a linear map in front of the site; a window below 2;
        batch statistics over one single value; integer input; a mask or sets that do not fit.
    """
    if use == "running":
        return normalise(x, running, scale, bias, epsilon), running
    if compensation == "taylor" and (linear is None or running.mean_slope is None):
        raise UserError(
            "norm.cross_iteration.compensation=taylor needs the linear map that made the input of "
            "the norm, and this site does not directly follow one; choose "
            "norm.cross_iteration.compensation=none, or another norm here (norm.rules)"
        )
    sets, centred, own = batch_moments(x, running, scope=scope, mask=mask, on_single=on_single)
    past, updates = jax.lax.stop_gradient(_past(running, linear)), running.updates
    counts = (jnp.arange(window - 1) < updates) & (updates >= warm_up)
    centred, merged = _merge(centred, own, past, counts.astype(centred.dtype))
    y = sets.join(standardise(centred, merged.var, scale, bias, epsilon))

    batch, count = jax.lax.stop_gradient(whole_batch(sets, own)), sets.batch_count()
    fresh = {"recent_mean": batch.mean, "recent_var": batch.var}
    if compensation == "taylor":
        fresh |= _slopes(linear, x, batch.mean, scope, mask, count)
    new = averages.update(running, batch, count, decay=decay)
    return y, _remember(new, fresh, jnp.asarray(count > 0, updates.dtype))


def _merge(
    centred: jax.Array, own: Stats, past: Stats, weight: jax.Array
) -> tuple[jax.Array, Stats]:
    """``x - mean`` and statistics of the batch at hand and past ones of the given weights: mean of
    the means; mean of the variances plus variance of the means."""
    column = (-1, *(1,) * (own.mean.ndim - 1), past.mean.shape[-1])
    mean, var = (value.reshape(column) for value in past)
    weight = weight.reshape(-1, *(1,) * own.mean.ndim)
    total = 1 + weight.sum()
    shift = (weight * (mean - own.mean)).sum(0) / total
    merged = own.mean + shift
    var = own.var + jnp.square(shift) + (weight * (var + jnp.square(mean - merged))).sum(0)
    return centred - shift, Stats(merged, var / total)


def _past(running: History, linear: Any) -> Stats:
    """Moments of the past batches, ``[past, features]``, with the weights of now if the state has
    derivatives."""
    if running.mean_slope is None:
        return Stats(running.recent_mean, running.recent_var)
    kernel = wide(linear.kernel)
    moved = _along(running.mean_slope, kernel) - running.mean_along
    change = _along(running.var_slope, kernel) - running.var_along
    # E[x^2] to first order less the square of the mean to first order: the variance to first order
    # less the square of the change of the mean.
    var = running.recent_var + change - jnp.square(moved)
    return Stats(running.recent_mean + moved, jnp.maximum(var, 0))


def _along(slope: jax.Array, kernel: jax.Array) -> jax.Array:
    """``<slope, kernel>`` per output: over all axes of the kernel but the last."""
    return (slope * kernel).sum(tuple(range(slope.ndim - kernel.ndim, slope.ndim - 1)))


def _slopes(
    linear: Any, x: jax.Array, mean: jax.Array, scope: Scope, mask: Any, count: Any
) -> dict[str, jax.Array]:
    """Derivatives of mean and variance of the whole batch by the kernel, and those times the
    kernel. Each output depends on its own weights only, so one product gives all of them."""
    kernel, axes = linear.kernel, tuple(scope.axes())
    if axes:
        # Else the transpose of some modes would sum over devices, and that of others would not.
        kernel = jax.lax.pcast(kernel, axes, to="varying")
    _, pull = jax.vjp(linear.apply, kernel)
    ones = jnp.ones_like(x) if mask is None else align_mask(mask, x.shape) + jnp.zeros_like(x)
    twice = (2 * (wide(x) - mean) * wide(ones)).astype(x.dtype)
    slopes = tuple(wide(pull(cotangent)[0]) for cotangent in (ones, twice))
    if axes:
        slopes = jax.lax.psum(slopes, axes)
    slopes = jax.lax.stop_gradient(tuple(slope / jnp.maximum(count, 1) for slope in slopes))
    kernel = wide(jax.lax.stop_gradient(linear.kernel))
    along = [_along(slope, kernel) for slope in slopes]
    names = ("mean_slope", "var_slope", "mean_along", "var_along")
    return dict(zip(names, (*slopes, *along), strict=True))


def _remember(running: History, fresh: Mapping[str, jax.Array], some: jax.Array) -> History:
    """The state with the newest batch in the place of the oldest; as it was if ``some`` is 0."""
    past = len(running.recent_mean)
    slot = running.updates.astype(jnp.int32) % past

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        here = (jnp.arange(past) == slot).reshape(-1, *(1,) * new.ndim) & (some > 0)
        return jnp.where(here, new, old)

    written = {name: write(getattr(running, name), new) for name, new in fresh.items()}
    return running._replace(updates=running.updates + some.max(), **written)
