"""How fast the direction of a weight changes in front of a norm, which ignores its length."""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

if TYPE_CHECKING:
    from bnresearch.probes.inside import Inside, View

Tree = Any


def effective_rate(inside: "Inside") -> dict[str, dict[str, float]]:
    """Length, effective learning rate and rotation of weights in front of norms (Wan et al., 2021).

        weight_norm: ||w||      rate: eta / ||w||^2      angle: between w_t and w_{t+1}, radians
        radial:      <w, grad> / (||w|| ||grad||)
        equilibrium: sqrt(2 eta lambda / (1 + mu)) for SGD with momentum mu,
                     sqrt(2 eta lambda (1 - b1) / (1 + b1)) for AdamW      (Kosson et al., 2023)

    eta is the learning rate of this step (at the last one, of the step before), lambda the weight
    decay, w_{t+1} what the run's own optimizer makes of w_t at this step. Of each site whose input
    is the output of a linear map, w is the weight of that map.

    ``equilibrium`` is the angle per step that balances growth and decay, one for the whole net
    (""); none for other optimizers, Nesterov's momentum, or without weight decay. It holds after
    some 1 / (eta lambda) steps, and only for weights whose length the net ignores: there ``radial``
    is 0, up to the epsilon of the norm.
    """
    seen = jax.device_get(inside(rotations, inside.gradient, inside.updated))
    found = {path: dict(seen[path]) for path in inside.sites if path in seen}
    for values in found.values():
        values["rate"] = inside.learning_rate / values["weight_norm"] ** 2
    angle = equilibrium(inside.experiment.config.optim, inside.learning_rate)
    return found | ({} if angle is None else {"": {"equilibrium": angle}})


def rotations(view: "View", gradient: Tree, updated: Tree) -> dict[str, dict[str, jax.Array]]:
    """Norm, angle of the next update, and cosine with the gradient of the weight of each site."""
    assert view.structure is not None
    trees = (view.params, updated, gradient)
    before, after, by = (flatten_dict(tree, sep="/") for tree in trees)
    return {
        site: {
            "weight_norm": optax.tree.norm(before[path]),
            "angle": angle_between(before[path], after[path]),
            "radial": jnp.vdot(_unit(before[path]), _unit(by[path])),
        }
        for site, path in view.structure.weights.items()
    }


def angle_between(a: jax.Array, b: jax.Array) -> jax.Array:
    """2 atan2(||u - v||, ||u + v||) of the unit vectors: exact where the arc cosine is not, at
    small angles (Kahan)."""
    u, v = _unit(a), _unit(b)
    return 2 * jnp.arctan2(optax.tree.norm(u - v), optax.tree.norm(u + v))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(optax.tree.norm(x), 1e-37)


def equilibrium(config: ConfigDict, rate: float) -> float | None:
    """The angle per step in equilibrium, see `effective_rate`; None where none is known."""
    decay = config.weight_decay
    if not decay or config.name not in EQUILIBRIA:
        return None
    factor = EQUILIBRIA[config.name](config[config.name])
    return None if factor is None else math.sqrt(2 * rate * decay * factor)


def _sgd(options: ConfigDict) -> float | None:
    return None if options.nesterov else 1 / (1 + options.momentum)


def _adamw(options: ConfigDict) -> float | None:
    return (1 - options.b1) / (1 + options.b1)


# Optimizer -> the square of its equilibrium angle over 2 eta lambda.
EQUILIBRIA = {"sgd": _sgd, "adamw": _adamw}
