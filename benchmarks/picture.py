"""One kind of picture for all parts: values with their quartiles, lying one below the other.

Drawn with the marks and the pen of the reports, so that all pictures of the project look alike.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from benchmarks.measure import Spread
from bnresearch.report.pictures import paper
from bnresearch.report.pictures.marks import Key, Mean, Panel, Picture, Rule, axis, categories, look

LINE = 12  # pixels that a value takes at least; the pen reckons with 130 to an inch


class Bars(NamedTuple):
    """A panel: ``values[group][series]``; groups lie below each other, series have colours."""

    title: str
    label: str
    values: Mapping[str, Mapping[str, Spread]]
    log: bool = False
    rule: float | None = None  # an upright line, at the value of no difference


def draw(name: str, panels: Sequence[Bars], path: Path) -> None:
    """Write the panels, side by side, as a PNG for a page."""
    names = [series for bars in panels for group in bars.values.values() for series in group]
    names = sorted(dict.fromkeys(names), key=lambda one: not one.startswith("bnresearch"))
    keys = [Key(one, one, look(i)) for i, one in enumerate(names)]
    picture = Picture(
        name=name,
        title=name,
        caption="",
        panels=tuple(_panel(bars, keys, 30 if len(panels) > 1 else 60) for bars in panels),
        keys=tuple(keys) if len(keys) > 1 else (),
        columns=min(2, len(panels)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(paper.STYLE):
        paper.paper(picture).savefig(path, dpi=130)


def _panel(bars: Bars, keys: Sequence[Key], width: int) -> Panel:
    groups = list(bars.values)[::-1]  # the first one on top
    marks: list[Mean | Rule] = [] if bars.rule is None else [Rule("x", bars.rule)]
    shown: list[object] = [] if bars.rule is None else [bars.rule]
    shown += [] if bars.log else [0.0]  # lengths are compared
    most = 1
    for key in keys:
        y, spreads = [], []
        for i, group in enumerate(groups):
            there = [one.group for one in keys if one.group in bars.values[group]]
            most = max(most, len(there))
            if key.group in there:
                y.append(i + 0.8 * (0.5 - (there.index(key.group) + 0.5) / len(there)))
                spreads.append(bars.values[group][key.group])
        middle, low, high = (
            np.array([spread[which] for spread in spreads]) for which in ("median", "low", "high")
        )
        texts = [""] * len(y)
        marks.append(Mean(key.group, key.look, middle, np.array(y), low, high, texts, "lying"))
        shown += [low, high]
    along = axis(bars.label, shown, "log" if bars.log else "linear")
    names = categories("", groups, width)
    lines = max(label.count("\n") + 1 for _, label in names.ticks or ())
    height = 90 + math.ceil(LINE * len(groups) * max(1.6 * lines, most))
    return Panel(bars.title, along, names, tuple(marks), height)
