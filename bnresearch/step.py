"""The train and the evaluation step as pure functions, run by any layout of parallel.py."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from bnresearch import accumulate, average, norm_config, optim, sites
from bnresearch.config import chosen
from bnresearch.layers import Norm, NormMaker, site_inputs
from bnresearch.models import MODELS
from bnresearch.parallel import Layout
from bnresearch.sets import Scope
from bnresearch.state import DROPOUT, INIT, NORM, State, empty_meter, stream
from bnresearch.tasks import TASKS

Tree = Any
Numbers = Mapping[str, Any]

MOST_UNROLLED = 8

# What every norm of the model is handed, if the batches of a dataset have it.
SIDE_INPUTS = ("domain", "condition", "time")


def build_model(
    config: ConfigDict,
    num_classes: int,
    *,
    use: str,
    numbers: Numbers | None = None,
    scope: Scope = Scope(),
) -> nn.Module:
    """The model of a config; ``use`` says which statistics its norms normalise with."""
    norm = NormMaker(
        norm_config.choice(config, numbers or {}),
        norm_config.rules(config),
        use,
        replace(scope, kernels=config.parallel.kernels),
        config.norm.weights,
    )
    module = MODELS[config.model.name].module
    dtype = jnp.dtype(config.dtype)
    return module(num_classes=num_classes, norm=norm, dtype=dtype, **chosen(config, "model"))


def site_paths(config: ConfigDict, shape: tuple[int, ...], num_classes: int) -> list[str]:
    """The paths of all norms of the model, in order of execution."""
    paths: list[str] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Norm) and context.method_name == "__call__":
            paths.append("/".join(context.module.path))
        return call(*args, **kwargs)

    model = build_model(config, num_classes, use="running")
    image = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    return paths


def check_rules(config: ConfigDict, shape: tuple[int, ...], num_classes: int) -> None:
    """Raises UserError for a rule of ``norm.rules`` that changes nothing."""
    if config.norm.rules:
        sites.check_rules(norm_config.rules(config), site_paths(config, shape, num_classes))


def make_init(
    config: ConfigDict, shape: tuple[int, ...], num_classes: int
) -> Callable[[Numbers], State]:
    """The state before the first step, as a function of the numbers (of the seed)."""

    def init(numbers: Numbers) -> State:
        model = build_model(config, num_classes, use="running")
        # Two examples: what reduces over the batch must not refuse to be initialised.
        image = jnp.zeros((2, *shape), jnp.float32)
        variables = model.init(stream(numbers["seed"], INIT), image, train=False)
        params = variables["params"]
        optimizer = optim.make_optimizer(config.optim, numbers, 1.0)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
            meter=empty_meter(),
            average=average.start(config.train.average.name, params),
        )

    return init


def make_forward(config: ConfigDict, dataset: Any, layout: Layout) -> Callable[..., Any]:
    """``(use, state, feed, numbers) -> forward``, the pass over one microbatch:
    ``(params, batch_stats, index) -> loss, (moments of the sites, new running statistics)``."""
    task, classes = TASKS[config.task.name], dataset.info.num_classes
    collections = ["batch_stats", "penalties"] + ["moments"] * (layout.accumulate > 1)
    smoothed = config.task.classification.label_smoothing > 0

    def bind(use: str, state: State, feed: Tree, numbers: Numbers) -> accumulate.Forward:
        model = build_model(config, classes, use=use, numbers=numbers, scope=layout.scope)
        smoothing = numbers["task.classification.label_smoothing"] if smoothed else 0.0

        def forward(params: Tree, batch_stats: Tree, index: jax.Array) -> Any:
            batch = layout.constrain(microbatch(dataset, layout, state.step, feed, numbers, index))
            with site_inputs(**{name: batch[name] for name in SIDE_INPUTS if name in batch}):
                logits, mutated = model.apply(
                    {"params": params, "batch_stats": batch_stats},
                    batch["image"],
                    train=True,
                    rngs=random_keys(layout, numbers, state.step, index),
                    mutable=collections,
                )
            loss = task.loss(logits, batch, smoothing) + total(mutated.get("penalties", {}))
            moments = accumulate.site_moments(mutated.get("moments", {}), batch_stats)
            return layout.mean_loss(loss), (moments, mutated.get("batch_stats", {}))

        return forward

    return bind


def make_gradients(
    config: ConfigDict, dataset: Any, layout: Layout
) -> Callable[..., tuple[jax.Array, Tree, Tree]]:
    """``(state, feed, numbers) -> loss, gradient, new running statistics`` of one whole batch."""
    bind, count = make_forward(config, dataset, layout), layout.accumulate
    whole = config.train.accumulate_statistics == "batch" and count > 1
    # Convolutions in a loop are slow on CPU; unrolling many microbatches takes for ever to compile.
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    unroll = on_cpu and not MODELS[config.model.name].dense and count <= MOST_UNROLLED

    def gradients(state: State, feed: Tree, numbers: Numbers) -> tuple[jax.Array, Tree, Tree]:
        exact = whole and bool(state.batch_stats)
        forward = bind("running" if exact else "batch", state, feed, numbers)
        given = (forward, state.params, state.batch_stats)
        if count == 1:
            loss, gradient, _, batch_stats = accumulate.gradients(*given, jnp.int32(0))
            return loss, gradient, batch_stats
        rules, default = norm_config.rules(config), norm_config.choice(config, numbers)

        def choice_at(path: str) -> sites.Choice:
            return sites.choose(path, default, rules)

        if exact:
            results = accumulate.exact_gradients(*given, count, unroll)
        else:
            once = accumulate.moved_once(state.batch_stats, choice_at)
            results = accumulate.microbatch_gradients(*given, count, unroll, once)
        loss, gradient, moments, threaded = results
        batch_stats = accumulate.update_statistics(state.batch_stats, threaded, moments, choice_at)
        return loss, gradient, batch_stats

    return gradients


def microbatch(
    dataset: Any, layout: Layout, step: jax.Array, feed: Tree, numbers: Numbers, index: jax.Array
) -> dict[str, jax.Array]:
    """The rows of microbatch ``index`` that this device handles. Microbatch j holds the rows
    ``[j * size, (j + 1) * size)`` of the batch, on however many devices."""
    if dataset.sharded_feed:
        feed = jax.tree.map(lambda x: x[index], feed)
    rows = index * layout.microbatch + layout.rows()
    return dataset.train_batch(feed, numbers["seed"], step, rows)


def random_keys(
    layout: Layout, numbers: Numbers, step: jax.Array, index: jax.Array
) -> dict[str, jax.Array]:
    """Other keys for every step and microbatch; for dropout also (in the per-device modes) for
    every device. Norms draw alike on all devices, as one set of statistics does."""

    def key(name: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(stream(numbers["seed"], name), step), index)

    return {"dropout": layout.fold_key(key(DROPOUT)), "norm": key(NORM)}


def make_train_step(
    config: ConfigDict, dataset: Any, layout: Layout, schedule: optim.Schedule
) -> Callable[[State, Tree, Numbers], State]:
    """One optimizer step, to be run by ``looped`` or ``single``.

    ``meter["bad"]`` of the result says that its loss, gradient or statistics are not finite; the
    rest of it is then of no use: `looped` and `single` go back to the state before.
    """
    gradients = make_gradients(config, dataset, layout)
    steps_per_epoch = dataset.info.examples["train"] / config.data.batch_size
    follow = average.make_update(config.train, steps_per_epoch)

    def train_step(state: State, feed: Tree, numbers: Numbers) -> State:
        loss, gradient, batch_stats = gradients(state, feed, numbers)
        loss, gradient = layout.mean_over_devices((loss, gradient))
        gradient_norm = jnp.sqrt(total(jax.tree.map(jnp.square, gradient)))
        optimizer = optim.make_optimizer(config.optim, numbers, schedule(state.step))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        finite = jnp.isfinite(loss + gradient_norm + total(batch_stats))
        step, params = state.step + 1, optax.apply_updates(state.params, updates)
        return State(
            step=step,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            meter={
                "loss": state.meter["loss"] + loss,
                "gradient_norm": state.meter["gradient_norm"] + gradient_norm,
                "count": state.meter["count"] + 1,
                # It stays: a later step may be dispatched before anybody has looked.
                "bad": state.meter["bad"] | ~finite,
            },
            average=follow(state.average, params, step, numbers),
        )

    return train_step


def total(tree: Tree) -> jax.Array:
    """The sum of all numbers of a tree: finite only if all of them are. Leaves of one shape are
    added first: one reduction per array would be a tenth of the step of a small net."""
    by_shape: dict[tuple[int, ...], jax.Array] = {}
    for leaf in jax.tree.leaves(tree):
        by_shape[leaf.shape] = by_shape[leaf.shape] + leaf if leaf.shape in by_shape else leaf
    return sum((leaf.sum() for leaf in by_shape.values()), jnp.zeros((), jnp.float32))


def flagged(state: State, bad: jax.Array | bool) -> State:
    """The state with ``meter["bad"]`` set to ``bad``."""
    return state.replace(meter=state.meter | {"bad": jnp.asarray(bad)})


def looped(step: Callable[[State, Tree, Numbers], State]) -> Callable[..., State]:
    """``count`` steps in one compiled call. It ends early at a step that is not finite, with the
    state before that step (running statistics, too) and ``meter["bad"]`` set.

    The count is data: runs of any length share one compilation. To get back to the state before a
    bad step, the good ones are taken again: keeping it by a ``where`` over the whole state would
    cost every step of a small net a tenth of its time.
    """

    def run(state: State, feed: Tree, numbers: Numbers, count: jax.Array) -> State:
        start = flagged(state, False)
        wanted = state.step + jnp.where(state.meter["bad"], 0, count)

        def attempt(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            last = carry[1]
            end = jax.lax.while_loop(
                lambda s: (s.step < last) & ~s.meter["bad"],
                lambda s: step(s, feed, numbers),
                start,
            )
            return end, jnp.where(end.meter["bad"], end.step - 1, last)

        def unusable(carry: tuple[State, jax.Array]) -> jax.Array:
            return carry[0].meter["bad"]

        end, _ = jax.lax.while_loop(unusable, attempt, (flagged(state, True), wanted))
        return flagged(end, state.meter["bad"] | (end.step < wanted))

    return run


def single(step: Callable[[State, Tree, Numbers], State]) -> Callable[..., State]:
    """One step per compiled call, in the signature of ``looped``. On CPU a convolution inside a
    loop runs several times slower than the same one dispatched by itself."""

    def run(state: State, feed: Tree, numbers: Numbers, count: jax.Array) -> State:
        new = step(state, feed, numbers)
        bad = new.meter["bad"]
        return jax.tree.map(lambda a, b: jnp.where(bad, b, a), new, flagged(state, True))

    return run


def make_eval_step(
    config: ConfigDict, dataset: Any, batch_size: int, sharding: Any, *, use: str
) -> Callable[..., Tree]:
    """``(params, batch_stats, feed, step) -> sums`` over one evaluation batch.

    ``use="running"`` normalises with the running statistics, ``use="batch"`` with those of the
    evaluation batch itself (transductive: a prediction then depends on the batch around it).
    ``sharding`` spreads the batch over the devices; None leaves it where it is.
    """
    task = TASKS[config.task.name]
    model = build_model(config, dataset.info.num_classes, use=use)

    def eval_step(params: Tree, batch_stats: Tree, feed: Tree, step: jax.Array) -> Tree:
        batch = dataset.eval_batch(feed, step, jnp.arange(batch_size))
        if sharding is not None:
            batch = jax.lax.with_sharding_constraint(batch, sharding)
        variables = {"params": params, "batch_stats": batch_stats}
        # The padding of the last batch is real examples, and counts in batch statistics.
        with site_inputs(**{name: batch[name] for name in SIDE_INPUTS if name in batch}):
            logits: Any = model.apply(
                variables, batch["image"], train=False, rngs={"norm": jax.random.key(0)}
            )
        return task.sums(logits, batch)

    return eval_step
