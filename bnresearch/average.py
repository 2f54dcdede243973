"""Averages of the weights along training: a part of the state, which training itself never sees.

With w the weights after a step that counts, the t-th of those,

    average <- average + rate * (w - average)

=======  ==================================================  ===============================
average  weights that count                                  rate
=======  ==================================================  ===============================
``ema``  those after every step                              (1 - decay) / (1 - decay^t)
``swa``  those after step b, b + c, b + 2c, ...              1 / t
=======  ==================================================  ===============================

Both start at the first weights that count: initial ones have no share, however short the run.
Running statistics are those of the weights that made them, not of their average, so whoever uses an
average computes them anew (`evaluate.averaged`, which the loop does by itself).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bnresearch.errors import UserError
from bnresearch.optim import parse_duration, steps

Tree = Any
# (average, weights, steps that led to them, numbers of the config) -> the average with them.
Update = Callable[[Tree, Tree, jax.Array, Mapping[str, Any]], Tree]


class AverageEntry(NamedTuple):
    """``make(train, total, steps_per_epoch)`` for the config's ``train``, and default options."""

    make: Callable[[ConfigDict, int, float], Update]
    options: Mapping[str, Any]


def defaults() -> dict[str, Any]:
    """The config's ``train.average`` with its defaults."""
    return dict(
        name="none",
        batches=50,  # of training data, over which the running statistics of an average are taken
        **{name: dict(entry.options) for name, entry in AVERAGES.items()},
    )


def validate(config: ConfigDict) -> None:
    """Raise a UserError for options of ``train.average`` that cannot be."""
    if config.batches < 1:
        raise UserError(f"train.average.batches={config.batches} must be at least 1")
    parse_duration("train.average.swa.every", config.swa.every, positive=True)


def metrics(names: Iterable[str]) -> dict[str, str]:
    """The metrics of an evaluation that an average has, too, and what these are called there."""
    return {name: f"averaged_{name}" for name in names if name != "count"}


def start(name: str, params: Tree) -> Tree:
    """The average of no weights: ``{"params": zeros like params, "count": int32 0}``, or {} where
    none is kept: a state without one has the leaves that it would have if there were no averages.
    """
    if name == "none":
        return {}
    return {"params": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.int32)}


def make_update(train: ConfigDict, steps_per_epoch: float) -> Update:
    """What a training step does with the average of the config's ``train``.

    Raises:
      UserError: an average that never comes to count any weights.
    """
    total = steps("train.duration", train.duration, steps_per_epoch)
    return AVERAGES[train.average.name].make(train, total, steps_per_epoch)


def _none(train: ConfigDict, total: int, steps_per_epoch: float) -> Update:
    """No average: the weights of the last step are what there is."""
    return lambda average, params, step, numbers: average


def _ema(train: ConfigDict, total: int, steps_per_epoch: float) -> Update:
    """Exponential moving average over all steps, of a length of 1 / (1 - decay) steps.

    Citation: Polyak & Juditsky (1992), Acceleration of stochastic approximation by averaging, for
    averaging at all; exponential weights are later custom.
    """

    def update(average: Tree, params: Tree, step: jax.Array, numbers: Mapping[str, Any]) -> Tree:
        count = average["count"] + 1
        # 1 - decay^t by way of logarithms: float32 loses it for decays close to 1.
        log_decay = jnp.log(numbers["train.average.ema.decay"])
        rate = jnp.expm1(log_decay) / jnp.expm1(count * log_decay)
        return _moved(average, params, count, rate)

    return update


def _swa(train: ConfigDict, total: int, steps_per_epoch: float) -> Update:
    """Stochastic weight averaging: the plain mean of weights c steps apart, from step b on.

    b is ``start`` of the training and c is ``every``. The learning rate is left to the schedule:
    the paper's is constant or cyclical from b on.

    Citation: Izmailov, Podoprikhin, Garipov, Vetrov & Wilson (2018), Averaging Weights Leads to
    Wider Optima and Better Generalization, UAI, arXiv:1803.05407.
    """
    options = train.average.swa
    first = round(options.start * total)
    every = steps("train.average.swa.every", options.every, steps_per_epoch)
    if not first and every > total:
        raise UserError(
            f"train.average.swa.every={options.every!r} ({every} steps) is longer than the "
            f"training ({total} steps): no weights would be averaged; shorten it"
        )

    def update(average: Tree, params: Tree, step: jax.Array, numbers: Mapping[str, Any]) -> Tree:
        due = (step >= first) & ((step - first) % every == 0)
        count = average["count"] + due
        return _moved(average, params, count, due / jnp.maximum(count, 1))

    return update


def _moved(average: Tree, params: Tree, count: jax.Array, rate: jax.Array) -> Tree:
    return {
        "params": optax.incremental_update(params, average["params"], rate),
        "count": count,
    }


AVERAGES: dict[str, AverageEntry] = {
    "none": AverageEntry(_none, {}),
    "ema": AverageEntry(_ema, dict(decay=0.999)),
    "swa": AverageEntry(_swa, dict(start=0.75, every="1ep")),
}
