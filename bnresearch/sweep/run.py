"""A sweep: runs brought to their ends, by whichever launcher, as often as it takes.

Each run has a folder, named after its config (``Job.id``). What has a result is skipped; what was
stopped goes on; what failed is tried again once per call; what another process is at is looked at
later, so that two sweeps may share a folder. A run that diverges is a result.
"""

import contextlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bnresearch.errors import SweepStopped, UserError, lookup
from bnresearch.metrics import check_progress
from bnresearch.rundir import read_result
from bnresearch.signals import stop_requests
from bnresearch.sweep.board import Board, Tally, board
from bnresearch.sweep.jobs import Event, Job, Order, Queue
from bnresearch.sweep.launchers import LAUNCHERS, choose
from bnresearch.sweep.slurm import Options


class Counts(NamedTuple):
    """How the runs of a sweep ended: all that have a result, those of earlier sweeps included.

    Attributes:
      done, diverged: how many runs have such a result.
      failed: id -> reason, of the runs that have none.
      skipped: how many had a result before.
    """

    done: int
    diverged: int
    failed: dict[str, str]
    skipped: int


def sweep(
    jobs: Iterable[Job],
    folder: str | Path,
    *,
    launcher: str = "auto",
    workers: int = 0,
    show: str = "auto",
    command: Sequence[str] | None = None,
    cluster: Options | None = None,
) -> Counts:
    """Brings every job to its end.

    Args:
      jobs: what to run; of several with one id the first counts.
      folder: where their run folders lie.
      launcher: a name in LAUNCHERS; "auto": local where there is work and room for it, or where
        workers are asked for.
      workers: how many worker processes; 0: one per GPU or core. For the launcher population how
        many runs train together; 0: what suits.
      show: progress as "bar" (a table), "lines" or "off"; "auto": a bar on a terminal.
      command: recorded in the runs' status.json; that of this process by default.
      cluster: what the launcher slurm asks for, and no other launcher takes.

    Raises:
      UserError: an unknown launcher or display, options for a launcher that does not take them, or
        a cluster that refuses.
      SweepStopped: SIGTERM or Ctrl-C; the states are saved, the same call goes on. A second one
        raises KeyboardInterrupt at once: runs then go on from their newest checkpoints. Jobs of a
        cluster go on, and are cancelled by a second one.
    """
    check_options(launcher, workers, show, cluster)
    cluster = cluster or (Options() if launcher == "slurm" else None)
    order = Order(Path(folder).absolute(), list(command or sys.argv), cluster)
    known = {job.id: job for job in reversed(list(jobs))}
    known = dict(reversed(known.items()))
    ended = {job: status for job in known if (status := _result(order.folder / job))}
    missing = [job for job in known.values() if job.id not in ended]
    tally, failed = Tally(known.values(), ended), dict[str, str]()
    launch = LAUNCHERS[choose(len(missing), workers) if launcher == "auto" else launcher]
    if missing:
        with stop_requests() as stop, board(show, tally) as display:
            events = launch(Queue(missing), order, workers, stop)
            with contextlib.closing(events):
                for event in events:
                    if event is not None:
                        _note(event, known, tally, failed, display)
                    display.refresh()
            counts = tally.counts()
            if stop.is_set() and counts["waiting"]:
                raise SweepStopped(counts["waiting"])
    counts = tally.counts()
    return Counts(counts["done"], counts["diverged"], failed, len(ended))


def check_options(launcher: str, workers: int, show: str, cluster: Options | None = None) -> None:
    """UserError for what `sweep` would not take, before anything is written."""
    check_progress(show)
    lookup({"auto": None, **LAUNCHERS}, launcher, "launcher")
    if workers < 0:
        raise UserError(f"{workers} workers given; give 0 for one per device, or more")
    if workers and launcher == "inline":
        raise UserError(
            f"{workers} workers given, but the launcher inline has none: it runs everything in "
            "this process; take the launcher local, or leave the workers out"
        )
    if workers and launcher == "slurm":
        raise UserError(
            f"{workers} workers given, but the launcher slurm has none: give how many jobs may run "
            "at a time with --launcher.parallel"
        )
    if cluster is not None and launcher != "slurm":
        raise UserError(f"options for SLURM given, but the launcher is {launcher}: take slurm")


def _result(path: Path) -> str | None:
    """How a run ended, or None: one whose result cannot be read says so when it is opened."""
    try:
        return (read_result(path) or {}).get("status")
    except UserError:
        return None


def _note(
    event: Event, jobs: dict[str, Job], tally: Tally, failed: dict[str, str], display: Board
) -> None:
    """Keep count of what happened, and show what needs to be read."""
    if event.status == "said":
        display.say(event.message)
        return
    tally.move(event.id, event.status)
    if event.status == "failed":
        failed[event.id] = event.message
        display.say(f"failed: {jobs[event.id].label} ({event.id}): {event.message}")
