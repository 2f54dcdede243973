"""Kinds of the table against keras 3 on the JAX backend, on random inputs in the same run."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from against_tools import (
    SHAPES,
    close,
    compare,
    draw,
    draw_mask,
    draw_params,
    step,
    with_gradients,
)

from bnresearch.conventions import PRESETS
from bnresearch.kinds.variants import Renormed

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KERAS_BACKEND", "jax")  # read once, when keras is imported
    keras = pytest.importorskip("keras", reason="keras is not installed: pip install '.[compare]'")
if keras.backend.backend() != "jax":
    pytest.skip("keras was imported with another backend", allow_module_level=True)

OURS = {"gamma": "scale", "beta": "bias", "scale": "scale"}  # of what keras calls its parameters


class Layer:
    """A layer of keras as a pure function, with parameters and state called as ours are."""

    def __init__(self, layer, shape):
        layer.build(shape)
        self.layer, self.params = layer, [OURS[v.name] for v in layer.trainable_variables]
        self.states = [v.name for v in layer.non_trainable_variables]
        self.start = {name: v.value for name, v in self._named(layer.non_trainable_variables)}
        self.step = with_gradients(self.call)
        self.evaluation = with_gradients(functools.partial(self.call, training=False))

    def _named(self, values):
        return zip(self.states, values, strict=True)

    def call(self, x, params, state, mask, training=True):
        given = {"training": training} if self.states else {}
        y, new = self.layer.stateless_call(
            [params[name] for name in self.params],
            [state[name] for name in self.states],
            x,
            **given if mask is None else given | {"mask": mask},
        )
        return y, dict(self._named(new))


def as_keras(running):
    return {"moving_mean": running.mean, "moving_variance": running.var}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_batch_norm_with_the_preset_of_keras(shape, masked):
    """Three training steps with gradients, then evaluation."""
    params = draw_params(shape[-1])
    layer = Layer(keras.layers.BatchNormalization(momentum=0.8), shape)
    given, state, running = {"preset": "keras", "momentum": 0.8}, layer.start, None
    for seed in range(3):
        x, weights = draw(shape, seed)
        mask = draw_mask(shape, seed) if masked else None
        wanted = layer.step(x, weights, params, state, mask)
        ours = step("batch", given, x, weights, params, running, mask=mask)
        state, running = wanted.running, ours.running
        compare(ours._replace(running=as_keras(running)), wanted)
    ours = step("batch", given, x, weights, params, running, use="running")
    close(ours.y, layer.evaluation(x, weights, params, state).y, 1e-6)


@pytest.mark.parametrize("left_out", [("scale",), ("bias",), ("scale", "bias")], ids=str)
def test_options_of_batch_norm(left_out):
    shape = (4, 5, 6)
    x, weights = draw(shape)
    params = draw_params(6, names=[n for n in ("scale", "bias") if n not in left_out])
    theirs = keras.layers.BatchNormalization(
        scale="scale" in params, center="bias" in params, epsilon=0.2
    )
    layer = Layer(theirs, shape)
    given = {"preset": "keras", "epsilon": 0.2, **dict.fromkeys(left_out, False)}
    ours = step("batch", given, x, weights, params)
    compare(
        ours._replace(running=as_keras(ours.running)), layer.step(x, weights, params, layer.start)
    )


def test_the_preset_has_the_defaults_of_keras():
    layer = keras.layers.BatchNormalization()
    options = PRESETS["keras"].options
    assert (layer.momentum, layer.epsilon) == (options["decay"], options["epsilon"])


def plain(shape):
    return Layer(keras.layers.BatchNormalization(scale=False, center=False), shape)


def test_the_variance_of_keras_is_exact_at_an_offset():
    x, weights = draw((256, 6), offset=3000.0, spread=1.0)
    layer = plain(x.shape)
    new = layer.step(x, weights, {}, layer.start).running
    variance = (new["moving_variance"] - 0.99) / 0.01
    np.testing.assert_allclose(variance, x.astype(np.float64).var(0), rtol=1e-4)


def test_one_value_gives_the_bias_in_keras():
    x, weights = draw((1, 6))
    layer = plain(x.shape)
    given = {"preset": "keras", "scale": False, "bias": False}
    ours = step("batch", given, x, weights)
    close(ours.y, layer.step(x, weights, {}, layer.start).y, 1e-6)
    assert (ours.y == 0).all()


@pytest.mark.parametrize("shape", [(8, 6), (3, 4, 5, 6)], ids=["2d", "4d"])
@pytest.mark.parametrize("limits", [(1.05, 0.1), (3.0, 5.0), (1e30, 1e30)], ids=str)
def test_batch_renorm(shape, limits):
    """Two differences in the start and the defaults, else equal: keras starts the running deviation
    at 1, and clips nothing by default."""
    r_max, d_max = limits
    epsilon, params = 1e-3, draw_params(shape[-1])
    theirs = keras.layers.BatchNormalization(
        momentum=0.8,
        renorm=True,
        renorm_momentum=0.8,
        renorm_clipping=dict(rmax=r_max, rmin=1 / r_max, dmax=d_max),
    )
    layer = Layer(theirs, shape)
    given = dict(
        r_max=r_max, d_max=d_max, warm_up=0, r_ramp=0, d_ramp=0, decay=0.8, epsilon=epsilon
    )
    state, ones = layer.start, jnp.ones(shape[-1])
    running = Renormed(0 * ones, ones - epsilon, jnp.zeros(()))
    for seed in range(4):
        x, weights = draw(shape, seed)
        wanted = layer.step(x, weights, params, state)
        ours = step("renorm", given, x, weights, params, running)
        state, running = wanted.running, ours.running
        same = {name: state[name] for name in as_keras(running)}
        compare(ours._replace(running=as_keras(running)), wanted._replace(running=same))
        close(np.sqrt(running.var + epsilon), state["renorm_stddev"], 1e-6)
    ours = step("renorm", given, x, weights, params, running, use="running")
    close(ours.y, layer.evaluation(x, weights, params, state).y, 1e-6)


# kind, options, the layer of keras
WITHIN = {
    "layer over features": (
        "layer",
        dict(over="features", epsilon=1e-3),
        lambda: keras.layers.LayerNormalization(),
    ),
    "layer without bias": (
        "layer",
        dict(over="features", bias=False),
        lambda: keras.layers.LayerNormalization(epsilon=1e-5, center=False),
    ),
    "rms": ("rms", {}, lambda: keras.layers.RMSNormalization()),
    "group": (
        "group",
        dict(groups=2, epsilon=1e-3),
        lambda: keras.layers.GroupNormalization(2),
    ),
    "one group": (
        "group",
        dict(groups=1),
        lambda: keras.layers.GroupNormalization(1, epsilon=1e-5),
    ),
    "instance": (
        "instance",
        {},
        lambda: keras.layers.GroupNormalization(-1, epsilon=1e-5),
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("name", WITHIN)
def test_norms_within_an_example(name, shape):
    kind, options, make = WITHIN[name]
    if kind == "instance" and len(shape) == 2:
        pytest.skip("one position: refused here, the bias in keras")
    x, weights = draw(shape)
    layer = Layer(make(), shape)
    params = draw_params(6, names=layer.params)
    wanted = layer.step(x, weights, params, layer.start)._replace(running=None)
    compare(step(kind, options, x, weights, params), wanted)
