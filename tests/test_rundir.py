"""Run folders: one owner, one config, whole files, nothing written where a run is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bnresearch import locks, provenance, rundir
from bnresearch.errors import InUse, UserError

CONFIG = {"seed": 1, "data": {"name": "digits", "shape": (8, 8)}, "optim": {"rate": 0.1}}
SOURCE = Path(rundir.__file__).parents[1]
CODE = (
    "import json, sys, time; from bnresearch import rundir;"
    "rundir.open_run(sys.argv[1], {'seed': 1}, []); print('open', flush=True); time.sleep(60)"
)


def contents(folder):
    """Every path below a folder with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def start(code, workdir):
    """Another process that runs ``code``, and the first line that it prints."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    return child, child.stdout.readline()


def start_owner(workdir):
    """Another process that owns the folder."""
    child, line = start(CODE, workdir)
    assert line == "open\n"
    return child


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.communicate()


# ---- What is written


def test_a_new_folder_holds_the_config_and_a_lock(tmp_path):
    with rundir.open_run(tmp_path / "runs" / "a", CONFIG, ["bnresearch", "train"]) as run:
        assert run.path == tmp_path / "runs" / "a"
        assert sorted(os.listdir(run.path)) == ["config.json", "lock"]
        assert (run.path / "lock").read_text().split()[0] == str(os.getpid())
    assert rundir.read_config(run.path) == {
        "seed": 1,
        "data": {"name": "digits", "shape": [8, 8]},
        "optim": {"rate": 0.1},
    }


def test_status_says_what_runs_where(tmp_path):
    import jax

    before = datetime.now(UTC)
    with rundir.open_run(tmp_path, CONFIG, ["bnresearch", "train"]) as run:
        assert rundir.read_status(tmp_path) is None
        run.set_status("running", 10, epoch=0.5)
        first = rundir.read_status(tmp_path)
        time.sleep(0.01)
        run.about["convolutions"] = "xla"
        run.set_status("diverged", 20, "the loss is not finite")
    status = rundir.read_status(tmp_path)
    assert first["epoch"] == 0.5
    assert "convolutions" not in first and status["convolutions"] == "xla"
    assert (first["status"], first["step"], first["message"]) == ("running", 10, None)
    assert (status["status"], status["step"]) == ("diverged", 20)
    assert status["message"] == "the loss is not finite"
    assert status["schema"] == 1
    assert status["pid"] == os.getpid()
    assert status["command"] == ["bnresearch", "train"]
    assert status["versions"]["jax"] == jax.__version__
    assert set(status["versions"]) == {"python", *provenance.PACKAGES}
    assert status["device"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert first["started"] == status["started"]
    times = [datetime.fromisoformat(s) for s in (first["heartbeat"], status["heartbeat"])]
    assert before.replace(microsecond=0) <= times[0] < times[1] <= datetime.now(UTC)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "lock", "status.json"]


def test_a_status_that_a_power_cut_left_empty_is_none(tmp_path):
    (tmp_path / "status.json").touch()
    assert rundir.read_status(tmp_path) is None


def test_an_unknown_status_is_a_mistake(tmp_path):
    with (
        rundir.open_run(tmp_path, CONFIG, []) as run,
        pytest.raises(ValueError, match="unknown status 'finished'"),
    ):
        run.set_status("finished", 1)


def test_a_result_is_valid_json_and_keeps_what_is_not_finite(tmp_path):
    scores = {"test": {"loss": math.nan, "rates": [math.inf, -math.inf, 1.5]}}
    result = {"status": "done", "step": 3, "metrics": scores}
    with rundir.open_run(tmp_path, CONFIG, []) as run:
        assert rundir.read_result(tmp_path) is None
        run.write_result(result)
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text)["metrics"]["test"]["rates"] == ["Infinity", "-Infinity", 1.5]
    read = rundir.read_result(tmp_path)["metrics"]["test"]
    assert math.isnan(read["loss"])
    assert read["rates"] == [math.inf, -math.inf, 1.5]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    rundir.write_text(path, "old")

    def broken(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="No space"):
            rundir.write_text(path, "new and longer")
    assert path.read_text() == "old"
    rundir.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_files_are_readable_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        rundir.write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_reading_imports_no_jax():
    code = (
        "import sys; from bnresearch import metrics, rundir;"
        "assert not {'jax', 'flax', 'orbax'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# ---- The config


def test_the_same_config_goes_on(tmp_path):
    strange = CONFIG | {"clip": math.inf, "nan": math.nan, "none": None}
    for _ in range(2):
        with rundir.open_run(tmp_path, strange, []) as run:
            run.set_status("running", 1)
    with rundir.open_run(tmp_path, strange | {"seed": 1.0}, []):
        pass
    assert rundir.read_config(tmp_path)["clip"] == math.inf


def test_another_config_is_refused_with_the_keys_and_both_values(tmp_path):
    rundir.open_run(tmp_path, CONFIG, []).close()
    before = contents(tmp_path)
    other = {"seed": True, "data": {"name": "digits", "shape": (8, 9)}, "optim": {"new": "x"}}
    with pytest.raises(UserError, match="another config") as raised:
        rundir.open_run(tmp_path, other, [])
    assert str(raised.value).splitlines()[1:] == [
        "  data.shape: there [8, 8], now [8, 9]",
        '  optim.new: there absent, now "x"',
        "  optim.rate: there 0.1, now absent",
        "  seed: there 1, now true",
    ]
    assert contents(tmp_path) == before


def test_many_differences_end_with_a_count(tmp_path):
    rundir.open_run(tmp_path, {f"k{n:02d}": n for n in range(25)}, []).close()
    with pytest.raises(UserError) as raised:
        rundir.open_run(tmp_path, {f"k{n:02d}": -1 for n in range(25)}, [])
    lines = str(raised.value).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  ... and 15 more"


def test_a_config_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be written as JSON"):
        rundir.open_run(tmp_path / "a", {"x": object()}, [])
    assert os.listdir(tmp_path) == []


def test_a_broken_config_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match="is not JSON"):
        rundir.open_run(tmp_path, CONFIG, [])
    with pytest.raises(UserError, match="is not JSON"):
        rundir.read_config(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


def test_reading_what_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="is not a run folder"):
            rundir.read_config(path)


# ---- Workdirs that will not do


@pytest.mark.parametrize("workdir", ["", "a\0b"])
def test_what_is_no_path_is_refused(workdir):
    with pytest.raises(UserError, match="is not a path"):
        rundir.open_run(workdir, CONFIG, [])


@pytest.mark.parametrize("below", ["file", "file/a", "file/a/b"])
def test_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file"):
        rundir.open_run(tmp_path / below, CONFIG, [])
    assert contents(tmp_path) == {tmp_path / "file": b"precious"}


def test_a_link_to_nothing_is_called_that(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"link is a link to nothing; choose another"):
        rundir.open_run(tmp_path / "link", CONFIG, [])
    assert os.listdir(tmp_path) == ["link"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"neither empty nor a run.*thesis\.tex"):
        rundir.open_run(tmp_path, CONFIG, [])
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_or_one_with_hidden_files_will_do(tmp_path):
    (tmp_path / ".gitkeep").touch()
    rundir.open_run(tmp_path, CONFIG, []).close()
    assert (tmp_path / "config.json").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_where_nothing_can_be_made_is_refused():
    with pytest.raises(UserError, match="cannot write to workdir /proc/bnresearch/a"):
        rundir.open_run("/proc/bnresearch/a", CONFIG, [])


def test_a_name_that_is_too_long_leaves_no_parents_behind(tmp_path):
    with pytest.raises(UserError, match="cannot write to workdir"):
        rundir.open_run(tmp_path / "a" / "b" / ("x" * 300), CONFIG, [])
    assert os.listdir(tmp_path) == []


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    # os.access and not chmod: the tests may run as root, to whom everything is writable.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for workdir in (tmp_path, tmp_path / "a"):
        with pytest.raises(UserError, match="is not writable"):
            rundir.open_run(workdir, CONFIG, [])
    assert os.listdir(tmp_path) == []


def test_a_read_only_file_system_is_refused(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(rundir.os, "open", refuse)
    with pytest.raises(UserError, match="Read-only file system; choose another with --workdir"):
        rundir.open_run(tmp_path / "a" / "b", CONFIG, [])
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_refused_and_gives_the_lock_back(tmp_path, monkeypatch):
    def full(path, text, lasting):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_text", full)
        with pytest.raises(UserError, match="No space left on device"):
            rundir.open_run(tmp_path, CONFIG, [])
    rundir.open_run(tmp_path, CONFIG, []).close()


# ---- The lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    workdir = tmp_path / "a"
    owner = start_owner(workdir)
    try:
        before = contents(workdir)
        with pytest.raises(InUse, match=f"in use by process {owner.pid} on "):
            rundir.open_run(workdir, {"seed": 1}, [])
        assert contents(workdir) == before
    finally:
        kill(owner)
    rundir.open_run(workdir, {"seed": 1}, []).close()


def test_holders_of_a_shared_folder_wait_for_each_other(tmp_path, monkeypatch):
    order = []

    def second():
        with locks.held(tmp_path):
            order.append("second")

    with locks.held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    monkeypatch.setattr(locks, "HELD_SECONDS", 0.1)
    with locks.held(tmp_path), pytest.raises(UserError, match="has kept .* for 0 s; end it"):
        second()
    assert os.listdir(tmp_path) == ["lock"]


def test_the_same_process_cannot_open_a_folder_twice(tmp_path):
    with rundir.open_run(tmp_path, CONFIG, []), pytest.raises(UserError, match="in use by process"):
        rundir.open_run(tmp_path, CONFIG, [])
    rundir.open_run(tmp_path, CONFIG, []).close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    code = (
        "import os, sys, time; from bnresearch import rundir;"
        "rundir.open_run(sys.argv[1], {}, []);"
        "os.fork() or print(os.getpid(), flush=True);"  # the child, when it is quite there
        "time.sleep(30)"
    )
    parent, line = start(code, tmp_path)
    child = int(line)
    parent.kill()
    parent.wait()
    parent.stdout.close()  # its other end is the child's as well: reading on would wait for it
    try:
        os.kill(child, 0)  # it lives
        rundir.open_run(tmp_path, {}, []).close()
    finally:
        os.kill(child, signal.SIGKILL)


# ---- Where the source came from


def git(folder, *arguments):
    options = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *options, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_is_that_of_the_source_and_says_if_it_was_changed(tmp_path, monkeypatch):
    source = tmp_path / "package" / "provenance.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(source))
    monkeypatch.setattr(provenance, "_version", lambda package: "1.2.3")
    git(tmp_path, "init")
    assert provenance.commit.__wrapped__() == "version 1.2.3"  # in a repository, but not of it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    commit = provenance.commit.__wrapped__()
    assert len(commit) == 40
    assert set(commit) <= set("0123456789abcdef")
    source.write_text("x = 2\n")
    assert provenance.commit.__wrapped__() == commit + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit.__wrapped__() == "version 1.2.3"  # no git
