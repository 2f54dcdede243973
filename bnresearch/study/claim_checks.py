"""Whether claims can be decided by the runs of a study: asked before the first of them."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from bnresearch.claims import (
    ALPHA,
    CLAIMS,
    Claim,
    Difference,
    Equivalence,
    Measure,
    Ordering,
    Place,
    Slope,
    Value,
)
from bnresearch.errors import UserError, lookup
from bnresearch.study.axes import Axis

SPLITS = ("train", "validation", "test")
ALONG = ("best", "area", "steps_to")  # measures of a whole curve
DIRECTIONS = ("greater", "less")
ESTIMATORS = ("mean", "iqm")
INTERVALS = ("t", "bca", "percentile")
LOGARITHMS = ("", "e", "2", "10")


class Scene(NamedTuple):
    """What claims can speak about."""

    arms: Collection[str]
    axes: Mapping[str, Axis]
    measures: Mapping[str, Measure]
    tuned: str | None  # the axis whose value is chosen on validation


def check_measure(name: str, measure: Measure, axes: Mapping[str, Axis], trains: bool) -> None:
    """UserError for a measure that these runs cannot have."""
    if measure.split not in SPLITS:
        raise UserError(
            f"measure {name!r} looks at split {measure.split!r}; choose one of: {_listed(SPLITS)}"
        )
    if not trains and (measure.how not in ("final", "function") or measure.split != "test"):
        raise UserError(
            f"measure {name!r} looks along a training, but this study measures a function: use "
            "final('name') for a number that the function returns"
        )
    if trains and measure.split == "test" and measure.how in ALONG:
        raise UserError(
            f"measure {name!r} looks along the split 'test', which is evaluated once, when a run "
            f"ends; take {measure.how}(..., split='validation'), or final()"
        )
    if measure.collapses is not None:
        _numeric_axis(axes, measure.collapses, f"measure {name!r}")


def _numeric_axis(axes: Mapping[str, Axis], name: Any, what: str) -> Axis:
    axis = lookup(axes, name, f"axis in {what}")
    if not axis.numeric:
        raise UserError(f"{what} needs numbers along axis {name!r}; its values are {axis.values}")
    return axis


def check_claim(claim: Claim, number: int, scene: Scene) -> None:
    """UserError for a claim that is about something else, or that leaves a choice open."""
    kinds = {make: kind for kind, make in CLAIMS.items()}
    if type(claim) not in kinds:
        raise UserError(
            f"claim {number} is a {type(claim).__name__}; make it with Difference, Equivalence, "
            "Value, Slope or Ordering"
        )
    who = f"claim {number} ({kinds[type(claim)]})"
    measure = lookup(scene.measures, claim.measure, f"measure in {who}")
    _check_numbers(claim, measure, who)
    _check_words(claim, who)
    if isinstance(claim, Slope):
        _check_slope(claim, measure, scene, who)
    if isinstance(claim, Difference) and claim.strata:
        _check_strata(claim, measure, scene, who)
    places = [_check_place(place, claim, measure, scene, who) for place in sides(claim)]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(f"{who} compares {place} with itself; give another arm or place")


def sides(claim: Claim) -> list[Place]:
    """The places that a claim is about."""
    if isinstance(claim, Difference | Equivalence):
        return [claim.treatment, claim.control]
    if isinstance(claim, Ordering):
        if isinstance(claim.arms, str) or len(claim.arms) < 2:
            raise UserError(f"an ordering needs a list of two or more arms, not {claim.arms!r}")
        return list(claim.arms)
    if isinstance(claim, Slope) and claim.control is not None:
        return [claim.arm, claim.control]
    return [claim.arm]


def _check_place(
    place: Place, claim: Claim, measure: Measure, scene: Scene, who: str
) -> dict[str, Any]:
    """The place with everything fixed that ``where`` fixes."""
    arm, fixed = _fixed(place, claim.where, who)
    lookup(dict.fromkeys(scene.arms), arm, f"arm in {who}")
    free = free_axes(claim, measure, scene.tuned)
    for axis, value in fixed.items():
        _check_value(axis, value, scene.axes, who)
        if axis in free:
            raise UserError(f"{who} fixes axis {axis!r}, but {free[axis]}; leave one of them out")
    for axis, entry in scene.axes.items():
        if axis not in fixed and axis not in free and len(entry.points) > 1:
            raise UserError(
                f"{who} leaves open which value of axis {axis!r} it is about; fix it with "
                f"where={{{axis!r}: ...}}, one of: {_listed(entry.values)}"
            )
    _check_tuned(claim, scene, free, who)
    return {"arm": arm, **fixed}


def _fixed(place: Place, where: Mapping[str, Any], who: str) -> tuple[str, dict[str, Any]]:
    """The arm of a place, and the value of every axis that is given."""
    given = {"arm": place} if isinstance(place, str) else place
    for part in (given, where):
        if not isinstance(part, Mapping):
            raise UserError(f"{who}: {part!r} is no place; write {{'axis': value}}")
    if "arm" not in given:
        raise UserError(f"{who}: {place} names no arm; write {{'arm': ...}} into it")
    twice = sorted(given.keys() & where.keys())
    if twice:
        raise UserError(f"{who} fixes {', '.join(twice)} twice: in `where` and for {given['arm']}")
    fixed = {**where, **given}
    return fixed.pop("arm"), fixed


def free_axes(claim: Claim, measure: Measure, tuned: str | None) -> dict[str, str]:
    """The axes that a claim must not fix, each with the reason; ``tuned`` is one of them."""
    free = {}
    if tuned is not None:
        free[tuned] = "the study tunes it: use at=..."
    axis = measure.collapses
    if axis is not None:
        free[axis] = f"measure {claim.measure!r} takes all of its values together"
    if isinstance(claim, Slope):
        free[claim.axis] = "the slope is along it"
    if isinstance(claim, Difference) and claim.strata:
        free[claim.strata] = "its values are strata: all are taken together"
    return free


def _check_value(name: str, value: Any, axes: Mapping[str, Axis], who: str) -> None:
    values = lookup(axes, name, f"axis in {who}").values
    if value not in values:
        raise UserError(
            f"{who}: axis {name!r} has no value {value!r}; choose one of: {_listed(values)}"
        )


def _check_tuned(claim: Claim, scene: Scene, free: Mapping[str, str], who: str) -> None:
    if claim.at == "best":
        _check_one_best(claim, scene, free, who)
        return
    if scene.tuned is None:
        raise UserError(f"{who} has at={claim.at!r}, but the study tunes no axis; use where=...")
    if not free[scene.tuned].startswith("the study tunes"):
        raise UserError(f"{who} has at={claim.at!r}, but {free[scene.tuned]}; leave it out")
    _check_value(scene.tuned, claim.at, scene.axes, who)


def _check_one_best(claim: Claim, scene: Scene, free: Mapping[str, str], who: str) -> None:
    """Arms are tuned at each point of the other axes: a measure of several has no best value."""
    axis, tuned = scene.measures[claim.measure].collapses, scene.tuned
    if axis is None or tuned is None or not free[tuned].startswith("the study tunes"):
        return
    if len(scene.axes[axis].points) > 1:
        raise UserError(
            f"{who}: measure {claim.measure!r} takes all values of axis {axis!r} together, but at "
            f"each of them an arm has its own best {tuned!r}; compare at a common one with at=..., "
            f"one of: {_listed(scene.axes[tuned].values)}"
        )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values))


def _check_slope(claim: Slope, measure: Measure, scene: Scene, who: str) -> None:
    axis = _numeric_axis(scene.axes, claim.axis, who)
    if claim.axis == measure.collapses:
        raise UserError(f"{who}: measure {claim.measure!r} leaves no values along {claim.axis!r}")
    if len(axis.points) < 2:
        raise UserError(f"{who} needs two or more values on axis {claim.axis!r}, there is one")
    if claim.log_x and min(axis.values) <= 0:
        raise UserError(f"{who} takes logarithms of axis {claim.axis!r}: {_listed(axis.values)}")


def _check_strata(claim: Difference, measure: Measure, scene: Scene, who: str) -> None:
    axis = lookup(scene.axes, claim.strata, f"axis in {who}")
    taken = free_axes(dataclasses.replace(claim, strata=""), measure, scene.tuned)
    if claim.strata in taken:
        raise UserError(f"{who} has strata={claim.strata!r}, but {taken[claim.strata]}")
    if len(axis.points) < 2:
        raise UserError(f"{who} needs two or more values on axis {claim.strata!r}, there is one")


def _check_words(claim: Claim, who: str) -> None:
    for field, known in (
        ("direction", DIRECTIONS),
        ("estimator", ESTIMATORS),
        ("interval", INTERVALS),
        ("log_x", LOGARITHMS),
        ("log_y", LOGARITHMS),
    ):
        given = getattr(claim, field, known[0])
        if given not in known:
            raise UserError(f"{who}: {field}={given!r}; choose one of: {_listed(known)}")
    if isinstance(claim, Difference) and claim.estimator == "iqm" and claim.interval == "t":
        raise UserError(
            f"{who}: there is no t interval of an interquartile mean; add interval='bca'"
        )


def _check_numbers(claim: Claim, measure: Measure, who: str) -> None:
    """Bounds are not negative; those of ratios are factors from 1 on."""
    ratios = measure.log and not isinstance(claim, Slope)
    for field in ("sesoi", "margin", "tolerance", "expected"):
        value = getattr(claim, field, None)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise UserError(f"{who}: {field}={value!r} is not a finite number")
        if field == "expected":
            if ratios and value <= 0:
                raise UserError(f"{who}: expected={value}, but ratios are above 0")
        elif value < 0 or (ratios and 0 < value < 1):
            least = "a factor of 1 or more, as the measure has log=True" if ratios else "0 or more"
            raise UserError(f"{who}: {field}={value}; give {least}")
    width = {Equivalence: "margin", Value: "tolerance"}.get(type(claim))
    if isinstance(claim, Slope) and claim.expected is not None:
        width = "tolerance"
    if width is not None and getattr(claim, width) <= float(ratios):
        raise UserError(
            f"{who}: {width}={getattr(claim, width)} leaves no room; give one above {int(ratios)}"
        )


def notes(claims: Sequence[Claim], seeds: int) -> list[str]:
    """What a user should know before the runs, in sentences: too few pairs for any verdict."""
    flipped = [claim for claim in claims if isinstance(claim, Difference | Ordering)]
    needed = math.ceil(math.log2(2 * len(claims) / ALPHA)) if claims else 0
    if not flipped or seeds >= needed:
        return []
    return [
        f"{seeds} seeds cannot decide a difference: with n pairs a sign-flip test knows no p below "
        f"2 / 2**n, here {2 / 2**seeds:.2g}, and Holm's correction for {len(claims)} claim(s) asks "
        f"for {ALPHA / len(claims):.2g}; {needed} seeds are the fewest that can"
    ]
