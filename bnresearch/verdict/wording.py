"""Claims and effects in words, and in the unit in which they were written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bnresearch import words
from bnresearch.claims import (
    Claim,
    Difference,
    Equivalence,
    Measure,
    Ordering,
    Place,
    Slope,
    Value,
)

LOGARITHM = {"": "{}", "e": "ln {}", "2": "log2 {}", "10": "log10 {}"}
PER = {"": "per unit", "e": "per factor of e", "2": "per doubling", "10": "per factor of 10"}
SINGULAR = {"points": "point", "steps": "step"}  # units that the lab itself gives


def written(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _of_one(value: float, unit: str) -> str:
    """The unit after this number."""
    first, *rest = unit.split(" ")
    return " ".join([SINGULAR.get(first, first), *rest]) if abs(value) == 1 else unit


class Unit(NamedTuple):
    """How a number of the analysis is shown: that is oriented, on logarithms, without an offset.

    Attributes:
      name: the unit's; sign: -1 if the claim's direction is downwards.
      log: shown as a ratio, exp of it.
      offset: what was subtracted: the expected value.
      absolute: a value and not a difference: has no sign in front, and its ratio is no ratio.
    """

    name: str = ""
    sign: int = 1
    log: bool = False
    offset: float = 0.0
    absolute: bool = False

    def back(self, value: float) -> float:
        value = self.sign * value + self.offset
        if not self.log:
            return value
        return math.exp(value) if value < 700 else math.inf

    def ends(self, low: float, high: float) -> tuple[float, float]:
        first, last = (low, high) if self.sign > 0 else (high, low)
        return self.back(first), self.back(last)

    def bound(self, value: float) -> str:
        """A limit, with the digits it was written with; a difference with its sign."""
        shown = self.back(value)
        plain = self.log or self.absolute or shown == 0
        return written(shown) if plain else f"{shown:+.6g}".replace("-", "−")

    def place(self, value: float) -> str:
        """A bound, in words."""
        if self.log and not self.absolute:
            return f"a ratio of {self.bound(value)}"
        return words.with_unit(self.bound(value), _of_one(self.back(value), self.name))

    def above(self, bound: float) -> str:
        return f"{'above' if self.sign > 0 else 'below'} {self.place(bound)}"

    def below(self, bound: float) -> str:
        return f"{'below' if self.sign > 0 else 'above'} {self.place(bound)}"

    def listed(self, bounds: Sequence[float]) -> str:
        """Bounds, the smallest first."""
        if len(bounds) == 1:
            return self.place(bounds[0])
        shown = " and ".join(self.bound(bound) for bound in sorted(bounds, key=self.back))
        if self.log and not self.absolute:
            return f"ratios of {shown}"
        return words.with_unit(shown, self.name)

    def within(self, margin: float) -> str:
        low, high = (self.bound(self.sign * end) for end in (-margin, margin))
        return f"between {low} and {high} {self.name}".rstrip()


def unit_of(claim: Claim, measure: Measure) -> Unit:
    """How the effects of a claim are shown."""
    sign = -1 if getattr(claim, "direction", "greater") == "less" else 1
    if isinstance(claim, Slope):
        name = _slope_unit(claim, measure)
        if claim.expected is not None:
            return Unit(name, offset=claim.expected, absolute=True)
        return Unit(name, sign)
    if isinstance(claim, Value):
        offset = math.log(claim.expected) if measure.log else claim.expected
        return Unit(measure.unit, 1, measure.log, offset, absolute=True)
    name = "times" if measure.log else measure.difference_unit or measure.unit
    return Unit(name, sign, measure.log)


def _slope_unit(claim: Slope, measure: Measure) -> str:
    if claim.log_y or measure.log:
        return ""
    return f"{measure.difference_unit or measure.unit} {PER[claim.log_x]}".lstrip()


# ---- Claims


class Names(NamedTuple):
    """What arms and axes are called (by their names where nothing is given), and the axis that is
    tuned ("" for none)."""

    arms: Mapping[str, str]
    axes: Mapping[str, str]
    tuned: str = ""

    def axis(self, name: str) -> str:
        return self.axes.get(name) or name

    def place(self, place: Place) -> str:
        if isinstance(place, str):
            return self.arms.get(place) or place
        rest = {axis: value for axis, value in place.items() if axis != "arm"}
        arm = self.arms.get(place["arm"]) or place["arm"]
        return f"{arm} ({words.point(rest, self.axes)})" if rest else arm


def text_of(claim: Claim, measure: Measure, names: Names) -> str:
    """The prediction in words: the study's own, else made from the claim."""
    return claim.text or TEXTS[type(claim)](claim, measure, names) + _where(claim, measure, names)


def _where(claim: Claim, measure: Measure, names: Names) -> str:
    parts = [f"at {words.point(claim.where, names.axes)}"] if claim.where else []
    strata = getattr(claim, "strata", "")
    if strata:
        parts.append(f"over every {names.axis(strata)}")
    taken_together = (measure.options.get("axis"), getattr(claim, "axis", None))
    if names.tuned and names.tuned not in taken_together:
        tuned = names.axis(names.tuned)
        best = f"at the best {tuned}" + (" of each" if _sides(claim) > 1 else "")
        parts.append(best if claim.at == "best" else f"at {tuned} {words.setting(claim.at)}")
    return "".join(f", {part}" for part in parts)


def _sides(claim: Claim) -> int:
    if isinstance(claim, Slope):
        return 1 + (claim.control is not None)
    return 1 if isinstance(claim, Value) else 2


def _size(value: float, measure: Measure, unit: str) -> str:
    if measure.log:
        return f"a factor of {written(value)}"
    return words.with_unit(written(value), _of_one(value, unit))


def _by_more(claim: Any, measure: Measure) -> str:
    if claim.sesoi <= float(measure.log):
        return ""
    return f" by more than {_size(claim.sesoi, measure, measure.difference_unit or measure.unit)}"


def _difference(claim: Difference, measure: Measure, names: Names) -> str:
    treatment, control = names.place(claim.treatment), names.place(claim.control)
    side = "above" if claim.direction == "greater" else "below"
    return f"{treatment} is {side} {control} in {measure.label}{_by_more(claim, measure)}"


def _equivalence(claim: Equivalence, measure: Measure, names: Names) -> str:
    treatment, control = names.place(claim.treatment), names.place(claim.control)
    margin = _size(claim.margin, measure, measure.difference_unit or measure.unit)
    return f"{treatment} and {control} differ by less than {margin} in {measure.label}"


def _value(claim: Value, measure: Measure, names: Names) -> str:
    expected = f"{written(claim.expected)} {measure.unit}".rstrip()
    tolerance = _size(claim.tolerance, measure, measure.difference_unit or measure.unit)
    arm = names.place(claim.arm)
    return f"the {measure.label} of {arm} is {expected}, within {tolerance}"


def _slope(claim: Slope, measure: Measure, names: Names) -> str:
    y = LOGARITHM[claim.log_y].format(measure.label)
    x = LOGARITHM[claim.log_x].format(names.axis(claim.axis))
    arm = names.place(claim.arm)
    if claim.control is not None:
        arm = f"{arm} minus {names.place(claim.control)}"
    if claim.expected is not None:
        number, off = written(claim.expected), written(claim.tolerance)
        return f"the slope of {y} over {x} is {number} for {arm}, within {off}"
    side = "above" if claim.direction == "greater" else "below"
    bound = claim.sesoi if claim.direction == "greater" else -claim.sesoi
    return f"the slope of {y} over {x} is {side} {written(bound)} for {arm}"


def _ordering(claim: Ordering, measure: Measure, names: Names) -> str:
    chain = " above ".join(names.place(arm) for arm in claim.arms)
    more = _by_more(claim, measure)
    return f"{chain} in {measure.label}" + (f", each{more}" if more else "")


TEXTS: Mapping[type, Any] = {
    Difference: _difference,
    Equivalence: _equivalence,
    Value: _value,
    Slope: _slope,
    Ordering: _ordering,
}
