"""Images a second of each way to the data, without a net.

A batch is made as the loop has it made: what the host gives, and the compiled crop, flip and
normalisation. In memory, everything happens on the device; a stream has worker processes, one per
core unless it is said otherwise, that read and crop whole pictures while nothing else wants the
cores. Streams are measured one after another, each without a pause: one that waits for its turn
would have batches ready. Images/s of a core are those per second of processor time that the workers
took, which is less than what they had where others wanted the cores, too.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Spread, in_turn, say, scaled, spread, text, used_by_children
from benchmarks.picture import Bars
from bnresearch import config as configs
from bnresearch import data
from bnresearch.data.tfds import prepared_names

HEADER = ("data", "batch", "images/s", "images/s of a worker's core", "ms per batch", "n")
CROPS = ("data.augment=crop_flip",)
STREAM = ("data.in_memory=no",)
JPEGS = ("data.name=imagenet_sized", "data.batch_size=128")
# What is measured: (config, overrides, batches per timing).
CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "digits, in memory": ("digits_mlp", (), 500),
    "Fashion-MNIST, in memory, crop and flip": ("fashion_resnet", (), 50),
    "CIFAR-10, in memory": ("cifar10_resnet20", ("data.augment=none",), 50),
    "CIFAR-10, in memory, crop and flip": ("cifar10_resnet20", CROPS, 50),
    "CIFAR-10, stream": ("cifar10_resnet20", (*STREAM, "data.augment=none"), 20),
    "CIFAR-10, stream, random-resized crop and flip": (
        "cifar10_resnet20",
        (*STREAM, *CROPS),
        20,
    ),
    "made-up pictures around 256x256, stream to 224, crop and flip": (
        "cifar10_resnet20",
        (
            *(*STREAM, *CROPS, "data.name=synthetic", "data.image_size=224"),
            *("data.synthetic.shape=(256,256,3)", "data.synthetic.vary=0.2"),
        ),
        4,
    ),
    "JPEGs of ImageNet's sizes, stream to 224, 1 worker": (
        "imagenet_resnet50",
        (*JPEGS, "data.workers=1"),
        4,
    ),
    "JPEGs of ImageNet's sizes, stream to 224, 2 workers": (
        "imagenet_resnet50",
        (*JPEGS, "data.workers=2"),
        4,
    ),
}


def run(quick: bool) -> dict[str, Any]:
    """A row per way: those in memory in turn, streams one by one."""
    there = {"digits", "synthetic", *prepared_names()}
    cases, left_out = {}, []
    for name, (file, overrides, count) in CASES.items():
        config = configs.load(f"configs/{file}.py", overrides).data
        if config.name in there:
            cases[name] = config, max(1, count // 10) if quick else count
        else:
            left_out.append(f"{name}: {config.name} does not lie prepared in TFDS_DATA_DIR")
    streams = [name for name in cases if "stream" in name]
    memory = [name for name in cases if name not in streams]
    seconds = _in_memory({name: cases[name] for name in memory}, 2 if quick else 15)
    used: dict[str, list[float]] = {}
    for name in streams:
        say(name)
        seconds[name], used[name] = _streamed(*cases[name], 2 if quick else 7)
    rows = []
    for name, (config, count) in cases.items():
        images = config.batch_size * count
        rows.append(
            {
                "data": name,
                "batch": config.batch_size,
                "seconds_per_batch": spread([value / count for value in seconds[name]]),
                "images_per_second": _rates(images, seconds[name]),
                "images_per_core_second": _rates(images, used.get(name)),
            }
        )
    return {"rows": rows, "left_out": left_out}


def _rates(images: int, seconds: list[float] | None) -> Spread | None:
    return spread([images / value for value in seconds]) if seconds else None


def _in_memory(cases: dict[str, tuple[Any, int]], repeats: int) -> dict[str, list[float]]:
    work = {
        name: reader(data.load(config), config.batch_size, count)
        for name, (config, count) in cases.items()
    }
    return in_turn(work, repeats)


def _streamed(config: Any, count: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each ``count`` batches, and the processor time of the workers meanwhile."""
    dataset = data.load(config)
    work = reader(dataset, config.batch_size, count)
    seconds, used = [], []
    try:
        work()  # starts the workers
        for _ in range(repeats):
            start, before = time.perf_counter(), used_by_children()
            work()
            seconds.append(time.perf_counter() - start)
            used.append(used_by_children() - before)
    finally:
        dataset.close()
    return seconds, used


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
            text(row["images_per_core_second"], digits=0) if row["images_per_core_second"] else "",
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
