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


def scope(examined: Examination) -> Iterator[Finding]:
    """Statistics per device where they should be those of the whole batch, or the reverse."""
    wanted = examined.scope
    merged = [s.path for s in examined.keepers if s.made.axis_name is not None]
    if examined.replicas is not None and wanted == "global" and examined.replicas > 1e-6:
        yield Finding(
            "scope",
            "serious",
            "Every device keeps statistics of its own",
            f"The variables have one copy per device, and their running statistics differ by up to "
            f"{examined.replicas:.1%}: each device saw only its part of the batch, and what is "
            "evaluated depends on which copy is taken.",
            tuple(examined.structure.keepers),
            {"difference of replicas": examined.replicas},
        )
        return
    if wanted == "device" and merged:
        yield Finding(
            "scope",
            "serious",
            "Statistics are merged over devices",
            f"axis_name={examined.sites[merged[0]].made.axis_name!r} at {few(merged)} merges "
            "them, but "
            "those of each device were wanted.",
            merged,
        )
    if examined.declared and examined.declared != wanted:
        yield Finding(
            "scope",
            "serious",
            f"Statistics are taken per {examined.declared}"
            if examined.declared == "device"
            else "Statistics are taken over the whole batch",
            f"The config takes them so (norm.scope), but {wanted} ones were wanted.",
            tuple(examined.structure.keepers),
        )
        return
    parts, misfit = parts_that_fit(examined)
    if parts > 1 and wanted == "global":
        off = math.sqrt(misfit[1])
        yield Finding(
            "scope",
            "serious",
            "Running statistics are those of parts of the batch",
            "The running variances differ from those of the data by a factor of "
            f"{math.exp(off):.3g}, "
            f"but by only {math.exp(math.sqrt(misfit[parts])):.3g} from what {parts} equal parts "
            "of a "
            "batch have within themselves: the statistics were taken per device, or variances "
            "were "
            "averaged over devices.",
            tuple(examined.structure.keepers),
            {"parts": parts, "misfit": misfit},
        )
