"""Populations: runs trained together are the runs that they are alone."""

import signal
import threading
import time

import jax
import numpy as np
import pytest
from run_tools import metrics, read
from sweep_tools import doing, training, trainings

from bnresearch import config as configs
from bnresearch import rundir, together
from bnresearch.checkpoint import Checkpoints
from bnresearch.experiment import prepare
from bnresearch.sweep import Counts, sweep
from bnresearch.sweep.jobs import Order, Queue
from bnresearch.sweep.population import population

K = 4
FAR = "optim.learning_rate=1e30"  # with a norm it takes some steps until nothing is finite


def result(folder, job):
    return read(folder / job.id / "result.json")


def digests(folder, jobs):
    return [result(folder, job)["digest"] for job in jobs]


def bring(jobs, folder, launcher="population", workers=K):
    return sweep(jobs, folder, launcher=launcher, workers=workers, show="off", command=["me"])


def final_state(folder, job):
    experiment = prepare(configs.unresolve(job.resolved))
    template = jax.eval_shape(experiment.program.init, experiment.numbers)
    step, state = Checkpoints(folder / job.id / "checkpoints", read_only=True).restore(template)
    assert step == 12
    return state


def assert_same_runs(together, alone, jobs):
    """The same folders, records and states, within what float32 loses in 12 steps."""
    for job in jobs:
        names = [
            {path.name for path in (folder / job.id).iterdir()} for folder in (together, alone)
        ]
        assert names[0] == names[1]
        for name in ("config.json", "status.json"):
            a, b = read(together / job.id / name), read(alone / job.id / name)
            # What is vmapped is left to XLA.
            changing = dict.fromkeys(("heartbeat", "started", "kernels"))
            assert a | changing == b | changing
            assert a.get("kernels") in (None, "xla")
        a, b = result(together, job), result(alone, job)
        assert (a["status"], a["step"], a["members"]) == (b["status"], b["step"], K)
        records = metrics(together / job.id), metrics(alone / job.id)
        for a, b in zip(*records, strict=True):
            assert a.pop("split") == b.pop("split")
            assert a == pytest.approx(b, rel=2e-4, abs=1e-5)
        states = [jax.tree.leaves(final_state(folder, job)) for folder in (together, alone)]
        for a, b in zip(*states, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


# ---- The same runs


NUMBERS = (
    ("seed=0",),
    ("seed=1", "optim.learning_rate=0.03"),
    ("seed=2", "optim.sgd.momentum=0.5"),
    ("seed=3", "optim.learning_rate=0.2", "optim.sgd.momentum=0.1"),
)
KINDS = {
    "batch": ("norm.batch.decay=0.7", "train.average.name=swa", "train.average.batches=3"),
    "group": ("norm.group.groups=2",),
    "none": ("train.average.name=ema", "train.average.ema.decay=0.5"),
    "ghost": ("norm.ghost.size=15",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_the_runs_that_they_are_alone(tmp_path, kind):
    """Dropout and shifted images: what is drawn at random has to be the member's own, too."""
    shared = (
        f"norm.kind={kind}",
        *KINDS[kind],
        "model.mlp.dropout=0.1",
        "data.augment=crop",
        "data.pad=1",
        "train.checkpoint_every=6st",
    )
    jobs = [training(*numbers, *shared) for numbers in NUMBERS]
    assert len({job.program for job in jobs}) == 1
    for launcher, workers in (("population", K), ("inline", 0)):
        wanted = Counts(done=4, diverged=0, failed={}, skipped=0)
        assert bring(jobs, tmp_path / launcher, launcher, workers) == wanted
    assert_same_runs(tmp_path / "population", tmp_path / "inline", jobs)


@pytest.mark.slow
def test_members_with_convolutions(tmp_path):
    model = ("model.name=plain", "model.plain.widths=(4, 8)", "model.plain.convs=(1, 1)")
    # The kernels that members have: others round otherwise, which 12 steps make more of.
    jobs = trainings(K, *model, "parallel.kernels=xla", "train.checkpoint_every=12st")
    for launcher, workers in (("population", K), ("inline", 0)):
        assert bring(jobs, tmp_path / launcher, launcher, workers).done == K
    assert_same_runs(tmp_path / "population", tmp_path / "inline", jobs)


def test_the_bits_of_a_member_depend_on_the_number_of_places_only(tmp_path):
    jobs = trainings(6)
    bring(jobs, tmp_path / "all")  # the last two have two places empty
    bring(jobs[5:], tmp_path / "alone")
    bring([*jobs[3:], *jobs[:1]], tmp_path / "some")
    wanted = digests(tmp_path / "all", jobs)
    assert digests(tmp_path / "alone", jobs[5:]) == wanted[5:]
    assert digests(tmp_path / "some", jobs[3:]) == wanted[3:]
    assert len(set(wanted)) == 6


def test_a_member_that_diverges_leaves_the_others_and_its_place(tmp_path):
    good = trainings(5)
    far = training("seed=7", FAR)
    assert far.program == good[0].program
    counts = bring([good[0], far, *good[1:]], tmp_path / "a")
    assert counts == Counts(done=5, diverged=1, failed={}, skipped=0)
    found = result(tmp_path / "a", far)
    assert (found["status"], found["message"]) == (
        "diverged",
        "the statistics of site norm1 are not finite",
    )
    assert read(tmp_path / "a" / far.id / "status.json")["status"] == "diverged"
    bring([far], tmp_path / "b", "inline", 0)
    assert result(tmp_path / "b", far)["step"] == found["step"]
    bring(good, tmp_path / "c")
    assert digests(tmp_path / "a", good) == digests(tmp_path / "c", good)


# ---- Stopped, held, failed


def launched(jobs, folder, workers=K, stop=None):
    return population(Queue(jobs), Order(folder, []), workers, stop or threading.Event())


def begun(folder, job):
    """Whether it has come to its first record, at step 3, where it saves its state, too."""
    path = folder / job.id / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


SAVING = ("train.checkpoint_every=3st", "train.log_every=3st")


def test_stopped_members_save_their_states_and_go_on(tmp_path):
    jobs = trainings(K + 1, *SAVING)
    bring(jobs, tmp_path / "b")
    stop, ends = threading.Event(), {}
    for event in launched(jobs, tmp_path / "a", stop=stop):
        if event is not None:
            ends[event.id] = event.status
        elif begun(tmp_path / "a", jobs[0]):
            stop.set()
    assert ends == {job.id: "stopped" for job in jobs[:K]}
    steps = [read(tmp_path / "a" / job.id / "status.json")["step"] for job in jobs[:K]]
    assert all(0 < step < 12 for step in steps)
    assert not (tmp_path / "a" / jobs[K].id).exists()
    assert bring(jobs, tmp_path / "a") == Counts(K + 1, 0, {}, 0)
    assert digests(tmp_path / "a", jobs) == digests(tmp_path / "b", jobs)
    for job in jobs:
        assert metrics(tmp_path / "a" / job.id) == metrics(tmp_path / "b" / job.id)


def test_members_out_of_step_are_the_same_runs(tmp_path):
    """One goes on from a checkpoint while the others begin; another writes more records."""
    jobs = [*trainings(2, *SAVING), training("seed=2", "train.log_every=5st")]
    assert len({job.program for job in jobs}) == 1
    events = launched(jobs[:1], tmp_path / "a")
    while not begun(tmp_path / "a", jobs[0]):
        next(events)
    events.close()
    assert (tmp_path / "a" / jobs[0].id / "checkpoints" / "3").is_dir()
    assert bring(jobs, tmp_path / "a").done == 3
    bring(jobs, tmp_path / "b")
    assert digests(tmp_path / "a", jobs) == digests(tmp_path / "b", jobs)
    for job in jobs:
        assert metrics(tmp_path / "a" / job.id) == metrics(tmp_path / "b" / job.id)


def test_a_population_that_is_closed_ends_its_members_at_once(tmp_path):
    jobs, before = trainings(K), threading.active_count()
    events = launched(jobs, tmp_path)
    for _ in range(K + 1):
        next(events)
    assert threading.active_count() == before + K
    events.close()
    assert threading.active_count() == before
    for job in jobs:
        status = read(tmp_path / job.id / "status.json")
        assert (status["status"], status["step"]) == ("stopped", 0)
        assert "interrupted" in status["message"]
        rundir.open_run(tmp_path / job.id, job.resolved, []).close()  # its lock is free


def test_an_interrupted_population_waits_for_who_goes_on():
    """What a member is writing is whole when the interrupted program ends."""
    ended = []

    def work(prepare):
        time.sleep(1.0)
        ended.append(1)

    running, main = together.Population(2), threading.main_thread().ident
    running.add(work)
    # Where the tests were started in the background, python leaves SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(running.advance())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == []
    running.close()
    assert ended == [1]


def test_a_run_that_another_process_holds_is_done_later(tmp_path):
    jobs = trainings(2)
    held = rundir.open_run(tmp_path / jobs[0].id, jobs[0].resolved, [])
    threading.Timer(1.0, held.close).start()
    assert bring(jobs, tmp_path) == Counts(2, 0, {}, 0)


def test_a_call_that_fails_is_told_to_every_member(tmp_path, monkeypatch):
    def broken(owns, common):
        raise ValueError("no room")

    monkeypatch.setattr(together, "vmapped", lambda *arguments: broken)
    jobs = trainings(2, "model.mlp.widths=(9,)")
    wanted = "RuntimeError: 4 members together: ValueError: no room"
    assert bring(jobs, tmp_path).failed == {job.id: wanted for job in jobs}
    assert read(tmp_path / jobs[0].id / "status.json")["message"] == wanted


# ---- Who trains together


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.mode=pmap",),
        ("parallel.mode=shard_map", "parallel.devices=2"),
        ("parallel.devices=2",),
    ],
)
def test_what_cannot_be_vmapped_trains_one_after_the_other(tmp_path, overrides):
    jobs = trainings(2, *overrides)
    for launcher, workers in (("population", K), ("inline", 0)):
        assert bring(jobs, tmp_path / launcher, launcher, workers).done == 2
    assert digests(tmp_path / "population", jobs) == digests(tmp_path / "inline", jobs)
    assert "members" not in result(tmp_path / "population", jobs[0])


def test_on_cpu_runs_train_one_after_the_other_unless_told(tmp_path):
    (job,) = trainings(1)
    bring([job], tmp_path / "rule", workers=0)
    bring([job], tmp_path / "inline", "inline", 0)
    assert digests(tmp_path / "rule", [job]) == digests(tmp_path / "inline", [job])


@pytest.mark.parametrize(
    ("platform", "overrides", "wanted"),
    [
        ("gpu", (), together.MEMBERS),
        ("tpu", (), together.MEMBERS),
        ("cpu", (), 1),
        ("gpu", ("model.name=plain",), 1),
        ("gpu", ("parallel.devices=2",), 1),
    ],
)
def test_the_rule(monkeypatch, platform, overrides, wanted):
    monkeypatch.setattr(together, "_platform", lambda program: platform)
    assert together.size(configs.unresolve(training(*overrides).resolved)) == wanted


def test_jobs_of_several_programs_and_functions(tmp_path):
    jobs = [
        *trainings(2),
        *trainings(2, "norm.kind=none", arm="none"),
        *(doing(tmp_path, "go", seed=n) for n in range(2)),
        training("data.batch_size=100000"),
    ]
    counts = bring(jobs, tmp_path / "runs")
    assert (counts.done, counts.diverged, list(counts.failed)) == (6, 0, [jobs[-1].id])
    assert "100000" in counts.failed[jobs[-1].id]
    assert result(tmp_path / "runs", jobs[5])["metrics"]["test"]["double"] == 2.0
