"""Carries out jobs: in this process, or as a worker process that gets them over a socket.

    main([SOCKET, CORES])     (in a process that launchers.py starts)

A worker that loses its coordinator, or is asked to stop, saves the run it is at and ends.
"""

import contextlib
import functools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from bnresearch import rundir
from bnresearch.errors import Diverged, InUse, Stopped, UserError
from bnresearch.imports import without_gc
from bnresearch.sweep.jobs import Event, Job, Order

LEFT = 75  # exit code of a worker that was asked to end: a job it still has was not begun


def carry_out(job: Job, order: Order, stop: threading.Event, **options: Any) -> Event:
    """Bring a job to its end; whatever goes wrong is recorded in its folder and told. What trains
    is given the ``options`` of train.run."""
    try:
        _measure(job, order) if job.measures else _train(job, order, stop, **options)
    except Diverged as error:
        return Event(job.id, "diverged", str(error))
    except Stopped as error:
        return Event(job.id, "stopped", str(error))
    except InUse as error:
        return Event(job.id, "waiting", str(error))
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"
        record_failure(job, order, message)
        return Event(job.id, "failed", message)
    return Event(job.id, "done")


def record_failure(job: Job, order: Order, message: str) -> None:
    """Write ``failed`` with the reason into the job's folder, unless it says so already."""
    path = order.folder / job.id
    # What made the run fail (a full disk) may keep us from writing it down; it is told anyway.
    with contextlib.suppress(OSError, ValueError):
        before = rundir.read_status(path) or {}
        if (before.get("status"), before.get("message")) == ("failed", message):
            return
        with rundir.open_run(path, job.resolved, order.command) as folder:
            # Nobody ran on the devices of this process: looking them up would occupy them.
            folder.set_status("failed", before.get("step", 0), message, device=None)


def _train(job: Job, order: Order, stop: threading.Event, **options: Any) -> None:
    from bnresearch import config, train

    train.run(
        config.unresolve(job.resolved),
        order.folder / job.id,
        show="off",
        command=order.command,
        stop=stop,
        tensorboard=False,
        **options,
    )


def _measure(job: Job, order: Order) -> None:
    """Call the function of a study without training; its numbers are those of the "test" split."""
    from bnresearch.study import subjects

    started = time.monotonic()
    function = _function(job.measures, os.stat(job.measures).st_mtime_ns)
    if subjects.identity(function) != job.resolved["source"]:
        raise UserError(
            f"the function in {job.measures} was changed since the study began; run the same "
            "command again to measure the new one"
        )
    with rundir.open_run(order.folder / job.id, job.resolved, order.command) as folder:
        if rundir.read_result(folder.path) is not None:
            return
        folder.set_status("running", 0)
        values = function(seed=job.resolved["seed"], **job.resolved["arguments"])
        if not isinstance(values, Mapping):
            raise UserError(
                f"{function.__name__}() in {job.measures} returns {values!r}; let it return named "
                'numbers, as {"name": 1.0}'
            )
        result = {
            "schema": rundir.SCHEMA,
            "status": "done",
            "step": 0,
            "metrics": {"test": {name: float(value) for name, value in values.items()}},
            "seconds": round(time.monotonic() - started, 3),
        }
        folder.write_result(result)
        folder.set_status("done", 0)


@functools.lru_cache(maxsize=1)
def _function(file: str, changed: int) -> Any:
    """The function of a study file, which is read once per worker and change."""
    from bnresearch import study

    return study.load(file).function


def main(arguments: Sequence[str]) -> None:
    """A worker process: pinned, then ready, then one job after the other."""
    socket, cores = int(arguments[0]), [int(core) for core in arguments[1].split(",") if core]
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before jax is imported, which looks once
    connection = Connection(socket)
    inbox: queue.SimpleQueue[tuple[Job, Order, list[str]] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def end(*signal_and_frame: Any) -> None:
        stop.set()
        inbox.put(None)

    def listen() -> None:
        """In a thread of its own, so that the coordinator's end is noticed while a run goes on."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                inbox.put(connection.recv())
        end()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's
    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=listen, daemon=True).start()
    with without_gc():
        from bnresearch import train  # noqa: F401  it takes a while, and jobs need it

    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(Event("", "ready"))
        while (given := inbox.get()) is not None and not stop.is_set():
            job, order, path = given
            # Of who may have read files since this process was started, which have others beside.
            sys.path.extend(folder for folder in path if folder not in sys.path)
            event = carry_out(job, order, stop)
            sys.stdout.flush()
            connection.send(event)
    # What it did is on disk; jax takes its time to end in good order.
    os._exit(LEFT)
