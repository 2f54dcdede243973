"""ResNet-50's train step compiled for fake devices: its FLOPs, and what it sends.

The step is that of configs/imagenet_resnet50.py under jit, with batches that the host feeds. It is
compiled from shapes alone and never run, without the optimisations of LLVM, which change no
collective. Bytes are those of the results on each device.
"""

import json
import sys
from typing import Any, NamedTuple

from benchmarks.hlo import arrays, collectives, lines_with_collectives

HEADER = (
    *("devices", "scope", "GFLOP on each"),
    *("forward", "statistics", "backward", "gradients"),
    *("MB forward", "MB statistics", "MB backward", "MB gradients"),
)
PARTS = ("forward", "statistics", "backward", "gradients")
TOGETHER = 4  # norms whose messages for a gradient may go in one: a projection and a last norm, ...
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Size(NamedTuple):
    """The net, its images, and how many each device has."""

    depth: int = 50
    pixels: int = 224
    per_device: int = 32


class Fed:
    """A dataset of shapes: the step finds its rows in the feed."""

    sharded_feed = True

    def __init__(self, pixels: int):
        from bnresearch.data.base import DataInfo

        examples = {"train": 1_281_167, "validation": 1, "test": 1}
        self.info = DataInfo("fed", (pixels, pixels, 3), 1000, examples, (0.0,) * 3, (1.0,) * 3)

    def train_batch(self, feed: Any, seed: Any, step: Any, rows: Any) -> Any:
        return feed


def compiled(scope: str, devices: int, size: Size) -> Any:
    """The compiled step on ``devices`` devices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from bnresearch import config as configs
    from bnresearch import optim
    from bnresearch.parallel import AXES, make_layout
    from bnresearch.step import make_init, make_train_step, single

    batch = size.per_device * devices
    overrides = (
        *(f"norm.scope={scope}", f"parallel.devices={devices}", f"data.batch_size={batch}"),
        *(f"model.resnet.depth={size.depth}", "parallel.kernels=xla"),
    )
    config, dataset = configs.load("configs/imagenet_resnet50.py", overrides), Fed(size.pixels)
    layout = make_layout("jit", scope, devices, batch)
    numbers = {
        key: jax.ShapeDtypeStruct((), jnp.int32 if key == "seed" else jnp.float32)
        for key in configs.numbers(configs.resolve(config))
    }
    start = make_init(config, dataset.info.shape, dataset.info.num_classes)
    spread = NamedSharding(layout.mesh, PartitionSpec(None, AXES))
    feed = {
        "image": jax.ShapeDtypeStruct((1, batch, *dataset.info.shape), "float32", sharding=spread),
        "label": jax.ShapeDtypeStruct((1, batch), "int32", sharding=spread),
    }
    schedule = optim.schedule(config.optim.schedule, 1000, 100.0)
    step = layout.compile(
        single(make_train_step(config, dataset, layout, schedule)), sharded_feed=True
    )
    arguments = (layout.like(jax.eval_shape(start, numbers)), feed, numbers)
    lowered = step.lower(*arguments, jax.ShapeDtypeStruct((), jnp.int32))  # type: ignore[attr-defined]
    return lowered.compile(compiler_options=FAST)


def part_of(line: str) -> str:
    """To what a collective belongs, by the name that the compiler keeps of its origin: the norms'
    messages for the output, for the running statistics and for the gradient of the input; all else
    is the gradients of the parameters, with which the compiler sends the loss. Many arrays at once
    are gradients, too: of scales and biases, between the groups whose norms have summed them."""
    name = line.partition('op_name="')[2].partition('"')[0]
    many = arrays(line) > TOGETHER
    if many or "_with_running" not in name or "/conv" in name or "/head" in name:
        return "gradients"
    if "whole_batch" in name:
        return "statistics"
    return "backward" if "transpose(" in name else "forward"


def counted(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """``{part: {kind of collective: {"operations": n, "bytes": n}}}`` of a compiled module."""
    found: dict[str, dict[str, dict[str, int]]] = {part: {} for part in PARTS}
    for kind, line in lines_with_collectives(text):
        row = found[part_of(line)].setdefault(kind, {"operations": 0, "bytes": 0})
        for name, value in collectives(line).items():
            row[name] += value
    return found


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per number of devices and scope."""
    return [
        (
            *(str(row["devices"]), row["scope"], f"{row['flops'] / 1e9:.1f}"),
            *(_operations(row["sent"][part]) for part in PARTS),
            *(f"{sum(x['bytes'] for x in row['sent'][part].values()) / 1e6:.2f}" for part in PARTS),
        )
        for row in rows
    ]


def _operations(kinds: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{sent['operations']} {kind}" for kind, sent in kinds.items()) or "0"


def main(devices: int, size: Size, scopes: list[str]) -> None:
    """Print a row per scope."""
    rows = []
    for scope in scopes:
        module = compiled(scope, devices, size)
        rows.append(
            {"devices": devices, "scope": scope, **size._asdict()}
            | {"flops": module.cost_analysis()["flops"], "sent": counted(module.as_text())}
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    count, depth, pixels, per_device = map(int, sys.argv[1:5])
    main(count, Size(depth, pixels, per_device), sys.argv[5:])
