"""The doctor: what is wrong with the norms of a model, and what mends it.

    report = doctor.diagnose(model, variables, batches, eval_batches=test_batches)
    print(report.table())
    report.write("diagnosis")             # a page with pictures

One examination measures everything (`examine`), a table of checks reads it: each is a function from
the examination to findings, with evidence, severity and a mend. To add one: a function in one of
the files beside this one, a line in CHECKS, and one in `mends.MENDS`.
"""

import collections
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.core import meta, unfreeze
from flax.traverse_util import flatten_dict

from bnresearch import net as nets
from bnresearch.doctor import damage, data, sites, statistics
from bnresearch.doctor import scope as scopes
from bnresearch.doctor.examine import Examination, Treatment, examine
from bnresearch.doctor.finding import SEVERITIES, Check, Finding
from bnresearch.doctor.mends import MENDS
from bnresearch.doctor.report import Report
from bnresearch.doctor.structure import Structure, matching, structure
from bnresearch.errors import UserError, lookup
from bnresearch.fit import check_fit, shapes
from bnresearch.net import Net

__all__ = ["CHECKS", "Finding", "Report", "diagnose"]

Tree = Any
MOST = 50  # batches that are looked at where nobody says how many
EVALUATED = 20
SCOPES = {"global": None, "device": None}
CALLED = ("variables, batches)", "variables, batches, call=call)")


def diagnose(
    model: nn.Module,
    variables: Tree,
    batches: Iterable[Any],
    *,
    eval_batches: Iterable[Any] | None = None,
    call: nets.Call | None = None,
    losses: Callable[[Any, Any], jax.Array] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    frozen: Sequence[str] = (),
    scope: str = "global",
    count: int | None = None,
    allow_fewer: bool = False,
) -> Report:
    """What is wrong with the norms of a flax.linen model. Nothing is changed.

    Args:
      model: with norms of flax, of this project, or both.
      variables: {"params": ..., "batch_stats": ...}; also one copy per device, stacked in front.
      batches: of training, as the training sees them: arrays, (input, labels), or dicts with
        "image" or "x" (see `net.inputs_of`), "label" and, where there is padding, "mask".
      eval_batches: of evaluation, prepared as evaluation does; without them the training batches
        are evaluated.
      call, losses: how to call the model, and its loss: see `net.of_model`. Without labels the
        outputs are compared.
      optimizer: of the training: shows what weight decay acts on, and what is frozen.
      frozen: regular expressions on the paths of sites that are meant to be frozen.
      scope: over what statistics are meant to be taken: "global" (the whole batch) or "device".
      count: how many batches to take; None: all there are, at most 50.
      allow_fewer: take what is there where there are fewer.

    Returns:
      A `Report`: ``findings``, ``table()``, ``write(folder)``.

    Raises:
      UserError: a model without norms, or that cannot be called without being told how; variables
        that do not fit it (the difference is shown); batches of another shape, or too few; a rule
        that matches no site.
    """
    lookup(SCOPES, scope, "scope")
    net = nets.of_model(model, call, losses)
    found = take(batches, count, allow_fewer, MOST)
    variables, replicas = _one_replica(variables)
    check_fit(net, variables, found[0])
    about = {"model": type(model).__name__}
    evaluated = _evaluated(eval_batches, found[0])
    if call is None:
        _check_switch(model, net, variables, found[0])
    treatment = None if optimizer is None else treatment_of(optimizer, variables["params"])
    return examined_report(
        net,
        variables,
        found,
        evaluated,
        about=about,
        mended=lambda check: MENDS[check].model.replace(*CALLED if call is not None else ("", "")),
        treatment=treatment,
        replicas=replicas,
        frozen=(frozen,) if isinstance(frozen, str) else tuple(frozen),
        scope=scope,
    )


def _evaluated(eval_batches: Iterable[Any] | None, like: Any) -> list[Any] | None:
    """The evaluation batches; UserError where they are not made as those of training are."""
    if eval_batches is None:
        return None
    found = take(eval_batches, None, True, EVALUATED, "evaluation batches")
    mine, other = found[0], like
    if isinstance(mine, Mapping) and isinstance(other, Mapping):  # either may have more, as a mask
        shared = mine.keys() & other.keys()
        mine, other = ({name: batch[name] for name in shared} for batch in (mine, other))
    if _outline(mine) != _outline(other):
        raise UserError(
            f"evaluation batches have {shapes(found[0])}, those of training {shapes(like)}: give "
            "both the same parts and shapes, but for the number of examples"
        )
    return found


def _check_switch(model: nn.Module, net: Net, variables: Tree, batch: Any) -> None:
    """Refuses a model that nobody can tell whether it trains: its training would be taken for its
    evaluation."""
    if nets.switch_of(model) is None and structure(net, variables, batch).keepers:
        raise UserError(
            f"{type(model).__name__}.__call__ has none of the arguments "
            f"{', '.join(nets.SWITCHES)}, which would tell it whether it trains; say how to call "
            "it: call=lambda variables, batch, train, **rest: Model(train=train).apply(variables, "
            "batch[...], **rest)"
        )


def examined_report(
    net: Net,
    variables: Tree,
    batches: Sequence[Any],
    eval_batches: Sequence[Any] | None,
    *,
    about: Mapping[str, Any],
    mended: Callable[[str], str],
    frozen: Sequence[str] = (),
    **known: Any,
) -> Report:
    """Examines a model and lets every check look at it.

    Args:
      about: where it comes from, for the page.
      mended: how the finding of a check is mended.
      frozen: see `diagnose`.
      known: attributes of an `examine.Examination` that are known already.
    """
    seen = structure(net, variables, batches[0])
    _check_sites(seen, frozen)
    net = _with_known_loss(net, variables, batches[0])
    kept = _of_one_size(batches)
    examined = examine(
        net,
        variables,
        seen,
        kept,
        eval_batches,
        frozen=frozenset(path for path, yes in matching(frozen, seen.sites).items() if yes),
        left_out=len(batches) - len(kept),
        **known,
    )
    examined.parts = damage.in_parts(examined, kept)
    damage.evaluate(examined, kept if eval_batches is None else _of_one_size(eval_batches))
    return Report(_findings(examined, mended), examined, about)


def _findings(examined: Examination, mended: Callable[[str], str]) -> list[Finding]:
    """What all checks find, the serious ones first."""
    found = [
        finding._replace(mend=finding.mend or mended(name))
        for name, check in CHECKS.items()
        for finding in check(examined)
    ]
    return sorted(_with_causes(found), key=lambda finding: SEVERITIES.index(finding.severity))


def take(
    batches: Iterable[Any], count: int | None, allow_fewer: bool, most: int, what: str = "batches"
) -> list[Any]:
    """The first ``count`` batches (None: all, up to ``most``), all of one shape but for the number
    of examples.

    Raises:
      UserError: none, or fewer than asked without ``allow_fewer``; batches of different shapes.
    """
    if not isinstance(batches, Iterable):
        raise UserError(
            f"{what} are a {type(batches).__name__}; give a list or an iterator of them"
        )
    if count is not None and (not isinstance(count, int) or count < 1):
        raise UserError(f"count={count!r}; give a whole number of at least 1, or None for all")
    found = list(itertools.islice(batches, most if count is None else count))
    if not found:
        raise UserError(f"there are no {what}; give at least one")
    if count is not None and len(found) < count and not allow_fewer:
        raise UserError(
            f"{len(found)} {what} were given and count={count} asked for; give more, or take what "
            "is there with allow_fewer=True"
        )
    for index, batch in enumerate(found):
        if _outline(batch) != _outline(found[0]):
            raise UserError(
                f"batch {index} has {shapes(batch)}, the first one {shapes(found[0])}: all batches "
                "must have the same parts and shapes, but for the number of examples"
            )
    return found


def _outline(batch: Any) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    if not leaves or any(not np.ndim(leaf) for leaf in leaves):
        raise UserError(
            f"a batch has {shapes(batch)}: every part of it has to have a row per example; hand "
            "the model what is the same for all by call="
        )
    return tree, [np.shape(leaf)[1:] for leaf in leaves]


def _with_causes(findings: Sequence[Finding]) -> list[Finding]:
    """A bad evaluation becomes a note where something else that was found explains it."""
    known = [f.check for f in findings if f.check in CAUSES and f.severity == "serious"]
    if not known:
        return list(findings)
    reason = f" It follows from: {', '.join(dict.fromkeys(known))}."
    return [
        f._replace(severity="note", evidence=f.evidence + reason)
        if f.check == "evaluation_gap"
        else f
        for f in findings
    ]


def _check_sites(seen: Structure, frozen: Sequence[str]) -> None:
    if all(made.name == "norm kind none" for made in seen.made.values()):
        raise UserError(
            "the model calls no norm that is known here (those of flax.linen and of bnresearch): "
            "there is nothing to diagnose"
        )
    if "" in seen.sites:
        raise UserError("the model is a norm itself; put it into a module to diagnose it")
    for rule in frozen:
        try:
            re.compile(rule)
        except re.error as error:
            raise UserError(f"frozen: {rule!r} is no regular expression ({error})") from None
        if not any(matching([rule], seen.sites).values()):
            raise UserError(
                f"frozen: {rule!r} matches no site; the sites are: {', '.join(seen.sites)}"
            )


def _of_one_size(batches: Sequence[Any]) -> list[Any]:
    """Those of the most common size: a ragged last one would compile everything again."""
    sizes = [len(jax.tree.leaves(batch)[0]) for batch in batches]
    size = collections.Counter(sizes).most_common(1)[0][0]
    return [batch for batch, n in zip(batches, sizes, strict=True) if n == size]


def _with_known_loss(net: Net, variables: Tree, batch: Any) -> Net:
    """Without a loss where the batches have no labels that would give one."""
    if net.losses is not nets.cross_entropy:
        return net

    def loss(variables: Tree, batch: Any) -> Any:
        return nets.cross_entropy(net.apply(variables, batch).output, batch)

    try:
        jax.eval_shape(loss, variables, batch)
    except UserError:
        return Net(net.call, None)
    return net


def _one_replica(variables: Tree) -> tuple[Tree, float | None]:
    """The first copy of variables that have one per device, as pmap keeps them, and by how much
    the running statistics of the copies differ, relative to their size; None for a single copy."""
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        return variables, None  # `check_fit` has the words for it
    variables = meta.unbox(unfreeze(dict(variables)))
    stats = {
        path: np.asarray(x) for path, x in flatten_dict(variables.get("batch_stats", {})).items()
    }
    moments = [x for path, x in stats.items() if path[-1] in ("mean", "var")]
    copies = {x.shape[0] for x in moments if x.ndim == 2}
    leaves = jax.tree.leaves(variables["params"])
    stacked = moments and all(x.ndim == 2 for x in moments) and len(copies) == 1
    if not stacked or any(np.shape(leaf)[:1] != (min(copies),) for leaf in leaves):
        return variables, None
    difference = max(float(np.ptp(x, 0).max() / (np.abs(x).max() + 1e-12)) for x in moments)
    return jax.tree.map(lambda x: x[0], variables), difference


def treatment_of(optimizer: optax.GradientTransformation, params: Tree) -> Treatment:
    """What an optimizer does to norms: it decays what moves without a gradient, and leaves still
    what does not move with one. Several steps, since a warm-up may begin at a rate of 0."""
    if not hasattr(optimizer, "update"):
        raise UserError(
            f"the optimizer is a {type(optimizer).__name__}; give that of the training, such as "
            "optax.adamw(1e-3)"
        )
    ones = jax.tree.map(lambda p: np.ones(np.shape(p), np.float32), params)

    def moves(gradient: float) -> dict[tuple[str, ...], bool]:
        gradients = jax.tree.map(lambda p: np.full_like(p, gradient), ones)
        state = optimizer.init(ones)
        moved: dict[tuple[str, ...], bool] = {}
        for _ in range(4):
            updates, state = optimizer.update(gradients, state, ones)
            for path, update in flatten_dict(jax.device_get(updates)).items():
                moved[path] = moved.get(path, False) or bool(np.any(update != 0))
        return moved

    decayed, trained = moves(0.0), moves(1.0)
    by_site: dict[str, list[tuple[bool, bool]]] = {}
    for path in decayed:
        if path[-1] in ("scale", "bias"):
            by_site.setdefault("/".join(path[:-1]), []).append((decayed[path], trained[path]))
    return Treatment(
        frozenset(site for site, both in by_site.items() if any(d for d, _ in both)),
        frozenset(site for site, both in by_site.items() if not any(t for _, t in both))
        if any(trained.values())
        else frozenset(),
    )


# What makes running statistics wrong for evaluation, and so explains a gap.
CAUSES = (
    *("not_finite", "broken", "never_updated", "young", "slow", "decay_swapped", "half_precision"),
    *("scope", "cancellation", "dropout_before", "padding", "wrong_use", "non_iid"),
)

CHECKS: dict[str, Check] = {
    "not_finite": sites.not_finite,
    "broken": statistics.broken,
    "never_updated": statistics.never_updated,
    "young": statistics.young,
    "slow": statistics.slow,
    "evaluation_gap": statistics.evaluation_gap,
    "decay_swapped": statistics.decay_swapped,
    "half_precision": statistics.half_precision,
    "scope": scopes.scope,
    "cancellation": sites.cancellation,
    "dropout_before": sites.dropout_before,
    "few_values": sites.few_values,
    "padding": sites.padding,
    "wrong_use": sites.wrong_use,
    "frozen_moves": sites.frozen_moves,
    "double": sites.double,
    "dead": sites.dead,
    "scale_zero": sites.scale_zero,
    "scale_decay": sites.scale_decay,
    "bias_before": sites.bias_before,
    "non_iid": data.non_iid,
    "preprocessing": data.preprocessing,
}
