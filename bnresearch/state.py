"""The one pytree of a run."""

from typing import Any

import jax
import numpy as np
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
      average: of the weights (`average.start`); {} where the run keeps none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    meter: dict[str, jax.Array]
    average: Any = struct.field(default_factory=dict)


def empty_meter() -> dict[str, Any]:
    """Sums of the loss and of the gradient norm over ``count`` steps, and whether a step was
    refused because its loss, gradient or statistics were not finite. Of numpy; after every log line
    the program makes one where the step takes it (`experiment.Program`)."""
    return {
        "loss": np.zeros((), np.float32),
        "gradient_norm": np.zeros((), np.float32),
        "count": np.zeros((), np.int32),
        "bad": np.zeros((), np.bool_),
    }


def stream(seed: jax.Array | int, name: int) -> jax.Array:
    """The random key of one of a run's streams."""
    return jax.random.fold_in(jax.random.key(seed), name)
