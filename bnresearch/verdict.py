"""From run folders to numbers. Reads files only: knows neither jax nor models nor pictures.

The statistics, in words:

- an accuracy is the mean over the seeds that finished, with a 95 % Student t interval over seeds;
- diverged runs have no accuracy: they are counted and shown, never averaged in, never dropped in
  silence, and a rate at which fewer seeds diverge is always the better one;
- the best learning rate of an arm is chosen on validation and reported on test;
- two arms are compared by their differences seed by seed: equal seeds share the data order and all
  initial weights that both arms have.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from bnresearch import metrics, rundir

LABELS = {"batch": "BatchNorm", "none": "no norm", "layer": "LayerNorm", "group": "GroupNorm"}
CONFIDENCE = 0.95


# Reading run folders


@dataclasses.dataclass(frozen=True)
class Record:
    """One run as its folder tells it. ``result`` and ``curves`` are empty while there are none."""

    name: str
    arm: str
    rate: float
    seed: int
    status: str
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    result: Mapping[str, Any]
    curves: Sequence[Mapping[str, Any]]

    def accuracy(self, split: str) -> float:
        """Final accuracy in percent; only a run that is done has one."""
        return 100 * self.result["metrics"][split]["accuracy"]

    def curve(self, split: str, key: str) -> dict[int, float]:
        """step -> value of ``key`` on ``split``, along the run."""
        return {
            row["step"]: row[key] for row in self.curves if row["split"] == split and key in row
        }


def collect(runs_dir: Path | str) -> list[Record]:
    """The records of all run folders directly in ``runs_dir``, by arm, rate and seed."""
    folders = (path.parent for path in Path(runs_dir).glob("*/config.json"))
    return sorted(map(read, folders), key=lambda r: (r.arm, r.rate, r.seed))


def read(folder: Path) -> Record:
    """One run folder. Its status is what result.json says, else what status.json says."""
    config = rundir.read_config(folder)
    state = rundir.read_status(folder) or {}
    result = rundir.read_result(folder) or {}
    has_metrics = (folder / metrics.FILE).exists()
    return Record(
        name=folder.name,
        arm=config["norm"]["kind"],
        rate=float(config["optim"]["learning_rate"]),
        seed=config["seed"],
        status=result.get("status") or state.get("status", "unknown"),
        config=config,
        state=state,
        result=result,
        curves=metrics.read_metrics(folder) if has_metrics else [],
    )


# Numbers


class Interval(NamedTuple):
    """A mean with its confidence interval; what ``n`` values cannot give is NaN."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Iterable[float], confidence: float = CONFIDENCE) -> Interval:
    """mean +- t(n-1) * s / sqrt(n), the Student t interval. n < 2 gives no interval, only NaN."""
    x = np.asarray(list(values), float)
    mean = float(x.mean()) if x.size else math.nan
    if x.size < 2:
        return Interval(mean, math.nan, math.nan, x.size)
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, x.size - 1) * scipy.stats.sem(x))
    return Interval(mean, mean - half, mean + half, x.size)


@dataclasses.dataclass(frozen=True)
class Cell:
    """All seeds of one arm at one learning rate. Accuracies in percent."""

    arm: str
    rate: float
    records: Sequence[Record]

    @property
    def done(self) -> dict[int, Record]:
        """seed -> record of the runs that finished."""
        return {r.seed: r for r in self.records if r.status == "done"}

    @property
    def diverged(self) -> int:
        return sum(r.status == "diverged" for r in self.records)

    @property
    def unfinished(self) -> int:
        return len(self.records) - len(self.done) - self.diverged

    def accuracy(self, split: str) -> Interval:
        return interval(r.accuracy(split) for r in self.done.values())


def cells(records: Iterable[Record]) -> list[Cell]:
    """The records grouped by arm and rate, in that order."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        groups.setdefault((record.arm, record.rate), []).append(record)
    return [Cell(*key, groups[key]) for key in sorted(groups)]


def best(table: Iterable[Cell], arm: str) -> Cell | None:
    """The arm's best rate: fewest diverged, then highest validation mean. Test has no say."""
    able = [cell for cell in table if cell.arm == arm and cell.done]
    return max(able, key=lambda c: (-c.diverged, c.accuracy("validation").mean), default=None)


def edge(table: Iterable[Cell], cell: Cell | None) -> str:
    """Words for a best rate at the end of its grid, where a better one may lie beyond; or ""."""
    rates = [other.rate for other in table if cell and other.arm == cell.arm]
    if cell is None or len(rates) < 2:
        return ""
    return {min(rates): "the lowest tried", max(rates): "the highest tried"}.get(cell.rate, "")


def paired(a: Cell, b: Cell, split: str = "test") -> Interval:
    """Accuracy of ``a`` minus ``b`` in percentage points over the seeds that finished in both."""
    seeds = sorted(a.done.keys() & b.done.keys())
    return interval(a.done[s].accuracy(split) - b.done[s].accuracy(split) for s in seeds)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two arms, each at its best rate, and at every rate that both have."""

    treatment: str
    control: str
    best: Mapping[str, Cell | None]
    at_best: Interval
    at_same: Mapping[float, Interval]
    diverged: Mapping[str, tuple[int, int]]  # arm -> (diverged runs, all runs)


def compare(table: Sequence[Cell], treatment: str, control: str) -> Comparison:
    """Treatment minus control, paired by seed."""
    bests = {arm: best(table, arm) for arm in (treatment, control)}
    top, base = bests[treatment], bests[control]
    grid = {(cell.arm, cell.rate): cell for cell in table}
    rates = sorted(rate for arm, rate in grid if arm == treatment and (control, rate) in grid)
    losses = {}
    for arm in bests:
        mine = [cell for cell in table if cell.arm == arm]
        losses[arm] = sum(c.diverged for c in mine), sum(len(c.records) for c in mine)
    return Comparison(
        treatment,
        control,
        bests,
        paired(top, base) if top and base else interval([]),
        {rate: paired(grid[treatment, rate], grid[control, rate]) for rate in rates},
        losses,
    )


def answer(comparison: Comparison) -> str:
    """The comparison in one sentence, worked out from the numbers."""
    name, base = label(comparison.treatment), label(comparison.control)
    gap = comparison.at_best
    if gap.n < 2:
        return f"No answer: fewer than two seeds finished with both {name} and {base}."
    if gap.low > 0:
        verdict = f"Yes: {name} raises"
    elif gap.high < 0:
        verdict = f"No: {name} lowers"
    else:
        verdict = f"Undecided: these seeds do not show that {name} changes"
    return (
        f"{verdict} test accuracy compared with {base}, each at its best learning rate: "
        f"{gap.mean:+.2f} points (95 % interval {bounds(gap)}, {gap.n} seeds, paired)"
        f"{_at_equal_rates(comparison)}{_diverged(comparison)}."
    )


def _at_equal_rates(comparison: Comparison) -> str:
    gaps = {rate: gap for rate, gap in comparison.at_same.items() if gap.n > 1}
    if not gaps:
        return ""
    low, high = (choose(gaps, key=lambda r: gaps[r].mean) for choose in (min, max))
    return (
        f"; at equal rates the difference goes from {gaps[low].mean:+.2f} points (rate {low:g}) "
        f"to {gaps[high].mean:+.2f} points (rate {high:g})"
    )


def _diverged(comparison: Comparison) -> str:
    lost = {arm: runs for arm, runs in comparison.diverged.items() if runs[0]}
    return "".join(f"; {k} of {n} {label(arm)} runs diverged" for arm, (k, n) in lost.items())


# Words


def label(arm: str) -> str:
    return LABELS.get(arm, arm)


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"


def bounds(x: Interval) -> str:
    return "–" if math.isnan(x.low) else f"{x.low:.2f} to {x.high:.2f}"
