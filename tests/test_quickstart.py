"""The quickstart: the command at the end of its script, with a smaller study and another folder."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bnresearch import study

ROOT = Path(__file__).parent.parent


def script_command():
    """The command as the script has it, without the interpreter."""
    last = (ROOT / "scripts" / "quickstart.sh").read_text().splitlines()[-1]
    execute, python, *rest = shlex.split(last)
    assert (execute, python, rest[-1]) == ("exec", "$python", "$@")
    return rest[:-1]


def test_its_study_pairs_a_net_with_batchnorm_and_two_without():
    file = ROOT / script_command()[3]
    plan = study.plan(study.load(file), file, "quick")
    assert len(plan.runs) == 3 * 6 * 10
    arms = {
        run.arm: (run.resolved["norm"]["kind"], run.resolved["init"]["name"]) for run in plan.runs
    }
    assert arms == {
        "batch": ("batch", "he"),
        "none": ("none", "he"),
        "none_matched": ("none", "matched"),
    }
    rates = {run.point["rate"] for run in plan.runs}
    assert sorted(rates) == [0.01, 0.03162, 0.1, 0.3162, 1.0, 3.162]


@pytest.mark.slow
def test_it_answers_and_writes_its_page(tmp_path):
    """At scale smoke: arguments behind those of the script win."""
    command = [sys.executable, *script_command(), "--scale=smoke", f"--out={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Does BatchNorm help an MLP" in done.stdout
    assert "12 of 12 runs" in done.stderr
    results = list((tmp_path / "out" / "runs").glob("*/result.json"))
    assert len(results) == 12
    assert json.loads((tmp_path / "out" / "study.json").read_text())["scale"] == "smoke"
    assert "<html" in (tmp_path / "out" / "report" / "index.html").read_text()
