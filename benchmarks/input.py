"""Images a second of each way to the data, without a net.

A batch is made as the loop has it made: what the host gives, and the compiled crop, flip and
normalisation. In memory, everything happens on the device; a stream has worker processes, one per
core, that read and crop whole pictures while nothing else wants the cores.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import in_turn, scaled, spread, text
from benchmarks.picture import Bars
from bnresearch import config as configs
from bnresearch import data
from bnresearch.data.tfds import prepared_names

HEADER = ("data", "batch", "images/s", "ms per batch", "n")
CROPS = ("data.augment=crop_flip",)
STREAM = ("data.in_memory=no",)
# What is measured: (config, overrides, batches per timing).
CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "digits, in memory": ("digits_mlp", (), 500),
    "Fashion-MNIST, in memory, crop and flip": ("fashion_resnet", (), 50),
    "CIFAR-10, in memory": ("cifar10_resnet20", ("data.augment=none",), 50),
    "CIFAR-10, in memory, crop and flip": ("cifar10_resnet20", CROPS, 50),
    "CIFAR-10, stream": ("cifar10_resnet20", (*STREAM, "data.augment=none"), 50),
    "CIFAR-10, stream, random-resized crop and flip": (
        "cifar10_resnet20",
        (*STREAM, *CROPS),
        50,
    ),
    "made-up pictures around 256x256, stream to 224, crop and flip": (
        "cifar10_resnet20",
        (
            *(*STREAM, *CROPS, "data.name=synthetic", "data.image_size=224"),
            *("data.synthetic.shape=(256,256,3)", "data.synthetic.vary=0.2"),
        ),
        5,
    ),
}


def run(quick: bool) -> dict[str, Any]:
    """A row per way, all in turn."""
    there = {"digits", "synthetic", *prepared_names()}
    work, batches, sizes, left_out, opened = {}, {}, {}, [], []
    for name, (file, overrides, count) in CASES.items():
        config = configs.load(f"configs/{file}.py", overrides).data
        if config.name not in there:
            left_out.append(f"{name}: {config.name} does not lie prepared in TFDS_DATA_DIR")
            continue
        opened.append(data.load(config))
        batches[name] = max(1, count // 10) if quick else count
        sizes[name] = config.batch_size
        work[name] = reader(opened[-1], config.batch_size, batches[name])
    try:
        seconds = in_turn(work, 2 if quick else 15)
    finally:
        for dataset in opened:
            dataset.close()
    rows = [
        {
            "data": name,
            "batch": sizes[name],
            "seconds_per_batch": spread([value / batches[name] for value in values]),
            "images_per_second": spread([sizes[name] * batches[name] / v for v in values]),
        }
        for name, values in seconds.items()
    ]
    return {"rows": rows, "left_out": left_out}


def reader(dataset: Any, size: int, count: int) -> Callable[[], None]:
    """The next ``count`` batches of training."""
    make, rows, step = jax.jit(dataset.train_batch), jnp.arange(size), 0

    def work() -> None:
        nonlocal step
        for _ in range(count):
            batch = make(dataset.feed(0, step), jnp.int32(0), jnp.int32(step), rows)
            step += 1
        jax.block_until_ready(batch)

    return work


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per way."""
    return [
        (
            row["data"],
            str(row["batch"]),
            text(row["images_per_second"], digits=0),
            text(row["seconds_per_batch"], 1e3, 3),
            str(row["seconds_per_batch"]["n"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Thousands of images a second."""
    speeds = {
        row["data"]: {"bnresearch": scaled(row["images_per_second"], 1e-3)}
        for row in result["rows"]
    }
    return [Bars("batches ready for the step", "thousand images/s", speeds, log=True)]
