"""The axes of a study: which values are tried, and what each of them changes in the config.

Made by `grid`, `log_range`, `zipped`, `random` and `settings`; a study crosses its axes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnresearch.errors import UserError

Value = float | int | str


class Point(NamedTuple):
    """One value of an axis: what it is called in tables and claims, and the overrides it means."""

    value: Value
    overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Axis:
    """The values of an axis, in the order in which they are shown.

    Attributes:
      points: at least one, no two with equal values.
      label: for plots and tables; the name of the axis if empty.
      log: plots have this axis logarithmic.
    """

    points: tuple[Point, ...]
    label: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        if not self.points:
            raise UserError(f"axis {self.label!r} has no values; give at least one")
        known = set[Value]()
        for value in self.values:
            if not _is_name(value):
                raise UserError(
                    f"axis value {value!r} is neither a number nor a string; name such values with "
                    "settings({'name': {'key': value}})"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"axis value {value} is not a finite number")
            if value in known:
                raise UserError(f"axis value {value!r} is there more than once; leave one of them")
            known.add(value)
        for key in self.keys:
            if not isinstance(key, str):
                raise UserError(f"axis key {key!r} is no config key; write it in quotes")
        if self.log and not (self.numeric and min(self.values) > 0):
            raise UserError(f"axis values {self.values} cannot be logarithmic; drop log=True")

    @property
    def values(self) -> list[Any]:
        return [point.value for point in self.points]

    @property
    def keys(self) -> list[str]:
        """What the points override, each key once, in order."""
        return list(dict.fromkeys(key for point in self.points for key in point.overrides))

    @property
    def numeric(self) -> bool:
        return not any(isinstance(value, str) for value in self.values)


def grid(key: str, values: Sequence[Any], label: str = "", *, log: bool = False) -> Axis:
    """The values of one config key as they are listed."""
    points = tuple(Point(_plain(value), {key: _plain(value)}) for value in values)
    return Axis(points, label, log)


def log_range(key: str, low: float, high: float, n: int, label: str = "") -> Axis:
    """``n`` values from ``low`` to ``high`` at equal ratios, rounded to four digits."""
    if not 0 < low < high or n < 2:
        raise UserError(
            f"log_range({key!r}, {low}, {high}, {n}) needs 0 < low < high and at least 2 values"
        )
    return grid(key, [_rounded(value) for value in np.geomspace(low, high, n)], label, log=True)


def zipped(
    values: Mapping[str, Sequence[Any]],
    label: str = "",
    *,
    names: Sequence[Value] | None = None,
    log: bool = False,
) -> Axis:
    """Several keys that change together: ``{"data.batch_size": [8, 32], "optim.learning_rate":
    [0.1, 0.4]}`` has two points. They are called by the values of the first key, or ``names``."""
    columns = {key: [_plain(value) for value in column] for key, column in values.items()}
    lengths = {key: len(column) for key, column in columns.items()}
    if names is not None:
        lengths["names"] = len(names)
    if len(set(lengths.values())) != 1:
        raise UserError(f"zipped() needs equally many values of every key; there are {lengths}")
    called = names if names is not None else next(iter(columns.values()))
    rows = zip(*columns.values(), strict=True)
    settings = [dict(zip(columns, row, strict=True)) for row in rows]
    return Axis(tuple(map(Point, map(_plain, called), settings)), label, log)


def settings(values: Mapping[str, Mapping[str, Any]], label: str = "") -> Axis:
    """Named points of any keys: ``{"mlp": {"model.name": "mlp"}, "conv": {...}}``."""
    return Axis(tuple(Point(name, dict(given)) for name, given in values.items()), label)


Distribution = Callable[[np.random.Generator], Any]


def uniform(low: float, high: float) -> Distribution:
    """Uniform in ``[low, high)``."""
    return lambda generator: _rounded(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Its logarithm is uniform: every ratio is as likely anywhere between ``low`` and ``high``."""
    if not 0 < low < high:
        raise UserError(f"log_uniform({low}, {high}) needs 0 < low < high")
    return lambda generator: _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))


def choice(values: Sequence[Any]) -> Distribution:
    """One of ``values``, all equally likely."""
    return lambda generator: values[int(generator.integers(len(values)))]


def random(values: Mapping[str, Distribution], n: int, label: str = "", *, seed: int = 0) -> Axis:
    """``n`` random settings of the keys, the same ones for all arms.

    More of them begin with the same ones. The points of one key are called by its values if these
    are all different, those of several keys by their number, from 0.
    """
    generator = np.random.default_rng(seed)
    drawn = [{key: _plain(draw(generator)) for key, draw in values.items()} for _ in range(n)]
    called: Sequence[Any] = range(n)
    if len(values) == 1:
        called = [next(iter(given.values())) for given in drawn]
        if not all(map(_is_name, called)):
            raise UserError(
                f"random() calls the points of one key by its values, which {called[0]!r} cannot "
                "be; use settings({'name': {'key': value}})"
            )
        if len(set(called)) < n:
            raise UserError(
                f"random() draws the same value of {next(iter(values))!r} more than once; draw "
                "fewer, or list the values with grid()"
            )
    return Axis(tuple(map(Point, called, drawn)), label)


def _is_name(value: Any) -> bool:
    """Whether a point can be called by it in tables and claims."""
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _rounded(value: float) -> float:
    """Four digits: so that a claim can name the value, and the table reads."""
    return float(f"{value:.4g}")


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, which JSON and configs take."""
    return value.item() if isinstance(value, np.generic) else value
