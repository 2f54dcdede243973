"""Collectives of a BatchNorm layer on several devices, counted in the compiled program.

Fake devices of one processor: nothing is timed. A chain of sites is compiled with one and with two
of them, as the step of a run is in each mode, and what the second one adds is counted: operations,
and bytes of their results on each device. Forward is what the output needs; statistics are the
running ones, besides; backward is what the gradient with respect to the input adds. Gradients of
parameters are averaged once per step, whatever the norm, and are not in it.

Besides, for docs/scaling.md: what the whole step of ResNet-50 computes and sends (`pod_step`), and
what a model makes of that on interconnects (`pod`).
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import pod, pod_step
from benchmarks.hlo import collectives
from benchmarks.measure import exact
from benchmarks.picture import Bars

HEADER = (
    *("devices", "mode", "scope", "forward", "statistics", "backward"),
    *("bytes forward", "bytes statistics", "bytes backward"),
)
MODES = ("jit", "shard_map", "pmap")
SCOPES = {1: ("global",), 2: ("global", "device")}
SCOPES |= dict.fromkeys((4, 8), ("global", "group:2", "device"))
PARTS = ("forward", "statistics", "backward")
LONGEST = 1200  # seconds that a process may take
FEATURES, PER_DEVICE = 100, 32


def run(quick: bool) -> dict[str, Any]:
    """A row per number of devices, mode and scope; "resnet50" has one per number of devices and
    scope, "predicted" is `pod.predict` of these."""
    counts = (1, 2) if quick else (1, 2, 4, 8)
    size, most = (pod_step.Size(18, 32, 2), (2,)) if quick else (pod_step.Size(), (8, 64))
    scopes = ("global",) if quick else ("global", "group:8", "device")
    processes = [on_fake_devices(max(counts), "benchmarks.devices", *counts)]
    processes += [on_fake_devices(n, "benchmarks.pod_step", n, *size, *scopes) for n in most]
    try:
        rows, *counted = (result_of(process) for process in processes)
    finally:
        for process in processes:
            process.kill()
    steps = list(itertools.chain(*counted))
    return {"rows": rows, "resnet50": steps, "predicted": pod.predict(steps)}


def on_fake_devices(count: int, module: str, *arguments: Any) -> "subprocess.Popen[bytes]":
    """A process that sees so many, at work; nothing in it is timed, so that several may work."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
    )


def result_of(process: "subprocess.Popen[bytes]") -> Any:
    """What the last line of its output says, when it has ended."""
    output, _ = process.communicate(timeout=LONGEST)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return json.loads(output.splitlines()[-1])


def main(counts: list[int]) -> None:
    """Print the rows."""
    rows = [
        {"devices": count, "mode": mode, "scope": scope, **added(mode, scope, count)}
        for count, mode in itertools.product(counts, MODES)
        for scope in SCOPES[count]
    ]
    print(json.dumps(rows))


def added(mode: str, scope: str, devices: int) -> dict[str, dict[str, dict[str, int]]]:
    """Operations and bytes that one more site adds, for each part of a pass."""
    totals = [
        {part: collectives(program(part, sites, mode, scope, devices)) for part in PARTS}
        for sites in (1, 2)
    ]
    one = {part: totals[1][part] - totals[0][part] for part in PARTS}
    # The programs of later parts do all that the forward one does as well.
    return {
        part: dict(counted - one["forward"] if part != "forward" else counted)
        for part, counted in one.items()
    }


def program(part: str, sites: int, mode: str, scope: str, devices: int) -> str:
    """The compiled text of a chain of sites, on all devices."""
    import jax
    import jax.numpy as jnp

    from bnresearch.layers import make_norm
    from bnresearch.parallel import make_layout

    layout = make_layout(mode, scope, devices, PER_DEVICE * devices, 1)
    norms = [make_norm("batch", scope=layout.scope)(name="norm") for _ in range(sites)]
    x = jnp.zeros((PER_DEVICE * devices, FEATURES))
    starts = [make_norm("batch")(name="norm").init(jax.random.key(0), x) for _ in norms]

    def loss_of(rows: jax.Array, variables: Any) -> tuple[jax.Array, Any]:
        new = []
        for norm, own in zip(norms, variables, strict=True):
            y, changed = norm.apply(own, rows, mutable=["batch_stats"])
            rows = jnp.tanh(y)
            new.append(changed)
        return layout.mean_loss((rows**2).mean()), new

    def step(variables: Any, feed: Any, numbers: Any, count: Any) -> Any:
        rows = layout.constrain(feed[layout.rows()])
        if part == "backward":
            gradient = jax.grad(lambda rows: loss_of(rows, variables)[0])(rows)
            return layout.mean_over_devices(layout.mean_loss((gradient**2).mean()))
        loss, new = loss_of(rows, variables)
        return layout.mean_over_devices(loss), new if part == "statistics" else ()

    compiled: Callable[..., Any] = layout.compile(step, sharded_feed=False, donate=False)
    arguments = (layout.put(starts), layout.put(x), {}, jnp.int32(1))
    return compiled.lower(*arguments).compile().as_text()  # type: ignore[attr-defined]


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per number of devices, mode and scope."""
    return [
        (
            str(row["devices"]),
            row["mode"],
            row["scope"],
            *(str(row[part].get("operations", 0)) for part in PARTS),
            *(str(row[part].get("bytes", 0)) for part in PARTS),
        )
        for row in result["rows"]
    ]


def further(result: dict[str, Any]) -> dict[str, tuple[str, tuple[str, ...], list[Any]]]:
    """``{mark in docs/scaling.md: (title, header, rows)}``."""
    ways = {"predicted": False, "predicted, by sums": True}
    predicted = {
        mark: (
            "Modelled, not measured: efficiency of ResNet-50 in percent, from counts on",
            pod.HEADER,
            pod.table(row for row in result["predicted"] if row["by_sums"] == sums),
        )
        for mark, sums in ways.items()
    }
    title = "Counted in the compiled module: what a step of ResNet-50 computes and sends,"
    return {"resnet50": (title, pod_step.HEADER, pod_step.table(result["resnet50"]))} | predicted


def panels(result: dict[str, Any]) -> list[Bars]:
    """Operations on the most devices there are."""
    most = max(row["devices"] for row in result["rows"])
    found = []
    for scope in SCOPES[most]:
        rows = [row for row in result["rows"] if (row["devices"], row["scope"]) == (most, scope)]
        values = {
            row["mode"]: {part: exact(row[part].get("operations", 0)) for part in PARTS}
            for row in rows
        }
        found.append(Bars(f"scope {scope}, {most} devices", "collectives of a layer", values))
    return found


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
