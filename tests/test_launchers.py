"""The parts of a sweep by themselves: who gets which job, what is shown, what workers have."""

import io

import pytest
from rich.console import Console

from bnresearch import metrics
from bnresearch.sweep import board, jobs, launchers
from bnresearch.sweep.jobs import Job, Queue


def make(programs, arm="a"):
    return [Job(f"{n}", f"label {n}", arm, {}, program) for n, program in enumerate(programs)]


# ---- Who gets which job


def drain(queue, workers):
    """The programs that each of so many equally fast workers gets, in turns."""
    last, taken = [None] * workers, [[] for _ in range(workers)]
    while len(queue):
        for worker in range(workers):
            job = queue.take(last[worker])
            if job is not None:
                last[worker] = job
                taken[worker].append(job.program)
    return ["".join(programs) for programs in taken]


@pytest.mark.parametrize(
    ("programs", "workers", "wanted"),
    [
        ("ababab", 1, ["aaabbb"]),
        ("abababab", 2, ["aaaa", "bbbb"]),
        ("aaaaaa", 2, ["aaa", "aaa"]),
        ("aaabbbccc", 2, ["aaacc", "bbbc"]),  # both are free at once: they share the rest
        ("abcabcabc", 3, ["aaa", "bbb", "ccc"]),
        ("aaaaaabb", 3, ["aaa", "aaa", "bb"]),
    ],
)
def test_a_program_is_compiled_by_as_few_workers_as_keep_all_busy(programs, workers, wanted):
    assert drain(Queue(make(programs)), workers) == wanted


def test_jobs_put_off_come_again_later(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    queue = Queue(make("ab"))
    first = queue.take(None)
    queue.put_off(first)
    second = queue.take(first)
    assert (first.id, second.id) == ("0", "1")
    assert queue.take(second) is None
    assert len(queue) == 1
    now[0] = jobs.PUT_OFF_SECONDS
    assert queue.take(second) == first
    assert len(queue) == 0


def test_a_job_given_back_is_the_next():
    queue = Queue(make("aaa"))
    first = queue.take(None)
    queue.give_back(first)
    queue.leave(first)
    assert [queue.take(None).id for _ in range(3)] == ["0", "1", "2"]


# ---- What workers have


@pytest.mark.parametrize(
    ("cores", "devices", "count", "wanted"),
    [
        ([0, 1], [], 2, [((0,), None), ((1,), None)]),
        ([0, 1, 2, 3], [], 2, [((0, 1), None), ((2, 3), None)]),
        ([5], [], 2, [((5,), None), ((5,), None)]),
        ([0, 1, 2], ["0", "3"], 2, [((0,), "0"), ((1, 2), "3")]),
    ],
)
def test_places(monkeypatch, cores, devices, count, wanted):
    monkeypatch.setattr(launchers, "_cores", lambda: cores)
    monkeypatch.setattr(launchers, "gpus", lambda: devices)
    found = launchers.places(count)
    shown = [(place.cores, place.environment.get("CUDA_VISIBLE_DEVICES")) for place in found]
    assert shown == wanted
    assert launchers.default_workers() == (len(devices) or len(cores))


def test_workers_that_share_a_gpu_leave_each_other_memory(monkeypatch):
    monkeypatch.setattr(launchers, "gpus", lambda: ["0"])
    for place in launchers.places(2):
        assert place.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    (alone,) = launchers.places(1)
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in alone.environment


def test_workers_have_the_threads_and_platforms_of_this_process(monkeypatch):
    monkeypatch.setattr(launchers, "_cores", lambda: [0, 1, 2, 3])
    monkeypatch.delenv("NPROC", raising=False)
    for place in launchers.places(4):
        assert place.environment == {"NPROC": "4", "JAX_PLATFORMS": "cpu"}
    monkeypatch.setenv("NPROC", "3")
    assert launchers.places(1)[0].environment["NPROC"] == "3"


def test_gpus_are_those_that_jax_may_use(monkeypatch):
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-5")
    assert launchers.gpus() == []  # the tests run on the CPU
    monkeypatch.delitem(launchers.sys.modules, "jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert launchers.gpus() == ["1", "GPU-5"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launchers.gpus() == []
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: None)
    assert launchers.gpus() == []  # there may be one, but no plugin for it


def test_a_tpu_has_one_worker(monkeypatch):
    monkeypatch.setattr(launchers, "_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(
        launchers.importlib.util, "find_spec", lambda name: name == "libtpu" or None
    )
    assert launchers.default_workers() == 4  # the tests run on the CPU
    monkeypatch.setattr(launchers, "_platforms", lambda: "")
    assert launchers.default_workers() == 1
    assert launchers.choose(100, 0) == "inline"


@pytest.mark.parametrize(
    ("count", "places", "workers", "wanted"),
    [(8, 4, 0, "inline"), (9, 4, 0, "local"), (100, 1, 0, "inline"), (2, 1, 2, "local")],
)
def test_the_launcher_that_suits(monkeypatch, count, places, workers, wanted):
    monkeypatch.setattr(launchers, "default_workers", lambda: places)
    assert launchers.choose(count, workers) == wanted


# ---- What is shown


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_leaves_out_what_compiles_and_what_was_skipped(clock):
    tally = board.Tally(make("aaaaaaaa"), {"0": "done", "1": "diverged"})
    assert tally.progress() == "2 of 8 runs"
    clock[0] += 30  # the first one compiles
    tally.move("2", "done")
    assert tally.progress() == "3 of 8 runs"
    clock[0] += 2
    tally.move("3", "failed")
    assert tally.progress() == "4 of 8 runs, 2 s/run, 0:08 left"
    clock[0] += 0.5
    for job in "456":
        tally.move(job, "done")
    assert tally.progress() == "7 of 8 runs, 1.6 runs/s, 0:01 left"


def test_states_are_counted_by_arm():
    tally = board.Tally([*make("aa", "x"), Job("9", "", "y", {})], {"9": "diverged"})
    tally.move("0", "running")
    tally.move("1", "stopped")
    assert tally.rows() == {"x": {"running": 1, "waiting": 1}, "y": {"diverged": 1}}


@pytest.mark.parametrize("kind", ["bar", "lines", "off"])
def test_what_a_board_shows(kind):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=kind == "bar", width=100, color_system=None)
    tally = board.Tally([*make("aa", "[x]"), Job("9", "", "y", {})], {"9": "done"})
    with board.board(kind, tally, console) as display:
        tally.move("0", "diverged")
        tally.move("1", "failed")
        display.refresh()
        display.say("failed: [b]no markup[/b]")
    shown = stream.getvalue()
    assert "failed: [b]no markup[/b]" in shown
    assert ("3 of 3 runs" in shown) == (kind != "off")
    if kind == "bar":
        rows = [line.split() for line in shown.splitlines() if line.startswith(("arm", "[x]"))]
        assert rows[0] == ["arm", "done", "running", "diverged", "failed", "waiting"]
        assert rows[-1] == ["[x]", "1", "1"]
    if kind == "lines":
        assert shown.splitlines()[-1].endswith("1 diverged, 1 failed")


def test_boards_are_the_displays_of_runs():
    assert board.BOARDS.keys() == metrics.PROGRESS.keys()
