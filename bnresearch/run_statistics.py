"""The running statistics of a run, taken anew on its training batches; see precise.py."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch.experiment import Experiment, Feeder
from bnresearch.net import Call, Net, of_run
from bnresearch.parallel import Layout, make_layout
from bnresearch.precise import Prepared, input_moments, one_pass, prepare
from bnresearch.step import microbatch
from bnresearch.watch import Seen

Tree = Any


class TrainingBatches:
    """The batches of ``count`` training steps from ``step`` on, as the net of `of_training` takes
    them: they depend on (seed, step) alone, and can be gone through again and again."""

    def __init__(self, experiment: Experiment, layout: Layout, step: int, count: int):
        self.experiment, self.layout, self.first, self.count = experiment, layout, step, count

    def __len__(self) -> int:
        return self.count * self.layout.accumulate

    def __iter__(self) -> Iterator[Any]:
        experiment, layout = self.experiment, self.layout
        dataset, feeders = experiment.program.dataset, experiment.program.feeders
        numbers = layout.put(experiment.numbers)
        for step in range(self.first, self.first + self.count):
            feed = dataset.feed(experiment.seed, step, reader="aside")
            if dataset.sharded_feed:
                feed = layout.put_batch(feed)
            else:
                feed = feeders.setdefault("statistics", Feeder(layout.put))(feed)
            for index in range(layout.accumulate):
                yield feed, numbers, np.int32(step), np.int32(index)


class OfTraining(NamedTuple):
    """A run's net on its training batches; what is compiled for it stays with its program."""

    prepared: Prepared
    layout: Layout

    def batches(self, experiment: Experiment, step: int, count: int) -> TrainingBatches:
        return TrainingBatches(experiment, self.layout, step, count)

    @property
    def set_size(self) -> int:
        """How many examples share statistics in training, if their norm does not say otherwise."""
        return self.layout.microbatch // self.layout.scope.splits


def of_training(
    experiment: Experiment,
    variables: Tree,
    observe: Callable[[Seen], Mapping[str, Any]] = input_moments,
) -> OfTraining:
    """A run's net on its training batches, normalised in the sets of training, as one compiled
    program over its devices, whatever mode trains. Microbatches are batches of their own here,
    unless training takes statistics over all of them."""
    config, program = experiment.config, experiment.program
    if observe not in program.statistics:
        apart = config.train.accumulate_statistics == "microbatch"
        layout = make_layout(
            "jit",
            config.norm.scope,
            program.layout.device_count,
            config.data.batch_size,
            config.train.accumulate if apart else 1,
        )
        info = program.dataset.info
        image = jax.ShapeDtypeStruct((2, *info.shape), jnp.float32)
        sites = prepare(of_run(config, info.num_classes), variables, {"image": image}).sites
        net = Net(_training_call(experiment, layout))
        program.statistics[observe] = OfTraining(
            Prepared(net, sites, observe, {}, alike=True), layout
        )
    return program.statistics[observe]


def _training_call(experiment: Experiment, layout: Layout) -> Call:
    config, dataset = experiment.config, experiment.program.dataset

    def call(variables: Tree, batch: Any, **how: Any) -> Any:
        feed, numbers, step, index = batch
        images = layout.constrain(microbatch(dataset, layout, step, feed, numbers, index))
        net = of_run(config, dataset.info.num_classes, numbers, layout.scope)
        return net.call(variables, images, **how)

    return call


def run_statistics(
    experiment: Experiment, params: Tree, batch_stats: Tree, step: int, batches: int
) -> Tree:
    """The running statistics of a run's net with the weights ``params``, by one pass over the
    training batches of ``batches`` steps from ``step`` on; those that there are where no site keeps
    any that could be taken anew. What is compiled stays with the program; numbers of the config are
    arguments of that.

    Raises:
      UserError: the input of a site is not finite.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    training = of_training(experiment, variables)
    if all(site.how == "kept" for site in training.prepared.sites.values()):
        return batch_stats
    variables = training.layout.put(variables)
    over = training.batches(experiment, step, batches)
    return one_pass(training.prepared, variables, over).batch_stats
