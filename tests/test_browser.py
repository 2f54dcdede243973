"""The pages in headless Chromium: drawn, quiet, offline, readable on a phone, light and dark."""

import base64

import pytest
from browser_tools import CHROMIUM, Browser
from study_tools import make_study
from test_report import ARMS, RATE, accuracy, decided, status

from bnresearch import records, report
from bnresearch.claims import Difference, final

# The pages are made once, if one worker has all tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

DRAW_ALL = "Promise.all(plots.map(draw)).then(() => plots.length)"
INK = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(front page, a study's page) with every kind of picture."""
    folder = tmp_path_factory.mktemp("browser") / "study"
    long = {"label": f"an arm with a very long name {'indeed ' * 12}", "overrides": {"x": "z" * 90}}
    tune = {"axis": "rate", "measure": final("accuracy", "validation")}
    net = {"values": ["mlp", "conv"], "keys": ["model.name"], "label": "network"}
    sides = {"treatment": "batch", "control": "none", "where": {"net": "mlp"}}
    claim = Difference(measure="accuracy", sesoi=0.5, **sides)
    make_study(
        folder,
        ARMS | {"long": long},
        {"rate": RATE, "net": net},
        5,
        accuracy=lambda arm, point, seed: accuracy("none" if arm == "long" else arm, point, seed),
        status=status,
        tune=tune,
        claims=[claim],
    )
    front = report.write([decided(folder)], folder / "report")
    return front, front.parent / "made_up" / "index.html"


def bright(colour):
    """The mean of the channels of "rgb(1, 2, 3)"."""
    return sum(map(float, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3


def quiet(browser):
    assert browser.messages == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data", "blob"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_are_drawn_quietly_and_fit(browser, pages, width, dark):
    for path in pages:
        browser.open(path, width, dark=dark)
        plots = path.read_text().count("data-picture")
        if plots:
            assert browser.value(DRAW_ALL) == plots
            # Every plot has its traces: lines, dots, or the cells of a heat map.
            drawn = "plots.filter((d) => d.querySelector('.trace, .hm')).length"
            assert browser.value(drawn) == plots
            assert (bright(browser.value(INK)) > 128) == dark
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert (bright(browser.value(PAPER)) < 128) == dark
        quiet(browser)


def test_plots_are_drawn_when_they_come_into_sight(browser, pages):
    browser.open(pages[1])
    browser.value("new Promise((done) => setTimeout(done, 300))")
    first = browser.value("drawn().length")
    assert first < browser.value("plots.length")
    browser.value("plots.at(-1).scrollIntoView({behavior: 'instant'})")
    browser.value("new Promise((done) => setTimeout(done, 1000))")
    assert browser.value("plots.at(-1).dataset.drawn") == "yes"
    quiet(browser)


def test_a_legend_hides_and_shows_an_arm(browser, pages):
    browser.open(pages[1])
    browser.value(DRAW_ALL)
    count = """[...document.querySelector('.picture:has(.legend)').querySelectorAll('.plot')]
        .flatMap((d) => d.data).filter((t) => t.legendgroup === 'batch' && t.visible).length"""
    before = browser.value(count)
    assert before > 0
    button = "document.querySelector('.legend button[data-group=batch]')"
    browser.value(f"{button}.click()")
    assert browser.value(count) == 0
    assert browser.value(f"{button}.getAttribute('aria-pressed')") == "false"
    browser.value(f"{button}.click()")
    assert browser.value(count) == before


def test_the_table_of_runs_is_filtered_and_sorted(browser, pages):
    browser.open(pages[1])
    rows = "[...table.tBodies[0].rows].map((r) => [...r.cells].map((c) => c.textContent))"
    assert len(browser.value(rows)) == 25
    assert browser.value("document.getElementById('runs-count').textContent") == "90 of 90 runs"
    browser.value("filter.value = 'diverged, no norm'; filter.dispatchEvent(new Event('input'))")
    shown = browser.value(rows)
    assert len(shown) == 4  # seeds 1 and 3 at the highest rate, on two networks
    assert {row[0] for row in shown} == {"no norm"}
    browser.value("filter.value = ''; filter.dispatchEvent(new Event('input'))")
    column = browser.value("RUNS.columns.indexOf('test/accuracy')")
    for sign in (1, -1):
        browser.value(f"table.tHead.rows[0].cells[{column}].click()")
        values = [float(row[column]) for row in browser.value(rows)]
        assert values == sorted(values, reverse=sign < 0)
    link = browser.value("table.querySelector('td a').getAttribute('href')")
    assert (pages[1].parent / link).is_file()


def test_print_has_the_paper_figures(browser, pages):
    browser.open(pages[1])
    printed = base64.b64decode(browser.call("Page.printToPDF")["data"])
    figures = list((pages[1].parent / "figures").glob("*.png"))
    assert printed.count(b"/Subtype /Image") >= len(figures)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.value("plots.every((d) => d.offsetHeight === 0)")
    browser.call("Emulation.setEmulatedMedia", media="")


def test_verdicts_are_seen_without_scrolling(browser, pages):
    for path in pages:
        for width, height in ((1280, 800), (390, 844)):
            browser.open(path, width, height)
            top = browser.value("document.querySelector('.badge').getBoundingClientRect().bottom")
            assert 0 < top < height / 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A page of 2,000 runs."""
    folder = tmp_path_factory.mktemp("large")
    rates = {**RATE, "values": [10.0 ** (i / 3 - 3) for i in range(10)]}
    tune = {"axis": "rate", "measure": final("accuracy", "validation")}
    make_study(folder, ("a", "b", "c", "d"), {"rate": rates}, 50, tune=tune, curve_points=20)
    front = report.write([records.load_study(folder)], folder / "report")
    return front.parent / "made_up" / "index.html"


def test_a_page_of_two_thousand_runs_opens(browser, large):
    browser.open(large)
    assert browser.value("RUNS.rows.length") == 2000
    browser.value(DRAW_ALL)
    quiet(browser)
