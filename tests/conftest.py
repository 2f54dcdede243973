"""Eight fake CPU devices for every test, set before jax makes its backend; shared fixtures."""

import sys

import jax
import pytest
from run_tools import assert_one_message, snapshot

from bnresearch.train import enable_compilation_cache

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# As `train` does itself, in subprocesses as well: a program is compiled once for all of them.
enable_compilation_cache()


@pytest.hookimpl(trylast=True)  # after pytest-xdist
def pytest_collection_modifyitems(config, items):
    """Tests that share an expensive fixture have to come to one worker."""
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if config.getoption("loadgroup", False) and any("@" not in item.nodeid for item in grouped):
        raise pytest.UsageError("pytest-xdist and pytest do not fit: groups of tests are ignored")


@pytest.fixture
def compiled():
    """The names of what jax has compiled since the test began."""
    names = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """``refused(argv, *parts)``: the command is refused in one message with these parts."""
    from bnresearch import __main__ as cli

    monkeypatch.chdir(tmp_path)

    def check(argv, *parts, lines=1):
        before = snapshot(tmp_path)
        monkeypatch.setattr(sys, "argv", ["bnresearch", *argv])
        assert cli.main() == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert_one_message(printed.err, parts, lines)
        assert snapshot(tmp_path) == before

    return check
