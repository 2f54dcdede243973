"""One run over several processes means what it means on one; nobody waits for who is gone."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from distributed_tools import Processes, children, training
from run_tools import DIGITS, ROOT, metrics, read, train

from bnresearch import config as configs
from bnresearch import distributed, processes, provenance, supervise
from bnresearch.errors import UserError
from bnresearch.train import run

# Scopes that do not depend on the number of devices, and those that do.
FREE, BOUND = ("global", "ghost:16"), ("group:2", "device")
CASES = [
    *(("jit", scope) for scope in (*FREE, *BOUND)),
    *((mode, scope) for mode in ("shard_map", "pmap") for scope in ("global", "group:2")),
]
LAYOUTS = {"1x8": (1, 8), "2x4": (2, 4), "4x2": (4, 2), "1x1": (1, 1)}


def runs_in(layout, case):
    """On one device what does not depend on how many there are; in four processes one mode."""
    mode, scope = case
    return {"1x1": scope in FREE, "4x2": mode == "jit"}.get(layout, True)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """What comes out of all cases by layout; on one device of those that do not depend on it."""
    folder, found = tmp_path_factory.mktemp("layouts"), {}
    for name, (several, devices) in LAYOUTS.items():
        cases = [case for case in CASES if runs_in(name, case)]
        given = [folder / f"{name}.npz", json.dumps(cases)]

        def command(index, address, count=several, given=given):
            script = ROOT / "tests" / "distributed_case.py"
            return [str(item) for item in (script, index, count, address, *given)]

        (logs := folder / name).mkdir()
        with Processes(several, command, devices, logs) as running:
            assert running.wait() == [0] * several, running.said(0)
        found[name] = dict(np.load(given[0]))
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("layouts")
@pytest.mark.parametrize(("mode", "scope"), CASES)
def test_a_run_means_the_same_in_all_layouts(layouts, mode, scope):
    """On one process with eight devices it equals numpy: test_parallel."""
    wanted = {k: v for k, v in layouts["1x8"].items() if k.startswith(f"{mode} {scope} ")}
    assert len(wanted) == 12
    for layout in (name for name in LAYOUTS if runs_in(name, (mode, scope))):
        for name, value in wanted.items():
            np.testing.assert_allclose(layouts[layout][name], value, atol=1e-5, err_msg=layout)


SHORT = (
    "data.batch_size=64",
    "model.mlp.widths=(16, 12)",
    "model.mlp.dropout=0.1",
    "train.duration=500st",
    "train.log_every=25st",
    "train.eval_every=250st",
    "train.checkpoint_every=50st",
)
ALONE = [["distributed.process=-1", "distributed.coordinator=''"]]


def begun(workdir, lines):
    """Whether a run has logged so often."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= lines


def status(workdir):
    return read(workdir / "status.json")


@pytest.mark.slow
def test_a_run_that_was_killed_and_stalled_ends_with_the_same_bits(tmp_path):
    with training(2, tmp_path / "whole", *SHORT) as whole:
        assert whole.wait() == [0, 0], whole.said(0)
    wanted = read(tmp_path / "whole" / "result.json")
    run = tmp_path / "run"

    def disturbed(lines, index, number):
        """How a run ends of which a process that computes gets a signal after so many lines."""
        with training(2, run, *SHORT, heartbeat=5) as running:
            running.until(lambda: begun(run, lines))
            os.kill(children(running.processes[index])[0], number)
            return running.wait(), status(run)["status"], status(run)["message"]

    codes, state, message = disturbed(5, 0, signal.SIGKILL)
    assert (codes, state) == ([1, 1], "failed")
    assert re.match(r"process 0 on \S+ was ended by SIGKILL", message)
    codes, state, message = disturbed(10, 1, signal.SIGSTOP)
    assert (codes, state) == ([1, 1], "failed")
    assert re.match(r"process 1 on \S+ did not move for 4 s", message)
    assert status(run)["processes"] == [socket.gethostname()] * 2
    shutil.copytree(run, tmp_path / "other")
    with training(2, run, *SHORT) as running:
        assert running.wait() == [0, 0], running.said(0)
    found = read(run / "result.json")
    assert (found["digest"], found["metrics"]) == (wanted["digest"], wanted["metrics"])
    assert metrics(run) == metrics(tmp_path / "whole")
    # The same checkpoint goes on with one process, and with other devices.
    with training(1, tmp_path / "other", *SHORT, each=ALONE, devices=4) as running:
        assert running.wait() == [0], running.said(0)
    found = read(tmp_path / "other" / "result.json")["metrics"]["test"]
    assert found == pytest.approx(wanted["metrics"]["test"], rel=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
    run, endless = tmp_path / "run", (*SHORT, "train.duration=1000000st")
    # It was begun by one process.
    with training(1, run, *endless, each=ALONE, devices=2) as running:
        running.until(lambda: begun(run, 3))
        running.processes[0].terminate()
        assert running.wait() == [75], running.said(0)
    before = len(metrics(run))
    # jax may take some seconds to tell the others.
    with training(2, run, *endless) as running:
        running.until(lambda: begun(run, before + 3))
        running.processes[1].terminate()
        assert running.wait() == [75, 75], running.said(0)
        said = [re.search(r"stopped after step (\d+), state", running.said(i)) for i in (0, 1)]
    steps = {int(match[1]) for match in said}
    assert steps == {status(run)["step"]} and status(run)["status"] == "stopped"
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) in steps
    logged = [line["step"] for line in metrics(run) if line["split"] == "train"]
    assert logged == list(range(25, max(steps) + 1, 25))


RAISING = """
import os, sys
import jax
from bnresearch import __main__, books
def raising(self, step, split, values):
    if step == 50:
        {way}
books.NoMetrics.write = raising
if __main__.processes.is_child():
    __main__.main_with_others()
sys.exit(__main__.main_or_supervisor())
"""


# How the second process ends, its exit code, and what is said of it.
ENDS = {
    "raise jax.errors.JaxRuntimeError('no memory')": (1, ": JaxRuntimeError: no memory"),
    "os.abort()": (1, " was ended by SIGABRT"),
    "sys.exit(5)": (5, ": SystemExit: 5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ENDS)
def test_a_process_that_ends_by_itself_ends_all_and_is_named(tmp_path, way):
    run, script = tmp_path / "run", tmp_path / "raising.py"
    script.write_text(RAISING.format(way=way))
    code, said = ENDS[way]
    with training(2, run, *SHORT, script=[str(script)]) as running:
        assert running.wait() == [1, code], running.said(0)
        assert said in running.said(0)
    assert re.match(rf"process 1 on \S+{said}", status(run)["message"])


IDLE = """
import time
from bnresearch import processes
processes.report_to_supervisor()
processes.tell("joining", 2, 0, "127.0.0.1:1", 30, 120, {stall})
processes.tell("joined", 0, [])
for _ in range({steps}):
    processes.advanced()
    time.sleep(0.5)
time.sleep({end})
"""


LOOPBACK = ["--config.distributed.coordinator=127.0.0.1:1"]


@pytest.mark.parametrize(("steps", "end", "code"), [(7, 0, 0), (2, 60, 1)])
def test_a_run_that_moves_but_does_not_advance_ends(tmp_path, capsys, steps, end, code):
    command = [sys.executable, "-c", IDLE.format(stall=2, steps=steps, end=end)]
    began = time.monotonic()
    assert supervise.supervise(command, tmp_path / "run", LOOPBACK) == code
    assert time.monotonic() - began < 30
    assert ("no step was done for 2 s (distributed.stall)" in capsys.readouterr().err) == code


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("import sys; sys.exit(7)", "process 3 on .* ended with exit code 7"),
        ("import time; time.sleep(60)", "process 3 on .* did not move for 1 s"),
        # The limit on steps counts from when all have come together.
        (IDLE.partition('processes.tell("joined"')[0] + "time.sleep(60)", "within 3 s"),
    ],
)
def test_a_process_that_does_not_come_to_join_the_others(
    tmp_path, capsys, monkeypatch, child, said
):
    monkeypatch.setattr(supervise, "START_SECONDS", 1.0)
    child = child.replace("120, {stall}", "3, 2")
    began = time.monotonic()
    arguments = [*LOOPBACK, "--config.distributed.process", "3"]
    code = supervise.supervise([sys.executable, "-c", child], tmp_path / "run", arguments)
    assert code == (7 if "7" in said else 2 if "within" in said else 1)
    assert time.monotonic() - began < 20
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.slow
def test_a_stream_over_two_processes_is_that_of_two_devices(tmp_path):
    """Each process reads its own rows, in microbatches and with a remainder at the end; an
    initialiser that looks at data looks at the same."""
    more = [*SHORT, "train.duration=20st", "train.accumulate=2", "data.in_memory=no"]
    more += ["data.workers=0", "data.image_size=8", "data.augment=crop", "init.name=lsuv"]
    more += ["data.eval_batch_size=51"]
    with training(2, tmp_path / "two", *more) as running:
        assert running.wait() == [0, 0], running.said(0)
    with training(1, tmp_path / "one", *more, each=ALONE, devices=2) as running:
        assert running.wait() == [0], running.said(0)
    one, two = (read(tmp_path / name / "result.json")["metrics"] for name in ("one", "two"))
    assert two["test"]["count"] == 270
    for split in one:
        assert two[split] == pytest.approx(one[split], rel=1e-4)


def test_other_configs_are_refused_by_all(tmp_path):
    each = (["seed=1"], ["seed=2"])
    with training(2, tmp_path / "run", *SHORT, each=each) as running:
        assert running.wait() == [2, 2], running.said(0)
        for index in (0, 1):
            assert "config.seed: process 0 1, process 1 2" in running.said(index)
            assert "Traceback" not in running.said(index)
    assert not (tmp_path / "run").exists()


UNEVEN = """
import os, sys
from bnresearch import __main__, processes
os.environ["JAX_NUM_CPU_DEVICES"] = str(1 + processes.number(sys.argv))
if processes.is_child():
    __main__.main_with_others()
sys.exit(__main__.main_or_supervisor())
"""


def test_different_numbers_of_devices_are_refused_by_all(tmp_path):
    (script := tmp_path / "uneven.py").write_text(UNEVEN)
    with training(2, tmp_path / "run", *SHORT, script=[str(script)]) as running:
        assert running.wait() == [2, 2], running.said(0)
        for index in (0, 1):
            assert "numbers of devices: process 0 1, process 1 2; give each" in running.said(index)
            assert "Traceback" not in running.said(index)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there", [0, 1])
def test_who_waits_in_vain_says_so(tmp_path, there):
    """The first for the second, and the second for the coordinator."""
    each = (["distributed.start=3"], [f"distributed.process={there}", "distributed.start=3"])
    with training(2, tmp_path / "run", *SHORT, each=each) as running:
        running.processes[1 - there].kill()
        assert running.wait()[there] == 2, running.said(there)
        assert "within 3 s (distributed.start)" in running.said(there)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["processes=2"], ["no scheduler says which this is", "distributed.process=0, 1"]),
        (["processes=2", "process=2", "coordinator=a:1"], ["counted from 0"]),
        (["processes=2", "process=0", "coordinator=a"], ["is not HOST:PORT"]),
        (["process=1"], ["of how many?"]),
        (["heartbeat=4"], ["at least 5 seconds"]),
    ],
)
def test_what_cannot_be_is_refused(refused, overrides, parts):
    refused(train(*(f"distributed.{item}" for item in overrides)), *parts)


SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        # A batch script itself is no step: only what it starts by srun is one of several.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ],
)
def test_schedulers_are_known(environment, several):
    assert (processes.plan(processes.DEFAULTS, environment) is not None) == several


@pytest.mark.parametrize("form", ["{}={}", "{} {}"])
def test_what_a_command_line_says_is_known_before_it_is_read(form):
    said = {"coordinator": "127.0.0.1:5", "process": "1"}
    arguments = [form.format(f"--config.distributed.{key}", value) for key, value in said.items()]
    arguments = " ".join(["train", *arguments]).split()
    assert processes.host(arguments, {}) == "127.0.0.1"
    assert processes.number(arguments, SLURM | {"SLURM_PROCID": "0"}) == 1
    assert (processes.number([], SLURM), processes.number([], {})) == (1, -1)


def test_a_changed_source_is_refused(tmp_path, monkeypatch):
    """Two checkouts of a commit, one of them changed: both are "...-dirty" if git looks."""
    shutil.copytree(ROOT / "bnresearch", tmp_path / "copy")
    (tmp_path / "copy" / ".#norm.py").symlink_to("somebody@host.1")  # an editor is at it
    (tmp_path / "copy" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "copy" / ".ipynb_checkpoints" / "norm.py").touch()
    same = provenance.sources()
    assert provenance.sources(tmp_path / "copy") == same
    assert {"norm.py", "native/convolution.cc", "native/parts.h"} <= same.keys()
    for name in ("norm.py", "native/parts.h"):
        with (tmp_path / "copy" / name).open("a") as file:
            file.write("// changed")
    changed = json.dumps(provenance.sources(tmp_path / "copy")).encode()
    mine = json.dumps(same).encode()
    monkeypatch.setattr(distributed, "everybodys", lambda data: [mine, mine, changed])
    with pytest.raises(UserError, match="^processes differ; start the same:\n") as caught:
        distributed.check_same(same, "start the same")
    files = [re.match(r"  (\S+): process 0 \S+, process 2 \S+$", line) for line in lines(caught)]
    assert [found[1] for found in files] == ["native/parts.h", "norm.py"]


def lines(caught):
    """Those of an error below its first."""
    return str(caught.value).splitlines()[1:]


def test_processes_whose_kernels_differ_are_refused(tmp_path, monkeypatch):
    """They would ask at different steps whether to stop."""

    def other(data):
        return [data, data.replace(b'"kernels": "xla"', b'"kernels": "native"')]

    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "everybodys", other)
    config = configs.load(DIGITS, SHORT)
    with pytest.raises(UserError, match="parallel.kernels=xla and another") as caught:
        run(config, tmp_path / "run", show="off")
    assert lines(caught) == ['  kernels: process 0 "xla", process 1 "native"']
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("apart", "said"), [(90, "+90"), (-3600, "-3600"), (30, None)])
def test_clocks_apart_are_named(monkeypatch, capsys, apart, said):
    monkeypatch.setattr(time, "time", lambda: 1e9 + apart)
    monkeypatch.setattr(distributed, "broadcast_bytes", lambda mine: b"1000000000.0")
    distributed._compare_clocks(processes.Plan(2, 1, "node1:1", 30, 120, 3600))
    warning = capsys.readouterr().err
    assert (f" is {said} s from that of process 0" in warning) if said else warning == ""


SHARE = """
import os, sys
from bnresearch.processes import share_cores
if len(sys.argv) > 3: os.sched_setaffinity(0, {int(sys.argv[3])})
share_cores(int(sys.argv[1]), int(sys.argv[2]))
print(os.sched_getscheduler(0) == os.SCHED_BATCH, *sorted(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are assigned on Linux only")
def test_processes_of_one_host_share_its_cores():
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(2, os.cpu_count()):
        pytest.skip("this machine has one core, or lends only some")

    def shared(*arguments):
        command = [sys.executable, "-c", SHARE, *map(str, arguments)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        batch, *kept = found.stdout.split()
        assert batch == "True"
        return [int(core) for core in kept]

    half = len(cores) // 2
    assert [shared(0, 2), shared(1, 2)] == [cores[:half], cores[half:]]
    assert [processes.share(range(8), index, 3) for index in range(3)] == [
        *([0, 1], [2, 3, 4], [5, 6, 7])
    ]
    assert shared(3, len(cores) + 1) == cores  # too few to share
    assert shared(0, 1, cores[1]) == cores[1:2]  # somebody has assigned one


def test_one_process_may_ignore_its_scheduler():
    assert processes.plan({**processes.DEFAULTS, "processes": 1}, SLURM) is None


def test_how_a_run_was_started_is_not_part_of_it():
    config = configs.load(DIGITS, ["distributed.processes=2", "distributed.process=1"])
    assert configs.resolve(config) == configs.resolve(configs.load(DIGITS))
