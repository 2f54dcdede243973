"""Running statistics: how those of past batches become those of inference.

Every average here is ``running <- running + rate * (batch - running)`` with a rate of its own; they
differ in that rate, in whether the spread between batch means counts as variance (`TRACKS`), and in
the correction of the batch variance (0 biased, 1 unbiased).

=============  =================================================  ==================================
average        rate at update t = 1, 2, ...                       used by
=============  =================================================  ==================================
``ema``        1 - decay: weighs the start by decay^t             torch, flax, keras, onnx
``debiased``   (1 - decay) / (1 - decay^t): forgets the start     haiku (Adam's correction)
``cumulative`` 1 / t: all batches alike                           torch with momentum=None
``last``       mean over the newest ``window`` batches            -
=============  =================================================  ==================================
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError, lookup
from bnresearch.sets import Stats, pool


class Running(NamedTuple):
    """Running statistics that know how often they moved.

    ``mean`` and ``var`` (``[features]``) are what inference uses, whatever the average; ``updates``
    is a float32 scalar; ``recent_mean`` and ``recent_var`` are the newest batches' statistics,
    ``[window, features]``, of the average ``last`` only.
    """

    mean: jax.Array
    var: jax.Array
    updates: jax.Array
    recent_mean: jax.Array | None = None
    recent_var: jax.Array | None = None


TRACKS = ("variance", "second_moment")
AVERAGES = ("ema", "debiased", "cumulative", "last")


def start(features: int, options: Mapping[str, Any]) -> Stats | Running:
    """Mean 0, variance 1, and what else the average of the options keeps."""
    average, window = options.get("average", "ema"), options.get("window", 1)
    lookup(dict.fromkeys(AVERAGES), average, "average of running statistics")
    stats = Stats(jnp.zeros(features), jnp.ones(features))
    if average == "ema":
        return stats
    if average != "last":
        return Running(*stats, jnp.zeros(()))
    if window < 1:
        raise UserError(f"the average over the last window={window} batches needs at least one")
    return Running(*stats, jnp.zeros(()), *(jnp.zeros((window, features)) for _ in range(2)))


def update(
    running: Any,
    batch: Stats,
    count: Any,
    *,
    decay: Any,
    correction: int = 0,
    average: str = "ema",
    track: str = "variance",
) -> Any:
    """Running statistics after one more batch of ``count`` values per feature.

    Args:
      running: `Stats`, or `Running` for every average but "ema".
      batch: mean and biased variance of the whole batch, ``[features]``.
      count: values per feature; a plain number or an array. Where it is 0, nothing moves.
      decay: share of the old that is kept; only "ema" and "debiased" look at it.
      correction: 0 or 1: the variance that is averaged is ``var * count / (count - correction)``.
      average: a name of AVERAGES.
      track: "variance" averages the variances. "second_moment" averages E[x^2] beside the mean,
        ``var = avg(E[x^2]) - avg(mean)^2``: the variance of the population also when batches differ
        from each other, up to (1 - decay) / (1 + decay) of the variance of their means. It is
        computed as a merge of variances, which does not cancel.
    """
    lookup(dict.fromkeys(AVERAGES), average, "average of running statistics")
    lookup(dict.fromkeys(TRACKS), track, "track of running statistics")
    batch = Stats(batch.mean, batch.var * (count / jnp.maximum(count - correction, 1)))
    some = jnp.asarray(count > 0, jnp.float32)
    if average == "ema":
        return _move(running, batch, (1 - decay) * some, track)
    running = running._replace(updates=running.updates + some.max())
    if average == "last":
        return _last(running, batch, some, track)
    t = jnp.maximum(running.updates, 1)
    if average == "cumulative":
        return _move(running, batch, some / t, track)
    tiny = jnp.finfo(jnp.float32).tiny  # decay 1 never moves: 0 / tiny
    return _move(running, batch, some * (1 - decay) / jnp.maximum(1 - decay**t, tiny), track)


def _move(running: Any, batch: Stats, rate: Any, track: str) -> Any:
    # Written as a weighted sum, which gives back `batch` exactly at rate 1 and `running` at 0.
    mean = (1 - rate) * running.mean + rate * batch.mean
    var = (1 - rate) * running.var + rate * batch.var
    if track == "second_moment":
        var = var + rate * (1 - rate) * jnp.square(batch.mean - running.mean)
    return running._replace(mean=mean, var=var)


def _last(running: Running, batch: Stats, some: jax.Array, track: str) -> Running:
    assert running.recent_mean is not None and running.recent_var is not None
    window = running.recent_mean.shape[0]
    slot = (jnp.maximum(running.updates, 1) - 1).astype(jnp.int32) % window
    # A feature without any value in this batch, but not in others, repeats what it was.
    mean, var = (jnp.where(some > 0, b, r) for b, r in zip(batch, running[:2], strict=True))
    new = (jnp.arange(window) == slot)[:, None] & (some.max() > 0)
    means = jnp.where(new, mean, running.recent_mean)
    variances = jnp.where(new, var, running.recent_var)
    filled = (jnp.arange(window) < running.updates).astype(jnp.float32)[:, None]
    mean, spread = pool(Stats(means, jnp.zeros_like(variances)), filled)
    var, _ = pool(Stats(variances, jnp.zeros_like(variances)), filled)
    if track == "second_moment":
        var = var + spread
    moved = running.updates > 0
    return running._replace(
        mean=jnp.where(moved, mean, running.mean),
        var=jnp.where(moved, var, running.var),
        recent_mean=means,
        recent_var=variances,
    )
