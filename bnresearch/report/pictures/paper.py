"""The pen for paper: one matplotlib figure per picture, as PNG and PDF."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from bnresearch.report.pictures.marks import (
    Axis,
    Dots,
    Heat,
    Look,
    Mark,
    Mean,
    Note,
    Panel,
    Picture,
    Rule,
    Thin,
    Zone,
    wrapped,
)

WIDTH = 7.0  # inches: two columns of a paper, or one page
ROOM = 100  # letters of tick labels along the width
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # TrueType: what journals ask for, and text that can be searched
    "axes.unicode_minus": True,
}
MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "cross": "X",
    "triangle-down": "v",
}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def save(picture: Picture, folder: Path) -> list[Path]:
    """Writes the picture as PNG (200 dots per inch) and PDF, and returns the paths."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # names in other scripts
        figure = paper(picture)
        files = [folder / f"{picture.name}.{kind}" for kind in ("png", "pdf")]
        figure.savefig(files[0], dpi=200)
        figure.set_layout_engine("none")  # keeps what was found for the first
        figure.savefig(files[1], metadata={"CreationDate": None})  # equal bytes for equal numbers
    return files


def paper(picture: Picture) -> Figure:
    """A matplotlib figure of all panels, without pyplot's global state."""
    columns = min(picture.columns, len(picture.panels))
    rows = math.ceil(len(picture.panels) / columns)
    heights = [
        max(panel.height for panel in picture.panels[row * columns : (row + 1) * columns]) / 130
        for row in range(rows)
    ]
    across = _legend_columns(picture)
    keys = 0.17 * math.ceil(len(picture.keys) / across)
    figure = Figure(figsize=(WIDTH, sum(heights) + keys + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for axes, panel in zip(grid, picture.panels, strict=False):
        _paper_panel(axes, panel)
    for axes in grid[len(picture.panels) :]:
        axes.remove()
    if picture.keys:
        handles = [_handle(key.look) for key in picture.keys]
        labels = [_plain(wrapped(key.label, 40, 1)) for key in picture.keys]
        place: Any = {"loc": "outside lower center", "ncols": across, "frameon": False}
        figure.legend(handles, labels, handlelength=3, **place)
    return figure


def _legend_columns(picture: Picture) -> int:
    longest = max((min(len(key.label), 40) for key in picture.keys), default=1)
    return max(1, min(len(picture.keys), 110 // (longest + 8)))


def _handle(look: Look) -> Line2D:
    style: Any = DASHES[look.dash]
    marker = MARKERS[look.marker]
    return Line2D([], [], color=look.colour, linestyle=style, marker=marker, markersize=4)


def _plain(text: str) -> str:
    """Matplotlib reads dollars as formulae and hides labels that begin with an underscore."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _paper_panel(axes: Axes, panel: Panel) -> None:
    for mark in panel.marks:
        PAPER[type(mark)](axes, mark, panel)
    axes.set_title(_plain(wrapped(panel.title, 52, 2)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color="0.92", linewidth=0.6)
    for name, axis in (("x", panel.x), ("y", panel.y)):
        _paper_axis(axes, name, axis)


def _paper_axis(axes: Axes, name: str, axis: Axis) -> None:
    axes.set(**{f"{name}label": _plain(wrapped(axis.label, 36, 2))})
    if axis.scale == "log":
        axes.set(**{f"{name}scale": "log"})
    axes.set(**{f"{name}lim": axis.place(axis.range)})
    getattr(axes, f"{name}axis").minorticks_off()
    if axis.ticks is not None:
        places = [float(axis.place(value)) for value, _ in axis.ticks]
        labels = [_plain(text) for _, text in axis.ticks]
        axes.set(**{f"{name}ticks": places, f"{name}ticklabels": labels})
        grid = axes.get_gridspec()
        if name == "x" and grid and len("".join(labels)) > ROOM / grid.ncols:
            axes.tick_params("x", rotation=40)
    if name == "y" and axis.ticks == ():
        axes.spines["left"].set_visible(False)


def _paper_thin(axes: Axes, mark: Thin, panel: Panel) -> None:
    x, y = panel.x.place(mark.x), panel.y.place(mark.y)
    axes.plot(x, y, color=mark.look.colour, alpha=mark.opacity, linewidth=0.5)


def _paper_dots(axes: Axes, mark: Dots, panel: Panel) -> None:
    styles: dict[str, dict[str, Any]] = {
        "dot": {"alpha": 0.45, "markersize": 2.5, "markeredgewidth": 0},
        "open": {"markersize": 3.5, "fillstyle": "none", "markeredgewidth": 0.6},
        "ring": {"markersize": 10, "fillstyle": "none", "markeredgewidth": 1.0},
    }
    x, y = panel.x.place(mark.x), panel.y.place(mark.y)
    axes.plot(x, y, color=mark.look.colour, marker="o", linestyle="none", **styles[mark.shape])


def _paper_mean(axes: Axes, mark: Mean, panel: Panel) -> None:
    look = mark.look
    x, y = panel.x.place(mark.x), panel.y.place(mark.y)
    style: dict[str, Any] = {"color": look.colour, "linestyle": DASHES[look.dash]}
    if mark.draw == "band":
        axes.plot(x, y, **style)
        low, high = panel.y.place(mark.low), panel.y.place(mark.high)
        axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
        return
    along, axis, middle = ("x", panel.x, x) if mark.draw == "lying" else ("y", panel.y, y)
    ends = np.nan_to_num([middle - axis.place(mark.low), axis.place(mark.high) - middle])
    if mark.draw != "bars":
        style["linestyle"] = "none"
    bars: Any = {f"{along}err": np.maximum(ends, 0), "elinewidth": 1, "capsize": 2}
    axes.errorbar(x, y, marker=MARKERS[look.marker], markersize=4, **bars, **style)


def _paper_zone(axes: Axes, mark: Zone, panel: Panel) -> None:
    ends = []
    for axis, given in ((panel.x, mark.x), (panel.y, mark.y)):
        ends.append(axis.place(axis.range if given is None else given))
    (x0, x1), (y0, y1) = ends
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color="0.88", linewidth=0, zorder=0))


def _paper_rule(axes: Axes, mark: Rule, panel: Panel) -> None:
    upright = mark.axis == "x"
    at = float((panel.x if upright else panel.y).place(mark.at))
    style: Any = {"color": "0.5", "linewidth": 0.8, "zorder": 1}
    if mark.ends is None:
        (axes.axvline if upright else axes.axhline)(at, **style)
    else:
        (axes.vlines if upright else axes.hlines)(at, *mark.ends, **style)


def _paper_note(axes: Axes, mark: Note, panel: Panel) -> None:
    across = axes.get_yaxis_transform()  # x in parts of the panel
    text = _plain(wrapped(mark.text, 105, 2))
    axes.text(
        0.005, float(panel.y.place(mark.y)), text, transform=across, va="bottom", fontsize=7.5
    )


def _paper_heat(axes: Axes, mark: Heat, panel: Panel) -> None:
    ends: Any = {"vmin": mark.low, "vmax": mark.high if mark.high > mark.low else mark.low + 1}
    image = axes.imshow(mark.z, "viridis", origin="lower", aspect="auto", zorder=1, **ends)
    for row, column in np.ndindex(mark.z.shape):
        if np.isfinite(mark.z[row, column]):
            dark = mark.z[row, column] < 0.4 * ends["vmin"] + 0.6 * ends["vmax"]
            colour = "white" if dark else "black"
            style: dict[str, Any] = {"color": colour, "ha": "center", "va": "center"}
            axes.text(column, row, mark.cells[row][column], fontsize=6.5, **style)
    bar = axes.figure.colorbar(image, ax=axes, label=_plain(mark.label))
    bar.outline.set_visible(False)


PAPER: Mapping[type[Mark], Callable[[Axes, Any, Panel], None]] = {
    Thin: _paper_thin,
    Dots: _paper_dots,
    Mean: _paper_mean,
    Zone: _paper_zone,
    Rule: _paper_rule,
    Note: _paper_note,
    Heat: _paper_heat,
}
