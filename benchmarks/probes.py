"""What looking inside costs: each probe by itself, in training steps of the same net.

A call is all that the probe does at one step of a run, from the state to plain numbers; those that
average over batches do so over 10. The nets are those of configs/digits_mlp.py and
configs/digits_resnet.py. The first call compiles what no probe above it in the table has compiled.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import exact, in_turn, ratios, say, spread, text
from benchmarks.picture import Bars
from bnresearch import config as configs
from bnresearch.experiment import Experiment, initial_state, prepare, train_feed
from bnresearch.probes import PROBES
from bnresearch.probes.inside import Inside

HEADER = ("config", "probe", "training steps per call", "ms per call", "n", "first call, s (n = 1)")
CONFIGS = Path(__file__).parent.parent / "configs"
NETS = ("digits_mlp", "digits_resnet")
STEP, STEPS = "step", 20  # the steps that are timed together


def run(quick: bool) -> dict[str, Any]:
    """A row per net and probe."""
    return {"rows": [row for net in NETS[: 1 if quick else None] for row in rows_of(net, quick)]}


def rows_of(net: str, quick: bool) -> list[dict[str, Any]]:
    """Rows of one net, all probes in turn with the steps of training."""
    experiment = prepare(configs.load(CONFIGS / f"{net}.py", ["parallel.devices=1"]))
    work = {name: call_of(experiment, name) for name in PROBES}
    first = {name: seconds_of(call) for name, call in work.items()}
    say(f"{net}: compiled")
    seconds = in_turn({STEP: training(experiment), **work}, 2 if quick else 15)
    step = [value / STEPS for value in seconds.pop(STEP)]
    return [
        {
            "config": net,
            "probe": name,
            "steps": ratios(values, step),
            "seconds": spread(values),
            "step_seconds": spread(step),
            "first_call": exact(first[name]),
        }
        for name, values in seconds.items()
    ]


def call_of(experiment: Experiment, name: str) -> Callable[[], Any]:
    """A look at the state before the first step."""
    state = jax.block_until_ready(initial_state(experiment))
    return lambda: PROBES[name](Inside(experiment, state))


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training(experiment: Experiment) -> Callable[[], None]:
    """So many steps as the loop takes them, each call from where the one before ended."""
    program = experiment.program
    carry, step = program.layout.put(initial_state(experiment)), 0

    def work() -> None:
        nonlocal carry, step
        for count in counts(program.chunk):
            feed = train_feed(experiment, step, count)
            carry = program.train(carry, feed, experiment.numbers, np.int32(count))
            step += count
        jax.block_until_ready(carry)

    return work


def counts(chunk: int) -> list[int]:
    """The steps in calls of at most ``chunk``."""
    return [min(chunk, STEPS - done) for done in range(0, STEPS, chunk)]


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per net and probe."""
    return [
        (
            row["config"],
            row["probe"],
            text(row["steps"], digits=1),
            text(row["seconds"], 1e3, 1),
            str(row["seconds"]["n"]),
            f"{row['first_call']['median']:.1f}",
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Training steps per call, a panel for each net."""
    rows = result["rows"]
    return [
        Bars(
            net,
            "training steps per call",
            {row["probe"]: {"": row["steps"]} for row in rows if row["config"] == net},
            log=True,
        )
        for net in dict.fromkeys(row["config"] for row in rows)
    ]
