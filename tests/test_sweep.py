"""Sweeps: what is skipped, resumed, put off, failed and stopped, in this process and in workers."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import threading
import time

import pytest
from run_tools import read
from sweep_tools import DIVERGING, SWEEP, TOO_LARGE, doing, start, training, trainings

from bnresearch import metrics, rundir
from bnresearch.errors import UserError
from bnresearch.sweep import Counts, launchers, sweep
from bnresearch.sweep.jobs import Order, Queue
from bnresearch.tasks import TASKS


def statuses(folder, jobs):
    return [(rundir.read_status(folder / job.id) or {}).get("status") for job in jobs]


def digests(folder, jobs):
    return [read(folder / job.id / "result.json")["digest"] for job in jobs]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ---- How runs end


def test_every_run_comes_to_its_end_whatever_the_others_do(tmp_path):
    good, diverging, failing = training(), training(*DIVERGING), training(*TOO_LARGE)
    jobs = [failing, diverging, good, good]
    counts = sweep(jobs, tmp_path, launcher="inline", show="off", command=["me"])
    assert (counts.done, counts.diverged, counts.skipped) == (1, 1, 0)
    (reason,) = counts.failed.values()
    assert "100000" in reason
    assert statuses(tmp_path, jobs) == ["failed", "diverged", "done", "done"]
    assert read(tmp_path / failing.id / "status.json")["message"] == reason
    assert not (tmp_path / failing.id / "result.json").exists()
    assert read(tmp_path / good.id / "config.json") == good.resolved
    assert read(tmp_path / good.id / "status.json")["command"] == ["me"]
    assert not (tmp_path / good.id / "checkpoints").exists()
    assert not (tmp_path / good.id / "tensorboard").exists()


def test_what_has_a_result_is_skipped_and_what_failed_is_tried_again(tmp_path):
    log = tmp_path / "log"
    jobs = [doing(tmp_path, what, seed=1, log=str(log)) for what in ("fail", "go")]
    first = sweep(jobs, tmp_path / "runs", launcher="inline", show="off")
    wanted = {jobs[0].id: "ValueError: no such thing"}
    assert first == Counts(done=1, diverged=0, failed=wanted, skipped=0)
    assert sweep(jobs, tmp_path / "runs", launcher="inline", show="off") == first._replace(
        skipped=1
    )
    assert log.read_text().splitlines() == ["fail 1", "go 1", "fail 1"]


def test_a_function_has_its_numbers_in_the_result(tmp_path):
    job = doing(tmp_path, "go", seed=21)
    sweep([job], tmp_path / "runs", launcher="inline", show="off")
    result = read(tmp_path / "runs" / job.id / "result.json")
    assert result["metrics"]["test"]["double"] == 42.0
    assert (result["status"], result["step"], result["schema"]) == ("done", 0, 1)
    assert read(tmp_path / "runs" / job.id / "config.json") == job.resolved
    assert statuses(tmp_path / "runs", [job]) == ["done"]


def test_a_function_has_to_return_named_numbers(tmp_path):
    job = doing(tmp_path, "one")
    counts = sweep([job], tmp_path / "runs", launcher="inline", show="off")
    assert "does() in " in counts.failed[job.id]
    assert 'returns 1.5; let it return named numbers, as {"name": 1.0}' in counts.failed[job.id]


@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_a_function_that_changes_during_a_sweep_is_not_measured(tmp_path, launcher):
    jobs = [doing(tmp_path, "go", seed=n) for n in range(2)]
    sweep(jobs[:1], tmp_path / "runs", launcher=launcher, show="off")
    path = tmp_path / "doing.py"
    path.write_text(path.read_text().replace("2 * seed", "3 * seed"))
    counts = sweep(jobs, tmp_path / "runs", launcher=launcher, show="off")
    assert (counts.done, counts.skipped) == (1, 1)
    assert "was changed since the study began" in counts.failed[jobs[1].id]
    assert statuses(tmp_path / "runs", jobs) == ["done", "failed"]


def test_runs_record_what_measures_are_checked_against(tmp_path):
    job = training()
    sweep([job], tmp_path, launcher="inline", show="off")
    found = {"train": set(), "validation": set(), "test": set()}
    for record in metrics.read_metrics(tmp_path / job.id):
        found[record.pop("split")] |= record.keys() - {"step", "epoch"}
    evaluated = set(TASKS["classification"].METRICS)
    assert found == {
        "train": set(metrics.OF_TRAINING),
        "validation": evaluated,
        "test": evaluated,
    }


def test_a_broken_result_is_a_failed_run_and_stays(tmp_path):
    job = training()
    sweep([job], tmp_path, launcher="inline", show="off")
    path = tmp_path / job.id / "result.json"
    path.write_text('{"status": "do')
    counts = sweep([job], tmp_path, launcher="inline", show="off")
    assert "is not JSON" in counts.failed[job.id]
    assert path.read_text() == '{"status": "do'


def test_two_thousand_finished_runs_are_recognised(tmp_path):
    jobs = [doing(tmp_path, "go", seed=seed) for seed in range(2000)]
    for job in jobs:
        (tmp_path / job.id).mkdir()
        text = json.dumps({"status": "done", "step": 500, "metrics": {"test": {"loss": 0.1}}})
        (tmp_path / job.id / "result.json").write_text(text)
    assert sweep(jobs, tmp_path, show="off") == Counts(2000, 0, {}, 2000)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"launcher": "slrum"}, "inline"),
        ({"workers": -1}, "-1 workers"),
        ({"show": "x"}, "lines"),
        ({"launcher": "inline", "workers": 2}, "2 workers .* take the launcher local"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, part):
    with pytest.raises(UserError, match=part):
        sweep([doing(tmp_path)], tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


# ---- Worker processes


@pytest.mark.slow
def test_workers_get_the_digests_of_this_process(tmp_path, monkeypatch):
    # The tests' eight devices have eight threads. Wide layers are divided among them.
    monkeypatch.setenv("NPROC", "8")
    wide = ("model.mlp.widths=(512,512)", "data.batch_size=512")
    jobs = [*trainings(3), *trainings(3, *wide, arm="wide"), training(*DIVERGING)]
    assert sweep(jobs, tmp_path / "a", launcher="inline", show="off") == Counts(6, 1, {}, 0)
    counts = sweep(jobs, tmp_path / "b", launcher="local", workers=2, show="off")
    assert counts == Counts(6, 1, {}, 0)
    assert digests(tmp_path / "a", jobs[:6]) == digests(tmp_path / "b", jobs[:6])
    pids = {read(tmp_path / "b" / job.id / "status.json")["pid"] for job in jobs}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_worker_that_dies_takes_only_its_run_along(tmp_path, capsys):
    whats = ["go", "die", "exit", "go", "go"]
    jobs = [doing(tmp_path, what, seed=n) for n, what in enumerate(whats)]
    counts = sweep(jobs, tmp_path / "runs", launcher="local", workers=2, show="off")
    assert (counts.done, counts.diverged) == (3, 0)
    assert counts.failed == {
        jobs[1].id: "the worker process was ended by SIGKILL (out of memory?)",
        jobs[2].id: "the worker process ended with exit code 7",
    }
    assert statuses(tmp_path / "runs", jobs) == ["done", "failed", "failed", "done", "done"]
    status = read(tmp_path / "runs" / jobs[1].id / "status.json")
    assert status["message"] == counts.failed[jobs[1].id]
    assert "last words" in capsys.readouterr().err


def test_a_worker_that_is_asked_to_end_takes_no_run_along(tmp_path):
    jobs = [doing(tmp_path, "end", seed=n) for n in range(4)]
    counts = sweep(jobs, tmp_path / "runs", launcher="local", workers=1, show="off")
    assert counts == Counts(4, 0, {}, 0)
    pids = {read(tmp_path / "runs" / job.id / "status.json")["pid"] for job in jobs}
    assert len(pids) == 4


def test_a_function_that_leaves_the_program_has_failed(tmp_path):
    job = doing(tmp_path, "leave")
    counts = sweep([job], tmp_path / "runs", launcher="inline", show="off")
    assert counts.failed == {job.id: "SystemExit: goodbye"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_workers_are_pinned(tmp_path):
    jobs = [doing(tmp_path, "go", seed=n) for n in range(2)]
    sweep(jobs, tmp_path / "runs", launcher="local", workers=2, show="off")
    mine = len(os.sched_getaffinity(0))
    for job in jobs:
        cores = read(tmp_path / "runs" / job.id / "result.json")["metrics"]["test"]["cores"]
        assert cores in (max(1, mine // 2), max(1, (mine + 1) // 2))


def test_workers_that_cannot_start_end_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="before they are ready"):
        sweep([doing(tmp_path)], tmp_path / "runs", launcher="local", workers=1, show="off")


# ---- Stopping


def sweeping(folder, launcher, jobs):
    """A sweep in a process of its own, that has begun."""
    process = start(SWEEP, folder, launcher, stdin=subprocess.PIPE)
    process.stdin.write(pickle.dumps(jobs))
    process.stdin.close()
    process.stdin = None
    return process


LONG = ("train.duration=20000st", "train.log_every=100st", "train.eval_every=20000st")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["inline", "local"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_goes_on_bit_for_bit(tmp_path, launcher, number):
    jobs = trainings(2, *LONG)
    process = sweeping(tmp_path / "a", launcher, jobs)
    path = tmp_path / "a" / jobs[0].id / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") > 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert b"SweepStopped" in out
    stopped = read(tmp_path / "a" / jobs[0].id / "status.json")
    assert stopped["status"] == "stopped"
    assert 0 < stopped["step"] < 20000
    assert os.listdir(tmp_path / "a" / jobs[0].id / "checkpoints") == [str(stopped["step"])]
    assert sweep(jobs[:1], tmp_path / "a", launcher="inline", show="off").done == 1
    assert sweep(jobs[:1], tmp_path / "b", launcher="inline", show="off").done == 1
    assert digests(tmp_path / "a", jobs[:1]) == digests(tmp_path / "b", jobs[:1])


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_coordinator(tmp_path, number):
    jobs = [doing(tmp_path, "wait", seed=n, log=str(tmp_path / "log")) for n in range(2)]
    process = sweeping(tmp_path / "runs", "local", jobs)
    folders = [tmp_path / "runs" / job.id / "status.json" for job in jobs]
    wait_for(lambda: all(path.exists() for path in folders))
    pids = [read(path)["pid"] for path in folders]
    process.send_signal(number)
    if number == signal.SIGINT:
        time.sleep(0.2)
        process.send_signal(number)  # the second one does not wait
    process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert process.returncode == 75
        wait_for(lambda: not any(map(alive, pids)), 30)
    assert statuses(tmp_path / "runs", jobs) == ["running", "running"]
    (tmp_path / "log.go").touch()  # without a coordinator, they end what they are at
    wait_for(lambda: not any(map(alive, pids)), 30)
    counts = sweep(jobs, tmp_path / "runs", launcher="local", workers=2, show="off")
    assert (counts.done, counts.failed) == (2, {})


def test_nobody_is_started_for_the_rest_once_a_sweep_is_to_stop(tmp_path, monkeypatch):
    """While one worker brings its run to an end, the other is idle and ends."""
    begun = []

    class Counted(launchers.Worker):
        def __init__(self, place):
            begun.append(place)
            super().__init__(place)

    monkeypatch.setattr(launchers, "Worker", Counted)
    jobs = [doing(tmp_path, "wait", log=str(tmp_path / "log"))]
    jobs += [doing(tmp_path, "go", seed=n, seconds=0.2) for n in range(50)]
    stop, ends = threading.Event(), {}
    for event in launchers.local(Queue(jobs), Order(tmp_path / "runs", []), 2, stop):
        if event is not None and event.status == "done":
            ends[event.id] = event.status
            # The worker of the one that waits may be the later one to be ready.
            if not stop.is_set() and (tmp_path / "log").exists():
                stop.set()
                threading.Timer(3.0, (tmp_path / "log.go").touch).start()
    assert len(begun) == 2
    assert ends[jobs[0].id] == "done" and len(ends) < 25


# ---- Workers that are there before the jobs

# A process that was ended between their start and the first job.
EARLY = """
import os, time
from bnresearch.sweep import launchers
core = min(os.sched_getaffinity(0))
launchers._cores = lambda: [core, core]
with launchers.started_early("local", 2):
    print(*(worker.process.pid for worker in launchers._EARLY), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def two_cores(monkeypatch):
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(launchers, "_cores", lambda: [core, core])


def test_a_worker_that_is_there_already_gets_jobs(tmp_path, two_cores):
    jobs = [doing(tmp_path, "go", seed=seed, seconds=0.1) for seed in range(4)]
    with launchers.started_early("local", 2):
        (early,) = launchers._EARLY  # one core is left to this process
        counts = sweep(jobs, tmp_path / "runs", launcher="local", workers=2, show="off")
        assert early.process.returncode is not None
    assert (counts.done, counts.failed) == (4, {})
    pids = [read(tmp_path / "runs" / job.id / "status.json")["pid"] for job in jobs]
    assert early.process.pid in pids


def test_a_worker_that_does_not_suit_the_jobs_is_ended(tmp_path, two_cores):
    """One job alone has all cores."""
    job = doing(tmp_path, "go")
    with launchers.started_early("local", 2):
        (early,) = launchers._EARLY
        assert sweep([job], tmp_path / "runs", launcher="local", workers=2, show="off").done == 1
        assert early.process.returncode == -signal.SIGKILL
    assert read(tmp_path / "runs" / job.id / "status.json")["pid"] != early.process.pid


def test_a_worker_of_another_environment_is_ended(tmp_path, two_cores, monkeypatch):
    jobs = [doing(tmp_path, "go", seed=seed) for seed in range(2)]
    with launchers.started_early("local", 2):
        (early,) = launchers._EARLY
        monkeypatch.setenv("OF_A_STUDY_FILE", "1")
        assert sweep(jobs, tmp_path / "runs", launcher="local", workers=2, show="off").done == 2
        assert early.process.returncode == -signal.SIGKILL


def test_a_worker_without_jobs_ends_with_a_refusal(two_cores, capfd):
    with contextlib.suppress(UserError), launchers.started_early("auto", 2):
        (early,) = launchers._EARLY
        raise UserError("no")
    assert early.process.returncode == -signal.SIGKILL
    assert launchers._EARLY == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("launcher", "workers"), [("auto", 0), ("inline", 0), ("population", 2)])
def test_no_worker_is_started_where_none_is_asked_for(two_cores, launcher, workers):
    with launchers.started_early(launcher, workers):
        assert launchers._EARLY == []


def test_a_worker_without_jobs_ends_with_its_coordinator():
    process = start(EARLY)
    (pid,) = map(int, process.stdout.readline().split())
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: not alive(pid), 30)


# ---- Sharing


def test_a_run_that_another_process_holds_is_done_later(tmp_path):
    jobs = [doing(tmp_path, "go", seed=n) for n in range(2)]
    held = rundir.open_run(tmp_path / "runs" / jobs[0].id, jobs[0].resolved, [])
    threading.Timer(1.0, held.close).start()
    counts = sweep(jobs, tmp_path / "runs", launcher="inline", show="off")
    assert counts == Counts(2, 0, {}, 0)
    ends = [read(tmp_path / "runs" / job.id / "status.json")["heartbeat"] for job in jobs]
    assert ends[1] < ends[0]


def test_two_sweeps_share_a_folder_and_do_nothing_twice(tmp_path):
    log = tmp_path / "log"
    jobs = [doing(tmp_path, "go", seed=n, seconds=0.1, log=str(log)) for n in range(20)]
    processes = [sweeping(tmp_path / "runs", "local", jobs) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert b"done=20, diverged=0, failed={}" in out
    assert sorted(log.read_text().splitlines()) == sorted(f"go {n}" for n in range(20))
    assert len({read(tmp_path / "runs" / job.id / "status.json")["pid"] for job in jobs}) > 1
