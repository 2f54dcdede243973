"""The loss surface along the training, as Santurkar et al. (2018) measure it."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from bnresearch.probes.inside import Inside, View

Tree = Any

# Lengths of the step that `landscape` tries, in learning rates.
LENGTHS = (0.5, 1.0, 2.0, 4.0)


def covariate_shift(inside: "Inside") -> dict[str, dict[str, float]]:
    """Internal covariate shift of each layer (Santurkar et al., 2018).

        G  = grad_{W_i} L(W_1 .. W_k) at step t
        G' = grad_{W_i} L(W_1' .. W_{i-1}', W_i .. W_k), the same batch
        shift:  ||G - G'||_2      cosine: <G, G'> / (||G|| ||G'||)

    W' is what the run's own optimizer makes of W at this step. The layers divide the parameters, in
    order of execution: each begins with a weight and has all that stands between it and the next
    one (its bias, a norm's scale and bias). A layer goes by the name of its first site, or by its
    own where it has none. The first is left out: nothing before it moves, G' is G. Costs as many
    gradients as there are layers.
    """
    found = {}
    for index, name in inside.layers:
        if index == 0:
            continue
        _, after = inside.loss_and_gradient(inside(mixed, inside.updated, np.int32(index)))
        between = inside(compared, inside.gradient, after)
        shift, inner, before, behind = (float(values[index]) for values in between)
        cosine = inner / np.sqrt(before * behind) if before * behind else 0.0
        found[name] = {"shift": np.sqrt(shift), "cosine": cosine}
    return found


def landscape(inside: "Inside") -> dict[str, dict[str, float]]:
    """Loss variation, gradient predictiveness, effective smoothness (Santurkar et al., 2018).

        loss_variation:          max - min over a of L(w - a g)
        gradient_predictiveness: max - min over a of ||g - grad L(w - a g)||_2
        smoothness:              max over a of ||g - grad L(w - a g)||_2 / ||a g||_2

    g = grad L(w) on the training batch of this step, and a is 0.5, 1, 2 and 4 times the learning
    rate of this step: plain gradient steps, whatever the optimizer. Small is smooth. At the last
    step the rate is that of the step before; a rate that falls to nearly nothing leaves only the
    rounding of float32 to see. About the whole net, site "".
    """
    lengths = np.array(LENGTHS) * inside.learning_rate
    losses, changes = [], []
    for length in lengths:
        loss, after = inside.loss_and_gradient(inside(moved, inside.gradient, np.float32(length)))
        shift, _, before, _ = jax.device_get(inside(compared, inside.gradient, after))
        losses.append(float(loss))
        changes.append(np.sqrt(shift.sum()))
    found = {
        "loss_variation": np.ptp(losses),
        "gradient_predictiveness": np.ptp(changes),
        "smoothness": (changes / (lengths * np.sqrt(before.sum()))).max(),
    }
    return {"": found}


def mixed(view: "View", updated: Tree, index: jax.Array) -> Tree:
    """The parameters with those of the layers before number ``index`` updated."""
    assert view.structure is not None

    def earlier(layer: int, old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(layer < index, new, old)

    return jax.tree.map(earlier, view.structure.layer_of, view.params, updated)


def moved(view: "View", gradient: Tree, length: jax.Array) -> Tree:
    """w - a g."""
    return jax.tree.map(lambda w, g: w - length * g, view.params, gradient)


def compared(view: "View", a: Tree, b: Tree) -> tuple[jax.Array, ...]:
    """||a - b||^2, <a, b>, ||a||^2 and ||b||^2 of each layer, ``[layers]`` each."""
    assert view.structure is not None
    layer_of, count = jax.tree.leaves(view.structure.layer_of), len(view.structure.layers)

    def per_layer(x: Tree, y: Tree) -> jax.Array:
        sums = [jnp.zeros(())] * count
        for layer, one, other in zip(layer_of, *map(jax.tree.leaves, (x, y)), strict=True):
            sums[layer] += jnp.vdot(one, other)
        return jnp.stack(sums)

    difference = jax.tree.map(jnp.subtract, a, b)
    return tuple(per_layer(*pair) for pair in ((difference, difference), (a, b), (a, a), (b, b)))
