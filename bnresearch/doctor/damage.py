"""What running statistics do to an evaluation, and which sites do it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.doctor import passes
from bnresearch.doctor.examine import Array, Examination, Kept
from bnresearch.doctor.statistics import own_cause

Tree = Any

BLAMED = 4  # evaluation batches on which each site's share of the damage is taken
CAP = 20.0  # nats: one example must not decide; of losses that are larger anyway, ten times those
PARTS = (2, 4, 8)  # of a batch, as devices would hold them
SMALLER = 0.015  # mean |log| by which running variances have to be below those of batches


def in_parts(examined: Examination, batches: Sequence[Any]) -> dict[int, dict[str, Array]]:
    """The variances with batches whole, and cut into so many parts, at each site whose statistics
    have no cause of their own; {} where running variances are not smaller than those of batches, so
    that there is nothing to explain."""
    keepers = [site for site in examined.keepers if own_cause(examined, site) is None]
    whole = {site.path: site.look["var"].mean(0) for site in keepers}
    logs = [
        np.log(np.maximum(site.running.var, 1e-30) / np.maximum(whole[site.path], 1e-30))
        for site in keepers
        if site.running is not None
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


def evaluate(examined: Examination, batches: Sequence[Any]) -> None:
    """Fills in losses (or outputs), what the first site sees, and the share of each site."""
    net, variables, keepers = examined.net, examined.variables, examined.keepers
    examined.examples = sum(len(jax.tree.leaves(batch)[0]) for batch in batches)
    precise = with_statistics(variables, {site.path: site.precise for site in keepers})
    results = {
        name: [jax.device_get(passes.losses(net, given, batch)) for batch in batches]
        for name, given in (("precise", precise), ("running", variables))
    }
    if results["precise"][0].loss is None:
        for name, found in results.items():
            examined.outputs[name] = np.concatenate([one.output for one in found])
    else:
        cap = _cap(np.concatenate([one.loss for one in results["precise"]]))
        for name, found in results.items():
            examined.losses[name] = _capped(np.concatenate([one.loss for one in found]), cap)
        examined.losses["batch"] = _capped(examined.losses["batch"], cap)
    for path, site in examined.sites.items():
        calls = [call for one in results["running"] for call in one.sites.get(path, ()) if call]
        if calls:
            site.evaluated = {n: np.stack([call[n] for call in calls]) for n in calls[0]}
    gap, error = examined.gap()
    if gap > max(3 * error, 0.01) and keepers:
        examined.blame = _blame(examined, batches[:BLAMED], precise)


def _cap(precise: Array) -> float:
    """Losses above are not told apart, nor are those that are not finite."""
    finite = precise[np.isfinite(precise)]
    return max(CAP, 10 * float(finite.max())) if len(finite) else CAP


def _capped(losses: Array, cap: float) -> Array:
    return np.minimum(np.nan_to_num(np.asarray(losses, float), nan=cap), cap)


def _blame(examined: Examination, batches: Sequence[Any], precise: Tree) -> dict[str, float]:
    """For every site the share of the damage that its running statistics do: how much of it goes
    when only they are mended, or comes when only they are left; the larger of the two."""
    harm = _harm(examined, batches, precise)
    worst, best = harm(examined.variables), harm(precise)
    damage = max(worst - best, 1e-6)
    shares = {}
    for site in examined.keepers:
        assert site.running is not None
        mended = with_statistics(examined.variables, {site.path: site.precise})
        left = with_statistics(precise, {site.path: site.running})
        share = max(worst - harm(mended), harm(left) - best) / damage
        shares[site.path] = float(np.clip(share, 0, 1))
    return shares


def _harm(examined: Examination, batches: Sequence[Any], precise: Tree) -> Callable[[Tree], float]:
    """The mean loss of variables; where it is unknown, the root mean square distance of the output
    from the one with precise statistics."""
    cap = _cap(examined.losses["precise"]) if examined.losses else 0.0

    def passed(variables: Tree) -> list[Any]:
        return [jax.device_get(passes.losses(examined.net, variables, batch)) for batch in batches]

    right = None if examined.losses else np.concatenate([one.output for one in passed(precise)])

    def harm(variables: Tree) -> float:
        found = passed(variables)
        if right is None:
            return float(_capped(np.concatenate([one.loss for one in found]), cap).mean())
        away = np.nan_to_num(np.concatenate([one.output for one in found]) - right)
        return float(np.sqrt(np.square(away).mean()))

    return harm


def with_statistics(variables: Tree, found: Mapping[str, Any]) -> Tree:
    """Variables with other running means and variances at some sites, float32."""
    flat = flatten_dict(variables["batch_stats"]) if found else {}
    for path, stats in found.items():
        for name in Kept._fields:
            where = (*path.split("/"), name)
            value = jnp.asarray(getattr(stats, name), jnp.float32)
            flat[where] = value.reshape(np.shape(flat[where]))
    return {**variables, "batch_stats": unflatten_dict(flat)} if found else variables
