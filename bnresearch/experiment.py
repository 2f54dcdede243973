"""From a config to compiled functions: everything that is decided before the first step."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from bnresearch import config as configs
from bnresearch import data, native, optim
from bnresearch.data.base import Share
from bnresearch.errors import UserError
from bnresearch.initialise import INITS
from bnresearch.models import MODELS
from bnresearch.parallel import AXES, Layout, PmapLayout, make_layout, parse_scope
from bnresearch.placing import pick_devices, placed
from bnresearch.probes import options as probing
from bnresearch.state import INIT, State, empty_meter, stream
from bnresearch.step import (
    build_model,
    check_rules,
    looped,
    make_eval_step,
    make_init,
    make_train_step,
    single,
    site_paths,
)
from bnresearch.tasks import TASKS

Tree = Any


# Random draws take XLA's CPU compiler seconds at full optimisation, for something that runs once;
# level 1 gives the same bits (level 0 does not).
CPU_INIT = {"xla_backend_optimization_level": 1}

# Of the first batch, on how many examples an initialiser that depends on data looks at most: enough
# for one number per layer, and a forward pass that fits where the training does.
FIRST_LOOK = 256


# Steps of a convolutional net in one call on CPU: XLA takes memory from the system for each call,
# and new memory costs as much as a third of a step; a signal to stop waits for the end of a call.
CONVOLVED_STEPS = 16


class Feeder:
    """Puts a dataset's feeds on the devices; arrays that stay the same are put there once."""

    def __init__(self, put: Callable[[Any], Any]):
        self._put = put
        self._known: dict[str, tuple[Any, Any]] = {}

    def __call__(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        for name, array in feed.items():
            if name not in self._known or self._known[name][0] is not array:
                self._known[name] = (array, self._put(array))
        return {name: self._known[name][1] for name in feed}


class Program(NamedTuple):
    """The compiled functions that all configs share which differ in numbers only."""

    dataset: Any
    layout: Layout
    steps_per_epoch: float
    total_steps: int
    schedule: optim.Schedule
    chunk: int  # training steps per compiled call
    init: Callable[[Tree], State]
    empty_meter: Callable[[], Tree]  # on the devices: to put it there takes ten times as long
    forward: Callable[..., jax.Array]  # (params, batch_stats, image, numbers), as in training
    train: Callable[..., State]
    eval_steps: dict[str, Callable[..., Tree]]
    feeders: dict[str, Feeder]
    together: dict[tuple[str, int], Any]  # of together.py: what trains so many runs at once
    statistics: dict[Any, Any]  # what takes running ones anew (precise.py), and n (values.py)
    probes: dict[Any, Any]  # of probes/inside.py: what looks inside


class Experiment(NamedTuple):
    """One run, ready to start."""

    config: ConfigDict
    resolved: dict[str, Any]
    numbers: dict[str, np.ndarray]
    program: Program
    members: int = 1  # how many runs each of its compiled calls is for

    @property
    def seed(self) -> int:
        return self.config.seed

    def steps(self, name: str) -> int:
        """The duration ``train.<name>`` in optimizer steps."""
        return optim.steps(f"train.{name}", self.config.train[name], self.program.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        factor = np.float32(self.program.schedule(step))
        return float(np.float32(self.config.optim.learning_rate) * factor)


# The newest programs; streams are not kept, because they own worker processes.
_PROGRAMS: dict[str, Program] = {}
_KEEP = 4


def prepare(config: ConfigDict) -> Experiment:
    """Check a config against its data, model and devices, and build its program.

    Nothing is compiled and nothing is written. Configs that differ only in config.NUMBERS get the
    same program, and so compile once in a process.

    Raises:
      UserError: whatever is wrong with the config, in words.
    """
    configs.validate(config)
    resolved = configs.resolve(config)
    if parse_scope(config.norm.scope).devices is not None:
        # The number of devices then decides what the statistics are: it is part of the config.
        resolved["parallel"]["devices"] = len(pick_devices(config.parallel.devices))
    numbers = {
        key: np.asarray(value, np.int32 if key == "seed" else np.float32)
        for key, value in configs.numbers(resolved).items()
    }
    key = configs.program_key(resolved)
    program = _PROGRAMS.get(key) or _build(config)
    check_probes(config, program.dataset.info.shape, program.dataset.info.num_classes)
    experiment = Experiment(config, resolved, numbers, program)
    if key not in _PROGRAMS:
        try:
            _trace(experiment)
        except BaseException:
            program.dataset.close()
            raise
        if not program.dataset.sharded_feed:
            while len(_PROGRAMS) >= _KEEP:
                _PROGRAMS.pop(next(iter(_PROGRAMS)))
            _PROGRAMS[key] = program
    return experiment


def check(config: ConfigDict) -> None:
    """Refuse what `prepare` would refuse, as far as it can be seen without devices and pictures: in
    milliseconds, for somebody who is about to start many runs elsewhere.

    Raises:
      UserError: whatever is wrong with the config, in words.
    """
    configs.validate(config)
    shape, classes = data.outline(config.data)
    if shape is None:
        return
    MODELS[config.model.name].check(configs.chosen(config, "model"), shape)
    check_rules(config, shape, classes)
    check_probes(config, shape, classes)
    numbers = {
        key: jax.ShapeDtypeStruct((), jnp.int32 if key == "seed" else jnp.float32)
        for key in configs.numbers(configs.resolve(config))
    }
    state = jax.eval_shape(make_init(config, shape, classes), numbers)
    if config.parallel.devices == 1 and config.train.accumulate == 1:  # else norms may see less
        image = jax.ShapeDtypeStruct((config.data.batch_size, *shape), jnp.float32)
        forward = _forward(config, classes)
        jax.eval_shape(forward, state.params, state.batch_stats, image, numbers)


def check_probes(config: ConfigDict, shape: tuple[int, ...], num_classes: int) -> None:
    """Raises UserError for ``probes.sites`` that match no site."""
    if config.probes.names and config.probes.sites != probing.EVERYWHERE:
        probing.check_sites(config.probes, site_paths(config, shape, num_classes))


def _build(config: ConfigDict) -> Program:
    native.require(config.parallel.kernels)
    layout = make_layout(
        config.parallel.mode,
        config.norm.scope,
        config.parallel.devices,
        config.data.batch_size,
        config.train.accumulate,
    )
    sizes = {**config.data, "eval_batch_size": _eval_batch_size(config, layout)}
    dataset = data.load(sizes, _share(config))
    entry = MODELS[config.model.name]
    entry.check(configs.chosen(config, "model"), dataset.info.shape)
    check_rules(config, dataset.info.shape, dataset.info.num_classes)
    steps_per_epoch = dataset.info.examples["train"] / config.data.batch_size
    total = optim.steps("train.duration", config.train.duration, steps_per_epoch)
    schedule = jax.jit(optim.schedule(config.optim.schedule, total, steps_per_epoch))
    # On CPU a convolution of XLA inside a compiled loop is several times slower than by itself.
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    convolved = on_cpu and not entry.dense
    looping = not dataset.sharded_feed and (not convolved or _by_library(config, layout))
    most = dataset.max_steps_per_feed
    chunk = min(most, CONVOLVED_STEPS) if convolved else most
    step = make_train_step(config, dataset, layout, schedule)
    train = layout.compile(
        looped(step) if looping else single(step), sharded_feed=dataset.sharded_feed
    )
    return Program(
        dataset=dataset,
        layout=layout,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        schedule=schedule,
        chunk=chunk if looping else 1,
        init=jax.jit(
            _init(config, make_init(config, dataset.info.shape, dataset.info.num_classes)),
            # Where the step takes it: else each leaf has to be told that it lies there already.
            out_shardings=layout.replicated() if layout.device_count == 1 else None,
            compiler_options=CPU_INIT if on_cpu else None,
        ),
        empty_meter=jax.jit(empty_meter, out_shardings=layout.replicated()),
        forward=_forward(config, dataset.info.num_classes),
        train=train,
        eval_steps={},
        feeders={},
        together={},
        statistics={},
        probes={},
    )


def _eval_batch_size(config: ConfigDict, layout: Layout) -> int:
    """That of the config; over several processes the next that divides over the devices. What is
    too much is padding, which no metric counts."""
    size, devices = config.data.eval_batch_size, layout.device_count
    return size if jax.process_count() == 1 else -(-size // devices) * devices


def _share(config: ConfigDict) -> Share:
    """Which rows of a batch a stream reads in this process."""
    return Share(jax.process_index(), jax.process_count(), config.train.accumulate)


def _by_library(config: ConfigDict, layout: Layout) -> bool:
    """Whether no convolution of the step is left to XLA, as far as can be seen before tracing."""
    whole = layout.shares == layout.device_count  # else the compiler shares arrays out
    plain = config.dtype == "float32" and config.train.accumulate == 1
    return whole and plain and native.expected(config.parallel.kernels)


def kernels(experiment: Experiment) -> str:
    """By what convolutions and large norms of a run are computed, for status.json: "native" (see
    `native.choose`, which compiles the library if need be) or "xla"."""
    config, layout = experiment.config, experiment.program.layout
    whole = layout.shares == layout.device_count and experiment.members == 1
    if not whole or config.dtype != "float32":
        return "xla"
    if MODELS[config.model.name].dense:  # compiles the library where a norm turns out to be large
        return "native" if native.expected(config.parallel.kernels) else "xla"
    return native.choose(config.parallel.kernels)


def _init(config: ConfigDict, start: Callable[[Tree], State]) -> Callable[[Tree], State]:
    """``start`` with the kernels that ``init.name`` draws; optimizers start the same for all."""

    def init(numbers: Tree) -> State:
        state = start(numbers)
        draw = INITS[config.init.name].draw
        return state.replace(params=draw(state.params, stream(numbers["seed"], INIT)))

    return init


def _forward(config: ConfigDict, num_classes: int) -> Callable[..., jax.Array]:
    """Logits with batch statistics and without dropout: what training sees at its first step."""

    def forward(params: Tree, batch_stats: Tree, image: jax.Array, numbers: Tree) -> jax.Array:
        model = build_model(config, num_classes, use="batch", numbers=numbers)
        variables = {"params": params, "batch_stats": batch_stats}
        rngs = {"norm": stream(numbers["seed"], INIT)}
        return model.apply(variables, image, train=False, rngs=rngs)  # type: ignore[return-value]

    return forward


def _trace(experiment: Experiment) -> None:
    """Trace the train step: norms and shapes that cannot be are refused here, before compiling."""
    program, layout = experiment.program, experiment.program.layout
    state = jax.eval_shape(program.init, experiment.numbers)
    _check_memory(state, layout.mesh.local_devices[0])
    if isinstance(layout, PmapLayout) and jax.process_count() > 1:
        return  # under a trace pmap knows the devices of its own process only
    state = layout.like(state)
    feed = train_feed(experiment, 0, 1)
    jax.eval_shape(program.train, state, feed, experiment.numbers, np.int32(1))


def _check_memory(state: State, device: jax.Device) -> None:
    """Refuse a state that no device holds: allocating it ends in a hang or a kill, not an error."""
    wanted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    stats = device.memory_stats() or {}
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = stats.get("bytes_limit", physical)
    if wanted > limit:
        raise UserError(
            f"the model and its optimizer state take {wanted / 2**30:,.1f} GiB, but the device "
            f"({device.device_kind}) has {limit / 2**30:,.1f}; choose a smaller model"
        )


def initial_state(experiment: Experiment) -> State:
    """The state before the first step, one copy.

    Raises:
      UserError: the initialiser cannot do with this model what it is made for.
    """
    state = experiment.program.init(experiment.numbers)
    fit = INITS[experiment.config.init.name].fit
    if fit is None:
        return state
    rows = jnp.arange(min(FIRST_LOOK, experiment.config.data.batch_size))
    batch = _first_batch(experiment, rows)
    inputs = (state.batch_stats, batch["image"][: len(rows)], experiment.numbers)
    return state.replace(params=fit(experiment.program.forward, state.params, *inputs).params)


def _first_batch(experiment: Experiment, rows: jax.Array) -> dict[str, jax.Array]:
    """Rows of the first batch: of several processes, too, each looks at the whole of it."""
    dataset, seed = experiment.program.dataset, experiment.seed
    if not dataset.sharded_feed or jax.process_count() == 1:
        return dataset.train_batch(dataset.feed(seed, 0), seed, 0, rows)
    whole = data.load({**experiment.config.data, "workers": 0})
    try:
        return whole.train_batch(whole.feed(seed, 0), seed, 0, rows)
    finally:
        whole.close()


def train_feed(experiment: Experiment, step: int, count: int) -> Tree:
    """What the compiled step takes for the training steps ``[step, step + count)``."""
    program, layout = experiment.program, experiment.program.layout
    feed = program.dataset.feed(experiment.seed, step, count)
    if program.dataset.sharded_feed:
        return layout.put_batch(feed)
    return program.feeders.setdefault("train", Feeder(layout.put))(feed)


def eval_step(experiment: Experiment, use: str) -> Callable[..., Tree]:
    """The compiled ``(params, batch_stats, feed, step) -> sums`` over one evaluation batch."""
    config, program = experiment.config, experiment.program
    if use not in program.eval_steps:
        size, mesh = _eval_batch_size(config, program.layout), program.layout.mesh
        divides = mesh.size > 1 and size % mesh.size == 0
        sharding = NamedSharding(mesh, PartitionSpec(AXES)) if divides else None
        step = make_eval_step(config, program.dataset, size, sharding, use=use)
        program.eval_steps[use] = jax.jit(step, out_shardings=program.layout.replicated())
    return program.eval_steps[use]


def evaluator(experiment: Experiment, use: str) -> Callable[[State, str], dict[str, float]]:
    """``(state, split) -> metrics`` over every example of a split, counted once.

    Evaluation always runs under jit over the whole mesh, whatever mode trains: with given
    statistics there is nothing that the mode could change.
    """
    config, program = experiment.config, experiment.program
    dataset = program.dataset
    step, whole = eval_step(experiment, use), program.layout.replicated()
    put_feed = program.layout.put_rows if dataset.sharded_feed else lambda x: placed(x, whole)

    def evaluate(state: State, split: str) -> dict[str, float]:
        params, batch_stats = placed((state.params, state.batch_stats), whole)
        put = program.feeders.setdefault(split, Feeder(put_feed))
        sums = []
        for index in range(dataset.eval_steps(split)):
            feed = put(dataset.eval_feed(split, index))
            sums.append(step(params, batch_stats, feed, np.int32(index)))
        total = jax.tree.map(lambda *batches: sum(batches), *jax.device_get(sums))
        return TASKS[config.task.name].metrics(total)

    return evaluate
