"""Checks of the running statistics: are they those of the data under these weights?

What is wrong with a site has one cause here, the first that explains it (`causes`): broken, never
updated, young, per device, decay swapped, slow, or none that we know.
"""

import math
from collections.abc import Iterator

import numpy as np

from bnresearch.doctor.examine import ALIVE, Examination, Site, distance
from bnresearch.doctor.finding import Finding, few
from bnresearch.doctor.scope import is_per_device
from bnresearch.net import cross_entropy

APART_MEAN, APART_VAR = 0.25, 0.25  # from where on running statistics are not the precise ones
HURTS = 0.1  # nats: a loss that is so much larger is worth a serious word
HURTS_OUTPUT = 0.25  # where no loss is known: change of the output, in units of its spread
BLAMED = 0.25  # share of the damage from which on a site is to blame
DIVERGED = 1e3  # times the variance, or standard deviations of the mean
YOUNG, FITS = 0.05, 0.8  # weight of the starting values; share of the deviation that explains
SWAPPED = 0.5  # largest decay that looks like torch's momentum
SLOW = 0.98  # a memory of 50 steps


def hurts(examined: Examination) -> bool:
    """Whether evaluation is clearly worse with running than with precise statistics."""
    gap, error = examined.gap()
    if not examined.losses:
        return gap > HURTS_OUTPUT
    enough = HURTS
    if examined.net.losses is not cross_entropy:  # of a loss in unknown units a tenth
        enough = 0.1 * abs(float(examined.losses["precise"].mean()))
    return gap > max(enough, 3 * error)


def deviates(site: Site) -> bool:
    """Whether running statistics are further from those of training than noise explains: of the
    mean, that of an exponential average, sqrt((1 - d) / (1 + d)) of that of a batch, and that of K
    batches together; of the variance the same of sqrt(2 / n), and the 1 / n that it lacks."""
    assert site.running is not None
    z, log_ratio = distance(site.running, site.expected, site.made.epsilon)
    decay = 0.9 if site.made.decay is None else site.made.decay
    count = len(site.look["mean"])
    scatter = math.sqrt((1 - decay) / (1 + decay) + 1 / count)
    spread = max(batch_spread(site), 1 / math.sqrt(site.values) if count < 2 else 0.0)
    lacking = math.sqrt(2 / max(site.values - 1, 1)) * scatter * 4 + 1 / site.values
    return z > max(APART_MEAN, 4 * spread * scatter) or log_ratio > max(APART_VAR, lacking)


def batch_spread(site: Site) -> float:
    """Standard deviation of batch means over that of the data, root mean square over features; of
    several calls of a site in a batch, each by itself."""
    calls = site.look["mean"].reshape(-1, site.calls, site.look["mean"].shape[-1])
    return math.sqrt(np.mean(calls.var(0).mean(0) / (site.precise.var + site.made.epsilon)))


def is_broken(site: Site) -> bool:
    assert site.running is not None
    mean, var = site.running
    if not np.isfinite([mean, var]).all() or (var < 0).any():
        return True
    scale = site.expected.var + site.made.epsilon
    far = np.abs(mean - site.expected.mean) / np.sqrt(np.maximum(scale, 1e-12)) > DIVERGED
    return bool((var / scale > DIVERGED).any() or far.any()) and start_share(site)[1] < FITS


def is_untouched(site: Site) -> bool:
    assert site.running is not None
    return bool((site.running.mean == 0).all() and (site.running.var == 1).all())


def start_share(site: Site) -> tuple[float, float]:
    """The weight a that the starting values 0 and 1 still have, by least squares over the features
    of ``running = a * start + (1 - a) * precise``, and the share of the deviation it explains.

    After t updates with decay d it is d^t.
    """
    assert site.running is not None
    alive = site.expected.var > ALIVE
    m, v = site.expected.mean[alive], site.expected.var[alive] + site.made.epsilon
    rm, rv = (x[alive] for x in site.running)
    deviation = np.concatenate([(rm - m) / np.sqrt(v), (rv - v) / v])
    towards = np.concatenate([-m / np.sqrt(v), (1 - v) / v])
    if not np.isfinite(deviation).all():
        return 0.0, 0.0
    share = float(np.clip(deviation @ towards / max(towards @ towards, 1e-12), 0, 1))
    rest = np.square(deviation - share * towards).sum()
    return share, float(1 - rest / max(np.square(deviation).sum(), 1e-12))


def is_young(site: Site) -> bool:
    share, fits = start_share(site)
    return share > YOUNG and fits > FITS and deviates(site)


def own_cause(examined: Examination, site: Site) -> str | None:
    """The check that explains the statistics of a site by themselves, "" where they are constants
    on purpose; None where they are averages over batches, and it takes more to say of which."""
    still = examined.frozen | (examined.treatment.still if examined.treatment else frozenset())
    if is_broken(site):
        return "broken"
    if site.made.frozen or site.path in still:
        return ""
    if is_untouched(site):
        return "never_updated"
    return "young" if is_young(site) else None


def causes(examined: Examination) -> dict[str, str]:
    """The check that explains what is wrong with the statistics of each site, "" for nothing."""
    found = {}
    per_device = is_per_device(examined)
    for site in examined.keepers:
        own = own_cause(examined, site)
        if own is not None:
            found[site.path] = own
        elif per_device:
            found[site.path] = "scope"
        elif site.made.decay is not None and site.made.decay <= SWAPPED:
            found[site.path] = "decay_swapped"
        elif deviates(site):
            slow = site.made.decay is None or site.made.decay >= SLOW
            found[site.path] = "slow" if slow else "evaluation_gap"
        else:
            found[site.path] = ""
    return found


def _sites(examined: Examination, cause: str) -> list[Site]:
    return [examined.sites[path] for path, why in causes(examined).items() if why == cause]


def _paths(sites: list[Site]) -> list[str]:
    return [site.path for site in sites]


def _gap_in_words(examined: Examination) -> str:
    gap, error = examined.gap()
    if not examined.losses:
        return f"the output changes by {gap:.2g} of its spread with precise statistics"
    running, precise = (examined.losses[name].mean() for name in ("running", "precise"))
    return (
        f"the evaluation loss is {running:.3g} with running and {precise:.3g} with precise "
        f"statistics (difference {gap:.2g}, standard error {error:.1g})"
    )


def _apart_in_words(sites: list[Site]) -> str:
    worst = max(sites, key=lambda site: max(site.apart()))
    z, log_ratio = worst.apart()
    return (
        f"at {worst.path} the running means are {z:.2g} standard deviations from those of the "
        f"data, the variances a factor of {math.exp(log_ratio):.3g}"
    )


# ---- The checks


def broken(examined: Examination) -> Iterator[Finding]:
    """Running statistics that are not finite, negative, or orders of magnitude away."""
    sites = _sites(examined, "broken")
    if not sites:
        return
    texts = []
    for site in sites[:3]:
        mean, var = site.running  # type: ignore[misc]
        lost = int((~np.isfinite(mean) | ~np.isfinite(var)).sum())
        if lost:
            texts.append(f"{site.path}: {lost} of {len(mean)} features are not finite")
        elif (var < 0).any():
            texts.append(f"{site.path}: a variance of {var.min():.3g}")
        else:
            worst = int(np.argmax(var / (site.precise.var + site.made.epsilon)))
            texts.append(
                f"{site.path}: a variance of {var[worst]:.3g} where the data have "
                f"{site.precise.var[worst]:.3g}"
            )
    yield Finding(
        "broken",
        "serious",
        "Running statistics diverged",
        "; ".join(texts) + ".",
        _paths(sites),
    )


def never_updated(examined: Examination) -> Iterator[Finding]:
    """Running statistics that still are what they began with, mean 0 and variance 1."""
    sites = [site for site in _sites(examined, "never_updated") if max(site.apart()) > 0.02]
    if not sites:
        return
    moving = sum(site.moved for site in sites)
    yield Finding(
        "never_updated",
        "serious",
        "Running statistics were never updated",
        f"All means are 0 and all variances 1 at {few(_paths(sites))}; {_apart_in_words(sites)}. A "
        f"training call moves {moving} of these {len(sites)}: "
        + (
            "what it returns in batch_stats was not kept."
            if moving
            else "it normalises with running statistics."
        ),
        _paths(sites),
    )


def young(examined: Examination) -> Iterator[Finding]:
    """Running statistics in which the starting values, 0 and 1, still weigh."""
    sites = _sites(examined, "young")
    if not sites:
        return
    shares = {site.path: start_share(site)[0] for site in sites}
    largest = max(sites, key=lambda site: shares[site.path])
    share, decay = shares[largest.path], largest.made.decay
    steps = ""
    if decay is not None and 0 < decay < 1:
        after = max(math.log(max(share, 1e-6)) / math.log(decay), 1)
        needed = math.log(0.01) / math.log(decay)
        steps = f", as after about {after:,.0f} updates at decay {decay:g}; it takes {needed:,.0f} "
        steps += "until they weigh 1 %"
    yield Finding(
        "young",
        "serious" if hurts(examined) else "warning",
        "Running statistics are too young",
        f"At {largest.path} the starting values (mean 0, variance 1) still weigh "
        f"{share:.0%}{steps}; {_gap_in_words(examined)}.",
        _paths(sites),
        {"weight of the start": shares},
    )


def decay_swapped(examined: Examination) -> Iterator[Finding]:
    """A decay that looks like torch's momentum, 0.1 for 0.9: the statistics are those of the last
    batch or two."""
    sites = [
        site
        for site in examined.keepers
        if site.made.decay is not None
        and site.made.decay <= SWAPPED
        and not site.made.frozen
        and site.path not in examined.frozen
    ]
    if not sites:
        return
    site = sites[0]
    decay = site.made.decay or 0.0
    noise = math.sqrt((1 - decay) / (1 + decay))
    usual = math.sqrt(0.1 / 1.9)
    yield Finding(
        "decay_swapped",
        "serious" if decay <= 0.3 else "warning",
        "The decay of running statistics is small, as if it were torch's momentum",
        f"decay={decay:g} at {few(_paths(sites))} keeps {decay:.0%} of the old at every step "
        f"(torch's momentum={decay:g} keeps {1 - decay:.0%}): the running mean scatters by "
        f"{noise:.2g} of what a single batch does, {noise / usual:.2g} times as much as at 0.9; "
        f"{_gap_in_words(examined)}.",
        _paths(sites),
        {"decay": decay},
    )


def half_precision(examined: Examination) -> Iterator[Finding]:
    """Running statistics, or sums over the batch, in less than float32."""
    kept = [s for s in examined.keepers if s.dtype not in ("float32", "float64")]
    computed = [s for s in examined.keepers if "low" in s.look and _low_input(s) and s not in kept]
    if kept:
        yield Finding(
            "half_precision",
            "serious",
            "Running statistics are kept in half precision",
            f"They are {kept[0].dtype} at {few(_paths(kept))}. With 8 bits an average of decay "
            "0.99 stops moving at some 80 % of where it should go.",
            _paths(kept),
        )
    if computed:
        yield Finding(
            "half_precision",
            "serious" if max(map(_low_input, computed)) > 0.25 else "warning",
            "Batch statistics are computed in half precision",
            f"The sums over the batch take the dtype of the input at {few(_paths(computed))}; "
            f"there the variances are off by up to {max(map(_low_input, computed)):.1%}.",
            _paths(computed),
        )


def _low_input(site: Site) -> float:
    """The largest relative error of the variance, computed in the dtype of the input."""
    v = site.look["var"]
    alive = v > 1e-8
    return float(np.abs(site.look["low"][alive] / v[alive] - 1).max()) if alive.any() else 0.0


def slow(examined: Examination) -> Iterator[Finding]:
    """Running statistics that lag behind the weights: a decay too close to 1."""
    sites = _sites(examined, "slow")
    if not sites:
        return
    decays = [site.made.decay for site in sites if site.made.decay is not None]
    memory = (
        f" (a memory of {1 / (1 - max(decays)):,.0f} steps)" if decays and max(decays) < 1 else ""
    )
    known = f"decay={max(decays):g}{memory}" if decays else "an unknown decay"
    yield Finding(
        "slow",
        "serious" if hurts(examined) else "warning",
        "Running statistics lag behind the weights",
        f"With {known} they are still those of earlier weights: {_apart_in_words(sites)}; "
        f"{_gap_in_words(examined)}.",
        _paths(sites),
        {"apart": {site.path: site.apart() for site in sites}},
    )


def evaluation_gap(examined: Examination) -> Iterator[Finding]:
    """Evaluation that is worse with running than with precise statistics, and which sites do it."""
    sites = _sites(examined, "evaluation_gap")
    harmful, _ = examined.gap()
    if not hurts(examined) and not sites:
        return
    blamed = {path: share for path, share in examined.blame.items() if share >= BLAMED}
    order = sorted(blamed, key=lambda path: -blamed[path]) or _paths(sites)
    shares = ", ".join(f"{path} {blamed[path]:.0%}" for path in order[:6] if path in blamed)
    apart = f"; {_apart_in_words(sites)}" if sites else ""
    text = _gap_in_words(examined)
    yield Finding(
        "evaluation_gap",
        "serious" if hurts(examined) else "warning",
        "Evaluation suffers from the running statistics"
        if hurts(examined)
        else "Running statistics are not those of the data",
        f"{text[0].upper()}{text[1:]}{apart}."
        + (f" Share of the damage by site: {shares}." if shares else ""),
        order,
        {"gap": harmful, "blame": examined.blame},
    )
