"""Locks on folders: a file named ``lock`` in them, let go by the kernel however its holder ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnresearch.errors import InUse, UserError

HELD_SECONDS = 600.0  # that somebody waits for a folder whose files are being replaced

_held: set[int] = set()  # open lock files


def _forget() -> None:
    """A forked child must not keep a lock alive after its parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def take(folder: Path, advice: str) -> int:
    """Locks a folder for this process, which is written into the lock; see ``release``.

    Raises:
      InUse: another process has it; the message names it, and ends in the advice.
      OSError: there can be no lock.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(lock, 200, 0).decode(errors="replace").split()
        os.close(lock)
        who = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
        raise InUse(
            f"workdir {folder} is in use by {who}: wait for it, stop it, or {advice}"
        ) from error
    except OSError:
        os.close(lock)
        raise
    _held.add(lock)
    return lock


def release(lock: int) -> None:
    """Gives it back. Its file stays: removed, two later processes could both own it."""
    _held.discard(lock)
    os.close(lock)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The lock of a folder that several processes share, held while its files are replaced: the
    others wait.

    Raises:
      UserError: the folder cannot be written to, or does not become free within HELD_SECONDS.
    """
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder}: {reason}; choose another folder") from error
    _held.add(lock)
    try:
        _wait_for(lock, folder)
        yield
    finally:
        release(lock)


def _wait_for(lock: int, folder: Path) -> None:
    end = time.monotonic() + HELD_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise UserError(
                    f"another process has kept {folder} to itself for {HELD_SECONDS:.0f} s; end it "
                    "if it hangs, then run the same command again"
                ) from None
        time.sleep(0.05)
