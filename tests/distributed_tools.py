"""Runs of several processes on this machine: with a deadline, ended by their pids."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from run_tools import DIGITS, ROOT

DEADLINE = 150


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """So many processes of one command; ``command(index, address)`` gives the arguments of each."""

    def __init__(self, count, command, devices=1, folder=None, **environment):
        self.address = f"127.0.0.1:{free_port()}"
        about = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **environment}
        self.files, self.processes = [], []
        for index in range(count):
            self.files.append((folder / f"{index}.log").open("w+"))
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *command(index, self.address)],
                    cwd=ROOT,
                    env=os.environ | about,
                    stdin=subprocess.DEVNULL,
                    stdout=self.files[-1],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        self.deadline = time.monotonic() + DEADLINE

    def wait(self):
        """The exit codes of all."""
        return [p.wait(max(0.1, self.deadline - time.monotonic())) for p in self.processes]

    def said(self, index):
        """What one wrote so far."""
        return (ROOT / self.files[index].name).read_text()

    def until(self, happened):
        """Waits for something, which must come before any process ends."""
        while not happened():
            assert time.monotonic() < self.deadline, "it took too long"
            assert all(p.poll() is None for p in self.processes), self.said(0) + self.said(-1)
            time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process, file in zip(self.processes, self.files, strict=True):
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    process.kill()  # its child ends with it
            process.wait()
            file.close()


def training(
    count, workdir, *overrides, each=(), heartbeat=10, script=("-m", "bnresearch"), **options
):
    """``train`` of the digits MLP on so many processes of one device each; ``each`` has further
    overrides for every one of them."""

    def command(index, address):
        about = {
            "distributed.processes": count,
            "distributed.process": index,
            "distributed.coordinator": address,
            "distributed.heartbeat": heartbeat,
        }
        flags = [f"--config.{key}={value}" for key, value in about.items()]
        flags += [f"--config.{item}" for item in (*overrides, *(each[index] if each else ()))]
        return [*script, "train", f"--config={DIGITS}", f"--workdir={workdir}", *flags]

    folder = workdir.with_name(f"{workdir.name}-logs")
    folder.mkdir(exist_ok=True)
    return Processes(count, command, folder=folder, **options)


def children(process):
    """The pids of what a supervisor started: the process that computes."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]
