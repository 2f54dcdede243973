"""Curvature of the training loss: the Hessian by its products with vectors."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

if TYPE_CHECKING:
    from bnresearch.probes.inside import Inside, View

SAMPLES = 20  # vectors for the trace
TOLERANCE = 1e-3  # relative, of the eigenvalue: products are of float32
MOST = 30  # restarts of Lanczos


def hessian(inside: "Inside") -> dict[str, dict[str, float]]:
    """Largest eigenvalue and trace of the Hessian of the training loss (Ghorbani et al., 2019).

        eigenvalue:  max v^T H v over ||v|| = 1, by Lanczos to a relative 1e-3 (scipy's eigsh)
        trace:       mean over r of z_r^T H z_r, z_r of independent signs (Hutchinson, 1990)
        trace_error: standard error of that mean, 20 vectors

    H is about all parameters, of the loss of the training batch of this step with its batch
    statistics. Vectors are the same at every step and in every run, so that differences between
    steps are not those between vectors. Of kinds of norm that replace the gradient (power, online)
    it is the derivative of what they put in its place. About the whole net, site "". Takes some 40
    to 60 products, each of two to four gradients by XLA's kernels, and memory for 20 vectors of all
    parameters.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size = sum(leaf.size for leaf in jax.tree.leaves(inside.state.params))

    def product(vector: np.ndarray) -> np.ndarray:
        return np.asarray(inside(hessian_product, np.float32(vector.reshape(-1))), np.float64)

    draw = np.random.RandomState(0)
    signs = [draw.choice([-1.0, 1.0], size) for _ in range(SAMPLES)]
    traces = [(z * product(z)).sum() for z in signs]
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        how: dict[str, Any] = dict(k=1, which="LA", tol=TOLERANCE, maxiter=MOST, v0=signs[0])
        largest = eigsh(operator, return_eigenvectors=False, **how)[0]
    except ArpackNoConvergence:
        largest = np.nan
    error = np.std(traces, ddof=1) / np.sqrt(SAMPLES)
    return {"": {"eigenvalue": largest, "trace": np.mean(traces), "trace_error": error}}


def hessian_product(view: "View", vector: jax.Array) -> jax.Array:
    """H v, both ``[parameters]`` in the order of the leaves of the tree."""
    view = view.differentiable()
    params, unravel = ravel_pytree(view.params)

    def slope(params: jax.Array) -> jax.Array:
        gradient = view.loss_and_gradient(unravel(params))[1]
        return jnp.vdot(ravel_pytree(gradient)[0], vector)

    # Reverse over reverse: norms that write down their backward pass have no forward derivative.
    return jax.grad(slope)(params)
