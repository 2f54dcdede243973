"""Statistics at prediction time: values against float64, and for which kinds they are right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from kinds_tools import assert_close
from norm_tools import SHAPE, fixed_context, options, random_params, side_inputs, start_state

from bnresearch import adapt, norm
from bnresearch.errors import UserError
from bnresearch.net import of_model
from bnresearch.norm import NORMS, Stats
from bnresearch.precise import Site
from bnresearch.watch import Watch

RUNNING = Stats(np.array([0.5, -1.0, 2.0]), np.array([1.5, 0.3, 4.0]))
X = np.random.default_rng(0).normal(size=(8, 5, 3)) * [1, 2, 0.5] + [3, 0, -1]

blend, with_example, corrected = map(jax.jit, (adapt.blend, adapt.with_example, adapt.corrected))


def given(x=X):
    return Stats(*map(np.float32, RUNNING)), np.float32(x)


def test_blend_weighs_the_running_ones_as_so_many_examples():
    stats = blend(*given(), None, np.float32(16))
    a = 16 / (16 + 8)
    assert_close(stats.mean, a * RUNNING.mean + (1 - a) * X.mean((0, 1)))
    assert_close(stats.var, a * RUNNING.var + (1 - a) * X.var((0, 1)))


def test_blend_does_not_count_padding():
    mask = np.arange(8) < 3
    stats = blend(*given(), mask, np.float32(5))
    a = 5 / (5 + 3)
    assert_close(stats.mean, a * RUNNING.mean + (1 - a) * X[:3].mean((0, 1)))
    assert_close(stats.var, a * RUNNING.var + (1 - a) * X[:3].var((0, 1)))


def test_blend_of_no_source_is_the_batch():
    stats = blend(*given(), None, np.float32(0))
    assert_close(stats, Stats(X.mean((0, 1)), X.var((0, 1))))


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_an_example_has_its_weight_in_mean_and_mean_square(weight, offset):
    """By the formula of the paper, in float64, which takes the difference of two squares."""
    running, x = RUNNING._replace(mean=RUNNING.mean + offset), X + offset
    found = with_example(Stats(*map(np.float32, running)), np.float32(x), weight)
    mean = (1 - weight) * running.mean + weight * x.mean(1)
    square = running.var + running.mean**2
    var = (1 - weight) * square + weight * (x**2).mean(1) - mean**2
    assert found.mean.shape == found.var.shape == (8, 1, 3)
    assert_close(found.mean[:, 0], mean)
    assert_close(found.var[:, 0], var, 2e-4 if offset else 2e-6)


def test_a_vector_is_its_own_mean_and_has_no_variance():
    running, x = given(X[:, 0])
    found = with_example(running, x, 0.25)
    assert_close(found.mean, 0.75 * RUNNING.mean + 0.25 * X[:, 0])
    assert_close(found.var, 0.75 * RUNNING.var + 0.1875 * (X[:, 0] - RUNNING.mean) ** 2)


def test_corrected_statistics_are_the_expectation_over_training_batches():
    """200,000 batches of 4, of which example 2 is one and the others are drawn."""
    rng, size, draws = np.random.default_rng(1), 4, 200_000
    means, squares = X.mean(1), (X**2).mean(1)
    others = rng.integers(len(X), size=(draws, size - 1))
    m = (means[2] + means[others].sum(1)) / size
    q = (squares[2] + squares[others].sum(1)) / size
    v = q - m**2
    population = Stats(np.float32(X.mean((0, 1))), np.float32(X.var((0, 1))))
    spread = np.float32(means.var(0))
    found = corrected(population, np.float32(X), size, spread)
    for stats, drawn in ((found.mean, m), (found.var, v)):
        error = 5 * drawn.std(0) / np.sqrt(draws)
        assert (np.abs(stats[2, 0] - drawn.mean(0)) < error).all()
    # Without the correction the variance would be off by far more.
    wrong = with_example(population, np.float32(X), 1 / size).var[2, 0]
    assert (np.abs(wrong - v.mean(0)) > 10 * v.std(0) / np.sqrt(draws)).any()


def test_a_variance_never_comes_below_zero():
    population = Stats(np.zeros(3, "f"), np.full(3, 1e-3, "f"))
    found = corrected(population, np.zeros((8, 5, 3), "f"), 2, np.ones(3, "f"))
    assert (found.var == 0).all()


# They would take a mean and a variance, too, but theirs mean something else.
OTHERS = {
    "lp": "its variance is the square of another measure of deviation",
    "representative": "they are those of the input after a calibration",
    "online": "what it normalises it clamps",
    "frozen": "they are constants by definition",
}


@pytest.mark.parametrize("kind", [name for name, row in NORMS.items() if row.state is not None])
def test_the_kinds_that_take_a_mean_and_a_variance_are_those_that_normalise_with_them(kind):
    """Also with statistics of each example: the output is that for an input which is normalised
    already, with statistics that do nothing."""
    row, chosen, state = NORMS[kind], options(kind), start_state(kind)
    rng, params = np.random.default_rng(2), random_params(kind)
    context = fixed_context(kind, "running") | side_inputs(kind, use="running")
    x, mean, var = (rng.uniform(0.5, 2, s).astype("f") for s in (SHAPE, (8, 1, 4), (8, 1, 4)))
    epsilon = chosen.get("epsilon", 0)

    @jax.jit
    def apply(x, mean, var):
        return norm.apply(row, x, params, state._replace(mean=mean, var=var), context, chosen).y

    try:
        y = apply(x, mean, var)
        wanted = apply((x - mean) / np.sqrt(var + epsilon), 0 * mean, 0 * var + 1 - epsilon)
        fits = state.mean.shape == (4,) and np.allclose(y, wanted, atol=1e-5)
    except (ValueError, AttributeError, TypeError):  # it has no such state, or one of groups
        fits = False
    assert (kind in adapt.NORMALISING) == (fits and kind not in OTHERS)


def test_a_site_of_another_kind_is_refused_by_name():
    sites = {"norm1": Site("batch", {}, "pooled"), "norm2": Site("switchable", {}, "pooled")}
    with pytest.raises(UserError, match="site norm2 is of kind switchable"):
        adapt.check_sites(sites, "blend")
    adapt.check_sites({"a": Site("BatchNorm", {}, "pooled"), "b": Site("frozen", {}, "kept")}, "x")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(6, name="dense")(x))
        return nn.Dense(3, name="head")(nn.relu(x))


def test_tent_takes_a_step_of_adam_down_the_entropy_of_what_is_no_padding():
    x, mask = np.float32(X[:, 0]), np.arange(8) < 6
    variables = jax.jit(Net().init)(jax.random.key(0), x)
    net, batch = of_model(Net()), {"x": x, "mask": mask}
    adapted = adapt.tent_start(variables["params"], ["norm"], 0.01)
    assert set(adapted.affine["norm"]) == {"scale", "bias"} and set(adapted.affine) == {"norm"}

    def entropy(affine):
        hidden = x @ variables["params"]["dense"]["kernel"]
        z = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        hidden = jax.nn.relu(z * affine["scale"] + affine["bias"])
        p = jax.nn.softmax(hidden @ variables["params"]["head"]["kernel"])
        return -(p * jnp.log(p)).sum(-1)[:6].mean()

    optimizer, steps, entropies = optax.adam(0.01), 3, []

    @jax.jit
    def by_hand(affine, opt_state):
        value, gradient = jax.value_and_grad(entropy)(affine)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(affine, updates), opt_state, value

    affine = variables["params"]["norm"]
    opt_state = optimizer.init(affine)
    step = jax.jit(lambda adapted: adapt.tent(net, variables, batch, adapted, 0.01))
    for _ in range(steps):
        affine, opt_state, value = by_hand(affine, opt_state)
        _, adapted = step(adapted)
        entropies.append(float(value))
    assert_close(adapted.affine["norm"]["scale"], affine["scale"], 1e-5)
    assert_close(adapted.affine["norm"]["bias"], affine["bias"], 1e-4)
    assert entropies == sorted(entropies, reverse=True)


def test_tent_predicts_before_its_step():
    x = np.float32(X[:, 0])
    variables = jax.jit(Net().init)(jax.random.key(0), x)
    net, batch = of_model(Net()), {"x": x, "mask": np.ones(8, bool)}
    adapted = adapt.tent_start(variables["params"], ["norm"], 9.0)
    logits, after = jax.jit(lambda a: adapt.tent(net, variables, batch, a, 9.0))(adapted)
    plain = jax.jit(lambda v: net.apply(v, batch, watch=Watch(use="batch")).output)
    assert_close(logits, plain(variables))
    assert np.abs(after.affine["norm"]["scale"] - 1).min() > 1


def test_tent_refuses_norms_without_scale_and_bias():
    with pytest.raises(UserError, match="neither"):
        adapt.tent_start({"head": {"kernel": 1}}, ["norm"], 0.1)
