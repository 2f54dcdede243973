"""The effects that claims are about: estimate, interval, every seed, and what counts as too small.

`effect` reads a verdict of study.json once, for the pictures and for the little strips on a page.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnresearch import words
from bnresearch.report.pictures.design import Design
from bnresearch.report.pictures.marks import (
    Axis,
    Dots,
    Look,
    Mark,
    Mean,
    Note,
    Panel,
    Picture,
    Rule,
    Zone,
    axis,
    categories,
    wrapped,
)

# Told apart by marker and word as well.
LOOKS: Mapping[str, Look] = {
    "supported": Look("#009E73", "solid", "circle"),
    "refuted": Look("#D55E00", "solid", "cross"),
    "inconclusive": Look("#8A8A8A", "solid", "diamond"),
}
ROW = 84  # pixels of a claim in the effect plot
PLAIN = Look("#0072B2", "solid", "circle")


class Effect(NamedTuple):
    """What a verdict rests on. Everything in ``unit``; as ratios, around 1, if ``log``."""

    label: str
    verdict: str
    estimate: float
    low: float
    high: float
    null: float
    small: tuple[float, float] | None  # within it, an effect counts as none (or a value as right)
    seeds: Mapping[str, float]
    unit: str
    log: bool

    @property
    def group(self) -> tuple[str, bool, float]:
        """Effects that can share an axis."""
        return self.unit, self.log, self.null

    @property
    def axis_label(self) -> str:
        if self.log:
            return f"ratio ({self.unit})" if self.unit not in ("", "×", "times") else "ratio"
        return f"effect ({self.unit})" if self.unit else "effect"


def effects(verdicts: Iterable[Mapping[str, Any]], measures: Mapping[str, Any]) -> list[Effect]:
    """The verdicts that have a number to show, numbered by their claims."""
    found = []
    for number, verdict in enumerate(verdicts, start=1):
        made = effect(verdict, measures, f"{number}. {verdict['text']}")
        if made is not None:
            found.append(made)
    return found


def effect(
    verdict: Mapping[str, Any], measures: Mapping[str, Any], label: str = ""
) -> Effect | None:
    """None for a verdict without an estimate."""
    estimate, null = _float(verdict["estimate"]), _float(verdict["null"])
    if not math.isfinite(estimate):
        return None
    claim = verdict["claim"]
    by_ratio = claim["kind"] != "slope" and bool(measures[claim["measure"]].get("log"))
    log = bool(verdict.get("log", by_ratio))
    null = (1.0 if log else 0.0) if math.isnan(null) else null
    seeds = {str(seed): _float(value) for seed, value in (verdict["points"] or {}).items()}
    return Effect(
        label,
        verdict["verdict"],
        estimate,
        _float(verdict["low"]),
        _float(verdict["high"]),
        null,
        _small(null, _float(verdict["boundary"]), log),
        {seed: value for seed, value in seeds.items() if math.isfinite(value)},
        verdict["unit"],
        log,
    )


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _small(null: float, boundary: float, log: bool) -> tuple[float, float] | None:
    """The boundary is a factor for ratios, else a distance from ``null``."""
    if log:
        return (null / boundary, null * boundary) if boundary > 1 else None
    return (null - boundary, null + boundary) if boundary > 0 else None


# ---- Pictures


def effect_plot(found: Sequence[Effect]) -> Picture | None:
    """A row per claim, and a panel per unit; None if no claim has a number."""
    if not found:
        return None
    groups: dict[tuple[str, bool, float], list[Effect]] = {}
    for one in found:
        groups.setdefault(one.group, []).append(one)
    panels = tuple(_effect_panel(group) for group in groups.values())
    caption = (
        "A row per claim: the large mark is the estimate, the bar its 95 % interval, the small "
        "dots below are single seeds. The line stands where there is no effect, or at the expected "
        "value. Shaded: too close to it to matter, as written down before the runs."
    )
    return Picture("effects", "Every claim and its effect", caption, panels, columns=1)


def _effect_panel(group: Sequence[Effect]) -> Panel:
    marks: list[Mark] = []
    x = _effect_axis(group)
    for row, one in enumerate(group):
        marks += _effect_row(one, -float(row), x)
    y = Axis("", "linear", (0.5 - len(group), 0.75), ())
    return Panel("", x, y, tuple(marks), ROW * len(group) + 70)


def _effect_axis(group: Sequence[Effect]) -> Axis:
    shown = [_visible(one) for one in group]
    return axis(group[0].axis_label, shown, "log" if group[0].log else "linear")


def _visible(one: Effect) -> list[float]:
    """What the axis has to show: seeds, interval, null, and the shaded part."""
    return [one.estimate, one.low, one.high, one.null, *(one.small or ()), *one.seeds.values()]


def _effect_row(one: Effect, y: float, x: Axis) -> list[Mark]:
    look, place = LOOKS[one.verdict], np.array([y])
    low, high = (_to_the_edge(np.array([end]), x) for end in (one.low, one.high))
    text = f"{one.label}\n{one.verdict}: {', '.join(in_words(one))}"
    below = np.full(len(one.seeds), y - 0.24)
    seeds = np.array(list(one.seeds.values()), float)
    texts = [f"seed {seed}: {words.number(value)}" for seed, value in one.seeds.items()]
    height = (y - 0.34, y + 0.16)
    marks: list[Mark] = [Zone(one.small, height)] if one.small else []
    marks.append(Rule("x", one.null, height))
    marks.append(Note(y + 0.22, one.label))
    marks.append(Dots("", look, seeds, below, texts))
    marks.append(Mean("", look, np.array([one.estimate]), place, low, high, [text], "lying"))
    return marks


def _to_the_edge(ends: np.ndarray, axis: Axis) -> np.ndarray:
    """Open ends of intervals, which are infinite (or, of a ratio, 0), as far as one can see."""
    return np.clip(ends, *axis.range)


def in_words(one: Effect) -> tuple[str, str]:
    """("+2.3 points", "95 % interval +1.9 to +2.7")."""
    sign = not one.log and one.null == 0
    estimate, low, high = words.together([one.estimate, one.low, one.high], sign)
    return words.with_unit(estimate, one.unit), f"95 % interval {low} to {high}"


def same_rate(
    design: Design, verdicts: Sequence[Mapping[str, Any]], measures: Mapping[str, Any]
) -> Picture | None:
    """The effect at every value of the tuned axis, both sides at the same one, beside the effect
    with each side at its chosen value; a panel for each claim that has both."""
    panels = []
    for number, verdict in enumerate(verdicts if design.tuned else (), start=1):
        chosen = effect(verdict, measures, f"{number}. {verdict['text']}")
        if chosen is not None and verdict["same_rate"]:
            panels.append(_same_panel(design, chosen, verdict["same_rate"]))
    if not panels:
        return None
    name = design.label(design.tuned)
    caption = (
        f"The effect if both sides have the same {name}, at every {name} that was tried, and (at "
        f"the right) with each side at the {name} chosen for it on validation. Bars are 95 % "
        "intervals, not adjusted for looking at several; shaded: too small to matter."
    )
    title = f"Same {name}, and best {name} of each"
    return Picture("same_and_best", title, caption, tuple(panels))


def _same_panel(design: Design, chosen: Effect, rows: Sequence[Mapping[str, Any]]) -> Panel:
    table = [(words.setting(row["value"]), row) for row in rows]
    best = {name: getattr(chosen, name) for name in ("estimate", "low", "high")}
    names = [*(name for name, _ in table), "each at its best"]
    shown = [*(row for _, row in table), best]
    estimate, low, high = (
        np.array([_float(row[name]) for row in shown]) for name in ("estimate", "low", "high")
    )
    texts = [
        f"{name}: {', '.join(in_words(chosen._replace(estimate=e, low=lo, high=hi)))}"
        for name, e, lo, hi in zip(names, estimate, low, high, strict=True)
    ]
    scale = "log" if chosen.log else "linear"
    y = axis(chosen.axis_label, [estimate, low, high, [chosen.null]], scale)
    marks: list[Mark] = [Zone(None, chosen.small)] if chosen.small else []
    marks.append(Rule("y", chosen.null))
    at = np.arange(len(names), dtype=float)
    for part, look in ((at < len(names) - 1, PLAIN), (at == len(names) - 1, LOOKS[chosen.verdict])):
        kept = [text for text, mine in zip(texts, part, strict=True) if mine]
        ends = _to_the_edge(low[part], y), _to_the_edge(high[part], y)
        marks.append(Mean("", look, at[part], estimate[part], *ends, kept, "apart"))
    title = wrapped(chosen.label, 70, 2)
    return Panel(title, categories(design.label(design.tuned), names, 9), y, tuple(marks))


# ---- A strip in the text


class Strip(NamedTuple):
    """An effect in percent of a strip's width, for a page that draws it with boxes."""

    null: float
    estimate: float
    low: float
    high: float
    small: tuple[float, float] | None
    seeds: list[float]


def strip(one: Effect) -> Strip:
    """Places on a common line; an interval that is missing has no width."""
    line = _effect_axis([one])

    def place(value: float) -> float:
        seen = min(max(value, line.range[0]), line.range[1])
        at, first, last = (math.log(v) if line.scale == "log" else v for v in (seen, *line.range))
        return 100 * (at - first) / (last - first)

    low, high = (one.estimate if math.isnan(end) else end for end in (one.low, one.high))
    small = (place(one.small[0]), place(one.small[1])) if one.small else None
    seeds = [place(value) for value in one.seeds.values()]
    return Strip(place(one.null), place(one.estimate), place(low), place(high), small, seeds)
