"""Statistics within one example: what the kinds without batch statistics share."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError
from bnresearch.sets import align_mask, masked_mean, wide


def prepared(x: jax.Array, mask: Any = None) -> tuple[jax.Array, jax.Array | None]:
    """x in float32 at least, and the mask (if any) with as many axes as x.

    Raises:
      UserError: x is not floating-point, or has no batch axis; or the mask does not fit.
    """
    if x.ndim < 2:
        raise UserError(f"a norm takes [batch, ..., features], not an input of shape {x.shape}")
    return wide(x), None if mask is None else align_mask(mask, x.shape)


def refuse_single(kind: str, shape: tuple[int, ...], values: int) -> None:
    """Refuses a mean and a variance over one value only."""
    if values == 1:
        raise UserError(
            f"norm.kind={kind} over one single value (input {tuple(shape)}): the output would not "
            "depend on the input; give it several positions, or several features per group, or "
            "use norm.kind=layer|rms"
        )


def values_in(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """How many values one mean over ``axes`` is taken over."""
    return math.prod(shape[axis] for axis in axes)


def _varying(mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array | None:
    """The mask, or None where it lets each set through as a whole or not at all: then it changes
    nothing for the sets that count, and sets that do not count keep statistics of their own."""
    if mask is None or all(mask.shape[axis] == 1 for axis in axes):
        return None
    return mask


def mean_square(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    """The mean of x^2 over ``axes`` (kept, of length 1); 1 where the mask lets no value through, so
    that dividing by its root stays finite."""
    mask = _varying(mask, axes)
    mean = masked_mean(jnp.square(x), axes, mask)
    return mean if mask is None else jnp.where(mask.any(axes, keepdims=True), mean, 1)


def centred_and_var(
    x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """``x - mean`` and the biased variance over ``axes``, in two passes."""
    centred = x - masked_mean(x, axes, _varying(mask, axes))
    return centred, mean_square(centred, axes, mask)


def grouped(x: jax.Array, groups: int, kind: str) -> jax.Array:
    """``[batch, ..., groups, features / groups]``.

    Raises:
      UserError: the number of features is no multiple of ``groups``.
    """
    features = x.shape[-1]
    if groups < 1 or features % groups:
        divisors = [n for n in range(1, features + 1) if features % n == 0]
        raise UserError(
            f"{kind} norm with norm.{kind}.groups={groups} on {features} features: they do not "
            f"divide; choose one of {', '.join(map(str, divisors))}"
        )
    return x.reshape(*x.shape[:-1], groups, features // groups)
