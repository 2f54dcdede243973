"""The report: numbers against hand-worked ones, and a page made from run folders alone."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from bnresearch import report, verdict
from bnresearch.verdict import Interval

PAGE = {
    "question": "Does BatchNorm help?",
    "treatment": "batch",
    "control": "none",
    "command": "scripts/quickstart.sh --seeds=3",
    "seconds": 12.3,
}


def fake_run(folder, arm, rate, seed, test=None, validation=None, status="done"):
    """A run folder as a run leaves it; accuracies in percent."""
    run = folder / f"{arm}-lr{rate:g}-seed{seed}"
    run.mkdir(parents=True)
    config = {
        "seed": seed,
        "norm": {"kind": arm},
        "optim": {"learning_rate": rate},
        "data": {"name": "digits"},
        "model": {"name": "mlp"},
    }
    state = {
        "status": status,
        "step": 20,
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "0123abc",
        "versions": {"jax": "0.10.2", "python": "3.11.7"},
        "device": {"kind": "cpu", "count": 1},
    }
    (run / "config.json").write_text(json.dumps(config))
    (run / "status.json").write_text(json.dumps(state))
    rows = []
    for step in (10, 20):
        row = {"step": step, "epoch": step / 10}
        rows.append({**row, "split": "train", "loss": 2.0 / step + 0.01 * seed})
        rows.append({**row, "split": "validation", "loss": 1.0, "accuracy": step / 20 * 0.9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"schema": 1, "status": status, "step": 20}
    if status == "done":
        scores = {"validation": test if validation is None else validation, "test": test}
        result["metrics"] = {k: {"accuracy": v / 100, "count": 100} for k, v in scores.items()}
        result["seconds"] = 1.5
    if status in ("done", "diverged"):
        (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def runs(tmp_path):
    """Two arms, two rates, three seeds; without norm, one run diverges and one is unfinished."""
    for seed, (slow, fast) in enumerate([(90, 97), (91, 98), (92, 99)]):
        fake_run(tmp_path, "batch", 0.1, seed, test=slow, validation=99)
        fake_run(tmp_path, "batch", 1.0, seed, test=fast, validation=95)
    for seed, accuracy in enumerate([88, 90, 89]):
        fake_run(tmp_path, "none", 0.1, seed, test=accuracy)
    fake_run(tmp_path, "none", 1.0, 0, test=60, validation=100)
    fake_run(tmp_path, "none", 1.0, 1, status="diverged")
    fake_run(tmp_path, "none", 1.0, 2, status="running")
    return tmp_path


@pytest.fixture
def table(runs):
    return verdict.cells(verdict.collect(runs))


def cell(table, arm, rate):
    return next(c for c in table if (c.arm, c.rate) == (arm, rate))


def test_interval_of_five_numbers_is_the_tabulated_one():
    # mean 3, s = sqrt(2.5), t(0.975; 4) = 2.776445 from the tables: 3 +- 2.776445 * sqrt(2.5 / 5)
    mean, low, high, n = verdict.interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(0.5)
    np.testing.assert_allclose([mean, low, high], [3, 3 - half, 3 + half], rtol=1e-6)
    assert n == 5


def test_interval_of_equal_numbers_has_no_width():
    assert verdict.interval([10.0] * 5) == Interval(10, 10, 10, 5)


def test_one_value_has_a_mean_and_no_interval():
    mean, low, high, n = verdict.interval([7])
    assert (mean, n) == (7, 1)
    assert math.isnan(low)
    assert math.isnan(high)


def test_no_value_has_nothing():
    assert math.isnan(verdict.interval([]).mean)
    assert verdict.interval([]).n == 0


def test_interval_covers_the_true_mean_in_95_percent_of_samples():
    rng = np.random.default_rng(0)
    hits = [x.low < 2 < x.high for x in map(verdict.interval, rng.normal(2, 3, (4000, 5)))]
    assert abs(np.mean(hits) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_collect_sorts_and_reads_every_run(runs):
    records = verdict.collect(runs)
    keys = [(r.arm, r.rate, r.seed) for r in records]
    assert len(records) == 12
    assert keys == sorted(keys)
    assert records[0].accuracy("test") == pytest.approx(90)
    assert records[0].curve("validation", "accuracy") == {10: 0.45, 20: 0.9}


def test_folders_that_are_no_runs_are_passed_over(runs):
    (runs / "report").mkdir()
    (runs / "notes.txt").write_text("hello")
    assert len(verdict.collect(runs)) == 12


def test_torn_last_line_of_metrics_is_left_out(tmp_path):
    run = fake_run(tmp_path, "batch", 0.1, 0, test=90)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "spl')
    assert list(verdict.read(run).curve("train", "loss")) == [10, 20]


def test_diverged_and_unfinished_runs_are_counted_and_not_averaged(table):
    broken = cell(table, "none", 1.0)
    assert (len(broken.done), broken.diverged, broken.unfinished) == (1, 1, 1)
    assert broken.accuracy("test").mean == pytest.approx(60)
    assert broken.accuracy("test").n == 1


def test_best_rate_is_chosen_on_validation_not_on_test(table):
    assert cell(table, "batch", 1.0).accuracy("test").mean > 97
    assert verdict.best(table, "batch").rate == 0.1


def test_rate_with_fewer_diverged_runs_is_better_whatever_its_accuracy(table):
    assert cell(table, "none", 1.0).accuracy("validation").mean > 99
    assert verdict.best(table, "none").rate == 0.1


def test_best_rate_at_the_end_of_its_range_is_said_to_be(table):
    assert verdict.edge(table, verdict.best(table, "batch")) == "the lowest tried"
    assert verdict.edge(table, cell(table, "batch", 1.0)) == "the highest tried"
    assert verdict.edge([cell(table, "batch", 1.0)], cell(table, "batch", 1.0)) == ""


def test_best_of_an_arm_that_never_finished_is_none(tmp_path):
    fake_run(tmp_path, "none", 0.1, 0, status="diverged")
    assert verdict.best(verdict.cells(verdict.collect(tmp_path)), "none") is None


def test_difference_is_paired_by_seed(table):
    # 90-88, 91-90, 92-89 = 2, 1, 3: mean 2, s = 1, t(0.975; 2) = 4.302653
    gap = verdict.compare(table, "batch", "none").at_best
    half = 4.302653 / math.sqrt(3)
    np.testing.assert_allclose(gap[:3], [2, 2 - half, 2 + half], rtol=1e-6)
    assert gap.n == 3


def test_difference_uses_only_seeds_that_finished_in_both(table):
    gaps = verdict.compare(table, "batch", "none").at_same
    assert list(gaps) == [0.1, 1.0]
    assert gaps[1.0].n == 1
    assert gaps[1.0].mean == pytest.approx(97 - 60)


@pytest.mark.parametrize(
    ("treatment", "control", "words"),
    [
        ([95, 96, 97], [90, 91, 92.5], "Yes: BatchNorm raises"),
        ([90, 91, 92.5], [95, 96, 97], "No: BatchNorm lowers"),
        ([90, 95, 91], [91, 92, 93], "Undecided: these seeds do not show that BatchNorm changes"),
        ([90], [91], "No answer: fewer than two seeds"),
    ],
)
def test_answer_follows_from_the_interval(tmp_path, treatment, control, words):
    for arm, values in (("batch", treatment), ("none", control)):
        for seed, value in enumerate(values):
            fake_run(tmp_path, arm, 0.1, seed, test=value)
    table = verdict.cells(verdict.collect(tmp_path))
    assert verdict.answer(verdict.compare(table, "batch", "none")).startswith(words)


def test_answer_names_difference_interval_and_n(table):
    text = verdict.answer(verdict.compare(table, "batch", "none"))
    assert "no norm, each at its best learning rate: +2.00 points" in text
    assert "(95 % interval -0.48 to 4.48, 3 seeds, paired)" in text
    assert text.endswith("; 1 of 6 no norm runs diverged.")
    assert "+37" not in text, "a difference of one single pair"


def test_page_says_what_a_reader_has_to_know(runs, tmp_path):
    out = tmp_path / "report"
    page = report.write(out, verdict.collect(runs), **PAGE)
    text = page.read_text()
    assert page == out / "index.html"
    for needed in (
        "Does BatchNorm help?",
        "scripts/quickstart.sh --seeds=3",
        "12.3 s",
        "95 % interval",
        "n&nbsp;=&nbsp;3",
        "0123abc",
        "jax 0.10.2",
        "kind cpu",
        "2026-01-02",
        "digits",
        "10 of 12",
        "1 diverged, 1&nbsp;unfinished",
        "100 validation, 100 test",
    ):
        assert needed in text, needed


def test_page_needs_no_network_and_names_no_machine_path(runs, tmp_path):
    out = tmp_path / "report"
    text = report.write(out, verdict.collect(runs), **PAGE).read_text()
    assert str(tmp_path) not in text
    assert not re.search(r"https?://|//[a-z]|<script|@import", text)
    pictures = re.findall(r'src="([^"]+)"', text)
    assert sorted(pictures) == sorted(p.name for p in out.glob("*.png"))
    for picture in pictures:
        with Image.open(out / picture) as image:
            assert image.width >= 1200
            assert np.ptp(np.asarray(image.convert("L"))) > 200, "an empty picture"


def test_page_escapes_what_it_is_given(runs, tmp_path):
    text = report.write(tmp_path / "report", verdict.collect(runs), **PAGE | {"command": "<b>&"})
    assert "&lt;b&gt;&amp;" in text.read_text()


def test_page_of_nothing_but_diverged_runs(tmp_path):
    for arm in ("batch", "none"):
        fake_run(tmp_path, arm, 0.1, 0, status="diverged")
    text = report.write(tmp_path / "report", verdict.collect(tmp_path), **PAGE).read_text()
    assert "No answer" in text
    assert "0 of 2" in text


def test_curve_is_the_mean_over_seeds_with_its_band(table):
    figure = report.curve_figure(table, "train", "loss", "training loss")
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [1, 2])
    # losses 2 / step + 0.01 * seed over seeds 0, 1, 2, averaged as logarithms
    logs = np.log([0.20, 0.21, 0.22])
    np.testing.assert_allclose(line.get_ydata()[0], math.exp(logs.mean()))
    top = math.exp(logs.mean() + 4.302653 * logs.std(ddof=1) / math.sqrt(3))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(top, rel=1e-6)


def test_rate_figure_counts_the_diverged(table):
    figure = report.rate_figure(table)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no norm: 1 of 3 diverged"]
    assert figure.axes[0].get_xlabel() == "learning rate"
    assert figure.axes[0].get_ylabel() == "test accuracy (%)"
