"""Kinds of the table against flax.linen, on random inputs in the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_tools import SHAPES, close, compare, draw, draw_mask, draw_params, step, with_gradients
from flax import linen as nn

from bnresearch import reparam


def flax_step(module):
    """`with_gradients` of a linen norm."""

    def call(x, params, stats, mask):
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        y, new = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, new.get("batch_stats")

    return with_gradients(call)


def as_stats(running):
    return {"mean": running.mean, "var": running.var}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_batch_norm_with_the_preset_of_flax(shape, masked):
    """Three training steps with gradients, then evaluation."""
    params = draw_params(shape[-1])
    module = nn.BatchNorm(use_running_average=False, momentum=0.8)
    stats = module.init(jax.random.key(0), jnp.ones(shape))["batch_stats"]
    given, running, run = {"preset": "flax", "momentum": 0.8}, None, flax_step(module)
    for seed in range(3):
        x, weights = draw(shape, seed)
        mask = draw_mask(shape, seed)[..., None] if masked else None
        wanted = run(x, weights, params, stats, mask)
        ours = step("batch", given, x, weights, params, running, mask=mask)
        stats, running = wanted.running, ours.running
        compare(ours._replace(running=as_stats(running)), wanted)
    evaluation = step("batch", given, x, weights, params, running, use="running")
    module = module.clone(use_running_average=True)
    close(evaluation.y, flax_step(module)(x, weights, params, stats).y, 1e-6)


@pytest.mark.parametrize("options", [{}, dict(variance="two_pass"), dict(epsilon=0.3)], ids=str)
@pytest.mark.parametrize("left_out", [(), ("scale",), ("bias",), ("scale", "bias")], ids=str)
def test_options_of_batch_norm(options, left_out):
    shape = (4, 5, 6)
    x, weights = draw(shape)
    params = draw_params(6, names=[n for n in ("scale", "bias") if n not in left_out])
    module = nn.BatchNorm(
        use_running_average=False,
        use_fast_variance="variance" not in options,
        epsilon=options.get("epsilon", 1e-5),
        **{f"use_{name}": False for name in left_out},
    )
    stats = module.init(jax.random.key(0), x)["batch_stats"]
    wanted = flax_step(module)(x, weights, params, stats)
    given = {"preset": "flax", **options, **dict.fromkeys(left_out, False)}
    ours = step("batch", given, x, weights, params)
    compare(ours._replace(running=as_stats(ours.running)), wanted)


def test_the_preset_of_flax_has_its_faults_too():
    """Both lose the deviation at a mean of 3,000 deviations, and give the bias for one value."""
    x, weights = draw((256, 64), offset=3000.0, spread=1.0)
    given = {"preset": "flax", "scale": False, "bias": False}
    for variance, wrong in [("fast", True), ("two_pass", False)]:
        y = step("batch", given | {"variance": variance}, x, weights).y
        assert (np.abs(y.std(0) - 1).max() > 0.1) == wrong
    x, weights = draw((1, 4))
    assert (step("batch", given, x, weights).y == 0).all()


def positions(shape):
    return tuple(range(1, len(shape)))


# kind, options, what flax calls it for inputs of a shape
WITHIN = {
    "layer over features": ("layer", dict(over="features"), lambda s: nn.LayerNorm(epsilon=1e-5)),
    "layer over examples": (
        "layer",
        dict(epsilon=1e-6),
        lambda s: nn.LayerNorm(reduction_axes=positions(s)),
    ),
    "rms": ("rms", {}, lambda s: nn.RMSNorm()),
    "rms over examples": (
        "rms",
        dict(over="example", epsilon=1e-3),
        lambda s: nn.RMSNorm(reduction_axes=positions(s), epsilon=1e-3),
    ),
    "group": ("group", dict(groups=2), lambda s: nn.GroupNorm(2, epsilon=1e-5)),
    "one group": ("group", dict(groups=1, epsilon=1e-6), lambda s: nn.GroupNorm(1)),
    "instance": ("instance", {}, lambda s: nn.InstanceNorm(epsilon=1e-5)),
    "positional": (
        "positional",
        {},
        lambda s: nn.LayerNorm(epsilon=1e-5, use_scale=False, use_bias=False),
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("name", WITHIN)
def test_norms_within_an_example(name, shape):
    kind, options, make = WITHIN[name]
    if kind == "instance" and len(shape) == 2:
        pytest.skip("one position: refused here, the bias in flax")
    x, weights = draw(shape)
    module = make(shape)
    names = module.init(jax.random.key(0), x).get("params", {})
    params = draw_params(shape[-1], names=list(names))
    wanted = flax_step(module)(x, weights, params, None)
    compare(step(kind, options, x, weights, params), wanted)


@pytest.mark.parametrize("name", ["group", "one group", "instance", "layer over examples"])
def test_masks_within_an_example(name):
    kind, options, make = WITHIN[name]
    shape = (4, 5, 6)
    x, weights = draw(shape)
    mask = draw_mask(shape)[..., None]
    params = draw_params(6)
    whole = np.broadcast_to(mask, shape)  # flax.linen.GroupNorm takes no other
    wanted = flax_step(make(shape))(x, weights, params, None, whole)
    compare(step(kind, options, x, weights, params, mask=mask), wanted)


class Kernel(nn.Module):
    """A layer that gives back its kernel, for modules that change the kernels of layers."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.normal(), self.shape)


class Wrapped(nn.Module):
    wrapper: object
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, **given):
        return self.wrapper(Kernel(self.shape, name="layer"))(**given)


KERNELS = pytest.mark.parametrize("shape", [(5, 7), (3, 3, 5, 7)], ids=["dense", "convolution"])


def with_gradient(transform, kernel, weights):
    """Ours is compared by value and by gradient of sum(weights * value)."""

    def loss(kernel):
        value = transform(kernel)
        return (value * weights).sum(), value

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(kernel)


@KERNELS
def test_weight_norm(shape):
    """The gain g of the paper is the scale of the site behind the layer."""
    kernel, weights = draw(shape)
    scale = draw_params(7)["scale"]

    def theirs(kernel):
        params = {"layer": {"kernel": kernel}, "WeightNorm_0": {"layer/kernel/scale": scale}}
        return Wrapped(nn.WeightNorm, shape).apply({"params": params})

    def ours(kernel):
        return scale * reparam.weight_norm(kernel)

    close(with_gradient(ours, kernel, weights), with_gradient(theirs, kernel, weights), 2e-6)


@KERNELS
def test_spectral_norm(shape):
    """One singular value far above the others: the start of the power method is forgotten."""
    kernel, weights = draw(shape, offset=4.0)
    module = Wrapped(lambda layer: nn.SpectralNorm(layer, n_steps=10), shape)
    variables = module.init(jax.random.key(0), update_stats=False)

    def theirs(kernel):
        given = {**variables, "params": {"layer": {"kernel": kernel}}}
        return module.apply(given, update_stats=False)

    def ours(kernel):
        return reparam.spectral_norm(kernel, iterations=10)

    close(with_gradient(ours, kernel, weights), with_gradient(theirs, kernel, weights), 1e-5)
