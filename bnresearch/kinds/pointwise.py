"""Squashing functions in the place of a normaliser: each value for itself, no statistics at all."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnresearch.kinds import starts
from bnresearch.kinds.batch import affine
from bnresearch.kinds.within import prepared


def dyt_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The affine; ``alpha``, one number, the option ``alpha_start``."""
    alpha = jnp.asarray(options.get("alpha_start", 0.5), jnp.float32)
    return starts.affine(features, options) | {"alpha": alpha}


def dyt(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, alpha: jax.Array
) -> jax.Array:
    """Dynamic tanh (Zhu, Chen, He, LeCun & Liu, 2025).

        y = scale * tanh(alpha * x) + bias

    Each value for itself, in float32. x is ``[batch, ..., features]``; scale and bias are
    ``[features]``, alpha is one number, float32. Nothing is averaged and nothing is kept.

    Training: as above.
    Inference: the same.
    Options: ``alpha_start``, what alpha starts from: 0.5; the paper wants less in wide language
    models.
    Pitfalls: not invariant to the scale of the weights before it, as norms are: large inputs
    saturate, and with them the gradient ends.
    Citation: Zhu, Chen, He, LeCun & Liu (2025), Transformers without Normalization, CVPR,
    arXiv:2503.10622.

    Raises:
      UserError: integer input.
    """
    return affine(jnp.tanh(alpha * prepared(x)[0]), scale, bias).astype(x.dtype)


def derf_start(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """As `dyt_start`; ``shift``, one number, 0."""
    return dyt_start(features, options) | {"shift": jnp.zeros(())}


def derf(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    alpha: jax.Array,
    shift: jax.Array,
) -> jax.Array:
    """Dynamic erf (Chen, Lu, Zhu, Sun & Liu, 2025).

        y = scale * erf(alpha * x + shift) + bias

    Each value for itself, in float32; ``erf(z) = 2 Phi(sqrt(2) z) - 1`` with Phi the normal
    distribution function. x is ``[batch, ..., features]``; scale and bias are ``[features]``, alpha
    and shift (0) are one number each, float32. Nothing is averaged and nothing is kept.

    Training: as above.
    Inference: the same.
    Options: ``alpha_start``, what alpha starts from: 0.5.
    Pitfalls: as for dynamic tanh; erf saturates faster.
    Citation: Chen, Lu, Zhu, Sun & Liu (2025), Stronger Normalization-Free Transformers,
    arXiv:2512.10938.

    Raises:
      UserError: integer input.
    """
    y = jax.lax.erf(alpha * prepared(x)[0] + shift)
    return affine(y, scale, bias).astype(x.dtype)
