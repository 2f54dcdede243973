"""Reparametrised kernels and the gains of activations, against numpy and quadrature."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads
from scipy import integrate, special

from bnresearch import reparam
from bnresearch.errors import UserError
from bnresearch.models import ACTIVATIONS
from bnresearch.reparam import GAINS, REPARAMS

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
KERNELS = {
    "dense": np.random.default_rng(1).normal(0.3, 2.0, size=(12, 5)).astype(np.float32),
    "conv": np.random.default_rng(2).normal(-0.1, 0.05, size=(3, 3, 4, 6)).astype(np.float32),
}


def by_numpy(name, kernel):
    """The formulae in float64, over the fan-in of each output."""
    v = kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
    low = v - v.mean(0)
    expected = {
        "weight_norm": lambda: v / np.linalg.norm(v, axis=0),
        "centred": lambda: low,
        "standardise": lambda: low / np.sqrt(v.var(0) + 1e-10),
        "scaled_standardise": lambda: low / np.sqrt(np.maximum(len(v) * v.var(0), 1e-4)),
        "spectral_norm": lambda: v / np.linalg.svd(v, compute_uv=False)[0],
    }[name]()
    return expected.reshape(kernel.shape)


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("name", REPARAMS)
def test_reparametrisations_compute_what_numpy_does(name, shape):
    changed = {"iterations": 200} if name == "spectral_norm" else {}
    function, kernel = REPARAMS[name], KERNELS[shape]
    expected = by_numpy(name, kernel)
    found = jax.jit(partial(function, **changed))(kernel)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    assert found.dtype == jnp.float32
    half = function(kernel.astype(jnp.bfloat16), **changed)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", REPARAMS)
def test_reparametrisations_are_told_apart_by_length_and_offset(name):
    """Which of them see the length of the kernel, and which its mean."""
    function, kernel = REPARAMS[name], KERNELS["conv"]
    longer = np.allclose(function(3 * kernel), function(kernel), atol=1e-5)
    assert longer == (name != "centred")
    shifted = np.allclose(function(kernel + 0.5), function(kernel), atol=1e-5)
    assert shifted == (name in ("centred", "standardise", "scaled_standardise"))


def test_scaled_kernels_have_mean_zero_and_variance_one_over_fan_in():
    w = np.asarray(reparam.scaled_standardise(KERNELS["conv"]), np.float64)
    np.testing.assert_allclose(w.mean((0, 1, 2)), 0, atol=1e-7)
    np.testing.assert_allclose(w.var((0, 1, 2)), 1 / 36, rtol=1e-6)


@pytest.mark.parametrize("name", REPARAMS)
def test_gradients_of_reparametrisations(name):
    with jax.enable_x64():
        kernel = 20 * jnp.asarray(KERNELS["conv"], jnp.float64)
        changed = {"iterations": 400} if name == "spectral_norm" else {}
        function = partial(REPARAMS[name], **changed)
        check_grads(function, (kernel,), order=1, modes=["rev"], rtol=1e-6)


def test_spectral_norm_is_a_lower_bound():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 16)).astype(np.float32)
    largest = np.linalg.svd(kernel.reshape(-1, 16), compute_uv=False)[0]
    estimates = [kernel[0, 0, 0, 0] / reparam.spectral_norm(kernel, iterations=n)[0, 0, 0, 0]
                 for n in (1, 3, 10)]  # fmt: skip
    assert estimates == sorted(estimates)
    assert 0.9 * largest < estimates[-1] <= 1.0001 * largest


def test_kernels_without_a_fan_in_are_refused():
    with pytest.raises(UserError, match=r"shape \(3,\) has no fan-in"):
        reparam.weight_norm(jnp.ones(3))
    with pytest.raises(UserError, match="iterations is 0"):
        reparam.spectral_norm(jnp.ones((3, 3)), iterations=0)


def test_layers_use_a_reparametrisation_through_their_hooks():
    used = reparam.hooks(reparam.scaled_standardise)
    conv = {"features": 5, "kernel_size": (3, 3), "strides": 2, "use_bias": True}
    for plain, hooked, x in (
        (nn.Conv(**conv), nn.Conv(**conv, conv_general_dilated=used.conv), IMAGES),
        (nn.Dense(5), nn.Dense(5, dot_general=used.dense), IMAGES[:, 0, 0]),
    ):
        params = hooked.init(jax.random.key(0), x)["params"]
        jax.tree.map(
            np.testing.assert_array_equal, params, plain.init(jax.random.key(0), x)["params"]
        )
        changed = params | {"kernel": reparam.scaled_standardise(params["kernel"])}
        expected = plain.apply({"params": changed}, x)
        np.testing.assert_array_equal(hooked.apply({"params": params}, x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gains_are_one_over_the_standard_deviation(name):
    functions = {
        "relu": lambda x: max(x, 0.0),
        "tanh": math.tanh,
        "sigmoid": special.expit,
        "gelu": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "silu": lambda x: x * special.expit(x),
        "elu": lambda x: x if x > 0 else math.expm1(x),
        "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
        "identity": lambda x: x,
    }
    act = functions[name]

    def expectation(f):
        def weighted(x):
            return f(x) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

        halves = [(-12, 0), (0, 12)]  # most have a kink at 0
        return sum(integrate.quad(weighted, *half, epsabs=1e-13)[0] for half in halves)

    mean = expectation(act)
    var = expectation(lambda x: (act(x) - mean) ** 2)
    assert GAINS[name] == pytest.approx(var**-0.5, rel=1e-10)
