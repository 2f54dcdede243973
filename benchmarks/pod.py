"""A model of a pod: how long collectives take there, and what is left of a step's efficiency.

Nothing in here is measured. It takes what a step sends and computes (`benchmarks.pod_step`, from
the compiled module), stated figures of interconnects (FABRICS), and an alpha-beta model of
collectives: Hockney (1994); Thakur, Rabenseifner & Gropp (2005), Optimization of Collective
Communication Operations in MPICH, IJHPCA. docs/scaling.md writes out formulae and assumptions.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

DEVICES = (8, 64, 512, 4096)
BATCHES = (32, 256)  # examples on each device
UTILISATION = 0.15  # of the peak while nothing is sent: assumed, also where a device has few rows
BACKWARD = 2 / 3  # of the computing, beside which messages that nothing waits for can be sent
US, GB, TERA = 1e-6, 1e9, 1e12


class Level(NamedTuple):
    """Of a switched fabric: how many devices (or groups of them) it joins, seconds of a message
    between two, and bytes/s in each direction for each device, when all send."""

    joins: int
    latency: float
    bandwidth: float


class Switched(NamedTuple):
    """Hosts of devices behind switches: recursive doubling in each level, one after the other.

    Attributes:
      peak: FLOP/s of a device in bfloat16.
      launch: seconds before a collective begins.
      source: of the figures.
    """

    name: str
    peak: float
    launch: float
    levels: Sequence[Level]
    source: str

    def phase(self, devices: int, stride: int, size: float) -> float:
        """Seconds of an all-gather whose result has ``size`` bytes, without its launch, among
        ``devices`` devices, each ``stride`` from the next. A reduce-scatter takes as long, and an
        all-reduce is one of each. All such groups do so at once."""
        seconds, rest = 0.0, devices
        for level in self.levels:
            if stride >= level.joins:
                stride //= level.joins
                continue
            here = min(rest, level.joins // stride)
            # What the levels inside have gathered is sent once, in equal shares, by all of them.
            seconds += math.log2(here) * level.latency
            seconds += (here - 1) / here * size / level.bandwidth
            size, rest, stride = size / here, rest // here, 1
        return seconds


class Torus(NamedTuple):
    """A cube of devices, each linked to its neighbours along three axes: rings in both directions
    where an axis is closed, from 4 devices on; all axes at once, each with a third of the bytes.

    Attributes:
      hop: seconds from a device to its neighbour.
      bandwidth: bytes/s of a link, in each direction.
      peak, launch, source: as of `Switched`.
    """

    name: str
    peak: float
    launch: float
    hop: float
    bandwidth: float
    source: str

    def phase(self, devices: int, stride: int, size: float) -> float:
        """See `Switched.phase`."""
        side, skip = (round(n ** (1 / 3)) for n in (devices * stride, stride))
        if devices == 1:
            return 0.0
        closed = side >= 4
        hops = 3 * (side // 2 if closed else side - 1)
        # Groups that lie within each other share the links.
        speed = 3 * self.bandwidth * (2 if closed else 1) / skip
        return hops * self.hop + (devices - 1) / devices * size / speed


Fabric = Switched | Torus

NCCL = "latencies: NCCL, src/graph/tuning.cc, protocol LL, tree"
FABRICS: tuple[Fabric, ...] = (
    Switched(
        "H100, InfiniBand",  # 8 a host, NVLink 4; NDR, 400 Gbit/s a GPU
        989 * TERA,
        4.4 * US,
        (Level(8, 0.52 * US, 450 * GB), Level(2**30, 5.0 * US, 50 * GB)),
        f"NVIDIA, H100 SXM and DGX H100 data sheets; {NCCL}",
    ),
    Torus(
        "TPU v4, torus",
        275 * TERA,
        1.0 * US,
        1.0 * US,
        45 * GB,
        "Austin et al. (2025), How to Scale Your Model, parts 2 and 3; a launch is assumed to take "
        "as long as a hop",
    ),
    Switched(
        "A100, Ethernet",  # 8 a host, NVLink 3; 100 Gbit/s a host
        312 * TERA,
        4.4 * US,
        (Level(8, 0.52 * US, 300 * GB), Level(2**30, 30 * US, 12.5 * GB / 8)),
        f"NVIDIA, A100 data sheet; {NCCL}; 30 us for TCP through the kernel is assumed",
    ),
)

HEADER = ("interconnect", "images on each", "scope", *(f"{n:,} devices" for n in DEVICES))

Sent = Mapping[str, Mapping[str, Mapping[str, float]]]  # of `pod_step.counted`
PHASES = {"all-reduce": 2, "all-gather": 1}


def seconds(
    fabric: Fabric, kinds: Mapping[str, Mapping[str, float]], where: tuple[int, int]
) -> float:
    """How long collectives take one after the other, among ``where`` = devices, stride."""
    if where[0] == 1:
        return 0.0
    total = 0.0
    for kind, sent in kinds.items():
        empty = PHASES[kind] * fabric.phase(*where, 0)
        total += sent["operations"] * (fabric.launch + empty)
        total += PHASES[kind] * fabric.phase(*where, sent["bytes"]) - empty
    return total


def places(scope: str, devices: int) -> dict[str, tuple[int, int]]:
    """Among how many devices each part of a step sends, and the stride between them."""
    sharing = {"global": devices, "device": 1}.get(scope) or int(scope.partition(":")[2])
    inside = (min(sharing, devices), 1)
    return {
        "forward": inside,
        "backward": inside,
        "statistics": (devices // inside[0], inside[0]),
        "gradients": (devices, 1),
    }


def sent_on(row: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """What the step of a row of `pod_step` would send on another number of devices: as many
    operations; the results of gathers grow with the devices among which they gather, those of
    reductions stay."""
    before, now = (places(row["scope"], n) for n in (row["devices"], devices))

    def factor(part: str, kind: str) -> float:
        return now[part][0] / before[part][0] if kind == "all-gather" else 1.0

    return {
        part: {
            kind: {**sent, "bytes": sent["bytes"] * factor(part, kind)}
            for kind, sent in kinds.items()
        }
        for part, kinds in row["sent"].items()
    }


def by_sums(sent: Sent, scope: str, devices: int) -> dict[str, Any]:
    """The same if moments were merged by two all-reduces, the mean and then the variance about it,
    of one number per feature each, instead of gathering two per feature and device."""
    found: dict[str, Any] = dict(sent)
    for part in ("forward", "statistics"):
        members = places(scope, devices)[part][0]
        gathered = sent[part].get("all-gather")
        if gathered:
            numbers = {
                "operations": 2 * gathered["operations"],
                "bytes": gathered["bytes"] / members,
            }
            found[part] = {"all-reduce": numbers}
    return found


class Step(NamedTuple):
    """Seconds of a step: of computing, of messages that the next layer waits for, of others."""

    computing: float
    waited_for: float
    others: float

    def efficiency(self, overlap: bool) -> float:
        """Computing over all: others beside the backward pass as far as it lasts, or not at all."""
        hidden = BACKWARD * self.computing if overlap else 0.0
        exposed = max(0.0, self.others - hidden)
        return self.computing / (self.computing + self.waited_for + exposed)


def step(fabric: Fabric, flops: float, sent: Sent, scope: str, devices: int) -> Step:
    """A step that computes ``flops`` on each device and sends ``sent``."""
    where = places(scope, devices)
    took = {part: seconds(fabric, kinds, where[part]) for part, kinds in sent.items()}
    return Step(
        flops / (fabric.peak * UTILISATION),
        took["forward"] + took["backward"],
        took["statistics"] + took["gradients"],
    )


def predict(counted: Sequence[Mapping[str, Any]], counts: Sequence[int] = DEVICES) -> list[Any]:
    """A row per way to merge, fabric, batch and scope: the `Step` and its efficiency by number of
    devices, with overlap and apart. FLOPs grow with the batch."""
    most = {row["scope"]: row for row in sorted(counted, key=lambda row: row["devices"])}
    ways = itertools.product((False, True), FABRICS, BATCHES, most.values())
    return [
        {"fabric": fabric.name, "batch": batch, "scope": row["scope"], "by_sums": sums}
        | {"steps": {str(n): _predicted(fabric, batch, row, sums, n) for n in counts}}
        for sums, fabric, batch, row in ways
    ]


def _predicted(
    fabric: Fabric, batch: int, row: Mapping[str, Any], sums: bool, devices: int
) -> dict[str, float]:
    scope, sent = row["scope"], sent_on(row, devices)
    sent = by_sums(sent, scope, devices) if sums else sent
    flops = row["flops"] * batch / row["per_device"]
    one = step(fabric, flops, sent, scope, devices)
    return one._asdict() | {"overlapped": one.efficiency(True), "apart": one.efficiency(False)}


def table(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One line per row of `predict`, in percent: with overlap, and apart."""
    return [
        (
            *(row["fabric"], str(row["batch"]), row["scope"]),
            *(f"{100 * one['overlapped']:.0f}, {100 * one['apart']:.0f}" for one in steps.values()),
        )
        for row in rows
        for steps in (row["steps"],)
    ]
