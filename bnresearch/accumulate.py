"""Gradients of one optimizer step from microbatches, with two meanings of batch statistics.

``microbatch``: each microbatch is normalised with its own statistics (one microbatch = one ghost
batch, Hoffer et al., 2017). Running statistics that follow from mean and variance of the whole
batch (`norm.Kind.update`) move once per step, with those moments pooled over the microbatches, so
they do not depend on how many there are. The state of other kinds moves once per microbatch, in
order.

``batch``: every microbatch is normalised with the exact statistics s of the whole batch, and the
gradient flows through them, as if the batch had fitted into memory. s is the fixed point of
``s = S(params, s)``, where S runs all microbatches with given statistics and pools the moments that
arrive at the sites. A site depends on earlier sites only, so iterating S is exact after as many
sweeps as there are sites in sequence, and so is the same iteration for the adjoint of s. It costs
about two forward and two backward sweeps per site, and the memory of one microbatch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch import norm
from bnresearch.norm import NORMS, Stats, pool
from bnresearch.sites import Choice

Tree = Any
# (params, statistics, microbatch index) -> (loss, (moments of the sites with statistics, the
# statistics afterwards)).
Forward = Callable[[Tree, Tree, jax.Array], tuple[jax.Array, tuple[Tree, Tree]]]

# Running statistics so named move in the backward pass; the others in the forward pass.
BACKWARD = "backward_"


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
        counts = site["count"].reshape(site["count"].shape[0], -1)
        pooled = pool(Stats(site["mean"], site["var"]), counts)
        return pooled._asdict() | {"count": site["count"].sum(0)}

    return _each_site(pool_site, moments)


def moved_once(batch_stats: Tree, choice_at: Callable[[str], Choice]) -> list[tuple[str, ...]]:
    """The sites whose statistics move once per step, whatever the number of microbatches."""
    sites = dict.fromkeys(path[:-1] for path in flatten_dict(batch_stats))
    return [site for site in sites if NORMS[choice_at("/".join(site)).kind].update is not None]


def update_statistics(
    before: Tree, threaded: Tree, moments: Tree, choice_at: Callable[[str], Choice]
) -> Tree:
    """New running statistics of a step.

    Args:
      before: the statistics at its beginning.
      threaded: those that went through the microbatches one after the other.
      moments: of the whole batch, at the input of every site.
      choice_at: kind and options of the site at a path.
    """
    old, new = flatten_dict(before), flatten_dict(threaded)
    found = flatten_dict(moments)
    for site in moved_once(before, choice_at):
        choice = choice_at("/".join(site))
        kind = NORMS[choice.kind]
        assert kind.state is not None
        mean, var, count = (found[(*site, name)] for name in ("mean", "var", "count"))
        start = kind.state(mean.shape[-1], choice.options)
        names = [name for name, value in start._asdict().items() if value is not None]
        running = start._replace(**{name: old[(*site, name)] for name in names})
        moved = norm.update(kind, running, Stats(mean, var), count, choice.options)
        new |= {(*site, name): getattr(moved, name) for name in names}
    return unflatten_dict(new)


def gradients(
    forward: Forward, params: Tree, batch_stats: Tree, index: jax.Array
) -> tuple[jax.Array, Tree, Tree, Tree]:
    """Loss, gradient, moments and new running statistics of one microbatch.

    The cotangent of a statistic named ``backward_...`` is by contract the step that it takes: what
    a norm learns in its backward pass has no other way out.
    """
    flat = flatten_dict(batch_stats)
    learned = {path for path in flat if path[-1].startswith(BACKWARD)}
    wanted = (0, 1) if learned else (0,)
    value = jax.value_and_grad(forward, wanted, has_aux=True)
    (loss, (moments, stats)), cotangents = value(params, batch_stats, index)
    if learned:
        steps, new = flatten_dict(cotangents[1]), flatten_dict(stats)
        new |= {path: flat[path] + steps[path] for path in learned}
        stats = unflatten_dict(new)
    return loss, cotangents[0], moments, stats


def microbatch_gradients(
    forward: Forward,
    params: Tree,
    batch_stats: Tree,
    count: int,
    unroll: bool,
    once: Sequence[tuple[str, ...]] = (),
) -> tuple[jax.Array, Tree, Tree, Tree]:
    """Loss, gradient, pooled moments, and the statistics that went through all microbatches, but
    for those of the sites ``once``; ``forward`` normalises each microbatch by its own."""
    before = {path: x for path, x in flatten_dict(batch_stats).items() if path[:-1] in once}

    def body(carry: tuple[Any, Tree], index: jax.Array) -> tuple[Any, Tree]:
        total, stats = carry
        loss, gradient, moments, stats = gradients(forward, params, stats, index)
        stats = unflatten_dict(flatten_dict(stats) | before)
        return (jax.tree.map(jnp.add, total, (loss, gradient)), stats), moments

    # The first microbatch outside the scan gives the carry its type (under shard_map the loss and
    # the gradients have lost their dependence on the device, zeros of our own would not say so).
    zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    first, first_moments = body((zero, batch_stats), jnp.int32(0))
    (total, stats), rest = jax.lax.scan(
        body, first, jnp.arange(1, count), unroll=count if unroll else 1
    )
    moments = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first_moments, rest)
    loss, gradient = jax.tree.map(lambda x: x / count, total)
    return loss, gradient, pool_microbatches(moments), stats


def exact_gradients(
    forward: Forward, params: Tree, batch_stats: Tree, count: int, unroll: bool
) -> tuple[jax.Array, Tree, Tree, Tree]:
    """Loss, gradient and moments of the whole batch, and the statistics as they were; ``forward``
    normalises with given statistics.

    With L the mean loss at given statistics, the adjoint a of the statistics solves
    ``a = dL/ds + (dS/ds)^T a`` and the gradient is ``dL/dparams + (dS/dparams)^T a``: both are the
    cotangents that one and the same vector-Jacobian product of (L, S) returns for ``(1, a)``.
    """
    sites = len({path[:-1] for path in flatten_dict(batch_stats)})

    def sweep(params: Tree, stats: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
        # Checkpointing keeps nothing of a microbatch but its index for the backward pass.
        def body(_: None, index: jax.Array) -> tuple[None, tuple[jax.Array, Tree]]:
            given = unflatten_dict(flatten_dict(batch_stats) | flatten_dict(stats))
            loss, (moments, _) = forward(params, given, index)
            return None, (loss, moments)

        _, (losses, moments) = jax.lax.scan(
            jax.checkpoint(body), None, jnp.arange(count), unroll=count if unroll else 1
        )
        pooled = pool_microbatches(moments)
        return (losses.mean(), _each_site(_mean_and_var, pooled)), pooled

    def forward_sweep(_: int, stats: Tree) -> Tree:
        return sweep(params, stats)[0][1]

    stats = jax.lax.fori_loop(0, sites, forward_sweep, _each_site(_mean_and_var, batch_stats))
    (loss, found), pull, pooled = jax.vjp(sweep, params, stats, has_aux=True)
    one = jnp.ones_like(loss)

    def backward_sweep(_: int, adjoint: Tree) -> Tree:
        return pull((one, adjoint))[1]

    adjoint = jax.lax.fori_loop(0, sites, backward_sweep, jax.tree.map(jnp.zeros_like, found))
    return loss, pull((one, adjoint))[0], pooled, batch_stats


def _mean_and_var(site: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"mean": site["mean"], "var": site["var"]}
