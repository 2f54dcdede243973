"""Kinds between batch norm and the norms of one example."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError
from bnresearch.kinds import starts
from bnresearch.kinds.batch import Standard, affine, moved, single_value, standardise
from bnresearch.kinds.grouped import beside_batch, lean, of_groups
from bnresearch.moments import moments, scaled
from bnresearch.sets import Scope, Sets, Stats, pool


def switchable_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The affine; ``mean_logits`` and ``var_logits`` ones, ``[3]``: instance, layer, batch."""
    logits = {name: jnp.ones(3) for name in ("mean_logits", "var_logits")}
    return starts.affine(features, options) | logits


def switchable_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean_logits: jax.Array,
    var_logits: jax.Array,
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
) -> tuple[jax.Array, Any]:
    """Switchable normalization (Luo, Ren, Peng, Zhang & Li, 2018).

        y = scale * (x - sum_k p_k m_k) / sqrt(sum_k q_k v_k + epsilon) + bias

    k runs over instance, layer and batch: m_k and v_k are mean and biased variance of each feature
    of an example, of the example, of each feature over the batch (or the sets of the scope). p and
    q are the softmax of ``mean_logits`` and ``var_logits``, ``[3]``, learned. With one position
    only (``[batch, features]``) instance statistics are undefined and p and q are over the other
    two. x is ``[batch, ..., features]``; scale, bias and the running mean and variance (of the
    batch part) are ``[features]``, float32.

    Training: as above.
    Inference: the batch part with the running statistics, the others as in training.
    Options: those of batch norm, for its part (``decay``, ``correction``, ``variance``,
    ``stat_dtype``, ``average``, ``window``, ``track``, ``on_single``); ``scale`` and ``bias`` false
    to leave them out. A mask leaves positions out of all statistics.
    Pitfalls: a mixture of variances is not the variance of anything: it ignores that the means
    differ. The output of an example has mean 0 and variance 1 over nothing in particular. Public
    code takes unbiased variances, and starts the running variance at 0; here they are biased, and
    it starts at 1.
    Citation: Luo, Ren, Peng, Zhang & Li (2018), Differentiable Learning-to-Normalize via Switchable
    Normalization, ICLR 2019, arXiv:1806.10779.

    Raises:
      UserError: batch statistics over one single value with ``on_single="error"``; integer input; a
        mask or sets that do not fit; an unknown option value.
    """

    def mixed(sets: Sets, instance: Stats, batch: Stats) -> jax.Array:
        parts = [of_groups(sets, instance, 1), batch]
        if math.prod(x.shape[1:-1]) > 1:
            parts.insert(0, of_groups(sets, instance, x.shape[-1]))
        logits = jnp.stack([mean_logits, var_logits])[:, -len(parts) :]
        p, q = jax.nn.softmax(logits, axis=-1)
        # As the weights add to 1, it is enough to mix the means' distances from one of them.
        first = parts[0].mean
        mean = first + sum(w * (part.mean - first) for w, part in zip(p, parts, strict=True))
        var = sum(w * part.var for w, part in zip(q, parts, strict=True))
        return scaled(sets, *Standard(scale, bias, epsilon)(Stats(mean, var)))

    return beside_batch(
        x,
        running,
        mixed,
        use=use,
        how=dict(decay=decay, correction=correction, average=average, track=track),
        scope=scope,
        mask=mask,
        variance=variance,
        stat_dtype=stat_dtype,
        on_single=on_single,
    )


def _channels(features: int, features_per_group: int) -> int:
    size = features_per_group or features
    if size < 1 or features % size:
        divisors = [n for n in range(1, features + 1) if features % n == 0]
        raise UserError(
            f"norm.batch_group.features_per_group={features_per_group} on {features} features: "
            f"they do not divide; choose 0 (all) or one of {', '.join(map(str, divisors))}"
        )
    return size


def _grouped_scope(scope: Scope, examples: int, examples_per_group: int) -> Scope:
    """The scope in which each set is a group of examples of this device."""
    if examples_per_group == 0:
        return scope
    per_set = examples // scope.splits
    if examples_per_group < 1 or per_set % examples_per_group:
        raise UserError(
            f"norm.batch_group.examples_per_group={examples_per_group} on {per_set} examples of a "
            "set on this device: they do not divide; choose 0 (all) or a divisor"
        )
    axes = tuple(sorted(scope.axes())) or None
    return Scope(pool=axes, splits=examples // examples_per_group)


def batch_group_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Any,
    *,
    use: str,
    examples_per_group: int = 0,
    features_per_group: int = 1,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    correction: int = 0,
    variance: str = "two_pass",
    stat_dtype: str = "float32",
    average: str = "ema",
    track: str = "second_moment",
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Any]:
    """Batch group normalization (Summers & Dinneen, 2020).

        y = scale * (x - m) / sqrt(v + epsilon) + bias

    m and v are mean and biased variance over groups of ``examples_per_group`` contiguous examples
    times ``features_per_group`` contiguous features, and all positions. x is ``[batch, ...,
    features]``; scale, bias and the running mean and variance are ``[features]``, float32.

    =============  ==================  ==================
    corner case    examples_per_group  features_per_group
    =============  ==================  ==================
    batch          0                   1
    ghost batch    k                   1
    group          1                   k
    layer          1                   0
    instance       1                   1
    =============  ==================  ==================

    Training: as above. The running mean and E[x^2] (kept as a variance, which does not cancel) of
    each feature move towards those of the whole batch.
    Inference: with the running moments, averaged over the features of a group. With
    ``examples_per_group=1`` as in training: then no example needs another one.
    Options: ``examples_per_group`` (0: all of the set that the scope names) and
    ``features_per_group`` (0: all); the others as in batch norm (``decay``, ``correction``,
    ``variance``, ``stat_dtype``, ``average``, ``window``, ``track``, ``on_single``, ``scale``,
    ``bias``). A mask leaves positions out of all statistics.
    Pitfalls: the default is batch norm. With ``examples_per_group=1`` inference takes the example
    itself, unlike the authors' code, which takes moving averages there, too. Groups of examples do
    not reach over devices: the examples of a device must be a multiple. The running variance is
    over features and batches what a group is normalised with only if groups are large.
    Citation: Summers & Dinneen (2020), Four Things Everyone Should Know to Improve Batch
    Normalization, ICLR, arXiv:1906.03548.

    Raises:
      UserError: groups that do not divide examples or features; statistics over one single value
        with ``on_single="error"``; integer input; a mask or sets that do not fit; an unknown option
        value.
    """
    channels = _channels(x.shape[-1], features_per_group)
    if use == "running" and examples_per_group != 1:
        y = _with_running(Sets(x).x, running, channels, epsilon)
        return affine(y.reshape(x.shape), scale, bias).astype(x.dtype), running
    inner = _grouped_scope(Scope() if use == "running" else scope, len(x), examples_per_group)
    own = Sets(x, inner, mask, stat_dtype)
    if channels == 1:
        single_value(own, x.shape, on_single)

    @lean
    def body(x: jax.Array) -> tuple[jax.Array, Stats]:
        sets = Sets(x, inner, mask, stat_dtype)
        stats = moments(sets, variance)
        vectors = Standard(scale, bias, epsilon)
        groups = of_groups(sets, stats, x.shape[-1] // channels)
        return scaled(sets, *vectors(groups)).astype(x.dtype), stats

    y, stats = body(x)
    if use == "running":
        return y, running
    how = dict(decay=decay, correction=correction, average=average, track=track)
    return y, moved(running, own, stats, **how)


def _with_running(x: jax.Array, running: Any, channels: int, epsilon: Any) -> jax.Array:
    """x with the running moments of its groups of channels, ``[..., groups, channels]``."""
    cut = (running.mean.reshape(-1, channels).T, running.var.reshape(-1, channels).T)
    stats = pool(Stats(*cut))
    centred = x.reshape(*x.shape[:-1], -1, channels) - stats.mean[:, None]
    return standardise(centred, stats.var[:, None], None, None, epsilon)


@jax.custom_jvp
def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.maximum(a, b)


@_larger.defjvp
def _larger_jvp(primals: Any, tangents: Any) -> Any:
    """With a factor of 0 or 1: the choices between arrays in jax's own rule make XLA on CPU write
    half a dozen arrays to memory. Where both are equal, it is the second."""
    (a, b), (ta, tb) = primals, tangents
    return _larger(a, b), tb + (a > b).astype(a.dtype) * (ta - tb)


def evonorm_b0_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The affine; ``v`` ones, ``[features]``."""
    return starts.affine(features, options) | {"v": jnp.ones(features)}


def evonorm_b0(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    v: jax.Array,
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
    activates: bool = True,
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Any]:
    """EvoNorm-B0 (Liu, Brock, Simonyan & Le, 2020).

        y = scale * x / max(sqrt(batch_var + epsilon), v * x + sqrt(instance_var + epsilon)) + bias

    batch_var is the biased variance of each feature over the batch (or the sets of the scope),
    instance_var that of each feature of one example over its positions (0 where there is one); the
    input itself is not centred. x is ``[batch, ..., features]``; scale and v (ones), bias (zeros)
    and the running mean and variance are ``[features]``, float32.

    Training: as above. It is its own activation: the model leaves its activation out.
    Inference: batch_var is the running variance; the running mean is kept beside it, and not used.
    Options: those of batch norm (``decay``, ``correction``, ``variance``, ``stat_dtype``,
    ``average``, ``window``, ``track``, ``on_single``, ``scale``, ``bias``). timm has epsilon 1e-3
    and an unbiased running variance. A mask leaves positions out of both variances.
    Pitfalls: where no activation belongs (``activates=False``) the denominator is that of the batch
    alone, and v has no gradient. An offset much larger than the deviation is blown up.
    Citation: Liu, Brock, Simonyan & Le (2020), Evolving Normalization-Activation Layers, NeurIPS,
    arXiv:2004.02967.

    Raises:
      UserError: batch statistics over one single value with ``on_single="error"``; integer input; a
        mask or sets that do not fit; an unknown option value.
    """

    def divided(sets: Sets, instance: Stats, batch: Stats) -> jax.Array:
        deviation = jnp.sqrt(batch.var + epsilon)
        if activates:
            deviation = _larger(v * sets.x + jnp.sqrt(instance.var + epsilon), deviation)
        return affine(sets.x / deviation, scale, bias)

    return beside_batch(
        x,
        running,
        divided,
        use=use,
        how=dict(decay=decay, correction=correction, average=average, track=track),
        scope=scope,
        mask=mask,
        variance=variance,
        stat_dtype=stat_dtype,
        on_single=on_single,
    )
