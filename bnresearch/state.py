"""The one pytree of a run."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Streams of random numbers that a run's seed is split into. Data has its own, in data/.
INIT, DROPOUT, NORM = 1, 2, 3


class State(struct.PyTreeNode):
    """Everything that changes during a run: what is not in here is not state.

    Attributes:
      step: optimizer steps taken, int32.
      params: parameters, float32.
      batch_stats: running statistics, float32.
      opt_state: of optax.
      meter: sums since the last log line, so that a resumed run logs what an untouched one does.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    meter: dict[str, jax.Array]


def empty_meter() -> dict[str, jax.Array]:
    """Sums of the loss and of the gradient norm over ``count`` steps, and whether a step was
    refused because its loss, gradient or statistics were not finite."""
    return {
        "loss": jnp.zeros((), jnp.float32),
        "gradient_norm": jnp.zeros((), jnp.float32),
        "count": jnp.zeros((), jnp.int32),
        "bad": jnp.zeros((), jnp.bool_),
    }


def stream(seed: jax.Array | int, name: int) -> jax.Array:
    """The random key of one of a run's streams."""
    return jax.random.fold_in(jax.random.key(seed), name)
