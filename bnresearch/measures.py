"""From runs to the numbers that claims are about, and which value of a tuned axis each arm takes.

Every measure is a function in MEASURES, from a run that is done (or diverged) to one number. What
has no number is not dropped: it is a row with NaN and the status of the run, so that verdicts can
count what was lost. Imports no jax.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bnresearch.claims import Measure
from bnresearch.errors import UserError, lookup
from bnresearch.runs import Run

AT_LEAST, AT_MOST = 1, -1  # what `censored` says of a number that is only a bound; 0: it is exact


class Number(NamedTuple):
    """What a measure makes of a run: raw, before ``factor``."""

    value: float
    censored: int = 0


NONE = Number(math.nan)


# ---- Measures of one run


def final(run: Run, measure: Measure) -> Number:
    """The metric at the end of the run."""
    return Number(run.final(measure.split, measure.metric))


def best(run: Run, measure: Measure) -> Number:
    """The best of the recorded values; NaNs among them are passed over."""
    values = run.curve(measure.split, measure.metric)[1]
    values = values[~np.isnan(values)]
    if not len(values):
        return NONE
    return Number(float(values.max() if measure.higher_is_better else values.min()))


def area(run: Run, measure: Measure) -> Number:
    """The trapezoid integral of the recorded values over steps, by the length in steps: a mean."""
    steps, values = run.curve(measure.split, measure.metric)
    if len(values) < 2:
        return Number(float(values[0])) if len(values) else NONE
    return Number(float(np.trapezoid(values, steps) / (steps[-1] - steps[0])))


def steps_to(run: Run, measure: Measure) -> Number:
    """The first recorded step with the metric at the target or beyond, else at least all steps."""
    steps, values = run.curve(measure.split, measure.metric)
    there = _good(values, measure.options["target"], measure.options["rising"])
    if there.any():
        return Number(float(steps[there.argmax()]))
    return Number(float(run.step), AT_LEAST)


def _good(values: Any, bound: float, rising: bool) -> Any:
    """Whether values are on the good side of a bound, or at it; NaN is not."""
    return np.asarray(values) >= bound if rising else np.asarray(values) <= bound


# ---- Measures of the runs along one axis


def largest_usable(runs: Sequence[Run], measure: Measure) -> tuple[Number, str]:
    """(number, status) of runs that differ in the value of options["axis"] alone.

    A run that diverged is not usable. One that failed or is missing might have been: where such a
    value lies above the largest usable one, there is no number and the status says why.
    """
    axis, bound, rising = (measure.options[name] for name in ("axis", "at_least", "rising"))
    runs = sorted(runs, key=lambda run: run.point[axis])
    for run in reversed(runs):
        if run.status not in ("done", "diverged"):
            return NONE, run.status
        if run.status == "done" and _good(run.final(measure.split, measure.metric), bound, rising):
            return Number(float(run.point[axis]), AT_LEAST if run is runs[-1] else 0), "done"
    return Number(float(runs[0].point[axis]), AT_MOST), "done"


# What Measure.how may be.
OF_A_RUN: Mapping[str, Callable[[Run, Measure], Number]] = {
    "final": final,
    "best": best,
    "area": area,
    "steps_to": steps_to,
}
OF_AN_AXIS: Mapping[str, Callable[[Sequence[Run], Measure], tuple[Number, str]]] = {
    "largest_usable": largest_usable,
}
FUNCTION = "function"  # worked out by `compute`, kept in study.json
MEASURES: Mapping[str, Any] = {**OF_A_RUN, **OF_AN_AXIS, FUNCTION: None}


# The options that a measure needs, and what they are.
OPTIONS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "steps_to": {"target": (int, float), "rising": (bool,)},
    "largest_usable": {"axis": (str,), "at_least": (int, float), "rising": (bool,)},
}


def check(measure: Measure, axes: Iterable[str]) -> None:
    """UserError for a measure that cannot be had of a study with these axes."""
    lookup(MEASURES, measure.how, "kind of measure")
    for name, kinds in OPTIONS.get(measure.how, {}).items():
        if not isinstance(measure.options.get(name), kinds):
            raise UserError(
                f"measure {measure.label!r} has {name}={measure.options.get(name)!r} as an option "
                f"of {measure.how}; was it changed by hand?"
            )
    if (measure.collapses is not None) != (measure.how in OF_AN_AXIS):
        raise UserError(
            f"measure {measure.label!r} has axis={measure.collapses!r} as an option of "
            f"{measure.how}; was it changed by hand?"
        )
    if measure.collapses is not None:
        lookup(dict.fromkeys(axes), measure.collapses, f"axis of measure {measure.how}")


# ---- Frames


def values(
    runs: Sequence[Run],
    measure: Measure,
    axes: Sequence[str],
    computed: Mapping[str, float] = {},
) -> pd.DataFrame:
    """A measure of all runs, in its unit (``factor`` applied).

    Args:
      runs: all the places of a study, in its order.
      measure: any of MEASURES.
      axes: the names of the study's axes.
      computed: {run id: raw value} for a measure that is a function.

    Returns:
      A frame with a row per place, in the order of ``runs``: arm, the axes (but the one that the
      measure collapses), seed, value, censored (AT_LEAST, AT_MOST or 0), status, id (several,
      separated by spaces, where an axis was collapsed). The value is NaN where there is none; the
      status tells why.

    Raises:
      UserError: no such measure, or a run that is done did not record the metric.
    """
    check(measure, axes)
    axis = measure.collapses
    left = [name for name in axes if name != axis]
    if axis is not None:
        rows = [_axis_row(group, measure, left) for group in _along(runs, left)]
    else:
        numbers = _numbers(runs, measure, computed)
        rows = [
            _row([run], left, number, run.status, measure)
            for run, number in zip(runs, numbers, strict=True)
        ]
    columns = ["arm", *left, "seed", "value", "censored", "status", "id"]
    return pd.DataFrame(rows, columns=columns)


def _numbers(
    runs: Sequence[Run], measure: Measure, computed: Mapping[str, float]
) -> Iterable[Number]:
    """The raw number of each run."""
    for run in runs:
        if run.status == "diverged" and measure.how == "steps_to":
            yield _never(run, measure, runs)
        elif run.status != "done":
            yield NONE
        elif measure.how == FUNCTION:
            yield Number(float(computed.get(run.id, math.nan)))
        else:
            yield OF_A_RUN[measure.how](run, measure)


def _never(run: Run, measure: Measure, runs: Sequence[Run]) -> Number:
    """Steps to a target for a run that diverged: those it took if it got there before, else at
    least as many as runs at its point of the axes have. Not "at least until it diverged", as if it
    had only been watched for a shorter time: it never gets there."""
    number = steps_to(run, measure)
    if not number.censored:
        return number
    done = [other for other in runs if other.status == "done"]
    peers = [other.step for other in done if other.point == run.point] or [o.step for o in done]
    return Number(float(max([run.step, *peers])), AT_LEAST)


def _along(runs: Sequence[Run], left: Sequence[str]) -> Iterable[list[Run]]:
    """The runs in groups that share the arm, the seed and the values on the axes ``left``."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        key = (run.arm, *(run.point[name] for name in left), run.seed)
        groups.setdefault(key, []).append(run)
    return groups.values()


def _axis_row(group: list[Run], measure: Measure, left: Sequence[str]) -> dict[str, Any]:
    number, status = OF_AN_AXIS[measure.how](group, measure)
    return _row(group, left, number, status, measure)


def _row(
    runs: Sequence[Run], left: Sequence[str], number: Number, status: str, measure: Measure
) -> dict[str, Any]:
    value, censored = number.value * measure.factor, number.censored
    if status == "diverged" and measure.diverged is not None:
        value, censored = measure.diverged, 0
    return {
        "arm": runs[0].arm,
        **{name: runs[0].point[name] for name in left},
        "seed": runs[0].seed,
        "value": value,
        "censored": censored,
        "status": status,
        "id": " ".join(run.id for run in runs),
    }


def compute(measures: Mapping[str, Measure], runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """What study.json keeps under "computed": {measure: {run id: raw value}} of the runs done.

    Args:
      measures: those of a study, with their functions; others than functions are passed over.
      runs: all runs of the study.

    Raises:
      UserError: a function fails, or returns something else than a number.
    """
    done = {run.id: run for run in runs if run.status == "done"}
    return {
        name: {run.id: _call(name, measure, run) for run in done.values()}
        for name, measure in measures.items()
        if measure.how == FUNCTION
    }


def _call(name: str, measure: Measure, run: Run) -> float:
    if measure.function is None:
        raise UserError(f"measure {name!r} is a function, but has none; use claims.computed(...)")
    try:
        return float(measure.function(run))
    except Exception as error:
        raise UserError(
            f"measure {name!r}: its function failed on run {run.id} with {type(error).__name__}: "
            f"{error}; correct it and run the same command again, what is done is kept"
        ) from error


# ---- Tuning


class Tuning(NamedTuple):
    """Which value of a tuned axis each arm takes.

    Attributes:
      axis: which one; measure: what it was chosen by, on validation.
      candidates: a row per arm, point of the other axes and value of the axis: arm, <other axes>,
        <axis>, mean (of those that have a value), n, diverged, lost (no value for another reason),
        chosen, edge: "lowest" or "highest" where the chosen one is an end of a numeric axis, so
        that a better one may lie beyond, else "".
    """

    axis: str
    measure: Measure
    candidates: pd.DataFrame

    @property
    def chosen(self) -> pd.DataFrame:
        """The rows of ``candidates`` that were chosen: one per arm and point of the other axes."""
        return self.candidates[self.candidates["chosen"]].reset_index(drop=True)

    def best(self, arm: str, point: Mapping[str, Any]) -> Any:
        """The value of the axis that ``arm`` takes at ``point`` (of the other axes)."""
        rows = self.chosen
        for name, value in {"arm": arm, **point}.items():
            if name != self.axis:
                rows = rows[rows[name] == value]
        if len(rows) != 1:
            raise UserError(f"arm {arm!r} at {dict(point)} has no tuned value of {self.axis!r}")
        value = rows[self.axis].iloc[0]
        return value.item() if isinstance(value, np.generic) else value


def tuning(runs: Sequence[Run], axis: str, measure: Measure, axes: Sequence[str]) -> Tuning:
    """Chooses, per arm and point of the other axes, the value at which fewest runs diverged (or
    were lost), and of those the one with the best mean of ``measure``; of equals the first.

    A run that diverged counts as such even if the measure has a value for it.

    Raises:
      UserError: a measure that cannot be had from the run alone, or that the runs did not record.
    """
    lookup(OF_A_RUN, measure.how, "kind of measure to tune by")
    frame = values(runs, measure, axes)
    others = ["arm", *(name for name in axes if name != axis)]
    # As planned, not sorted; and pandas must not drop a place for want of a value.
    grouped = frame.groupby([*others, axis], sort=False, dropna=False)
    rows = [_candidate(dict(zip([*others, axis], key, strict=True)), g) for key, g in grouped]
    candidates = pd.DataFrame(rows)
    order = pd.DataFrame(
        {
            "bad": candidates["diverged"] + candidates["lost"],
            "mean": candidates["mean"] * (-1 if measure.higher_is_better else 1),
        }
    ).fillna(math.inf)
    ranked = candidates.loc[order.sort_values(["bad", "mean"], kind="stable").index]
    first = ranked.groupby(others, sort=False, dropna=False).head(1).index
    candidates["chosen"] = candidates.index.isin(first)
    candidates["edge"] = [
        _edge(row[axis], candidates[axis].unique()) if row["chosen"] else ""
        for row in candidates.to_dict("records")
    ]
    return Tuning(axis, measure, candidates)


def _candidate(place: dict[str, Any], runs: pd.DataFrame) -> dict[str, Any]:
    diverged = runs["status"] == "diverged"
    return {
        **place,
        "mean": runs["value"].mean(),
        "n": int(runs["value"].notna().sum()),
        "diverged": int(diverged.sum()),
        "lost": int((runs["value"].isna() & ~diverged).sum()),
    }


def _edge(value: Any, tried: Sequence[Any]) -> str:
    if len(tried) < 2 or any(isinstance(other, str) for other in tried):
        return ""
    return {min(tried): "lowest", max(tried): "highest"}.get(value, "")
