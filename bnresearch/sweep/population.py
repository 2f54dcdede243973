"""The launcher that trains runs which differ in numbers only together, in this process.

1. A run stays what it is: train.run with its loop, folder, metrics, checkpoints and result.
2. Each is in a thread of its own, and one thread at a time goes on: up to its next compiled call.
3. When all wait, calls of one function are stacked and made as one vmapped call (together.py).
4. Runs in step with each other share every call. One that is not (it was resumed, it took the place
   of one that diverged) shares those that happen to be due: slower, and right in any case.
5. Who has ended, by whatever end, leaves; the next job of the program takes the place.
6. A call has a fixed number of places, the empty ones repeat a run: one compilation per program,
   and the bits of a run depend on that number only. From a run alone they differ by rounding.
7. How many: ``workers``, or what the rule in together.size says. Where that is 1 (on CPU, for
   convolutions, on several devices), runs are carried out one after the other, as by ``inline``.
"""

import contextlib
import threading
from functools import partial
from typing import Any

from bnresearch.sweep.jobs import TICK_SECONDS, Event, Events, Job, Order, Queue
from bnresearch.sweep.worker import carry_out


def population(queue: Queue, order: Order, workers: int, stop: threading.Event) -> Events:
    """One program after the other, ``workers`` of its runs at a time as one vmapped program."""
    last: Job | None = None
    while len(queue) and not stop.is_set():
        last = job = queue.take(last)
        if job is None:
            stop.wait(TICK_SECONDS)
            yield None
        else:
            members = 1 if job.measures else workers or _members(job)
            if members == 1:
                yield from _alone(job, queue, order, stop)
            else:
                yield from _together(job, queue, order, members, stop)


def _alone(job: Job, queue: Queue, order: Order, stop: threading.Event) -> Events:
    """A job carried out by itself."""
    yield Event(job.id, "running")
    event = carry_out(job, order, stop)
    if event.status == "waiting":
        queue.put_off(job)
    yield event


def _members(job: Job) -> int:
    from bnresearch import config, together

    try:
        return together.size(config.unresolve(job.resolved))
    except Exception:
        return 1  # what is wrong is found again, and recorded, when it is carried out


def _together(
    first: Job, queue: Queue, order: Order, members: int, stop: threading.Event
) -> Events:
    """The jobs of the program of ``first``, until there are no more or all are stopped."""
    from bnresearch.together import Population

    jobs: dict[str, Job] = {}
    job: Job | None = first
    with contextlib.closing(Population(members)) as running:
        while True:
            while job is not None:
                jobs[job.id] = job
                running.add(partial(_carry_out, job, order, stop))
                yield Event(job.id, "running")
                job = queue.more(first) if len(running) < members else None
            if not len(running):
                return
            for event in running.advance():
                if event.status == "waiting":
                    queue.put_off(jobs[event.id])
                yield event
            yield None
            if len(running) < members and not stop.is_set():
                job = queue.more(first)


def _carry_out(job: Job, order: Order, stop: threading.Event, prepare: Any) -> Event:
    return carry_out(job, order, stop, prepare=prepare)
