"""What parameters and running statistics start from, for the kinds that need nothing special."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnresearch.sets import Stats


def affine(features: int, options: Mapping[str, Any]) -> dict[str, jax.Array]:
    """``scale`` ones and ``bias`` zeros, ``[features]``; each only if its option is not False."""
    start = {"scale": jnp.ones(features), "bias": jnp.zeros(features)}
    return {name: value for name, value in start.items() if options.get(name, True)}


def stats(features: int, options: Mapping[str, Any]) -> Stats:
    """Mean 0 and variance 1, ``[features]``."""
    return Stats(jnp.zeros(features), jnp.ones(features))
