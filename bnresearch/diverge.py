"""Where a run diverged: the first site whose statistics are not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnresearch.experiment import Experiment, train_feed
from bnresearch.state import State
from bnresearch.step import build_model, microbatch, random_keys


def explain(experiment: Experiment, state: State) -> str:
    """Run the refused step once more and name the first site, in order of execution, whose input
    has a mean or variance that is not finite."""
    for site, moments in site_moments(experiment, state):
        if not np.isfinite([moments["mean"], moments["var"]]).all():
            return f"the statistics of site {site} are not finite"
    return "the statistics of all sites are finite, but the loss or its gradient is not"


def site_moments(experiment: Experiment, state: State) -> list[tuple[str, dict[str, Any]]]:
    """Mean, variance and count of the input of every site in the next step, in order of execution,
    microbatch by microbatch: on the same devices, with the same batch, scope and dropout masks."""
    config, layout = experiment.config, experiment.program.layout
    dataset, order = experiment.program.dataset, []

    def forward(state: State, feed: Any, numbers: Any, count: Any) -> list[Any]:
        classes = dataset.info.num_classes
        model = build_model(config, classes, use="batch", numbers=numbers, scope=layout.scope)
        found = []
        for index in range(layout.accumulate):
            place = jnp.int32(index)
            batch = microbatch(dataset, layout, state.step, feed, numbers, place)
            _, seen = model.apply(
                {"params": state.params, "batch_stats": state.batch_stats},
                layout.constrain(batch)["image"],
                train=True,
                rngs=random_keys(layout, numbers, state.step, place),
                mutable=["moments", "batch_stats"],
            )
            found.append(seen["moments"])
            # While tracing, the dicts are in the order of execution; jax returns them sorted.
            order.append(list(dict.fromkeys(path[:-1] for path in flatten_dict(seen["moments"]))))
        return found

    compiled = layout.compile(forward, sharded_feed=dataset.sharded_feed, donate=False)
    feed = train_feed(experiment, int(state.step), 1)
    result = compiled(layout.put(state), feed, experiment.numbers, np.int32(1))
    sites = []
    for paths, moments in zip(order, jax.device_get(layout.get(result)), strict=True):
        flat = flatten_dict(moments)
        for path in paths:
            values = {name: flat[*path, name] for name in ("mean", "var", "count")}
            sites.append(("/".join(path), values))
    return sites
