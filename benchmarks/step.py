"""The train step against the same net written plainly with flax.linen, and in PyTorch.

All sides hold the set on the device as uint8, shuffle it for every epoch, take a batch from it by
index, normalise it, update with momentum SGD and weight decay, and add up the loss for the log;
none augments. Ours and flax follow the schedule of the config and, where nothing else is said, log
the norm of the gradient; torch has a constant rate and no norm. Ours besides refuses steps that are
not finite, and computes the variance in two passes where flax's BatchNorm takes one.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import plain
from benchmarks.measure import LeftOut, in_turn, missing, ratios, say, scaled, spread, text
from benchmarks.picture import Bars
from bnresearch import config as configs
from bnresearch.experiment import Experiment, initial_state, prepare, train_feed

HEADER = ("net", "how", "ms per step", "images/s", "ours / this", "n")
OURS = "bnresearch"

Work = Callable[[], None]


class Case(NamedTuple):
    """A config and its net elsewhere, the steps of one timing, and how often to repeat it."""

    config: str
    overrides: tuple[str, ...]
    flax: Any
    torch: str  # a key of plain_torch.NETS
    ways: Mapping[str, Callable[[Experiment, "Case", int], Work]]
    steps: int
    repeats: int
    quick: tuple[str, ...] = ()  # more overrides, to be fast where only the code is proved
    gib: float = 0.0  # of memory that it takes


def run(quick: bool) -> dict[str, Any]:
    """Rows of ms per step and images/s (median and quartiles), and ours / plain round by round."""
    return measure(CASES, quick)


def measure(cases: Mapping[str, Case], quick: bool) -> dict[str, Any]:
    """All cases, one after the other; the sides of each in turn."""
    rows, left_out = [], missing(["torch"])
    for name, case in cases.items():
        say(f"  {name}")
        try:
            rows += measured(name, case, quick, left_out)
        except LeftOut as reason:
            left_out.append(f"{name}: {reason}")
    return {"rows": rows, "left_out": left_out}


def measured(name: str, case: Case, quick: bool, left_out: list[str]) -> list[dict[str, Any]]:
    """The rows of one case; what cannot be done here is added to ``left_out``."""
    if quick:
        few = {how: way for how, way in case.ways.items() if how not in SLOW or name == FIRST}
        case = case._replace(overrides=case.overrides + case.quick, ways=few)
        name += f" ({', '.join(case.quick)})" if case.quick else ""
    elif (there := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30) < case.gib:
        raise LeftOut(f"takes {case.gib} GiB of memory, this machine has {there:.0f}")
    steps, repeats = (max(1, case.steps // 4), 2) if quick else (case.steps, case.repeats)
    experiment = prepare(configs.load(f"configs/{case.config}.py", case.overrides))
    work = {OURS: ours(experiment, case, steps)}
    for how, way in case.ways.items():
        try:
            work[how] = way(experiment, case, steps)
        except LeftOut as reason:
            left_out.append(f"{name}, {how}: {reason}")
        except ImportError:
            continue  # said once, by `missing`
    rows = []
    for how, values in (seconds := in_turn(work, repeats)).items():
        per_step = spread([value / steps for value in values])
        rows.append(
            {
                "net": name,
                "how": how,
                "seconds_per_step": per_step,
                "images_per_second": experiment.config.data.batch_size / per_step["median"],
                "ours_over_this": ratios(seconds[OURS], values),
                "steps_per_timing": steps,
            }
        )
    return rows


def ours(experiment: Experiment, case: Case, steps: int, overrides: tuple[str, ...] = ()) -> Work:
    """``steps`` steps as the loop of bnresearch.train takes them."""
    if overrides:
        config = configs.load(f"configs/{case.config}.py", case.overrides + overrides)
        experiment = prepare(config)
    program = experiment.program
    carry = program.layout.put(initial_state(experiment))
    step = 0

    def work() -> None:
        nonlocal carry, step
        end = step + steps
        while step < end:
            count = min(program.chunk, end - step)
            feed = train_feed(experiment, step, count)
            carry = program.train(carry, feed, experiment.numbers, jnp.int32(count))
            step += count
        jax.block_until_ready(carry)

    return work


def in_flax(
    experiment: Experiment, case: Case, steps: int, make: Callable, log_norm: bool = True
) -> Work:
    """The same number of steps in plain flax, on the same arrays."""
    config, dataset = experiment.config, experiment.program.dataset
    feed, info = train_feed(experiment, 0, 1), dataset.info
    data = {"image": feed["image"], "label": feed["label"]}
    batch, count = config.data.batch_size, info.examples["train"]
    run = make(plain.make_step(batch, info.mean, info.std, log_norm))
    # Where the data lie, or the second call would be compiled anew.
    state = plain.make_state(case.flax, info.shape, optimizer(experiment))
    state = jax.device_put(state, feed["image"].sharding)
    step = 0

    def work() -> None:
        nonlocal state, step
        order = plain.shuffled(step, -(-steps * batch // count), count)
        state = run(state, data | {"order": order, "first": jnp.int32(step)}, steps)
        step += steps
        jax.block_until_ready(state)

    return work


def optimizer(experiment: Experiment) -> optax.GradientTransformation:
    """Momentum SGD with the schedule and the weight decay of the config."""
    config, schedule = experiment.config.optim, experiment.program.schedule
    sgd = optax.sgd(lambda step: config.learning_rate * schedule(step), config.sgd.momentum)
    if not config.weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(config.weight_decay), sgd)


def in_torch(
    experiment: Experiment, case: Case, steps: int, compiled: bool, autocast: bool = False
) -> Work:
    """The same number of steps in PyTorch, on the same arrays."""
    from benchmarks import plain_torch

    config, info = experiment.config, experiment.program.dataset.info
    feed = train_feed(experiment, 0, 1)
    steps_of = plain_torch.make_steps(
        case.torch,
        np.array(feed["image"]),
        np.array(feed["label"]),
        np.array(info.mean),
        np.array(info.std),
        batch=config.data.batch_size,
        rate=config.optim.learning_rate,
        momentum=config.optim.sgd.momentum,
        weight_decay=config.optim.weight_decay,
        compiled=compiled,
        autocast=autocast,
    )
    return partial(steps_of, steps)


EACH = {"plain flax, a call per step": partial(in_flax, make=plain.dispatched)}
SCAN = {
    "plain flax, lax.scan": partial(in_flax, make=plain.scanned),
    "plain flax, lax.scan, no gradient norm": partial(in_flax, make=plain.scanned, log_norm=False),
}
TORCH = {
    "torch": partial(in_torch, compiled=False),
    "torch, compiled": partial(in_torch, compiled=True),
}
XLA = {"bnresearch, XLA alone": partial(ours, overrides=("parallel.kernels=xla",))}
SLOW = ("torch, compiled",)  # to compile
FIRST = "MLP 3x100, batch 60"

# Pictures of the size of a set, made up, so that nothing has to be there.
SYNTHETIC = ("data.name=synthetic", "data.augment=none", "optim.decay_norms_and_biases=True")
RESNET50 = (
    *SYNTHETIC,
    "model.resnet.family=imagenet",
    "model.resnet.depth=50",
    "data.synthetic.classes=1000",
)
CASES = {
    FIRST: Case("digits_mlp", (), plain.MLP(), "mlp", EACH | SCAN | TORCH, 500, 40),
    "ResNet-8, 28x28, batch 128": Case(
        "fashion_resnet",
        (*SYNTHETIC, "data.synthetic.shape=(28,28,1)"),
        plain.ResNet(8),
        "resnet8",
        XLA | EACH | TORCH,  # a scan of convolutions is slow on a CPU
        16,
        20,
    ),
    "ResNet-20, batch 128": Case(
        "cifar10_resnet20", SYNTHETIC, plain.ResNet(20), "resnet20", XLA | EACH | TORCH, 16, 10
    ),
    "ResNet-50, 224x224, batch 32": Case(
        "cifar10_resnet20",
        (
            *RESNET50,
            "data.batch_size=32",
            "data.synthetic.shape=(224,224,3)",
            "data.synthetic.examples=200",
        ),
        plain.ResNet50(),
        "resnet50",
        XLA | EACH | TORCH,
        1,
        3,
        quick=("data.batch_size=2", "data.image_size=32"),
        gib=16,
    ),
}


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per way of running a net."""
    return [
        (
            row["net"],
            row["how"],
            text(row["seconds_per_step"], 1e3, 3),
            f"{row['images_per_second']:.0f}",
            "" if row["how"] == OURS else text(row["ours_over_this"], digits=3),
            str(row["seconds_per_step"]["n"]),
        )
        for row in result["rows"]
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Milliseconds per step, and the ratios."""
    times: dict[str, dict[str, Any]] = {}
    compared: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        times.setdefault(row["net"], {})[row["how"]] = scaled(row["seconds_per_step"], 1e3)
        if row["how"] != OURS:
            compared.setdefault(row["net"], {})[row["how"]] = row["ours_over_this"]
    return [
        Bars("a step", "ms", times, log=True),
        Bars("bnresearch against them", "our time / their time", compared, log=True, rule=1.0),
    ]
