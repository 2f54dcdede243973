"""The first question: does BatchNorm help an MLP on real handwritten digits?

Two arms (BatchNorm and no norm) x learning rates x seeds, one run after the other, each in a run
folder of its own; then a table and a page with pictures. Runs that are done are not done again.
"""

import argparse
import itertools
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnresearch import config as configs
from bnresearch import report, train, verdict
from bnresearch.errors import Diverged, Stopped, UserError

QUESTION = "Does BatchNorm help an MLP to read handwritten digits?"
TREATMENT, CONTROL = "batch", "none"
CONFIG = Path(__file__).parent.parent / "configs" / "digits_mlp.py"
LINE_EVERY = 5.0  # seconds between lines of progress where there is no terminal


class Run(NamedTuple):
    """One run of the grid."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.rate:g}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        return [
            f"norm.kind={self.arm}",
            f"optim.learning_rate={self.rate}",
            f"seed={self.seed}",
            "parallel.devices=1",  # a batch of 60 small images is no work for more
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, answers the question, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    try:
        answer_question(options, shlex.join(["scripts/quickstart.sh", *argv]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt):
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 75
    return 0


def answer_question(options: argparse.Namespace, command: str) -> None:
    """Runs what is missing, prints the table and writes the page.

    Raises:
      UserError: an option is wrong, or ``options.out`` holds runs of another config.
      Stopped: SIGTERM or Ctrl-C; finished runs stay, the running one is saved.
    """
    started = time.monotonic()
    runs = [
        Run(*setting)
        for setting in itertools.product((TREATMENT, CONTROL), options.rates, range(options.seeds))
    ]
    train_all(runs, options.config, options.out, command)
    names = {run.name for run in runs}
    records = [record for record in verdict.collect(options.out) if record.name in names]
    page = report.write(
        options.out / "report",
        records,
        question=QUESTION,
        treatment=TREATMENT,
        control=CONTROL,
        command=command,
        seconds=time.monotonic() - started,
    )
    show(verdict.cells(records))
    print(f"\nPage with learning curves: {page}")


def train_all(runs: Sequence[Run], config: Path, out: Path, command: str) -> None:
    """Brings every run to its end; one that diverges is a result, not a failure."""
    done = [run for run in runs if (out / run.name / "result.json").exists()]
    with progress(len(done), len(runs)) as advance:
        for run in runs:
            try:
                settings = configs.load(config, run.overrides)
                train.run(settings, out / run.name, show="off", command=shlex.split(command))
            except Diverged:
                pass  # counted in the table
            if run not in done:
                advance(run.name)


@contextmanager
def progress(done: int, total: int) -> Iterator[Callable[[str], None]]:
    """A bar with the time left on a terminal, a line every few seconds elsewhere; on stderr."""
    console = Console(stderr=True)
    columns = TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=total, completed=done)
        lines = Lines(console, done, total)

        def advance(name: str) -> None:
            bar.advance(task)
            if not console.is_terminal:
                lines.advance(name)

        yield advance


class Lines:
    """Progress for logs: a line every few seconds, and one at the end."""

    def __init__(self, console: Console, done: int, total: int):
        self.console, self.count, self.total = console, done, total
        self.first: tuple[int, float] | None = None
        self.printed = time.monotonic()

    def advance(self, name: str) -> None:
        self.count += 1
        now = time.monotonic()
        if self.first is None:
            self.first = self.count, now  # what compilation took says nothing about the rest
        elif now - self.printed > LINE_EVERY or self.count == self.total:
            left = (now - self.first[1]) / (self.count - self.first[0]) * (self.total - self.count)
            text = f"{self.count} of {self.total} runs done ({name}), {left:.0f} s left"
            self.console.print(text, highlight=False, soft_wrap=True)
            self.printed = now


def show(table: Sequence[verdict.Cell]) -> None:
    """Prints the table and the answer."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    grid = Table(title=QUESTION, box=box.SIMPLE_HEAD, title_justify="left")
    grid.add_column("arm", no_wrap=True)
    for head in ("learning rate", "test accuracy %", "95 % interval", "n", "diverged"):
        grid.add_column(head, justify="right", no_wrap=True)
    comparison = verdict.compare(table, TREATMENT, CONTROL)
    for cell in table:
        test = cell.accuracy("test")
        grid.add_row(
            verdict.label(cell.arm),
            f"{cell.rate:g}{' *' if cell is comparison.best[cell.arm] else '  '}",
            verdict.percent(test.mean),
            verdict.bounds(test),
            str(test.n),
            str(cell.diverged),
        )
    console.print(grid)
    console.print("* the arm's best rate, chosen on validation\n", highlight=False)
    console.print(verdict.answer(comparison), highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart.sh",
        description=f"{QUESTION} Trains an MLP with and without BatchNorm and writes a page.",
        epilog="Paths are relative to the repository. Exit codes: 0 done, 2 wrong input, "
        "75 stopped: the same command goes on.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/quickstart"), help="folder for runs and report")
    add("--config", type=Path, default=CONFIG, help="config file (default: configs/digits_mlp.py)")
    add("--seeds", type=_seeds, default=5, help="number of seeds (default: 5)")
    add(
        "--rates",
        type=_rates,
        default=_rates("0.03,0.1,0.3,1"),
        help="comma-separated learning rates",
    )
    return parser


def _seeds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seeds; give 1 or more")
    return int(text)


def _rates(text: str) -> list[float]:
    try:
        rates = sorted({float(item) for item in text.split(",")})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} should be positive numbers, as in 0.1,0.3")
    return rates


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # between two runs, as Ctrl-C
    sys.exit(main())
