"""What a run reports: lines in metrics.jsonl and probes.jsonl, TensorBoard events, and progress for
whoever watches.

A line of metrics.jsonl is one record, flushed at once:

    {"step": 120, "epoch": 5.7, "split": "train", "loss": 0.41, "learning_rate": 0.1, ...}
    {"step": 120, "epoch": 5.7, "split": "validation", "loss": 0.52, "accuracy": 0.87, "count": 360}

A line of probes.jsonl is what a probe found at one site; there is no such file without probes:

    {"step": 120, "probe": "gradients", "site": "norm2", "depth": 2, "norm": 0.031, ...}

How NaN is written: see `jsonl`. This module imports neither jax nor flax.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from bnresearch.errors import lookup
from bnresearch.jsonl import Log, number, read, truncate

FILE = "metrics.jsonl"
PROBES = "probes.jsonl"
FOLDER = "tensorboard"
FLUSH_SECONDS = 10.0  # how long TensorBoard events may wait; a flush is an fsync


PLACE = ("step", "probe", "site", "depth")  # of a record of probes; the rest are numbers

# What the records of the split "train" hold besides step and epoch.
OF_TRAINING = ("loss", "learning_rate", "gradient_norm", "weight_norm", "images_per_second")


class Metrics:
    """Writes the metrics of one run.

    Args:
      workdir: the run folder.
      resume_step: the step of the state the run goes on from, 0 for a new run. Records beyond it
        are of a past that did not happen: they are removed, and TensorBoard drops its own.
      tensorboard: whether to write TensorBoard events as well.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0, tensorboard: bool = True):
        path, self._looked = Path(workdir) / FILE, Path(workdir) / PROBES
        resumed = path.exists()
        if resumed:
            truncate(path, resume_step)
        if self._looked.exists():
            # A run that begins anew looks at step 0 again; one that goes on has that behind it.
            truncate(self._looked, resume_step or -1)
        self._logs = {FILE: Log(path)}
        purge_step = resume_step + 1 if resumed else None
        self._events = _Events(Path(workdir) / FOLDER, purge_step) if tensorboard else None

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Adds one record; ``values`` are numbers, also of numpy or jax if of size 1."""
        numbers = {name: number(value) for name, value in values.items()}
        first = {"step": int(step), **({"epoch": numbers["epoch"]} if "epoch" in numbers else {})}
        self._logs[FILE].write(first | {"split": split} | numbers)
        if self._events is not None:
            self._events.add(step, {f"{split}/{name}": value for name, value in numbers.items()})

    def write_probe(self, step: int, probe: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds what a probe found: a record for each of its ``rows`` of site, depth and numbers."""
        if PROBES not in self._logs:
            self._logs[PROBES] = Log(self._looked)
        shown: dict[str, float] = {}
        for row in rows:
            self._logs[PROBES].write({"step": int(step), "probe": probe, **row})
            place = "/".join(["probes", probe, *([row["site"]] if row["site"] else [])])
            shown |= {f"{place}/{name}": number(row[name]) for name in row if name not in PLACE}
        if self._events is not None:
            self._events.add(step, shown)

    def flush(self) -> None:
        """Puts everything on disk; before a checkpoint, so that no record before it is lost."""
        for log in self._logs.values():
            log.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path, split: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, oldest first.

    Args:
      path: metrics.jsonl or the run folder. A last line that is not complete (the run goes on, or
        was killed while writing it) is left out.
      split: "train", "validation", ...: only these records.

    Raises:
      UserError: there is no such file, or a line before the last is no record.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    return [record for record in read(path, "metrics") if split in (None, record.get("split"))]


def read_probes(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run's probes, oldest first; of the file or the run folder.

    Raises:
      UserError: there is no such file, or a line before the last is no record.
    """
    return read(Path(path) / PROBES if Path(path).is_dir() else Path(path), "probes")


class _Events:
    """A TensorBoard event file.

    Written through tensorboardX's event classes, not its SummaryWriter: that one puts a queue and
    threads before the file, loses what is queued when a run is killed, and warns of every NaN.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        with _hidden("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        # Names have whole seconds, and opening one truncates it: nanoseconds keep restarts apart.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        if purge_step is not None:
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(purge_step, session_log=log)
        self._writer.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        items = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step, summary=self._summary(value=items))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """As if a module were not installed: tensorboardX imports torch where it is, to recognise its
    arrays, which takes a second of every start."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# ---- Progress


class Progress(Protocol):
    """How a run shows that it moves."""

    def start(self, step: int, total: int, description: str = "") -> None:
        """The run stands at ``step`` of ``total``."""

    def update(
        self, step: int, loss: float | None = None, images_per_second: float | None = None
    ) -> None:
        """``step`` steps are done. Cheap: call it as often as the numbers are known."""

    def line(self, text: str) -> None:
        """Shows a line that stays, such as an evaluation."""

    def close(self) -> None:
        """Ends the display."""


def progress(kind: str = "auto", stream: TextIO | None = None) -> Progress:
    """A progress display.

    Args:
      kind: "bar", "lines" or "off"; "auto" is a bar on a terminal and lines elsewhere.
      stream: where to, stderr by default, so that what a command prints can be piped.
    """
    check_progress(kind)
    stream = sys.stderr if stream is None else stream
    if kind == "auto":
        kind = "bar" if stream.isatty() else "lines"
    return PROGRESS[kind](stream)


def check_progress(kind: str) -> None:
    """Refuses an unknown kind of display, before anything is written."""
    lookup({"auto": None, **PROGRESS}, kind, "progress display")


class _Rate:
    """Steps per second and seconds left, from the first update on: compilation lies before it."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def __call__(self, step: int, total: int) -> tuple[float | None, float | None]:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        steps, seconds = step - self._first[0], now - self._first[1]
        if steps <= 0 or seconds <= 0:
            return None, None
        return steps / seconds, (total - step) * seconds / steps


class Off:
    """Shows nothing."""

    def __init__(self, stream: TextIO):
        del stream

    def start(self, step: int, total: int, description: str = "") -> None:
        pass

    def update(
        self, step: int, loss: float | None = None, images_per_second: float | None = None
    ) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """Plain lines, one every few seconds, for logs."""

    def __init__(self, stream: TextIO, every: float = 5.0):
        self._stream, self._every = stream, every
        self._printed = float("-inf")
        self._waiting: str | None = None
        self._rate = _Rate()
        self._total, self._description = 0, ""

    def start(self, step: int, total: int, description: str = "") -> None:
        self._rate, self._total, self._description = _Rate(), total, description
        self.line(_join(description, f"from step {step} to {total}"))

    def update(
        self, step: int, loss: float | None = None, images_per_second: float | None = None
    ) -> None:
        steps_per_second, left = self._rate(step, self._total)
        shown = _shown(loss, images_per_second, steps_per_second, left)
        self._waiting = _join(self._description, f"step {step}/{self._total}", *shown)
        if time.monotonic() - self._printed >= self._every:
            self._print()

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._print()  # where the run ended is always worth a line

    def _print(self) -> None:
        if self._waiting is not None:
            self.line(self._waiting)
            self._waiting, self._printed = None, time.monotonic()


class Bar:
    """A bar on a terminal, redrawn in place."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        self._bar = RichProgress(*columns, console=Console(file=stream), refresh_per_second=4)
        self._task: Any = None
        self._rate = _Rate()
        self._total = 0

    def start(self, step: int, total: int, description: str = "") -> None:
        self._rate, self._total = _Rate(), total
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(description, total=total, completed=step, shown="")
        self._bar.start()

    def update(
        self, step: int, loss: float | None = None, images_per_second: float | None = None
    ) -> None:
        steps_per_second, left = self._rate(step, self._total)
        shown = _join(*_shown(loss, images_per_second, steps_per_second, left))
        self._bar.update(self._task, completed=step, shown=shown)

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


PROGRESS: dict[str, Callable[[TextIO], Progress]] = {"bar": Bar, "lines": Lines, "off": Off}


def _shown(
    loss: float | None,
    images_per_second: float | None,
    steps_per_second: float | None,
    left: float | None,
) -> list[str]:
    return [
        *([] if loss is None else [f"loss {loss:.4g}"]),
        *([] if images_per_second is None else [f"{images_per_second:,.0f} images/s"]),
        *([] if steps_per_second is None else [f"{steps_per_second:.3g} steps/s"]),
        *([] if left is None else [f"{clock(left)} left"]),
    ]


def _join(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
