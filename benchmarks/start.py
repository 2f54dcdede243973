"""Seconds from the command to the end of the first training step, as whole processes.

``python -m bnresearch train`` is started with a log line after every step and stopped as soon as
the first line is in metrics.jsonl. Cold: nothing is compiled yet. Warm: the same command again. The
decoded data set is in the cache in both. Imports are processes that do nothing else, in turn.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import in_turn, installed, spread, text
from benchmarks.picture import Bars

HEADER = ("config", "compilation cache", "seconds", "n", "phases of a warm start (medians of 3)")
CONFIGS = ("digits_mlp", "cifar10_resnet20")
IMPORTS = ("", "numpy", "jax", "flax.linen", "bnresearch", "bnresearch.train", "torch")
PATIENCE = 300.0


def run(quick: bool) -> dict[str, Any]:
    """Rows of seconds (median and quartiles) per config, with a cold and a warm cache."""
    names, cold, warm = (CONFIGS[:1], 2, 2) if quick else (CONFIGS, 3, 10)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        os.environ["BNRESEARCH_CACHE"] = str(cache)
        for name in names:
            seconds(name, folder)  # decodes the data
            rows.append(row(name, "cold", [emptied(cache, name, folder) for _ in range(cold)]))
            rows.append(row(name, "warm", [seconds(name, folder) for _ in range(warm)]))
    return {"rows": rows + imports(warm)}


def imports(repeats: int) -> list[dict[str, Any]]:
    """A row per module, and one for Python alone."""
    there = [name for name in IMPORTS if not name or installed(name)]
    commands = {name: [sys.executable, "-c", f"import {name}" if name else ""] for name in there}
    work = {
        name: lambda command=command: subprocess.run(command, check=True)
        for name, command in commands.items()
    }
    return [
        row(f"import {name}" if name else "python alone", "", values)
        for name, values in in_turn(work, repeats).items()
    ]


def row(name: str, kind: str, values: list[float]) -> dict[str, Any]:
    """A row; the phases are those of a warm start."""
    parts = phases(name) if kind == "warm" else {}
    return {"config": name, "cache": kind, "seconds": spread(values), "phases": parts}


def emptied(cache: Path, name: str, folder: str) -> float:
    """``seconds`` without compiled programs."""
    shutil.rmtree(cache / "xla", ignore_errors=True)
    return seconds(name, folder)


def seconds(name: str, folder: str) -> float:
    """From starting the process to the first line of its metrics.jsonl."""
    workdir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", "bnresearch", "train", f"--config=configs/{name}.py"]
    command += [f"--workdir={workdir}", "--config.train.log_every=1st", "--progress=off"]
    log, start = workdir / "metrics.jsonl", time.monotonic()
    process = subprocess.Popen(command)
    try:
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None or time.monotonic() - start > PATIENCE:
                raise RuntimeError(f"no first step: {' '.join(command)}")
            time.sleep(0.01)
        return time.monotonic() - start
    finally:
        process.kill()
        process.wait()


def phases(name: str) -> dict[str, float]:
    """Median seconds of each phase in three warm processes."""
    command = [sys.executable, "-m", "benchmarks.phases", f"configs/{name}.py"]
    outputs = [subprocess.run(command, check=True, capture_output=True).stdout for _ in range(3)]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {phase: sorted(one[phase] for one in found)[1] for phase in found[0]}


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per config and cache."""
    return [
        (
            row["config"],
            row["cache"],
            text(row["seconds"]),
            str(row["seconds"]["n"]),
            "; ".join(f"{phase} {value:.2f}" for phase, value in row["phases"].items()),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Whole processes."""
    starts: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        starts.setdefault(row["config"], {})[row["cache"] or "import"] = row["seconds"]
    return [Bars("whole processes", "seconds", starts)]
