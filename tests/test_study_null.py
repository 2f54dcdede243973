"""A real null study: two arms that are the same but for their seeds, from its file to verdicts."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from bnresearch import lab, records

FILE = Path(__file__).parents[1] / "configs/studies/null.py"
SEEDS = 20

# The study is run once, if one worker has all tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("null study")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("null")
    lab.run_study(FILE, "quick", folder, launcher="inline", show="off")
    return folder


@pytest.fixture(scope="module")
def results(out):
    return records.load_study(out)


def differences(results, metric, factor=1.0):
    """left - right by seed, from the results of the runs."""
    values = {(run.arm, run.seed): run.result["metrics"]["test"][metric] for run in results.records}
    pairs = [values["left", seed] - values["right", seed] for seed in range(SEEDS)]
    return factor * np.array(pairs)


def exact_sign_flip_p(x):
    """Two-sided, over all 2**n signs."""
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums + value, sums - value])
    return np.mean(np.abs(sums) >= abs(x.sum()) - 1e-9)


def test_the_arms_differ_in_nothing_but_their_seeds(results):
    def rest(run):
        return {key: value for key, value in run.config.items() if key != "seed"}

    assert {run.status for run in results.records} == {"done"}
    assert all(rest(run) == rest(results.records[0]) for run in results.records)
    seeds = {
        arm: [run.config["seed"] for run in results.records if run.arm == arm]
        for arm in ("left", "right")
    }
    assert seeds == {"left": [*range(20)], "right": [*range(1000, 1020)]}


@pytest.mark.parametrize(("number", "metric", "factor"), [(0, "accuracy", 100), (1, "loss", 1)])
def test_no_difference_is_found(results, number, metric, factor):
    verdict = results.definition["verdicts"][number]
    found = differences(results, metric, factor)
    assert verdict["verdict"] == "inconclusive"
    assert verdict["n"] == SEEDS and len(verdict["runs"]) == 2 * SEEDS
    assert verdict["estimate"] == pytest.approx(found.mean(), abs=1e-9)
    half = scipy.stats.t.ppf(0.975, SEEDS - 1) * found.std(ddof=1) / SEEDS**0.5
    assert verdict["low"] == pytest.approx(found.mean() - half, abs=1e-9)
    assert verdict["high"] == pytest.approx(found.mean() + half, abs=1e-9)
    assert verdict["low"] < 0 < verdict["high"]
    # 2**20 flips are drawn from, not listed: 100,000 of them leave a standard error of 0.0016.
    assert verdict["p_zero"] == pytest.approx(exact_sign_flip_p(found), abs=0.01)
    assert verdict["p_holm"] > 0.05


def test_they_are_equivalent_within_the_margin(results):
    verdict = results.definition["verdicts"][2]
    found = differences(results, "accuracy", 100)
    error = found.std(ddof=1) / SEEDS**0.5
    above = scipy.stats.t.sf((found.mean() + 2) / error, SEEDS - 1)
    below = scipy.stats.t.cdf((found.mean() - 2) / error, SEEDS - 1)
    assert verdict["p"] == pytest.approx(max(above, below), rel=1e-6)
    assert verdict["p_holm"] == pytest.approx(3 * max(above, below), rel=1e-6)  # of three claims
    assert verdict["verdict"] == ("supported" if 3 * max(above, below) <= 0.05 else "inconclusive")


def test_the_files_alone_give_the_same_verdicts(results):
    again = [verdict.to_json() for verdict in records.conclude(results)]
    assert again == results.definition["verdicts"]


def test_the_same_command_again_trains_nothing_and_says_the_same(out, results):
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    definition = lab.run_study(FILE, "quick", out, launcher="inline", show="off")
    assert definition["verdicts"] == results.definition["verdicts"]
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")} == before
    assert len(before) == 2 * SEEDS
