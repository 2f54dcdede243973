"""Both pens draw every mark, where it should be, and take no name for markup."""

import math
import warnings

import numpy as np
import pytest

from bnresearch.report.pictures import marks, paper, screen
from bnresearch.report.pictures.marks import (
    Axis,
    Dots,
    Heat,
    Mean,
    Note,
    Panel,
    Picture,
    Rule,
    Thin,
    Zone,
)

LOOK = marks.look(0)
ONE = np.array([1.0, 2.0])
MARKS = {
    Thin: Thin("a", LOOK, np.array([1, math.nan, 2]), np.array([1, math.nan, 2]), np.zeros(3)),
    Dots: Dots("a", LOOK, ONE, ONE, ["<i>one</i>", "$two$"]),
    Mean: Mean("a", LOOK, ONE, ONE, ONE - 1, np.array([3.0, math.nan]), ["one", "two"], "bars"),
    Zone: Zone((1.0, 2.0), None),
    Rule: Rule("x", 1.5),
    Note: Note(1.0, "<b>words</b> $ & words"),
    Heat: Heat(np.array([[1.0, math.nan]]), [["1", ""]], [["one", "none"]], "label", 1.0, 1.0),
}


def test_both_pens_know_every_mark():
    assert set(screen.SCREEN) == set(paper.PAPER) == set(MARKS)


@pytest.mark.parametrize("scale", ["linear", "log", "stretch"])
def test_pens_draw_every_mark_on_every_axis(scale, tmp_path):
    ends = Axis("$ <label> _", scale, (0.5, 3.0), ((1.0, "_one"), (2.0, "$two")))
    drawn = tuple(mark for kind, mark in MARKS.items() if kind is not Heat)
    cells = marks.categories("<names>", ["a"])  # cells stand at 0, 1, 2, ...
    panels = (
        Panel("<title> $x", Axis("x", "linear", (0, 3)), ends, drawn),
        Panel("", marks.categories("", ["a", "b"]), cells, (MARKS[Heat],)),
    )
    picture = Picture("p", "title", "caption", panels, (marks.Key("a", "_label $", LOOK),))
    figures = [screen.interactive(panel) for panel in panels]
    # A thin line, a band's or two dots' trace, a mean; a shade and a line; the words.
    assert [len(figures[0].data), len(figures[0].layout.shapes)] == [3, 2]
    assert figures[0].layout.annotations[0].text == "&lt;b&gt;words&lt;/b&gt; $ &amp; words"
    assert "<i>" not in figures[0].to_json()
    assert figures[0].layout.yaxis.ticktext == ("_one", "$two")
    assert figures[1].data[0].type == "heatmap"
    files = paper.save(picture, tmp_path)
    assert files[0].read_bytes()[:4] == b"\x89PNG"
    assert files[1].read_bytes()[:5] == b"%PDF-"


@pytest.mark.parametrize("draw", ["band", "bars", "lying", "apart"])
def test_means_are_where_they_should_be_on_screen(draw):
    mean = Mean("a", LOOK, ONE, ONE, ONE - 0.5, ONE + 1, ["<one>", "two"], draw)
    panel = Panel("", Axis("", "linear", (0, 3)), Axis("", "linear", (0, 4)), (mean,))
    *bands, trace = screen.interactive(panel).data
    np.testing.assert_allclose(trace.y, [1, 2])
    assert trace.legendgroup == "a"
    assert trace.text == ("&lt;one&gt;", "two")
    bars = trace.error_x if draw == "lying" else trace.error_y
    if draw == "band":
        np.testing.assert_allclose(bands[0].y, [2, 3, 1.5, 0.5])
    else:
        np.testing.assert_allclose([bars.array, bars.arrayminus], [[1, 1], [0.5, 0.5]])


def test_log_ranges_are_what_plotly_wants():
    panel = Panel("", Axis("", "log", (0.1, 100)), Axis("", "stretch", (1, 100)), ())
    layout = screen.interactive(panel).layout
    np.testing.assert_allclose(layout.xaxis.range, [-1, 2])
    np.testing.assert_allclose(layout.yaxis.range, [-2, 0], atol=1e-12)


def test_sixty_arms_with_long_names_in_any_script(tmp_path):
    keys = [
        marks.Key(str(i), f"_arm {i} 批量 <script> {'very ' * 30}long $", marks.look(i))
        for i in range(60)
    ]
    dots = tuple(Dots(key.group, key.look, ONE, ONE, [key.label] * 2) for key in keys)
    axis = marks.categories("", [key.label for key in keys])
    panels = tuple(Panel(keys[i].label, axis, Axis("y"), dots) for i in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paper.save(Picture("p", "title", "caption", panels, tuple(keys)), tmp_path)
    assert "<script>" not in screen.interactive(panels[0]).to_json()
