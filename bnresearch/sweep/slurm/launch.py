"""The launcher: submits what has no job yet, follows all, and leaves or cancels when asked to."""

import json
import sys
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path

from bnresearch import rundir
from bnresearch.errors import JobsCancelled, JobsGoOn, UserError
from bnresearch.sweep.jobs import TICK_SECONDS, Event, Events, Job, Order, Queue
from bnresearch.sweep.slurm import commands, task
from bnresearch.sweep.slurm.commands import Queued
from bnresearch.sweep.slurm.record import Record, Submitted
from bnresearch.sweep.worker import record_failure

LOOK_SECONDS = 5.0  # between two looks at SLURM's queue and the runs' folders
# A network file system may show what a node wrote only after its caches have run out (60 s).
GRACE_SECONDS = 75.0
SECOND_SIGNAL_SECONDS = 3.0  # for the second Ctrl-C
QUOTED = 5  # last lines of what a lost job printed
# Why jobs wait that will run by and by; what else there is, somebody has to be told.
ORDINARY = {"None", "Resources", "Priority", "JobArrayTaskLimit", "Dependency", "BeginTime"}


def slurm(queue: Queue, order: Order, workers: int, stop: threading.Event) -> Events:
    """Jobs of a SLURM cluster, one for each run: arrays of them, followed until all have ended.

    Raises:
      UserError: SLURM is not at hand or refuses; what it had taken before goes on.
      JobsGoOn: ``stop`` was set; the jobs are left alone.
      JobsCancelled: interrupted while ``stop`` was set, or somebody else has cancelled them.
    """
    jobs = {job.id: job for job in [queue.take(None) for _ in range(len(queue))] if job}
    if order.cluster.nodes > 1 and any(job.measures for job in jobs.values()):
        raise UserError(
            "this study calls a function, which runs in one process: leave out --launcher.nodes"
        )
    commands.check()
    record = Record(order.folder)
    try:
        yield from _submit(jobs, order, record, stop)
        yield from _Following(jobs, order, record).events(stop)
    except (KeyboardInterrupt, GeneratorExit):
        # Closed while it was to stop: the second signal came while somebody else had the turn.
        if stop.is_set():
            raise JobsCancelled(_cancel(record)) from None
        raise


def cancel(runs: str | Path) -> int:
    """Cancels the jobs of the runs in a folder that still wait or run; how many there were."""
    commands.check()
    record = Record(Path(runs).absolute())
    if not record.folder.is_dir():
        raise UserError(f"no jobs of SLURM were submitted from {runs}: is --out the right folder?")
    return _cancel(record)


def _cancel(record: Record) -> int:
    with record.held():
        known = record.read()
        here = list(commands.queued(record.name))
        record.write({})  # first: whoever follows them sees that they did not just die
        try:
            commands.cancel(here)
        except UserError:
            record.write(known)
            raise
        return len(here)


def _submit(jobs: Mapping[str, Job], order: Order, record: Record, stop: threading.Event) -> Events:
    """Submit the runs whose jobs are not in SLURM's queue (any more)."""
    with record.held():
        known = record.read()
        queued = commands.queued(record.name)
        if orphans := _orphans(known, queued):
            commands.cancel(orphans)
            yield Event("", "said", f"{len(orphans)} jobs cancelled that were not written down")
        missing = [
            job for run, job in jobs.items() if run not in known or known[run].job not in queued
        ]
        if there := len(jobs) - len(missing):
            yield Event("", "said", f"{_runs(there)} submitted before, followed now")
        if lost := [job for job in missing if job.id in known]:  # perhaps nobody was there to see
            why = _status(order.folder / lost[0].id).get("message") or "no reason is known"
            yield Event(
                "",
                "said",
                f"{_runs(len(lost))} submitted again, as their jobs left no result; "
                f"{lost[0].label}: {why}",
            )
        size, after = commands.largest_array() if missing else 1, ""
        for first in range(0, len(missing), size):
            if stop.is_set():
                return
            some = missing[first : first + size]
            before = [_heartbeat(order, job) for job in some]
            with record.writing():
                files = [_config_file(order, job, record) for job in some]
                ids = commands.submit(
                    task.run,
                    [(job, order, sys.path, file) for job, file in zip(some, files, strict=True)],
                    order.cluster,
                    record.folder,
                    record.name,
                    after,
                )
            new = zip(some, map(Submitted, ids, before), strict=True)
            known |= {job.id: entry for job, entry in new}
            record.write(known)
            array = ids[0].partition("_")[0]
            # The limit on jobs at a time is one on those of an array.
            after = array if order.cluster.parallel else ""
            yield Event("", "said", f"{_runs(len(ids))} submitted to SLURM as job {array}")


def _orphans(known: Mapping[str, Submitted], queued: Mapping[str, Queued]) -> list[str]:
    """Jobs of arrays that SLURM has taken and the record does not have: whoever submitted them was
    killed, or had no room to write, before it could write them down. Which runs they do is not
    known, and those are submitted again. Those that end are being cancelled already."""
    arrays = {entry.job.partition("_")[0] for entry in known.values()}
    return [
        job
        for job, of in queued.items()
        if job.partition("_")[0] not in arrays and of.state != "COMPLETING"
    ]


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _config_file(order: Order, job: Job, record: Record) -> Path:
    """Where the config file of a run is; written for those over several nodes, which need it."""
    path = record.folder / f"{job.id}.py"
    if order.cluster.nodes > 1:
        text = task.CONFIG.format(resolved=json.dumps(rundir.finite(job.resolved)))
        rundir.write_text(path, text)
    return path


def _heartbeat(order: Order, job: Job) -> str | None:
    return _status(order.folder / job.id).get("heartbeat")


def _status(path: Path) -> dict:
    """status.json; nothing while it cannot be read."""
    try:
        return rundir.read_status(path) or {}
    except (UserError, OSError):
        return {}


class _Following:
    """What becomes of jobs: told by the folders of their runs, and by SLURM where these cannot."""

    def __init__(self, jobs: Mapping[str, Job], order: Order, record: Record):
        self.order, self.record = order, record
        self.left = dict(jobs)
        self.known = record.read()
        self.queued: dict[str, Queued] = {}
        self.told: dict[str, str] = {}  # run -> the state that was last told
        self.gone: dict[str, float] = {}  # run -> since when its job is not in the queue
        self.said: set[str] = set()
        self.cancelled = 0

    def events(self, stop: threading.Event) -> Events:
        """Until all runs have ended."""
        while self.left:
            if stop.is_set():
                yield from self._leave()
            try:
                self.queued = commands.queued(self.record.name)
            except UserError as error:  # its controller may be down for a while; jobs run on
                yield from self._say(f"{error}; trying again")
            else:
                yield from self._look_at_runs()
                yield from self._say_reasons()
            next_look = time.monotonic() + LOOK_SECONDS
            while self.left and not stop.is_set() and time.monotonic() < next_look:
                stop.wait(TICK_SECONDS)
                yield None
        if self.cancelled:
            raise JobsCancelled(self.cancelled)

    def _leave(self) -> Events:
        yield Event("", "said", "the jobs go on; press Ctrl-C again now to cancel them")
        time.sleep(SECOND_SIGNAL_SECONDS)  # a second signal raises KeyboardInterrupt here
        raise JobsGoOn(len(self.left))

    def _look_at_runs(self) -> Generator[Event, None, None]:
        for run in list(self.left):
            job = self.queued.get(self.known[run].job)
            if job is not None and not job.running:
                self.gone.pop(run, None)
                yield from self._tell(run, "waiting")
                continue
            ended = self._ended(run)
            if ended is not None and ended.status == "failed" and job is not None:
                ended = None  # SLURM may start it again, as when a node is gone
            if ended is None and job is not None:
                self.gone.pop(run, None)
                yield from self._tell(run, "running")
                continue
            if ended is None:
                ended = self._lost(run)
            if ended is not None:
                del self.left[run]
                yield ended

    def _tell(self, run: str, state: str) -> Generator[Event, None, None]:
        if self.told.get(run) != state:
            self.told[run] = state
            yield Event(run, state)

    def _ended(self, run: str) -> Event | None:
        """How a run has ended, by its folder."""
        path = self.order.folder / run
        try:
            result = rundir.read_result(path)
        except (UserError, OSError) as error:
            return Event(run, "failed", str(error))
        if result is not None:
            return Event(run, result["status"], result.get("message", ""))
        status = _status(path)
        if status.get("status") == "failed" and status["heartbeat"] != self.known[run].before:
            return Event(run, "failed", status["message"])
        return None

    def _lost(self, run: str) -> Event | None:
        """A job is gone and its run has no result: after a while it has failed."""
        since = self.gone.setdefault(run, time.monotonic())
        now = self.record.read()
        if run not in now:
            self.cancelled += 1
            return Event(run, "stopped")
        if now[run] != self.known[run]:  # another call has submitted it again
            self.known[run] = now[run]
            del self.gone[run]
            return None
        if time.monotonic() - since < GRACE_SECONDS:
            return None
        reason = self._why(run)
        record_failure(self.left[run], self.order, reason)
        return Event(run, "failed", reason)

    def _why(self, run: str) -> str:
        job = self.known[run].job
        lost = f"SLURM's job {job} has ended without a result"
        logs = self.record.printed(job)
        if not logs:
            return (
                f"{lost}, and nothing of it is seen in {self.record.folder}: it was cancelled "
                "before it began, or the nodes do not share this file system (choose an --out that "
                "they do)"
            )
        lines = [line for path in logs[:2] for line in _last_lines(path)]
        status = _status(self.order.folder / run)
        if status.get("status") == "stopped":
            lost += f", its state is saved at step {status['step']}"
        return f"{lost}: {' | '.join(lines) or f'it printed nothing, see {logs[0]}'}"

    def _say_reasons(self) -> Generator[Event, None, None]:
        """What somebody may have to do something about."""
        ours = {self.known[run].job for run in self.left}
        waiting = {
            state.reason for job, state in self.queued.items() if job in ours and not state.running
        }
        for reason in sorted(waiting - ORDINARY):
            yield from self._say(f"SLURM lets jobs wait for: {reason}")

    def _say(self, text: str) -> Generator[Event, None, None]:
        """Once."""
        if text not in self.said:
            self.said.add(text)
            yield Event("", "said", text)


def _last_lines(path: Path) -> list[str]:
    with path.open(errors="replace") as file:
        lines = [line.strip() for line in file]
    return [line for line in lines if line][-QUOTED:]
