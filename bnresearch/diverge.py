"""Where a run diverged: the first site whose statistics are not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnresearch.experiment import Experiment
from bnresearch.state import DROPOUT, State, stream
from bnresearch.step import build_model


def explain(experiment: Experiment, state: State) -> str:
    """Run the refused batch once more and name the first site, in order of execution, whose input
    has a mean or variance that is not finite."""
    for site, moments in site_moments(experiment, jax.device_get(state)).items():
        if not np.isfinite([moments["mean"], moments["var"]]).all():
            return f"the statistics of site {site} are not finite"
    return "the statistics of all sites are finite, but the loss or its gradient is not"


def site_moments(experiment: Experiment, state: State) -> dict[str, dict[str, Any]]:
    """Mean and variance of the input of every site on the next batch, in order of execution.

    The model is not compiled here: a compiled one returns its dicts sorted by name.
    """
    config, dataset = experiment.config, experiment.program.dataset
    step = int(state.step)
    feed = dataset.feed(experiment.seed, step, 1)
    rows = jnp.arange(config.data.batch_size)
    batch = dataset.train_batch(feed, experiment.numbers["seed"], jnp.int32(step), rows)
    model = build_model(config, dataset.info.num_classes, use="batch", numbers=experiment.numbers)
    _, seen = model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        batch["image"],
        train=True,
        rngs={"dropout": jax.random.fold_in(stream(experiment.seed, DROPOUT), step)},
        mutable=["moments", "batch_stats"],
    )
    sites: dict[str, dict[str, Any]] = {}
    for path, value in flatten_dict(seen["moments"]).items():
        sites.setdefault("/".join(path[:-1]), {})[path[-1]] = value
    return sites
