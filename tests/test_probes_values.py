"""What probes find, held against the same numbers computed by hand."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from probe_tools import (
    BATCHES,
    DECAY,
    MOMENTUM,
    OVERRIDES,
    STEP,
    check,
    forward,
    gradient_of,
    inputs,
    loss,
    make_case,
    updated,
    value_and_gradient,
)
from run_tools import DIGITS, ROOT

from bnresearch import averages, net, norm
from bnresearch import config as configs
from bnresearch.experiment import initial_state, prepare, train_feed
from bnresearch.layers import make_norm
from bnresearch.net import Net
from bnresearch.probes import PROBES
from bnresearch.probes.dropout import ratios
from bnresearch.probes.inside import Inside, View
from bnresearch.probes.rate import angle_between, equilibrium
from bnresearch.probes.running import mean_age, running_of
from bnresearch.probes.shape import participation_rank, shape_of
from bnresearch.sets import Stats


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Compiled in less time, to something slower."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def case():
    return make_case()


def near(found, expected, rtol=3e-4):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol, 1e-6, err_msg=name)


def rms(x):
    return math.sqrt(np.mean(np.square(x)))


# ---- Statistics


def test_statistics_are_those_of_the_batch_and_the_running_ones(case):
    found = PROBES["statistics"](case.inside)
    assert list(found) == ["norm1", "norm2"]
    for x, (site, values) in zip(inputs(case, 0), found.items(), strict=True):
        running = case.stats[site]
        expected = {"batch_mean": rms(x.mean(0)), "batch_var": x.var(0).mean()}
        expected |= {"running_mean": rms(running["mean"]), "running_var": running["var"].mean()}
        near(values, expected)


def test_staleness_is_the_distance_from_the_moments_of_all_batches_together(case):
    found = PROBES["staleness"](case.inside)
    every = [
        np.concatenate(xs) for xs in zip(*(inputs(case, i) for i in range(BATCHES)), strict=True)
    ]
    for x, (site, values) in zip(every, found.items(), strict=True):
        m, v = x.mean(0), x.var(0) + 1e-5
        mr, vr = case.stats[site]["mean"], case.stats[site]["var"] + 1e-5
        kl = (np.log(vr / v) + (v + (m - mr) ** 2) / vr - 1) / 2
        near(
            values,
            {
                "mean_distance": (abs(mr - m) / np.sqrt(v)).mean(),
                "var_distance": abs(np.log(vr / v)).mean(),
                "kl": kl.mean(),
                "age": sum(k * 0.9**k for k in range(STEP)) / sum(0.9**k for k in range(STEP)),
                "start": 0.9**STEP,
            },
        )


def test_fluctuation_is_the_average_distance_of_batches_from_the_running(case):
    found = PROBES["fluctuation"](case.inside)
    for number, (site, values) in enumerate(found.items()):
        m, s = case.stats[site]["mean"], np.sqrt(case.stats[site]["var"])
        xs, length = [inputs(case, i)[number] for i in range(BATCHES)], np.linalg.norm(s)
        means = [np.linalg.norm(x.mean(0) - m) / length for x in xs]
        stds = [np.linalg.norm(x.std(0) - s) / length for x in xs]
        near(values, {"mean": np.mean(means), "std": np.mean(stds)})


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("updates", [1, 10, 3000])
def test_age_is_that_of_its_closed_form(decay, updates):
    power = decay**updates
    expected = decay / (1 - decay) - updates * power / (1 - power)
    assert mean_age(decay, updates) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("average", "age", "start"),
    [("ema", 1.2249, 0.4096), ("debiased", 1.2249, 0), ("cumulative", 1.5, 0), ("last", 1.0, 0)],
)
def test_age_is_the_mean_age_of_what_an_average_holds(average, age, start):
    """Fed with batches whose mean is the step they are of: then the average says how old it is."""
    options = norm.NORMS["batch"].options | {"decay": 0.8, "average": average, "window": 3}
    module = SimpleNamespace(chosen=SimpleNamespace(options=options))
    running = averages.start(1, options)
    known = {name: options[name] for name in ("decay", "average")}
    for step in range(4):
        running = averages.update(running, Stats(jnp.full(1, step), jnp.zeros(1)), 5, **known)
    seen = SimpleNamespace(module=module, running=running, x=jnp.zeros((2, 1)))
    values = running_of(seen, 4)
    updates = min(int(values["updates"]), values["window"])
    found = mean_age(float(values["decay"]), updates)
    held = 3 - float(running.mean[0]) / (1 - start)
    assert (found, held) == (pytest.approx(age, abs=1e-4), pytest.approx(age, abs=1e-4))
    assert values["from_start"] == (start > 0)


# ---- Activations


def test_activations_are_the_moments_by_feature_and_the_rank_of_the_covariance(case):
    found = PROBES["activations"](case.inside)
    outputs = [np.float64(y) for _, y in forward(case.params, case.batches[0][0])[0]]
    for x, y, values in zip(inputs(case, 0), outputs, found.values(), strict=True):
        z = (x - x.mean(0)) / x.std(0)
        eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
        near(
            values,
            {
                "mean_over_std": math.sqrt((x.mean(0) ** 2).sum() / x.var(0).sum()),
                "skewness": (z**3).mean(),
                "kurtosis": (z**4).mean() - 3,
                "rank": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
                "dead": (np.ptp(y, axis=0) == 0).mean(),
            },
        )


@pytest.mark.parametrize("rows", [40, 3])
def test_the_rank_of_a_known_covariance(rows):
    """Spectrum 4, 2, 1: 7^2 / (16 + 4 + 1), however many rows and whatever the scale."""
    draw = np.random.RandomState(0)
    left, right = (np.linalg.qr(draw.randn(n, 3))[0] for n in (rows, 5))
    x = left @ np.diag(np.sqrt([4.0, 2.0, 1.0])) @ right.T
    assert float(participation_rank(jnp.float32(1e15 * x))) == pytest.approx(49 / 21, rel=1e-5)
    assert float(participation_rank(jnp.zeros((rows, 5)))) == 0


def shape(x, y, mask=None, **fields):
    """What is found at a site with this input and output."""

    def find(x, y):
        return shape_of(SimpleNamespace(x=x, y=y, mask=mask, module=SimpleNamespace(**fields)))

    return {name: float(value) for name, value in jax.jit(find)(x, y).items()}


@pytest.mark.parametrize(("followed", "dead"), [(False, 0.25), (True, 0.5)])
def test_dead_features_have_one_value_or_are_nowhere_positive(followed, dead):
    y = np.float32([[3, -1, 1, 0], [3, -2, -1, 2]])
    found = shape(y, y, activation_follows=followed)
    assert found["dead"] == dead
    # The constant feature has no shape; the others' values are two: kurtosis 1 - 3.
    assert found["kurtosis"] == pytest.approx(-2)


def test_what_a_mask_leaves_out_does_not_count():
    x, y = np.float32(np.random.RandomState(0).randn(2, 6, 4))
    near(shape(x, y, mask=np.arange(6) < 4), shape(x[:4], y[:4]))


# ---- Gradients


def test_gradients_at_outputs_and_their_growth(case):
    zeros = tuple(jnp.zeros_like(y) for _, y in forward(case.params, case.batches[0][0])[0])
    by_params, by_output = jax.jit(jax.grad(loss, (0, 2)))(case.params, case.batches[0], zeros)
    found = PROBES["gradients"](case.inside)
    norms = [float(jnp.linalg.norm(g)) for g in by_output]
    for i, n in enumerate(norms, start=1):
        own = np.concatenate([by_params[f"norm{i}"][name] for name in ("scale", "bias")])
        near(found[f"norm{i}"], {"norm": n, "params": np.linalg.norm(own)})
    # Through two points, the least squares line is the line.
    near(found[""], {"growth": (norms[0] / norms[1]) ** 2})


def test_covariate_shift_is_that_of_a_loop_over_layers(case):
    new, old = updated(case), case.params
    parts = [("dense1", "norm1"), ("dense2", "norm2"), ("head",)]
    gradient = gradient_of(old, case.batches[0])
    found = PROBES["covariate_shift"](case.inside)
    assert list(found) == ["norm2", "head"]
    for index, name in ((1, "norm2"), (2, "head")):
        mixed = old | {module: new[module] for part in parts[:index] for module in part}
        other = gradient_of(mixed, case.batches[0])
        g, h = (
            np.float64(ravel_pytree({m: tree[m] for m in parts[index]})[0])
            for tree in (gradient, other)
        )
        cosine = g @ h / np.linalg.norm(g) / np.linalg.norm(h)
        near(found[name], {"shift": np.linalg.norm(g - h), "cosine": cosine}, 2e-3)


def test_landscape_is_loss_and_gradient_along_the_gradient(case):
    gradient = gradient_of(case.params, case.batches[0])
    losses, changes, smooth = [], [], []
    for a in np.array([0.5, 1, 2, 4]) * case.rate:
        there = jax.tree.map(lambda w, g, a=a: w - a * g, case.params, gradient)
        value, other = value_and_gradient(there, case.batches[0])
        losses.append(float(value))
        changes.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, gradient, other))))
        smooth.append(changes[-1] / (a * float(optax.tree.norm(gradient))))
    expected = {"loss_variation": np.ptp(losses), "gradient_predictiveness": np.ptp(changes)}
    near(PROBES["landscape"](case.inside)[""], expected | {"smoothness": max(smooth)}, 2e-3)


def test_effective_rate_is_that_of_the_next_update(case):
    new, gradient = updated(case), gradient_of(case.params, case.batches[0])
    found = PROBES["effective_rate"](case.inside)
    assert list(found) == ["norm1", "norm2", ""]
    for i in (1, 2):
        w, u, g = (
            np.float64(t[f"dense{i}"]["kernel"]).ravel() for t in (case.params, new, gradient)
        )
        length = np.linalg.norm(w)
        values = dict(found[f"norm{i}"])
        # Its output ignores the length of a weight up to epsilon.
        assert abs(values.pop("radial") - w @ g / length / np.linalg.norm(g)) < 1e-5
        angle = np.arccos(w @ u / length / np.linalg.norm(u))
        near(values, {"weight_norm": length, "rate": case.rate / length**2, "angle": angle})
    expected = math.sqrt(2 * case.rate * DECAY / (1 + MOMENTUM))
    near(found[""], {"equilibrium": expected})


@pytest.mark.parametrize("angle", [1e-5, 0.3, math.pi / 2, 3.0])
def test_small_and_large_angles(angle):
    other = jnp.float32([7 * math.cos(angle), 7 * math.sin(angle)])
    assert float(angle_between(jnp.float32([2.0, 0.0]), other)) == pytest.approx(angle, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("optim.sgd.momentum=0.0",), math.sqrt(2 * 0.1 * 0.01)),
        (("optim.name=adamw",), math.sqrt(2 * 0.1 * 0.01 * 0.1 / 1.9)),
        (("optim.sgd.nesterov=True",), None),
        (("optim.name=lamb",), None),
        (("optim.weight_decay=0.0",), None),
    ],
)
def test_equilibrium_of_optimizers(overrides, expected):
    config = configs.load(DIGITS, ("optim.weight_decay=0.01", *overrides)).optim
    assert equilibrium(config, 0.1) == (expected and pytest.approx(expected))


def test_hessian_is_that_of_jax(case):
    flat, unravel = ravel_pytree(case.params)
    hessian = jax.jit(jax.hessian(lambda w: loss(unravel(w), case.batches[0])))
    matrix = np.float64(hessian(flat))
    signs = np.random.RandomState(0)
    vectors = [signs.choice([-1.0, 1.0], len(flat)) for _ in range(20)]
    products = [z @ matrix @ z for z in vectors]
    found = PROBES["hessian"](case.inside)[""]
    near(
        found,
        {
            "eigenvalue": np.linalg.eigvalsh(matrix)[-1],
            "trace": np.mean(products),
            "trace_error": np.std(products, ddof=1) / math.sqrt(20),
        },
        2e-3,
    )
    assert abs(found["trace"] - np.trace(matrix)) < 4 * found["trace_error"]


# ---- Dropout


class Dropped(nn.Module):
    """ReLU, dropout, and a norm right behind it."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return make_norm("batch")(name="norm")(x)


def test_dropout_shift_is_that_of_its_closed_form():
    x = jax.random.normal(jax.random.key(0), (4000, 50))
    model = Dropped()
    variables = model.init(jax.random.key(1), x, False)
    inner: Net = net.of_model(model)

    def apply(watch, train=True):
        return inner.apply(variables, x, train=train, watch=watch)

    found = ratios(SimpleNamespace(apply=apply))
    expected = (math.pi - 1) / (math.pi / 0.5 - 1)
    assert float(found["norm"]) == pytest.approx(expected, rel=0.01)


# ---- Of the run itself


def test_gradient_and_update_are_those_of_training():
    """With dropout: the parameters after a step are what the probes foresee."""
    experiment = prepare(configs.load(DIGITS, (*OVERRIDES, "model.mlp.dropout=0.3")))
    state = initial_state(experiment)
    foreseen = Inside(experiment, state).updated
    feed, program = train_feed(experiment, 0, 1), experiment.program
    after = program.train(program.layout.put(state), feed, experiment.numbers, np.int32(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), foreseen, after.params)


def test_a_view_looks_at_the_batch_of_training(case):
    image, label = case.inside(batch_at, ahead=2)
    np.testing.assert_array_equal(image, case.batches[2][0])
    np.testing.assert_array_equal(label, case.batches[2][1])


def batch_at(view: View):
    return view.batch["image"], view.batch["label"]


# ---- The contract


@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_finds_finite_numbers_at_the_sites_of_an_mlp(probe, case):
    check(PROBES[probe](case.inside), probe, ["norm1", "norm2"], ["norm1", "norm2"])


def test_the_page_names_every_probe_and_quantity(case):
    page = (ROOT / "docs" / "probes.md").read_text()
    for probe, function in PROBES.items():
        names = {name for values in function(case.inside).values() for name in values}
        row = next(line for line in page.splitlines() if line.startswith(f"| `{probe}` |"))
        assert all(f"`{name}`" in row for name in names), probe
