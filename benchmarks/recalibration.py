"""Running statistics taken anew over 100 batches of training, against as many forward passes.

Both make their batches inside the compiled step, the ResNet-8 of configs/digits_resnet.py at its
own batch size, and wait for the device once at the end. A forward pass is inference: with the
running statistics. Beside it, one that normalises with the statistics of the batch.
"""

from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import in_turn, ratios, scaled, spread, text
from benchmarks.picture import Bars
from bnresearch import config as configs
from bnresearch.experiment import initial_state, prepare
from bnresearch.precise import one_pass
from bnresearch.run_statistics import of_training
from bnresearch.watch import Watch

HEADER = ("config", "batches", "pass", "ms per batch", "recalibration / this", "n")
CONFIGS = Path(__file__).parent.parent / "configs"
OURS = "recalibration, one pass"
FORWARD = {"forward, running statistics": "running", "forward, batch statistics": "batch"}


def run(quick: bool) -> dict[str, Any]:
    """A row per kind of pass."""
    batches, repeats = (5, 2) if quick else (100, 15)
    seconds = in_turn(work(batches), repeats)
    rows = [
        {
            "config": "digits_resnet",
            "batches": batches,
            "pass": name,
            "seconds": spread(values),
            "ratio": ratios(seconds[OURS], values),
        }
        for name, values in seconds.items()
    ]
    return {"rows": rows}


def work(batches: int) -> dict[str, Any]:
    """What is timed: functions that go through so many batches."""
    experiment = prepare(configs.load(CONFIGS / "digits_resnet.py", ["parallel.devices=1"]))
    state = initial_state(experiment)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    training = of_training(experiment, variables)
    net, variables = training.prepared.net, training.layout.put(variables)

    def forward(use: str) -> Any:
        compiled = jax.jit(lambda v, b: net.apply(v, b, watch=Watch(use=use)).output)

        def passes() -> None:
            found = [compiled(variables, b) for b in training.batches(experiment, 0, batches)]
            jax.block_until_ready(found)

        return passes

    def recalibrate() -> None:
        one_pass(training.prepared, variables, training.batches(experiment, 0, batches))

    return {OURS: recalibrate, **{name: forward(use) for name, use in FORWARD.items()}}


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per kind of pass."""
    return [
        (
            row["config"],
            str(row["batches"]),
            row["pass"],
            text(row["seconds"], 1e3 / row["batches"]),
            text(row["ratio"]),
            str(row["seconds"]["n"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Milliseconds of a batch."""
    bars = {row["pass"]: scaled(row["seconds"], 1e3 / row["batches"]) for row in result["rows"]}
    return [Bars("one batch of 60", "milliseconds", {"digits_resnet": bars})]
