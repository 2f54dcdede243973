"""A run at one step, as probes see it: outside of what is compiled, and within."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from bnresearch import optim
from bnresearch.experiment import Experiment, Feeder
from bnresearch.net import Applied, Net, of_run
from bnresearch.parallel import JitLayout, Layout
from bnresearch.probes.options import selected
from bnresearch.probes.structure import Structure, structure
from bnresearch.state import State
from bnresearch.step import make_gradients, microbatch, random_keys, total
from bnresearch.tasks import TASKS
from bnresearch.watch import NOBODY, Watch

Tree = Any


@dataclass(frozen=True)
class View:
    """A run at one step within what is compiled: its arrays are traced.

    Attributes:
      config: of any run of the program; what it says of numbers is in ``numbers``.
      state: parameters, statistics, optimizer, and the number of the batch to look at.
      feed: of the dataset, for that batch.
      rate: the learning rate of this step over that of the config.
      structure: None while it is being found.
    """

    config: ConfigDict
    dataset: Any
    layout: Layout
    state: State
    feed: Tree
    numbers: Mapping[str, Any]
    rate: Any
    structure: Structure | None = None

    @property
    def params(self) -> Tree:
        return self.state.params

    @property
    def batch(self) -> Any:
        """The training batch of this step, with the augmentation that training gives it; of a run
        that accumulates gradients its first microbatch."""
        first = jnp.int32(0)
        given = (self.dataset, self.layout, self.state.step, self.feed, self.numbers, first)
        return self.layout.constrain(microbatch(*given))

    @property
    def net(self) -> Net:
        """The model of the run; it draws what it draws at this step of training."""
        classes = self.dataset.info.num_classes
        inner = of_run(self.config, classes, self.numbers, self.layout.scope)
        keys = random_keys(self.layout, self.numbers, self.state.step, jnp.int32(0))

        def call(variables: Tree, batch: Any, *, train: bool, rngs: Any, mutable: Any) -> Any:
            return inner.call(variables, batch, train=train, rngs=keys, mutable=mutable)

        return Net(call, inner.losses)

    def apply(
        self,
        watch: Watch = NOBODY,
        *,
        params: Tree = None,
        train: bool = True,
        mutable: tuple[str, ...] = (),
        **collections: Tree,
    ) -> Applied:
        """A pass over the batch, as in training unless ``train`` or the watch says otherwise;
        ``collections`` of variables beside parameters and statistics."""
        params = self.params if params is None else params
        variables = {"params": params, "batch_stats": self.state.batch_stats, **collections}
        return self.net.apply(variables, self.batch, train=train, watch=watch, mutable=mutable)

    def loss(self, applied: Applied) -> jax.Array:
        """What training minimises, of a pass with the mutable collection "penalties"."""
        smoothing = self.numbers["task.classification.label_smoothing"]
        loss = TASKS[self.config.task.name].loss(applied.output, self.batch, smoothing)
        return loss + total(applied.mutated.get("penalties", {}))

    def loss_and_gradient(self, params: Tree) -> tuple[jax.Array, Tree]:
        """Of the whole batch at other parameters: the very function that the train step takes, with
        its dropout, label smoothing, penalties and microbatches."""
        gradients = make_gradients(self.config, self.dataset, self.layout)
        loss, gradient, _ = gradients(self.state.replace(params=params), self.feed, self.numbers)
        return loss, gradient

    def updated(self, gradient: Tree) -> Tree:
        """The parameters that the run's optimizer makes of this gradient."""
        optimizer = optim.make_optimizer(self.config.optim, self.numbers, self.rate)
        updates, _ = optimizer.update(gradient, self.state.opt_state, self.params)
        return optax.apply_updates(self.params, updates)

    def differentiable(self) -> "View":
        """The same, computed by XLA alone, whose functions can be differentiated once more."""
        config = self.config.copy_and_resolve_references()
        config.parallel.kernels = "xla"
        return dataclasses.replace(self, config=config)


Piece = Callable[..., Tree]


class Inside:
    """A run at one step: what a probe is given.

    ``inside(piece, *arrays)`` calls ``piece(view, *arrays)``, compiled, with the View of this step;
    arrays and results may be any trees. A piece is a function of a module: it is compiled once for
    all runs of a program and all steps, so what changes has to be among its arrays.

    On several devices it computes as `parallel.mode` jit would, whatever the mode of the run.
    """

    def __init__(self, experiment: Experiment, state: State):
        self.experiment, self.program = experiment, experiment.program
        self.step = int(state.step)
        # Beyond the last step there is no learning rate: there it is that of the last one.
        self._last = min(self.step, self.program.total_steps - 1)
        self.learning_rate = experiment.learning_rate(self._last)
        state = state.replace(meter={}, average={})
        self.state = self.layout.put(state)

    def __call__(self, piece: Piece, *arrays: Tree, ahead: int = 0) -> Tree:
        """What a piece gives, in the arrays of jax; ``ahead`` steps later in the data."""
        known = self.program.probes
        if piece not in known:
            known[piece] = _compiled(piece, *self._fixed(), self.structure)
        return known[piece](self._given(ahead), *arrays)

    @property
    def batches(self) -> int:
        """Over how many training batches a probe averages that needs several."""
        return self.experiment.config.probes.batches

    def over_batches(self, piece: Piece) -> list[Tree]:
        """What a piece gives for each of that many batches, in arrays of numpy."""
        return [jax.device_get(self(piece, ahead=ahead)) for ahead in range(self.batches)]

    def loss_and_gradient(self, params: Tree) -> tuple[jax.Array, Tree]:
        """Of this step's batch at any parameters, see `View.loss_and_gradient`."""
        return self(View.loss_and_gradient, params)

    @functools.cached_property
    def gradient(self) -> Tree:
        """The one that this step will follow."""
        return self.loss_and_gradient(self.state.params)[1]

    @functools.cached_property
    def updated(self) -> Tree:
        """The parameters that this step will make, by the run's own optimizer."""
        return self(View.updated, self.gradient)

    @property
    def sites(self) -> list[str]:
        """The paths of the norms to look at, in order of execution."""
        return selected(self.experiment.config.probes, self.structure.sites)

    @property
    def layers(self) -> list[tuple[int, str]]:
        """Number and name of the layers to look at, see `structure.Structure`."""
        names = self.structure.layers
        kept = selected(self.experiment.config.probes, names)
        return [(index, name) for index, name in enumerate(names) if name in kept]

    @functools.cached_property
    def structure(self) -> Structure:
        """Of the net; nothing is computed for it."""
        known = self.program.probes
        if "structure" not in known:
            find = _compiled(lambda view: found.append(_structure(view)), *self._fixed(), None)
            found: list[Structure] = []
            jax.eval_shape(find, self._given(0))
            known["structure"] = found[0]
        return known["structure"]

    @functools.cached_property
    def layout(self) -> JitLayout:
        """All devices of the run, as under jit: named axes are bound nowhere else."""
        config, program = self.experiment.config, self.program
        if isinstance(program.layout, JitLayout):
            return program.layout
        given = (program.layout.device_count, config.data.batch_size, config.train.accumulate)
        return program.probes.setdefault("layout", JitLayout(config.norm.scope, *given))

    def _given(self, ahead: int) -> Tree:
        """All arrays of a View."""
        dataset, step = self.program.dataset, self.step + ahead
        feed = dataset.feed(self.experiment.seed, step, reader="probes")
        if dataset.sharded_feed:
            feed = self.layout.put_batch(feed)
        else:
            feed = self.program.feeders.setdefault("probes", Feeder(self.layout.put))(feed)
        rate = np.float32(self.program.schedule(self._last))
        return self.state.replace(step=np.int32(step)), feed, self.experiment.numbers, rate

    def _fixed(self) -> tuple[ConfigDict, Any, Layout]:
        return self.experiment.config, self.program.dataset, self.layout


def _compiled(
    piece: Piece, config: ConfigDict, dataset: Any, layout: Layout, structure: Structure | None
) -> Piece:
    """A piece as a function of the arrays of a View; it keeps no state of any run."""

    def viewed(given: Tree, *arrays: Tree) -> Tree:
        state, feed, numbers, rate = given
        view = View(config, dataset, layout, state, feed, numbers, rate, structure)
        return piece(view, *arrays)

    return jax.jit(viewed)


def _structure(view: View) -> Structure:
    variables = {"params": view.params, "batch_stats": view.state.batch_stats}
    return structure(view.net, variables, view.batch)
