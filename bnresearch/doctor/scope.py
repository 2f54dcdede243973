"""The check of the scope: over what were statistics taken, and over what were they meant to be?"""

import math
from collections.abc import Iterator

import numpy as np

from bnresearch.doctor.examine import Examination
from bnresearch.doctor.finding import Finding, few

CLEARLY, LEAST = 4, 0.02  # times the misfit of whole batches; a deviation worth a word


def parts_that_fit(examined: Examination) -> tuple[int, dict[int, float]]:
    """Into how many parts the batch must be cut so that the running variances fit those within the
    parts, and the squared misfit of each number, mean over all features of
    ``log(v_r / v_parts)^2``.

    Only of sites whose statistics nothing else explains (`damage.in_parts`).

    Statistics of 8 devices that were never merged, or whose variances were averaged, lack the
    variance between the devices: with n independent values each they are (n - 1) / n of the whole.
    """
    misfit = {}
    for parts, found in examined.parts.items():
        logs = [
            _logs(site.running.var, found[site.path])
            for site in examined.keepers
            if site.running is not None and site.path in found
        ]
        misfit[parts] = float(np.square(np.concatenate(logs)).mean())
    best = min(misfit, key=misfit.__getitem__, default=1)
    clear = best > 1 and misfit[1] > CLEARLY * misfit[best] and misfit[1] > LEAST**2
    return (best if clear else 1), misfit


def _logs(running: np.ndarray, found: np.ndarray) -> np.ndarray:
    alive = (found > 1e-10) & (running > 0) & np.isfinite(running)
    return np.log(running[alive] / found[alive])


def is_per_device(examined: Examination) -> bool:
    """Whether running statistics are those of parts of the batch where global ones are wanted."""
    return examined.scope == "global" and (_differ(examined) or parts_that_fit(examined)[0] > 1)


def _differ(examined: Examination) -> bool:
    return examined.replicas is not None and examined.replicas > 1e-6


def scope(examined: Examination) -> Iterator[Finding]:
    """Statistics per device where they should be those of the whole batch, or the reverse."""
    merged = [s.path for s in examined.keepers if s.made.axis_name is not None]
    if examined.declared and examined.declared != examined.scope:
        yield _declared(examined)
    elif examined.scope == "device" and merged:
        name = examined.sites[merged[0]].made.axis_name
        yield Finding(
            "scope",
            "serious",
            "Statistics are merged over devices",
            f"axis_name={name!r} at {few(merged)} merges them, but those of each device were "
            "wanted.",
            merged,
            mend="nn.BatchNorm(axis_name=None) at these sites",
        )
    elif examined.scope == "global" and _differ(examined):
        yield Finding(
            "scope",
            "serious",
            "Every device keeps statistics of its own",
            "The variables have one copy per device, and their running statistics differ by up to "
            f"{examined.replicas:.1%}: each device saw only its part of the batch, and what is "
            "evaluated depends on which copy is taken.",
            tuple(examined.structure.keepers),
            {"difference of replicas": examined.replicas},
        )
    elif is_per_device(examined):
        yield _in_parts(examined)


def _declared(examined: Examination) -> Finding:
    there, wanted = examined.declared, examined.scope
    return Finding(
        "scope",
        "serious",
        "Statistics are taken per device" if there == "device" else "Statistics are global",
        f"norm.scope of the config makes them {WORDS[there]}, but {WORDS[wanted]} was wanted.",
        tuple(examined.structure.keepers),
        mend=f"python -m bnresearch train --config=... --workdir=... --config.norm.scope={wanted}",
    )


WORDS = {"global": "those of the whole batch", "device": "those of each device"}


def _in_parts(examined: Examination) -> Finding:
    parts, misfit = parts_that_fit(examined)
    off, left = (math.exp(math.sqrt(misfit[number])) for number in (1, parts))
    return Finding(
        "scope",
        "serious",
        "Running statistics are those of parts of the batch",
        f"The running variances differ from those of the data by a factor of {off:.3g}, but by "
        f"only {left:.3g} from what batches cut into {parts} parts have: the statistics were "
        "taken per device, or variances were averaged over devices.",
        tuple(examined.parts[1]),
        {"parts": parts, "misfit": misfit},
    )
