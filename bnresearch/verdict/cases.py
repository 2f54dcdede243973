"""From a claim and the values to the samples it is about, and the answers it can get.

What is special to a kind of claim is here, a function for each in KINDS.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bnresearch import words
from bnresearch.claims import (
    NOTHING,
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
from bnresearch.verdict.options import Option, confined, directed, leading, ordered
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
    pairs: list[dict[str, Any]]

    @property
    def leading(self) -> Option:
        return leading(self.options)


class Source:
    """Where the samples of one claim come from."""

    def __init__(
        self,
        claim: Claim,
        table: Table,
        measure: Measure,
        tuning: Tuning | None,
        names: Names,
    ):
        self.claim, self.table, self.measure, self.tuning = claim, table, measure, tuning
        self.names = names
        self.unit = unit_of(claim, measure)
        self.at: dict[str, Any] = {}

    def side(self, place: Place, at: Any, point: Mapping[str, Any]) -> Side:
        where = {**self.claim.where, **point}
        at = self.claim.at if at is None else at
        return samples.side(place, where, self.table.axes, self.tuning, at)

    def _found(self, place: Place, at: Any, point: Mapping[str, Any]) -> Rows:
        side = self.side(place, at, point)
        if side.tuned is not None:
            name = self.names.place(place)
            where = words.point(point, self.names.axes)
            self.at[f"{name}, {where}" if where else name] = side.tuned
        return self.table.at(side)

    def rows(self, place: Place, at: Any = None, point: Mapping[str, Any] = NOTHING) -> Rows:
        """The values of one side, on logarithms for a measure that compares by ratios."""
        rows = self._found(place, at, point)
        return {s: row.logarithm() for s, row in rows.items()} if self.measure.log else rows

    def pairs(self, treatment: Place, control: Place, at: Any = None) -> Sample:
        strata = getattr(self.claim, "strata", "")
        points = [{strata: value} for value in self.table.known[strata]] if strata else [NOTHING]
        pairs = [
            (self.rows(treatment, at, point), self.rows(control, at, point)) for point in points
        ]
        seeds = self.table.seeds
        sample = samples.pooled(pairs, seeds) if strata else samples.paired(*pairs[0], seeds)
        return sample.oriented(self.unit.sign)

    def slopes(self, claim: Slope, place: Place) -> Rows:
        values = sorted(self.table.known[claim.axis])
        points = {value: self._found(place, None, {claim.axis: value}) for value in values}
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


def _difference(claim: Difference, source: Source) -> Answers:
    sample = source.pairs(claim.treatment, claim.control)
    evidence = _paired_evidence(claim, sample)
    return directed(evidence, source.size(claim.sesoi), source.unit), [sample], claim.sesoi


def _equivalence(claim: Equivalence, source: Source) -> Answers:
    sample = source.pairs(claim.treatment, claim.control)
    evidence = _paired_evidence(claim, sample)
    return confined(evidence, source.size(claim.margin), source.unit), [sample], claim.margin


def _value(claim: Value, source: Source) -> Answers:
    rows = source.rows(claim.arm)
    sample = samples.single(rows, source.table.seeds).oriented(1, source.unit.offset)
    evidence = Evidence(sample, flips=False)
    return confined(evidence, source.size(claim.tolerance), source.unit), [sample], claim.tolerance


def _slope(claim: Slope, source: Source) -> Answers:
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


def _ordering(claim: Ordering, source: Source) -> Answers:
    parts, found = {}, []
    for pair in itertools.pairwise(claim.arms):
        sample = source.pairs(*pair)
        evidence = Evidence(sample, True)
        parts[_over(source, pair)] = directed(evidence, source.size(claim.sesoi), source.unit)
        found.append(sample)
    return ordered(parts), found, claim.sesoi


KINDS: Mapping[type, Callable[[Any, Source], Answers]] = {
    Difference: _difference,
    Equivalence: _equivalence,
    Value: _value,
    Slope: _slope,
    Ordering: _ordering,
}


def case_of(claim: Claim, source: Source) -> Case:
    options, found, boundary = KINDS[type(claim)](claim, source)
    if source.measure.log and not isinstance(claim, Slope):
        boundary = boundary or 1.0  # no smallest effect: a factor of 1
    text = text_of(claim, source.measure, source.names)
    same, pairs = source.same_rate(), _neighbours(claim, source, found)
    return Case(claim, text, source.unit, boundary, options, found, source.at, same, pairs)


def _neighbours(claim: Claim, source: Source, found: Sequence[Sample]) -> list[dict[str, Any]]:
    """The effect of every pair of an ordering."""
    if not isinstance(claim, Ordering):
        return []
    return [
        {"of": _over(source, pair), **shown(Evidence(sample, True), source.unit)}
        for pair, sample in zip(itertools.pairwise(claim.arms), found, strict=True)
    ]


def _over(source: Source, pair: tuple[Place, Place]) -> str:
    return " over ".join(map(source.names.place, pair))
