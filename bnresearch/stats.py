"""With which statistics a run can be evaluated: the table STATS; docs/evaluation.md explains it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch import adapt
from bnresearch.errors import UserError
from bnresearch.experiment import Experiment, Feeder, evaluator
from bnresearch.net import of_run
from bnresearch.precise import Precise, distances, layer_after_layer, one_pass, require_sites
from bnresearch.run_statistics import OfTraining, of_training
from bnresearch.state import State
from bnresearch.step import site_paths
from bnresearch.tasks import TASKS
from bnresearch.watch import Watch

Tree = Any
# Weights of the example among which `examples` chooses; 0 are the running statistics.
GRID = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


class Asked(NamedTuple):
    """An evaluation: of what, with how many batches of training, and what to call after each."""

    experiment: Experiment
    state: State
    split: str
    batches: int
    tick: Callable[[int], Callable[[], None]]

    @property
    def variables(self) -> Tree:
        return {"params": self.state.params, "batch_stats": self.state.batch_stats}


class Statistic(NamedTuple):
    """A row of STATS.

    Attributes:
      run: ``(asked, argument) -> what to print``.
      argument: reads what stands behind the colon; None: nothing may.
      needed: something has to.
      on_batch: a prediction depends on the other examples that are evaluated.
    """

    run: Callable[[Asked, Any], dict[str, Any]]
    argument: Callable[[str], float] | None = None
    needed: bool = False
    on_batch: bool = False


# ---- Statistics as they are


def _running(asked: Asked, _: None) -> dict[str, Any]:
    """The running statistics: ordinary inference."""
    return evaluator(asked.experiment, "running")(asked.state, asked.split)


def _batch(asked: Asked, _: None) -> dict[str, Any]:
    """Those of the evaluation batch: predictions depend on the batch around them.

    Of the whole batch, whatever ``norm.scope``.
    """
    return evaluator(asked.experiment, "batch")(asked.state, asked.split)


# ---- Statistics taken anew


def _precise(asked: Asked, _: None) -> dict[str, Any]:
    """Taken anew over batches of training, in one pass and layer after layer (Wu & Johnson, 2021).

    The entry "batch_stats" of the result is what one pass gave.
    """
    training = _training(asked)
    evaluate = evaluator(asked.experiment, "running")
    over = training.batches(asked.experiment, int(asked.state.step), asked.batches)
    treated = [site.how for site in training.prepared.sites.values()]
    passes = treated.count("pooled") + ("moved" in treated)
    tick = asked.tick((1 + passes) * len(over))
    given = (training.prepared, training.layout.put(asked.variables), over)
    ways = [way(*given, tick=tick) for way in (one_pass, layer_after_layer)]
    first, other = (
        evaluate(asked.state.replace(batch_stats=way.batch_stats), asked.split) for way in ways
    )
    summary = _summary(asked, ways[0])
    return first | {
        "layer_after_layer": other,
        "recalibration": summary,
        "batch_stats": ways[0].batch_stats,
    }


def _training(asked: Asked, use: str = "be taken anew", *observe: Any) -> OfTraining:
    """The run's net on its training batches, if it has statistics that can be of this use."""
    training = of_training(asked.experiment, asked.variables, *observe)
    require_sites(training.prepared.sites, use)
    return training


def _summary(asked: Asked, precise: Precise) -> dict[str, Any]:
    """Over what was pooled, what became of each site, and how far the running statistics are from
    that (`precise.distance`): the farthest site."""
    treated: dict[str, list[str]] = {}
    for path, site in precise.sites.items():
        treated.setdefault(site.how, []).append(path)
    found = distances(precise, asked.state.batch_stats)
    size = asked.experiment.config.data.batch_size
    summary = {"batches": asked.batches, "examples": asked.batches * size, "sites": treated}
    if found:
        farthest = max(found, key=lambda path: found[path])
        summary["distance"] = {"largest": found[farthest], "site": farthest}
    return summary


# ---- Statistics at prediction time


def _blend(asked: Asked, source: float) -> dict[str, Any]:
    """blend:N - running ones that count as N examples, and the batch (Schneider et al., 2020)."""
    evaluate = _adaptive(asked, "blend", lambda path, *args: adapt.blend(*args))
    return evaluate(source, asked.split)


def _examples(asked: Asked, weight: float | None) -> dict[str, Any]:
    """examples:w - weight w for the example itself (Summers & Dinneen, 2020).

    Without w it is chosen on the validation split among GRID: the best accuracy, then the least
    loss, then the smallest.
    """
    evaluate = _adaptive(
        asked, "examples", lambda path, running, x, mask, w: adapt.with_example(running, x, w)
    )
    if weight is not None:
        return evaluate(weight, asked.split)
    if asked.split == "validation":
        raise UserError(
            "--stats=examples chooses its weight on the validation split, and --split=validation "
            "would judge it there; give a weight, as in examples:0.1, or another split"
        )
    tick = asked.tick(len(GRID))
    found = {}
    for w in GRID:
        found[w] = evaluate(w, "validation")
        tick()
    best = min(found, key=lambda w: (-found[w]["accuracy"], found[w]["loss"]))
    chosen = {"weight": best, "validation": found[best]}
    return evaluate(best, asked.split) | {"chosen": chosen}


def _corrected(asked: Asked, _: None) -> dict[str, Any]:
    """As if the example stood in a batch of training; after Singh & Shrivastava (2019)."""
    training = _training(asked, "be corrected", adapt.example_moments)
    adapt.check_sites(training.prepared.sites, "corrected")
    over = training.batches(asked.experiment, int(asked.state.step), asked.batches)
    given = (training.prepared, training.layout.put(asked.variables), over)
    precise = one_pass(*given, tick=asked.tick(len(over)))
    spread = {
        path: jnp.asarray(found["examples"].var, jnp.float32)
        for path, found in precise.observed.items()
    }

    def change(path: str, running: Any, x: Any, mask: Any, spread: Tree) -> Any:
        size = precise.sites[path].options.get("size", training.set_size)
        return adapt.corrected(running, x, size, spread[path])

    state = asked.state.replace(batch_stats=precise.batch_stats)
    evaluate = _adaptive(asked._replace(state=state), "corrected", change)
    return evaluate(spread, asked.split)


def _tent(asked: Asked, rate: float | None) -> dict[str, Any]:
    """tent[:LR] - those of the batch; scale and bias go down the entropy (Wang et al., 2021)."""
    rate = 1e-3 if rate is None else rate
    experiment = asked.experiment
    config, dataset = experiment.config, experiment.program.dataset
    sites = site_paths(config, dataset.info.shape, dataset.info.num_classes)
    net = of_run(config, dataset.info.num_classes)

    def step(variables: Tree, adapted: Tree, rate: Any, feed: Tree, index: Any) -> Any:
        rows = jnp.arange(config.data.eval_batch_size)
        batch = dataset.eval_batch(feed, index, rows)
        logits, adapted = adapt.tent(net, variables, batch, adapted, rate)
        return TASKS[config.task.name].sums(logits, batch), adapted

    compiled, adapted, sums = jax.jit(step), adapt.tent_start(asked.state.params, sites, rate), []
    for feed, index in _feeds(experiment, asked.split):
        found, adapted = compiled(asked.variables, adapted, rate, feed, index)
        sums.append(found)
    return _total(experiment, sums)


def _adaptive(
    asked: Asked, what: str, change: Callable[..., Any]
) -> Callable[[Any, str], dict[str, Any]]:
    """``(extra, split) -> metrics`` with ``change(path, running, x, mask, extra)`` in place of the
    running statistics of every site, where mask says which examples are no padding; ``extra`` are
    arguments of the compiled step."""
    experiment = asked.experiment
    config, dataset = experiment.config, experiment.program.dataset
    net = of_run(config, dataset.info.num_classes)
    sites = _training(asked, "be put together with others").prepared.sites
    adapt.check_sites(sites, what)

    def step(variables: Tree, extra: Tree, feed: Tree, index: Any) -> Any:
        batch = dataset.eval_batch(feed, index, jnp.arange(config.data.eval_batch_size))

        def statistics(path: str, running: Any, x: jax.Array, _: Any) -> Any:
            if sites[path].how == "kept":
                return running
            return change(path, running, x, batch["mask"], extra)

        watch = Watch(use="running", statistics=statistics)
        logits = net.apply(variables, batch, watch=watch).output
        return TASKS[config.task.name].sums(logits, batch)

    compiled = jax.jit(step)

    def evaluate(extra: Tree, split: str) -> dict[str, Any]:
        feeds = _feeds(experiment, split)
        sums = [compiled(asked.variables, extra, feed, index) for feed, index in feeds]
        return _total(experiment, sums)

    return evaluate


def _feeds(experiment: Experiment, split: str) -> Iterator[tuple[Tree, Any]]:
    """What the evaluation steps of a split need, with their numbers."""
    program = experiment.program
    put = program.feeders.setdefault(split, Feeder(program.layout.put))
    for index in range(program.dataset.eval_steps(split)):
        yield put(program.dataset.eval_feed(split, index)), np.int32(index)


def _total(experiment: Experiment, sums: list[Tree]) -> dict[str, Any]:
    total = jax.tree.map(lambda *batches: sum(batches), *jax.device_get(sums))
    return TASKS[experiment.config.task.name].metrics(total)


# ---- What stands behind the colon


def _between(name: str, meaning: str, low: float, high: float) -> Callable[[str], float]:
    """Reads a number in [low, high] (finite in any case)."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            most = "" if high == math.inf else f", at most {high:g}"
            given = f"{name}:{text}" if text else name
            raise UserError(f"--stats={given}: {meaning} is a number, at least {low:g}{most}")
        return value

    return read


STATS: dict[str, Statistic] = {
    "running": Statistic(_running),
    "batch": Statistic(_batch, on_batch=True),
    "precise": Statistic(_precise),
    "blend": Statistic(
        _blend,
        _between("blend", "how many examples the running ones count as", 0, math.inf),
        needed=True,
        on_batch=True,
    ),
    "examples": Statistic(_examples, _between("examples", "the weight of the example", 0, 1)),
    "corrected": Statistic(_corrected),
    "tent": Statistic(_tent, _between("tent", "the learning rate", 0, math.inf), on_batch=True),
}
