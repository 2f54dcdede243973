"""Learning curves: every seed as a thin line, means with 95 % intervals over finished runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bnresearch.report.pictures.design import (
    Design,
    axis_label,
    file_name,
    interval_text,
    keys_of,
    means_of,
    notes,
    split,
    upper_first,
)
from bnresearch.report.pictures.marks import Mark, Mean, Panel, Picture, Thin, axis

CURVE_POINTS = 300  # of one run: more than a screen has room for
SPIKE = 10.0


def curves(
    design: Design, frame: pd.DataFrame, split: str, metric: str, name: str = ""
) -> Picture | None:
    """``metric`` on ``split`` along training, or None where no run reports it.

    Args:
      frame: arm, axes, seed, step, value, and ``done``, whether the run came to its end.
    """
    frame = frame[np.isfinite(frame["value"])]
    if frame.empty:
        return None
    percent, log = metric == "accuracy", metric == "loss"
    measure = {"label": f"{split} {metric}", "unit": "%" if percent else "", "metric": metric}
    frame = thinned(frame.assign(value=frame["value"] * (100 if percent else 1)))
    free = [one for one in design.varied(frame) if one != design.tuned]
    parts, left_out = _curve_panels(design, frame, free)
    shown, cut = _in_sight(frame, log)
    y = axis(axis_label(measure), [shown], "log" if log else "linear", percent)
    x = axis("step", [frame["step"]])
    panels = tuple(
        Panel(title, x, y, tuple(lines(design, measure, part, log))) for title, part in parts
    )
    caption = (
        "Thin lines are single seeds, as far as they came; thick lines are means with 95 % "
        "intervals over the runs that finished." + notes(measure, y, frame, left_out) + cut
    )
    title = f"{upper_first(measure['label'])} along training"
    return Picture(name or file_name(split, metric), title, caption, panels, keys_of(design, frame))


def _in_sight(frame: pd.DataFrame, log: bool) -> tuple[pd.Series, str]:
    """The values that the axis has to show, of finished runs if any; and a remark on the others.

    A loss may leap by many decades for a moment: beyond SPIKE times the largest last one it is cut
    off, or nothing else could be told apart.
    """
    done = frame[frame["done"]] if frame["done"].any() else frame
    values = done["value"]
    if not log:
        return values, ""
    last = done.groupby([name for name in done if name not in ("step", "value")])["value"].last()
    shown = values[values <= SPIKE * last.max()]
    cut = " Some losses leap beyond what is shown." if len(shown) < len(values) else ""
    return shown, cut


def _curve_panels(
    design: Design, frame: pd.DataFrame, free: Sequence[str]
) -> tuple[list[tuple[str, pd.DataFrame]], int]:
    """At the chosen values first; then, if there is no other axis, at every value."""
    fixed = design.at_chosen(frame)
    panels, left_out = split(design, fixed, free)
    parts = [(title, part) for title, _, part in panels]
    if design.tuned in design.varied(frame) and not free:
        if design.chosen is not None:
            parts = [(f"each arm at its chosen {design.label(design.tuned)}", fixed)] * bool(
                len(fixed)
            )
        more, left_out = split(design, frame, [design.tuned])
        parts += [(title, part) for title, _, part in more]
    return parts, left_out


def lines(
    design: Design, measure: Mapping[str, Any], frame: pd.DataFrame, log: bool
) -> Iterator[Mark]:
    """Every seed and the means of every arm; ``measure`` has the unit."""
    means = means_of(frame[frame["done"]], ["arm", "step"], log)
    arms = [arm for arm in design.keys if arm in set(frame["arm"])]
    for arm in arms:
        mine = frame[frame["arm"] == arm]
        runs = [name for name in (*design.axes, "seed") if name in mine]
        mine = mine.sort_values([*runs, "step"])
        starts = np.flatnonzero((mine[runs] != mine[runs].shift()).any(axis=1).to_numpy())[1:]
        x, y, seed = (
            np.insert(mine[name].to_numpy(float), starts, np.nan)
            for name in ("step", "value", "seed")
        )
        yield Thin(arm, design.keys[arm].look, x, y, seed)
    for arm in arms:  # on top of all thin lines
        mean = means[means["arm"] == arm].sort_values("step")
        if len(mean):
            key, unit = design.keys[arm], measure["unit"]
            texts = [
                f"{key.label}, step {row['step']}\n{interval_text(row, unit)}"
                for row in mean.to_dict("records")
            ]
            step, middle, low, high = (
                mean[column].to_numpy(float) for column in ("step", "mean", "low", "high")
            )
            yield Mean(arm, key.look, step, middle, low, high, texts, "band")


def thinned(frame: pd.DataFrame) -> pd.DataFrame:
    """At most so many steps, evenly chosen, the last one among them."""
    steps = np.sort(frame["step"].unique())
    if len(steps) <= CURVE_POINTS:
        return frame
    kept = steps[np.linspace(0, len(steps) - 1, CURVE_POINTS).round().astype(int)]
    return frame[frame["step"].isin(kept)]
