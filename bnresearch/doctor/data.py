"""Checks of the data: are batches alike, and is evaluation fed what training was fed?"""

import math
from collections.abc import Iterator

import numpy as np

from bnresearch.doctor.examine import Examination, Site, pooled
from bnresearch.doctor.finding import Finding

MORE_THAN_CHANCE = 3.0  # times the spread of batch means that chance gives
CONTRAST = 0.5  # share of the entropy of random labels that those of a batch have at least
SHIFTED, STRETCHED = 0.25, 0.4  # standard deviations; |log| of a variance ratio


def _first(examined: Examination) -> Site | None:
    """The first site in the order of execution: no other norm has hidden anything from it."""
    return next((site for site in examined.sites.values() if "between" in site.look), None)


def spread_ratio(site: Site, size: int) -> float:
    """The variance of batch means over what independent examples would give,

        B * Var(m_B) / mean over batches of Var(means of examples),

    mean over features: about 1 for random batches, B for batches of one kind of example each.
    """
    between, within = site.look["mean"].var(0, ddof=1), site.look["between"].mean(0)
    # Within a batch of alike examples they vary less than all of them do: total, not within alone.
    whole = within + site.look["mean"].var(0)
    alive = whole > 1e-10
    return float(np.mean(size * between[alive] / whole[alive])) if alive.any() else 1.0


def non_iid(examined: Examination) -> Iterator[Finding]:
    """Batches that differ from each other more than chance allows: sorted, grouped, not "
    "shuffled."""
    site = _first(examined)
    if site is None or examined.batches < 4:
        return
    ratio = spread_ratio(site, examined.size)
    share = _label_share(examined)
    ordered = share is not None and share < CONTRAST
    if ratio < MORE_THAN_CHANCE and not ordered:
        return
    labels = ""
    if share is not None:
        labels = f"; the labels of a batch have {share:.0%} of the entropy of random ones"
    yield Finding(
        "non_iid",
        "serious",
        "Batches are not random samples",
        f"The means of batches at {site.path} scatter {ratio:.1f} times as much (in variance) as "
        "those "
        f"of {examined.size} independent examples would{labels}.",
        (site.path,),
        {"spread": ratio, **({} if share is None else {"label entropy": share})},
    )


def _label_share(examined: Examination) -> float | None:
    """Mean entropy of the labels of a batch, over what it is with all labels shuffled; None without
    labels, or where there is but one."""
    labels = examined.labels
    if labels is None or len(labels) < 2:
        return None
    shuffled = np.random.RandomState(0).permutation(labels.reshape(-1)).reshape(labels.shape)
    seen, chance = (np.mean([_entropy(row) for row in rows]) for rows in (labels, shuffled))
    return float(seen / chance) if chance > 0 else None


def _entropy(labels: np.ndarray) -> float:
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


def preprocessing(examined: Examination) -> Iterator[Finding]:
    """Evaluation inputs that are prepared otherwise than those of training."""
    site = _first(examined)
    if site is None or not examined.apart_evaluation or not site.evaluated:
        return
    here, there = pooled(site.look), pooled(site.evaluated)
    alive = here.var > 1e-10
    if not alive.any():
        return
    error = math.sqrt(
        np.mean(site.look["between"].mean(0)[alive] / here.var[alive]) / (examined.size)
    )
    z = math.sqrt(np.mean(np.square(there.mean[alive] - here.mean[alive]) / here.var[alive]))
    logs = np.abs(np.log((there.var[alive] + 1e-12) / here.var[alive])).mean()
    if z < max(SHIFTED, 4 * error) and logs < STRETCHED:
        return
    yield Finding(
        "preprocessing",
        "serious",
        "Evaluation is fed something else than training",
        f"At the first site, {site.path}, the means of evaluation inputs are {z:.2g} standard "
        f"deviations away and the variances a factor of {math.exp(logs):.3g}.{_inputs(examined)}",
        (site.path,),
        {"shift": z, "log variance ratio": float(logs)},
    )


def _inputs(examined: Examination) -> str:
    """The inputs of both themselves, in words."""
    if not {"training", "evaluation"} <= examined.inputs.keys():
        return ""
    words = []
    for split in ("training", "evaluation"):
        mean, var = examined.inputs[split]
        means = ", ".join(f"{m:.3g}" for m in mean)
        stds = ", ".join(f"{math.sqrt(v):.3g}" for v in var)
        words.append(f"{split} inputs have mean {means} and standard deviation {stds}")
    return f" The {words[0]}; the {words[1]}."
