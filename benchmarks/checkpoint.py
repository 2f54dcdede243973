"""What checkpointing every 100 steps costs, as a share of the wall time.

In turn: a few steps, and the same few steps with a checkpoint saved before and awaited after. The
difference is what one checkpoint costs altogether: reading the state off the device, and slowing
down the steps beside which it is written. Of the time of 100 steps it is the share that is given.
"""

import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import in_turn, scaled, spread, text
from benchmarks.picture import Bars
from bnresearch import config as configs
from bnresearch.checkpoint import Checkpoints
from bnresearch.experiment import initial_state, prepare, train_feed

HEADER = (
    "config",
    "ms per step",
    "ms blocked",
    "ms per checkpoint",
    "share of 100 steps",
    "n",
)
EVERY = 100
STEPS = 3
OVERRIDES = ("data.name=synthetic",)  # as large as CIFAR-10 images, and there for everybody


def run(quick: bool) -> dict[str, Any]:
    """One row, with medians and quartiles."""
    experiment = prepare(configs.load("configs/cifar10_resnet20.py", OVERRIDES))
    program = experiment.program
    carry, step, blocking = program.layout.put(initial_state(experiment)), 0, []

    def steps() -> None:
        nonlocal carry, step
        for _ in range(STEPS):
            feed = train_feed(experiment, step, 1)
            carry = program.train(carry, feed, experiment.numbers, jnp.int32(1))
            step += 1
        jax.block_until_ready(carry)

    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=2) as checkpoints:

        def saved() -> None:
            start = time.perf_counter()
            checkpoints.save(step, program.layout.get(carry))
            blocking.append(time.perf_counter() - start)
            steps()
            checkpoints.wait()

        seconds = in_turn({"without": steps, "with": saved}, 3 if quick else 25)
    without = spread(seconds["without"])
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    extra = [a - b for a, b in pairs]
    return {
        "rows": [
            {
                "config": "cifar10_resnet20, synthetic images",
                "seconds_per_step": scaled(without, 1 / STEPS),
                "seconds_blocked": spread(blocking[1:]),
                "seconds_per_checkpoint": spread(extra),
                "share": spread([x / (EVERY / STEPS * without["median"]) for x in extra]),
            }
        ]
    }


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The one row."""
    return [
        (
            row["config"],
            text(row["seconds_per_step"], 1e3, 0),
            text(row["seconds_blocked"], 1e3, 0),
            text(row["seconds_per_checkpoint"], 1e3, 0),
            text(row["share"], 100, 2) + " %",
            str(row["share"]["n"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """A checkpoint beside a step."""
    row = result["rows"][0]
    names = {
        "a step": "seconds_per_step",
        "the loop is blocked": "seconds_blocked",
        "a checkpoint in all": "seconds_per_checkpoint",
    }
    values = {label: {"": scaled(row[name], 1e3)} for label, name in names.items()}
    return [Bars(row["config"], "ms", values)]
