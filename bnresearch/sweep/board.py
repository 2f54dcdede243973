"""What a sweep shows: a live table on a terminal, lines every few seconds elsewhere; on stderr."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bnresearch.errors import lookup
from bnresearch.metrics import clock
from bnresearch.sweep.jobs import Job

STATES = ("done", "running", "diverged", "failed", "waiting")
ENDED = ("done", "diverged", "failed")
LINE_EVERY = 5.0  # seconds between lines where there is no terminal


class Tally:
    """How many runs of each arm are in which state, and how fast they come to an end.

    Args:
      jobs: all runs of the sweep.
      ended: the state of those that had ended before it began.
    """

    def __init__(self, jobs: Iterable[Job], ended: dict[str, str]):
        self.arms = {job.id: job.arm for job in jobs}
        self.states = {job: ended.get(job, "waiting") for job in self.arms}
        self.total, self.skipped = len(self.arms), len(ended)
        self._finished = 0
        self._first: float | None = None

    def move(self, job: str, state: str) -> None:
        """A job is in another state now."""
        self.states[job] = "waiting" if state == "stopped" else state
        if state in ENDED:
            self._finished += 1
            self._first = self._first or time.monotonic()

    def rows(self) -> dict[str, Counter[str]]:
        """Arm -> state -> how many."""
        rows: dict[str, Counter[str]] = {arm: Counter() for arm in self.arms.values()}
        for job, state in self.states.items():
            rows[self.arms[job]][state] += 1
        return rows

    def counts(self) -> Counter[str]:
        return Counter(self.states.values())

    def progress(self) -> str:
        """ "41 of 100 runs, 7.9 runs/s, 0:08 left". The rate counts from the end of the first run
        on: what compilation took says nothing about the rest."""
        ended = self.skipped + self._finished
        parts = [f"{ended} of {self.total} runs"]
        seconds = time.monotonic() - (self._first or 0.0)
        if self._finished > 1 and seconds > 0:
            rate = (self._finished - 1) / seconds
            shown = f"{rate:.3g} runs/s" if rate >= 1 else f"{1 / rate:.3g} s/run"
            parts += [shown, f"{clock((self.total - ended) / rate)} left"]
        return ", ".join(parts)


class Board(Protocol):
    """How a sweep shows that it moves."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> None: ...

    def refresh(self) -> None:
        """The tally may have changed. Cheap: call it as often as you like."""

    def say(self, text: str) -> None:
        """Shows a line that stays."""


class Off:
    """Shows nothing but what workers say."""

    def __init__(self, tally: Tally, console: Console):
        self.tally, self.console = tally, console

    def __enter__(self) -> "Off":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def refresh(self) -> None:
        pass

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Lines(Off):
    """Plain lines, one every few seconds, for logs."""

    def __init__(self, tally: Tally, console: Console):
        super().__init__(tally, console)
        self._printed = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._line()

    def refresh(self) -> None:
        if time.monotonic() - self._printed >= LINE_EVERY:
            self._line()

    def _line(self) -> None:
        counts = self.tally.counts()
        others = [f"{counts[state]} {state}" for state in STATES[1:4] if counts[state]]
        self.say(", ".join([self.tally.progress(), *others]))
        self._printed = time.monotonic()


class Bar(Off):
    """A table on a terminal, redrawn in place: a row per arm, below them rate and time left."""

    def __init__(self, tally: Tally, console: Console):
        super().__init__(tally, console)
        self._live = Live(
            get_renderable=self._table, console=console, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> "Bar":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def _table(self) -> Group:
        table = Table("arm", *STATES, box=None, padding=(0, 2, 0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        for arm, states in list(self.tally.rows().items()):
            table.add_row(Text(arm), *(str(states[state] or "") for state in STATES))
        return Group(table, Text(self.tally.progress()))


BOARDS = {"bar": Bar, "lines": Lines, "off": Off}


def board(kind: str, tally: Tally, console: Console | None = None) -> Board:
    """A display: "bar", "lines" or "off"; "auto" is a bar on a terminal and lines elsewhere."""
    console = console or Console(stderr=True)
    if kind == "auto":
        kind = "bar" if console.is_terminal else "lines"
    return lookup(BOARDS, kind, "progress display")(tally, console)
