"""What a study file is made of (`Study`, `Arm`, `Scale`, `Tune`), and what a scale makes of it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bnresearch.claims import Claim, Measure
from bnresearch.errors import UserError, lookup
from bnresearch.study.axes import Axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the settings that are compared.

    Attributes:
      overrides: config keys (of a function: arguments) and their values.
      label: for tables and plots; the arm's name if empty.
      first_seed: the seed of its first run. Arms are paired by the number of their runs, so that
        two arms with the same overrides and different seeds are a null study.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    first_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of a study is run.

    Attributes:
      seeds: runs per arm and point.
      overrides: of every run, such as a shorter training.
      axes: these stand for the study's axes of the same names.
      arms: the names of those that run; None: all.
    """

    seeds: int
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Axis] = dataclasses.field(default_factory=dict)
    arms: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class Tune:
    """Each arm takes its own best value of ``axis``: fewest diverged runs, then the best mean of
    ``measure`` over the seeds, which looks at the validation split (None: the study's first
    measure's metric at the end of the run)."""

    axis: str
    measure: Measure | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a study file returns.

    Attributes:
      question: in one sentence.
      source: where the claim comes from: a paper, an issue, a theory.
      prediction: what should come out, in words, written before the runs.
      base: the config file that arms and axes change, relative to the study file; or else
      function: ``function(seed=..., **settings) -> {"name": number}``, where nothing is
        trained.
      overrides: of every run, before those of the scale, the arm and the axes.
      arms: name -> overrides or Arm.
      axes: name -> Axis; they are crossed.
      tune: the axis that each arm chooses its own value of.
      measures: name -> Measure; the first is the study's headline.
      claims: predictions about the measures; verdicts come in this order.
      scales: "smoke" (seconds; shows that it runs, gives no verdict), "quick" and "full".
    """

    question: str
    source: str
    prediction: str
    arms: Mapping[str, Arm | Mapping[str, Any]]
    measures: Mapping[str, Measure]
    scales: Mapping[str, Scale]
    base: str | None = None
    function: Callable[..., Mapping[str, float]] | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Axis] = dataclasses.field(default_factory=dict)
    tune: Tune | None = None
    claims: Sequence[Claim] = ()


Cell = tuple[str, tuple[Any, ...]]  # an arm, and a value of every axis


class Extent(NamedTuple):
    """A study at one scale: its arms, axes, pairs, and what all runs override."""

    arms: dict[str, Arm]
    axes: dict[str, Axis]
    seeds: range
    overrides: dict[str, Any]

    @property
    def size(self) -> int:
        lengths = [len(axis.points) for axis in self.axes.values()]
        return len(self.arms) * len(self.seeds) * math.prod(lengths)

    def cells(self) -> Iterator[tuple[Cell, list[Mapping[str, Any]]]]:
        """Every cell, with the overrides of its arm and of its value on each axis."""
        points = list(itertools.product(*(axis.points for axis in self.axes.values())))
        for name, arm in self.arms.items():
            for point in points:
                cell = name, tuple(entry.value for entry in point)
                yield cell, [arm.overrides, *(entry.overrides for entry in point)]


def at_scale(study: Study, scale: str, seeds: int | None = None) -> Extent:
    chosen = lookup(study.scales, scale, "scale")
    number = chosen.seeds if seeds is None else seeds
    if type(number) is not int or number < 1:
        raise UserError(f"seeds={number!r} at scale {scale}: give a number of 1 or more")
    arms = {name: _arm(name, arm) for name, arm in study.arms.items()}
    if chosen.arms is not None:
        arms = {name: lookup(arms, name, f"arm in scale {scale}") for name in chosen.arms}
    for name in chosen.axes:
        lookup(study.axes, name, f"axis in scale {scale}")
    # One device per run: a sweep has better use for the others.
    first = {"parallel.devices": 1} if study.base else {}
    overrides = {**first, **study.overrides, **chosen.overrides}
    return Extent(arms, {**study.axes, **chosen.axes}, range(number), overrides)


def _arm(name: str, given: Arm | Mapping[str, Any]) -> Arm:
    arm = given if isinstance(given, Arm) else Arm(overrides=given)
    return dataclasses.replace(arm, label=arm.label or name)
