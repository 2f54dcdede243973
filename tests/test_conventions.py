"""docs/conventions.md: its table is the presets, its numbers are right, and its blocks run."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from bnresearch import conventions
from bnresearch.conventions import PRESETS

TEXT = (Path(__file__).parent.parent / "docs" / "conventions.md").read_text()
FIRST, *SECTIONS = re.findall(r"(?:### (\w+)\n(?:(?!###).)*?)?```python\n(.*?)```", TEXT, re.DOTALL)
NEEDS = {"torch": "torch", "keras": "keras"}


def rows():
    """Cells by column, for every row of the table of the page."""
    lines = [line.strip("| ") for line in TEXT.splitlines() if line.startswith("|")]
    header, _, *rest = [[cell.strip("` ") for cell in line.split("|")] for line in lines]
    return [dict(zip(header, cells, strict=True)) for cells in rest]


def test_the_table_is_that_of_the_presets():
    assert [row["library"] for row in rows()] == list(PRESETS)
    for row in rows():
        options = PRESETS[row["library"]].options
        assert row["decay"] == str(options.get("decay", "(no default)"))
        assert float(row["epsilon"]) == options["epsilon"]
        assert row["running variance"] == ("biased", "unbiased")[options["correction"]]
        for name in ("variance", "average", "stat_dtype", "on_single"):
            assert row[name] == options[name]


def test_the_table_of_the_module_is_that_of_the_presets():
    for name, preset in PRESETS.items():
        line = next(li for li in conventions.__doc__.splitlines() if li.startswith(name))
        options = preset.options
        wanted = [options.get("decay", "(given)"), options["epsilon"]]
        wanted += ["unbiased" if options["correction"] else "biased", options["variance"]]
        wanted += [options[key] for key in ("average", "stat_dtype", "on_single")]
        found = line.split()[1:]
        assert float(found.pop(1)) == wanted.pop(1)
        assert found == [str(w) for w in wanted]


@pytest.mark.parametrize(("library", "code"), SECTIONS, ids=lambda s: s if len(s) < 9 else "")
def test_the_examples_run(library, code, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # which the block of keras sets
    if library in NEEDS:
        pytest.importorskip(library, reason=f"{library} is not installed: pip install '.[compare]'")
    names: dict = {}
    exec(FIRST[1], names)
    exec(code, names)


def test_every_library_has_an_example():
    assert {library.lower() for library, _ in SECTIONS} == set(PRESETS) - {"bnresearch"}


def test_the_numbers_of_the_page():
    def noise(decay):
        return (1 - decay) / (1 + decay)

    assert [f"{noise(d):.2g}" for d in (0.1, 0.9)] == ["0.82", "0.053"]
    steps = [math.ceil(math.log(0.01) / math.log(d)) for d in (0.9, 0.99, 0.999)]
    assert steps == [44, 459, 4603]
    deviations = [math.sqrt(0.001 / (0.001 + epsilon)) for epsilon in (1e-3, 1e-5)]
    np.testing.assert_allclose(deviations, [0.71, 0.995], atol=5e-3)
    for n, unbiased, biased in [(2, 0.564, 0.798), (8, 0.903, 0.965)]:
        k = math.sqrt(2 / n) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
        np.testing.assert_allclose([k, k * math.sqrt(n / (n - 1))], [unbiased, biased], atol=6e-4)
    for number in ("0.82", "0.053", "459", "4603", "0.71", "0.564", "0.798", "0.903", "0.965"):
        assert number in TEXT
