"""Batch normalization with a learned part around it that looks at each example."""

from typing import Any

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError
from bnresearch.kinds import starts
from bnresearch.kinds.batch import Activation, activated, affine, batch_norm
from bnresearch.kinds.grouped import beside_batch, of_groups, refuse
from bnresearch.kinds.within import prepared
from bnresearch.moments import scaled
from bnresearch.sets import Scope, Sets, Stats, align_mask, masked_mean


def conditional_start(features: int, options: Any) -> dict[str, jax.Array]:
    """The affine; for each part of it a matrix of zeros, ``[conditions, features]``."""
    start, conditions = starts.affine(features, options), options["conditions"]
    if conditions < 1:
        raise UserError(f"norm.conditional.conditions={conditions}: give at least 1")
    maps = {f"condition_{name}": jnp.zeros((conditions, features)) for name in start}
    return start | maps


def _from_condition(condition: Any, x: jax.Array, conditions: int) -> jax.Array:
    condition = jnp.asarray(condition)
    if condition.shape != (x.shape[0], conditions):
        raise UserError(
            f"the norm's condition has shape {condition.shape}, but {x.shape[0]} examples and "
            f"norm.conditional.conditions={conditions} want {(x.shape[0], conditions)}; give "
            "classes one-hot"
        )
    return condition.astype(jnp.promote_types(jnp.float32, x.dtype))


def _modulated(
    base: jax.Array | None, weights: jax.Array | None, condition: jax.Array | None, ndim: int
) -> jax.Array | None:
    """``base + condition @ weights``, broadcasting against an input of ``ndim`` axes."""
    if base is None or weights is None or condition is None:
        return base
    rows = base + jnp.dot(condition, weights, precision="highest")
    return rows.reshape(rows.shape[0], *(1,) * (ndim - 2), rows.shape[1])


def conditional_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    condition_scale: jax.Array | None,
    condition_bias: jax.Array | None,
    running: Stats,
    *,
    use: str,
    condition: Any = None,
    conditions: int = 10,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
    activation: Activation | None = None,
    add: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Conditional batch normalization (de Vries, Strub, Mary, Larochelle et al., 2017).

        y = (scale + c @ condition_scale) * (x - m) / sqrt(v + epsilon) + bias + c @ condition_bias

    Batch normalization whose scale and bias are affine functions of a side input c of each example,
    ``condition`` of shape ``[batch, conditions]``. x is ``[batch, ..., features]``; condition_scale
    and condition_bias are ``[conditions, features]`` and start at 0; scale, bias and the running
    mean and variance are ``[features]``; all float32.

    Training: with m and v of the set that the scope names, whatever the conditions in it; the
    running statistics move once, towards those of the whole batch.
    Inference: with the running statistics, which stay as they are, and the condition.
    Options: ``conditions``, the features of the side input: class-conditional for one-hot classes,
    FiLM (feature-wise linear modulation) for the output of a network. Without a condition, scale
    and bias are those of batch normalization. ``decay`` of the running statistics; ``on_single``
    error, warn or beta; ``scale`` and ``bias`` false to leave them out, with what conditions them.
    A mask leaves positions out of all statistics.
    Pitfalls: a config alone gives no condition: scale and bias are then the base ones for every
    example, and the matrices stay at 0. The statistics are shared by all conditions; where
    conditions shift the input, they have to undo that. A one-hot condition makes the base scale and
    bias redundant: only their sums with a row are determined. The paper computes c from language by
    a network with one hidden layer: here that network is the model's.
    Citation: de Vries, Strub, Mary, Larochelle, Pietquin & Courville (2017), Modulating Early
    Visual Processing by Language, NeurIPS, arXiv:1707.00683.

    Raises:
      UserError: a condition of another shape; statistics over one single value with
        ``on_single="error"``; integer input; a mask or sets that do not fit.
    """
    if condition is not None:
        condition = _from_condition(condition, x, conditions)
    scale = _modulated(scale, condition_scale, condition, x.ndim)
    bias = _modulated(bias, condition_bias, condition, x.ndim)
    return batch_norm(
        x,
        None,
        None,
        running,
        use=use,
        decay=decay,
        epsilon=epsilon,
        on_single=on_single,
        scope=scope,
        mask=mask,
        activation=lambda y: activated(affine(y, scale, bias), activation, add),
    )


def batch_instance_start(features: int, options: Any) -> dict[str, jax.Array]:
    """The affine; ``gate`` ones: batch normalization alone."""
    return starts.affine(features, options) | {"gate": jnp.ones(features)}


def _reflected(gate: jax.Array) -> jax.Array:
    """The gate as it is within [0, 1], and reflected at the ends.

    A clip has no gradient outside, and would hold a gate there that one step took too far; clipping
    the parameter after each step, as the paper does, is not the norm's to do.
    """
    gate = jnp.mod(gate, 2)
    return jnp.where(gate > 1, 2 - gate, gate)


def batch_instance_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    gate: jax.Array,
    running: Stats,
    *,
    use: str,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Batch-instance normalization (Nam & Kim, 2018).

        y = scale * (g * BN(x) + (1 - g) * IN(x)) + bias,  0 <= g <= 1

    A learned mixture, per feature, of batch normalization and of instance normalization (mean and
    variance of each feature of one example over its positions). x is ``[batch, ..., features]``
    with at least two positions; scale, bias, gate and the running mean and variance are
    ``[features]``, float32; gate starts at 1: all batch.

    Training: BN with the statistics of the set that the scope names; the running statistics move
    once, towards those of the whole batch.
    Inference: BN with the running statistics, which stay as they are; IN as in training.
    Options: ``decay`` of the running statistics; ``epsilon`` beside the variances; ``on_single``
    error, warn or beta; ``scale`` and ``bias`` false to leave them out. A mask leaves positions out
    of all statistics.
    Pitfalls: the paper clips the gate to [0, 1] after each step; here g is the gate reflected at 0
    and 1 (1.1 counts as 0.9), which needs nothing of the optimizer and never loses the gradient.
    Where clipping would stay at an end, it oscillates about it by about one step. The authors train
    gates with a larger learning rate; here it is that of all parameters. For ``[batch, features]``
    IN would be 0 whatever the input: refused.
    Citation: Nam & Kim (2018), Batch-Instance Normalization for Adaptively Style-Invariant Neural
    Networks, NeurIPS, arXiv:1805.07925.

    Raises:
      UserError: one single position; statistics over one single value with ``on_single="error"``;
        integer input; a mask or sets that do not fit.
    """
    refuse(x, x.shape[-1], "batch_instance", mask)

    def mixed(sets: Sets, instance: Stats, batch: Stats) -> jax.Array:
        instance = of_groups(sets, instance, x.shape[-1])
        g = _reflected(gate)
        of_batch = g * jax.lax.rsqrt(batch.var + epsilon)
        multiplier = of_batch + (1 - g) * jax.lax.rsqrt(instance.var + epsilon)
        # Both parts in one: centred at the example, whose mean no value is far away from.
        shift = of_batch * (instance.mean - batch.mean)
        scales, biases = affine(multiplier, scale, None), affine(shift, scale, bias)
        return scaled(sets, instance.mean, scales, biases)

    return beside_batch(
        x,
        running,
        mixed,
        use=use,
        how=dict(decay=decay),
        scope=scope,
        mask=mask,
        on_single=on_single,
    )


def representative_start(features: int, options: Any) -> dict[str, jax.Array]:
    """The affine; ``centre_weight`` and ``gate_weight`` zeros, ``gate_bias`` ones."""
    zeros, ones = jnp.zeros(features), jnp.ones(features)
    gate = {"centre_weight": zeros, "gate_weight": zeros, "gate_bias": ones}
    return starts.affine(features, options) | gate


def representative_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    centre_weight: jax.Array,
    gate_weight: jax.Array,
    gate_bias: jax.Array,
    running: Stats,
    *,
    use: str,
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Stats]:
    """Representative batch normalization (Gao, Han, Li, Cheng & Peng, 2021).

        y = scale * z * sigmoid(gate_weight * mean_z + gate_bias) + bias
        z = BN(x + centre_weight * mean_x)

    Batch normalization between two calibrations by the example's own means over positions, mean_x
    and mean_z. x is ``[batch, ..., features]``; all parameters and the running mean and variance
    (of ``x + centre_weight * mean_x``) are ``[features]``, float32; centre_weight and gate_weight
    start at 0, gate_bias at 1.

    Training: BN with the statistics of the set that the scope names; the running statistics move
    once, towards those of the whole batch.
    Inference: BN with the running statistics, which stay as they are; the calibrations as in
    training.
    Options: ``decay`` of the running statistics; ``epsilon`` beside the variance; ``on_single``
    error, warn or beta; ``scale`` and ``bias`` false to leave them out. A mask leaves positions out
    of all means.
    Pitfalls: at the start the output is sigmoid(1) = 0.73 times that of batch normalization. For
    ``[batch, features]`` the means are the values themselves.
    Citation: Gao, Han, Li, Cheng & Peng (2021), Representative Batch Normalization with Feature
    Calibration, CVPR.

    Raises:
      UserError: statistics over one single value with ``on_single="error"``; integer input; a mask
        or sets that do not fit.
    """
    wide, axes = prepared(x)[0], tuple(range(1, x.ndim - 1))
    aligned = None if mask is None else align_mask(mask, x.shape)
    calibrated = wide + centre_weight * masked_mean(wide, axes, aligned)
    z, new = batch_norm(
        calibrated,
        None,
        None,
        running,
        use=use,
        decay=decay,
        epsilon=epsilon,
        on_single=on_single,
        scope=scope,
        mask=mask,
    )
    gate = jax.nn.sigmoid(gate_weight * masked_mean(z, axes, aligned) + gate_bias)
    return affine(z * gate, scale, bias).astype(x.dtype), new
