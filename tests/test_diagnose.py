"""docs/diagnose.md is carried out as it stands, and what it says is compared with what happens."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from bnresearch import __main__ as cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "diagnose.md").read_text()
COMMAND = "python -m bnresearch "
CLOSE = 0.04  # in accuracy: other processors round otherwise, and 108 steps make more of it


def commands():
    """(arguments, the remark below) of every command of the page, in order."""
    found = []
    lines = [line.strip() if line.startswith("    ") else "" for line in PAGE.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(COMMAND):
            remark = following.removeprefix("# ") if following.startswith("# ") else ""
            found.append((shlex.split(line.removeprefix(COMMAND)), remark))
    return found


def printed_block(beginning):
    """The indented block of the page that begins so, without its indent."""
    block = re.search(rf"^    {beginning}.*(?:\n(?:    .*)?)*", PAGE, re.MULTILINE)[0]
    return "\n".join(line.removeprefix("    ") for line in block.splitlines()).strip()


def headings(text):
    """Severity, title, check and sites of the findings in a table."""
    return re.findall(r"([A-Z]+)  (.*)  \[(\w+)\]\n  where     (.*)", text)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_run_of_the_tour_breaks_and_is_mended(elsewhere, monkeypatch, capsys):
    told = []
    for argv, remark in commands():
        monkeypatch.setattr(sys, "argv", ["bnresearch", *argv, "--config.parallel.devices=1"])
        if argv[0] != "train":
            monkeypatch.setattr(sys, "argv", ["bnresearch", *argv])
        assert cli.main() == 0
        out = capsys.readouterr().out
        told.append((argv[0], remark, out))
        if remark.startswith("accuracy"):
            wanted = float(re.search(r"accuracy ([\d.]+)", remark)[1])
            assert json.loads(out)["accuracy"] == pytest.approx(wanted, abs=CLOSE)
        elif remark:
            assert remark in out
    doctors = [out for verb, _, out in told if verb == "doctor"]
    assert len(doctors) == 3
    assert headings(doctors[0]) == headings(printed_block("3 norms, 3 of them"))
    # Each file that the page shows is one that the doctor made.
    shown = re.findall(r"images/diagnose_(\w+)\.png", PAGE)
    assert shown == ["losses", "statistics", "features"]
    for name in shown:
        assert (elsewhere / "runs/broken/doctor" / f"{name}.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_model_of_the_tour_is_mended(elsewhere, capsys):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    scope = {"__name__": "tour"}
    exec(compile(code, "docs/diagnose.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert headings(printed) == headings(printed_block("2 norms, 2 of them"))
    assert scope["before"] == pytest.approx(0.813, abs=0.1)
    assert scope["after"] == pytest.approx(0.992, abs=0.02)
    assert (elsewhere / "runs/own_model/index.html").is_file()
