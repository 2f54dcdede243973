"""What can go wrong, as three exceptions that the command line turns into exit codes."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

SHOWN = 3  # how many runs a message names that failed for one reason


class UserError(ValueError):
    """The input was wrong. The message says what was given, why not, and what to do (exit 2)."""


class NotFinite(UserError):
    """What was given leads to numbers that are not finite."""


class InUse(UserError):
    """Another process is at this run folder now; later it will not be."""


class Diverged(Exception):
    """The loss or a statistic is no longer finite (exit 3)."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"diverged at step {step}: {reason}")
        self.step, self.reason = step, reason


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command goes on (exit 75)."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}, state saved: run the same command to go on")
        self.step = step


class SweepStopped(Stopped):
    """A sweep was asked to stop; its runs have saved their states (exit 75)."""

    def __init__(self, left: int):
        Exception.__init__(
            self, f"stopped with {left} runs to go, states saved: run the same command to go on"
        )
        self.step = 0


class JobsGoOn(SweepStopped):
    """Nobody follows the jobs of a cluster any more; they go on by themselves (exit 75)."""

    def __init__(self, left: int):
        Exception.__init__(
            self,
            f"stopped following, runs to go: {left}; the jobs go on: the same command follows them "
            "again, with --cancel it ends them",
        )
        self.step = 0


class JobsCancelled(SweepStopped):
    """The jobs of a cluster were cancelled (exit 75)."""

    def __init__(self, count: int):
        Exception.__init__(
            self,
            f"jobs cancelled: {count}; what their runs have saved is kept: run the same command to "
            "submit them again",
        )
        self.step = 0


class RunsFailed(Exception):
    """A sweep came to its end, but some of its runs did not, or cannot be read (exit 1)."""

    def __init__(self, failed: Mapping[str, str]):
        runs: dict[str, list[str]] = {}
        for name, reason in failed.items():
            runs.setdefault(reason, []).append(name)
        lines = [f"  {reason} (run{_few(names)})" for reason, names in runs.items()]
        count = "1 run has" if len(failed) == 1 else f"{len(failed)} runs have"
        super().__init__(
            f"{count} no result; the same command tries again what failed, not what is damaged "
            "(move it away first):\n" + "\n".join(lines)
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{'s' * (len(names) > 1)} {', '.join(names[:SHOWN])}{more}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known names nearest to ``name``, or lists them all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


NONE: Mapping[str, str] = {}


def lookup(table: Mapping[str, T], name: str, what: str, meant: Mapping[str, str] = NONE) -> T:
    """``table[name]``, or a UserError that lists the known names of ``what``.

    ``meant`` says what to write instead of names that others use for the same thing.
    """
    if name not in table:
        hint = meant.get(str(name).lower().replace("-", "_"))
        close = difflib.get_close_matches(str(name), table, n=1, cutoff=0.6)
        if hint or close:
            hint = f"; did you mean {hint or close[0]}?"
        known = ", ".join(sorted(table))
        raise UserError(f"unknown {what} {name!r}; choose one of: {known}{hint or ''}")
    return table[name]
