"""Files of records, one JSON object with a "step" a line, that a run adds to as it goes.

NaN and infinities are written as the strings "NaN", "Infinity" and "-Infinity", since JSON has no
such numbers; they are floats again when read. This module imports neither jax nor flax.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnresearch.errors import UserError
from bnresearch.rundir import finite, restored, write_text


class Log:
    """Adds records to a file, each flushed at once."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record; its numbers may be of numpy or jax if of size 1."""
        plain = {name: number(value) for name, value in record.items()}
        self._file.write(json.dumps(finite(plain), allow_nan=False) + "\n")

    def flush(self) -> None:
        """Puts everything on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()


def read(path: Path, what: str) -> list[dict[str, Any]]:
    """The records of a file of ``what``, oldest first. A last line that is not complete (the run
    goes on, or was killed while writing it) is left out.

    Raises:
      UserError: there is no such file, or a line before the last is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {what} from {path}: {error.strerror}") from error
    records = []
    # What follows the last newline is torn or empty.
    for place, line in enumerate(lines[:-1], start=1):
        record = _record(line)
        if record is None:
            raise UserError(f"{path}, line {place} is not a record of {what}: {line[:60]!r}")
        records.append(record)
    return records


def truncate(path: Path, step: int) -> None:
    """Removes the records after ``step`` and whatever is torn; atomically, and only if need be."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        record = _record(line) if line.endswith(b"\n") else None
        if record is not None and record["step"] <= step:
            kept.append(line)
    if len(kept) < len(lines):
        write_text(path, b"".join(kept).decode())


def number(value: Any) -> Any:
    """A number of numpy or jax as one of Python."""
    return value.item() if hasattr(value, "item") else value


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record with floats for what JSON cannot say, or None."""
    try:
        record = restored(json.loads(line))
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record
