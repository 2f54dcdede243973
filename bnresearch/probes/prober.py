"""What the loop asks: all probes of a run at one step."""

from collections.abc import Iterator
from typing import Any

from bnresearch import optim
from bnresearch.experiment import Experiment
from bnresearch.probes import PROBES
from bnresearch.probes.inside import Inside
from bnresearch.state import State

Rows = list[dict[str, Any]]


def every(experiment: Experiment) -> int:
    """How many steps apart the run looks inside."""
    text, steps_per_epoch = experiment.config.probes.every, experiment.program.steps_per_epoch
    return optim.steps("probes.every", text, steps_per_epoch)


def look(experiment: Experiment, state: State) -> Iterator[tuple[str, Rows]]:
    """What each probe of the config finds: its name, and a row of site, depth and numbers for each
    site, in order of depth. The state stays as it is."""
    inside = Inside(experiment, state)
    depths = inside.structure.depths
    for name in experiment.config.probes.names:
        found = PROBES[name](inside)
        rows: Rows = [
            {"site": site, "depth": depths[site], **{key: float(v) for key, v in values.items()}}
            for site, values in found.items()
        ]
        yield name, sorted(rows, key=lambda row: row["depth"])
