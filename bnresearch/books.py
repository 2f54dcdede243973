"""Who keeps the books of a run of several processes: the first one, alone.

Only it touches the run folder, which the others need not even see. Folder, metrics and checkpoints
have stand-ins for them here, so that the loop is the same in all processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnresearch import distributed
from bnresearch.checkpoint import Checkpoints, digest, placed_as
from bnresearch.metrics import Metrics
from bnresearch.rundir import RunFolder, open_run, path_of, read_result

SAME_START = "start all processes with the same source, data and kind of device"


class Onlooker:
    """The run folder, for processes that write nothing."""

    def __init__(self, path: Path):
        self.path, self.about = path, dict[str, Any]()

    def set_status(self, status: str, step: int, message: str | None = None, **extra: Any) -> None:
        """Nothing."""

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Nothing."""


@contextmanager
def opened(
    workdir: str | Path, resolved: Mapping[str, Any], command: Sequence[str]
) -> Iterator[tuple[RunFolder | Onlooker, dict[str, Any] | None]]:
    """The run folder, and the result of a run that has ended already; see `rundir.open_run`, whose
    errors are those of all processes."""
    own: list[RunFolder] = []

    def open_in_first() -> dict[str, Any] | None:
        own.append(open_run(workdir, resolved, command))
        return read_result(workdir)

    try:
        earlier = distributed.by_first(open_in_first)
        folder = own[0] if own else Onlooker(path_of(workdir))
        if distributed.count() > 1:
            folder.about["processes"] = distributed.names()
        yield folder, earlier
    finally:
        for folder in own:
            folder.close()


class NoMetrics:
    """Metrics, for processes that write nothing."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Nothing."""

    def write_probe(self, step: int, name: str, rows: Any) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""


@contextmanager
def metrics(folder: Path, step: int, tensorboard: bool) -> Iterator[Metrics | NoMetrics]:
    """The metrics of a run that stands at ``step``."""
    if not distributed.is_first():
        yield NoMetrics()
        return
    with Metrics(folder, step, tensorboard) as written:
        yield written


class SharedCheckpoints:
    """`Checkpoints` of a run of several processes, whose state is the same in each: the first one
    writes and reads them, and hands out what it read, bit for bit."""

    def __init__(self, directory: Path, keep: int):
        self._own = Checkpoints(directory, keep) if distributed.is_first() else None

    def save(self, step: int, state: Any) -> None:
        """See `Checkpoints.save`."""
        if self._own:
            self._own.save(step, state)

    def wait(self) -> None:
        """In all processes, until everything saved is on disk."""
        if self._own:
            self._own.wait()
        distributed.wait_for_all("checkpoints")

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """See `Checkpoints.restore`."""
        read: list[tuple[int, Any]] = []

        def read_in_first() -> int | None:
            found = self._own.restore(template) if self._own else None
            read.extend([found] if found else [])
            return found[0] if found else None

        step = distributed.by_first(read_in_first)
        if step is None:
            distributed.check_same({"state before the first step": digest(template)}, SAME_START)
            return None
        ours = read[0][1] if read else template
        arrays = distributed.broadcast(jax.tree.map(np.asarray, ours))
        return step, placed_as(arrays, template)

    def discard(self) -> None:
        """See `Checkpoints.discard`."""
        if self._own:
            self._own.discard()

    def __enter__(self) -> "SharedCheckpoints":
        return self

    def __exit__(self, *error: object) -> None:
        if self._own:
            self._own.close()


def checkpoints(folder: Path, keep: int) -> Checkpoints | SharedCheckpoints:
    """The checkpoints of a run."""
    directory = folder / "checkpoints"
    if distributed.count() > 1:
        return SharedCheckpoints(directory, keep)
    return Checkpoints(directory, keep)
