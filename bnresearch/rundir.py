"""The run folder: describes itself, belongs to one process at a time, and is never half written.

    config.json     the resolved config
    status.json     running | done | diverged | failed | stopped; step, heartbeat, what ran where
    result.json     the final metrics and the digest of the state
    lock            whose process it is; released by the kernel however that process ends
    origin.json     only in what `eval --save` made: of which run it is, and how it was changed
    metrics.jsonl, probes.jsonl, tensorboard/   (metrics.py)      checkpoints/   (checkpoint.py)

Reports read run folders, so this module imports neither jax nor flax.
"""

import hashlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bnresearch import locks, provenance
from bnresearch.errors import UserError

SCHEMA = 1
STATUSES = ("running", "done", "diverged", "failed", "stopped")
FILES = (
    *("config.json", "status.json", "result.json", "origin.json"),
    *("lock", "metrics.jsonl", "probes.jsonl"),
)
FOLDERS = ("checkpoints", "tensorboard")
SHOWN = 10  # how many differing keys a message lists
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
ELSEWHERE = "choose another with --workdir"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class RunFolder:
    """A run folder that this process owns; ``open_run`` makes it, ``close`` gives it back."""

    def __init__(self, path: Path, lock: int, command: Sequence[str]):
        self.path = path
        self._lock: int | None = lock
        self.about: dict[str, Any] = {}  # further fields of status.json, from now on
        self._command = list(command)
        self._started = _now()

    def set_status(self, status: str, step: int, message: str | None = None, **extra: Any) -> None:
        """Writes status.json: the status, the step, the heartbeat, and what runs where.

        Args:
          status: one of STATUSES.
          step: how many training steps are done.
          message: why, for the statuses that need a reason.
          extra: more of ``about``, this time only; "device" stands for that of this process.
        """
        if status not in STATUSES:
            raise ValueError(f"unknown status {status!r}; one of {', '.join(STATUSES)}")
        fields = {
            "schema": SCHEMA,
            "status": status,
            "step": int(step),
            "message": message,
            "heartbeat": _now(),
            "started": self._started,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": self._command,
            "commit": provenance.commit(),
            "versions": provenance.versions(),
        }
        if "device" not in extra:
            fields["device"] = provenance.device()
        # Not lasting: what a power cut interrupts has no result, and goes on in any case.
        write_json(self.path / "status.json", fields | self.about | extra, lasting=False)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, the last word on a run; see ``finite`` for NaN and infinities."""
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            locks.release(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_run(workdir: str | Path, config: Mapping[str, Any], command: Sequence[str]) -> RunFolder:
    """Makes ``workdir`` the folder of this run, or takes it up again.

    Nothing is written before all checks have passed.

    Args:
      workdir: made if it is not there. An existing one must be empty (hidden files do not count)
        or hold a run with this very config.
      config: the resolved config, JSON values only.
      command: the command line, for status.json.

    Raises:
      UserError: the folder cannot be made or written to; it holds something else, or a run of
        another config (the message lists the differing keys with both values).
      InUse: another process is at it (the message names its pid).
    """
    plain = _plain(config)
    path = path_of(workdir)
    check_usable(path)
    _check_config(path, plain)
    _check_contents(path)
    lock = _locked(path)
    try:
        _check_config(path, plain)  # again: the process before us may have written it meanwhile
        if not (path / "config.json").exists():
            write_json(path / "config.json", plain)
    except BaseException as error:
        locks.release(lock)
        if isinstance(error, OSError):
            raise _unusable(path, error) from error
        raise
    return RunFolder(path, lock, command)


def config_hash(resolved: Mapping[str, Any]) -> str:
    """sha256 of the resolved config with sorted keys: the identity of a run."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The resolved config of a run; UserError where there is none."""
    path = path_of(workdir)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder (it has no config.json): give a run's workdir")
    return read_json(path / "config.json")


def read_status(workdir: str | Path) -> dict[str, Any] | None:
    """status.json, or None before it was first written; what a power cut leaves can be empty."""
    path = path_of(workdir) / "status.json"
    return read_json(path) if path.exists() and path.stat().st_size else None


def known(status: Mapping[str, Any]) -> dict[str, Any]:
    """What a status says of a run's devices, kernels and norms, for who writes a new one without
    having any of them itself; "device" is None where nobody said."""
    keys = ("device", "kernels", "values", "processes")
    return {"device": None} | {key: status[key] for key in keys if key in status}


def read_result(workdir: str | Path) -> dict[str, Any] | None:
    """result.json, or None for a run that has not ended; UserError where it is no result."""
    path = path_of(workdir) / "result.json"
    result = read_json(path) if path.exists() else None
    if result is not None and not (
        result.get("status") in STATUSES and isinstance(result.get("step"), int)
    ):
        raise UserError(
            f"{path} has no status or no step: it was changed by hand; remove it to train again"
        )
    return result


# ---- Files that appear whole


def write_text(path: Path, text: str, lasting: bool = True) -> None:
    """Replaces the file at ``path``: a reader sees the old text or the new one, never a part; if it
    is ``lasting``, which takes a disk a while, after a power cut, too.

    One writer per file, which is why the temporary one has a fixed name: what a killed process left
    of it is overwritten by the next, and never piles up.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if lasting:
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
    os.replace(temporary, path)


def write_json(path: Path, value: Any, lasting: bool = True) -> None:
    """``write_text`` of a JSON value; non-finite numbers become strings (see ``finite``)."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n", lasting)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, non-finite numbers restored; UserError if it is something else."""
    try:
        value = restored(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); was it changed by hand?") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, it holds a {type(value).__name__}")
    return value


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as the strings "NaN", "Infinity" and "-Infinity".

    JSON has no such numbers. Strings keep which one it was, unlike null; ``restored`` reads them.
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in NOT_FINITE.items() if str(number) == str(value))
    return value


def restored(value: Any) -> Any:
    """``value`` with the strings of ``finite`` as numbers again."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


# ---- Checks, none of which writes


def path_of(workdir: str | Path) -> Path:
    """The absolute path that a user means; UserError for what is none."""
    if not str(workdir) or "\0" in str(workdir):
        raise UserError(f"workdir {str(workdir)!r} is not a path: give a folder, such as runs/a")
    try:
        return Path(os.path.abspath(Path(workdir).expanduser()))
    except RuntimeError as error:  # "~somebody" without such a user
        raise UserError(
            f"workdir {str(workdir)!r} names no folder: {error}; {ELSEWHERE}"
        ) from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it will be read back: tuples as lists, and so on."""
    try:
        return json.loads(json.dumps(finite(config), allow_nan=False))
    except TypeError as error:
        raise UserError(f"the config cannot be written as JSON: {error}") from error


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to workdir {path}: {error.strerror or error}; {ELSEWHERE}")


def check_usable(path: Path) -> None:
    """Refuses a path that is no folder and cannot become one, or one that cannot be written to."""
    try:
        nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        if not nearest.is_dir():
            kind = "a file" if nearest.exists() else "a link to nothing"
            what = f"is {kind}" if nearest == path else f"lies below {nearest}, which is {kind}"
            raise UserError(f"workdir {path} {what}; {ELSEWHERE}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"workdir {path}: {nearest} is not writable; {ELSEWHERE}")
    except OSError as error:
        raise _unusable(path, error) from error


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a folder that holds anything but this run."""
    if not os.path.exists(path / "config.json"):  # Path.exists raises for names that are too long
        _check_empty(path)
        return
    # Both with NaN as a string, or it would differ from itself.
    differing = list(differences(finite(read_json(path / "config.json")), config))
    if not differing:
        return
    lines = [f"  {key}: there {there}, now {now}" for key, there, now in differing[:SHOWN]]
    if len(differing) > SHOWN:
        lines.append(f"  ... and {len(differing) - SHOWN} more")
    raise UserError(
        f"workdir {path} holds a run of another config; {ELSEWHERE}, or use its values:\n"
        + "\n".join(lines)
    )


def _check_contents(path: Path) -> None:
    """Refuses a run in which a file stands for a folder or the reverse, one with a broken result,
    and what was saved by an evaluation."""
    for names, right, kind in ((FILES, os.path.isfile, "file"), (FOLDERS, os.path.isdir, "folder")):
        for name in names:
            if os.path.lexists(path / name) and not right(path / name):
                raise UserError(
                    f"{path / name} is no {kind}, as it has to be in a run; move it away, or "
                    f"{ELSEWHERE}"
                )
    if path.is_dir():
        read_result(path)
    if (path / "origin.json").exists():
        origin = read_json(path / "origin.json")
        raise UserError(
            f"workdir {path} was saved by eval, from step {origin.get('step')} of "
            f"{origin.get('workdir')}: its statistics are not those of training, so that training "
            "would not go on from them; evaluate it, or train in that run or another folder"
        )


def _check_empty(path: Path) -> None:
    try:
        names = sorted(os.listdir(path)) if path.exists() else []
    except OSError as error:
        raise _unusable(path, error) from error
    # A lock alone is a run that was killed, or is just about to write its config.
    others = [name for name in names if name != "lock" and not name.startswith(".")]
    if others:
        raise UserError(
            f"workdir {path} is neither empty nor a run: it has no config.json, but "
            f"{', '.join(others[:3])}; {ELSEWHERE}"
        )


def differences(there: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, value there, value now) of all leaves that differ; lists are compared whole."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in sorted(there.keys() | now.keys()):
            dotted = f"{prefix}.{key}" if prefix else key
            yield from differences(there.get(key, _Absent), now.get(key, _Absent), dotted)
    # Equal numbers are equal (1 and 1.0), but 1 is not True.
    elif there != now or isinstance(there, bool) != isinstance(now, bool):
        yield prefix, _shown(there), _shown(now)


class _Absent:
    """A key that one of two configs does not have."""


def _shown(value: Any) -> str:
    if value is _Absent:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- The lock


def _locked(path: Path) -> int:
    """Makes the folder and locks it for this process."""
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        return locks.take(path, ELSEWHERE)
    except OSError as error:
        _remove_empty(made)
        raise _unusable(path, error) from error


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            continue  # never made, or somebody else's by now
