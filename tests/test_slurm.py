"""Studies on a real SLURM cluster, which is started on this machine."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from run_tools import DIGITS, ROOT, read
from slurm_tools import DEADLINE, MISSING, Cluster, free_ports, wait_for
from sweep_tools import DIVERGING, DOING, TINY, TOO_LARGE, doing, environment, training, trainings

from bnresearch import rundir
from bnresearch.errors import JobsCancelled, UserError
from bnresearch.rundir import read_config
from bnresearch.sweep import Counts, slurm, sweep
from bnresearch.sweep.slurm import launch
from bnresearch.sweep.slurm.record import Record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: no {', '.join(MISSING)}"),
]

OPTIONS = slurm.Options(partition="tests", minutes=5, cores=2)


def lasting(steps):
    """Overrides for a run that goes on for a while, and logs as it begins."""
    return f"train.duration={steps}st", "train.log_every=100st", f"train.eval_every={steps}st"


@pytest.fixture(scope="module")
def running():
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running, monkeypatch):
    """The cluster, without jobs; this process and those that it starts find it."""
    monkeypatch.setenv("SLURM_CONF", str(running.config))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 3.0)
    yield running
    running.clear()


class InThread:
    """A sweep that another thread makes, which a signal to this process does not reach."""

    def __init__(self, jobs, folder, options=OPTIONS):
        self.found = []
        self.thread = threading.Thread(target=self._run, args=(jobs, folder, options), daemon=True)
        self.thread.start()

    def _run(self, *arguments):
        try:
            jobs, folder, options = arguments
            found = sweep(jobs, folder, launcher="slurm", cluster=options, show="off")
            self.found.append(found)
        except Exception as error:
            self.found.append(error)

    def end(self):
        """What it returns or raises, within a minute."""
        self.thread.join(60)
        (found,) = self.found
        if isinstance(found, Exception):
            raise found
        return found


def submit(jobs, folder, options=OPTIONS):
    return InThread(jobs, folder, options).end()


# ---- How runs end


def test_an_array_ends_as_the_same_runs_do_here(cluster, tmp_path):
    jobs = [*trainings(2), training(*DIVERGING), training(*TOO_LARGE)]
    here = alone(jobs, tmp_path / "a" / "runs")
    there = submit(jobs, tmp_path / "b" / "runs")
    assert here == there
    assert (there.done, there.diverged, list(there.failed)) == (2, 1, [jobs[3].id])
    for job in jobs[:2]:
        results = [read(tmp_path / name / "runs" / job.id / "result.json") for name in "ab"]
        assert results[0]["digest"] == results[1]["digest"]
    ids = [entry.job for entry in Record(tmp_path / "b" / "runs").read().values()]
    array = ids[0].partition("_")[0]
    assert ids == [f"{array}_{n}" for n in range(4)]


def alone(jobs, folder):
    """The same by this machine's own worker processes, with as many threads."""
    return sweep(jobs, folder, launcher="local", workers=1, show="off")


def test_a_job_that_dies_is_noticed_and_quoted(cluster, tmp_path):
    job = doing(tmp_path, "die")
    counts = submit([job], tmp_path / "runs")
    reason = counts.failed[job.id]
    assert re.match(r"SLURM's job \d+ has ended without a result: last words \| ", reason)
    status = read(tmp_path / "runs" / job.id / "status.json")
    assert (status["status"], status["message"]) == ("failed", reason)


def test_no_more_run_at_a_time_than_were_asked_for(cluster, tmp_path, monkeypatch):
    """Two arrays, because of their size, the second of which waits for the first."""
    monkeypatch.setattr(launch.commands, "LARGEST", 2)
    log = tmp_path / "log"
    jobs = [doing(tmp_path, "go", seed=n, seconds=0.5, log=str(log)) for n in range(3)]
    options = slurm.Options(parallel=1)
    assert submit(jobs, tmp_path / "runs", options) == Counts(3, 0, {}, 0)
    begun = [read(tmp_path / "runs" / job.id / "status.json")["started"] for job in jobs]
    ended = [read(tmp_path / "runs" / job.id / "status.json")["heartbeat"] for job in jobs]
    assert ended[0] < begun[1] and ended[1] < begun[2]


# ---- Preemption and time limit


def test_a_run_that_is_preempted_ends_with_the_same_bits(cluster, tmp_path):
    job = training(*lasting(40_000))
    alone([job], tmp_path / "a" / "runs")
    sweeping = InThread([job], tmp_path / "b" / "runs")
    path = tmp_path / "b" / "runs" / job.id
    wait_for(lambda: (path / "metrics.jsonl").exists(), 60)
    wait_for(lambda: (path / "metrics.jsonl").read_text().count("\n") > 1, 60)
    number = Record(path.parent).read()[job.id].job
    cluster.ask(
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )
    wait_for(lambda: read(path / "status.json")["status"] == "stopped", DEADLINE)
    stopped = read(path / "status.json")["step"]
    assert 0 < stopped < 40_000
    cluster.run_again(number)
    assert sweeping.end() == Counts(1, 0, {}, 0)
    assert "Restarts=1 " in cluster.ask("scontrol", "show", "job", number)
    assert Record(path.parent).read()[job.id].job == number
    results = [read(tmp_path / name / "runs" / job.id / "result.json") for name in "ab"]
    assert results[0]["digest"] == results[1]["digest"]


# ---- Several nodes

TWO = ("parallel.devices=2", "train.checkpoint_every=never")


def test_a_run_over_two_nodes_ends_as_on_two_devices_of_one(cluster, tmp_path, monkeypatch):
    # Nodes of this cluster have names that nobody knows.
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    job = training(*TWO)
    options = dataclasses.replace(OPTIONS, nodes=2, cores=1)
    assert submit([job], tmp_path / "a" / "runs", options) == Counts(1, 0, {}, 0)
    status = read(tmp_path / "a" / "runs" / job.id / "status.json")
    assert len(status["processes"]) == 2
    assert sweep([job], tmp_path / "b", launcher="inline", show="off").done == 1
    there = read(tmp_path / "a" / "runs" / job.id / "result.json")["metrics"]["test"]
    assert there == pytest.approx(read(tmp_path / "b" / job.id / "result.json")["metrics"]["test"])


def test_the_script_for_one_run_goes_on_when_it_is_queued_again(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("PYTHON", sys.executable)
    path = tmp_path / "run"
    said = cluster.ask(
        *(
            "sbatch",
            "--time=5",
            "--cpus-per-task=1",
            f"--output={tmp_path / 'log'}",
            f"--chdir={ROOT}",
        ),
        *(ROOT / "scripts" / "slurm_train.sbatch", f"--config={DIGITS}", f"--workdir={path}"),
        *(f"--config.{item}" for item in (*TINY, *lasting(800), "parallel.devices=2")),
    )
    number = said.split()[-1]
    wait_for(lambda: (path / "metrics.jsonl").exists(), 60)
    cluster.ask("scancel", "--signal=TERM", number)
    wait_for(lambda: read(path / "status.json")["status"] == "stopped", DEADLINE)
    cluster.run_again(number)
    wait_for(lambda: (path / "result.json").exists(), 60)
    wait_for(lambda: not cluster.jobs(), DEADLINE)
    status = read(path / "status.json")
    assert (status["status"], status["step"], len(status["processes"])) == ("done", 800, 2)
    assert "Restarts=1 " in cluster.ask("scontrol", "show", "job", number)
    assert "ExitCode=0:0" in cluster.ask("scontrol", "show", "job", number)


# ---- Log-out, and cancelling

STUDY = DOING.replace('{"a": {"what": "a"}, "b": {"what": "b"}}', "ARMS")
STUDY = STUDY.replace('source="", prediction=""', 'source="here", prediction="it ends"')


class Study:
    """``python -m bnresearch study`` in a process of its own, as somebody logged in starts it."""

    def __init__(self, folder, arms, *flags):
        file = folder / "waiting.py"
        file.write_text(STUDY.replace("ARMS", repr(arms)))
        self.record = Record(folder / "out" / "runs")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bnresearch", "study", str(file), "--scale=smoke"),
                *(
                    f"--out={folder / 'out'}",
                    "--launcher=slurm",
                    "--launcher.minutes=5",
                    "--seeds=1",
                    *flags,
                ),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submitted(self):
        """The jobs, as soon as they are all submitted."""
        wait_for(lambda: self.record.read() or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.process.communicate()
        return {run: entry.job for run, entry in self.record.read().items()}

    def says(self, part):
        """The lines on stderr up to one with this part."""
        lines = [self.process.stderr.readline()]
        while part not in lines[-1]:
            assert lines[-1], lines
            lines.append(self.process.stderr.readline())
        return lines

    def end(self):
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def test_a_study_outlives_who_started_it(cluster, tmp_path):
    arms = {
        "waits": {"what": "wait", "log": str(tmp_path / "log")},
        "fails": {"what": "fail", "log": str(tmp_path / "log")},
    }
    first = Study(tmp_path, arms)
    jobs = first.submitted()
    assert len(jobs) == 2
    first.process.send_signal(signal.SIGHUP)
    first.process.communicate(timeout=20)
    wait_for(lambda: len(cluster.jobs()) == 1, DEADLINE)  # nobody is there when one fails
    arguments = {run: read_config(tmp_path / "out" / "runs" / run)["arguments"] for run in jobs}
    failed = {run for run in jobs if arguments[run]["what"] == "fail"}
    again = Study(tmp_path, arms)
    said = again.says("submitted to SLURM")
    assert said[0] == "1 run submitted before, followed now\n"
    assert said[1].startswith("1 run submitted again, as their jobs left no result; arm 'fails'")
    assert said[1].endswith("ValueError: no such thing\n")
    (tmp_path / "log.go").touch()
    code, _, err = again.end()
    assert code == 1, err
    assert "1 run has no result" in err and "ValueError: no such thing" in err
    assert (tmp_path / "out" / "report" / "index.html").exists()
    assert sorted((tmp_path / "log").read_text().splitlines()) == [*("fail 0", "fail 0", "wait 0")]
    now = first.record.read()
    assert {run for run in jobs if now[run].job != jobs[run]} == failed


def test_jobs_go_on_after_one_interrupt_and_end_after_two(cluster, tmp_path):
    arms = {"a": {"what": "wait", "log": str(tmp_path / "log")}}
    study = Study(tmp_path, arms)
    jobs = study.submitted()
    study.process.send_signal(signal.SIGINT)
    code, _, err = study.end()
    assert code == 75
    assert "stopped following, runs to go: 1; the jobs go on" in err
    assert cluster.jobs().keys() == set(jobs.values())
    study = Study(tmp_path, arms)
    study.says("followed now")
    for _ in range(2):
        study.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, _, err = study.end()
    assert (code, "jobs cancelled: 1" in err) == (75, True)
    wait_for(lambda: not cluster.jobs(), DEADLINE)


def test_jobs_are_cancelled_from_elsewhere(cluster, tmp_path):
    jobs = [doing(tmp_path, "wait", seed=n, log=str(tmp_path / "log")) for n in range(2)]
    sweeping = InThread(jobs, tmp_path / "out" / "runs")
    wait_for(lambda: (tmp_path / "log").exists(), DEADLINE)
    code, out, err = Study(tmp_path, {"a": {"what": "a"}}, "--cancel").end()
    assert (code, out, err) == (0, "jobs cancelled: 2\n", "")
    with pytest.raises(JobsCancelled, match="jobs cancelled: 2"):
        sweeping.end()
    wait_for(lambda: not cluster.jobs(), DEADLINE)


# ---- What SLURM refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (slurm.Options(partition="nosuch"), "invalid partition specified: nosuch"),
        (slurm.Options(nodes=3), "Node count specification invalid"),
        (slurm.Options(minutes=100), "Requested time limit is invalid"),
        (slurm.Options(gpus=1), "Invalid generic resource"),
    ],
)
def test_refusals_are_passed_on(cluster, tmp_path, options, words):
    jobs = trainings(2)
    with pytest.raises(UserError, match=f"SLURM refuses: sbatch: .*{words}"):
        submit(jobs, tmp_path / "runs", options)
    assert cluster.jobs() == {}
    left = [path.name for path in (tmp_path / "runs" / ".slurm").iterdir()]
    assert not [name for name in left if "pkl" in name or "submission" in name]
    assert Record(tmp_path / "runs").read() == {}
    assert not any((tmp_path / "runs" / job.id).exists() for job in jobs)


def test_jobs_that_could_not_be_written_down_are_cancelled_and_submitted_again(
    cluster, tmp_path, monkeypatch
):
    """As when the disk is full just then, or whoever submits is killed."""
    jobs = [doing(tmp_path, "wait", seed=n, log=str(tmp_path / "log")) for n in range(2)]
    write, full = rundir.write_json, OSError(errno.ENOSPC, "No space left on device")
    runs = tmp_path / "out" / "runs"

    def failing(path, value, **options):
        if value.get("jobs"):
            raise full
        write(path, value, **options)

    def lose():
        with monkeypatch.context() as patch:
            patch.setattr(rundir, "write_json", failing)
            with pytest.raises(UserError, match="No space left on device; make room"):
                submit(jobs, runs)
        assert len(cluster.jobs()) == 2 and Record(runs).read() == {}
        return cluster.jobs().keys()

    lost = lose()
    assert launch.cancel(runs) == 2
    wait_for(lambda: not cluster.jobs(), DEADLINE)
    lost = lose()
    sweeping = InThread(jobs, runs)
    wait_for(lambda: len(Record(runs).read()) == 2, DEADLINE)
    wait_for(lambda: not lost & cluster.jobs().keys(), DEADLINE)
    (tmp_path / "log.go").touch()
    assert sweeping.end().done == 2


def test_a_disk_that_is_full_leaves_nothing_of_a_submission(cluster, tmp_path, monkeypatch):
    def dump(self, path, index=None):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("submitit.core.utils.DelayedSubmission.dump", dump)
    with pytest.raises(UserError, match="No space left on device; make room"):
        submit(trainings(2), tmp_path / "runs")
    assert cluster.jobs() == {}
    assert sorted(os.listdir(tmp_path / "runs" / ".slurm")) == ["jobs.json", "lock"]


@pytest.mark.parametrize("count", [1, 2])  # a job, and an array
def test_a_submission_that_gets_no_answer_ends(cluster, tmp_path, monkeypatch, count):
    (tmp_path / "bin").mkdir()
    hanging = tmp_path / "bin" / "sbatch"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", f"{hanging.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(launch.commands, "DEADLINE", 3.0)
    with pytest.raises(UserError, match="sbatch gave no answer within 3 s"):
        submit(trainings(count), tmp_path / "runs")
    assert sorted(os.listdir(tmp_path / "runs" / ".slurm")) == ["jobs.json", "lock"]


def test_a_controller_that_does_not_answer(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.commands, "DEADLINE", 0.001)
    with pytest.raises(UserError, match="gave no answer"):
        submit(trainings(1), tmp_path / "runs")
    assert rundir.read_status(tmp_path / "runs" / trainings(1)[0].id) is None
    assert sorted(os.listdir(tmp_path / "runs" / ".slurm")) == ["jobs.json", "lock"]
