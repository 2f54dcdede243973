"""What the tests of probes share: a run in the middle, and its net once more by hand."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from run_tools import DIGITS

from bnresearch import config as configs
from bnresearch.experiment import initial_state, prepare
from bnresearch.probes.inside import Inside

STEP, TOTAL, BATCHES = 7, 40, 3
RATE, MOMENTUM, DECAY, SMOOTHING = 0.05, 0.8, 0.01, 0.1
OVERRIDES = (
    "parallel.devices=1",
    "model.mlp.widths=(6,5)",
    "data.batch_size=12",
    f"train.duration={TOTAL}st",
    f"optim.learning_rate={RATE}",
    f"optim.sgd.momentum={MOMENTUM}",
    f"optim.weight_decay={DECAY}",
    f"task.classification.label_smoothing={SMOOTHING}",
    f"probes.batches={BATCHES}",
)


def make_case():
    """A run at a step in the middle, with numbers as no training would leave them."""
    experiment = prepare(configs.load(DIGITS, OVERRIDES))
    state, draw = initial_state(experiment), np.random.RandomState(0)

    def random(tree, middle=0.0):
        return jax.tree.map(lambda x: jnp.float32(middle + 0.3 * draw.randn(*x.shape)), tree)

    stats = {
        site: {"mean": np.float32(0.3 * draw.randn(n)), "var": np.float32(0.5 + draw.rand(n))}
        for site, n in (("norm1", 6), ("norm2", 5))
    }
    params = jax.tree.map(jnp.add, state.params, random(state.params))
    opt_state = optax.tree.set(state.opt_state, trace=random(params))
    state = state.replace(
        step=jnp.int32(STEP), params=params, batch_stats=stats, opt_state=opt_state
    )
    return SimpleNamespace(
        inside=Inside(experiment, state),
        experiment=experiment,
        state=state,
        params=params,
        trace=optax.tree.get(opt_state, "trace"),
        stats=stats,
        batches=[batch_of(experiment, STEP + i) for i in range(BATCHES)],
        rate=RATE * 0.5 * (1 + math.cos(math.pi * STEP / TOTAL)),
    )


def batch_of(experiment, step):
    dataset, rows = experiment.program.dataset, jnp.arange(12)
    batch = dataset.train_batch(dataset.feed(experiment.seed, step), experiment.seed, step, rows)
    return batch["image"], batch["label"]


@jax.jit
def forward(params, image, added=(0.0, 0.0)):
    """Inputs and outputs of both sites, and the logits."""
    x, seen = image.reshape(len(image), -1), []
    for i in (1, 2):
        site = params[f"norm{i}"]
        h = x @ params[f"dense{i}"]["kernel"]
        x = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5) * site["scale"] + site["bias"]
        x = jnp.maximum(x, 0) + added[i - 1]
        seen.append((h, x))
    return seen, x @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, batch, added=(0.0, 0.0)):
    logits = forward(params, batch[0], added)[1]
    target = jax.nn.one_hot(batch[1], 10) * (1 - SMOOTHING) + SMOOTHING / 10
    return -(target * jax.nn.log_softmax(logits)).sum(1).mean()


value_and_gradient = jax.jit(jax.value_and_grad(loss))


def gradient_of(params, batch):
    return value_and_gradient(params, batch)[1]


def inputs(case, index):
    """The inputs of both sites in a batch, float64."""
    return [np.float64(h) for h, _ in forward(case.params, case.batches[index][0])[0]]


def updated(case):
    """The parameters after this step of SGD with momentum, by hand."""
    gradient = gradient_of(case.params, case.batches[0])

    def move(path, w, g, v):
        decayed = g + DECAY * w if path[-1].key == "kernel" else g
        return w - case.rate * (MOMENTUM * v + decayed)

    return jax.tree_util.tree_map_with_path(move, case.params, gradient, case.trace)


def check(found, probe, sites, keepers):
    """A probe found finite numbers, at the sites where it has something to find."""
    where = {
        "staleness": keepers,
        "fluctuation": keepers,
        "covariate_shift": [*sites[1:], "head"],
        "landscape": [],
        "hessian": [],
    }
    assert [site for site in found if site] == where.get(probe, sites)
    assert all(values for values in found.values())
    assert np.isfinite([value for values in found.values() for value in values.values()]).all()
