"""Schedules, durations, parameter groups and optimizers, against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import optim
from bnresearch.config import default_config
from bnresearch.errors import UserError


def schedule_of(name, total=100, warmup="0st", **options):
    config = default_config().optim.schedule
    config.name, config.warmup = name, warmup
    for key, value in options.items():
        config[name][key] = value
    shape = optim.schedule(config, total, 10.0)
    return lambda step: float(shape(step))


def test_durations():
    assert optim.steps("d", "3ep", 21.5) == 64  # 64.5 rounds to even
    assert optim.steps("d", "0.5ep", 21.0) == 10
    assert optim.steps("d", "0.001ep", 21.0) == 1  # shorter than a step is a step
    assert optim.steps("d", "0ep", 21.0) == 0
    assert optim.steps("d", "500st", 21.0) == 500
    with pytest.raises(UserError, match=r"less than 2\*\*31"):
        optim.steps("d", "99999999999st", 21.0)
    for wrong in ("5", "٣st", "5 ep", "ep", "-1ep", "1e3st", "nan"):
        with pytest.raises(UserError, match="'10ep'"):
            optim.steps("d", wrong, 1.0)


def test_cosine_falls_from_one_to_final():
    f = schedule_of("cosine", final=0.1)
    assert f(0) == 1.0
    assert f(50) == pytest.approx(0.1 + 0.9 / 2)
    assert f(25) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert f(100) == pytest.approx(0.1)


def test_warmup_is_linear_reaches_the_peak_and_hands_over():
    f = schedule_of("cosine", warmup="1ep")  # ten steps
    np.testing.assert_allclose([f(i) for i in range(10)], np.arange(1, 11) / 10, rtol=1e-6)
    assert f(10) == 1.0
    assert f(55) == pytest.approx(0.5, abs=1e-6)
    g = schedule_of("constant", warmup="1st")
    assert [g(0), g(1), g(99)] == [1.0, 1.0, 1.0]


def test_step_drops_at_fractions_of_the_training():
    f = schedule_of("step", boundaries=(0.5, 0.75), factor=0.1)
    np.testing.assert_allclose([f(49), f(51), f(74), f(76)], [1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_step_boundaries_count_the_warm_up():
    f = schedule_of("step", warmup="1ep", boundaries=(0.5,), factor=0.1)
    np.testing.assert_allclose([f(9), f(10), f(49), f(50)], [1, 1, 1, 0.1], rtol=1e-6)
    with pytest.raises(UserError, match="lies in its warm-up"):
        schedule_of("step", warmup="1ep", boundaries=(0.05, 0.5))


def test_boundaries_that_fall_on_one_step_both_count():
    f = schedule_of("step", total=4, boundaries=(0.5, 0.55), factor=0.1)
    np.testing.assert_allclose([f(1), f(3)], [1, 0.01], rtol=1e-6)


def test_one_cycle_has_no_warm_up_and_needs_a_step_to_rise():
    with pytest.raises(UserError, match="rises by itself"):
        schedule_of("one_cycle", warmup="1st")
    with pytest.raises(UserError, match="less than one step"):
        schedule_of("one_cycle", total=3, rise=0.3)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_nesterov_without_momentum_is_refused(name):
    config = default_config().optim
    config.name = name
    config[name].update(nesterov=True, momentum=0.0)
    with pytest.raises(UserError, match="nesterov needs a momentum"):
        optim.validate(config)


def test_one_cycle_rises_and_falls():
    f = schedule_of("one_cycle", rise=0.3, start=0.04, final=4e-6)
    assert f(0) == pytest.approx(0.04)
    assert f(30) == pytest.approx(1.0)
    assert f(15) == pytest.approx((1 + 0.04) / 2, rel=1e-5)
    assert f(100) == pytest.approx(4e-6, rel=1e-2)


def test_warmup_longer_than_the_training_is_refused():
    with pytest.raises(UserError, match="not shorter"):
        schedule_of("cosine", warmup="100st")


PARAMS = {
    "conv": {"kernel": jnp.array([[3.0, 4.0]])},
    "norm": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5, 0.5])},
}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def one_step(name, gradient, rate=0.1, factor=1.0, steps=1, **settings):
    config = default_config().optim
    config.name, config.learning_rate = name, rate
    options = settings.pop("options", {})
    config.update(settings)
    config[name].update(options)
    numbers = {
        "optim.learning_rate": jnp.float32(rate),
        "optim.weight_decay": jnp.float32(config.weight_decay),
        "optim.clip_norm": jnp.float32(config.clip_norm),
        "optim.sgd.momentum": jnp.float32(config.sgd.momentum),
        "optim.lars.momentum": jnp.float32(config.lars.momentum),
    }
    optimizer = optim.make_optimizer(config, numbers, factor)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_weight_decay_spares_norms_and_biases_unless_asked(name):
    spared = one_step(name, ZERO, weight_decay=0.01)
    np.testing.assert_array_equal(spared["norm"]["scale"], [1, 2])
    np.testing.assert_array_equal(spared["norm"]["bias"], [0.5, 0.5])
    assert float(spared["conv"]["kernel"][0, 0]) < 3
    included = one_step(name, ZERO, weight_decay=0.01, decay_norms_and_biases=True)
    assert float(included["norm"]["scale"][1]) < 2
    untouched = one_step(name, ZERO)
    np.testing.assert_array_equal(untouched["conv"]["kernel"], [[3, 4]])


def test_sgd_decays_before_momentum():
    """v <- mu v + (g + wd w), w <- w - rate v: two steps by hand from w = 3, g = 1."""
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    rate, mu, wd = 0.1, 0.9, 0.5
    w, v = 3.0, 0.0
    for _ in range(2):
        v = mu * v + 1 + wd * w
        w -= rate * v
    result = one_step("sgd", gradient, steps=2, weight_decay=wd)
    assert float(result["conv"]["kernel"][0, 0]) == pytest.approx(w, rel=1e-6)


def test_nesterov_and_no_momentum():
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    plain = one_step("sgd", gradient, steps=2, options={"momentum": 0.0})
    assert float(plain["conv"]["kernel"][0, 0]) == pytest.approx(3 - 0.2, rel=1e-6)
    nesterov = one_step("sgd", gradient, steps=2, options={"nesterov": True})
    # v1 = 1, step g + mu v1 = 1.9; v2 = 1.9, step 1 + 0.9 * 1.9 = 2.71
    assert float(nesterov["conv"]["kernel"][0, 0]) == pytest.approx(3 - 0.1 * 4.61, rel=1e-6)


def test_adamw_decay_is_decoupled():
    """With a zero gradient the weight shrinks by exactly rate * wd, whatever Adam's scaling."""
    result = one_step("adamw", ZERO, weight_decay=0.5)
    np.testing.assert_allclose(result["conv"]["kernel"], [[3 * 0.95, 4 * 0.95]], rtol=1e-6)


def test_lars_scales_by_the_trust_ratio_but_not_what_is_not_decayed():
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    options = {"momentum": 0.0, "trust_coefficient": 0.01}
    result = one_step("lars", gradient, options=options)
    ratio = 0.01 * 5 / math.sqrt(2)  # |w| = 5, |g| = sqrt 2
    np.testing.assert_allclose(result["conv"]["kernel"][0, 0], 3 - 0.1 * ratio, rtol=1e-6)
    np.testing.assert_allclose(result["norm"]["bias"], 0.4, rtol=1e-6)


def test_lamb_step_has_the_norm_of_the_weights():
    """LAMB moves a layer by rate * |w| in the direction of Adam's update: here along (1, 1)."""
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    result = one_step("lamb", gradient)
    step = np.asarray(PARAMS["conv"]["kernel"] - result["conv"]["kernel"])
    np.testing.assert_allclose(step, 0.1 * 5 / math.sqrt(2), rtol=1e-4)


def test_clipping_is_of_the_whole_gradient():
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)
    result = one_step("sgd", gradient, rate=1.0, clip_norm=1.0, options={"momentum": 0.0})
    norm = 2 * math.sqrt(6)
    np.testing.assert_allclose(result["conv"]["kernel"], [[3 - 2 / norm, 4 - 2 / norm]], rtol=1e-6)
    small = jax.tree.map(lambda p: jnp.full_like(p, 0.1), PARAMS)
    result = one_step("sgd", small, rate=1.0, clip_norm=1.0, options={"momentum": 0.0})
    np.testing.assert_allclose(result["conv"]["kernel"], [[2.9, 3.9]], rtol=1e-6)


def test_the_factor_multiplies_the_rate():
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    result = one_step("sgd", gradient, rate=0.2, factor=0.25, options={"momentum": 0.0})
    assert float(result["conv"]["kernel"][0, 0]) == pytest.approx(2.95)


@pytest.mark.parametrize(
    ("key", "value"), [("boundaries", (0.75, 0.5)), ("boundaries", (0.0,)), ("boundaries", (1.5,))]
)
def test_impossible_step_schedules(key, value):
    config = default_config().optim
    config.schedule.step[key] = value
    with pytest.raises(UserError, match="boundaries"):
        optim.validate(config)


def test_impossible_one_cycle():
    config = default_config().optim
    config.schedule.one_cycle.rise = 1.0
    with pytest.raises(UserError, match="one_cycle"):
        optim.validate(config)
