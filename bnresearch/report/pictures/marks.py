"""What a picture is made of: looks, axes, marks, panels. It says what is drawn, not with which pen.

`measured`, `curves` and `effects` turn numbers into a `Picture`, `screen` and `paper` draw it, so
that nothing is decided twice. All coordinates are in the units a reader sees; the ``scale`` of an
axis says where they lie.
"""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

# Okabe and Ito's palette, told apart with any colour vision, without its yellow and black, which
# vanish on white and on dark pages. Dashes and markers differ as well, so that grey print will do.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


@dataclasses.dataclass(frozen=True)
class Look:
    """Colour, line style and marker of one arm, the same on every picture of a study."""

    colour: str
    dash: str = "solid"
    marker: str = "circle"


def look(index: int) -> Look:
    """The look of the arm with this number; different ones for the first 84."""
    lap, turn = divmod(index, len(COLOURS))
    step = lap + turn
    return Look(COLOURS[turn], DASHES[step % len(DASHES)], MARKERS[step % len(MARKERS)])


@dataclasses.dataclass(frozen=True)
class Key:
    """A line of the legend. ``group`` is what its marks carry, so that they can be hidden."""

    group: str
    label: str
    look: Look


# ---- Axes


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a panel.

    Attributes:
      label: with the unit: "test accuracy (%)".
      scale: "linear", "log", or "stretch": for percentages that crowd below 100, -log(101 - x), on
        which 98 and 99 are as far apart as 50 and 80.
      range: both ends, in the units of the axis.
      ticks: (value, text) of each tick; None: as the pen sees fit.
    """

    label: str = ""
    scale: str = "linear"
    range: tuple[float, float] = (0.0, 1.0)
    ticks: tuple[tuple[float, str], ...] | None = None

    def place(self, values: object) -> np.ndarray:
        """Where values lie, up to a linear map; values on a log axis stay: pens know logarithms."""
        numbers = np.asarray(values, dtype=float)
        if self.scale != "stretch":
            return numbers
        return -np.log10(101 - np.clip(numbers, 0, 100))


STRETCHED = (0, 10, 20, 30, 50, 70, 80, 90, 95, 98, 99, 100)


def axis(label: str, values: Iterable[object], kind: str = "linear", percent: bool = False) -> Axis:
    """An axis that shows all finite ``values`` with a margin, and ticks where pens choose badly."""
    numbers = np.concatenate([np.zeros(0), *(np.ravel(np.asarray(v, float)) for v in values)])
    numbers = numbers[np.isfinite(numbers) & ((numbers > 0) | (kind != "log"))]
    if not numbers.size:
        return Axis(label, "linear", (0.0, 1.0))
    low, high = float(numbers.min()), float(numbers.max())
    if kind == "log":
        return _log_axis(label, low, high)
    if percent and low < 80 and high > 90:
        ends = (max(0.0, low - 4), 100.0 if high > 98 else 101 - 0.6 * (101 - high))
        plain = Axis(label, "stretch", ends)
        ticks = [tick for tick in STRETCHED if ends[0] <= tick <= ends[1]]
        return dataclasses.replace(plain, ticks=tuple(_texts(_apart(plain, ticks))))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    ends = (low - margin, high + margin)
    if percent:
        ends = (max(ends[0], min(0.0, low)), min(ends[1], max(101.0, high)))
    return Axis(label, "linear", ends)


def _apart(axis: Axis, ticks: Sequence[float]) -> list[float]:
    """Without those that would touch the next higher one."""
    room = 0.06 * float(np.ptp(axis.place(axis.range)))
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or axis.place(kept[-1]) - axis.place(tick) >= room:
            kept.append(tick)
    return kept[::-1]


def _log_axis(label: str, low: float, high: float) -> Axis:
    margin = max((high / low) ** 0.06, 1.05)
    low, high = low / margin, high * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1.0, 2.0, 5.0) if len(decades) <= 4 else (1.0,)
    every = max(1, math.ceil(len(decades) / 8))
    ticks = [s * 10.0**decade for decade in decades[::every] for s in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) < 2:  # less than a factor of two or so: powers of ten say nothing
        inside = [float(f"{x:.2g}") for x in np.geomspace(low * margin, high / margin, 3)]
        inside = sorted({x for x in inside if low <= x <= high}) or [low]
    return Axis(label, "log", (low, high), tuple(_texts(inside)))


def at_values(label: str, values: Sequence[float], log: bool) -> Axis:
    """An axis with its ticks at the values that were tried, as many as find room."""
    every = math.ceil(len(values) / 8)
    shown = values[::every]
    plain = axis(label, [values], "log" if log and min(values) > 0 else "linear")
    return dataclasses.replace(plain, ticks=tuple(_texts(shown)))


def categories(label: str, names: Sequence[str], width: int = 14) -> Axis:
    """Names at 0, 1, 2, ..."""
    ticks = tuple((float(i), wrapped(name, width, 3)) for i, name in enumerate(names))
    return Axis(label, "linear", (-0.5, len(names) - 0.5), ticks)


def _texts(values: Iterable[float]) -> Iterable[tuple[float, str]]:
    return ((float(value), f"{value:.3g}" if value < 1000 else f"{value:g}") for value in values)


def wrapped(text: str, width: int, lines: int) -> str:
    """``text`` in at most so many lines, words broken only if they are longer than a line."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) or text


# ---- Marks. `group` names the arm, or is empty.


@dataclasses.dataclass(frozen=True, eq=False)
class Thin:
    """Thin lines, one per seed, all of an arm in one array with NaN between them."""

    group: str
    look: Look
    x: np.ndarray
    y: np.ndarray
    seed: np.ndarray

    @property
    def opacity(self) -> float:
        """The more lines, the fainter, or they would hide their mean."""
        return float(np.clip(3 / (1 + np.isnan(self.x).sum()), 0.08, 0.35))


@dataclasses.dataclass(frozen=True, eq=False)
class Dots:
    """Single values; ``shape`` "dot", "open" (only a bound is known) or "ring" (around a mean)."""

    group: str
    look: Look
    x: np.ndarray
    y: np.ndarray
    texts: Sequence[str]
    shape: str = "dot"


@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
    """Means with intervals: ``draw`` "band" (line and band), "bars" (line and bars), "lying" (bars
    along x, no line) or "apart" (bars, no line)."""

    group: str
    look: Look
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    texts: Sequence[str]
    draw: str = "bars"


@dataclasses.dataclass(frozen=True)
class Zone:
    """A shaded rectangle; None reaches to the end of the panel."""

    x: tuple[float, float] | None
    y: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A line at one value of ``axis``, "x" or "y": across the panel, or between two ``ends``."""

    axis: str
    at: float
    ends: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Note:
    """Words beginning at the left edge, above the height ``y``; pens break them into lines."""

    y: float
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Heat:
    """Coloured cells: ``z`` [rows of y, columns of x] at 0, 1, 2, ...; NaN stays blank.

    ``low`` and ``high`` are the ends of the colours, the same on all panels of a picture; ``cells``
    are the words in the cells, ``texts`` those about them.
    """

    z: np.ndarray
    cells: list[list[str]]
    texts: list[list[str]]
    label: str
    low: float
    high: float


Mark = Thin | Dots | Mean | Zone | Rule | Note | Heat


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    title: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    height: int = 320  # of the interactive plot, in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """Panels that share a legend.

    Attributes:
      name: of its files: "accuracy_by_rate".
      title: a sentence fragment; caption: what one sees, in sentences.
      panels: at least one.
      keys: the legend, empty for none.
      columns: of panels on paper; a screen chooses by its width.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...] = ()
    columns: int = 2
