"""What is printed and written about the kinds comes from their docstrings, and is whole."""

import inspect

import pytest

from bnresearch import handbook
from bnresearch.kind import page
from bnresearch.norm import NORMS


def test_the_page_is_what_the_docstrings_say():
    """After a change of a docstring: python -m bnresearch.handbook."""
    assert handbook.PAGE.read_text() == handbook.norms_page()


@pytest.mark.parametrize("kind", NORMS)
def test_every_docstring_is_whole(kind):
    about = page(NORMS[kind])
    assert 1964 <= about.year <= 2026 and about.formula
    found = handbook.sections(about.text)
    assert all(len(found[heading]) > 4 for heading in ("Training", "Inference", "Pitfalls"))
    assert str(about.year) in found["Citation"]
    assert found[""], "what is averaged over what, shapes of parameters and state"
    # What is printed in one line fits on one.
    assert len(handbook.row(kind).formula) <= 120


@pytest.mark.parametrize("kind", NORMS)
def test_every_option_is_explained(kind):
    """By its name somewhere in the text; `scale` and `bias` are in every formula."""
    doc = inspect.getdoc(NORMS[kind].function)
    common = {"decay", "epsilon", "on_single", "correction", "variance", "stat_dtype", "average"}
    common |= {"window", "track", "scale", "bias"}  # explained once, at "batch"
    own = NORMS[kind].options.keys() - (common if kind != "batch" else set())
    missing = [name for name in own if f"``{name}" not in doc and f"  {name}:" not in doc]
    assert not missing


def test_the_listing_has_two_lines_per_kind():
    lines = handbook.listing()
    assert [name for name, _ in lines if name] == list(NORMS)
    described = dict(line for line in lines if line[0])
    assert described["batch"] == (
        "Batch normalization (Ioffe & Szegedy, 2015); uses the batch; keeps mean, var"
    )
    assert described["rms"].endswith("; example by example; keeps nothing")
