"""Which job of SLURM does which run: a file beside the runs, so that any later call knows it.

    .slurm/jobs.json    {"schema": 1, "jobs": {run: {"job": "18_3", "before": heartbeat}}}

``before`` is the heartbeat of the run's status.json when the job was submitted: a status with this
one tells of an earlier try. (Times are not compared: clocks of nodes may differ.)
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bnresearch import rundir
from bnresearch.errors import UserError

SCHEMA = 1
FOLDER, FILE = ".slurm", "jobs.json"


class Submitted(NamedTuple):
    """The job of a run, and the heartbeat that the run had before."""

    job: str
    before: str | None


class Record:
    """The record of the runs in a folder.

    Attributes:
      folder: where it is, with the scripts of the jobs and what they print.
      name: of the jobs: bn- and the name of the study's folder.
    """

    def __init__(self, runs: Path):
        self.folder = runs / FOLDER
        self.name = "bn-" + re.sub(r"[^\w.-]+", "-", runs.parent.name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other call submits or cancels meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another --out"
            ) from error
        with rundir.held(self.folder):
            yield

    def read(self) -> dict[str, Submitted]:
        """Run -> its job."""
        path = self.folder / FILE
        if not path.exists():
            return {}
        kept = rundir.read_json(path).get("jobs", {})
        return {run: Submitted(entry["job"], entry["before"]) for run, entry in kept.items()}

    def write(self, jobs: Mapping[str, Submitted]) -> None:
        """Replaces it; only while ``held``."""
        kept: dict[str, Any] = {run: entry._asdict() for run, entry in jobs.items()}
        try:
            rundir.write_json(self.folder / FILE, {"schema": SCHEMA, "jobs": kept})
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / FILE}: {error.strerror or error}; make room, then "
                "run the same command again"
            ) from error

    def printed(self, job: str) -> list[Path]:
        """What the processes of a job print to stderr, the first one first."""
        # Looking into a folder makes a network file system notice new files in it.
        os.listdir(self.folder)
        return sorted(self.folder.glob(f"{job}_*_log.err"))
