"""Moments of many batches put together, weighted by counts, in float64 on the host."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from bnresearch.distributed import everybodys
from bnresearch.errors import NotFinite, UserError
from bnresearch.moments import moments
from bnresearch.sets import Scope, Sets

# By site in order of execution, and by what was observed there.
Pooled = dict[str, dict[str, "Moments"]]


class Moments(NamedTuple):
    """Mean, biased variance and number of values per feature: float64, on the host."""

    mean: np.ndarray
    var: np.ndarray
    values: np.ndarray


def set_moments(x: jax.Array, mask: Any = None) -> tuple[jax.Array, ...]:
    """Mean, biased variance and count per feature, ``[features]`` float32, of what the mask lets
    through of ``x``, ``[batch, ..., features]``; traceable."""
    sets = Sets(x, Scope(), mask)
    mean, var = (row.reshape(-1) for row in moments(sets))
    count = jnp.asarray(sets.count, jnp.float32)
    return mean, var, jnp.broadcast_to(count.reshape(-1), mean.shape)


def merged(parts: Sequence[Any]) -> Moments:
    """The moments of all values together (Chan, Golub & LeVeque, 1979), of means, variances and
    counts that are stacked on the first axis: mean of the means; mean of the variances plus
    variance of the means. A part without a value counts for nothing."""
    mean, var, values = (np.asarray(rows, np.float64) for rows in parts)
    weight = values / np.maximum(values.sum(0), 1)
    centre = (weight * mean).sum(0)
    return Moments(centre, (weight * (var + np.square(mean - centre))).sum(0), values.sum(0))


def pooled(found: Mapping[str, Any], alike: bool = False) -> Pooled:
    """What was observed in several batches, over all of them and all calls of a site, and over all
    processes: each of these calls this with what it has, and gets the same.

    Args:
      found: as `watch.seen_in` gives it, but stacked by batch; observations are mean, variance and
        count.
      alike: all processes have observed the same, in batches that lie on the devices of all.

    Raises:
      NotFinite: an observation is not finite.
      UserError: another process has raised one, see `agree`.
    """
    result: Pooled = {}
    for path, calls in found.items():
        _refuse_not_finite(path, calls)
        result[path] = {
            name: merged([np.concatenate(rows) for rows in zip(*every, strict=True)])
            for name in calls[0]
            if (every := [call[name] for call in calls])
        }
    if alike or jax.process_count() == 1:
        return result
    agree()
    return _over_processes(result)


class Elsewhere(UserError):
    """The input of another process was wrong."""


def agree(error: UserError | None = None) -> None:
    """Called by every process before it waits for the others, by one that cannot go on with its
    error: then all raise, and nobody waits for who has left.

    Raises:
      UserError: the error given; Elsewhere, where it is another process's.
    """
    if jax.process_count() > 1 and not isinstance(error, Elsewhere):
        every = everybodys(str(error or "").encode())
        if error is None and any(every):
            number = next(i for i, text in enumerate(every) if text)
            raise Elsewhere(f"process {number}: {every[number].decode()}")
    if error is not None:
        raise error


def _refuse_not_finite(path: str, calls: Any) -> None:
    for rows in jax.tree.leaves(calls):
        bad = ~np.isfinite(rows).all(tuple(range(1, rows.ndim)))
        if bad.any():
            raise NotFinite(
                f"the input of site {path} is not finite in batch {bad.argmax()}: look at that "
                "batch, and at the weights in front of that site"
            )


def _over_processes(own: Pooled) -> Pooled:
    leaves, tree = jax.tree.flatten(own)
    flat = np.concatenate([leaf.reshape(-1) for leaf in leaves])
    # As 32-bit words: on its way jax would make float32 of float64.
    words = np.asarray(multihost_utils.process_allgather(flat.view(np.int32)))
    every = np.ascontiguousarray(words.reshape(jax.process_count(), -1)).view(np.float64)
    parts = np.split(every, np.cumsum([leaf.size for leaf in leaves])[:-1], axis=1)
    shaped = [a.reshape(-1, *b.shape) for a, b in zip(parts, leaves, strict=True)]
    stacked = jax.tree.unflatten(tree, shaped)
    return {
        path: {name: merged(stacked[path][name]) for name in names} for path, names in own.items()
    }


def of_first_process(tree: Any) -> Any:
    """The values of the first process, for what cannot be pooled."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def distance(running: Any, precise: Any, epsilon: float) -> float:
    """How far inference with the running statistics is from that with precise ones: the root mean
    square, over all values of a site's input, of the difference between the normalised inputs,

        sqrt(mean over features of (s / rs - 1)^2 + ((m - rm) / rs)^2),  s^2 = var + epsilon

    0 for the same statistics; 1 is as much as the signal itself. Both have ``mean`` and ``var``.
    """
    m, v, rm, rv = (
        np.asarray(row, np.float64).reshape(-1)
        for row in (precise.mean, precise.var, running.mean, running.var)
    )
    s, rs = np.sqrt(v + epsilon), np.sqrt(np.maximum(rv, 0) + epsilon)
    return float(np.sqrt(np.mean(np.square(s / rs - 1) + np.square((m - rm) / rs))))
