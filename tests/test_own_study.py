"""docs/own_study.md does what it says: its files, commands and lines run as they are printed."""

import re
import shlex
import shutil

import pytest
from run_tools import DIGITS, ROOT

from bnresearch import __main__ as cli
from bnresearch import study
from bnresearch.metrics import OF_TRAINING
from bnresearch.tasks.classification import Classification

TEXT = (ROOT / "docs" / "own_study.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
STUDIES = [block for block in BLOCKS if "def get_study" in block]
NAMES = re.findall(r"`studies/(\w+\.py)`", TEXT)
COMMANDS = re.findall(r"python -m bnresearch (study .*)", TEXT)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files of the page, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "studies").mkdir()
    shutil.copy(DIGITS, tmp_path / "configs")
    for name, text in zip(NAMES, STUDIES, strict=True):
        (tmp_path / "studies" / name).write_text(text)
    return tmp_path / "studies"


def command(line, monkeypatch):
    flags = ["--launcher=inline", "--progress=off"] if line.startswith("study") else []
    monkeypatch.setattr("sys.argv", ["bnresearch", *shlex.split(line), *flags])
    assert cli.main() == 0


def test_the_first_file_is_a_page_of_twenty_lines_or_so(files):
    lines = [line for line in STUDIES[0].splitlines() if line.strip()]
    assert len(lines) < 25
    plan = study.plan(study.load(files / NAMES[0]), files / NAMES[0], "quick")
    assert f"{len(plan.runs)} runs at `quick`" in TEXT


def test_every_word_of_a_study_file_can_be_imported_from_one_place():
    table = TEXT[TEXT.index("## What a file can say") : TEXT.index("## Without training")]
    words = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", table))
    words -= {"arms", "axes", "tune", "measures", "claims", "scales", "where", "sesoi"}
    words -= {"smoke", "quick", "full"}
    # Nor are the metrics that measures can be of.
    metrics = (*Classification.METRICS, *OF_TRAINING)
    words -= {*metrics, *(f"averaged_{name}" for name in metrics)}
    assert len(words) > 15
    assert words <= set(study.__all__)


@pytest.mark.slow
def test_from_the_question_to_the_page(files, monkeypatch, capsys):
    assert len(COMMANDS) == 2
    for line in COMMANDS:
        command(line, monkeypatch)
    printed = capsys.readouterr().out
    assert "Page: " in printed
    page = files.parent / "runs" / "small_batch" / "report" / "index.html"
    assert "also in batches of 4?" in page.read_text()
    names = {}
    exec(next(block for block in BLOCKS if "load_study" in block), names)
    results = names["results"]
    assert len(results.runs) == 160
    assert list(results.verdicts["n"]) == [10, 10]
    # The second claim by hand: at 4 images, each arm at the rate with the best validation.
    verdict = results.verdicts.iloc[1]
    runs = results.runs[results.runs["images"] == 4]
    chosen = {}
    for arm in ("none", "batch"):
        of_arm = runs[runs["arm"] == arm]
        lost = (of_arm["status"] == "diverged").groupby(of_arm["rate"]).sum()
        mean = of_arm.groupby("rate")["validation/accuracy"].mean()
        rate = mean[lost == lost.min()].idxmax()
        chosen[arm] = of_arm[of_arm["rate"] == rate].set_index("seed")["test/accuracy"] * 100
    gap = chosen["none"] - chosen["batch"]
    assert verdict["estimate"] == pytest.approx(gap.mean())
    assert verdict["verdict"] == "supported" and verdict["low"] > 0


def test_a_study_without_training(files, monkeypatch):
    command(f"study studies/{NAMES[1]} --scale=quick --out=runs/shrinkage", monkeypatch)
    command("report runs/shrinkage", monkeypatch)
    from bnresearch import load_study

    results = load_study("runs/shrinkage")
    assert list(results.verdicts["verdict"]) == ["supported", "supported"]
    # The mean of 50,000 variances of pairs, each chi-squared with one degree of freedom over two:
    # its standard deviation is sqrt(2) / 2 / sqrt(50,000).
    assert results.verdicts["estimate"][0] == pytest.approx(0.5, abs=5 * 0.0032)
