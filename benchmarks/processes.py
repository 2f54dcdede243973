"""One process with two devices against two processes with one each: the same training, on one host.

The ResNet-8 of configs/digits_resnet.py by the command line, twice the batch, both by XLA's kernels
and with fake devices of one processor; the processes talk through gloo on 127.0.0.1. Each run gives
the median of the rates that it logs after the first, in which it compiles.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ratios, say, scaled, spread, text
from benchmarks.picture import Bars

HEADER = ("config", "layout", "ms per step", "this / 1 process x 2 devices", "n")
CONFIG = Path(__file__).parent.parent / "configs" / "digits_resnet.py"
BATCH, DEADLINE = 120, 600
LAYOUTS = {"1 process x 2 devices": (1, 2), "2 processes x 1 device": (2, 1)}


def run(quick: bool) -> dict[str, Any]:
    """A row per layout."""
    lines, repeats = (2, 2) if quick else (10, 7)
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for i in range(repeats):
        for name in list(LAYOUTS)[:: -1 if i % 2 else 1]:
            say(f"{name}, run {i + 1} of {repeats}")
            seconds[name].append(step_seconds(*LAYOUTS[name], lines))
    first = seconds["1 process x 2 devices"]
    return {
        "rows": [
            {"layout": name, "seconds": spread(values), "ratio": ratios(values, first)}
            for name, values in seconds.items()
        ]
    }


def step_seconds(processes: int, devices: int, lines: int) -> float:
    """Seconds per step of one run that logs so often."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        running = [
            subprocess.Popen(
                command(workdir, lines, processes, index, address),
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for address in [f"127.0.0.1:{free_port()}"]
            for index in range(processes)
        ]
        try:
            codes = [process.wait(DEADLINE) for process in running]
        finally:
            for process in running:
                process.kill()
        if any(codes):
            raise RuntimeError(f"a run ended with exit code {max(codes)}")
        found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in found if "images_per_second" in line]
    return BATCH / statistics.median(rates[1:])


def command(workdir: Path, lines: int, processes: int, index: int, address: str) -> list[str]:
    """One process of a run."""
    config = {
        "data.batch_size": BATCH,
        "parallel.kernels": "xla",
        "train.duration": f"{20 * (lines + 1)}st",
        "train.log_every": "20st",
        "train.eval_every": "10000st",
        "train.checkpoint_every": "never",
        "distributed.processes": processes,
    }
    if processes > 1:
        config |= {"distributed.process": index, "distributed.coordinator": address}
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    train = ["train", f"--config={CONFIG}", f"--workdir={workdir}", "--progress=off"]
    return [sys.executable, "-m", "bnresearch", *train, *flags]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per layout."""
    return [
        (
            "digits_resnet",
            row["layout"],
            text(row["seconds"], 1e3),
            text(row["ratio"]),
            str(row["seconds"]["n"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Milliseconds of a step."""
    bars = {row["layout"]: scaled(row["seconds"], 1e3) for row in result["rows"]}
    return [Bars(f"a step of {BATCH}", "milliseconds", {"digits_resnet": bars})]
