"""The gradient on its way back through the sites."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from bnresearch.watch import PERTURBATIONS, Watch

if TYPE_CHECKING:
    from bnresearch.probes.inside import Inside, View

Tree = Any


def gradients(inside: "Inside") -> dict[str, dict[str, float]]:
    """Norm of the loss's gradient at each site, and its growth by depth (Yang et al., 2019).

        norm:   ||dL / dy||_2, y the output of the site for the whole batch
        params: ||dL / d(the site's own parameters)||_2
        growth: exp(-slope) of the least squares of log norm^2 on depth, for the whole net ("")

    L is the mean loss of the training batch of this step. The output has the activation and the
    addition that the site was handed. ``growth`` is the factor by which the squared norm grows from
    a site to the one before it, over the sites that are looked at: above 1 the gradient explodes on
    its way back; (B - 2) / (B - 3) in a deep linear net with BatchNorm and batches of B, and
    pi / (pi - 1) with ReLU and large B. Sites without parameters have no ``params``.
    """
    seen = jax.device_get(inside(site_gradients))
    found = {path: seen[path] for path in inside.sites}
    depths = inside.structure.depths
    there = [path for path in found if found[path]["norm"] > 0]
    if len(there) > 1:
        logs = [2 * np.log(np.float64(found[path]["norm"])) for path in there]
        slope = np.polyfit([depths[path] for path in there], logs, 1)[0]
        found[""] = {"growth": np.exp(-slope)}
    return found


def site_gradients(view: "View") -> dict[str, dict[str, jax.Array]]:
    """The norms of `gradients` at every site."""
    watch = Watch(perturb=True)
    zeros = view.apply(watch, mutable=(PERTURBATIONS,)).mutated.get(PERTURBATIONS, {})

    def loss(params: Tree, added: Tree) -> jax.Array:
        made = {PERTURBATIONS: added}
        return view.loss(view.apply(watch, params=params, mutable=("penalties",), **made))

    by_params, by_output = jax.grad(loss, (0, 1))(view.params, zeros)
    found = {}
    for path, gradient in flatten_dict(by_output).items():
        norms = {"norm": optax.tree.norm(gradient)}
        own = by_params
        for name in path[:-1]:
            own = own.get(name, {})
        found["/".join(path[:-1])] = norms | ({"params": optax.tree.norm(own)} if own else {})
    return found
