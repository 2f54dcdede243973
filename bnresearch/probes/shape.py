"""How the inputs of sites are distributed, and which of their outputs are dead."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bnresearch.sets import align_mask, masked_mean, wide
from bnresearch.watch import Seen, Watch

if TYPE_CHECKING:
    from bnresearch.probes.inside import Inside, View


def activations(inside: "Inside") -> dict[str, dict[str, float]]:
    """Shape, rank and dead units of each site's activations in a batch (Bjorck et al., 2018).

        mean_over_std: sqrt(sum over features of m^2 / sum over features of v)
        skewness:      mean over features of E[(x - m)^3] / v^(3/2)
        kurtosis:      mean over features of E[(x - m)^4] / v^2 - 3
        rank:          tr(C)^2 / ||C||_F^2, C the covariance over features
        dead:          share of features

    All but ``dead`` are about the input x of the site, before anything is normalised, so that they
    can be compared between kinds of norm, none included; moments of a feature are over the batch
    and all positions. Features without variance are left out of skewness and kurtosis.

    ``rank`` is the participation rank: how many directions share the variance, from 1 to the number
    of features (Daneshmand et al., 2020).

    ``dead`` is about the output, with the activation and the addition that the site was handed: a
    feature is dead that has the same value at every example and position, or, where an activation
    belongs to the site, is nowhere above 0.
    """
    seen = jax.device_get(inside(shapes))
    return {path: seen[path] for path in inside.sites}


def shapes(view: "View") -> dict[str, dict[str, Any]]:
    applied = view.apply(Watch(observe=shape_of))
    return {path: calls[0] for path, calls in applied.seen.items()}


def shape_of(seen: Seen) -> dict[str, jax.Array]:
    """The quantities of `activations` at one call of a norm."""
    x, axes = wide(seen.x), tuple(range(seen.x.ndim - 1))
    mask = None if seen.mask is None else align_mask(seen.mask, x.shape)
    mean = masked_mean(x, axes, mask)
    centred = x - mean if mask is None else jnp.where(mask, x - mean, 0)
    square = jnp.square(centred)
    var = masked_mean(square, axes, mask)
    there = var > 0
    safe = jnp.where(there, var, 1)

    def over_features(values: jax.Array) -> jax.Array:
        return jnp.where(there, values, 0).sum() / jnp.maximum(there.sum(), 1)

    return {
        "mean_over_std": jnp.sqrt(jnp.square(mean).sum() / jnp.maximum(var.sum(), 1e-37)),
        "skewness": over_features(masked_mean(square * centred, axes, mask) / safe**1.5),
        "kurtosis": over_features(masked_mean(jnp.square(square), axes, mask) / safe**2 - 3),
        "rank": participation_rank(centred.reshape(-1, x.shape[-1])),
        "dead": dead(seen, mask),
    }


def participation_rank(centred: jax.Array) -> jax.Array:
    """tr(C)^2 / ||C||_F^2 for C = centred^T centred, ``[rows, features]``; 0 where C is 0."""
    x = centred / jnp.maximum(jnp.abs(centred).max(), 1e-37)  # so that no square overflows
    # x^T x and x x^T have the same trace and norm: the smaller one is made.
    x = x if x.shape[0] < x.shape[1] else x.T
    gram = jnp.matmul(x, x.T, precision="highest")
    return jnp.square(jnp.trace(gram)) / jnp.maximum(jnp.square(gram).sum(), 1e-37)


def dead(seen: Seen, mask: jax.Array | None) -> jax.Array:
    """The share of features of the output that are dead, see `activations`."""
    axes, where = tuple(range(seen.y.ndim - 1)), True if mask is None else mask
    high = jnp.max(seen.y, axes, where=where, initial=-jnp.inf)
    low = jnp.min(seen.y, axes, where=where, initial=jnp.inf)
    constant = high == low
    followed = getattr(seen.module, "activation_follows", False)
    return (constant | (high <= 0) if followed else constant).mean(dtype=jnp.float32)
