"""Gradients of one optimizer step from microbatches, with two meanings of batch statistics.

``microbatch``: each microbatch is normalised with its own statistics (one microbatch = one ghost
batch, Hoffer et al., 2017). The running statistics are updated once per step with those of the
whole batch (mean of means, pooled second moment), so they do not depend on how many there are.

``batch``: every microbatch is normalised with the exact statistics s of the whole batch, and the
gradient flows through them, as if the batch had fitted into memory. s is the fixed point of
``s = S(params, s)``, where S runs all microbatches with given statistics and pools the moments that
arrive at the sites. A site depends on earlier sites only, so iterating S is exact after as many
sweeps as there are sites in sequence, and so is the same iteration for the adjoint of s. It costs
about two forward and two backward sweeps per site, and the memory of one microbatch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.norm import Stats, pool, update_running

Tree = Any
# (params, statistics, microbatch index) -> (loss, moments of the sites with statistics)
Forward = Callable[[Tree, Tree, jax.Array], tuple[jax.Array, Tree]]


def site_moments(moments: Tree, batch_stats: Tree) -> Tree:
    """The observed moments of those sites that own running statistics."""
    sites = {path[:-1] for path in flatten_dict(batch_stats)}
    flat = flatten_dict(moments)
    return unflatten_dict({path: value for path, value in flat.items() if path[:-1] in sites})


def _each_site(function: Callable[..., dict[str, jax.Array]], *trees: Tree) -> Tree:
    """Apply ``function`` to the per-site dicts of trees of the same sites."""
    flats = [flatten_dict(tree) for tree in trees]
    result: dict[tuple[str, ...], jax.Array] = {}
    for site in {path[:-1]: None for path in flats[0]}:
        parts = [{p[-1]: v for p, v in flat.items() if p[:-1] == site} for flat in flats]
        result |= {(*site, name): value for name, value in function(*parts).items()}
    return unflatten_dict(result)


def pool_microbatches(moments: Tree) -> Tree:
    """Moments stacked by microbatch ``[microbatches, features]`` as those of the whole batch."""

    def pool_site(site: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return pool(Stats(site["mean"], site["var"]))._asdict() | {"count": site["count"].sum(0)}

    return _each_site(pool_site, moments)


def update_statistics(running: Tree, moments: Tree, decay: Any, correction: int) -> Tree:
    """New running statistics from the pooled moments of the whole batch."""

    def update_site(old: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stats = Stats(new["mean"], new["var"])
        old_stats = Stats(old["mean"], old["var"])
        updated = update_running(old_stats, stats, new["count"], decay=decay, correction=correction)
        return updated._asdict()

    return _each_site(update_site, running, moments)


def microbatch_gradients(
    forward: Forward, params: Tree, batch_stats: Tree, count: int, unroll: bool
) -> tuple[jax.Array, Tree, Tree]:
    """Loss, gradient and pooled moments; ``forward`` normalises each microbatch by its own."""

    def body(carry: tuple[jax.Array, Tree], index: jax.Array) -> tuple[Any, Tree]:
        value = jax.value_and_grad(forward, has_aux=True)
        (loss, moments), gradient = value(params, batch_stats, index)
        total = jax.tree.map(jnp.add, carry, (loss, gradient))
        return total, moments

    # The first microbatch outside the scan gives the carry its type (under shard_map the loss and
    # the gradients have lost their dependence on the device, zeros of our own would not say so).
    first, first_moments = body(
        jax.tree.map(jnp.zeros_like, (jnp.float32(0), params)), jnp.int32(0)
    )
    total, rest = jax.lax.scan(body, first, jnp.arange(1, count), unroll=count if unroll else 1)
    moments = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first_moments, rest)
    loss, gradient = jax.tree.map(lambda x: x / count, total)
    return loss, gradient, pool_microbatches(moments)


def exact_gradients(
    forward: Forward, params: Tree, batch_stats: Tree, count: int, unroll: bool
) -> tuple[jax.Array, Tree, Tree]:
    """Loss, gradient and moments of the whole batch; ``forward`` normalises with given statistics.

    With L the mean loss at given statistics, the adjoint a of the statistics solves
    ``a = dL/ds + (dS/ds)^T a`` and the gradient is ``dL/dparams + (dS/dparams)^T a``: both are the
    cotangents that one and the same vector-Jacobian product of (L, S) returns for ``(1, a)``.
    """
    sites = len({path[:-1] for path in flatten_dict(batch_stats)})

    def sweep(params: Tree, stats: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
        # Checkpointing keeps nothing of a microbatch but its index for the backward pass.
        body = jax.checkpoint(lambda _, index: (None, forward(params, stats, index)))
        _, (losses, moments) = jax.lax.scan(
            body, None, jnp.arange(count), unroll=count if unroll else 1
        )
        pooled = pool_microbatches(moments)
        return (losses.mean(), _each_site(_mean_and_var, pooled)), pooled

    def forward_sweep(_: int, stats: Tree) -> Tree:
        return sweep(params, stats)[0][1]

    stats = jax.lax.fori_loop(0, sites, forward_sweep, batch_stats)
    (loss, found), pull, pooled = jax.vjp(sweep, params, stats, has_aux=True)
    one = jnp.ones_like(loss)

    def backward_sweep(_: int, adjoint: Tree) -> Tree:
        return pull((one, adjoint))[1]

    adjoint = jax.lax.fori_loop(0, sites, backward_sweep, jax.tree.map(jnp.zeros_like, found))
    return loss, pull((one, adjoint))[0], pooled


def _mean_and_var(site: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"mean": site["mean"], "var": site["var"]}
