"""Timing in turn, robust summaries, and what the machine is."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
STARTED = time.monotonic()  # the command
PEERS = {"torch": "torch", "equinox": "equinox", "haiku": "dm-haiku"}  # module -> package


Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "n": len(values)}


def exact(value: float) -> Spread:
    """A value that was counted, not measured."""
    return {"median": value, "low": value, "high": value, "n": 1}


def scaled(values: Spread, factor: float) -> Spread:
    """In other units; ``n`` stays."""
    return {name: value if name == "n" else factor * value for name, value in values.items()}


def text(values: Spread, factor: float = 1.0, digits: int = 2) -> str:
    """``median (lower to upper quartile)``."""
    median, low, high = (f"{factor * values[x]:.{digits}f}" for x in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def say(what: str) -> None:
    """A line for who waits: on stderr, with the seconds since the command began."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {what}", file=sys.stderr, flush=True)


def in_turn(
    work: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, called ``repeats`` times in turn, after one untimed call each.

    Every other round goes backwards, so that a drift of the machine favours nobody.
    """
    for function in work.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for i in range(repeats):
        for name in list(work)[:: -1 if i % 2 else 1]:
            start = clock()
            work[name]()
            seconds[name].append(clock() - start)
    return seconds


def used_by_children() -> float:
    """Processor time that the running processes started here by multiprocessing took, in
    seconds (Linux)."""
    # The number of a process's clock, as clock_getcpuclockid(3) makes it.
    clocks = [(~child.pid << 3) | 2 for child in active_children() if child.pid]
    return sum(time.clock_gettime(clock) for clock in clocks)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The spread of ours / theirs within each round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


class LeftOut(Exception):
    """A side of a comparison, or a whole part, that this machine cannot measure: the reason."""


def installed(module: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(module) is not None


def missing(modules: Sequence[str]) -> list[str]:
    """A line for each peer that has to be left out."""
    return [
        f"{PEERS[name]}: not installed (pip install -e '.[compare]')"
        for name in modules
        if not installed(name)
    ]


def machine() -> dict[str, Any]:
    """Device, processor and versions; no names of hosts, no paths."""
    import jax

    devices = jax.devices()
    packages = [*PACKAGES, *(PEERS[name] for name in PEERS if installed(name))]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def name_of(part: str, quick: bool) -> str:
    """What the files of a part are called; results of accelerators and quick ones are kept
    apart."""
    import jax

    platform = jax.default_backend()
    where = "" if platform == "cpu" else f"-{platform}"
    return f"{part}{where}{'-quick' if quick else ''}"


def write(part: str, result: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Keep the result of a part with what the machine is; returns what was written."""
    whole = {"part": part, **machine(), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return json.loads(path.read_text())
