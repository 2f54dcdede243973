"""From a claim and the values to the samples it is about, and the answers it can get.

What is special to a kind of claim is here, a function for each in KINDS.
"""

import math
from collections.abc import Callable, Mapping
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
from bnresearch.measures import Tuning
from bnresearch.verdict import samples
from bnresearch.verdict.evidence import Evidence
from bnresearch.verdict.options import Option, confined, directed, ordered
from bnresearch.verdict.samples import Rows, Sample, Side, Table
from bnresearch.verdict.wording import Names, Unit, text_of, unit_of


class Case(NamedTuple):
    """A claim with everything that is known about it before the correction."""

    claim: Claim
    text: str
    unit: Unit
    boundary: float
    options: list[Option]
    samples: list[Sample]
    at: dict[str, Any]
    same_rate: list[dict[str, Any]]

    @property
    def leading(self) -> Option:
        return min(self.options, key=lambda option: (option.p, not option.shown))


class Source:
    """Where the samples of one claim come from."""

    def __init__(self, claim: Claim, table: Table, measure: Measure, tuning: Tuning | None):
        self.claim, self.table, self.measure, self.tuning = claim, table, measure, tuning
        self.unit = unit_of(claim, measure)
        self.at: dict[str, Any] = {}

    def side(self, place: Place, at: Any = None, **point: Any) -> Side:
        where = {**self.claim.where, **point}
        at = self.claim.at if at is None else at
        return samples.side(place, where, self.table.axes, self.tuning, at)

    def rows(self, place: Place, name: str, at: Any = None) -> Rows:
        """The values of one side, on logarithms for a measure that compares by ratios."""
        side = self.side(place, at)
        if side.tuned is not None:
            self.at[name] = side.tuned
        rows = self.table.at(side)
        return {s: row.logarithm() for s, row in rows.items()} if self.measure.log else rows

    def pairs(self, treatment: Place, control: Place, at: Any = None) -> Sample:
        one = self.rows(treatment, _plain(treatment), at)
        other = self.rows(control, _plain(control), at)
        return samples.paired(one, other, self.table.seeds).oriented(self.unit.sign)

    def slopes(self, claim: Slope, place: Place) -> Rows:
        points = {}
        for value in sorted(self.table.known[claim.axis]):
            side = self.side(place, **{claim.axis: value})
            if side.tuned is not None:
                self.at[f"{_plain(place)}, {claim.axis} {words.setting(value)}"] = side.tuned
            points[value] = self.table.at(side)
        return samples.slopes(claim, points, self.table.seeds)

    def size(self, factor: float) -> float:
        """A sesoi, margin or tolerance on the scale of the samples."""
        if not self.measure.log or isinstance(self.claim, Slope):
            return factor
        return math.log(factor) if factor else 0.0

    def same_rate(self) -> list[dict[str, Any]]:
        """The effect with both sides at each value of the tuned axis."""
        claim = self.claim
        if (
            self.tuning is None
            or self.tuning.axis not in self.table.axes
            or not isinstance(claim, Difference | Equivalence)
        ):
            return []
        chosen, made = dict(self.at), []
        for value in self.table.known[self.tuning.axis]:
            evidence = _paired_evidence(claim, self.pairs(claim.treatment, claim.control, value))
            made.append({"value": value, **shown(evidence, self.unit), "p": evidence.two_sided})
        self.at = chosen
        return made


def _plain(place: Place) -> str:
    return Names({}).place(place)


def _paired_evidence(claim: Claim, sample: Sample) -> Evidence:
    if isinstance(claim, Difference):
        return Evidence(sample, True, claim.estimator, claim.interval)
    return Evidence(sample, True)


def shown(evidence: Evidence, unit: Unit) -> dict[str, Any]:
    """The effect as it was written."""
    centre = evidence.centre
    low, high = unit.ends(centre.low, centre.high)
    return {"estimate": unit.back(centre.estimate), "low": low, "high": high, "n": evidence.n}


Answers = tuple[list[Option], list[Sample], float]  # options, samples, boundary


def _difference(claim: Difference, source: Source, names: Names) -> Answers:
    sample = source.pairs(claim.treatment, claim.control)
    evidence = _paired_evidence(claim, sample)
    return directed(evidence, source.size(claim.sesoi), source.unit), [sample], claim.sesoi


def _equivalence(claim: Equivalence, source: Source, names: Names) -> Answers:
    sample = source.pairs(claim.treatment, claim.control)
    evidence = _paired_evidence(claim, sample)
    return confined(evidence, source.size(claim.margin), source.unit), [sample], claim.margin


def _value(claim: Value, source: Source, names: Names) -> Answers:
    rows = source.rows(claim.arm, _plain(claim.arm))
    sample = samples.single(rows, source.table.seeds).oriented(1, source.unit.offset)
    evidence = Evidence(sample, flips=False)
    return confined(evidence, source.size(claim.tolerance), source.unit), [sample], claim.tolerance


def _slope(claim: Slope, source: Source, names: Names) -> Answers:
    rows, seeds = source.slopes(claim, claim.arm), source.table.seeds
    if claim.control is None:
        sample = samples.single(rows, seeds)
    else:
        sample = samples.paired(rows, source.slopes(claim, claim.control), seeds)
    sample = sample.oriented(source.unit.sign, source.unit.offset)
    if claim.expected is None:
        options = directed(Evidence(sample, flips=True), claim.sesoi, source.unit)
        return options, [sample], claim.sesoi
    options = confined(Evidence(sample, flips=False), claim.tolerance, source.unit)
    return options, [sample], claim.tolerance


def _ordering(claim: Ordering, source: Source, names: Names) -> Answers:
    parts, found = {}, []
    for first, second in zip(claim.arms, claim.arms[1:], strict=False):
        sample = source.pairs(first, second)
        name = f"{names.place(first)} over {names.place(second)}"
        parts[name] = directed(Evidence(sample, True), source.size(claim.sesoi), source.unit)
        found.append(sample)
    return ordered(parts), found, claim.sesoi


KINDS: Mapping[type, Callable[[Any, Source, Names], Answers]] = {
    Difference: _difference,
    Equivalence: _equivalence,
    Value: _value,
    Slope: _slope,
    Ordering: _ordering,
}


def case_of(claim: Claim, source: Source, names: Names) -> Case:
    options, found, boundary = KINDS[type(claim)](claim, source, names)
    if source.measure.log and not isinstance(claim, Slope):
        boundary = boundary or 1.0  # no smallest effect: a factor of 1
    text = text_of(claim, source.measure, names)
    same = source.same_rate()
    return Case(claim, text, source.unit, boundary, options, found, source.at, same)
