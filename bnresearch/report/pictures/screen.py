"""The pen for the screen: plotly figures, one per panel.

Every panel is a plot of its own, so that a page can put them beside each other or, on a phone,
below. Colours of axes and words are the page's own (site.js), for light and dark.
"""

import html
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from bnresearch.report.pictures.marks import (
    Axis,
    Dots,
    Heat,
    Mark,
    Mean,
    Note,
    Panel,
    Rule,
    Thin,
    Zone,
    wrapped,
)

GREY = "#8A8A8A"
SHADE = "rgba(128, 128, 128, 0.22)"
BAND = 0.18  # opacity

Parts = dict[str, list[dict[str, Any]]]  # traces, shapes, annotations


def interactive(panel: Panel) -> go.Figure:
    """A plotly figure of one panel. Traces of an arm have its name as their legendgroup."""
    parts: Parts = {"traces": [], "shapes": [], "annotations": []}
    for mark in panel.marks:
        for kind, made in SCREEN[type(mark)](mark, panel).items():
            parts[kind] += made
    lying = panel.y.ticks == ()  # rows with words of their own need no room for ticks
    layout = {
        "height": panel.height,
        "margin": {"l": 14 if lying else 58, "r": 14, "t": 8, "b": 48},
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": _screen_axis(panel.x),
        "yaxis": _screen_axis(panel.y),
        "shapes": parts["shapes"],
        "annotations": parts["annotations"],
    }
    return go.Figure(parts["traces"], layout)


def _screen_axis(axis: Axis) -> dict[str, Any]:
    logarithmic = axis.scale == "log"
    ends = axis.place(axis.range).tolist()
    made: dict[str, Any] = {
        "title": {"text": _markup(wrapped(axis.label, 40, 2)), "standoff": 8},
        "type": "log" if logarithmic else "linear",
        "range": [math.log10(end) for end in ends] if logarithmic else ends,
        "zeroline": False,
        "automargin": True,
        "minor": {"ticks": ""},
    }
    if axis.ticks is not None:
        made |= {
            "tickvals": [float(axis.place(value)) for value, _ in axis.ticks],
            "ticktext": [_markup(text) for _, text in axis.ticks],
        }
    return made


def _markup(text: str) -> str:
    """Plotly reads a little HTML; what a study is called must not be taken for it."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _trace(mark: Thin | Dots | Mean, panel: Panel, **more: Any) -> dict[str, Any]:
    """Of float32: enough for a screen, and half the size."""
    place = {
        "x": np.asarray(panel.x.place(mark.x), np.float32),
        "y": np.asarray(panel.y.place(mark.y), np.float32),
    }
    return {"type": "scatter", "legendgroup": mark.group, "showlegend": False, **place, **more}


def _hover(mark: Dots | Mean) -> dict[str, Any]:
    texts = [_markup(text) for text in mark.texts]
    return {"text": texts, "hovertemplate": "%{text}<extra></extra>"}


def _screen_thin(mark: Thin, panel: Panel) -> Parts:
    shown = np.stack([mark.seed, mark.y], axis=1).astype(np.float32)
    template = "seed %{customdata[0]}: %{customdata[1]:.4g}<extra></extra>"
    return {
        "traces": [
            _trace(
                mark,
                panel,
                mode="lines",
                line={"color": _rgba(mark.look.colour, mark.opacity), "width": 1},
                customdata=shown,
                hovertemplate=template,
            )
        ]
    }


def _screen_dots(mark: Dots, panel: Panel) -> Parts:
    colour = mark.look.colour
    marker = {
        "dot": {"color": colour, "size": 6, "opacity": 0.5},
        "open": {"color": colour, "size": 7, "symbol": "circle-open"},
        "ring": {"color": colour, "size": 17, "symbol": "circle-open", "line": {"width": 2}},
    }[mark.shape]
    return {"traces": [_trace(mark, panel, mode="markers", marker=marker, **_hover(mark))]}


def _screen_mean(mark: Mean, panel: Panel) -> Parts:
    look, joined = mark.look, mark.draw in ("band", "bars")
    trace = _trace(
        mark,
        panel,
        mode="lines" if mark.draw == "band" else "lines+markers" if joined else "markers",
        line={"color": look.colour, "width": 2.2, "dash": look.dash},
        marker={"color": look.colour, "symbol": look.marker, "size": 11 if not joined else 8},
        **_hover(mark),
    )
    if mark.draw == "band":
        return {"traces": [_band(mark, panel), trace]}
    along = "x" if mark.draw == "lying" else "y"
    axis, middle = (panel.x, mark.x) if along == "x" else (panel.y, mark.y)
    low, high = (np.abs(axis.place(end) - axis.place(middle)) for end in (mark.low, mark.high))
    bars = {"type": "data", "symmetric": False, "array": high, "arrayminus": low}
    trace[f"error_{along}"] = bars | {"color": look.colour, "thickness": 2, "width": 5}
    return {"traces": [trace]}


def _band(mark: Mean, panel: Panel) -> dict[str, Any]:
    there = np.isfinite(mark.low) & np.isfinite(mark.high)
    x, low, high = mark.x[there], mark.low[there], mark.high[there]
    return {
        "type": "scatter",
        "legendgroup": mark.group,
        "showlegend": False,
        "x": np.asarray(panel.x.place(np.concatenate([x, x[::-1]])), np.float32),
        "y": np.asarray(panel.y.place(np.concatenate([high, low[::-1]])), np.float32),
        "fill": "toself",
        "fillcolor": _rgba(mark.look.colour, BAND),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "mode": "lines",
    }


def _screen_zone(mark: Zone, panel: Panel) -> Parts:
    shape: dict[str, Any] = {"type": "rect", "line": {"width": 0}, "fillcolor": SHADE}
    for name, axis, ends in (("x", panel.x, mark.x), ("y", panel.y, mark.y)):
        first, last = (0.0, 1.0) if ends is None else axis.place(ends).tolist()
        reference = name if ends is not None else f"{name} domain"
        shape |= {f"{name}0": first, f"{name}1": last, f"{name}ref": reference}
    return {"shapes": [shape | {"layer": "below"}]}


def _screen_rule(mark: Rule, panel: Panel) -> Parts:
    other = "y" if mark.axis == "x" else "x"
    at = float((panel.x if mark.axis == "x" else panel.y).place(mark.at))
    first, last = mark.ends or (0, 1)
    ends = {f"{mark.axis}0": at, f"{mark.axis}1": at, f"{other}0": first, f"{other}1": last}
    line = {"color": GREY, "width": 1.2}
    reference = other if mark.ends else f"{other} domain"
    references = {f"{other}ref": reference, f"{mark.axis}ref": mark.axis}
    return {"shapes": [{"type": "line", "line": line, "layer": "below", **ends, **references}]}


def _screen_note(mark: Note, panel: Panel) -> Parts:
    place = {
        "xref": "x domain",
        "x": 0,
        "y": float(panel.y.place(mark.y)),
        "xanchor": "left",
        "yanchor": "bottom",
    }
    look = {"showarrow": False, "align": "left", "font": {"size": 12}}
    return {"annotations": [{"text": _markup(wrapped(mark.text, 48, 2)), **place, **look}]}


def _screen_heat(mark: Heat, panel: Panel) -> Parts:
    trace = {
        "type": "heatmap",
        "z": mark.z,
        "zmin": mark.low,
        "zmax": mark.high,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": _markup(mark.label), "side": "right"}, "thickness": 12},
        "text": mark.cells,
        "texttemplate": "%{text}",
        "hovertext": [[_markup(text) for text in row] for row in mark.texts],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
    }
    return {"traces": [trace]}


SCREEN: Mapping[type[Mark], Callable[[Any, Panel], Parts]] = {
    Thin: _screen_thin,
    Dots: _screen_dots,
    Mean: _screen_mean,
    Zone: _screen_zone,
    Rule: _screen_rule,
    Note: _screen_note,
    Heat: _screen_heat,
}
