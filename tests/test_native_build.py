"""What is compiled, where it lies, and what is said and done where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import native
from bnresearch.config import default_config, validate
from bnresearch.errors import UserError
from bnresearch.experiment import prepare
from bnresearch.native import build

MARK = "bnresearch_convolution"
LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder; afterwards as before."""
    monkeypatch.setenv("BNRESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    before = (build.load, build.ready, build.there)
    for cached in before:
        cached.cache_clear()
    yield
    for cached in before:
        cached.cache_clear()


@pytest.fixture
def installed():
    """Skips where the extra cpu is missing."""
    try:
        build.find_onednn(), build.find_compiler()
    except build.Missing as missing:
        pytest.skip(str(missing))


def convolve(mode):
    """A small convolution, its program, and XLA's result."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)
    kernel = jnp.ones((3, 3, 3, 4))

    def run(function):
        return jax.jit(lambda x, k: function(x, k, (1, 1), "SAME", dimension_numbers=LAYOUT))

    ours = run(native.conv_general_dilated(mode))
    text = ours.lower(x, kernel).as_text()
    return ours(x, kernel), text, run(jax.lax.conv_general_dilated)(x, kernel)


def no_onednn(monkeypatch, tmp_path):
    def missing():
        raise build.Missing("oneDNN is not installed; pip install 'bnresearch[cpu]' brings it")

    monkeypatch.setattr(build, "find_onednn", missing)


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def broken_compiler(monkeypatch, tmp_path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'a.cc:1: error: nothing compiles today' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def no_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BNRESEARCH_CACHE", str(tmp_path / "file"))


FAULTS = {
    no_onednn: "oneDNN is not installed; pip install 'bnresearch[cpu]'",
    no_compiler: "there is no C++ compiler (c++, g++, clang++); install",
    broken_compiler: "error: nothing compiles today",
    no_folder: "cannot be written",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_missing_is_said_once_and_xla_goes_on(
    fault, afresh, installed, monkeypatch, tmp_path, capsys
):
    fault(monkeypatch, tmp_path)
    for _ in range(2):
        ours, text, xla = convolve("auto")
        assert MARK not in text
        np.testing.assert_array_equal(ours, xla)
    notes = [x for x in capsys.readouterr().err.splitlines() if "compiling" not in x]
    assert len(notes) == 1
    assert notes[0].startswith("native: all runs on XLA")
    assert FAULTS[fault] in notes[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_forced_it_is_refused_with_the_reason(fault, afresh, installed, monkeypatch, tmp_path):
    fault(monkeypatch, tmp_path)
    with pytest.raises(UserError) as refusal:
        convolve("native")
    assert "parallel.kernels=native" in str(refusal.value)
    assert FAULTS[fault] in str(refusal.value)


def test_forced_a_run_without_convolutions_is_refused_too(afresh, monkeypatch, tmp_path):
    no_onednn(monkeypatch, tmp_path)
    config = default_config()
    config.parallel.kernels = "native"
    with pytest.raises(UserError, match="parallel.kernels=native: oneDNN is not installed"):
        prepare(config)


def test_what_is_expected_is_known_without_compiling(
    afresh, installed, monkeypatch, tmp_path, capsys
):
    assert [native.expected(mode) for mode in ("auto", "native", "xla")] == [True, True, False]
    assert capsys.readouterr().err == ""
    no_compiler(monkeypatch, tmp_path)
    build.there.cache_clear()
    assert not native.expected("auto")
    assert native.choose("auto") == "xla"


def test_xla_looks_for_nothing(afresh, monkeypatch, capsys):
    monkeypatch.setattr(build, "load", lambda: pytest.fail("looked for a library"))
    ours, text, xla = convolve("xla")
    assert MARK not in text
    np.testing.assert_array_equal(ours, xla)
    assert capsys.readouterr().err == ""


def test_other_platforms_keep_their_own(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert native.choose("auto") == "xla"
    with pytest.raises(UserError, match="is for CPUs, but jax runs on gpu"):
        native.choose("native")


def test_the_key_of_the_config():
    config = default_config()
    assert config.parallel.kernels == "auto"
    config.parallel.kernels = "mkl"
    with pytest.raises(UserError, match=r"unknown parallel.kernels 'mkl'.*auto, native, xla"):
        validate(config)


def test_an_old_onednn_is_refused(monkeypatch, tmp_path):
    header = tmp_path / "include/oneapi/dnnl"
    header.mkdir(parents=True)
    (header / "dnnl.hpp").write_text("")
    numbers = ("MAJOR 2", "MINOR 6", "PATCH 3")
    text = "\n".join(f"#define DNNL_VERSION_{number}" for number in numbers)
    (header / "dnnl_version.h").write_text(text)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libdnnl.so").write_text("")
    monkeypatch.setattr(build, "_in_wheel", lambda package, file: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(build.Missing, match=r"oneDNN 2\.6\.3 in .* is too old"):
        build.find_onednn()


def start(cache):
    """A process that compiles into ``cache`` and says what it has."""
    environment = {**os.environ, "BNRESEARCH_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bnresearch.native"]
    root = Path(build.__file__).parents[2]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_processes_that_compile_at_once_share_one_file(installed, tmp_path):
    for process in [start(tmp_path) for _ in range(2)]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "convolutions (oneDNN 3." in out
        assert "native: compiling with" in err
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]
    out, err = start(tmp_path).communicate(timeout=300)
    assert "convolutions (oneDNN 3." in out
    assert err == ""
