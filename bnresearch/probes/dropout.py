"""What dropout does to the variance that a norm sees."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from bnresearch.moments import moments
from bnresearch.sets import Scope, Sets, whole_batch
from bnresearch.watch import Seen, Watch

if TYPE_CHECKING:
    from bnresearch.probes.inside import Inside, View


def dropout_shift(inside: "Inside") -> dict[str, dict[str, float]]:
    """Variance of a site's input without dropout over that with dropout (Li et al., 2019).

        ratio: sum over features of v without / sum over features of v with

    Both are of the training batch of this step, and all norms take their batch statistics in both:
    what differs is dropout alone. Training sees the one variance, inference the other: at 1 a norm
    behind dropout is right in inference; (pi - 1) / (pi / p - 1) directly behind ReLU of a standard
    normal and dropout that keeps a share p.
    """
    seen = jax.device_get(inside(ratios))
    return {path: {"ratio": float(seen[path])} for path in inside.sites}


def ratios(view: "View") -> dict[str, jax.Array]:
    """The ratio at every site."""
    watch = Watch(use="batch", observe=total_variance)
    without, trained = view.apply(watch, train=False).seen, view.apply(watch).seen
    return {
        path: without[path][0]["var"] / jnp.maximum(calls[0]["var"], 1e-37)
        for path, calls in trained.items()
    }


def total_variance(seen: Seen) -> dict[str, jax.Array]:
    """The variance of the input, summed over features."""
    sets = Sets(seen.x, Scope(), seen.mask)
    return {"var": whole_batch(sets, moments(sets)).var.sum()}
