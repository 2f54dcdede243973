"""Where the jobs of a sweep run.

A launcher is a generator: ``launch(queue, order, workers, stop)`` takes jobs from the queue, has
them carried out, and yields what happens to them as events; it also yields None now and then, so
that the display moves. It ends when the queue is empty, or soon after ``stop`` is set, each running
job with a "stopped". Closed early, it ends what it started at once. A job that cannot be carried
out now goes back to the queue by ``put_off`` or ``give_back``.

To add one: such a function, and a line in LAUNCHERS.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from bnresearch import processes
from bnresearch.sweep.jobs import TICK_SECONDS, Event, Events, Job, Order, Queue
from bnresearch.sweep.population import population
from bnresearch.sweep.slurm import slurm
from bnresearch.sweep.worker import LEFT, record_failure

# Not `-m`: the package has imported its worker by then, of which python would warn.
START = "import sys; from bnresearch.sweep import worker; worker.main(sys.argv[1:])"
SET_BY_JAX = {"TPU_SKIP_MDS_QUERY", "TF_CPP_MIN_LOG_LEVEL"}  # when it is imported
FUTILE_STARTS = 3  # workers in a row that end before they are ready, before the sweep gives up

Launcher = Callable[[Queue, Order, int, threading.Event], Events]


def inline(queue: Queue, order: Order, workers: int, stop: threading.Event) -> Events:
    """One after the other in this process."""
    return population(queue, order, 1, stop)


# ---- Worker processes


class Place(NamedTuple):
    """What a worker has to itself."""

    cores: tuple[int, ...]
    environment: Mapping[str, str]


class Worker:
    """A worker process and its socket, in a process group of its own, so that Ctrl-C on a terminal
    does not reach it and all that it started ends with it."""

    def __init__(self, place: Place):
        self.place = place
        self.job: Job | None = None
        self.last: Job | None = None  # whose program it has compiled
        self.ready = False
        self.connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115  it lives as long as this
        self._read = 0
        self._asked = False
        self.environment = dict(os.environ)
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", START),
                    *(str(theirs.fileno()), ",".join(map(str, place.cores))),
                ],
                env={**os.environ, **place.environment, "PYTHONPATH": _python_path()},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                process_group=0,
            )

    def give(self, job: Job, order: Order) -> None:
        """Hands it a job; if it has just died, ``receive`` will say so."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((job, order, sys.path))

    def receive(self) -> Event | None:
        """What it has to tell; None if it is gone."""
        try:
            event = self.connection.recv()
        except (EOFError, OSError):
            return None
        self.ready = True
        return event

    def ask_to_stop(self) -> None:
        """It saves its run, tells so and ends."""
        if not self._asked:
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def end(self, patience: float = 0.0) -> int:
        """Ends it with all that it started, if it does not end by itself; its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.kill()
        return self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.connection.close()
        self._output.close()

    def said(self) -> Generator[Event, None, None]:
        """What it has written to its output since the last call."""
        self._output.seek(self._read)
        text = self._output.read()
        self._read += len(text)
        if text.strip():
            yield Event("", "said", text.decode(errors="replace").rstrip())


def local(queue: Queue, order: Order, workers: int, stop: threading.Event) -> Events:
    """Worker processes on this machine, each with cores (or a GPU) of its own; one that dies takes
    only its run along."""
    count = min(workers or default_workers(), len(queue))
    pool = [_worker(place) for place in places(count)]
    _end(_EARLY)
    futile = 0
    try:
        while len(queue) or any(worker.job for worker in pool):
            if stop.is_set():
                if not any(worker.job for worker in pool):
                    return
                for worker in pool:
                    worker.ask_to_stop()
            else:
                yield from _hand_out(pool, queue, order)
            ready = wait([worker.connection for worker in pool], TICK_SECONDS)
            for worker in [worker for worker in pool if worker.connection in ready]:
                event = worker.receive()
                if event is None:
                    pool.remove(worker)
                    yield from _bury(worker, queue, order, stop)
                    if stop.is_set():
                        continue
                    futile = 0 if worker.ready else futile + 1
                    if futile >= FUTILE_STARTS:
                        raise RuntimeError("workers end before they are ready; see what they say")
                    if len(queue):
                        pool.append(Worker(worker.place))
                elif event.status != "ready":
                    yield from _finished(worker, event, queue, stop)
            yield None
    finally:
        _end(pool)


def _worker(place: Place) -> Worker:
    """One that was started before there were jobs, if what was loaded since (a study file) has not
    changed the environment, or a new one."""
    for worker in _EARLY:
        before, now = worker.environment.items(), os.environ.items()
        if worker.place == place and {name for name, _ in before ^ now} <= SET_BY_JAX:
            _EARLY.remove(worker)
            return worker
    return Worker(place)


_EARLY: list[Worker] = []


@contextlib.contextmanager
def started_early(launcher: str, workers: int) -> Iterator[None]:
    """In its block `local` finds workers that have imported jax already: for who is about to import
    it, too, before it can say what there is to do. A core is left to this process, so that it takes
    no longer; those that nobody needed are ended."""
    try:
        if launcher == "local" or (launcher == "auto" and workers):
            for place in places(workers or default_workers())[: len(_cores()) - 1]:
                _EARLY.append(Worker(place))
        yield
    finally:
        _end(_EARLY)


def _end(pool: list[Worker]) -> None:
    """Ends all of a pool, at once: to give back the memory of each takes a while."""
    for worker in pool:
        worker.kill()
    while pool:
        worker = pool.pop()
        worker.end()
        worker.close()


def _hand_out(pool: list[Worker], queue: Queue, order: Order) -> Generator[Event, None, None]:
    for worker in pool:
        if worker.job is None:
            worker.last = worker.job = queue.take(worker.last)
            if worker.job is not None:
                worker.give(worker.job, order)
                yield Event(worker.job.id, "running")


def _finished(
    worker: Worker, event: Event, queue: Queue, stop: threading.Event
) -> Generator[Event, None, None]:
    job, worker.job = worker.job, None
    assert job is not None
    if event.status == "stopped" and not stop.is_set():  # somebody stopped the worker
        event = event._replace(status="waiting")
    if event.status == "waiting":
        queue.put_off(job)
    yield from worker.said()
    yield event


def _bury(
    worker: Worker, queue: Queue, order: Order, stop: threading.Event
) -> Generator[Event, None, None]:
    """A worker is gone: its job has failed, unless it was never begun or asked to stop."""
    code = worker.end(patience=0.5)  # its socket closes a moment before it is gone
    yield from worker.said()
    worker.close()
    queue.leave(worker.last)
    if (job := worker.job) is None:
        return
    if stop.is_set():
        yield Event(job.id, "stopped")
    elif not worker.ready or code == LEFT:
        queue.give_back(job)
        yield Event(job.id, "waiting")
    else:
        reason = processes.how_ended("the worker process", code)
        record_failure(job, order, reason)
        yield Event(job.id, "failed", reason)


def _python_path() -> str:
    """Workers import what this process can import."""
    return os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))


def default_workers() -> int:
    """One per GPU, else one per core; one alone has all of a machine's TPU."""
    return len(gpus()) or (1 if _may_have_tpu() else len(_cores()))


def _may_have_tpu() -> bool:
    platforms = _platforms()
    wanted = not platforms or "tpu" in platforms.split(",")
    return wanted and importlib.util.find_spec("libtpu") is not None


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def places(count: int) -> list[Place]:
    """An equal share of the cores for each of ``count`` workers, and of the GPUs if there are."""
    cores, devices = _cores(), gpus()
    found = []
    for index in range(count):
        own = processes.share(cores, index, count)
        # XLA divides work by the number of threads, which shows in the last bits: pinned or not, a
        # run is to have those that it has without workers.
        environment = {"NPROC": os.environ.get("NPROC", str(len(cores)))}
        if platforms := _platforms():
            environment["JAX_PLATFORMS"] = platforms
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
            if count > len(devices):  # several share one: none may take all of its memory
                environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        found.append(Place(tuple(own) or (cores[index % len(cores)],), environment))
    return found


def _platforms() -> str:
    """What jax may use, in the order of preference; "" for all there are."""
    chosen = sys.modules["jax"].config.jax_platforms if "jax" in sys.modules else None
    return chosen or os.environ.get("JAX_PLATFORMS", "")


def gpus() -> list[str]:
    """The NVIDIA devices that jax would use, found without jax: asking it would occupy them."""
    platforms = _platforms()
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    numbers = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return [str(n) for n in sorted(int(match[1]) for match in numbers if match)]


LAUNCHERS: dict[str, Launcher] = {
    "inline": inline,
    "local": local,
    "population": population,
    "slurm": slurm,
}


def choose(jobs: int, workers: int) -> str:
    """The launcher for so many jobs: worker processes where they are asked for, or where there is
    work and room for them."""
    return "local" if workers or (jobs > 8 and default_workers() > 1) else "inline"
