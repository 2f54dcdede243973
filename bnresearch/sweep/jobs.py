"""Jobs of a sweep: what there is to do, what is told about it, and who does what next."""

import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TICK_SECONDS = 0.25  # between the events of a launcher, at most
PUT_OFF_SECONDS = 0.5  # until a run that another process holds is looked at again


class Job(NamedTuple):
    """One run.

    Attributes:
      id: the name of its folder.
      label: for people: the arm, the place on the axes, the seed.
      arm: under which the display counts it.
      resolved: what its config.json holds.
      program: equal for jobs that share a compiled program (config.program_key).
      measures: the study file whose function the job calls; "": it trains.
    """

    id: str
    label: str
    arm: str
    resolved: dict[str, Any]
    program: str = ""
    measures: str = ""


class Order(NamedTuple):
    """What all jobs of a sweep share.

    Attributes:
      folder: where their folders lie.
      command: for status.json.
      cluster: the slurm.Options of the launcher slurm. Where a run takes place is no part of it.
    """

    folder: Path
    command: Sequence[str]
    cluster: Any = None


class Event(NamedTuple):
    """What happened to a job.

    Attributes:
      id: of the job; "" for what a worker said.
      status: running; then done, diverged, failed or stopped, or waiting if it comes again (another
        process is at it, or its worker ended first). "said": a worker wrote ``message``.
      message: why, where there is a reason.
    """

    id: str
    status: str
    message: str = ""


Events = Generator[Event | None, None, None]  # what a launcher is


class Queue:
    """Jobs that wait, handed out so that each program is compiled by as few workers as possible."""

    def __init__(self, jobs: Iterable[Job]):
        self._waiting: dict[str, deque[Job]] = {}
        self._put_off: deque[tuple[float, Job]] = deque()
        self._workers: Counter[str] = Counter()  # how many are at a program
        for job in jobs:
            self.give_back(job, first=False)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._put_off)

    def take(self, last: Job | None) -> Job | None:
        """The next job for whoever did ``last``, or None while there is none to be had.

        One of the same program if there is any; else one of the program with most jobs for each of
        the workers that are at it, this one counted in.
        """
        while self._put_off and self._put_off[0][0] <= time.monotonic():
            self.give_back(self._put_off.popleft()[1])
        if last is not None and last.program not in self._waiting:
            self.leave(last)
            last = None
        if last is None:
            crowds = {
                program: len(jobs) / (1 + self._workers[program])
                for program, jobs in self._waiting.items()
            }
            if not crowds:
                return None
            program = max(crowds, key=lambda name: crowds[name])
            self._workers[program] += 1
        else:
            program = last.program
        jobs = self._waiting[program]
        job = jobs.popleft()
        if not jobs:
            del self._waiting[program]
        return job

    def more(self, last: Job) -> Job | None:
        """Another job of the program of ``last``, for whoever does several at a time."""
        return self.take(last) if last.program in self._waiting else None

    def leave(self, last: Job | None) -> None:
        """Whoever did ``last`` is not at its program any more."""
        if last is not None and self._workers[last.program]:
            self._workers[last.program] -= 1

    def give_back(self, job: Job, first: bool = True) -> None:
        """It was not begun: it is the next of its program again."""
        jobs = self._waiting.setdefault(job.program, deque())
        jobs.appendleft(job) if first else jobs.append(job)

    def put_off(self, job: Job) -> None:
        """Another process is at it: it waits a while before it is handed out again."""
        self._put_off.append((time.monotonic() + PUT_OFF_SECONDS, job))
