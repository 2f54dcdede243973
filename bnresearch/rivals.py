"""Normalisers without batch statistics: one example at a time, in training as in evaluation."""

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError

LAYER_NORM_OVER = ("example", "features")


def _standardise(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    """``(x - mean) / sqrt(var + epsilon)`` over ``axes``, in float32, two passes."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + epsilon)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, over: str
) -> jax.Array:
    """Layer Normalization (Ba, Kiros & Hinton, 2016).

    ``y = scale * (x - m) / sqrt(v + epsilon) + bias`` with mean m and biased variance v of each
    example. x is ``[batch, ..., features]``; scale and bias are ``[features]``.

    ``over="example"`` takes m and v over all axes but the batch (the layer norm of the
    convolutional literature, group norm with one group: Wu & He, 2018); ``over="features"`` over
    the last axis only (that of transformers). Both are the same for ``[batch, features]``.
    """
    if over not in LAYER_NORM_OVER:
        raise UserError(f"unknown norm.layer.over {over!r}; choose one of {LAYER_NORM_OVER}")
    axes = tuple(range(1, x.ndim)) if over == "example" else (x.ndim - 1,)
    return (_standardise(x, axes, epsilon) * scale + bias).astype(x.dtype)


def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, groups: int
) -> jax.Array:
    """Group Normalization (Wu & He, 2018).

    The features are cut into ``groups`` contiguous groups; each example's group is standardised
    over its features and all positions, then ``scale`` and ``bias`` (``[features]``) are applied.

    Raises:
      UserError: the number of features is no multiple of ``groups``.
    """
    features = x.shape[-1]
    if groups < 1 or features % groups:
        divisors = [n for n in range(1, features + 1) if features % n == 0]
        raise UserError(
            f"group norm with norm.group.groups={groups} on {features} features: they do not "
            f"divide; choose one of {', '.join(map(str, divisors))}"
        )
    grouped = x.reshape(*x.shape[:-1], groups, features // groups)
    axes = (*range(1, x.ndim - 1), x.ndim)
    y = _standardise(grouped, axes, epsilon).reshape(x.shape)
    return (y * scale + bias).astype(x.dtype)


def identity(x: jax.Array) -> jax.Array:
    """No normalisation. (The layer puts the bias back that a norm would have made needless.)"""
    return x
