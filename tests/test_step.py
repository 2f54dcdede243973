"""The loss and metrics against numpy, bfloat16, and that every model learns real digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import DIGITS

from bnresearch import config as configs
from bnresearch.experiment import initial_state, prepare, train_feed
from bnresearch.tasks.classification import Classification
from bnresearch.train import run

# Small nets of each kind, and a rate that suits them without a norm.
MODELS = {
    "mlp": ("model.mlp.widths=(32, 32)",),
    "plain": ("model.plain.widths=(16, 32)", "model.plain.convs=(1, 1)"),
    "resnet": ("model.resnet.depth=8", "model.resnet.width=0.5"),
}
WITHOUT_NORM = {"mlp": 0.05, "plain": 0.2, "resnet": 0.05}


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_with_smoothed_labels(smoothing):
    logits = np.random.default_rng(0).normal(size=(6, 5)) * 3
    label = np.array([0, 1, 2, 3, 4, 0])
    target = (1 - smoothing) * np.eye(5)[label] + smoothing / 5
    expected = -(target * np.log(softmax(logits))).sum(1).mean()
    loss = Classification.loss(jnp.float32(logits), {"label": jnp.asarray(label)}, smoothing)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_metrics_count_every_unmasked_example_once():
    logits = np.random.default_rng(1).normal(size=(6, 5)) * 3
    label = logits.argmax(1)
    label[1] = (label[1] + 1) % 5
    mask = np.array([True, True, True, True, False, False])
    batch = {"label": jnp.asarray(label), "mask": jnp.asarray(mask)}
    metrics = Classification.metrics(
        jax.device_get(Classification.sums(jnp.float32(logits), batch))
    )
    loss = -np.log(softmax(logits)[np.arange(6), label])[:4].mean()
    assert metrics["count"] == 4
    assert metrics["accuracy"] == 0.75
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_calibration_error_is_that_of_the_whole_split_however_it_is_cut():
    """Guo et al. 2017, bin by bin, in float64; sums of batches, padded ones among them."""
    rng = np.random.default_rng(2)
    logits = np.float32(rng.normal(size=(200, 4)) * 3)
    label = np.where(rng.random(200) < 0.5, logits.argmax(1), rng.integers(0, 4, 200))
    p = softmax(logits.astype(np.float64))
    confidence, correct = p.max(1), p.argmax(1) == label
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (low < confidence) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    found = {}
    for size in (200, 64):
        batches = []
        for start in range(0, 200, size):
            rows = np.arange(start, start + size)
            batch = {"label": jnp.asarray(label[rows % 200]), "mask": jnp.asarray(rows < 200)}
            batches.append(Classification.sums(jnp.asarray(logits[rows % 200]), batch))
        sums = jax.tree.map(lambda *parts: sum(parts), *jax.device_get(batches))
        found[size] = Classification.metrics(sums)["ece"]
    assert expected > 0.05
    assert found == {size: pytest.approx(expected, rel=1e-5) for size in found}
    sure = {"label": jnp.array([0, 1, 0, 1]), "mask": jnp.ones(4, bool)}
    sums = Classification.sums(jnp.array([[1e3, 0.0]] * 4), sure)
    assert Classification.metrics(jax.device_get(sums))["ece"] == 0.5


def after_three_steps(*overrides):
    config = configs.load(
        DIGITS, ["parallel.devices=1", "model.name=resnet", *MODELS["resnet"], *overrides]
    )
    experiment = prepare(config)
    state = initial_state(experiment)
    for step in range(3):
        feed = train_feed(experiment, step, 1)
        state = experiment.program.train(state, feed, experiment.numbers, jnp.int32(1))
    return jax.device_get(state)


def test_bfloat16_computes_but_everything_that_is_kept_is_float32():
    half, full = after_three_steps("dtype=bfloat16"), after_three_steps()
    kept = jax.tree.leaves((half.params, half.batch_stats, half.opt_state))
    assert {leaf.dtype for leaf in kept} == {np.dtype(np.float32)}
    # bfloat16 has eight bits: the losses agree to about a percent, and not to float32's precision.
    assert half.meter["loss"] == pytest.approx(full.meter["loss"], rel=0.02)
    assert half.meter["loss"] != pytest.approx(full.meter["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns_digits(model, kind, tmp_path):
    overrides = [
        "parallel.devices=1",
        f"model.name={model}",
        *MODELS[model],
        f"norm.kind={kind}",
        f"optim.learning_rate={0.1 if kind == 'batch' else WITHOUT_NORM[model]}",
        "train.duration=8ep",
        "train.eval_every=8ep",
    ]
    result = run(configs.load(DIGITS, overrides), tmp_path / "run", show="off")
    assert result["metrics"]["test"]["count"] == 270
    assert result["metrics"]["test"]["accuracy"] > 0.9
