"""ResNet-50 in bfloat16, and ResNet-20 on pictures of CIFAR-10's size, on a GPU.

The sides and their work are those of the train step (`benchmarks.step`); besides, BatchNorm against
no norm at all, and torch in channels_last under autocast. A case takes up to three minutes, nearly
all of them compilation; those that would begin more than five minutes after the command are left
out, so that it ends within eight.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import plain, step
from benchmarks.measure import STARTED
from benchmarks.step import EACH, RESNET50, SYNTHETIC, TORCH, Case, in_torch, ours

CIFAR = 50_000  # pictures of an epoch
MINUTES = 5
HEADER = (*step.HEADER, "epochs of CIFAR-10 per second")

NO_NORM = {"bnresearch, no norm": partial(ours, overrides=("norm.kind=none",))}
AUTOCAST = {
    "torch, compiled, autocast": partial(in_torch, compiled=True, autocast=True),
}


def resnet50(batch: int, steps: int, ways: Any) -> Case:
    """ResNet-50 in bfloat16 on made-up pictures, all of them on the device."""
    overrides = (
        *RESNET50,
        *("dtype=bfloat16", f"data.batch_size={batch}"),
        *("data.synthetic.shape=(224,224,3)", "data.synthetic.examples=1200"),
    )
    flax = plain.ResNet50(dtype=jnp.bfloat16)
    return Case("cifar10_resnet20", overrides, flax, "resnet50", ways, steps, 10)


CASES = {
    "ResNet-50, bfloat16, batch 256": resnet50(256, 5, EACH | NO_NORM | AUTOCAST),
    "ResNet-20, batch 128": Case(
        "cifar10_resnet20",
        (*SYNTHETIC, "data.synthetic.examples=20000"),
        plain.ResNet(20),
        "resnet20",
        EACH | NO_NORM | TORCH,
        50,
        10,
    ),
    "ResNet-50, bfloat16, batch 1024": resnet50(1024, 2, EACH | AUTOCAST),
}


def run(quick: bool) -> dict[str, Any]:
    """Rows as those of the train step."""
    if jax.default_backend() == "cpu":
        return {"rows": [], "left_out": ["all of it: there is no GPU here"]}
    rows, left_out = [], []
    for name, case in CASES.items():
        if time.monotonic() - STARTED > 60 * MINUTES:
            left_out.append(f"{name}: {MINUTES} minutes are over")
            continue
        found = step.measure({name: case}, quick)
        rows += found["rows"]
        left_out += [line for line in found["left_out"] if line not in left_out]
    return {"rows": rows, "left_out": left_out}


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per way of running a net."""
    return [
        (*line, f"{row['images_per_second'] / CIFAR:.2f}" if "ResNet-20" in row["net"] else "")
        for line, row in zip(step.table(result), result["rows"], strict=True)
    ]


panels = step.panels
