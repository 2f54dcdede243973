"""The examination: all that the checks look at, measured once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.doctor import passes
from bnresearch.doctor.structure import Made, Structure
from bnresearch.errors import UserError
from bnresearch.net import Net, inputs_of, labels_of
from bnresearch.pooled import Moments, merged
from bnresearch.watch import NAME

Tree = Any
Array = np.ndarray

BLAMED = 4  # evaluation batches on which each site's share of the damage is taken


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
    felt: Array = field(default_factory=lambda: np.ones(0, bool))

    @property
    def precise(self) -> Moments:
        """The statistics of all examined training examples together."""
        return pooled(self.look)

    @property
    def values(self) -> float:
        """How many values a batch has: the median."""
        return float(np.median(self.look["count"]))

    def apart(self) -> tuple[float, float]:
        """How far the running statistics are from the precise ones: root mean square over features
        of ``(m_r - m_p) / s_p``, and mean of ``|log(v_r / v_p)|``."""
        assert self.running is not None
        alive = self.precise.var > 1e-12
        if not alive.any():
            return 0.0, 0.0
        m, v = self.precise.mean[alive], self.precise.var[alive]
        rm, rv = (x[alive] for x in self.running)
        z = np.sqrt(np.mean(np.square(rm - m) / v))
        # epsilon bounds from below what a small variance can do.
        ratio = (rv + self.made.epsilon) / (v + self.made.epsilon)
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
      parts: {into how many parts batches were cut: {path: variance within them}}, if running
        variances are smaller than those of batches.
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
      sets: into how many sets with statistics of their own training cuts a batch.
      apart_evaluation: evaluation batches were given, so that they can differ from training.
    """

    net: Net
    variables: Tree
    structure: Structure
    sites: dict[str, Site]
    batches: int
    size: int
    losses: dict[str, Array]
    outputs: dict[str, Array]
    treatment: Treatment | None
    inputs: dict[str, Kept]
    labels: Array | None
    padding: float
    dropped: dict[str, Array]
    replicas: float | None
    frozen: frozenset[str]
    scope: str
    declared: str
    sets: int
    apart_evaluation: bool
    parts: dict[int, dict[str, Array]] = field(default_factory=dict)
    blame: dict[str, float] = field(default_factory=dict)

    @property
    def keepers(self) -> list[Site]:
        return [self.sites[path] for path in self.structure.keepers]

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
    *,
    treatment: Treatment | None,
    replicas: float | None,
    frozen: frozenset[str],
    scope: str,
    declared: str = "",
    sets: int = 1,
) -> Examination:
    """Runs all passes. The batches of either kind have one shape."""
    # All on the default device and free to move: else each pass would be compiled once more.
    variables = jax.tree.map(jnp.asarray, jax.device_get(variables))
    looks, trains, padding = [], [], [padded(batch) for batch in batches]
    nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), structure.outputs)
    for index, (batch, pad) in enumerate(zip(batches, padding, strict=True)):
        looks.append(passes.look(net, variables, batch, pad, nothing))
        trains.append(
            passes.train(net, variables, batch, np.uint32(index), bool(structure.dropouts))
        )
    looks, trains = jax.device_get((looks, trains))
    sites = _sites(structure, variables, looks, trains)
    examined = Examination(
        net,
        variables,
        structure,
        sites,
        batches=len(batches),
        size=len(jax.tree.leaves(batches[0])[0]),
        losses={},
        outputs={},
        treatment=treatment,
        inputs=_inputs(batches, eval_batches),
        labels=_labels(batches),
        padding=float(np.mean([1 - np.mean(p) for p in padding if p is not None] or [0.0])),
        dropped=_dropped(looks),
        replicas=replicas,
        frozen=frozen,
        scope=scope,
        declared=declared,
        sets=sets,
        apart_evaluation=eval_batches is not None,
    )
    examined.parts = _in_parts(examined, batches)
    _evaluate(examined, looks, batches if eval_batches is None else eval_batches)
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
        arrays = [_input(batch) for batch in some]
        arrays = [x for x in arrays if np.issubdtype(x.dtype, np.floating)]
        if arrays:
            x = np.concatenate([x.reshape(-1, _channels(x)) for x in arrays]).astype(float)
            found[split] = Kept(x.mean(0), x.var(0))
    return found


def _input(batch: Any) -> Array:
    try:
        return np.asarray(inputs_of(batch))
    except UserError:  # a batch that only the model's own call understands
        return np.asarray(jax.tree.leaves(batch)[0])


def _channels(x: Array) -> int:
    """The last axis of a picture is its colours; of anything else all values are taken together."""
    return x.shape[-1] if x.ndim == 4 and x.shape[-1] <= 4 else 1


def padded(batch: Any) -> Array | None:
    """Which positions are data, booleans ``[batch, time]``: the batch's own "mask"; else the
    positions before the zeros at the end of every sequence, where an input ``[batch, time]`` of
    integers or ``[batch, time, features]`` ends in zeros after different lengths; None without
    padding."""
    if isinstance(batch, Mapping) and "mask" in batch:
        return np.asarray(batch["mask"]).astype(bool)
    x = _input(batch)
    if not (x.ndim == 3 or (x.ndim == 2 and np.issubdtype(x.dtype, np.integer))):
        return None
    filled = (x.reshape(*x.shape[:2], -1) != 0).any(-1)
    inside = np.flip(np.logical_or.accumulate(np.flip(filled, 1), axis=1), 1)
    lengths = inside.sum(1)
    return inside if len(np.unique(lengths)) > 1 and inside.mean() < 0.95 else None


def _labels(batches: Sequence[Any]) -> Array | None:
    labels = [labels_of(batch) for batch in batches]
    if any(y is None or np.ndim(y) != 1 for y in labels):
        return None
    found = np.stack([np.asarray(y) for y in labels])
    return found if np.issubdtype(found.dtype, np.integer) else None


PARTS = (2, 4, 8)  # of a batch, as devices would hold them
SMALLER = 0.015  # mean |log| by which running variances have to be below those of batches


def _in_parts(examined: Examination, batches: Sequence[Any]) -> dict[int, dict[str, Array]]:
    """The variances at each site with batches whole, and cut into so many parts; {} where running
    variances are not smaller than those of batches, so that there is nothing to explain."""
    keepers = [site for site in examined.keepers if not site.made.frozen]
    whole = {site.path: site.look["var"].mean(0) for site in keepers}
    logs = [
        np.log(np.maximum(site.running.var, 1e-30) / np.maximum(whole[site.path], 1e-30))
        for site in keepers
        if site.running is not None and np.isfinite(site.running.var).all()
    ]
    if not logs or np.concatenate(logs).mean() > -SMALLER:
        return {}
    found = {1: whole}
    for parts in PARTS:
        if examined.size % parts == 0 and examined.size > parts:
            args = examined.net, examined.variables
            each = jax.device_get([passes.within(*args, batch, parts) for batch in batches])
            found[parts] = {path: np.mean([one[path] for one in each], axis=0) for path in whole}
    return found


# ---- Evaluation with running and with precise statistics

CAP = 20.0  # nats: one example, or one that is not finite, must not decide


def _evaluate(examined: Examination, looks: Sequence[Any], batches: Sequence[Any]) -> None:
    net, variables, keepers = examined.net, examined.variables, examined.keepers
    precise = with_statistics(variables, {site.path: site.precise for site in keepers})
    results = {
        name: jax.device_get([passes.losses(net, given, batch) for batch in batches])
        for name, given in (("running", variables), ("precise", precise))
    }
    for name, found in results.items():
        examined.outputs[name] = np.concatenate([one.output for one in found])
        if found[0].loss is not None:
            examined.losses[name] = _capped(found)
    if looks[0].loss is not None:
        examined.losses["batch"] = _capped(looks)
    for path, site in examined.sites.items():
        calls = [call for one in results["running"] for call in one.sites.get(path, ())]
        site.evaluated = _stacked(calls)
    gap, error = examined.gap()
    if examined.losses and gap > 3 * error and gap > 0.01:
        examined.blame = _blame(examined, batches[:BLAMED], precise)


def _capped(found: Sequence[Any]) -> Array:
    losses = np.concatenate([np.asarray(one.loss, float) for one in found])
    return np.minimum(np.nan_to_num(losses, nan=CAP), CAP)


def _blame(examined: Examination, batches: Sequence[Any], precise: Tree) -> dict[str, float]:
    """For every site the share of the damage that its running statistics do: how much of it goes
    when only they are mended, or comes when only they are left; the larger of the two."""

    def loss(variables: Tree) -> float:
        found = [passes.losses(examined.net, variables, batch) for batch in batches]
        return float(_capped(jax.device_get(found)).mean())

    worst, best = loss(examined.variables), loss(precise)
    damage = max(worst - best, 1e-6)
    shares = {}
    for site in examined.keepers:
        assert site.running is not None
        mended = with_statistics(examined.variables, {site.path: site.precise})
        left = with_statistics(precise, {site.path: site.running})
        share = max(worst - loss(mended), loss(left) - best) / damage
        shares[site.path] = float(np.clip(share, 0, 1))
    return shares


def with_statistics(variables: Tree, found: Mapping[str, Any]) -> Tree:
    """Variables with other running means and variances at some sites, float32."""
    flat = flatten_dict(variables["batch_stats"]) if found else {}
    for path, stats in found.items():
        for name in Kept._fields:
            where = (*path.split("/"), name)
            value = jnp.asarray(getattr(stats, name), jnp.float32)
            flat[where] = value.reshape(np.shape(flat[where]))
    return {**variables, "batch_stats": unflatten_dict(flat)} if found else variables
