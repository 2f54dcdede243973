"""Which job of SLURM does which run: a file beside the runs, so that any later call knows it.

    .slurm/jobs.json    {"schema": 2, "token": "5f03c1",
                         "jobs": {run: {"job": "18_3", "before": heartbeat}}}

``token`` is in the names of the jobs: by it those are known that SLURM has taken, but that nobody
could write down any more.

``before`` is the heartbeat of the run's status.json when the job was submitted: a status with this
one tells of an earlier try. (Times are not compared: clocks of nodes may differ.)
"""

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bnresearch import locks, rundir
from bnresearch.errors import UserError

SCHEMA = 2
FOLDER, FILE = ".slurm", "jobs.json"


class Submitted(NamedTuple):
    """The job of a run, and the heartbeat that the run had before."""

    job: str
    before: str | None


class Record:
    """The record of the runs in a folder.

    Attributes:
      folder: where it is, with the scripts of the jobs and what they print.
      name: of the jobs: bn-, the name of the study's folder, and a token; "" while there are none.
    """

    def __init__(self, runs: Path):
        self.folder, self.name = runs / FOLDER, ""
        self._study = re.sub(r"[^\w.-]+", "-", runs.parent.name)
        self._token = ""

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other call submits or cancels meanwhile; from here on the jobs have a name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another --out"
            ) from error
        with locks.held(self.folder):
            if not self._kept():
                self.write({})
            self._token = self._kept()["token"]
            self.name = f"bn-{self._study}-{self._token}"
            yield

    def read(self) -> dict[str, Submitted]:
        """Run -> its job."""
        kept = self._kept().get("jobs", {})
        return {run: Submitted(entry["job"], entry["before"]) for run, entry in kept.items()}

    def _kept(self) -> dict[str, Any]:
        path = self.folder / FILE
        if not path.exists():
            return {}
        kept = rundir.read_json(path)
        if kept.get("schema") != SCHEMA:
            raise UserError(
                f"{path} is of another version of bnresearch: go on with that one, or cancel its "
                "jobs (squeue --me, scancel) and remove the file"
            )
        return kept

    def write(self, jobs: Mapping[str, Submitted]) -> None:
        """Replaces it; only while ``held``."""
        kept: dict[str, Any] = {run: entry._asdict() for run, entry in jobs.items()}
        about = {"schema": SCHEMA, "token": self._token or secrets.token_hex(3), "jobs": kept}
        with self.writing():
            rundir.write_json(self.folder / FILE, about)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What writes files of the record: UserError where there is no room."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror or error}; make room, then run "
                "the same command again"
            ) from error

    def printed(self, job: str) -> list[Path]:
        """What the processes of a job print to stderr, the first one first."""
        # Looking into a folder makes a network file system notice new files in it.
        os.listdir(self.folder)
        return sorted(self.folder.glob(f"{job}_*_log.err"))
