"""Exact properties of normalisers: what calculus, algebra and floating point say about them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from norm_tools import fixed_context, options, random_params, side_inputs, warm_state
from scipy.special import gamma

from bnresearch import averages, norm
from bnresearch.norm import NORMS, Scope, Sets, Stats, batch_norm, moments, pool

ZERO_ONE = Stats(jnp.zeros(4), jnp.ones(4))
SCALE = np.array([1.0, -2.0, 0.5, 3.0])
BIAS = np.array([0.5, 0.0, -1.0, 2.0])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def training(x, scale=None, bias=None, running=ZERO_ONE, **changes):
    """Output and new running statistics of batch norm in training."""
    return batch_norm(x, scale, bias, running, use="batch", **changes)


def standardised(x, **changes):
    return training(x, **changes)[0]


# ---- The gradient of batch normalization


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("shape", [(16, 4), (4, 2, 3, 4)])
def test_input_gradient_has_no_mean_and_its_projection_on_the_output_has_a_closed_form(
    x64, epsilon, shape
):
    """``sum(dx) = 0``; ``sum(dx * xhat) = scale / s * sum(dy * xhat) * epsilon / (v + epsilon)``,
    s = sqrt(v + epsilon): exactly orthogonal only with epsilon 0."""
    x, dy = random(shape), random(shape, seed=1)
    dx = jax.grad(lambda x: (training(x, SCALE, BIAS, epsilon=epsilon)[0] * dy).sum())(x)
    axes = tuple(range(x.ndim - 1))
    v = x.var(axes)
    xhat = (x - x.mean(axes)) / np.sqrt(v + epsilon)
    np.testing.assert_allclose(dx.sum(axes), 0, atol=1e-13)
    wanted = SCALE / np.sqrt(v + epsilon) * (dy * xhat).sum(axes) * epsilon / (v + epsilon)
    np.testing.assert_allclose((dx * xhat).sum(axes), wanted, rtol=1e-10, atol=1e-13)


def test_one_value_gives_the_bias_and_no_gradient():
    def output(x):
        return training(x, jnp.float32(SCALE), jnp.float32(BIAS), on_single="beta")[0]

    x = jnp.float32(random((1, 4)))
    np.testing.assert_array_equal(output(x), np.float32(BIAS)[None])
    np.testing.assert_array_equal(jax.grad(lambda x: (output(x) ** 2).sum())(x), 0)


def test_two_values_become_plus_and_minus_one_without_a_gradient(x64):
    """With n = 2 and epsilon 0 the output is the sign of the difference."""
    x, dy = random((2, 4)), random((2, 4), seed=1)
    y = standardised(x, epsilon=0.0)
    np.testing.assert_allclose(y, np.sign(x - x[::-1]), rtol=4e-16)
    dx = jax.grad(lambda x: (standardised(x, epsilon=0.0) * dy).sum())(x)
    np.testing.assert_allclose(dx, 0, atol=1e-14)


def test_two_values_learn_through_epsilon_only(x64):
    """With d = (x1 - x2) / 2 the output is +-d / sqrt(d^2 + epsilon), whose derivative is
    ``epsilon / (d^2 + epsilon)^1.5``."""
    x, dy, epsilon = random((2, 4)), random((2, 4), seed=1), 0.1
    dx = jax.grad(lambda x: (standardised(x, epsilon=epsilon) * dy).sum())(x)
    half = (x[0] - x[1]) / 2
    slope = epsilon / (half**2 + epsilon) ** 1.5 * (dy[0] - dy[1]) / 2
    np.testing.assert_allclose(dx, [slope, -slope], rtol=1e-12)


def test_two_examples_teach_a_dense_layer_nothing(x64):
    x, w = random((2, 3)), random((3, 4), seed=1)
    dw = jax.grad(lambda w: (standardised(x @ w, epsilon=0.0) * random((2, 4), 2)).sum())(w)
    np.testing.assert_allclose(dw, 0, atol=1e-14)


# ---- The values of batch normalization


@pytest.mark.parametrize("n", [2, 3, 16, 100])
def test_no_output_exceeds_the_root_of_n_minus_one(x64, n):
    """Samuelson's inequality; one outlier among equal values reaches the bound."""
    outlier = np.zeros((n, 4))
    outlier[0] = [1.0, -5.0, 1e4, 1e-4]
    y = standardised(outlier, epsilon=0.0)
    np.testing.assert_allclose(np.abs(y).max(0), math.sqrt(n - 1), rtol=1e-10)
    heavy = np.random.default_rng(0).standard_cauchy((n, 4))
    assert np.abs(standardised(heavy, epsilon=0.0)).max() <= math.sqrt(n - 1) * (1 + 1e-12)


def expected_deviation(n):
    """E[s] / sigma of n normal values, s with the biased variance."""
    return math.sqrt(2 / n) * gamma(n / 2) / gamma((n - 1) / 2)


def z_score(sample, wanted):
    return (sample.mean() - wanted) / (sample.std() / math.sqrt(sample.size))


@pytest.mark.parametrize(
    ("n", "known"),
    [(2, 0.5642), (3, 0.7236), (4, 0.7979), (8, 0.9027), (16, 0.9523), (32, 0.9763), (128, 0.9941)],
)
def test_deviation_of_small_sets_is_short_by_a_known_factor(n, known):
    assert expected_deviation(n) == pytest.approx(known, abs=5e-5)
    sets = 2000
    x = jnp.asarray(random((sets * n, 50), seed=n) * 3 + 1, jnp.float32)
    variance = moments(Sets(x, Scope(splits=sets))).var
    s = np.sqrt(np.asarray(variance, np.float64)) / 3
    assert abs(z_score(s, expected_deviation(n))) < 4
    if n >= 8:  # below, the inverses have no finite variance
        inverse = math.sqrt(n / 2) * gamma(n / 2 - 1) / gamma((n - 1) / 2)
        assert abs(z_score(1 / s, inverse)) < 4
        assert abs(z_score(1 / s**2, n / (n - 3))) < 4


# ---- Running statistics


@pytest.mark.parametrize(("decay", "steps"), [(0.9, 44), (0.99, 458), (0.999, 4603)])
def test_the_start_weighs_decay_to_the_number_of_steps(x64, decay, steps):
    """After how many steps 1 % of the start is left."""

    def body(running, _):
        batch = Stats(jnp.ones(1), jnp.ones(1))
        running = averages.update(running, batch, 8, decay=jnp.float64(decay))
        return running, running.mean[0]

    start = Stats(jnp.zeros(1), jnp.ones(1))
    means = jax.lax.scan(body, start, length=5000)[1]
    left = 1 - np.asarray(means)
    np.testing.assert_allclose(left, decay ** np.arange(1, 5001), atol=1e-13)
    assert int(np.abs(left - 0.01).argmin()) + 1 == steps


@pytest.mark.parametrize(("n", "correction"), [(2, 0), (4, 0), (32, 0), (2, 1), (4, 1)])
def test_where_running_statistics_settle(n, correction):
    """The biased variance at (n - 1) / n of the true one, the unbiased at all of it; the mean with
    a variance of (1 - decay) / (1 + decay) * sigma^2 / n."""
    decay, features = 0.9, 4000

    def body(running, key):
        x = 2 * jax.random.normal(key, (n, features))
        return training(x, running=running, decay=decay, correction=correction)[1], None

    start = Stats(jnp.zeros(features), jnp.full(features, 4.0))
    running, _ = jax.lax.scan(body, start, jax.random.split(jax.random.key(n), 150))
    limit = 4.0 if correction else 4.0 * (n - 1) / n
    assert abs(z_score(np.asarray(running.var, np.float64), limit)) < 4
    mean = np.asarray(running.mean, np.float64)
    assert abs(z_score(mean, 0)) < 4
    assert abs(z_score(mean**2, (1 - decay) / (1 + decay) * 4.0 / n)) < 4


# ---- Scale invariance of the weights in front

NOT_INVARIANT = {
    "none": "no normalization: the negative control",
    "dyt": "a function of single values: the negative control",
    "derf": "a function of single values: the negative control",
    "frozen": "given statistics: the negative control",
    "centre": "divides by nothing",
    "mean_only": "divides by nothing",
    "evonorm_s0": "the sigmoid in its numerator sees the scale",
    "weight_norm": "the weights are normalised before they get to the site",
    "scaled_weight_standardisation": "the weights are normalised before they get to the site",
    "cross_iteration": "averages with statistics of past batches",
    "mabn": "averages with statistics of past batches",
    "online": "divides by statistics of past examples",
}
# The output is invariant, but what passes for its gradient is not the derivative of that.
ONLY_THE_OUTPUT = {"stop_gradient"}
# It corrects towards past batches, by factors that count as constants.
ONLY_THE_GRADIENT = {"renorm"}
FIRST_DERIVATIVE_ONLY = {"power"}
INVARIANT = sorted(set(NORMS) - set(NOT_INVARIANT) - ONLY_THE_OUTPUT - ONLY_THE_GRADIENT)
INPUT = random((8, 5, 3), seed=2)
WEIGHTS, TARGET = random((3, 4), seed=3), random((8, 5, 4), seed=4)


def loss_of_weights(kind, use="batch"):
    """``w -> loss`` of a kind behind ``x @ w``, with epsilon 0."""
    chosen = options(kind)
    chosen |= {name: 0.0 for name in chosen if name == "epsilon"}
    wide = functools.partial(jnp.asarray, dtype=jnp.float64)
    params, running = jax.tree.map(wide, (random_params(kind), warm_state(kind)))
    context = fixed_context(kind, use) | side_inputs(kind, use=use)

    def loss(w):
        result = norm.apply(NORMS[kind], INPUT @ w, params, running, context, chosen)
        return (result.y * TARGET).sum()

    return loss


def length(array):
    return float(np.linalg.norm(array))


@pytest.mark.parametrize("kind", INVARIANT)
def test_scale_invariance(x64, kind):
    """``<w, g> = 0``, ``g(a w) = g(w) / a``, ``H(a w) = H(w) / a^2``; hence a step of plain SGD
    makes ``|w|^2`` grow by exactly ``rate^2 |g|^2``."""
    value_and_gradient = jax.value_and_grad(loss_of_weights(kind))
    direction = random((3, 4), seed=6)
    w, a, rate = WEIGHTS, 3.0, 0.1

    @jax.jit
    def up_to_hessian(w):
        if kind in FIRST_DERIVATIVE_ONLY:
            return *value_and_gradient(w), jnp.zeros_like(direction)
        (value, gradient), (_, bent) = jax.jvp(value_and_gradient, (w,), (direction,))
        return value, gradient, bent

    value, g, bent = up_to_hessian(w)
    assert length(g) > 0.1
    assert abs((w * g).sum()) < 1e-11 * length(w) * length(g)
    grown, g_grown, bent_grown = up_to_hessian(a * w)
    assert float(grown) == pytest.approx(float(value), rel=1e-12)
    np.testing.assert_allclose(g_grown, g / a, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bent_grown, bent / a**2, rtol=1e-8, atol=1e-11)
    after = length(w - rate * g) ** 2
    assert after == pytest.approx(length(w) ** 2 + rate**2 * length(g) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "use"),
    [(kind, "batch") for kind in NOT_INVARIANT if kind in NORMS] + [("batch", "running")],
)
def test_negative_controls_are_not_scale_invariant(x64, kind, use):
    value_and_gradient = jax.jit(jax.value_and_grad(loss_of_weights(kind, use)))
    w = WEIGHTS
    value, g = value_and_gradient(w)
    grown, g_grown = value_and_gradient(3.0 * w)
    assert abs((w * g).sum()) > 1e-3 * length(w) * length(g)
    assert abs(grown - value) > 0.01 * abs(value)
    assert np.abs(g_grown - g / 3).max() > 0.01 * np.abs(g / 3).max()


@pytest.mark.parametrize("kind", sorted((ONLY_THE_OUTPUT | ONLY_THE_GRADIENT) & set(NORMS)))
def test_half_of_scale_invariance(x64, kind):
    """Without the gradient of the statistics the weights are pushed along themselves; with renorm's
    they are not, though its output depends on their length."""
    value_and_gradient = jax.jit(jax.value_and_grad(loss_of_weights(kind)))
    value, g = value_and_gradient(WEIGHTS)
    grown = value_and_gradient(3.0 * WEIGHTS)[0]
    along = abs((WEIGHTS * g).sum()) / length(WEIGHTS) / length(g)
    if kind in ONLY_THE_OUTPUT:
        assert float(grown) == pytest.approx(float(value), rel=1e-12)
        assert along > 1e-3
    else:
        assert abs(grown - value) > 0.01 * abs(value)
        assert along < 1e-11


def test_epsilon_breaks_scale_invariance_by_a_known_amount(x64):
    """``<w, g> = scale * sum(dy * xhat) * epsilon / (v + epsilon)``, summed over features."""
    x, dy, epsilon = INPUT.reshape(40, 3), TARGET.reshape(40, 4), 0.1

    def loss(w):
        return (training(x @ w, SCALE, BIAS, epsilon=epsilon)[0] * dy).sum()

    z = x @ WEIGHTS
    s2 = z.var(0) + epsilon
    xhat = (z - z.mean(0)) / np.sqrt(s2)
    wanted = (SCALE * (dy * xhat).sum(0) * epsilon / s2).sum()
    assert (WEIGHTS * jax.grad(loss)(WEIGHTS)).sum() == pytest.approx(wanted, rel=1e-10)


# ---- Padding, pooling, cancellation, folding


def test_zero_padding_without_a_mask_has_a_closed_form():
    """A fraction f of zeros: mean (1 - f) mu, variance (1 - f) v + f (1 - f) mu^2. With a mask the
    statistics are mu and v."""
    x = np.float32(random((16, 5, 4)) + 2)
    x[:, 3:] = 0
    there, f = np.float64(x[:, :3]).reshape(-1, 4), 2 / 5
    mu, v = there.mean(0), there.var(0)
    new = training(jnp.asarray(x), decay=0.0)[1]
    np.testing.assert_allclose(new.mean, (1 - f) * mu, rtol=1e-6)
    np.testing.assert_allclose(new.var, (1 - f) * v + f * (1 - f) * mu**2, rtol=1e-6)
    mask = np.arange(5) < np.full((16, 1), 3)
    new = training(jnp.asarray(x), decay=0.0, mask=mask)[1]
    np.testing.assert_allclose(new.mean, mu, rtol=1e-6)
    np.testing.assert_allclose(new.var, v, rtol=1e-6)


def test_unequal_sets_are_pooled_by_their_counts():
    """100,000 values of N(0, 1) beside 1,000 of N(3, 1): means of means are far off."""
    parts = [random((100_000, 4)), random((1_000, 4), seed=1) + 3]
    everything = np.concatenate(parts)
    stats = Stats(*(jnp.float32([getattr(p, name)(0) for p in parts]) for name in ("mean", "var")))
    counts = jnp.float32([[len(p)] for p in parts])
    pooled = pool(stats, counts)
    np.testing.assert_allclose(pooled.mean, everything.mean(0), atol=1e-6)
    np.testing.assert_allclose(pooled.var, everything.var(0), rtol=1e-5)
    naive = pool(stats)
    np.testing.assert_allclose(naive.mean, 1.5, atol=0.06)
    np.testing.assert_allclose(naive.var, 3.25, atol=0.2)
    padded, mask = np.zeros((200_000, 4), np.float32), np.zeros(200_000, bool)
    for start, part in zip((0, 100_000), parts, strict=True):
        padded[start : start + len(part)] = part
        mask[start : start + len(part)] = True
    new = training(jnp.asarray(padded), decay=0.0, mask=mask, scope=Scope(splits=2))[1]
    np.testing.assert_allclose(new.mean, everything.mean(0), atol=1e-6)
    np.testing.assert_allclose(new.var, everything.var(0), rtol=1e-5)


def test_one_pass_variance_cancels_and_two_passes_do_not():
    """At 3,000 deviations from zero E[x^2] - E[x]^2 has lost all digits; flax does that by
    default, silently."""
    x = jnp.float32(random((4096, 64)) + 3000)

    def deviations(y):
        return np.asarray(y, np.float64).std(0)

    one_pass = nn.BatchNorm(use_running_average=False)
    theirs = one_pass.apply(one_pass.init(jax.random.key(0), x), x, mutable=["batch_stats"])[0]
    running = Stats(jnp.zeros(64), jnp.ones(64))
    for wrong in (
        deviations(theirs),
        deviations(standardised(x, running=running, variance="fast")),
    ):
        assert np.abs(wrong - 1).max() > 0.2
    for algorithm in ("two_pass", "shifted"):
        y = standardised(x, running=running, variance=algorithm)
        np.testing.assert_allclose(deviations(y), 1, atol=1e-4)
    exact = one_pass.clone(use_fast_variance=False)
    theirs = exact.apply(exact.init(jax.random.key(0), x), x, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(deviations(theirs), 1, atol=1e-4)


@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_in_evaluation_it_folds_into_the_linear_map_before_it(x64, layer):
    """``W' = scale * W / s`` and ``b' = (b - mean) * scale / s + bias``."""
    shape = (3, 4) if layer == "dense" else (3, 3, 3, 4)
    kernel, b = random(shape), random(4, seed=1)
    x = random((8, 6, 6, 3), seed=2)
    running, epsilon = Stats(random(4, seed=3), np.array([0.5, 1.0, 2.0, 9.0])), 1e-3

    def linear(kernel, b):
        if layer == "dense":
            return x @ kernel + b
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes) + b

    y, _ = batch_norm(linear(kernel, b), SCALE, BIAS, running, use="running", epsilon=epsilon)
    gain = SCALE / np.sqrt(running.var + epsilon)
    folded = linear(kernel * gain, (b - running.mean) * gain + BIAS)
    np.testing.assert_allclose(y, folded, rtol=1e-12, atol=1e-12)
