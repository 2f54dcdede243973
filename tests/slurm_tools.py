"""A SLURM cluster on this machine: two nodes, on 127.0.0.1 only, in a temporary folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
NODES, CORES = ("n1", "n2"), 4
DEADLINE = 30.0  # seconds for a daemon to start or to end

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
# Nothing that needs more rights than those of the user, and no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# Jobs begin at once, and have five seconds to end when they are told to.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
# What a partition does not allow is refused at once, and not kept waiting.
EnforcePartLimits=ALL
# Nodes have as many cores as is said here, whatever the machine has.
SlurmdParameters=config_overrides
{nodes}
# Jobs of "urgent" take the place of others, which are told so before they are cancelled.
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=tests Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2
"""


class Cluster:
    """A running cluster; SLURM's commands find it by SLURM_CONF."""

    def __init__(self):
        # A short path: sockets may not have long ones.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.config = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.config)}

    def start(self):
        host = socket.gethostname().partition(".")[0]
        port, *ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CORES} "
            "RealMemory=4000 State=UNKNOWN"
            for name, port in zip(NODES, ports, strict=True)
        ]
        text = CONFIG.format(
            host=host,
            port=port,
            user=os.environ.get("USER") or subprocess.getoutput("id -un"),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        self.config.write_text(text)
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        self._run(
            "munged", "--force", *(f"--{key}={self.folder / name}" for key, name in files.items())
        )
        self._run("slurmctld", "-c", "-f", str(self.config))
        for node in NODES:
            self._run("slurmd", "-f", str(self.config), "-N", node)
        wait_for(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", DEADLINE)

    def _run(self, *command):
        """Starts a daemon, which leaves this call when it is ready."""
        with (self.folder / "start.log").open("a") as log:
            subprocess.run(
                command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=DEADLINE,
                check=True,
            )

    def ask(self, *command):
        """What a command prints, whether it succeeds or not."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        return done.stdout

    def jobs(self):
        """Job -> state, of all that wait or run."""
        lines = self.ask("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def run_again(self, job):
        """A job that was queued again begins: by itself it would wait for two minutes."""
        wait_for(lambda: self.jobs().get(job) == "PENDING", DEADLINE)
        time.sleep(3)  # its credential was revoked; a new one has to have a later time
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def clear(self):
        """Ends all jobs."""
        self.ask("scancel", "--quiet", f"--user={os.getuid()}")
        wait_for(lambda: not self.jobs(), DEADLINE)

    def stop(self):
        """Ends what was started here, and only that."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.clear()
        end([int(path.read_text()) for path in self.folder.glob("*.pid") if path.stat().st_size])
        shutil.rmtree(self.folder, ignore_errors=True)


def end(pids):
    """Ends daemons: all are asked to, and have some seconds for it."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 1.0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds)
            return


def free_ports(count):
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition, seconds):
    """What ``condition()`` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited in vain for {seconds} s")
