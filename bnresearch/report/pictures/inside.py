"""What probes found inside the layers, along training: curves per site, or a map of many sites."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from bnresearch import words
from bnresearch.report.pictures.curves import lines, thinned
from bnresearch.report.pictures.design import (
    PANELS,
    Design,
    file_name,
    keys_of,
    means_of,
    omitted,
    split,
    upper_first,
)
from bnresearch.report.pictures.marks import Axis, Heat, Panel, Picture, axis, categories

CURVES = 6  # sites that each get a panel; more of them, or at more places, share a map
COLUMNS = 24  # steps of a map
SPREAD = 30.0  # largest over smallest value beyond which an axis is logarithmic

Part = tuple[str, pd.DataFrame]


def inside(design: Design, probe: str, frames: dict[str, pd.DataFrame]) -> Iterator[Picture]:
    """All pictures of a probe: one of what it says of whole nets, and one of each quantity that it
    measures at sites.

    Args:
      frames: of each quantity: arm, axes, seed, step, site, depth, value, and ``done``, whether the
        run came to its end.
    """
    seen = {name: frame[np.isfinite(frame["value"])] for name, frame in frames.items()}
    whole = {name: frame[frame["site"] == ""] for name, frame in seen.items()}
    whole = {name: frame for name, frame in whole.items() if len(frame)}
    if whole:
        yield _whole(design, probe, whole)
    for name, frame in seen.items():
        frame = frame[frame["site"] != ""]
        if len(frame):
            sites, places = frame["site"].nunique(), len(_places(design, frame)[0])
            many = sites > CURVES or sites * places > PANELS
            yield (_map if many else _per_site)(design, probe, name, frame)


def _whole(design: Design, probe: str, frames: dict[str, pd.DataFrame]) -> Picture:
    """Quantities of whole nets, a panel for each (and for each place on axes)."""
    panels: list[Panel] = []
    hidden = 0
    for name, frame in frames.items():
        parts, left_out = _places(design, frame)
        kept = _evenly(parts, max(1, PANELS // len(frames)))
        hidden += left_out + len(parts) - len(kept)
        panels += _panels(design, _spoken(name), frame, kept)
    title, caption = f"{upper_first(_spoken(probe))}: the whole net", _caption(panels, hidden)
    every = pd.concat(frames.values())
    return _picture(file_name("inside", probe), title, caption, panels, design, every)


def _per_site(design: Design, probe: str, name: str, frame: pd.DataFrame) -> Picture:
    """A quantity at a few sites: a panel for each."""
    parts = [
        (", ".join(filter(None, (place, site))), part[part["site"] == site])
        for (place, part), site in itertools.product(_places(design, frame)[0], _sites(frame))
    ]
    label = f"{_spoken(probe)}: {_spoken(name)}"
    panels = _panels(design, label, frame, [part for part in parts if len(part[1])])
    title, caption = upper_first(label), _caption(panels, 0)
    return _picture(file_name("inside", probe, name), title, caption, panels, design, frame)


def _map(design: Design, probe: str, name: str, frame: pd.DataFrame) -> Picture:
    """A quantity at many sites: sites below each other, steps beside each other, for each arm."""
    log, sites = _log(frame), _sites(frame)
    steps = _evenly(sorted(frame["step"].unique()), COLUMNS)
    frame, axes = _compared(design, _finished(frame))
    frame = frame[frame["step"].isin(steps)]
    means = means_of(frame, ["arm", *axes, "site", "step"], log)
    panels, left_out = split(design, means, ["arm", *axes])
    shades = np.log10(means["mean"]) if log else means["mean"]
    ends = (float(shades.min()), float(shades.max())) if len(shades) else (0.0, 1.0)
    spoken = f"{_spoken(probe)}: {_spoken(name)}"
    label = f"log10 of {spoken}" if log else spoken
    y = categories("", sites[::-1], 40)  # the input on top
    x = _few(categories("step", [str(step) for step in steps]))
    made = []
    for title, _, part in panels:
        grid = part.pivot(index="site", columns="step", values="mean")
        numbers = grid.reindex(index=sites[::-1], columns=steps).to_numpy(float)
        texts = [
            [f"{site}, step {step}: {words.number(v)}" for step, v in zip(steps, row, strict=True)]
            for site, row in zip(sites[::-1], numbers, strict=True)
        ]
        blank = [[""] * len(steps)] * len(sites)
        heat = Heat(np.log10(numbers) if log else numbers, blank, texts, label, *ends)
        made.append(Panel(title, x, y, (heat,), 120 + 15 * len(sites)))
    caption = f"Means over the runs that finished, the input on top.{omitted(left_out)}"
    if log:
        caption += " Means are geometric."
    return Picture(file_name("inside", probe, name), upper_first(spoken), caption, tuple(made))


def _places(design: Design, frame: pd.DataFrame) -> tuple[list[Part], int]:
    """(title, rows) for each place on the axes at which runs differ; and how many were left out."""
    panels, left_out = split(design, *_compared(design, frame))
    return [(title, part) for title, _, part in panels], left_out


def _compared(design: Design, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of each arm at the value that was chosen for it, and on which axes they differ."""
    frame = design.at_chosen(frame)
    return frame, [
        name for name in design.varied(frame) if name != design.tuned or design.chosen is None
    ]


def _finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of runs that finished; all of them where none did."""
    return frame[frame["done"]] if frame["done"].any() else frame


def _panels(design: Design, label: str, frame: pd.DataFrame, parts: Sequence[Part]) -> list[Panel]:
    log = _log(frame)
    y = axis(label, [_finished(frame)["value"]], "log" if log else "linear")
    x = axis("step", [frame["step"]])
    look = {"unit": ""}
    return [
        Panel(title, x, y, tuple(lines(design, look, thinned(part), log)), 250)
        for title, part in parts
    ]


def _picture(
    name: str, title: str, caption: str, panels: list[Panel], design: Design, frame: pd.DataFrame
) -> Picture:
    return Picture(name, title, caption, tuple(panels), keys_of(design, frame), min(3, len(panels)))


def _caption(panels: Sequence[Panel], hidden: int) -> str:
    caption = (
        "Thin lines are single seeds, thick lines means with 95 % intervals over the runs that "
        f"finished.{omitted(hidden)}"
    )
    if any(panel.y.scale == "log" for panel in panels):
        caption += " Where an axis is logarithmic, means are geometric."
    return caption


def _log(frame: pd.DataFrame) -> bool:
    """Whether a quantity spans decades."""
    low, high = frame["value"].min(), frame["value"].max()
    return bool(low > 0 and high / low > SPREAD)


def _sites(frame: pd.DataFrame) -> list[str]:
    """In order of execution."""
    return list(dict.fromkeys(frame.sort_values("depth", kind="stable")["site"]))


def _evenly(items: Sequence, count: int) -> list:
    """At most so many of them, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    places = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[place] for place in places]


def _few(axis: Axis) -> Axis:
    """With ticks that do not touch."""
    return Axis(axis.label, axis.scale, axis.range, tuple(_evenly(axis.ticks or (), 6)))


def _spoken(name: str) -> str:
    return name.replace("_", " ")
