"""Measures along the axes of a study, arm by arm, and as heat maps.

Every picture shows every seed, and means with 95 % intervals over the seeds (`verdict.cells`:
geometric for ratios, a median where only a bound is known of some).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bnresearch import words
from bnresearch.claims import measure_from_json
from bnresearch.report.pictures.design import (
    Design,
    axis_label,
    file_name,
    interval_text,
    keys_of,
    notes,
    omitted,
    rows_at,
    split,
    upper_first,
    value_axis,
)
from bnresearch.report.pictures.marks import (
    Axis,
    Dots,
    Heat,
    Mark,
    Mean,
    Panel,
    Picture,
    at_values,
    categories,
)
from bnresearch.verdict import cells
from bnresearch.verdict.estimate import wilson

CELLS = 150  # of a heat map that still carry numbers


def measured(
    design: Design, name: str, measure: Mapping[str, Any], values: pd.DataFrame
) -> list[Picture]:
    """All pictures of one measure: along each axis, per arm if there is none, and as a heat map.

    Args:
      values: a row per run (or per group of runs): arm, axes, seed, value, and maybe censored.
    """
    varied = design.varied(values)
    free = [axis_name for axis_name in varied if axis_name != design.tuned]
    fixed = design.at_chosen(values)
    pictures = [along(design, name, measure, fixed, one, free) for one in free if len(fixed)]
    if not free and len(fixed):
        pictures.append(per_arm(design, name, measure, fixed))
    if design.tuned in varied:
        pictures.append(along(design, name, measure, values, design.tuned, free))
    if len(varied) >= 2:
        pictures.append(heat(design, name, measure, values, varied))
    return pictures


# ---- Measures along an axis


def along(
    design: Design,
    name: str,
    measure: Mapping[str, Any],
    values: pd.DataFrame,
    x: str,
    others: Sequence[str] = (),
    rings: pd.DataFrame | None = None,
) -> Picture:
    """``measure`` against the axis ``x``, a panel for each place on the ``others``.

    ``rings`` marks the means at chosen values: a frame like `Design.chosen`.
    """
    others = [other for other in others if other != x]
    shown = values[values["value"].notna()]
    means = cells(shown, measure_from_json(measure), ["arm", *others, x])
    y = value_axis(measure, shown, means)
    panels, left_out = split(design, means, others)
    made = []
    for title, place, part in panels:
        marks = _lines(design, measure, x, y, rows_at(shown, place), part)
        if rings is not None:
            marks += _rings(design, x, part, rings)
        made.append(Panel(title, _setting_axis(design, x, values), y, tuple(marks)))
    caption = (
        "Lines and bars are means over seeds with 95 % intervals; each small dot is one seed."
        + notes(measure, y, shown, left_out)
    )
    if rings is not None:
        caption += f" A ring marks the {design.label(x)} that was chosen for an arm."
    if design.tuned in values and x != design.tuned and design.chosen is not None:
        caption += f" Each arm at the {design.label(design.tuned)} chosen for it on validation."
    title = f"{upper_first(measure['label'])} against {design.label(x)}"
    return Picture(file_name(name, "by", x), title, caption, tuple(made), keys_of(design, shown))


def diverged(design: Design, values: pd.DataFrame, x: str, others: Sequence[str]) -> Picture:
    """The share of runs that diverged against ``x``, with 95 % Wilson intervals.

    Args:
      values: arm, axes, seed, status; a row per run.
    """
    others = [other for other in others if other != x]
    shares = _shares(values, ["arm", *others, x])
    y = Axis("runs that diverged (%)", "linear", (-5.0, 105.0))
    panels, left_out = split(design, shares, others)
    made = []
    for title, _, part in panels:
        arms = [arm for arm in design.keys if arm in set(part["arm"])]
        marks: list[Mark] = []
        for index, arm in enumerate(arms):
            mine = part[part["arm"] == arm]
            at = _shift(design, x, index, len(arms))(mine[x])
            order = np.argsort(at)
            draw = "bars" if _numeric(design, x) else "apart"
            marks.append(_mean(design, "%", arm, at[order], y, mine.iloc[order], draw, x))
        made.append(Panel(title, _setting_axis(design, x, values), y, tuple(marks)))
    caption = f"Runs whose numbers were no longer finite, with 95 % intervals.{omitted(left_out)}"
    title = f"Runs that diverged against {design.label(x)}"
    return Picture(
        file_name("diverged", "by", x), title, caption, tuple(made), keys_of(design, values)
    )


def _shares(values: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Like `means_of`, for percentages of runs that diverged."""
    ended = values[values["status"].isin(["done", "diverged"])]
    gone = ended["status"].eq("diverged").groupby([ended[name] for name in by], sort=False)
    table = gone.agg(["sum", "size"]).reset_index()
    found = [
        100 * np.array(wilson(k, n)[:3]) for k, n in zip(table["sum"], table["size"], strict=True)
    ]
    ends = dict(zip(("mean", "low", "high"), np.array(found).reshape(-1, 3).T, strict=True))
    return table[by].assign(**ends, kind="wilson", n=table["size"])


def per_arm(design: Design, name: str, measure: Mapping[str, Any], values: pd.DataFrame) -> Picture:
    """``measure`` of each arm, for studies whose arms differ in nothing else."""
    shown = values[values["value"].notna()]
    means = cells(shown, measure_from_json(measure), ["arm"])
    arms = [arm for arm in design.keys if arm in set(shown["arm"])]
    y = value_axis(measure, shown, means)
    marks: list[Mark] = []
    for place, arm in enumerate(arms):
        mine, mean = shown[shown["arm"] == arm], means[means["arm"] == arm]
        wobble = place + 0.25 * (np.arange(len(mine)) % 5 - 2) / 2  # so that equal seeds show
        marks += _dots(design, measure, arm, wobble, mine)
        marks.append(_mean(design, measure["unit"], arm, [float(place)], y, mean, "apart"))
    labels = [design.keys[arm].label for arm in arms]
    caption = "Large marks are means over seeds with 95 % intervals; each small dot is one seed."
    if design.chosen is not None and design.tuned in values:
        caption += f" Each arm at the {design.label(design.tuned)} chosen for it on validation."
    caption += notes(measure, y, shown, 0)
    panel = Panel("", categories("", labels), y, tuple(marks))
    return Picture(
        file_name(name, "by arm"), upper_first(measure["label"]), caption, (panel,), columns=1
    )


def _lines(
    design: Design,
    measure: Mapping[str, Any],
    x: str,
    y: Axis,
    values: pd.DataFrame,
    means: pd.DataFrame,
) -> list[Mark]:
    """Seeds and means of every arm, side by side where they share a value of ``x``."""
    arms = [arm for arm in design.keys if arm in set(values["arm"])]
    marks: list[Mark] = []
    for index, arm in enumerate(arms):
        mine = values[values["arm"] == arm]
        mean = means[means["arm"] == arm]
        shift = _shift(design, x, index, len(arms))
        marks += _dots(design, measure, arm, shift(mine[x]), mine)
        at = shift(mean[x])
        order = np.argsort(at)
        draw = "bars" if _numeric(design, x) else "apart"
        marks.append(_mean(design, measure["unit"], arm, at[order], y, mean.iloc[order], draw, x))
    return marks


def _shift(design: Design, x: str, index: int, count: int) -> Callable[[pd.Series], np.ndarray]:
    """Values of ``x`` to positions, with the arms beside each other and not on top."""
    share = (index - (count - 1) / 2) / max(count, 4)  # from about -1/2 to 1/2
    if not _numeric(design, x):
        places = {value: place for place, value in enumerate(design.axes[x]["values"])}
        return lambda values: values.map(places).to_numpy(float) + 0.6 * share
    tried = np.array(sorted(set(design.axes[x]["values"])), dtype=float)
    if _log_axis(design, x):
        gap = np.min(np.diff(np.log(tried))) if len(tried) > 1 else 0.1
        return lambda values: values.to_numpy(float) * np.exp(0.25 * share * gap)
    gap = np.min(np.diff(tried)) if len(tried) > 1 else 0.1
    return lambda values: values.to_numpy(float) + 0.25 * share * gap


def _numeric(design: Design, x: str) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in design.axes[x]["values"]
    )


def _log_axis(design: Design, x: str) -> bool:
    return bool(design.axes[x].get("log")) and min(design.axes[x]["values"]) > 0


def _setting_axis(design: Design, x: str, values: pd.DataFrame) -> Axis:
    if not _numeric(design, x):
        return _names(design, x, design.axes[x]["values"])
    return at_values(design.label(x), design.values(x, values), _log_axis(design, x))


def _dots(
    design: Design,
    measure: Mapping[str, Any],
    arm: str,
    at: np.ndarray,
    values: pd.DataFrame,
) -> Iterator[Dots]:
    """The seeds of an arm; those of which only a bound is known as open dots."""
    key = design.keys[arm]
    bound = values["censored"].fillna(0).to_numpy(int) if "censored" in values else np.zeros(1, int)
    bound = np.broadcast_to(bound, len(values))
    words_of = {0: "", 1: "at least ", -1: "at most "}
    y = values["value"].to_numpy(float)
    texts = [
        f"{key.label}, seed {seed}: {words_of[sign]}{words.amount(float(v), measure['unit'])}"
        for seed, sign, v in zip(values["seed"], bound, y, strict=True)
    ]
    for shape, mine in (("dot", bound == 0), ("open", bound != 0)):
        if mine.any():
            yield Dots(
                arm, key.look, at[mine], y[mine], list(itertools.compress(texts, mine)), shape
            )


def _mean(
    design: Design,
    unit: str,
    arm: str,
    at: Sequence[float] | np.ndarray,
    y: Axis,
    means: pd.DataFrame,
    draw: str,
    x: str = "",
) -> Mean:
    """Intervals with an open end reach to the end of ``y``; a median beyond it is not drawn."""
    key = design.keys[arm]
    texts = []
    for row in means.to_dict("records"):
        where = f", {design.label(x)} {words.setting(row[x])}" if x else ""
        texts.append(f"{key.label}{where}\n{interval_text(row, unit)}")
    low, high = (means[name].to_numpy(float) for name in ("low", "high"))
    low, high = np.where(np.isinf(low), y.range[0], low), np.where(np.isinf(high), y.range[1], high)
    mean = means["mean"].where(np.isfinite(means["mean"])).to_numpy(float)
    return Mean(arm, key.look, np.asarray(at, float), mean, low, high, texts, draw)


def _rings(design: Design, x: str, means: pd.DataFrame, chosen: pd.DataFrame) -> list[Mark]:
    shared = [name for name in chosen.columns if name in means]
    picked = means.merge(chosen[shared].dropna(), on=shared)
    arms = [arm for arm in design.keys if arm in set(means["arm"])]
    marks: list[Mark] = []
    for index, arm in enumerate(arms):
        mine = picked[picked["arm"] == arm]
        at = _shift(design, x, index, len(arms))(mine[x])
        key = design.keys[arm]
        texts = [f"{key.label}: chosen {words.setting(value)}" for value in mine[x]]
        marks.append(Dots(arm, key.look, at, mine["mean"].to_numpy(float), texts, "ring"))
    return marks


# ---- Heat maps


def heat(
    design: Design,
    name: str,
    measure: Mapping[str, Any],
    values: pd.DataFrame,
    varied: Sequence[str],
) -> Picture:
    """Means over two axes: a panel for each arm, and for each place on any further axes."""
    x, y, *rest = varied
    shown = values[values["value"].notna()]
    means = cells(shown, measure_from_json(measure), ["arm", *varied])
    means["mean"] = means["mean"].where(np.isfinite(means["mean"]))
    columns, rows = design.values(x, values), design.values(y, values)
    panels, left_out = split(design, means, ["arm", *rest])
    log = measure.get("metric") == "loss"
    shades = np.log10(means["mean"].clip(lower=1e-12)) if log else means["mean"]
    ends = (float(shades.min()), float(shades.max())) if len(shades) else (0.0, 1.0)
    label = f"{'log10 of ' if log else ''}{axis_label(measure)}"

    made = []
    for title, _, part in panels:
        grid = part.pivot(index=y, columns=x, values="mean").reindex(index=rows, columns=columns)
        numbers = grid.to_numpy(float)
        words_in = [[words.number(float(v)) for v in row] for row in numbers]
        texts = [
            [
                f"{words.point({y: row, x: column}, design.labels)}: {cell} {measure['unit']}"
                for column, cell in zip(columns, line, strict=True)
            ]
            for row, line in zip(rows, words_in, strict=True)
        ]
        z = np.log10(np.maximum(numbers, 1e-12)) if log else numbers
        shown_in = words_in if numbers.size <= CELLS else [[""] * len(columns)] * len(rows)
        marks = (Heat(z, shown_in, texts, label, *ends),)
        made.append(Panel(title, _names(design, x, columns), _names(design, y, rows), marks))
    title = f"{upper_first(measure['label'])} over {design.label(x)} and {design.label(y)}"
    caption = f"Means over seeds; blank where there is no run with a value.{omitted(left_out)}"
    return Picture(file_name(name, "over", x, "and", y), title, caption, tuple(made))


def _names(design: Design, axis: str, values: Sequence[Any]) -> Axis:
    return categories(design.label(axis), [words.setting(value) for value in values])
