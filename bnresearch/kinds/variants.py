"""Batch normalization with other sets, other running statistics, or a penalty on them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError
from bnresearch.kinds import starts
from bnresearch.kinds.batch import (
    Activation,
    Standard,
    Vectors,
    affine,
    batch_norm,
    moved,
    normalise,
    normalised,
)
from bnresearch.sets import Scope, Stats, whole_batch


def _ghosts(scope: Scope, examples: int, size: int) -> Scope:
    """The scope whose sets are ``size`` neighbouring examples, never merged over devices."""
    share = examples // scope.splits
    if size < 1 or size > share or share % size:
        raise UserError(
            f"norm.ghost.size={size} does not divide the {share} examples that are normalised "
            "together here; give a divisor of them, or another data.batch_size or norm.scope"
        )
    pool = tuple(sorted(scope.axes())) or None
    return dataclasses.replace(
        scope,
        merge=None,
        merge_groups=None,
        pool=pool,
        splits=examples // size,
        parts=1,
    )


def ghost_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Any,
    *,
    use: str,
    size: int = 32,
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
    """Ghost batch normalization (Hoffer, Hubara & Soudry, 2017).

        y = scale * (x - m_g) / sqrt(v_g + epsilon) + bias,  g = ghost batch of size examples

    Batch normalization in which ``size`` neighbouring examples share statistics, however large the
    batch is and on however many devices: sets are never merged over devices. x is ``[batch, ...,
    features]``; scale, bias and the running mean and variance are ``[features]``, float32.

    Training: each ghost batch with its own m and v. The running statistics move once per step,
    towards those of the whole batch on all devices (mean of the means; mean of the variances plus
    variance of the means): with them evaluation sees the population, not a ghost batch, and decay
    means the same for every size. Moving them once per ghost batch, as some codes do, makes decay
    depend on their number; averaging the variances alone misses that between ghost batches.
    Inference: normalises with the running mean and variance, which stay as they are.
    Options: ``size`` in examples; ``decay``, ``correction``, ``variance``, ``stat_dtype``,
    ``average`` (``window``), ``track``, ``on_single``, ``scale`` and ``bias`` as for batch
    normalization.
    Pitfalls: examples are taken in their order in the batch: with sorted data a ghost batch sees
    few classes. A batch of one ghost size is plain batch normalization.
    Citation: Hoffer, Hubara & Soudry (2017), Train Longer, Generalize Better: Closing the
    Generalization Gap in Large Batch Training of Neural Networks, NeurIPS, arXiv:1705.08741.

    Raises:
      UserError: a size that exceeds or does not divide the examples; and as batch normalization.
    """
    return batch_norm(
        x,
        scale,
        bias,
        running,
        use=use,
        decay=decay,
        epsilon=epsilon,
        correction=correction,
        variance=variance,
        stat_dtype=stat_dtype,
        average=average,
        track=track,
        on_single=on_single,
        scope=scope if use == "running" else _ghosts(scope, x.shape[0], size),
        mask=mask,
        activation=activation,
        add=add,
    )


class Renormed(NamedTuple):
    """``mean`` and ``var`` (``[features]``), and how often they moved. ``var + epsilon`` is the
    square of the average deviation, not an average of variances."""

    mean: jax.Array
    var: jax.Array
    updates: jax.Array


def renorm_state(features: int, options: Any) -> Renormed:
    return Renormed(*starts.stats(features, options), jnp.zeros(()))


def renorm_update(
    running: Renormed, batch: Stats, count: Any, *, decay: Any, epsilon: Any
) -> Renormed:
    """Mean and deviation move towards the batch's; an empty batch moves nothing."""
    some = jnp.asarray(count > 0, jnp.float32)
    rate = (1 - decay) * some
    old, new = jnp.sqrt(running.var + epsilon), jnp.sqrt(batch.var + epsilon)
    step = rate * (new - old)
    return Renormed(
        (1 - rate) * running.mean + rate * batch.mean,
        jnp.maximum(running.var + step * (2 * old + step), 0),  # (old + step)^2 - epsilon
        running.updates + some.max(),  # per feature, with a mask
    )


def _ramp(updates: jax.Array, start: int, end: int) -> jax.Array:
    """0 before ``start`` updates, 1 from ``end`` on, in between linear."""
    rise = jnp.clip((updates - start) / max(end - start, 1), 0, 1)
    return jnp.where(updates >= max(start, end), 1.0, rise)


def renorm_limits(
    updates: jax.Array, r_max: Any, d_max: Any, warm_up: int, r_ramp: int, d_ramp: int
) -> tuple[jax.Array, jax.Array]:
    """How far r and d may go at the step after ``updates`` steps; 1 and 0: batch normalization."""
    r_share, d_share = _ramp(updates, warm_up, r_ramp), _ramp(updates, warm_up, d_ramp)
    r_limit = jnp.where(r_share > 0, 1 + r_share * (r_max - 1), 1)  # also for infinite maxima
    return r_limit, jnp.where(d_share > 0, d_share * d_max, 0)


def batch_renorm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Renormed,
    *,
    use: str,
    r_max: Any = 3.0,
    d_max: Any = 5.0,
    warm_up: int = 5000,
    r_ramp: int = 40000,
    d_ramp: int = 25000,
    decay: Any = 0.99,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Renormed]:
    """Batch renormalization (Ioffe, 2017).

        y = scale * ((x - m) / s * r + d) + bias
        r = clip(sg(s / rs)),  d = clip(sg((m - rm) / rs))

    s = sqrt(v + epsilon) is the deviation of the set that the scope names, rm and rs are the
    running mean and deviation; r is clipped to [1/r_max, r_max], d to [-d_max, d_max]. Unclipped, y
    is the output of inference, but the gradient flows through m and s as in batch normalization;
    none flows through r and d (sg: stop gradient). x is ``[batch, ..., features]``; scale, bias and
    the running mean and var are ``[features]``, and ``updates`` counts steps, all float32.

    Training: as above, with the running statistics of before this batch; then they move once,
    towards mean and deviation of the whole batch: rs, not its square, is averaged (the paper), and
    ``var`` holds ``rs^2 - epsilon``.
    Inference: ``scale * (x - rm) / rs + bias``; nothing moves.
    Options: the first ``warm_up`` steps are plain batch normalization; from there the limits grow
    linearly to ``r_max`` at step ``r_ramp`` and to ``d_max`` at step ``d_ramp``; maxima of 1e30
    clip nothing (as keras by default). ``decay`` of the running statistics; ``on_single``
    error, warn or beta; ``scale`` and ``bias`` false to leave them out. A mask leaves positions out
    of all statistics.
    Pitfalls: the schedule is the paper's, for long training: in a short run scale it, or all of it
    is plain batch normalization. A decay near 1 leaves rm and rs behind early in training. With
    changed epsilon, old running statistics mean another deviation. keras starts its deviation at 1,
    this one at sqrt(1 + epsilon).
    Citation: Ioffe (2017), Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models, NeurIPS, arXiv:1702.03275.

    Raises:
      UserError: r_max below 1 or d_max below 0; statistics over one single value with
        ``on_single="error"``; integer input; a mask or sets that do not fit.
    """
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not isinstance(value, jax.core.Tracer) and value < least:
            raise UserError(f"norm.renorm.{name}={value} clips everything; give at least {least}")
    if use == "running":
        return normalise(x, running, scale, bias, epsilon, activation, add), running
    r_limit, d_limit = renorm_limits(running.updates, r_max, d_max, warm_up, r_ramp, d_ramp)

    def vectors(stats: Stats) -> Vectors:
        deviation, usual = jnp.sqrt(stats.var + epsilon), jnp.sqrt(running.var + epsilon)
        r = jnp.clip(deviation / usual, 1 / r_limit, r_limit)
        d = jnp.clip((stats.mean - running.mean) / usual, -d_limit, d_limit)
        r, d = jax.lax.stop_gradient((r, d))
        return stats.mean, affine(r / deviation, scale, None), affine(d, scale, bias)

    y, sets, stats = normalised(
        x,
        running,
        vectors,
        scope=scope,
        mask=mask,
        on_single=on_single,
        activation=activation,
        add=add,
    )
    batch, count = whole_batch(sets, stats), sets.batch_count()
    return y, renorm_update(running, batch, count, decay=decay, epsilon=epsilon)


def frozen_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    epsilon: Any = 1e-5,
    trainable: bool = True,
) -> tuple[jax.Array, Stats]:
    """Frozen batch normalization (Wu, Kirillov, Massa, Lo & Girshick, 2019).

        y = scale * (x - rm) / sqrt(rv + epsilon) + bias

    The inference form of batch normalization, in training too: a fixed affine map per feature, for
    pretrained statistics (0 and 1 where there are none). x is ``[batch, ..., features]``; scale,
    bias and the constants rm and rv (``mean`` and ``var``) are ``[features]``, float32.

    Training: as above; nothing moves, no example sees another one, and ``dx = scale / sqrt(rv +
    epsilon) * dy`` has no batch terms.
    Inference: the same.
    Options: ``epsilon`` added to rv; ``trainable`` false keeps scale and bias from being trained,
    too (no gradient reaches them), which is Detectron2's FrozenBatchNorm2d: frozen statistics and a
    frozen affine are two switches here. ``scale`` and ``bias`` false leave them out.
    Pitfalls: weight decay moves parameters that get no gradient; leave norms out of it. With the
    start values it normalises nothing.
    Citation: Wu, Kirillov, Massa, Lo & Girshick (2019), Detectron2 (FrozenBatchNorm2d), software;
    common practice in detection before.

    Raises:
      UserError: integer input.
    """
    if not trainable:
        scale, bias = jax.lax.stop_gradient((scale, bias))
    return normalise(x, running, scale, bias, epsilon), running


def extended_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Extended batch normalization (Luo, Zhan, Wang & Gao, 2020).

        y = scale * (x - m) / sqrt(mean_features(v) + epsilon) + bias

    m is the mean of each feature over the set that the scope names, as in batch normalization; the
    variance about it is averaged over the features too, so that few examples suffice for it. x is
    ``[batch, ..., features]``; scale, bias and the running mean and variance (of each feature) are
    ``[features]``, float32.

    Training: with m and v of the batch; the running statistics move once, towards those of the
    whole batch.
    Inference: with the running mean, and the running variance averaged over the features; nothing
    moves.
    Options: ``decay`` of the running statistics; ``on_single`` error, warn or beta; ``scale`` and
    ``bias`` false to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: features keep their relative scales: the invariance to the scale of the weights before
    it holds for all rows at once only. That the variance is taken about each feature's own mean is
    our reading of the paper.
    Citation: Luo, Zhan, Wang & Gao (2020), Extended Batch Normalization, arXiv:2003.05569.

    Raises:
      UserError: statistics over one single value with ``on_single="error"``; integer input; a mask
        or sets that do not fit.
    """
    if use == "running":
        shared = running._replace(var=running.var.mean())
        return normalise(x, shared, scale, bias, epsilon, activation, add), running
    vectors = Standard(scale, bias, epsilon)
    y, sets, stats = normalised(
        x,
        running,
        lambda stats: vectors(stats._replace(var=stats.var.mean(-1, keepdims=True))),
        scope=scope,
        mask=mask,
        on_single=on_single,
        activation=activation,
        add=add,
    )
    return y, moved(running, sets, stats, decay=decay)


def regularized_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    mean_penalty: Any = 0.01,
    std_penalty: Any = 0.01,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Stats, jax.Array]:
    """Regularized batch normalization (Wang, Wu & Huang, 2022).

        y = BN(x),  loss += sum(mean_penalty * (m - rm)^2 + std_penalty * (s - rs)^2)

    Batch normalization whose loss grows by the distance between the statistics of training and of
    inference, summed over the features (s = sqrt(v + epsilon), rs the same of the running
    variance). x is ``[batch, ..., features]``; scale, bias and the running mean and variance are
    ``[features]``, float32.

    Training: normalises with m and v of the set that the scope names. The penalty takes the running
    statistics of before this batch, as constants; with several sets it is their mean. Then the
    running statistics move once, towards those of the whole batch.
    Inference: normalises with the running statistics, which stay as they are; the penalty is 0.
    Options: ``mean_penalty`` and ``std_penalty``; ``decay`` of the running statistics;
    ``on_single`` error, warn or beta; ``scale`` and ``bias`` false to leave them out. A mask leaves
    positions out of all statistics.
    Pitfalls: the penalty is not invariant to the scale of the weights before it and so acts on
    their norm, too. This is the form ``diff2`` of the authors' code, one of seven there; it takes
    the running statistics after the update: a penalty smaller by decay^2. Their weights depend on
    the task; the defaults here are ours.
    Citation: Wang, Wu & Huang (2022), Understanding the Failure of Batch Normalization for
    Transformers in NLP, NeurIPS, arXiv:2210.05153.

    Returns:
      y, the new running statistics, and the penalty, which joins the loss.

    Raises:
      UserError: statistics over one single value with ``on_single="error"``; integer input; a mask
        or sets that do not fit.
    """
    if use == "running":
        return normalise(x, running, scale, bias, epsilon, activation, add), running, jnp.zeros(())
    y, sets, stats = normalised(
        x,
        running,
        Standard(scale, bias, epsilon),
        scope=scope,
        mask=mask,
        on_single=on_single,
        activation=activation,
        add=add,
    )
    deviation = jnp.sqrt(stats.var + epsilon) - jnp.sqrt(running.var + epsilon)
    distance = mean_penalty * jnp.square(stats.mean - running.mean)
    penalty = sets.batch_mean(distance + std_penalty * jnp.square(deviation)).sum()
    return y, moved(running, sets, stats, decay=decay), penalty
