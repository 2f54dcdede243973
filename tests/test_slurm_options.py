"""The launcher slurm without a cluster: options, refusals, and what is made of lost jobs."""

import os
import re
import subprocess
import sys
import threading

import pytest
from run_tools import ROOT
from sweep_tools import doing

from bnresearch import processes
from bnresearch.errors import JobsGoOn, UserError
from bnresearch.sweep import slurm, sweep
from bnresearch.sweep.jobs import Event, Order
from bnresearch.sweep.slurm import commands, launch, task
from bnresearch.sweep.slurm.commands import Queued
from bnresearch.sweep.slurm.record import Record, Submitted


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--launcher.partition=gpu"], ["--launcher.partition is for SLURM", "--launcher=slurm"]),
        (["--cancel"], ["--cancel is for SLURM"]),
        (["--launcher=local", "--launcher.option=qos=a"], ["--launcher.option is for SLURM"]),
        (["--launcher=slurm", "--launcher.workers=2"], ["2 workers", "--launcher.parallel"]),
        (["--launcher=slurm", "--launcher.minutes=0"], ["launcher.minutes"]),
        (["--launcher=slurm", "--launcher.option==x"], ["'=x'", "name=value"]),
        (["--launcher=slurm", "--launcher.option=qos="], ["'qos='", "name=value"]),
        (["--launcher=slurm", "--launcher.option=time=5"], ["'time=5'", "--launcher.minutes"]),
        (["--launcher=slurm", "--launcher.option=--signal=USR1"], ["cannot be changed"]),
    ],
)
def test_flags_that_are_refused(refused, flags, parts):
    refused(["study", "a.py", "--scale=smoke", "--out=out", *flags], *parts)


def test_a_study_without_slurm_at_hand(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["study", "a.py", "--scale=smoke", "--out=out", "--launcher=slurm", "--cancel"]
    refused(argv, "sbatch is not on PATH", "login node")


def test_a_study_without_submitit(refused, monkeypatch, tmp_path):
    for name in commands.NEEDED:
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "submitit", None)
    argv = ["study", "a.py", "--scale=smoke", "--out=out", "--launcher=slurm", "--cancel"]
    refused(argv, "needs submitit", "pip install -e '.[slurm]'")


def test_only_what_was_submitted_can_be_cancelled(refused, monkeypatch):
    monkeypatch.setattr(commands, "check", lambda: None)
    argv = ["study", "a.py", "--scale=smoke", "--out=out", "--launcher=slurm", "--cancel"]
    refused(argv, "no jobs of SLURM were submitted from out/runs", "--out")


def test_options_become_those_of_sbatch(tmp_path):
    options = slurm.Options(
        *("gpu", 3, 8, 2, 4, 5), further=["account=physics", "--mail_type=END", "exclusive"]
    )
    found = commands._parameters(options, tmp_path, "bn-a", 10, "17")
    assert found.pop("setup")[0].endswith(f"={tmp_path}/$SLURM_JOB_ID.again")
    assert 'scontrol requeue "$SLURM_JOB_ID"' in found.pop("teardown")[1]
    assert found == {
        "job_name": "bn-a",
        "time": 3,
        "nodes": 4,
        "ntasks_per_node": 1,
        "array_parallelism": 5,
        "srun_args": ["--kill-on-bad-exit=1", "--cpus-per-task=8"],
        "wckey": None,
        "additional_parameters": dict(
            **dict(requeue=True, signal="TERM@45", account="physics", exclusive=True),
            **{"mail-type": "END"},
        ),
        "partition": "gpu",
        "cpus_per_task": 8,
        "gpus_per_node": 2,
        "dependency": "afterany:17",
    }


def test_options_for_another_launcher_are_refused(tmp_path):
    with pytest.raises(UserError, match="the launcher is inline: take slurm"):
        sweep([doing(tmp_path)], tmp_path / "runs", launcher="inline", cluster=slurm.Options())


def test_a_function_is_not_spread_over_nodes(tmp_path):
    with pytest.raises(UserError, match=r"leave out --launcher\.nodes"):
        sweep(
            *([doing(tmp_path)], tmp_path / "runs"),
            launcher="slurm",
            cluster=slurm.Options(nodes=2),
            show="off",
        )
    assert not (tmp_path / "runs").exists()


def test_the_queue_is_read(monkeypatch):
    text = "18_3|PENDING|Priority\n 17|RUNNING|None\n18_1|COMPLETING|None\n"
    monkeypatch.setattr(commands, "ask", lambda *command: text)
    assert commands.queued("bn-a") == {
        "18_3": Queued("PENDING", "Priority"),
        "17": Queued("RUNNING", "None"),
        "18_1": Queued("COMPLETING", "None"),
    }


# ---- On several nodes


@pytest.mark.parametrize(
    ("code", "status"),
    [(0, "done"), (1, "failed"), (2, "failed"), (3, "diverged"), (75, "stopped")],
)
def test_a_process_on_one_of_several_nodes_has_all_its_gpus(tmp_path, monkeypatch, code, status):
    called = []
    monkeypatch.setattr(task, "supervise", lambda *given: called.append(given) or code)
    for name, value in {"STEP_NODELIST": "n[1-2]", "PROCID": "1", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "")  # so that it is put back afterwards
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS")
    job, file = doing(tmp_path), tmp_path / "config.py"
    event = task._spread(job, Order(tmp_path / "runs", []), file)
    assert (event.id, event.status) == (job.id, status)
    assert os.environ["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"
    ((command, workdir, arguments),) = called
    assert command[-3:] == [
        *(f"--config={file}", f"--workdir={tmp_path / 'runs' / job.id}", "--progress=off")
    ]
    assert workdir == tmp_path / "runs" / job.id
    assert (processes.host(arguments), processes.number(arguments)) == ("n1", 1)


FAKES = {
    "srun": '[ -z "$DOES" ] || echo "$DOES" > "$RUN/status.json"; touch "$RUN/config.json" "$NOTE"',
    "squeue": 'case "$*" in *%k) echo "$COMMENT" ;; *) echo "$LEFT" ;; esac',
    "scontrol": 'echo "$@"; [ "$1" = update ]',  # a real "requeue" ends the script
    "hostname": "echo n2",
}
STEP = '{{\n  "schema": 2,\n  "step": {},\n  "message": null\n}}'
AGAIN = "update JobId=17 Comment=bnresearch-has-begun\nrequeue 17\n"


@pytest.mark.parametrize(
    ("before", "after", "about", "code", "said"),
    [
        (0, 0, {"LEFT": "0:00"}, 1, "not one step was done in most of the time limit; give more"),
        (None, None, {"LEFT": "0:00"}, 1, "not one step was done"),
        (0, 40, {"LEFT": "0:00"}, 75, AGAIN),
        (None, None, {"LEFT": "1-02:01:58"}, 75, AGAIN),  # preempted before its first step
        (0, 0, {"LEFT": "UNLIMITED"}, 75, AGAIN),
        (None, 40, {"COMMENT": "bnresearch-has-begun"}, 2, "run from n2: the nodes do not share"),
        (None, 40, {"COMMENT": "(null)"}, 75, AGAIN),  # had no time to make the folder before
    ],
)
@pytest.mark.parametrize("flag", ["--workdir={}", "--workdir {}"])
def test_the_script_for_one_run_is_queued_again_where_that_helps(
    tmp_path, before, after, about, code, said, flag
):
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (path := tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    # A second of work, so that more than no time at all has passed.
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nsleep 1\n{FAKES['srun']}\n")
    (run := tmp_path / "run").mkdir()
    if before is not None:
        (run / "status.json").write_text(STEP.format(before) + "\n")
        (run / "config.json").touch()
    environment = {
        "RUN": str(run),
        "TMPDIR": str(tmp_path),
        "workdir": "/nowhere",
        "LEFT": "9:00",
        "DOES": "" if after is None else STEP.format(after),
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": "1",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    script = ROOT / "scripts" / "slurm_train.sbatch"
    done = subprocess.run(
        ["bash", script, *flag.format(run).split()],
        capture_output=True,
        text=True,
        env=os.environ | environment | about,
        timeout=60,
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done


def test_jobs_that_nobody_wrote_down_are_those_of_unknown_arrays():
    known = {"a": Submitted("17_0", None), "b": Submitted("19_1", None)}
    queued = {job: Queued("PENDING", "None") for job in ("17_0", "17_1", "19_1", "18_0", "18_1")}
    queued["20_0"] = Queued("COMPLETING", "None")  # is being cancelled
    assert launch._orphans(known, queued) == ["18_0", "18_1"]


def test_a_record_of_another_version_is_refused(tmp_path):
    record = Record(tmp_path / "runs")
    record.folder.mkdir(parents=True)
    (record.folder / "jobs.json").write_text('{"schema": 1, "jobs": {}}')
    with pytest.raises(UserError, match="another version of bnresearch"), record.held():
        pass


# ---- Following


@pytest.fixture
def following(tmp_path, monkeypatch):
    """``following(queues)``: the events for one job, "17", while SLURM says one queue after the
    other, the last one for ever."""
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(launch, "TICK_SECONDS", 0.005)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(launch, "SECOND_SIGNAL_SECONDS", 0.0)
    job = doing(tmp_path, "go")
    order = Order(tmp_path / "out" / "runs", ["me"], slurm.Options())
    record = Record(order.folder)
    with record.held():
        record.write({job.id: Submitted("17", None)})

    def follow(queues, stop=None):
        left = iter(queues)
        last = [{}]

        def queued(name):
            assert name == record.name and re.fullmatch("bn-out-[0-9a-f]{6}", name)
            last[0] = next(left, last[0])
            if isinstance(last[0], Exception):
                raise last[0]
            return last[0]

        monkeypatch.setattr(commands, "queued", queued)
        found = launch._Following({job.id: job}, order, record)
        return [event for event in found.events(stop or threading.Event()) if event]

    follow.job, follow.record = job, record
    return follow


def test_a_job_that_left_nothing_points_at_the_file_system(following):
    waiting, running = {"17": Queued("PENDING", "Priority")}, {"17": Queued("RUNNING", "None")}
    *before, last = following([waiting, running, running, {}])
    run = following.job.id
    assert before == [Event(run, "waiting"), Event(run, "running")]
    assert (last.id, last.status) == (run, "failed")
    assert "SLURM's job 17 has ended without a result, and nothing of it is seen in" in last.message
    assert "the nodes do not share this file system" in last.message


def test_what_a_lost_job_printed_last_is_quoted(following):
    text = "\n".join(["", *(f"line {n}" for n in range(9)), ""])
    (following.record.folder / "17_0_log.err").write_text(text)
    (event,) = following([{}])
    assert event.message.endswith("without a result: line 4 | line 5 | line 6 | line 7 | line 8")


def test_why_jobs_wait_is_said_once_if_somebody_has_to_know(following):
    waiting = {
        "17": Queued("PENDING", "AssocGrpCpuLimit"),
        "18": Queued("PENDING", "OfAnotherStudy"),
    }
    events = following([waiting, waiting, {}])
    said = [event.message for event in events if event.status == "said"]
    assert said == ["SLURM lets jobs wait for: AssocGrpCpuLimit"]


def test_following_goes_on_while_the_controller_is_down(following):
    down = UserError("squeue gave no answer within 60 s")
    events = following([{"17": Queued("RUNNING", "None")}, down, down, {}])
    assert [event.status for event in events] == ["running", "said", "failed"]
    assert events[1].message == "squeue gave no answer within 60 s; trying again"


def test_a_run_that_was_submitted_again_is_followed_further(following):
    def queues():
        yield {"17": Queued("RUNNING", "None")}
        with following.record.held():
            following.record.write({following.job.id: Submitted("19", None)})
        yield {"19": Queued("RUNNING", "None")}
        yield {"19": Queued("RUNNING", "None")}
        yield {}

    *_, last = following(queues())
    assert last.message.startswith("SLURM's job 19 has ended")


def test_whoever_stops_following_leaves_the_jobs_alone(following):
    stop = threading.Event()
    stop.set()
    with pytest.raises(JobsGoOn, match="runs to go: 1; the jobs go on"):
        following([{"17": Queued("RUNNING", "None")}], stop)
