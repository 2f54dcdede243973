"""What a study measures and what it claims, as plain data that study.json can hold.

A measure makes one number of a run (or of all runs along one axis); a claim is a prediction about
such numbers, written down before the runs. `measures.py` computes the former, `verdict.py` decides
the latter. Both are data, so that a report can be made again from the files of a study alone.

Effects are oriented as they are written: `treatment` minus `control`, in the unit of the measure.
For a measure with ``log=True`` values are compared as ratios: the effect is treatment / control,
means are geometric, and sesoi, margins and tolerances are factors above 1 (a margin of 1.25 is
"between 1 / 1.25 and 1.25").
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin

from bnresearch.errors import UserError, lookup

SCHEMA = 1  # of study.json
ALPHA = 0.05  # how often the claims of a study may together get a verdict that is false

NOTHING: Mapping[str, Any] = MappingProxyType({})

# An arm by its name, or a place in the study: {"arm": "batch", "batch size": 2}.
Place = str | Mapping[str, Any]


# ---- Measures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a run, or of the runs along one axis; made by the functions below.

    Attributes:
      how: a key of measures.MEASURES.
      metric: a field of the run's records: "accuracy", "loss"; what a function returns, by name.
      split: "train", "validation" or "test".
      options: what ``how`` needs: {"target": 0.9}, {"axis": "rate"}.
      label: for axes and tables, without the unit: "test accuracy".
      unit: "%", "steps"; "" for none. `difference_unit` names differences ("points" for "%").
      factor: what the raw number is multiplied with; 100 makes percent.
      higher_is_better: which of two values is the better one.
      diverged: the value (after ``factor``) that stands for a run that diverged; None: it has none,
        its pair is lost, and the verdict counts it.
      log: compare by ratios.
      binary: it is 0 or 1 for each run: as a share, it gets Wilson's interval.
      function: for ``how="function"``: ``function(run: records.Run) -> float``; not part of JSON.
    """

    how: str
    metric: str = ""
    split: str = "test"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    unit: str = ""
    difference_unit: str = ""
    factor: float = 1.0
    higher_is_better: bool = True
    diverged: float | None = None
    log: bool = False
    binary: bool = False
    function: Callable[[Any], float] | None = None

    @property
    def collapses(self) -> str | None:
        """The axis that the measure turns into one number, if it does."""
        return self.options.get("axis")

    @property
    def geometric(self) -> bool:
        """Whether means of single arms are of logarithms: of ratios, and of losses, which span
        decades."""
        return self.log or self.metric in ("loss", "averaged_loss")


def _look(metric: str, split: str, given: dict[str, Any]) -> dict[str, Any]:
    """Label, unit and direction that a metric has unless a study says otherwise."""
    looks: dict[str, Any] = {"label": f"{split} {metric}".replace("averaged_", "averaged ").strip()}
    measured = metric.removeprefix("averaged_")  # of averaged weights: the same thing
    if measured in ("accuracy", "ece"):
        looks |= {"unit": "%", "difference_unit": "points", "factor": 100.0}
    if measured in ("loss", "ece"):
        looks |= {"higher_is_better": False}
    return {"metric": metric, "split": split, **looks, **given}


def final(metric: str, split: str = "test", **given: Any) -> Measure:
    """The value at the end of the run. Accuracies and calibration errors come in percent."""
    return Measure(how="final", **_look(metric, split, given))


def best(metric: str, split: str = "validation", **given: Any) -> Measure:
    """The best value along the run."""
    looks = _look(metric, split, given)
    return Measure(how="best", **looks | {"label": given.get("label", f"best {split} {metric}")})


def area(metric: str, split: str = "validation", **given: Any) -> Measure:
    """Area under the curve of ``metric`` over steps, divided by the length: its mean."""
    looks = _look(metric, split, given)
    return Measure(how="area", **looks | {"label": given.get("label", f"mean {split} {metric}")})


def steps_to(target: float, metric: str, split: str = "validation", **given: Any) -> Measure:
    """Steps until ``metric`` first reaches ``target`` (raw: accuracy 0.9, not 90).

    A run that ends, or diverges, before it got there is censored: it needed more steps than it had
    (one that diverged: it never gets there).
    """
    looks = _look(metric, split, {}) | {"factor": 1.0, "unit": "steps", "difference_unit": "steps"}
    higher = looks.get("higher_is_better", True)
    looks |= {"label": f"steps to {split} {metric} {target:g}", "higher_is_better": False}
    options = {"target": target, "rising": higher}
    return Measure(how="steps_to", **looks | {"options": options, "log": True} | given)


def largest_usable(
    axis: str, at_least: float, metric: str = "accuracy", split: str = "validation", **given: Any
) -> Measure:
    """The largest value on ``axis`` at which the run did not diverge and ``metric`` ended on the
    good side of ``at_least`` (raw). Collapses that axis: one number per arm, point and seed.

    Where even the largest value tried is usable, the number is censored (at least that much); where
    none is, it is censored from the other side (less than the smallest).
    """
    looks = _look(metric, split, {})
    rising = looks.get("higher_is_better", True)
    looks |= {"label": f"largest usable {axis}", "unit": "", "difference_unit": "", "factor": 1.0}
    options = {"axis": axis, "at_least": at_least, "rising": rising}
    looks |= {"higher_is_better": True, "options": options, "log": True}
    return Measure(how="largest_usable", **looks | given)


def computed(function: Callable[[Any], float], label: str, **given: Any) -> Measure:
    """Any function of a run: ``function(run: records.Run) -> float``. Worked out when the study
    runs and kept in study.json, so that a report needs no code."""
    return Measure(how="function", function=function, label=label, **given)


# ---- Claims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """``treatment`` is above (or below) ``control`` by more than ``sesoi``, paired by seed.

    Attributes:
      treatment, control: arms, or places with axis values that ``where`` does not give.
      measure: a key of the study's measures.
      direction: "greater" or "less".
      sesoi: smallest effect size of interest, >= 0, in the measure's unit; a factor >= 1 if log.
      where: axis values that both sides share: {"batch size": 4}.
      at: for a study that tunes an axis: "best", each side at its value chosen on validation, or a
        value of that axis, which both sides share.
      strata: an axis all of whose values are taken together: per seed their mean; for iqm, the
        interquartile mean of the differences at all of them.
      estimator: "mean", or "iqm", the interquartile mean for heavy-tailed runs.
      interval: "t" (Student), "bca" or "percentile" (bootstrap over seeds); iqm takes a bootstrap.
      text: the prediction in words; worked out if empty.
    """

    treatment: Place
    control: Place
    measure: str
    direction: str = "greater"
    sesoi: float = 0.0
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: Any = "best"
    strata: str = ""
    estimator: str = "mean"
    interval: str = "t"
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equivalence:
    """``treatment`` and ``control`` differ by less than ``margin`` (TOST, paired by seed)."""

    treatment: Place
    control: Place
    measure: str
    margin: float
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: Any = "best"
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """The mean of ``measure`` for ``arm`` is ``expected`` within ``tolerance`` (TOST)."""

    arm: Place
    measure: str
    expected: float
    tolerance: float
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: Any = "best"
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slope:
    """The least-squares slope of ``measure`` over ``axis``, one per seed.

    Either a number (``expected`` within ``tolerance``) or a ``direction`` with a ``sesoi``.

    Attributes:
      arm: whose slope; with ``control``, that of the paired difference arm - control.
      axis: a numeric axis of the study.
      log_x: "e", "2" or "10" for the logarithm of the axis values, "" for the values as they are;
      log_y: likewise for the measure; a slope with both is an exponent.
    """

    arm: Place
    axis: str
    measure: str
    control: Place | None = None
    expected: float | None = None
    tolerance: float = 0.0
    direction: str = "greater"
    sesoi: float = 0.0
    log_x: str = ""
    log_y: str = ""
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: Any = "best"
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ordering:
    """``arms`` from the largest value to the smallest, each above the next by more than ``sesoi``.

    Supported if every neighbouring difference is (so no correction among them is needed); refuted
    if one of them is the other way round.
    """

    arms: Sequence[Place]
    measure: str
    sesoi: float = 0.0
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: Any = "best"
    text: str = ""


Claim = Difference | Equivalence | Value | Slope | Ordering

CLAIMS: Mapping[str, type] = {
    "difference": Difference,
    "equivalence": Equivalence,
    "value": Value,
    "slope": Slope,
    "ordering": Ordering,
}


# ---- JSON


def to_json(thing: Measure | Claim) -> dict[str, Any]:
    """A measure or a claim as JSON values; a claim says under "kind" which one it is."""
    plain = {
        field.name: _plain(getattr(thing, field.name))
        for field in dataclasses.fields(thing)
        if field.name != "function"
    }
    kinds = {make: name for name, make in CLAIMS.items()}
    return {"kind": kinds[type(thing)], **plain} if type(thing) in kinds else plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def measure_from_json(plain: Mapping[str, Any]) -> Measure:
    """The inverse of `to_json` for a measure, without its function."""
    return _make(Measure, plain)


def claim_from_json(plain: Mapping[str, Any]) -> Claim:
    """The inverse of `to_json` for a claim."""
    rest = {key: value for key, value in plain.items() if key != "kind"}
    return _make(lookup(CLAIMS, plain.get("kind", ""), "kind of claim"), rest)


def _make(make: Any, plain: Mapping[str, Any]) -> Any:
    try:
        made = make(**plain)
    except TypeError as error:
        raise UserError(f"study.json: {error}; was it written by another version?") from error
    for field in dataclasses.fields(make):
        if not _is(getattr(made, field.name), field.type):
            raise UserError(
                f"study.json: {field.name} of a {make.__name__} is "
                f"{getattr(made, field.name)!r}; was it changed by hand?"
            )
    return made


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has the type of a field of the classes above."""
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    kind = get_origin(kind) or kind
    if kind is Sequence and isinstance(value, str):
        return False
    return isinstance(value, int | float if kind is float else kind)
