"""Watches the processes of a run that has several, so that none waits for one that is gone.

Each process of the run (`distributed.py`) is the child of a supervisor, which is what the user or
the scheduler started. A supervisor computes nothing, so that nothing aborts it: when its child
ends, however it does, or no longer moves, it tells the supervisor of the first process, the hub,
which tells all others. Each ends its child, and the cause is written into the run folder. jax by
itself ends the others, too, but by an abort that says neither which was first nor why.

Imports no jax.
"""

import contextlib
import math
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
    wait,
)
from pathlib import Path
from typing import Any, NamedTuple

from bnresearch import processes, rundir
from bnresearch.errors import UserError
from bnresearch.processes import BEAT_SECONDS, TOLD, Plan, how_ended, is_loopback

TICK_SECONDS = 0.2
START_SECONDS = 600.0  # for the first sign of life: imports, from file systems that may be slow
GRACE_SECONDS = 3.0  # at most, for causes to come in and a child to end by itself, when all are to
HANGING_SECONDS = 10.0  # after SIGKILL
WELL = (0, 3, 75)  # exit codes with which all processes end together


class Cause(NamedTuple):
    """Why a run failed; ``secondary`` if perhaps only because another process had."""

    message: str
    secondary: bool = False


def supervise(command: Sequence[str], workdir: str | Path, arguments: Sequence[str]) -> int:
    """Runs a command as a process of a run with several; its exit code, or 1 where a failure, here
    or elsewhere, ended it.

    Args:
      command: of the child, which calls `distributed.joined`.
      workdir: the run folder, where the cause of a failure is written down.
      arguments: of the command, by which it is known where the first process is, and who this is
        (`processes.host`, `processes.number`).
    """
    supervisor = _Supervisor(command, processes.host(arguments), processes.number(arguments))
    started = datetime.now(UTC).isoformat()
    handlers = {
        number: signal.signal(number, supervisor.ask_to_stop)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        code = supervisor.run()
        ours = supervisor.rank == 0 or supervisor.hub_is_lost
        if supervisor.is_failed and supervisor.cause and ours:
            record(workdir, supervisor.cause.message, started)
        return code
    finally:
        supervisor.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def record(workdir: str | Path, message: str, started: str) -> None:
    """Writes ``failed`` and the cause into the status of a run that nobody is at any more, in place
    of what its first process may have said itself since ``started``."""
    # What made the run fail (a full disk) may keep us from writing it down; it is told anyway.
    with contextlib.suppress(OSError, UserError):
        before = rundir.read_status(workdir) or {"status": "", "step": 0, "command": sys.argv}
        saved = before["status"] == "stopped" and before["heartbeat"] >= started
        if not saved and before["status"] not in ("done", "diverged"):
            config, command = rundir.read_config(workdir), before["command"]
            with rundir.open_run(workdir, config, command) as folder:
                folder.set_status("failed", before["step"], message, **rundir.known(before))


class _Peer:
    """Another supervisor."""

    def __init__(self, connection: Connection, rank: int | None = None):
        self.connection, self.rank, self.host = connection, rank, ""
        self.heard = time.monotonic()
        self.done = False  # its child has ended well

    @property
    def name(self) -> str:
        return f"process {self.rank}" + (f" on {self.host}" if self.host else "")

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(message)


class _Supervisor:
    def __init__(self, command: Sequence[str], host: str, rank: int):
        self.rank, self.hub_is_lost = rank, False  # -1 as long as it is not known
        self.cause: Cause | None = None
        self.is_failed = False
        self._patience, self._grace, self._start = START_SECONDS, GRACE_SECONDS, math.inf
        self._stall, self._advances = math.inf, (0, math.inf)  # how many, and since when
        self._apart_since = math.inf  # since when the child waits for the others
        self._stops, self._settled = 0, False
        self._said: Cause | None = None  # by the child, of its own end
        self._refusal, self._closed = "", False
        self._moved = time.monotonic()  # when the child gave its last sign of life
        self._beat = 0.0
        self._hub: _Peer | None = None  # for all but the first
        self._peers: list[_Peer] = []  # for the first
        self._new: queue.SimpleQueue[_Peer] = queue.SimpleQueue()
        key = secrets.token_hex(16)
        self._key = key.encode()
        self._listener = Listener((host if is_loopback(host) else "", 0), backlog=128)
        self._link, theirs = Pipe()
        with theirs:
            about = [str(theirs.fileno()), host, str(self._listener.address[1]), key]
            self._child = subprocess.Popen(
                command,
                env={**os.environ, TOLD: ",".join(about)},
                pass_fds=[theirs.fileno()],
                process_group=0,  # signals reach it through this process, and once
            )
        threading.Thread(target=self._accept, daemon=True).start()

    def ask_to_stop(self, number: int, frame: Any) -> None:
        """SIGTERM and Ctrl-C: all processes save and stop; a second one ends this at once."""
        self._stops += 1
        self._signal(signal.SIGTERM if self._stops == 1 else signal.SIGKILL)

    def run(self) -> int:
        """Until the child has ended, or anything makes it end; the exit code."""
        while self._child.poll() is None and self.cause is None:
            self._listen()
            self._look()
        self._drain()
        code = self._child.poll()
        if self.cause is None and code is not None:
            if code in WELL:
                return self._leave(code)
            self.cause = self._said or Cause(how_ended(self._name(), code), -code == signal.SIGABRT)
            # By a signal before it had joined the others, or by a second one.
            if -code == (signal.SIGTERM if self._stops == 1 else signal.SIGKILL) and self._stops:
                self.cause = Cause(f"{self._name()} was stopped before it could save")
                self._fail()
                self.is_failed = False
                return 75
        return self._fail()

    def close(self) -> None:
        """Ends what it started."""
        self._closed = True
        self._end_child()
        self._link.close()
        self._listener.close()

    # What comes in

    def _others(self) -> list[_Peer]:
        return self._peers + ([self._hub] if self._hub else [])

    def _listen(self, seconds: float = TICK_SECONDS) -> None:
        """Reads what there is, and gives a sign of life."""
        while not self._new.empty():
            peer = self._new.get()
            if peer.rank == 0:
                self._hub = peer
                peer.send("hello", self.rank, socket.gethostname())
            else:
                self._peers.append(peer)
        by_connection = {peer.connection: peer for peer in self._others()}
        links = [] if self._link.closed else [self._link]
        for connection in wait([*links, *by_connection], seconds):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):
                message = ("gone",)
            if connection is self._link:
                self._hear_child(*message)
            else:
                self._hear(by_connection[connection], *message)
        if time.monotonic() - self._beat > BEAT_SECONDS:
            self._beat = time.monotonic()
            for peer in self._others():
                peer.send("beat")

    def _drain(self) -> None:
        """Hears the child's last words."""
        while not self._link.closed and self._link.poll():
            self._listen(0)

    def _hear_child(self, what: str, *rest: Any) -> None:
        self._moved = time.monotonic()
        if what == "joining":
            plan, self._apart_since = Plan(*rest), time.monotonic()
            self._start, self._stall = plan.start, plan.stall
            if plan.process >= 0:
                self.rank = plan.process
            # Noticed, agreed upon and ended within the heartbeat.
            self._patience = 0.8 * plan.heartbeat
            self._grace = min(GRACE_SECONDS, 0.1 * plan.heartbeat)
        elif what == "joined":
            self._apart_since, (self.rank, hub) = math.inf, rest
            self._advances = 0, time.monotonic()
            if self.rank != 0 and hub:
                threading.Thread(target=self._call, args=tuple(hub), daemon=True).start()
        elif what == "beat" and rest[0] != self._advances[0]:
            self._advances = rest[0], time.monotonic()
        elif what == "error":
            self._said = Cause(*rest)
        elif what == "gone":
            self._link.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(self._grace)

    def _hear(self, peer: _Peer, what: str, *rest: Any) -> None:
        peer.heard = time.monotonic()
        if what == "hello":
            peer.rank, peer.host = rest
        elif what == "done":
            peer.done = True
        elif what == "failed":
            peer.done = True  # it may go
            self._suspect(Cause(*rest))
        elif what == "end":
            peer.done = True
            self.cause, self._settled = Cause(*rest), True
        elif what == "gone":
            self._forget(peer)

    def _forget(self, peer: _Peer) -> None:
        if peer is self._hub:
            self._hub, self.hub_is_lost = None, not peer.done
        else:
            self._peers.remove(peer)
        if not peer.done and peer.rank is not None:
            self._suspect(Cause(f"{peer.name} is gone: killed, or its machine is"))

    def _suspect(self, cause: Cause) -> None:
        """Takes it for the cause, if there is no better one."""
        if self._settled:
            return
        if self.cause is None or (self.cause.secondary and not cause.secondary):
            self.cause = cause

    def _accept(self) -> None:
        """In a thread: lets other supervisors in."""
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(TICK_SECONDS)
            else:
                threading.Thread(target=self._let_in, args=(connection,), daemon=True).start()

    def _let_in(self, connection: Connection) -> None:
        """In a thread of its own: somebody without the key may never answer."""
        with contextlib.suppress(OSError, EOFError, AuthenticationError):
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            self._new.put(_Peer(connection))

    def _call(self, host: str, port: str, key: str) -> None:
        """In a thread: connects to the hub."""
        try:
            self._new.put(_Peer(Client((host, int(port)), authkey=key.encode()), rank=0))
        except (OSError, EOFError) as error:
            print(
                f"warning: no way to the supervisor of process 0 at {host}:{port} ({error}): if a "
                "process fails, the others end later, and without its reason",
                file=sys.stderr,
            )

    # What is seen

    def _look(self) -> None:
        """For what no longer moves, or moves in vain."""
        now = time.monotonic()
        if now - self._moved > self._patience:
            self._suspect(Cause(f"{self._name()} did not move for {self._patience:g} s"))
        if now - self._advances[1] > self._stall:
            self._suspect(
                Cause(
                    f"no step was done for {self._stall} s (distributed.stall), says "
                    f"{self._name()}: something waits, as for a file system, or is slow, as data "
                    "that are prepared (then do that before, by one process, or give more)"
                )
            )
        if now - self._apart_since > self._start:
            self._refuse(
                f"the processes of this run did not come together within {self._start} s "
                "(distributed.start); start all of them, with the same coordinator and number of "
                "processes, each with a number of its own, or this one alone with "
                "distributed.processes=1"
            )
        for peer in self._others():
            if now - peer.heard > self._patience and not peer.done:
                self.hub_is_lost |= peer is self._hub
                self._suspect(Cause(f"{peer.name} was not heard of for {self._patience:g} s"))

    def _refuse(self, message: str) -> None:
        """The input was wrong: nobody is to be asked, and nothing has begun."""
        self._apart_since = math.inf
        self._refusal, self._settled, self.cause = message, True, Cause(message)

    def _name(self) -> str:
        number = self.rank if self.rank >= 0 else "of a number that is not known yet"
        return f"process {number} on {socket.gethostname()}"

    # How it ends

    def _leave(self, code: int) -> int:
        """The child ended as it should; the hub waits until the others have, too."""
        for peer in self._others():
            peer.send("done")
        self._until(lambda: all(peer.done for peer in self._peers))
        return code

    def _fail(self) -> int:
        """Agrees with the others on the cause, ends the child, and says why."""
        assert self.cause is not None
        if self._hub and not self._settled:
            self._hub.send("failed", *self.cause)
        self._until(lambda: self._child.poll() is not None and self._is_certain())
        assert self.cause is not None
        for peer in self._peers:
            peer.send("end", *self.cause)
        ended = self._child.poll()
        self._end_child()
        if self._refusal:
            print(f"error: {self._refusal}", file=sys.stderr)
            return 2
        self.is_failed = ended != 2  # else it has said so itself
        if self.is_failed:
            print(f"error: the run has failed: {self.cause.message}", file=sys.stderr)
        return ended if ended is not None and ended > 0 else 1

    def _is_certain(self) -> bool:
        """Whether no better cause can come in."""
        assert self.cause is not None
        if self._hub:
            return self._settled
        return not self.cause.secondary or not self._peers

    def _until(self, happened: Any) -> None:
        # The hub is to be first: what it says in the end is what all say.
        end = time.monotonic() + self._grace * (2 if self._hub else 1)
        while not happened() and time.monotonic() < end:
            self._listen()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._child.poll() is None:
                os.killpg(self._child.pid, number)

    def _end_child(self) -> None:
        """Ends it, and what it started; one that hangs in the system is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(HANGING_SECONDS)
