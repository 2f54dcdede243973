"""One run over several processes: how they find each other, agree, and stop together.

Every process runs the same command. `supervise.py` starts what computes as a child and watches it;
the child joins the others here, by ``jax.distributed``. From then on all of them do the same in the
same order, and only the first touches the run folder (`books.py`):

    joined      find each other, or end with one message within a limit
    by_first    what only the first does (open the folder, read a checkpoint); its result, or its
                UserError, is everybody's
    check_same  refuse to begin with different configs, sources or kernels
    AgreedStop  SIGTERM to any of them stops all at the same step

How many processes there are, and which this is, says the config (``distributed``) or what starts
them. None of it belongs to the identity of a run.
"""

import contextlib
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bnresearch import processes
from bnresearch.errors import Diverged, Stopped, UserError
from bnresearch.processes import Plan
from bnresearch.rundir import differences

T = TypeVar("T")

LIMITS = {0: 300.0, 3: 300.0, 75: 300.0, 2: 5.0}  # seconds to leave together, by exit code
APART = 60.0  # seconds between two clocks of which somebody should know
SHOWN = 10  # how many differences a message lists
PIECE = 2**26  # bytes that are sent at once


def count() -> int:
    """How many processes this run has."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process keeps the books of the run."""
    return jax.process_index() == 0


_joined: list[Plan] = []


@contextlib.contextmanager
def joined(plan: Plan | None) -> Iterator[None]:
    """Joins the other processes of a plan (None: there are none).

    Raises:
      UserError: they did not come together in time, or differ.
    """
    processes.report_to_supervisor()
    if plan is None:
        yield
        return
    try:
        _initialize(plan)
        _joined.append(plan)
        _check_devices()
        _tell_supervisor()
        _compare_clocks(plan)
        yield
    except (Diverged, Stopped):
        raise  # so do all others
    except BaseException as error:
        # Another process that ends by an error may be the reason for this one.
        by_others = isinstance(error, jax.errors.JaxRuntimeError)
        processes.tell("error", f"{_own_name(plan)}: {type(error).__name__}: {error}", by_others)
        raise


def leave(code: int) -> None:
    """Ends this process with ``code``, together with the others where all end alike; without that,
    the first to go would take the others for dead, and abort them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _joined and code in LIMITS:
        end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        end.start()
        end.join(LIMITS[code])
    os._exit(code)


def _initialize(plan: Plan) -> None:
    given: dict[str, Any] = {
        "coordinator_address": plan.coordinator or None,
        "num_processes": plan.processes or None,
        "process_id": plan.process if plan.process >= 0 else None,
    }
    if None not in given.values():
        # Without this jax looks for a scheduler all the same, to learn which devices are whose.
        given["cluster_detection_method"] = "deactivate"
    if plan.coordinator and plan.process > 0:
        _reach(plan)
    elif plan.coordinator and plan.process == 0:
        processes.check_port(plan.coordinator)
    loopback = processes.is_loopback(plan.coordinator.rpartition(":")[0])
    if loopback and plan.processes:  # else a scheduler started it, which assigns cores itself
        processes.share_cores(plan.process, plan.processes)
    processes.tell("joining", *plan)
    # The supervisors are to be first, with the start and with the end: they know the reason, and
    # jax would abort without a word.
    later = 60 if processes.is_child() else 0
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=plan.start + later,
            heartbeat_timeout_seconds=plan.heartbeat + later,
            coordinator_bind_address=plan.coordinator if loopback else None,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run cannot find each other: {str(error).splitlines()[0]}; give "
            "distributed.processes, distributed.process and distributed.coordinator"
        ) from error


def _reach(plan: Plan) -> None:
    """Waits for the coordinator; jax itself would abort the process, without a word."""
    host, _, port = plan.coordinator.rpartition(":")
    deadline = time.monotonic() + plan.start
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"no coordinator at {plan.coordinator} within {plan.start} s "
                    f"(distributed.start): {error.strerror or error}; process 0 has to run on that "
                    "host, and its port must be open to the others"
                ) from error
        time.sleep(0.2)


def _check_devices() -> None:
    """Before anything is sent, which takes that each has equally many."""
    found = Counter(device.process_index for device in jax.devices())
    counts = [found[number] for number in range(jax.process_count())]
    if len(set(counts)) > 1:
        listed = ", ".join(f"process {number} {count}" for number, count in enumerate(counts))
        raise UserError(
            f"the processes of this run have different numbers of devices: {listed}; give each "
            "equally many (is one broken, or in use? CUDA_VISIBLE_DEVICES hides some)"
        )


def _tell_supervisor() -> None:
    """Who this is, and where the supervisor of the first process listens."""
    hub = broadcast_bytes(json.dumps(processes.own_supervisor()).encode())
    processes.tell("joined", jax.process_index(), json.loads(hub))


def _compare_clocks(plan: Plan) -> None:
    first = float(broadcast_bytes(repr(time.time()).encode()))
    apart = time.time() - first
    if abs(apart) > APART:
        print(
            f"warning: the clock of {_own_name(plan)} is {apart:+.0f} s from that of process 0: "
            "times in logs do not compare",
            file=sys.stderr,
        )


def _own_name(plan: Plan) -> str:
    number = jax.process_index() if _joined else plan.process
    return f"process {number} on {socket.gethostname()}"


# ---- To agree


def by_first(act: Callable[[], T]) -> T:
    """What ``act`` gives in the first process (anything that can be pickled), in all of them; a
    UserError that it raises there, too."""
    if count() == 1:
        return act()
    found: Any = None
    if is_first():
        try:
            found = True, act()
        except UserError as error:
            found = False, error
    well, value = pickle.loads(broadcast_bytes(pickle.dumps(found)))
    if not well:
        raise value
    return value


def broadcast_bytes(data: bytes) -> bytes:
    """The bytes of the first process, in all of them."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return _send(mine).tobytes()


def broadcast(tree: Any) -> Any:
    """A tree of numpy arrays as the first process has it, bit for bit; the others give one of the
    same shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    ours = [np.asarray(leaf) for leaf in leaves]
    flat = [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in ours]
    sent = _send(np.concatenate([*flat, np.zeros(0, np.uint8)]))
    parts = np.split(sent, np.cumsum([len(part) for part in flat])[:-1]) if flat else []
    # As bytes: a sum over processes, which a broadcast is, would lose the sign of zero.
    whole = [
        part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, ours, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)


def _send(data: np.ndarray) -> np.ndarray:
    pieces = range(0, len(data), PIECE)
    sent = [multihost_utils.broadcast_one_to_all(data[i : i + PIECE]) for i in pieces]
    return np.concatenate([np.zeros(0, np.uint8), *(np.asarray(x, np.uint8) for x in sent)])


def everybodys(data: bytes) -> list[bytes]:
    """What each process gives, by its number."""
    if count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [row[:size].tobytes() for row, size in zip(rows, sizes.tolist(), strict=True)]


def check_same(about: Mapping[str, Any], advice: str) -> None:
    """Raises UserError, in all processes, where a value (anything for JSON) is not the same in all:
    nothing else would notice, and each would train a net of its own with the gradients of all, or
    wait for what no other does."""
    first, *others = map(json.loads, everybodys(json.dumps(about, sort_keys=True).encode()))
    found = [
        f"  {key}: process 0 {there}, process {number} {here}"
        for number, other in enumerate(others, 1)
        for key, there, here in differences(first, other)
    ]
    if found:
        more = [f"  ... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise UserError("\n".join([f"processes differ; {advice}:", *found[:SHOWN], *more]))


def names() -> list[str]:
    """The hosts of all processes, in their order."""
    return [name.decode() for name in everybodys(socket.gethostname().encode())]


class AgreedStop:
    """Like an event that SIGTERM to any process sets in all of them, at the same question: all ask
    equally often. (``jax.distributed`` takes SIGTERM over, and settles on the question.)"""

    def __init__(self) -> None:
        self._asked, self._set = 0, False

    def is_set(self) -> bool:
        """Whether all processes are to stop here."""
        self._asked += 1
        self._set = self._set or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._set


def wait_for_all(what: str) -> None:
    """Until all processes have come here."""
    if count() > 1:
        multihost_utils.sync_global_devices(what)
