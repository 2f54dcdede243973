"""Batch statistics, running statistics, and how far the ones are from the others."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch.moments import moments
from bnresearch.pooled import Moments, merged
from bnresearch.sets import Scope, Sets, whole_batch
from bnresearch.watch import Seen, Watch

if TYPE_CHECKING:
    from bnresearch.probes.inside import Inside, View

Found = dict[str, dict[str, float]]
Values = dict[str, Any]


def statistics(inside: "Inside") -> Found:
    """Mean and variance of each site's input, of the batch and running (Ioffe & Szegedy, 2015).

        mean: sqrt(mean over features of m^2)      var: mean over features of v

    ``batch_mean`` and ``batch_var`` of the training batch of this step, over the whole of it
    whatever the scope; ``running_mean`` and ``running_var`` where the site keeps such.
    """
    seen = jax.device_get(inside(site_statistics))
    found: Found = {}
    for path in inside.sites:
        values = seen[path]
        found[path] = {"batch_mean": _rms(values["mean"]), "batch_var": values["var"].mean()}
        if "running_mean" in values:
            found[path]["running_mean"] = _rms(values["running_mean"])
            found[path]["running_var"] = values["running_var"].mean()
    return found


def staleness(inside: "Inside") -> Found:
    """Distance of running from precise statistics, and their age in steps (Wu & Johnson, 2021).

        mean_distance: mean over features of |m_r - m_p| / s_p      s^2 = V = v + epsilon
        var_distance:  mean over features of |log(V_r / V_p)|
        kl: mean over features of KL(N(m_p, V_p) || N(m_r, V_r))
            = (log(V_r / V_p) + (V_p + (m_p - m_r)^2) / V_r - 1) / 2
        age:   sum_k k d^k / sum_k d^k over k = 0 .. t - 1, = d / (1 - d) - t d^t / (1 - d^t)
        start: d^t

    The precise ones (p) are the moments of the next ``probes.batches`` training batches together,
    weights as they are, in one pass: earlier norms take their batch statistics.

    ``age`` is the mean age of the batches that an average with decay d holds after t updates, each
    k steps old with weight d^k; ``start`` is the weight of the first values (mean 0, variance 1),
    which belongs to no batch. ``cumulative`` weighs alike: d = 1, age (t - 1) / 2. So does
    ``last``, with t at most its window. They and ``debiased`` hold nothing of the start. Sites
    without a running mean and variance per feature are left out; those whose average has no decay
    (a frozen norm) have no age. Of kinds that keep something else under these names it is about
    what they keep.
    """
    passes = inside.over_batches(site_statistics)
    found: Found = {}
    for path in inside.sites:
        first = passes[0][path]
        if "running_mean" not in first:
            continue
        mean, var, _ = pooled([one[path] for one in passes])
        v, running = var + first["epsilon"], first["running_var"] + np.float64(first["epsilon"])
        shift, ratio = first["running_mean"] - mean, np.log(running / v)
        found[path] = {
            "mean_distance": (np.abs(shift) / np.sqrt(v)).mean(),
            "var_distance": np.abs(ratio).mean(),
            "kl": ((ratio + (v + shift**2) / running - 1) / 2).mean(),
        }
        if "decay" in first:
            updates, decay = int(first["updates"]), float(first["decay"])
            found[path]["age"] = mean_age(decay, min(updates, int(first["window"])))
            found[path]["start"] = decay**updates if first["from_start"] else 0.0
    return found


def fluctuation(inside: "Inside") -> Found:
    """Training-inference discrepancy (Wang et al., 2022): how far batches are from the running.

        mean: average over batches B of ||m_B - m||_2 / ||s||_2      s = sqrt(v)
        std:  average over batches B of ||s_B - s||_2 / ||s||_2

    m and v are the running statistics of a site, norms are over its features; the average is over
    the next ``probes.batches`` training batches, weights as they are. Sites without a running mean
    and variance per feature are left out.
    """
    passes = inside.over_batches(site_statistics)
    found: Found = {}
    for path in inside.sites:
        first = passes[0][path]
        if "running_mean" not in first:
            continue
        mean, std = first["running_mean"], np.sqrt(first["running_var"])
        shifts = [_norm(one[path]["mean"] - mean) / _norm(std) for one in passes]
        stretches = [_norm(np.sqrt(one[path]["var"]) - std) / _norm(std) for one in passes]
        found[path] = {"mean": float(np.mean(shifts)), "std": float(np.mean(stretches))}
    return found


def site_statistics(view: "View") -> dict[str, Values]:
    """Of every site: moments of its input, running statistics, and what they are averages of."""

    def observe(seen: Seen) -> Values:
        sets = Sets(seen.x, Scope(), seen.mask)
        stats = whole_batch(sets, moments(sets))
        count = jnp.asarray(sets.batch_count(), jnp.float32)
        values = {"mean": stats.mean, "var": stats.var, "count": count}
        return values | running_of(seen, view.state.step)

    applied = view.apply(Watch(observe=observe))
    return {path: calls[0] for path, calls in applied.seen.items()}


def running_of(seen: Seen, step: Any) -> Values:
    """The running statistics of a site, if they are a mean and a variance per feature, and what
    `staleness` has to know of their average."""
    running, shape = seen.running, seen.x.shape[-1:]
    pair = [getattr(running, name, None) for name in ("mean", "var")]
    if any(one is None or one.shape != shape for one in pair):
        return {}
    options: Any = seen.module.chosen.options  # type: ignore[attr-defined]
    values = {
        "running_mean": running.mean,
        "running_var": running.var,
        "epsilon": options.get("epsilon", 0.0),
    }
    if "decay" not in options:
        return values
    average = options.get("average", "ema")
    weighed = average in ("ema", "debiased")
    return values | {
        "decay": options["decay"] if weighed else 1.0,
        "updates": getattr(running, "updates", step),
        "window": options["window"] if average == "last" else np.iinfo(np.int32).max,
        "from_start": average == "ema",
    }


def pooled(passes: list[Values]) -> Moments:
    """Mean and variance of all values of several batches together."""
    shape = passes[0]["mean"].shape
    names = ("mean", "var", "count")
    return merged([np.stack([np.broadcast_to(p[n], shape) for p in passes]) for n in names])


def mean_age(decay: float, updates: int) -> float:
    """The sum of the definition, which loses no digits; 0 where there was no update."""
    if updates == 0:
        return 0.0
    age = np.arange(updates)
    weight = np.float64(decay) ** age
    return float((age * weight).sum() / weight.sum())


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(values)))
