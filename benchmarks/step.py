"""The train step against the same net written plainly with flax.linen.

Both sides hold the set on the device as uint8, shuffle it for every epoch, take a batch from it by
index, normalise it, update with the optimizer and schedule of the config, and add up the loss and
the norm of the gradient for the log; neither augments. Besides that, ours refuses steps that are
not finite, and computes the variance in two passes where flax's BatchNorm takes one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import plain
from benchmarks.measure import in_turn, ratios, spread, text
from bnresearch import config as configs
from bnresearch.experiment import Experiment, initial_state, prepare, train_feed

HEADER = ("net", "how", "ms per step", "images/s", "ours / this", "n")


class Case(NamedTuple):
    """A config, its net in plain flax, the steps of one timing, and how often to repeat it."""

    config: str
    overrides: tuple[str, ...]
    model: Any
    ways: dict[str, "Way"]
    steps: int
    repeats: int


class Way(NamedTuple):
    """How the plain net is run, and whether it logs the norm of the gradient."""

    make: Callable
    log_norm: bool = True


EACH = {"plain flax, a call per step": Way(plain.dispatched)}
SCAN = {
    "plain flax, lax.scan": Way(plain.scanned),
    "plain flax, lax.scan, no gradient norm": Way(plain.scanned, log_norm=False),
}
CASES = {
    "MLP 3x100, batch 60": Case("digits_mlp", (), plain.MLP(), EACH | SCAN, 500, 40),
    "ResNet-20, batch 128": Case(
        "cifar10_resnet20",
        ("data.name=synthetic", "data.augment=none"),
        plain.ResNet20(),
        EACH,  # a scan is slow here on a CPU
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
        work |= {w: theirs(experiment, case.model, way, steps) for w, way in case.ways.items()}
        seconds = in_turn(work, repeats)
        for how, values in seconds.items():
            per_step = spread([value / steps for value in values])
            rows.append(
                {
                    "net": name,
                    "how": how,
                    "seconds_per_step": per_step,
                    "images_per_second": config.data.batch_size / per_step["median"],
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


def theirs(experiment: Experiment, model: Any, way: Way, steps: int) -> Callable[[], None]:
    """The same number of steps in plain flax, on the same arrays."""
    config, dataset = experiment.config, experiment.program.dataset
    feed, info = train_feed(experiment, 0, 1), dataset.info
    data = {"image": feed["image"], "label": feed["label"]}
    batch, count = config.data.batch_size, info.examples["train"]
    run = way.make(plain.make_step(batch, info.mean, info.std, way.log_norm))
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
            text(row["seconds_per_step"], 1e3, 3),
            f"{row['images_per_second']:.0f}",
            "" if row["how"] == "bnresearch" else text(row["ours_over_this"], digits=3),
            str(row["seconds_per_step"]["n"]),
        )
        for row in result["rows"]
    ]
