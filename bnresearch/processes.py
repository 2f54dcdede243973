"""What a process of a run knows of the others before it has met them, and its supervisor.

How many processes a run has and which this one is, the config says (``distributed``) or whatever
started it. `supervise.py` starts each as a child; here is what that tells its supervisor.

Imports no jax.
"""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from bnresearch.errors import UserError

BEAT_SECONDS = 1.0
TOLD = "BNRESEARCH_SUPERVISOR"  # in the environment of a child: file descriptor, host, port, key

DEFAULTS: dict[str, Any] = {
    "processes": 0,  # how many; 0: what the scheduler says (SLURM, Open MPI, GKE), else 1
    "process": -1,  # the number of this one; -1: what the scheduler says
    "coordinator": "",  # host:port of process 0, a free port there; "": what the scheduler says
    "heartbeat": 30,  # seconds without a sign of life after which a process counts as dead
    "start": 120,  # seconds that all of them may take to come together
    "stall": 3600,  # seconds that the next step may take, with what comes between (an evaluation)
}


class Plan(NamedTuple):
    """How the processes of a run find each other; fields as in DEFAULTS."""

    processes: int
    process: int
    coordinator: str
    heartbeat: int
    start: int
    stall: int


def plan(config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Plan | None:
    """What a config, or the scheduler that started this process, says about others; None where it
    is alone.

    Raises:
      UserError: what is said is not enough, or impossible.
    """
    asked = Plan(*(config[name] for name in DEFAULTS))
    for name, least in (("heartbeat", 5), ("start", 1), ("stall", 1)):
        if config[name] < least:
            raise UserError(
                f"distributed.{name}={config[name]}: give at least {least} second{'s'[: least - 1]}"
            )
    coordinator = asked.coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    asked = asked._replace(coordinator=coordinator)
    if asked.processes == 1 or not (asked.processes or _scheduled(environment)):
        if asked.process > 0 or (asked.coordinator and asked.processes == 0 and asked.process >= 0):
            raise UserError(
                f"distributed.process={asked.process} of how many? Give distributed.processes, too"
            )
        return None
    if asked.processes and asked.process >= asked.processes:
        raise UserError(
            f"distributed.process={asked.process}, but there are distributed.processes="
            f"{asked.processes}, counted from 0"
        )
    by_hand = asked.processes > 0 and not _scheduled(environment)
    if by_hand and (asked.process < 0 or not asked.coordinator):
        raise UserError(
            f"distributed.processes={asked.processes}, and no scheduler says which this is: give "
            "distributed.process=0, 1, ... and distributed.coordinator=HOST:PORT (of process 0)"
        )
    if asked.coordinator:
        _check_address(asked.coordinator)
    if asked.process < 0 and _by_slurm(environment):
        asked = asked._replace(process=int(environment["SLURM_PROCID"]))
    return asked


def given(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a command line or a scheduler may say that there are others: known without reading
    a config, which takes jax and seconds. Whoever sets `distributed` in a config file alone is
    found out by `plan`."""
    named = any(argument.startswith("--config.distributed.") for argument in arguments)
    return named or _scheduled(environment)


def flag(arguments: Sequence[str], name: str) -> str:
    """The last value of --name=VALUE or --name VALUE on a command line; "" without one."""
    found = ""
    for item, following in itertools.pairwise([*arguments, ""]):
        if item == f"--{name}":
            found = following
        elif item.startswith(f"--{name}="):
            found = item.partition("=")[2]
    return found


def host(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Under which name other processes find this host, if it is that of the first."""
    address = flag(arguments, "config.distributed.coordinator")
    address = address or environment.get("JAX_COORDINATOR_ADDRESS", "")
    return address.rpartition(":")[0] or environment.get("SLURMD_NODENAME") or socket.gethostname()


def number(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Which process of the run this is, as far as is known before it has joined the others; -1
    where it is not."""
    said = flag(arguments, "config.distributed.process")
    if not said and _by_slurm(environment):
        said = environment["SLURM_PROCID"]
    return int(said) if said.isdigit() else -1


def _scheduled(environment: Mapping[str, str]) -> bool:
    """Whether what started this process says that there are others: what jax detects."""

    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    return (
        (_by_slurm(environment) and several("SLURM_NTASKS"))
        or several("OMPI_COMM_WORLD_SIZE")
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def _by_slurm(environment: Mapping[str, str]) -> bool:
    return "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"distributed.coordinator={address!r} is not HOST:PORT; give the host of process 0 and "
            "a free port there, such as node1:12345"
        )


def how_ended(who: str, code: int) -> str:
    """What the exit code of a process says, as subprocess gives it: negative for a signal."""
    if code >= 0:
        return f"{who} ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"{who} was ended by {name}{hint}"


def is_loopback(host: str) -> bool:
    """Whether this machine reaches nobody but itself under that name."""
    return host == "localhost" or host.startswith("127.")


def check_port(address: str) -> None:
    """Raises UserError where process 0 could not listen at its own address: jax would crash."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host if is_loopback(host) else "", int(port)))  # as jax will
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at distributed.coordinator={address}: "
                f"{error.strerror or error}; give a free port"
            ) from error


def share(cores: Sequence[int], index: int, count: int) -> list[int]:
    """The cores that one of ``count`` gets, the one with this index; together they get all."""
    return list(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def share_cores(process: int, processes: int) -> None:
    """Keeps one of several processes that all run on this host, and what it starts, to cores of its
    own, if there are enough and nobody has assigned any. It concerns the calling thread and those
    that it starts from then on: call it before jax makes those that compute and send.

    The messages of CPUs go through gloo. Its thread spins while another thread of the process holds
    the connection: where a thread that wakes may take the core of one that runs, the holder may
    have to wait for the spinning of all others. As batch work (sched(7)) none takes a core."""
    if not hasattr(os, "sched_setaffinity"):
        return  # not Linux
    with contextlib.suppress(OSError):  # a container may forbid it; what it costs is time only
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        cores = sorted(os.sched_getaffinity(0))
        if processes <= len(cores) == os.cpu_count():
            os.sched_setaffinity(0, share(cores, process, processes))


# ---- In the child


class _Link:
    """To the supervisor of this process."""

    connection: Connection | None = None
    hub: tuple[str, ...] = ()
    advances = 0
    lock = threading.Lock()


def is_child() -> bool:
    """Whether this process has a supervisor."""
    return TOLD in os.environ or _Link.connection is not None


def report_to_supervisor() -> None:
    """Begins to give signs of life, if there is a supervisor; the process ends when it is gone."""
    if TOLD not in os.environ:
        return
    descriptor, *hub = os.environ.pop(TOLD).split(",")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
    _Link.connection, _Link.hub = Connection(int(descriptor)), tuple(hub)
    threading.Thread(target=_beat, daemon=True).start()
    threading.Thread(target=_follow, args=(_Link.connection,), daemon=True).start()


def _beat() -> None:
    while True:
        tell("beat", _Link.advances)
        time.sleep(BEAT_SECONDS)


def _follow(connection: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        connection.recv()  # nothing is ever sent: it ends with the supervisor
    os._exit(1)


def tell(*message: Any) -> None:
    """Tells the supervisor, if there is one."""
    if _Link.connection is not None:
        with _Link.lock, contextlib.suppress(OSError):
            _Link.connection.send(message)


def advanced() -> None:
    """The run goes forward: else a sign of life says only that its process lives."""
    _Link.advances += 1


def own_supervisor() -> tuple[str, ...]:
    """Where the supervisor of this process listens: host, port and key; () without one."""
    return _Link.hub
