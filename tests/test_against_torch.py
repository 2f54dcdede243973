"""Kinds of the table against torch on the CPU, on random inputs in the same run."""

import jax.numpy as jnp
import numpy as np
import pytest
from against_tools import SHAPES, Step, close, compare, draw, draw_params, step, with_gradients

from bnresearch import reparam
from bnresearch.conventions import PRESETS
from bnresearch.errors import UserError

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[compare]'")
nn, parametrizations = torch.nn, torch.nn.utils.parametrizations

NAMES = {"scale": "weight", "bias": "bias"}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def set_params(module, params):
    with torch.no_grad():
        for name, value in params.items():
            getattr(module, NAMES[name]).copy_(torch.tensor(value))


def torch_step(module, x, weights, features_first=True):
    """Output, running statistics and gradients of one call, features last as ours."""
    there = (lambda a: np.moveaxis(a, -1, 1)) if features_first else (lambda a: a)
    back = (lambda a: np.moveaxis(a, 1, -1)) if features_first else (lambda a: a)
    module.zero_grad()
    given = torch.tensor(np.ascontiguousarray(there(x)), requires_grad=True)
    y = module(given)
    (y * torch.tensor(np.ascontiguousarray(there(weights)))).sum().backward()
    grads = {
        name: getattr(module, theirs).grad.numpy().copy()
        for name, theirs in NAMES.items()
        if getattr(module, theirs, None) is not None
    }
    return Step(back(y.detach().numpy()), statistics(module), back(given.grad.numpy()), grads)


def statistics(module):
    if getattr(module, "running_mean", None) is None:
        return None
    return {
        "mean": module.running_mean.numpy().copy(),
        "var": module.running_var.numpy().copy(),
    }


def as_torch(running):
    return None if running is None else {"mean": running.mean, "var": running.var}


BATCH_OPTIONS = {
    "defaults": ({}, {}),
    "momentum 0.3": (dict(momentum=0.3), dict(momentum=0.3)),
    "momentum 0": (dict(momentum=0.0), dict(momentum=0.0)),
    "momentum 1": (dict(momentum=1.0), dict(momentum=1.0)),
    "momentum None": (dict(momentum=None), dict(average="cumulative")),
    "eps": (dict(eps=0.2), dict(epsilon=0.2)),
    "not affine": (dict(affine=False), dict(scale=False, bias=False)),
    "no bias": (dict(bias=False), dict(bias=False)),
    "not tracked": (dict(track_running_stats=False), {}),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("name", BATCH_OPTIONS)
def test_batch_norm_with_the_preset_of_torch(name, shape):
    """Three training steps with gradients, then evaluation."""
    theirs, given = BATCH_OPTIONS[name]
    given = {"preset": "torch", **given}
    module = BATCH_NORMS[len(shape)](shape[-1], **theirs)
    params = draw_params(6, names=[n for n in NAMES if getattr(module, NAMES[n]) is not None])
    set_params(module, params)
    running, tracked = None, module.running_mean is not None
    for seed in range(3):
        x, weights = draw(shape, seed)
        wanted = torch_step(module, x, weights)
        ours = step("batch", given, x, weights, params, running)
        running = ours.running
        compare(ours._replace(running=as_torch(running) if tracked else None), wanted)
    module.eval()
    wanted = torch_step(module, x, weights)
    use = "running" if tracked else "batch"  # without statistics torch takes those of the batch
    ours = step("batch", given, x, weights, params, running, use=use)
    compare(ours._replace(running=as_torch(running) if tracked else None), wanted)


def test_the_preset_has_the_defaults_of_torch():
    module, options = nn.BatchNorm1d(4), PRESETS["torch"].options
    assert module.eps == options["epsilon"]
    assert PRESETS["torch"].decay(module.momentum) == options["decay"]


def test_the_variance_of_torch_is_exact_at_an_offset():
    x, weights = draw((256, 6), offset=3000.0, spread=1.0)
    module = nn.BatchNorm1d(6, momentum=1.0)
    variance = torch_step(module, x, weights).running["var"]
    np.testing.assert_allclose(variance, x.astype(np.float64).var(0, ddof=1), rtol=1e-5)
    ours = step("batch", {"preset": "torch", "momentum": 1.0}, x, weights, draw_params(6))
    np.testing.assert_allclose(ours.running.var, variance, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (1, 1, 1, 6)], ids=str)
def test_both_refuse_one_value_per_feature(shape):
    x, weights = draw(shape)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch_step(BATCH_NORMS[len(shape)](6), x, weights)
    with pytest.raises(UserError, match="one single value"):
        step("batch", {"preset": "torch"}, x, weights, draw_params(6))


# kind, options, the module of torch for inputs of a shape, and whether its features come first
WITHIN = {
    "group": ("group", dict(groups=2), lambda s: nn.GroupNorm(2, 6), True),
    "one group": (
        "group",
        dict(groups=1, epsilon=0.1),
        lambda s: nn.GroupNorm(1, 6, eps=0.1),
        True,
    ),
    "group, not affine": (
        "group",
        dict(groups=2, scale=False, bias=False),
        lambda s: nn.GroupNorm(2, 6, affine=False),
        True,
    ),
    "instance": (
        "instance",
        dict(scale=False, bias=False),
        lambda s: INSTANCE_NORMS[len(s)](6),
        True,
    ),
    "instance, affine": (
        "instance",
        dict(epsilon=0.1),
        lambda s: INSTANCE_NORMS[len(s)](6, eps=0.1, affine=True),
        True,
    ),
    "layer over features": ("layer", dict(over="features"), lambda s: nn.LayerNorm(6), False),
    "layer, no bias": (
        "layer",
        dict(over="features", epsilon=0.1, bias=False),
        lambda s: nn.LayerNorm(6, eps=0.1, bias=False),
        False,
    ),
    "layer over examples": (
        "layer",
        dict(scale=False, bias=False),
        lambda s: nn.LayerNorm(s[1:], elementwise_affine=False),
        False,
    ),
    "rms": ("rms", dict(epsilon=1e-5), lambda s: nn.RMSNorm(6, eps=1e-5), False),
    "rms, torch's epsilon": (
        "rms",
        dict(epsilon=float(np.finfo(np.float32).eps), scale=False),
        lambda s: nn.RMSNorm(6, elementwise_affine=False),
        False,
    ),
    "rms over examples": (
        "rms",
        dict(over="example", epsilon=1e-5, scale=False),
        lambda s: nn.RMSNorm(s[1:], eps=1e-5, elementwise_affine=False),
        False,
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("name", WITHIN)
def test_norms_within_an_example(name, shape):
    kind, options, make, features_first = WITHIN[name]
    if kind == "instance" and len(shape) == 2:
        pytest.skip("one position: refused here; torch takes it for [features, positions]")
    x, weights = draw(shape)
    module = make(shape)
    params = draw_params(6, names=[n for n in NAMES if getattr(module, NAMES[n], None) is not None])
    set_params(module, params)
    wanted = torch_step(module, x, weights, features_first)
    compare(step(kind, options, x, weights, params), wanted)


def layer_with(kernel):
    """A linear layer or a convolution of torch with a kernel of ours, ``[..., in, out]``."""
    *window, inside, out = kernel.shape
    layer = nn.Conv2d(inside, out, tuple(window)) if window else nn.Linear(inside, out)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel.transpose(weight_axes(kernel))))
    return layer


def weight_axes(kernel):
    """Where the axes of a kernel stand in torch: out, in, and then the window."""
    return (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))


def value_and_gradient(layer, kernel, weights):
    """The effective kernel and the gradient of sum(weights * it) by the learned one."""
    axes = weight_axes(kernel)
    value = layer.weight
    (value * torch.tensor(weights.transpose(axes).copy())).sum().backward()
    learned = list(layer.parametrizations.weight.parameters())[-1]
    return [a.transpose(np.argsort(axes)) for a in (value.detach().numpy(), learned.grad.numpy())]


@pytest.mark.parametrize("shape", [(5, 7), (3, 3, 5, 7)], ids=["linear", "convolution"])
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_norms_of_the_weights(name, shape):
    """One singular value far above the others: the start of the power method is forgotten."""
    kernel, weights = draw(shape, offset=4.0)
    scale = draw_params(7)["scale"]
    layer = layer_with(kernel)
    if name == "weight_norm":
        layer = parametrizations.weight_norm(layer)
        with torch.no_grad():
            gain = layer.parametrizations.weight.original0
            gain.copy_(torch.tensor(scale).reshape(gain.shape))
    else:
        layer = parametrizations.spectral_norm(layer)
        scale = 1
    norm = getattr(reparam, name)
    run = with_gradients(lambda x, params, state, mask: (scale * norm(x), None))
    ours = run(jnp.asarray(kernel), weights, {}, None)
    close([ours.y, ours.dx], value_and_gradient(layer, kernel, weights), 3e-6)
