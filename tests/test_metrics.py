"""Metrics: valid JSON, nothing torn, nothing of a past that did not happen; progress for people."""

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import metrics
from bnresearch.errors import UserError


def lines(folder):
    return (folder / metrics.FILE).read_text().splitlines()


def events(folder):
    """(step, tag, value) of all TensorBoard events; a session start has the tag "START"."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted((folder / metrics.FOLDER).iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.HasField("session_log"):
                found.append((event.step, "START", None))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


# ---- Records


def test_a_record_is_one_line_with_step_epoch_split_first(tmp_path):
    with metrics.Metrics(tmp_path) as writer:
        writer.write(120, "train", {"loss": 0.5, "learning_rate": 0.1, "epoch": 5.5})
        assert lines(tmp_path) == [
            '{"step": 120, "epoch": 5.5, "split": "train", "loss": 0.5, "learning_rate": 0.1}'
        ]  # before close: it is flushed
        writer.write(np.int64(120), "validation", {"accuracy": np.float32(0.25), "count": 360})
    assert metrics.read_metrics(tmp_path / metrics.FILE) == [
        {"step": 120, "epoch": 5.5, "split": "train", "loss": 0.5, "learning_rate": 0.1},
        {"step": 120, "split": "validation", "accuracy": 0.25, "count": 360},
    ]
    assert [r["count"] for r in metrics.read_metrics(tmp_path, "validation")] == [360]


def test_numbers_of_jax_and_numpy_keep_their_value(tmp_path):
    with metrics.Metrics(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"a": jnp.float32(0.1), "b": np.ones(1), "c": jnp.int32(3)})
    (record,) = metrics.read_metrics(tmp_path)
    assert record["a"] == float(np.float32(0.1))
    assert (record["b"], record["c"]) == (1.0, 3)
    assert isinstance(record["c"], int)
    assert not (tmp_path / metrics.FOLDER).exists()


def test_what_is_not_finite_is_valid_json_and_comes_back_as_a_float(tmp_path):
    with metrics.Metrics(tmp_path) as writer:
        writer.write(1, "train", {"a": math.nan, "b": jnp.float32(jnp.inf), "c": -math.inf})
    (line,) = lines(tmp_path)

    def refuse(name):
        raise AssertionError(name)

    strict = json.loads(line, parse_constant=refuse)
    assert (strict["a"], strict["b"], strict["c"]) == ("NaN", "Infinity", "-Infinity")
    (record,) = metrics.read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)
    assert record["split"] == "train"


# ---- Resuming


def write_steps(folder, steps, resume_step=0):
    with metrics.Metrics(folder, resume_step) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": float(step)})


def test_resuming_removes_what_lies_beyond(tmp_path):
    write_steps(tmp_path, [10, 20, 30, 40])
    untouched = lines(tmp_path)[:2]
    write_steps(tmp_path, [25], resume_step=20)
    assert lines(tmp_path)[:2] == untouched
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [10, 20, 25]
    assert sorted(os.listdir(tmp_path)) == [metrics.FILE, metrics.FOLDER]


def test_resuming_where_nothing_lies_beyond_leaves_the_file(tmp_path):
    write_steps(tmp_path, [10, 20])
    before = (tmp_path / metrics.FILE).stat()
    write_steps(tmp_path, [], resume_step=20)
    after = (tmp_path / metrics.FILE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_starting_again_from_nothing_removes_all(tmp_path):
    write_steps(tmp_path, [10, 20])
    write_steps(tmp_path, [], resume_step=0)
    assert metrics.read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", [b'{"step": 30, "spl', b'{"step": 15}', b"\x00\xff", b"5"])
def test_a_torn_last_line_is_not_read_and_does_not_survive(tmp_path, torn):
    write_steps(tmp_path, [10, 20])
    with (tmp_path / metrics.FILE).open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [10, 20]
    write_steps(tmp_path, [30], resume_step=20)
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [10, 20, 30]
    assert len(lines(tmp_path)) == 3


def test_reading_what_is_no_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read metrics from .*no-such"):
        metrics.read_metrics(tmp_path / "no-such")
    (tmp_path / metrics.FILE).write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not a record"):
        metrics.read_metrics(tmp_path)


# ---- TensorBoard


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with metrics.Metrics(tmp_path) as writer:
        writer.write(1, "train", {"loss": 0.5, "epoch": 0.25})
        writer.write(2, "validation", {"loss": math.nan})
    found = events(tmp_path)
    assert found[:2] == [(1, "train/loss", 0.5), (1, "train/epoch", 0.25)]
    assert found[2][:2] == (2, "validation/loss")
    assert math.isnan(found[2][2])


def test_tensorboard_drops_what_lies_beyond_the_resumed_step(tmp_path):
    write_steps(tmp_path, [10, 20, 30])
    write_steps(tmp_path, [25], resume_step=20)
    assert len(list((tmp_path / metrics.FOLDER).iterdir())) == 2
    assert [event[:2] for event in events(tmp_path)][3:] == [(21, "START"), (25, "train/loss")]


def test_flushed_metrics_survive_a_kill(tmp_path):
    code = (
        "import os, signal, sys; from bnresearch import metrics; w = metrics.Metrics(sys.argv[1]);"
        "w.write(1, 'train', {'loss': 1.0}); w.flush(); w.write(2, 'train', {'loss': 2.0});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(metrics.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [1, 2]
    assert events(tmp_path) == [(1, "train/loss", 1.0)]


# ---- Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_lines_say_where_how_fast_and_how_long(clock):
    stream = io.StringIO()
    shown = metrics.progress("lines", stream)
    shown.start(0, 1000, "mlp")
    shown.update(100, loss=2.34567, images_per_second=12345.6)
    clock(10)
    shown.update(200, loss=1.5, images_per_second=20000.0)
    shown.line("step 200: accuracy 0.9")
    assert stream.getvalue().splitlines() == [
        "mlp  from step 0 to 1000",
        "mlp  step 100/1000  loss 2.346  12,346 images/s",
        "mlp  step 200/1000  loss 1.5  20,000 images/s  10 steps/s  1:20 left",
        "step 200: accuracy 0.9",
    ]


def test_lines_are_few_and_end_with_the_last_step(clock):
    stream = io.StringIO()
    shown = metrics.progress("lines", stream)
    shown.start(40, 100)
    for step in range(41, 101):
        clock(0.25)
        shown.update(step)
    shown.close()
    steps = [line.split("  ")[0] for line in stream.getvalue().splitlines()]
    assert steps == [
        "from step 40 to 100",
        "step 41/100",
        "step 61/100",
        "step 81/100",
        "step 100/100",
    ]


def test_the_bar_is_drawn_on_a_terminal_and_lines_stay(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = metrics.progress("auto", stream)
    assert isinstance(shown, metrics.Bar)
    shown.start(0, 200, "resnet20")
    shown.update(50, loss=0.25, images_per_second=1000.0)
    shown.line("step 50: [accuracy] 0.5")
    shown.update(200, loss=0.125)
    shown.close()
    text = stream.getvalue()
    for part in ("resnet20", "200/200", "loss 0.125", "step 50: [accuracy] 0.5"):
        assert part in text


def test_auto_is_lines_where_there_is_no_terminal():
    assert isinstance(metrics.progress("auto", io.StringIO()), metrics.Lines)


def test_off_shows_nothing(capsys):
    shown = metrics.progress("off")
    shown.start(0, 10, "x")
    shown.update(5, loss=1.0)
    shown.line("text")
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_an_unknown_display_is_refused():
    with pytest.raises(UserError, match="unknown progress display 'bars'.*bar, lines, off"):
        metrics.progress("bars")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01")]
)
def test_time_left(seconds, text):
    assert metrics.clock(seconds) == text


def test_progress_that_does_not_advance_has_no_rate(clock):
    rate = metrics._Rate()
    assert rate(5, 10) == (None, None)
    clock(1)
    assert rate(5, 10) == (None, None)
    clock(1)
    assert rate(9, 10) == (2.0, 0.5)


def test_events_do_not_import_torch(tmp_path):
    """Where it is installed: that would take a second."""
    code = f"""
import sys
from pathlib import Path
from bnresearch.metrics import Metrics
with Metrics(Path({str(tmp_path)!r})) as metrics:
    metrics.write(1, "train", {{"loss": 1.0}})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
