"""Groups of features that share statistics: their moments, merged from those of the features.

XLA on CPU does not vectorise a reduction whose innermost axis is the few features of a group. So
each feature is averaged over the values of its set first, and what is merged over a group is
``[sets, features]`` only: mean of the means; mean of the variances plus variance of the means, as
exact as two passes over the group. The gradient takes the same way back (see `moments`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnresearch.kinds.batch import Standard, moved, set_moments, single_value
from bnresearch.kinds.within import grouped, prepared, refuse_single, values_in
from bnresearch.moments import KEPT, moments, scaled
from bnresearch.sets import Scope, Sets, Stats, align_mask, pool, wide

# For a function of an input whose statistics it takes: the backward pass keeps both and computes
# the rest again (see `kinds.batch.normalised`). What refuses anything stands outside: jax adds
# lines of its own to errors from within.
lean = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT))


def refuse(x: jax.Array, groups: int, kind: str, mask: Any = None) -> None:
    """Refuses what no kind over groups of features of one example takes.

    Raises:
      UserError: groups that do not divide the features, one single value per group, integer
        input, a mask that does not fit.
    """
    cut = grouped(prepared(x, mask)[0], groups, kind)
    refuse_single(kind, x.shape, values_in(cut.shape, (*range(1, x.ndim - 1), x.ndim)))


def examples(x: jax.Array, mask: Any = None) -> tuple[Sets, Stats]:
    """The input with each example as a set of its own, and the moments of these sets.

    A mask of whole examples is left out: it changes nothing for those that count, and the others
    keep statistics of their own.
    """
    mask = None if mask is None else align_mask(mask, x.shape)
    if mask is not None and all(n == 1 for n in mask.shape[1:]):
        mask = None
    sets = Sets(x, Scope(splits=max(1, len(x))), mask)
    return sets, moments(sets)


def of_groups(sets: Sets, stats: Stats, groups: int) -> Stats:
    """The moments of groups of neighbouring features from those of the features of each set, at
    every feature those of its group, in the shape of ``stats``.

    The variance is 1 where the mask lets no value through, so that dividing by its root stays
    finite.
    """
    shape = stats.mean.shape

    def cut(row: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(wide(row), shape).reshape(sets.scope.splits, groups, -1)
        return jnp.moveaxis(rows, -1, 0)

    features = Stats(*map(cut, stats))
    if sets.mask is None:
        merged = pool(features)
    else:
        counts = cut(sets.count)
        merged = pool(features, counts)
        merged = merged._replace(var=jnp.where(counts.sum(0) > 0, merged.var, 1))
    spread = (sets.scope.splits, groups, len(features.mean))
    return Stats(*(jnp.broadcast_to(r[..., None], spread).reshape(shape) for r in merged))


def group_affine(
    x: jax.Array, scale: Any, bias: Any, epsilon: Any, groups: int, mask: Any, kind: str
) -> jax.Array:
    """Group norm for a kind that is called otherwise in messages, in float32 at least.

    Raises:
      UserError: see `refuse`.
    """
    refuse(x, groups, kind, mask)

    @lean
    def body(x: jax.Array) -> jax.Array:
        sets, stats = examples(x, mask)
        vectors = Standard(scale, bias, epsilon)
        return scaled(sets, *vectors(of_groups(sets, stats, groups)))

    return body(x)


def beside_batch(
    x: jax.Array,
    running: Any,
    combine: Callable[[Sets, Stats, Stats], jax.Array],
    *,
    use: str,
    how: Mapping[str, Any],
    scope: Scope,
    mask: Any,
    variance: str = "two_pass",
    stat_dtype: str = "float32",
    on_single: str,
) -> tuple[jax.Array, Any]:
    """``combine(examples, their moments, batch moments)``, the latter (or the running ones) as one
    per example, in the shape and dtype of x; and the new running statistics, for which ``how`` is
    as in `moved`.

    Raises:
      UserError: as `prepared`, and in training as `kinds.batch.batch_moments`.
    """
    prepared(x, mask)  # refuses
    trains = use != "running"
    if trains:
        sets = Sets(x, scope, mask, stat_dtype)
        single_value(sets, x.shape, on_single)

    @lean
    def body(x: jax.Array) -> tuple[jax.Array, Stats]:
        batch = Stats(running.mean, running.var)
        if trains:
            batch = set_moments(Sets(x, scope, mask, stat_dtype), running, variance, on_single)
        own, stats = examples(x, mask)
        rows = (row.reshape(-1, 1, x.shape[-1]) for row in batch)
        each = (jnp.broadcast_to(r, (len(r), len(x) // len(r), r.shape[-1])) for r in rows)
        y = combine(own, stats, Stats(*(r.reshape(stats.mean.shape) for r in each)))
        return y.reshape(x.shape).astype(x.dtype), batch

    y, batch = body(x)
    return y, moved(running, sets, batch, **how) if trains else running
