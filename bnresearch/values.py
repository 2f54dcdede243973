"""Over how many values each norm of a run normalises: known before anything is compiled.

For a site with batch statistics that is ``n = examples x positions``: the examples of one set,
which `norm.scope`, the microbatches and some kinds decide, times the positions that an example has
at that place of the net. It does not depend on ``parallel.mode``. The deviation that divides
scatters by about ``1 / sqrt(2 (n - 1))`` of itself, which is noise in training that evaluation does
not have.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch.experiment import Experiment
from bnresearch.net import of_run as net_of_run
from bnresearch.norm import kind_of
from bnresearch.parallel import Layout
from bnresearch.watch import Seen, Watch

FEW = 16  # values in a set: fewer are worth a warning
SHOWN = 4  # sites that a line names


class Over(NamedTuple):
    """What one mean is taken over: so many examples, positions of each, and features of each."""

    examples: int = 1
    positions: int = 1
    features: int = 1

    @property
    def values(self) -> int:
        return math.prod(self)

    def __str__(self) -> str:
        parts = [f"{n} {name if n > 1 else name[:-1]}" for name, n in self._asdict().items()]
        some = [part for part, n in zip(parts, self, strict=True) if n > 1]
        return " x ".join(some or parts[:1])


class Site(NamedTuple):
    """A norm of a run.

    Attributes:
      kind: of NORMS.
      shared: examples share its statistics (`Kind.batch_dependent`).
      over: what one of its means is taken over; None where there is none: it is a function of one
        value, or takes its statistics from elsewhere.
    """

    kind: str
    shared: bool
    over: Over | None


class Place(NamedTuple):
    """What is known of a site: the examples that its scope puts into one set, the positions and
    features of its input, and its options."""

    examples: int
    positions: int
    features: int
    options: Mapping[str, Any]


def _one_example(place: Place) -> Over:
    return Over(positions=place.positions)


def _features(place: Place) -> Over:
    return Over(features=place.features)


def _layer(place: Place) -> Over:
    whole = place.options["over"] == "example"
    return Over(1, place.positions if whole else 1, place.features)


def _groups(place: Place) -> Over:
    return Over(1, place.positions, place.features // place.options["groups"])


def _batch_group(place: Place) -> Over:
    examples, features = (place.options[f"{name}_per_group"] for name in ("examples", "features"))
    return Over(examples or place.examples, place.positions, features or place.features)


# Kinds that do not take the examples of a set and all their positions, feature by feature. Those
# whose sets depend on a side input (domain) have at most the values of the whole set.
OWN: Mapping[str, Callable[[Place], Over | None]] = {
    "ghost": lambda place: Over(place.options["size"], place.positions),
    "split": lambda place: Over(place.examples // place.options["splits"], place.positions),
    "virtual": lambda place: Over(
        place.options["reference"] or place.examples // 2, place.positions
    ),
    "batch_group": _batch_group,
    "online": lambda place: None,  # of the stream of examples
    "layer": _layer,
    "rms": _layer,
    "group": _groups,
    "evonorm_s0": _groups,
    "proxy": _groups,
    "weight_standardisation": _groups,
    "instance": _one_example,
    "frn": _one_example,
    "positional": _features,
}


def examples_per_set(layout: Layout) -> int:
    """How many examples of a microbatch share statistics, wherever they lie."""
    scope, local = layout.scope, layout.microbatch // layout.shares
    return local // scope.splits * _merged_devices(layout)


def _merged_devices(layout: Layout) -> int:
    merge, groups = layout.scope.merge, layout.scope.merge_groups
    if merge is None:
        return 1
    if groups is not None:
        return len(groups[0])
    names = (merge,) if isinstance(merge, str) else merge
    sizes = dict(layout.mesh.shape)
    return math.prod(sizes.get(name, layout.device_count) for name in names)  # pmap has one axis


def of_run(experiment: Experiment) -> dict[str, Site]:
    """All norms of a run in training, by path, in order of execution. The model is traced once for
    all runs of a program; nothing is computed."""
    known = experiment.program.statistics
    if of_run not in known:
        known[of_run] = _of_run(experiment)
    return known[of_run]


def _of_run(experiment: Experiment) -> dict[str, Site]:
    train, layout = experiment.config.train, experiment.program.layout
    exact = train.accumulate_statistics == "batch"
    examples = layout.batch_size if exact else examples_per_set(layout)
    found: dict[str, Site] = {}

    def note(seen: Seen) -> dict[str, Any]:
        _, *positions, features = seen.x.shape
        name, options = seen.module.chosen
        place = Place(examples, math.prod(positions), features, options)
        found.setdefault(seen.path, _site(name, place))
        return {}

    info = experiment.program.dataset.info
    net, watch = net_of_run(experiment.config, info.num_classes), Watch(observe=note)
    state = jax.eval_shape(experiment.program.init, experiment.numbers)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    batch = {"image": jax.ShapeDtypeStruct((2, *info.shape), jnp.float32)}
    jax.eval_shape(lambda v, b: net.apply(v, b, watch=watch).output, variables, batch)
    return found


def _site(name: str, place: Place) -> Site:
    shared = kind_of(name).batch_dependent
    if name in OWN:
        return Site(name, shared, OWN[name](place))
    return Site(name, shared, Over(place.examples, place.positions) if shared else None)


def of_sets(sites: Mapping[str, Site]) -> dict[str, int]:
    """n of the sites with batch statistics, by path."""
    return _with_values({path: site for path, site in sites.items() if site.shared})


def record(sites: Mapping[str, Site]) -> dict[str, Any]:
    """For status.json: the fewest values, where, and n of every site (None where it has none)."""
    over = _with_values(sites)
    fewest = {"fewest": None} if not over else {"fewest": min(over.values()), "at": _fewest(over)}
    return fewest | {"by_site": {path: over.get(path) for path in sites}}


def _with_values(sites: Mapping[str, Site]) -> dict[str, int]:
    return {path: site.over.values for path, site in sites.items() if site.over}


def _fewest(over: Mapping[str, int]) -> str:
    return min(over, key=over.__getitem__)


def lines(sites: Mapping[str, Site], scope: str) -> list[str]:
    """What a user should know before the run: n in one line, and a warning under FEW.

    Args:
      scope: ``norm.scope``, for the warning.
    """
    over = _with_values(sites)
    if not over:
        return []
    at, least, most = _fewest(over), min(over.values()), max(over.values())
    span = f"{least:,} to {most:,} values, the fewest" if least < most else f"{least:,} values, as"
    found = [f"note: norms take statistics over {span} at {at}: {sites[at].over}"]
    for shared, what in ADVICE.items():
        few = {p: n for p, n in over.items() if sites[p].shared == shared and n < FEW}
        if few:
            advice = what.format(scope=scope)
            found.append(f"warning: fewer than {FEW} values at {_named(few)}: {advice}")
    return found


ADVICE = {
    True: "the statistics of training are noise that evaluation does not have; choose a larger "
    "data.batch_size, a wider norm.scope (it is {scope}), or norm.kind=group",
    False: "that is little of what is normalised; choose fewer groups, or another norm.kind",
}


def _named(few: Mapping[str, int]) -> str:
    named = [f"{path} ({n})" for path, n in list(few.items())[:SHOWN]]
    more = f" and {len(few) - SHOWN} more" if len(few) > SHOWN else ""
    return ", ".join(named) + more
