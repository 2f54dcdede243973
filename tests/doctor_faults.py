"""Faults, each planted in a healthy model of every family, and what the doctor is to say of it.

``python tests/doctor_faults.py`` writes the table of planted against found in docs/doctor.md anew.
"""

import sys
from pathlib import Path

import doctor_faults_model as model
import doctor_faults_statistics as statistics
from doctor_case import EVERYWHERE
from doctor_zoo import FAMILIES, compiled_for, family

from bnresearch import doctor

FAULTS = {
    "young": statistics.young,
    "young at a site": statistics.young_site,
    "slow": statistics.slow,
    "slow at a site": statistics.slow_site,
    "mean not finite": statistics.not_finite,
    "variance infinite": statistics.infinite,
    "variance negative": statistics.negative,
    "variance diverged": statistics.diverged,
    "mean shifted": statistics.shifted,
    "variance too small": statistics.too_wide,
    "decay swapped": statistics.swapped,
    "decay swapped at a site": statistics.swapped_site,
    "never updated": statistics.never,
    "never updated at a site": statistics.never_site,
    "weight overflowed": statistics.overflow,
    "statistics in bfloat16": statistics.half,
    "norm in bfloat16": statistics.half_made,
    "cancellation": statistics.cancelling,
    "tiny batches": statistics.few,
    "dropout before": model.dropped,
    "bias before": model.biased,
    "double": model.doubled,
    "running in training": model.always_running,
    "batch in evaluation": model.always_batch,
    "switch the wrong way round": model.use_swapped,
    "padding at a site": model.unmasked,
    "padding": model.unmasked_everywhere,
    "weight decay on scales": model.decayed,
    "weight decay on a scale": model.decayed_site,
    "scales near zero": model.scaled_away,
    "channels unread": model.unread,
    "channels constant": model.constant,
    "frozen by the optimizer": model.frozen_moves,
    "frozen by its owner": model.frozen_rule,
    "statistics per device": statistics.per_device,
    "replicas that differ": statistics.replicas,
    "synchronised": statistics.synchronised,
    "synchronised at a site": statistics.synchronised_site,
    "sorted by class": model.sorted_by_class,
    "inputs scaled twice": model.unscaled,
    "inputs shifted": model.brightened,
}

# What is not planted in a family, and why.
MASKED_ALIKE = "a mask of examples is the same at all sites"
COSTLY = "in the MLP only, to save a compilation"
LEFT_OUT = {("padding at a site", name): MASKED_ALIKE for name in ("mlp", "resnet")} | {
    (fault, name): COSTLY
    for fault in (
        "young",
        "slow",
        "decay swapped",
        "norm in bfloat16",
        "switch the wrong way round",
        "synchronised",
    )
    for name in ("resnet", "encoder")
}

PLANTED = [(fault, name) for name in FAMILIES for fault in FAULTS if (fault, name) not in LEFT_OUT]


# ---- Planted against found

PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"
BEGIN = "<!-- planted: begin (python tests/doctor_faults.py writes it) -->"
END = "<!-- planted: end -->"


def diagnosed(fault, name):
    """The case, and what the doctor says of it."""
    healthy = family(name)
    with compiled_for(healthy.model):
        planted = FAULTS[fault](healthy)
        report = doctor.diagnose(
            planted.model, planted.variables, planted.batches, **planted.options
        )
    return planted, report


def hit(planted, report):
    """Whether the right check found it, at the right sites."""
    found = [finding for finding in report.findings if finding.check == planted.check]
    right = [f for f in found if planted.sites in (EVERYWHERE, tuple(f.sites))]
    return bool(right)


def others(planted, report):
    """What else the doctor calls serious."""
    return [finding.check for finding in report.serious if finding.check != planted.check]


def cell(planted, report):
    """The entry of the table for one case."""
    if not hit(planted, report):
        return "missed"
    sites = "" if planted.sites == EVERYWHERE else ", ".join(f"`{s}`" for s in planted.sites)
    where = sites or EVERYWHERE
    return where + "".join(f"; also {check}" for check in others(planted, report))


def how(plant):
    """The docstring of a fault, in one line."""
    return " ".join(plant.__doc__.split()).removesuffix(".").replace("``", "`")


def table(cells):
    """Markdown, from {(fault, family): (check, cell)}."""
    heads = ["planted", "how", "found by", *FAMILIES]
    lines = [heads, ["---"] * len(heads)]
    for fault, plant in FAULTS.items():
        check = next(cells[fault, name][0] for name in FAMILIES if (fault, name) in cells)
        found = [
            cells[fault, n][1] if (fault, n) in cells else LEFT_OUT[fault, n] for n in FAMILIES
        ]
        lines.append([fault, how(plant), f"`{check}`", *found])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    """Writes the table anew, between its marks in the page."""
    cells = {}
    for fault, name in PLANTED:
        planted, report = diagnosed(fault, name)
        cells[fault, name] = planted.check, cell(planted, report)
        print(f"{name}: {fault}: {cells[fault, name][1]}", file=sys.stderr)
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(f"{before}{begin}\n{table(cells)}{end}{after}")


if __name__ == "__main__":
    main()
