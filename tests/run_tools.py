"""What the tests of whole runs and of refusals share: commands, and readers of a run's folder."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits_mlp.py")

STEPS, EVERY = 120, 5  # of the run, between checkpoints
SHORT = (
    "parallel.devices=1",
    "model.mlp.widths=(16, 12)",
    "model.mlp.dropout=0.1",  # so that the randomness of a step has to be right as well
    f"train.duration={STEPS}st",
    "train.log_every=7st",
    "train.eval_every=50st",
    f"train.checkpoint_every={EVERY}st",
)


def command(workdir, *overrides):
    flags = [f"--config.{item}" for item in (*SHORT, *overrides)]
    return ["train", f"--config={DIGITS}", f"--workdir={workdir}", *flags]


def read(path):
    return json.loads(path.read_text())


def metrics(workdir):
    """What metrics.jsonl says, without how long it took."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(x).items() if k != "images_per_second"} for x in lines]


def snapshot(workdir):
    """All files and when they changed, but for the lock, which says who looked last."""
    files = [path for path in sorted(workdir.rglob("*")) if path.name != "lock"]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in files}


def train(*overrides, config=DIGITS, workdir="run/a"):
    """The command that is to be refused."""
    short = ["train.duration=3st", "train.log_every=3st"]
    return [
        "train",
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{item}" for item in (*short, *overrides)),
    ]


def assert_one_message(text, parts, lines=1):
    assert text.startswith("error: ")
    assert text.endswith("\n")
    assert text.count("\n") == lines
    assert "Traceback" not in text
    for part in parts:
        assert part in text, text


class After:
    """An event that is set when it has been looked at so many times."""

    def __init__(self, looks):
        self.looks = looks

    def is_set(self):
        self.looks -= 1
        return self.looks < 0
