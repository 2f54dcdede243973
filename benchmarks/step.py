"""The train step against the same net written plainly with flax.linen.

Both sides hold the set on the device as uint8, shuffle it for every epoch, take a batch from it by
index, normalise it, update with the optimizer and schedule of the config, and add up the loss;
neither augments. Besides that, ours adds up the norm of the gradient, refuses steps that are not
finite, and computes the variance in two passes where flax's BatchNorm takes one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from benchmarks import plain
from benchmarks.measure import in_turn, ratios, spread
from bnresearch import config as configs
from bnresearch.experiment import Experiment, initial_state, prepare, train_feed

HEADER = ("net", "how", "ms per step", "images/s", "ours / this", "n")


class Case(NamedTuple):
    """A config, its net in plain flax, the steps of one timing, and how often to repeat it."""

    config: str
    overrides: tuple[str, ...]
    model: Any
    ways: dict[str, Callable]
    steps: int
    repeats: int


BOTH = {"plain flax, a call per step": plain.dispatched, "plain flax, lax.scan": plain.scanned}
CALLS = {"plain flax, a call per step": plain.dispatched}  # a scan is slow here on a CPU
CASES = {
    "MLP 3x100, batch 60": Case("digits_mlp", (), plain.MLP(), BOTH, 500, 40),
    "ResNet-20, batch 128": Case(
        "cifar10_resnet20",
        ("data.name=synthetic", "data.augment=none"),
        plain.ResNet20(),
        CALLS,
        4,
        20,
    ),
}


def run(quick: bool) -> dict[str, Any]:
    """Rows of ms per step and images/s (median and quartiles), and ours / plain round by round."""
    rows = []
    for name, case in CASES.items():
        config = configs.load(f"configs/{case.config}.py", case.overrides)
        steps, repeats = (max(1, case.steps // 4), 3) if quick else (case.steps, case.repeats)
        experiment = prepare(config)
        work = {"bnresearch": ours(experiment, steps)}
        for way, make in case.ways.items():
            work[way] = theirs(experiment, case.model, make, steps)
        seconds = in_turn(work, repeats)
        for way, values in seconds.items():
            per_step = spread([value / steps for value in values])
            rows.append(
                {
                    "net": name,
                    "how": way,
                    "seconds_per_step": per_step,
                    "images_per_second": config.data.batch_size / per_step.median,
                    "ours_over_this": ratios(seconds["bnresearch"], values),
                    "steps_per_timing": steps,
                }
            )
    return {"rows": rows}


def ours(experiment: Experiment, steps: int) -> Callable[[], None]:
    """``steps`` steps as the loop of bnresearch.train takes them."""
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


def theirs(experiment: Experiment, model: Any, make: Callable, steps: int) -> Callable[[], None]:
    """The same number of steps in plain flax, on the same arrays."""
    config, dataset = experiment.config, experiment.program.dataset
    feed, info = train_feed(experiment, 0, 1), dataset.info
    data = {"image": feed["image"], "label": feed["label"]}
    batch, count = config.data.batch_size, info.examples["train"]
    run = make(plain.make_step(batch, info.mean, info.std))
    state = plain.make_state(model, info.shape, optimizer(experiment))
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


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per way of running a net."""
    return [
        (
            row["net"],
            row["how"],
            row["seconds_per_step"].text(1e3, 3),
            f"{row['images_per_second']:.0f}",
            "" if row["how"] == "bnresearch" else row["ours_over_this"].text(digits=3),
            str(row["seconds_per_step"].n),
        )
        for row in result["rows"]
    ]
