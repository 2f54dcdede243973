"""From frames of values to samples: one number per seed for each comparison that a claim makes.

Pairs are formed here, what is lost is counted by its reason, and what is censored becomes an
interval [low, high] with an open side.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bnresearch.claims import Place, Slope
from bnresearch.errors import UserError
from bnresearch.measures import Tuning

LOG = {"e": np.log, "2": np.log2, "10": np.log10}
ROW = ("value", "censored", "status", "id")


class Row(NamedTuple):
    """The value of one seed: at ``at``, somewhere in [low, high]. No value: NaN and a reason."""

    at: float
    low: float
    high: float
    lost: str
    runs: str

    @property
    def censored(self) -> bool:
        return self.low != self.high and not self.lost

    def logarithm(self, base: str = "e") -> "Row":
        """The row on a logarithmic scale; a number that has no logarithm is lost."""
        if self.lost:
            return self
        if self.at <= 0:
            return self._replace(at=math.nan, lost="not positive")
        log = LOG[base]
        low, high = (float(log(end)) if abs(end) < math.inf else end for end in self[1:3])
        return self._replace(at=float(log(self.at)), low=low, high=high)


Rows = Mapping[int, Row]  # by seed


class Side(NamedTuple):
    """One side of a comparison: an arm at a point of the axes; ``tuned``: its chosen value."""

    arm: str
    point: Mapping[str, Any]
    tuned: Any = None


class Table:
    """The values of one measure, by arm and point.

    Attributes:
      axes: the axes that the frame has.
      seeds: all seeds that were planned.
    """

    def __init__(self, frame: pd.DataFrame):
        self.axes = [name for name in frame.columns if name not in ("arm", "seed", *ROW)]
        self.rows: dict[tuple[Any, ...], dict[int, Row]] = {}
        self.known: dict[str, list[Any]] = {
            axis: frame[axis].unique().tolist() for axis in self.axes
        }
        for arm, seed, *rest in _columns(frame, ["arm", "seed", *ROW, *self.axes]):
            place = (arm, *rest[len(ROW) :])
            self.rows.setdefault(place, {})[int(seed)] = _row(*rest[: len(ROW)])
        self.seeds = sorted({seed for rows in self.rows.values() for seed in rows})

    def at(self, side: Side) -> Rows:
        """The rows of one arm and point; UserError if the study has no such place."""
        # An axis with one value need not be given.
        only = {axis: known[0] for axis, known in self.known.items() if len(known) == 1}
        place = (side.arm, *({**only, **side.point}.get(axis) for axis in self.axes))
        if place not in self.rows:
            raise UserError(
                f"a claim is about {side.arm!r} at {dict(side.point)}, where there are no values; "
                f"axes: {self.known}"
            )
        return self.rows[place]


def _columns(frame: pd.DataFrame, names: Sequence[str]) -> Any:
    return zip(*(frame[name].tolist() for name in names), strict=True)


def _row(value: float, censored: int, status: str, ids: str) -> Row:
    if math.isnan(value):
        return Row(value, value, value, status if status != "done" else "without a value", ids)
    low = value if censored >= 0 else -math.inf
    return Row(value, low, value if censored <= 0 else math.inf, "", ids)


def side(
    place: Place,
    where: Mapping[str, Any],
    axes: Sequence[str],
    tuning: Tuning | None,
    at: Any = "best",
) -> Side:
    """The arm and point that a claim's ``place`` means, with the value of a tuned axis filled in.

    Args:
      axes: those the measure has; a claim may give others, which the measure has collapsed.
      at: "best", or the value of the tuned axis.
    """
    given = {"arm": place} if isinstance(place, str) else dict(place)
    arm = given.pop("arm")
    point = {axis: value for axis, value in {**where, **given}.items() if axis in axes}
    if tuning is None or tuning.axis not in axes or tuning.axis in point:
        return Side(arm, point)
    value = tuning.best(arm, point) if at == "best" else at
    return Side(arm, {**point, tuning.axis: value}, value)


# ---- Samples


class Sample(NamedTuple):
    """One number per seed.

    Attributes:
      seeds: which; at, low, high: [n] the numbers, and what they are at least and at most.
      lost: {why: seeds without a number}; "diverged", "failed", "missing", ...
      censored: how many of the values are only bounds, also among those set aside.
      aside: pairs of which both sides are bounds in the same direction: they say nothing of order.
      runs: the ids of all runs behind the numbers.
      strata: [n, m] the m numbers of which ``at`` are the means, where several are pooled.
    """

    seeds: list[int]
    at: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lost: Mapping[str, int]
    censored: int
    aside: int
    runs: list[str]
    strata: np.ndarray | None = None

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def planned(self) -> int:
        return self.n + self.aside + sum(self.lost.values())

    @property
    def lost_share(self) -> float:
        return sum(self.lost.values()) / max(1, self.planned)

    def oriented(self, sign: int, shift: float = 0.0) -> "Sample":
        """sign * x - shift, with low and high in their places."""
        ends = (self.low, self.high) if sign > 0 else (self.high, self.low)
        low, high = (sign * end - shift for end in ends)
        strata = None if self.strata is None else sign * self.strata - shift
        return self._replace(at=sign * self.at - shift, low=low, high=high, strata=strata)


def single(rows: Rows, seeds: Sequence[int]) -> Sample:
    """The values of one arm."""
    made = {seed: _found(rows, seed) for seed in seeds}
    return _gather(made, [], sum(row.censored for row in made.values()))


def paired(treatment: Rows, control: Rows, seeds: Sequence[int]) -> Sample:
    """treatment - control for each seed; lost if one side is, for that side's reason.

    Between a censored t >= 500 and c = 100 lies t - c >= 400. Where both are censored on the same
    side nothing is known: such pairs are set aside, as the log-rank test does. Under the hypothesis
    that the two sides of a pair are exchangeable, up to a factor or a shift, those that are left
    still are at most as likely to count for either side as against it, so that tests of signs keep
    their level (both sides have the same limit, which is how studies are made).
    """
    made = {seed: _difference(treatment, control, seed) for seed in seeds}
    aside = [s for s, row in made.items() if not row.lost and -row.low == row.high == math.inf]
    bounds = sum(_found(rows, seed).censored for rows in (treatment, control) for seed in seeds)
    return _gather(made, aside, bounds)


def _difference(treatment: Rows, control: Rows, seed: int) -> Row:
    t, c = _found(treatment, seed), _found(control, seed)
    ids = " ".join(filter(None, (t.runs, c.runs)))
    return Row(t.at - c.at, t.low - c.high, t.high - c.low, t.lost or c.lost, ids)


def pooled(points: Sequence[tuple[Rows, Rows]], seeds: Sequence[int]) -> Sample:
    """treatment - control at several points: per seed their mean, and all of them as strata.

    A seed needs an exact number at every point: the seeds, not the points, are what repeats.
    """
    parts = {seed: [_difference(*point, seed) for point in points] for seed in seeds}
    made = {seed: _together(rows, np.mean) for seed, rows in parts.items()}
    sample = _gather(made, [], 0)
    strata = np.array([[row.at for row in parts[seed]] for seed in sample.seeds])
    return sample._replace(strata=strata.reshape(sample.n, len(points)))


def _together(rows: Sequence[Row], function: Callable[[list[float]], Any]) -> Row:
    """One number of those of a seed, lost if one of them is, or is only a bound."""
    lost = next((row.lost for row in rows if row.lost), "")
    lost = lost or ("censored" if any(row.censored for row in rows) else "")
    number = math.nan if lost else float(function([row.at for row in rows]))
    return Row(number, number, number, lost, " ".join(row.runs for row in rows))


def slopes(claim: Slope, points: Mapping[float, Rows], seeds: Sequence[int]) -> Rows:
    """The least-squares slope over the axis values ``points``, one per seed.

    A seed needs an exact value at every point: over part of the axis the slope is another one, and
    with a bound it is not known.
    """
    if len(points) < 2:
        raise UserError(f"a slope over {claim.axis!r} needs two values of it, there is one")
    x = np.array(list(points), float)
    x = LOG[claim.log_x](x) if claim.log_x else x
    made = {}
    for seed in seeds:
        rows = [_found(at, seed) for at in points.values()]
        rows = [row.logarithm(claim.log_y) if claim.log_y else row for row in rows]
        made[seed] = _together(rows, lambda y: np.polyfit(x, y, 1)[0])
    return made


def _found(rows: Rows, seed: int) -> Row:
    return rows.get(seed) or Row(math.nan, math.nan, math.nan, "missing", "")


def _gather(made: Rows, aside: Sequence[int], bounds: int) -> Sample:
    kept = [seed for seed, row in made.items() if not row.lost and seed not in aside]
    at, low, high = (np.array([made[seed][i] for seed in kept], float) for i in range(3))
    lost = Counter(row.lost for row in made.values() if row.lost)
    runs = [run for row in made.values() for run in row.runs.split()]
    return Sample(kept, at, low, high, dict(lost), bounds, len(aside), runs)
