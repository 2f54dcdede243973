"""Running statistics taken anew at fixed weights: precise batch normalization (Wu & Johnson, 2021).

Running statistics are averages over past batches, made with past weights. Here they become those of
a number of batches at the weights as they are, pooled by counts: mean of the means; mean of the
variances plus variance of the means. Nothing is trained and there is no dropout. Two ways:

* **one pass**: each batch goes through the net as in training, every site normalising with the
  statistics of the batch. So the input of all sites but the first depends on how the data are cut
  into batches, as it does in training.
* **layer after layer**: a pass for each site, in order of execution, in which all earlier ones
  normalise with what they have got anew. That is exact for the data as a whole, however they are
  cut into batches. (A site whose input depends on its own output, in a recurrent net, sees what it
  had before.)

What becomes of a site depends on its kind (TREATMENTS).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError

from bnresearch.errors import UserError
from bnresearch.fit import does_not_go_through
from bnresearch.net import Net
from bnresearch.norm import kind_of
from bnresearch.pooled import (
    Moments,
    Pooled,
    distance,
    of_first_process,
    pooled,
    set_moments,
)
from bnresearch.sets import Stats
from bnresearch.watch import SEEN, Seen, Watch

Tree = Any
Tick = Callable[[], None]  # after every batch

TREATMENTS = {
    "pooled": "mean and var are those of the pooled batches; the rest of its state stays",
    "moved": "its own update, over the same batches: its state is more than mean and variance",
    "kept": "its statistics are constants by definition",
}

AHEAD = 8  # batches that may wait on the device


class Site(NamedTuple):
    """A site with running statistics.

    Attributes:
      kind: of NORMS, or the class of a flax norm.
      options: of that kind; {} for flax.
      how: what is done about it: a key of TREATMENTS.
      epsilon: what it adds to a variance.
    """

    kind: str
    options: Mapping[str, Any]
    how: str
    epsilon: float = 1e-5


class Precise(NamedTuple):
    """What recalibration gives.

    Attributes:
      batch_stats: the tree that was given, with the new statistics, float32.
      observed: at every site that was looked at, by path, in order of execution.
      sites: all that keep statistics, by path.
      batches: how many each pass went through.
    """

    batch_stats: Tree
    observed: Pooled
    sites: dict[str, Site]
    batches: int

    @property
    def moments(self) -> dict[str, Moments]:
        """Those of the input of every site that was looked at."""
        return {path: observed["input"] for path, observed in self.observed.items()}


class Prepared(NamedTuple):
    """A net whose sites are known, and what has been compiled for it.

    Attributes:
      observe: ``(seen) -> {name: (mean, var, count)}``, see `input_moments`.
      alike: of several processes each has the same batches, not some of its own.
    """

    net: Net
    sites: dict[str, Site]
    observe: Callable[[Seen], Mapping[str, Any]]
    compiled: dict[Any, Any]
    alike: bool = False


def input_moments(seen: Seen) -> dict[str, tuple[jax.Array, ...]]:
    """Mean, variance and count of a site's input over the batch, per feature."""
    return {"input": set_moments(seen.x, seen.mask)}


def prepare(
    net: Net, variables: Tree, batch: Any, observe: Callable[..., Any] = input_moments
) -> Prepared:
    """A net with its sites, in order of execution; nothing is compiled yet."""
    sites: dict[str, Site] = {}

    def note(seen: Seen) -> dict[str, Any]:
        if seen.running is not None:
            sites.setdefault(seen.path, _site(seen))
        return {}

    watch = Watch(observe=note)
    jax.eval_shape(lambda v, b: net.apply(v, b, watch=watch).output, variables, batch)
    return Prepared(net, sites, observe, {})


def require_sites(sites: Mapping[str, Site], use: str = "be taken anew") -> None:
    """Raises UserError where no site has running statistics that could be of ``use``."""
    if all(site.how == "kept" for site in sites.values()):
        constants = f"those of {', '.join(sites)} are constants"
        raise UserError(
            f"this model has no running statistics that could {use}: "
            f"{constants if sites else 'none of its norms keeps any'}; evaluate it as it is"
        )


def _site(seen: Seen) -> Site:
    if isinstance(seen.module, nn.BatchNorm):
        return Site(type(seen.module).__name__, {}, "pooled", seen.module.epsilon)
    choice = seen.module.chosen
    kind = kind_of(choice.kind)
    constant = "use" not in kind.context
    how = "kept" if constant else "moved" if kind.update is None else "pooled"
    return Site(choice.kind, choice.options, how, choice.options.get("epsilon", 1e-5))


# ---- Passes


class _Pass:
    """The compiled ``(variables, batch, index) -> observations, batch_stats`` of a pass in which
    all sites normalise with the statistics ``use``; {} for the latter if nothing moves.

    The observations of all sites are one array: to fetch hundreds of small ones from the device
    would take a good part of the time of a pass of a small net.
    """

    def __init__(self, prepared: Prepared, use: str, moves: bool):
        self._prepared, self._moves = prepared, moves
        self._watch = Watch(use=use, observe=self._observe)
        self._like: Any = None
        self.run = jax.jit(self._run)

    def _observe(self, seen: Seen) -> Mapping[str, Any]:
        return self._prepared.observe(seen) if seen.path in self._prepared.sites else {}

    def _run(self, variables: Tree, batch: Any, index: jax.Array) -> tuple[jax.Array, Tree]:
        key = jax.random.fold_in(jax.random.key(0), index)
        mutable = ("batch_stats",) if self._moves else ()
        net, sites = self._prepared.net, self._prepared.sites
        applied = net.apply(variables, batch, key=key, watch=self._watch, mutable=mutable)
        if lost := sites.keys() - applied.seen.keys():
            raise UserError(
                f"what is seen at site {min(lost)} does not come out of the transformation that it "
                f"stands in (nn.scan, nn.vmap, ...); give that variable_axes={{{SEEN!r}: 0}}"
            )
        leaves, tree = jax.tree.flatten({path: applied.seen[path] for path in sites})
        self._like = [leaf.shape for leaf in leaves], tree
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
        return flat, applied.mutated["batch_stats"] if self._moves else {}

    def seen(self, found: list[np.ndarray]) -> dict[str, Any]:
        """Observations stacked by batch, by site in order of execution."""
        shapes, tree = self._like
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts = np.split(np.stack(found), ends, axis=1)
        shaped = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        by_site = jax.tree.unflatten(tree, shaped)
        return {path: by_site[path] for path in self._prepared.sites}


def _sweep(
    prepared: Prepared, variables: Tree, batches: Iterable[Any], tick: Tick, use: str
) -> tuple[dict[str, Any], Tree, int]:
    """One pass over all batches: observations (`_Pass.seen`), running statistics after it, and the
    number of batches. Values come to the host once, at the end."""
    moves = use == "batch" and any(site.how == "moved" for site in prepared.sites.values())
    if (use, moves) not in prepared.compiled:
        prepared.compiled[use, moves] = _Pass(prepared, use, moves)
    step, found = prepared.compiled[use, moves], []
    for index, batch in enumerate(batches):
        try:
            seen, stats = step.run(variables, batch, np.int32(index))
        except UserError:
            raise
        except (TypeError, ValueError, FlaxError) as error:
            raise does_not_go_through(batch, index, error) from error
        if moves:
            variables = {**variables, "batch_stats": stats}
        found.append(seen)
        if index >= AHEAD:
            jax.block_until_ready(found[index - AHEAD])
        tick()
    return step.seen(jax.device_get(found)), variables["batch_stats"], len(found)


# ---- New statistics


def one_pass(
    prepared: Prepared,
    variables: Tree,
    batches: Iterable[Any],
    chosen: Iterable[str] | None = None,
    tick: Tick = lambda: None,
) -> Precise:
    """Statistics of the sites ``chosen`` (None: all) as training sees them; see this module."""
    seen, moved, count = _sweep(prepared, variables, batches, tick, "batch")
    found = pooled(seen, prepared.alike)
    chosen = prepared.sites if chosen is None else chosen
    new = {path: site for path, site in found.items() if path in chosen}
    moved = moved if prepared.alike else of_first_process(moved)
    stats = _written(prepared.sites, variables["batch_stats"], new, moved)
    return Precise(stats, found, prepared.sites, count)


def layer_after_layer(
    prepared: Prepared,
    variables: Tree,
    batches: Iterable[Any],
    chosen: Iterable[str] | None = None,
    tick: Tick = lambda: None,
) -> Precise:
    """Statistics of the sites ``chosen`` (None: all), each with the earlier ones as they will be;
    see this module. ``batches`` is gone through once per site. Sites with an update of their own
    have it over one pass, before all others."""
    sites = prepared.sites
    chosen = [path for path in sites if chosen is None or path in chosen]
    stats, found, count = variables["batch_stats"], dict[str, Any](), 0
    if any(sites[path].how == "moved" for path in chosen):
        stats, found, _, count = one_pass(
            prepared, variables, batches, [p for p in chosen if sites[p].how == "moved"], tick
        )
    for path in (p for p in chosen if sites[p].how == "pooled"):
        given = {**variables, "batch_stats": stats}
        seen, _, count = _sweep(prepared, given, batches, tick, "running")
        site = pooled({path: seen[path]}, prepared.alike)
        stats = _written(sites, stats, site, stats)
        found |= site
    return Precise(stats, {path: found[path] for path in sites if path in found}, sites, count)


WAYS = {"one_pass": one_pass, "layer_after_layer": layer_after_layer}


def _written(sites: Mapping[str, Site], stats: Tree, new: Mapping[str, Any], moved: Tree) -> Tree:
    """``stats`` with what belongs to the sites of ``new``: their pooled moments, or for kinds with
    an update of their own what is in ``moved``."""

    def leaf(path: tuple[Any, ...], old: Any, other: Any) -> Any:
        *above, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        where = "/".join(above)
        if where not in new or sites[where].how == "kept":
            return old
        if sites[where].how == "moved":
            return np.asarray(other)
        if name not in ("mean", "var"):
            return old
        mean, var, values = new[where]["input"]
        correction = sites[where].options.get("correction", 0)
        value = mean if name == "mean" else var * values / np.maximum(values - correction, 1)
        # A feature without any value stays as it was.
        value = np.where(values > 0, value, np.asarray(old).reshape(value.shape))
        return value.astype(np.float32).reshape(np.shape(old))

    return jax.tree_util.tree_map_with_path(leaf, stats, moved)


def distances(precise: Precise, batch_stats: Tree) -> dict[str, float]:
    """`distance` of the running statistics in ``batch_stats`` by path, of the sites whose mean and
    variance are those of their input."""
    leaves: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch_stats):
        *above, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        leaves.setdefault("/".join(above), {})[name] = leaf
    return {
        path: distance(
            Stats(leaves[path]["mean"], leaves[path]["var"]), found, precise.sites[path].epsilon
        )
        for path, found in precise.moments.items()
        if precise.sites[path].how == "pooled"
    }
