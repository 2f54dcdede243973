"""Checks of the data: are batches alike, and is evaluation fed what training was fed?"""

import math
from collections.abc import Iterator

import numpy as np
from scipy.stats import chi2

from bnresearch.doctor.examine import ALIVE, Examination, Site, distance, pooled
from bnresearch.doctor.finding import Finding

MORE_THAN_CHANCE = 3.0  # times the spread of batch means that chance gives
CONTRAST = 0.5  # share of the entropy of random labels that those of a batch have at least
SHIFTED, STRETCHED = 0.25, 0.4  # standard deviations; |log| of a variance ratio
ENOUGH = 30  # evaluation examples


def _first(examined: Examination) -> Site | None:
    """The first site in the order of execution: no other norm has hidden anything from it."""
    return next((site for site in examined.sites.values() if "between" in site.look), None)


def spread_ratio(site: Site, size: int) -> float:
    """The variance of batch means over what independent examples would give,

        B * Var(m_B) / (mean over batches of Var(means of examples) + Var(m_B)),

    mean over features: about 1 for random batches, B for batches of one kind of example each. Of
    several calls in a batch the first.
    """
    means, within = (site.look[name][:: site.calls] for name in ("mean", "between"))
    # Examples of a batch of one kind vary less than all do: hence the sum below the line.
    whole = within.mean(0) + means.var(0)
    alive = whole > ALIVE
    return float(np.mean(size * means.var(0, ddof=1)[alive] / whole[alive])) if alive.any() else 1.0


def non_iid(examined: Examination) -> Iterator[Finding]:
    """Batches that differ from each other more than chance allows: sorted, or never shuffled."""
    site, batches = _first(examined), examined.batches
    if site is None or batches < 4:
        return
    ratio, share = spread_ratio(site, examined.size), _label_share(examined)
    # As if all features were one: what one feature does once in ten thousand times.
    bound = max(MORE_THAN_CHANCE, chi2.ppf(0.9999, batches - 1) / (batches - 1))
    if ratio < bound and (share is None or share > CONTRAST):
        return
    labels = ""
    if share is not None:
        labels = f"; the labels of a batch have {share:.0%} of the entropy of random ones"
    yield Finding(
        "non_iid",
        "serious",
        "Batches are not random samples",
        f"The means of batches at {site.path} scatter {ratio:.1f} times as much (in variance) as "
        f"those of {examined.size} independent examples would{labels}.",
        (site.path,),
        {"spread": ratio, **({} if share is None else {"label entropy": share})},
    )


def _label_share(examined: Examination) -> float | None:
    """Mean entropy of the labels of a batch over the least of 20 shuffled sets of batches; None
    without labels, or where there is but one."""
    labels = examined.labels
    if labels is None or len(labels) < 2:
        return None
    rng = np.random.RandomState(0)

    def entropy(rows: np.ndarray) -> float:
        return float(np.mean([_entropy(row) for row in rows]))

    flat = labels.reshape(-1)
    chance = min(entropy(rng.permutation(flat).reshape(labels.shape)) for _ in range(20))
    return entropy(labels) / chance if chance > 0 else None


def _entropy(labels: np.ndarray) -> float:
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


def preprocessing(examined: Examination) -> Iterator[Finding]:
    """Evaluation inputs that are prepared otherwise than those of training."""
    site = _first(examined)
    if site is None or not examined.apart_evaluation or not site.evaluated:
        return
    here, there = pooled(site.look), pooled(site.evaluated)
    examples = examined.size * examined.batches, examined.examples
    if examined.examples < ENOUGH or not (here.var > ALIVE).any():
        return
    # Four standard errors, as if each example were one value.
    error = 4 * math.sqrt(sum(1 / count for count in examples))
    shift, stretch = distance(there, here, site.made.epsilon)
    if shift < max(SHIFTED, error) and stretch < max(STRETCHED, math.sqrt(2) * error):
        return
    yield Finding(
        "preprocessing",
        "serious",
        "Evaluation is fed something else than training",
        f"At the first site, {site.path}, the means of evaluation inputs are {shift:.2g} standard "
        "deviations away and the variances a factor of "
        f"{math.exp(stretch):.3g}.{_inputs(examined)}",
        (site.path,),
        {"shift": shift, "log variance ratio": stretch},
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
