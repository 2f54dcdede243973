"""One run, on the nodes that SLURM gave it. submitit calls ``run`` in each process of the job."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnresearch import rundir
from bnresearch.errors import UserError
from bnresearch.supervise import supervise
from bnresearch.sweep.jobs import PUT_OFF_SECONDS, Event, Job, Order
from bnresearch.sweep.slurm.commands import NOTE
from bnresearch.sweep.worker import LEFT, carry_out, record_failure

PATIENCE = 120.0  # seconds to wait for another process to leave the run's folder

# A config file that holds one config: by it a run over several nodes is started like any other.
CONFIG = """\
import json

from bnresearch import config

RESOLVED = {resolved!r}


def get_config():
    return config.unresolve(json.loads(RESOLVED))
"""


def run(job: Job, order: Order, path: Sequence[str], file: Path) -> None:
    """Carry out a job; one that was asked to stop leaves a note for the job's script.

    Args:
      path: where to look for modules, beside where this process does.
      file: the config file of the run, for runs over several nodes.
    """
    started = time.monotonic()
    # XLA divides work by the number of threads, which shows in the last bits: they depend on what
    # was asked for, not on whether this cluster binds processes to cores.
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
        os.environ.setdefault("NPROC", cores)
    sys.path.extend(folder for folder in path if folder not in sys.path)
    first, before = os.environ.get("SLURM_PROCID", "0") == "0", _step(job, order)
    event = _spread(job, order, file) if order.cluster.nodes > 1 else _alone(job, order)
    if event.status == "stopped" and first:
        minutes = order.cluster.minutes
        if _step(job, order) > before or time.monotonic() - started < 30 * minutes:
            Path(os.environ[NOTE]).touch()
            return
        reason = f"not one step was done in the time limit of {minutes} min; give more with "
        event = Event(job.id, "failed", reason + "--launcher.minutes")
        record_failure(job, order, event.message)
    if event.status in ("failed", "waiting"):
        print(event.message, file=sys.stderr, flush=True)
        sys.exit(1)


def _alone(job: Job, order: Order) -> Event:
    """As a worker process would; a run that somebody else is at is tried again for a while."""
    stop, end = threading.Event(), time.monotonic() + PATIENCE

    def request(number: int, frame: Any) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, request)  # submitit's own handler does nothing
    while True:
        event = carry_out(job, order, stop)
        if event.status != "waiting" or stop.is_set() or time.monotonic() > end:
            return event
        stop.wait(PUT_OFF_SECONDS)


def _spread(job: Job, order: Order, file: Path) -> Event:
    """Together with the processes on the other nodes, as by ``train`` in each of them."""
    if gpus := int(os.environ.get("SLURM_GPUS_ON_NODE", "0")):
        # jax gives each process of a SLURM job one GPU, unless it is told: this has all of a node.
        os.environ.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, range(gpus))))
    workdir = order.folder / job.id
    command = ["train", f"--config={file}", f"--workdir={workdir}", "--progress=off"]
    child = [sys.executable, "-m", "bnresearch", *command]
    code = supervise(child, workdir, command)
    status = {0: "done", 3: "diverged", LEFT: "stopped"}.get(code, "failed")
    return Event(job.id, status, f"exit code {code}")


def _step(job: Job, order: Order) -> int:
    """How many steps of the run are done."""
    try:
        return (rundir.read_status(order.folder / job.id) or {}).get("step", 0)
    except UserError:
        return 0
