"""The examination: all that the checks look at, measured once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnresearch.doctor import passes
from bnresearch.doctor.structure import Made, Structure
from bnresearch.errors import UserError
from bnresearch.net import Net, inputs_of, labels_of
from bnresearch.pooled import Moments, merged
from bnresearch.watch import NAME

Tree = Any
Array = np.ndarray

ALIVE = 1e-10  # a variance below is none


class Kept(NamedTuple):
    """Mean and variance of each feature, float64 ``[features]``, on the host."""

    mean: Array
    var: Array


@dataclass
class Site:
    """One site of the model.

    Attributes:
      path, made: which, and how it was made.
      depth: its number in the order of execution.
      running: mean and variance as they are among the variables, or None; ``dtype`` is theirs.
      scale, bias: its parameters, or None.
      look, trained, evaluated: {quantity: [calls, features]} of the passes of those names.
      calls: how often a pass calls it.
      moved: whether a training call changes its statistics.
      felt: which channels anything behind them sees.
    """

    path: str
    made: Made
    depth: int
    running: Kept | None = None
    dtype: str = ""
    scale: Array | None = None
    bias: Array | None = None
    look: Mapping[str, Array] = field(default_factory=dict)
    trained: Mapping[str, Array] = field(default_factory=dict)
    evaluated: Mapping[str, Array] = field(default_factory=dict)
    moved: bool = False
    calls: int = 1
    felt: Array = field(default_factory=lambda: np.ones(0, bool))

    @property
    def precise(self) -> Moments:
        """The statistics of all examined training examples together."""
        return pooled(self.look)

    @property
    def expected(self) -> Moments:
        """What running statistics of training are averages of: with dropout, if there is any."""
        return pooled(self.trained) if self.trained else self.precise

    @property
    def values(self) -> float:
        """How many values a batch has: the median."""
        return float(np.median(self.look["count"]))

    def apart(self) -> tuple[float, float]:
        """`distance` of the running statistics from the precise ones."""
        assert self.running is not None
        return distance(self.running, self.precise, self.made.epsilon)


def distance(one: Any, other: Any, epsilon: float = 0.0) -> tuple[float, float]:
    """Root mean square over features of the difference of means in deviations of the ``other``, and
    mean of |log| of the ratio of variances. Epsilon bounds from below what small ones can do."""
    alive = other.var > ALIVE
    if not alive.any():
        return 0.0, 0.0
    m, v = one.mean[alive] - other.mean[alive], other.var[alive]
    ratio = (one.var[alive] + epsilon) / (v + epsilon)
    z = np.sqrt(np.mean(np.square(m) / v))
    return float(z), float(np.mean(np.abs(np.log(np.maximum(ratio, 1e-30)))))


def pooled(stacked: Mapping[str, Array], prefix: str = "") -> Moments:
    """The moments of all calls of a pass together."""
    return merged([stacked[prefix + name] for name in ("mean", "var", "count")])


class Treatment(NamedTuple):
    """What the optimizer does to the parameters of norms, by the path of the site."""

    decayed: frozenset[str] = frozenset()
    still: frozenset[str] = frozenset()


@dataclass
class Examination:
    """A model, looked into.

    Attributes:
      net, variables: the model, and one replica of its variables.
      structure: how its norms stand in it.
      sites: {path: Site} in order of execution.
      batches: how many training batches were looked at, and their size.
      losses: of each evaluation example, with "running" and with "precise" statistics, and of each
        training example with those of its "batch"; empty where the loss is unknown.
      outputs: where it is: those of evaluation, with "running" and with "precise" statistics.
      parts: {into how many parts batches were cut: {path: variance within them}}, if running
        variances are smaller than those of batches; of sites that nothing else explains.
      blame: {path: share of the damage}, filled where evaluation is worse with running statistics.
      treatment: what the optimizer does; None where nobody said.
      inputs: mean and standard deviation of the model's input, per last axis, by split.
      labels: of the training batches, ``[batches, examples]``, or None.
      padding: the share of padded positions in the batches, 0 where there are none.
      dropped: {path of a dropout: second moment of what goes in, ``[features]``}.
      replicas: by how much replicas of running statistics differ, relative; None without replicas.
      frozen: the sites that the user believes to be frozen.
      scope, declared: over what the user wants statistics, and over what training is known to take
        them: "global", "device"; "" for unknown.
      values: of a run: over how many values a set of its statistics is taken, by site (values.py);
        {}: over those of whole batches.
      left_out: batches of another size than most, which were not looked at.
      examples: how many were evaluated.
      apart_evaluation: evaluation batches were given, so that they can differ from training.
    """

    net: Net
    variables: Tree
    structure: Structure
    sites: dict[str, Site]
    batches: int
    size: int
    inputs: dict[str, Kept]
    labels: Array | None
    padding: float
    dropped: dict[str, Array]
    apart_evaluation: bool
    treatment: Treatment | None = None
    replicas: float | None = None
    frozen: frozenset[str] = frozenset()
    scope: str = "global"
    declared: str = ""
    values: Mapping[str, int] = field(default_factory=dict)
    left_out: int = 0
    examples: int = 0
    losses: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)
    parts: dict[int, dict[str, Array]] = field(default_factory=dict)
    blame: dict[str, float] = field(default_factory=dict)

    @property
    def keepers(self) -> list[Site]:
        """The sites with running statistics that an evaluation calls, too."""
        return [self.sites[path] for path in self.structure.keepers if self.sites[path].look]

    @property
    def unseen(self) -> list[str]:
        """Norms that only training calls, or that stand in a transformation that hides them."""
        return [site.path for site in self.sites.values() if not site.look]

    def gap(self) -> tuple[float, float]:
        """By how much the loss is larger with running than with precise statistics, per example,
        and its standard error; where no loss is known, the change of the output instead, in units
        of its spread."""
        if self.losses:
            difference = self.losses["running"] - self.losses["precise"]
            count = max(len(difference), 2)
            return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(count))
        running, precise = self.outputs["running"], self.outputs["precise"]
        return float(np.sqrt(np.square(running - precise).mean()) / (precise.std() + 1e-12)), 0.0


def examine(
    net: Net,
    variables: Tree,
    structure: Structure,
    batches: Sequence[Any],
    eval_batches: Sequence[Any] | None,
    **known: Any,
) -> Examination:
    """Runs the passes over the training batches, which have one shape; evaluation comes after it
    (`damage.evaluate`). ``known`` are the attributes of an Examination that others know."""
    # All on the default device and free to move: else each pass would be compiled once more.
    variables = jax.tree.map(jnp.asarray, jax.device_get(variables))
    looks, trains, padding = [], [], paddings(batches)
    nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), structure.outputs)
    dropout = bool(structure.dropouts)
    for index, (batch, pad) in enumerate(zip(batches, padding, strict=True)):
        looks.append(jax.device_get(passes.look(net, variables, batch, pad, nothing)))
        if dropout or not index:  # without it, one of them says all
            done = passes.train(net, variables, batch, np.uint32(index), dropout)
            trains.append(jax.device_get(done))
    examined = Examination(
        net,
        variables,
        structure,
        _sites(structure, variables, looks, trains),
        batches=len(batches),
        size=len(jax.tree.leaves(batches[0])[0]),
        inputs=_inputs(batches, eval_batches),
        labels=_labels(batches),
        padding=float(np.mean([1 - np.mean(p) for p in padding if p is not None] or [0.0])),
        dropped=_dropped(looks),
        apart_evaluation=eval_batches is not None,
        **known,
    )
    if looks[0].loss is not None:
        examined.losses["batch"] = np.concatenate([look.loss for look in looks])
    return examined


# ---- What was seen, by site


def _sites(
    structure: Structure, variables: Tree, looks: Sequence[Any], trains: Sequence[Any]
) -> dict[str, Site]:
    stats, params = (flatten_dict(variables.get(n, {})) for n in ("batch_stats", "params"))
    felt = [_by_site(look.more["felt"]) for look in looks]
    before = _by_site(variables.get("batch_stats", {}))
    after = [_by_site(train.more["batch_stats"]) for train in trains[:1]]
    found = {}
    for depth, (path, made) in enumerate(structure.made.items()):
        where = tuple(path.split("/"))
        site = Site(path, made, depth)
        if made.keeps:
            mean, var = (np.asarray(stats[(*where, name)]) for name in Kept._fields)
            site.dtype = str(mean.dtype)
            site.running = Kept(*(np.asarray(x, float).reshape(-1) for x in (mean, var)))
            site.moved = any(_differ(before[path], a.get(path, {})) for a in after)
        site.scale, site.bias = (
            np.asarray(params[(*where, name)], float).reshape(-1)
            if (*where, name) in params
            else None
            for name in ("scale", "bias")
        )
        site.calls = max(len(looks[0].sites.get(path, ())), 1)
        site.look = _stacked([call for look in looks for call in look.sites.get(path, ())])
        site.trained = _stacked([call for t in trains for call in t.sites.get(path, ())])
        site.felt = np.any([f[path][NAME] for f in felt if path in f] or [np.ones(1, bool)], axis=0)
        found[path] = site
    return found


def _by_site(tree: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """A collection as {path of the module: {name: array}}."""
    found: dict[str, dict[str, Array]] = {}
    for path, leaf in flatten_dict(tree).items():
        found.setdefault("/".join(path[:-1]), {})[path[-1]] = np.asarray(leaf)
    return found


def _differ(before: Mapping[str, Array], after: Mapping[str, Array]) -> bool:
    return any(not np.array_equal(before[name], after.get(name, before[name])) for name in before)


def _stacked(calls: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    if not calls:
        return {}
    return {name: np.stack([np.asarray(call[name]) for call in calls]) for name in calls[0]}


def _dropped(looks: Sequence[Any]) -> dict[str, Array]:
    """The mean second moment of what goes into each dropout."""
    paths = {path for look in looks for path in look.dropped}
    return {path: np.mean([look.dropped[path] for look in looks], axis=0) for path in paths}


def _inputs(batches: Sequence[Any], eval_batches: Sequence[Any] | None) -> dict[str, Kept]:
    found = {}
    for split, some in (("training", batches), ("evaluation", eval_batches or ())):
        arrays = (_input(batch) for batch in some)
        rows = [x.reshape(-1, _channels(x)) for x in arrays if np.issubdtype(x.dtype, np.floating)]
        if rows:  # batch by batch: together they may be large
            each = [
                (x.mean(0, dtype=float), x.var(0, dtype=float), np.full(x.shape[1], len(x)))
                for x in rows
            ]
            mean, var, _ = merged([np.stack(part) for part in zip(*each, strict=True)])
            found[split] = Kept(mean, var)
    return found


def _input(batch: Any) -> Array:
    try:
        return np.asarray(inputs_of(batch))
    except UserError:  # a batch that only the model's own call understands
        return np.asarray(jax.tree.leaves(batch)[0])


def _channels(x: Array) -> int:
    """The last axis of a picture is its colours; of anything else all values are taken together."""
    return x.shape[-1] if x.ndim == 4 and x.shape[-1] <= 4 else 1


def paddings(batches: Sequence[Any]) -> list[Array | None]:
    """Which positions are data, batch by batch (`padded`); all where only others have padding."""
    found = [padded(batch) for batch in batches]
    some = next((p for p in found if p is not None), None)
    return [np.ones_like(some) if p is None and some is not None else p for p in found]


def padded(batch: Any) -> Array | None:
    """Which positions are data, booleans ``[batch, time]``: the batch's own "mask"; else, of
    integer tokens ``[batch, time]``, the positions before the zeros at the end of every sequence,
    where sequences end in zeros after different lengths; None without padding."""
    if isinstance(batch, Mapping) and "mask" in batch:
        return np.asarray(batch["mask"]).astype(bool)
    x = _input(batch)
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.integer):
        return None
    inside = np.flip(np.logical_or.accumulate(np.flip(x != 0, 1), axis=1), 1)
    return inside if len(np.unique(inside.sum(1))) > 1 and inside.mean() < 0.95 else None


def _labels(batches: Sequence[Any]) -> Array | None:
    labels = [labels_of(batch) for batch in batches]
    if any(y is None or np.ndim(y) != 1 for y in labels):
        return None
    found = np.stack([np.asarray(y) for y in labels])
    return found if np.issubdtype(found.dtype, np.integer) else None
