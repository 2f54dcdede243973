"""Convolutions by oneDNN: values and derivatives against float64, and where XLA takes over."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnresearch import native
from bnresearch.models.blocks import Parts
from bnresearch.native import build

LAYOUT = ("NHWC", "HWIO", "NHWC")
MARK = "bnresearch_convolution"  # in the text of a program that calls oneDNN


@pytest.fixture
def onednn():
    """Skips where the extra cpu or a compiler is missing."""
    loaded = build.load()
    if isinstance(loaded, build.Missing):
        pytest.skip(str(loaded))
    return native.conv_general_dilated("native")


class Case(NamedTuple):
    """Sizes of one convolution; pads are (top, bottom), (left, right)."""

    batch: int
    size: tuple[int, int]
    channels: int
    features: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))


NONE, FIVE = ((0, 0), (0, 0)), ((2, 2), (2, 2))
CASES = [
    Case(128, (8, 8), 16, 16),
    Case(1, (8, 8), 1, 1),
    Case(1, (7, 5), 3, 16),
    Case(5, (9, 7), 17, 3),
    Case(5, (9, 7), 3, 17, (3, 3), (2, 2)),
    Case(3, (8, 8), 16, 64, (3, 3), (2, 2)),
    Case(7, (8, 8), 64, 64, (1, 1), (1, 1), NONE),
    Case(2, (8, 8), 64, 17, (1, 1), (2, 2), NONE),
    Case(33, (15, 15), 16, 16, (3, 3), (2, 2)),
    Case(2, (11, 11), 3, 16, (5, 5), (1, 1), FIVE),
    Case(2, (12, 12), 16, 1, (5, 5), (3, 3), FIVE),
    Case(2, (17, 16), 3, 64, (7, 7), (2, 2), ((3, 3), (3, 3))),
    Case(4, (8, 8), 16, 16, (3, 3), (2, 2), ((0, 1), (0, 1))),
    Case(4, (9, 8), 16, 3, (1, 3), (2, 1), ((0, 0), (1, 1))),
    Case(3, (6, 6), 1, 16, (2, 2), (1, 1), ((1, 0), (1, 0))),
    Case(3, (8, 8), 17, 17, (3, 3), (1, 1), NONE),
    Case(3, (3, 3), 17, 16, (3, 3), (1, 1), NONE),
]


def arrays(case, seed=0):
    """x, kernel and a cotangent of y, in float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(case.batch, *case.size, case.channels))
    kernel = rng.normal(size=(*case.kernel, case.channels, case.features))
    pairs = zip(case.size, case.kernel, case.strides, case.pads, strict=True)
    out = [(n + sum(pad) - k) // stride + 1 for n, k, stride, pad in pairs]
    g = rng.normal(size=(case.batch, *out, case.features))
    return [jnp.asarray(a, jnp.float32) for a in (x, kernel, g)]


def expected(case, x, kernel, g):
    """y, dx and dkernel in float64, tap by tap."""
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    (top, bottom), (left, right) = case.pads
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    y, dx, dkernel = np.zeros_like(g), np.zeros_like(padded), np.zeros_like(kernel)
    (_, height, width, _), (down, across) = g.shape, case.strides
    for i, j in np.ndindex(*case.kernel):
        rows = slice(i, i + down * (height - 1) + 1, down)
        seen = (slice(None), rows, slice(j, j + across * (width - 1) + 1, across))
        y += padded[seen] @ kernel[i, j]
        dx[seen] += g @ kernel[i, j].T
        dkernel[i, j] = np.einsum("bhwc,bhwf->cf", padded[seen], g)
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def bind(convolve, case):
    """``convolve`` as a function of x and kernel only."""
    return lambda x, kernel: convolve(x, kernel, case.strides, case.pads, dimension_numbers=LAYOUT)


def close(ours, exact):
    """Float32, whose error grows with the number of terms: relative to the largest value."""
    np.testing.assert_allclose(ours, exact, rtol=0, atol=3e-6 * max(1.0, np.abs(exact).max()))


def program(function, *args):
    """The text of what is compiled."""
    return jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_float64(onednn, case):
    x, kernel, g = arrays(case)

    @jax.jit
    def everything(x, kernel, g):
        y, back = jax.vjp(bind(onednn, case), x, kernel)
        return y, *back(g)

    assert everything.lower(x, kernel, g).as_text().count(f"@{MARK}") == 3
    for ours, exact in zip(everything(x, kernel, g), expected(case, x, kernel, g), strict=True):
        assert ours.dtype == jnp.float32
        close(ours, exact)


def test_it_runs_outside_jit_and_repeats_to_the_bit(onednn):
    case = CASES[0]
    x, kernel, g = arrays(case)
    first = bind(onednn, case)(x, kernel)
    close(first, expected(case, x, kernel, g)[0])
    dkernel = jax.jit(jax.grad(lambda k: jnp.vdot(bind(onednn, case)(x, k), g)))
    once = dkernel(kernel)
    for _ in range(5):
        np.testing.assert_array_equal(bind(onednn, case)(x, kernel), first)
        np.testing.assert_array_equal(dkernel(kernel), once)


def test_named_padding(onednn):
    x, kernel, _ = arrays(Case(2, (8, 8), 3, 4))
    for padding in ("SAME", "VALID"):
        ours = onednn(x, kernel, (2, 2), padding, dimension_numbers=LAYOUT)
        xla = jax.lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=LAYOUT)
        np.testing.assert_allclose(ours, xla, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[3], CASES[8]], ids=str)
def test_derivatives_of_every_order_and_both_modes(onednn, case):
    x, kernel, _ = arrays(case)
    dx, dkernel, _ = arrays(case, seed=1)
    xla = bind(jax.lax.conv_general_dilated, case)
    ours = bind(onednn, case)

    def loss(convolve, x, kernel):
        return jnp.mean(jnp.tanh(convolve(x, kernel)) ** 2)

    def results(convolve):
        along = jax.jvp(convolve, (x, kernel), (dx, dkernel))
        gradient = jax.grad(partial(loss, convolve), argnums=(0, 1))
        forward_over_reverse = jax.jvp(gradient, (x, kernel), (dx, dkernel))

        def inner(x, kernel):
            return sum(map(jnp.vdot, gradient(x, kernel), (dx, dkernel)))

        reverse_over_reverse = jax.grad(inner, argnums=(0, 1))(x, kernel)
        return along, forward_over_reverse, reverse_over_reverse

    assert MARK in program(lambda: results(ours))
    for a, b in zip(*map(jax.tree.leaves, (results(ours), results(xla))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-3, np.abs(b).max()))


def test_checkpoint_and_scan(onednn):
    case = CASES[0]
    x, kernel, _ = arrays(case)

    def loss(convolve, kernel):
        step = jax.checkpoint(
            lambda carry, _: (jnp.tanh(bind(convolve, case)(carry, kernel)), None)
        )
        return jnp.sum(jax.lax.scan(step, x, length=3)[0])

    ours = jax.jit(jax.grad(partial(loss, onednn)))(kernel)
    xla = jax.jit(jax.grad(partial(loss, jax.lax.conv_general_dilated)))(kernel)
    np.testing.assert_allclose(ours, xla, rtol=0, atol=1e-4 * np.abs(xla).max())


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_is_left_to_xla(onednn, axes):
    case = Case(2, (6, 6), 3, 4)
    pairs = [arrays(case, seed) for seed in range(3)]
    args = [
        jnp.stack([p[i] for p in pairs]) if axis == 0 else pairs[0][i]
        for i, axis in enumerate(axes)
    ]

    def results(convolve):
        def both(x, kernel):
            y, back = jax.vjp(bind(convolve, case), x, kernel)
            return y, *back(jnp.tanh(y))

        return jax.vmap(both, in_axes=axes)

    assert MARK not in program(results(onednn), *args)
    xla = results(jax.lax.conv_general_dilated)(*args)
    for a, b in zip(results(onednn)(*args), xla, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def sharded(function, mesh):
    """Value and gradients over eight devices: the batch is spread, the kernel is the same."""

    def body(x, kernel):
        def loss(x, kernel):
            return jax.lax.psum(jnp.sum(jnp.tanh(function(x, kernel))), "d")

        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    spec = PartitionSpec("d")
    return jax.shard_map(
        body, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=(spec, PartitionSpec())
    )


def test_eight_devices(onednn):
    """Each computes its own under shard_map; where jit shares the arrays out, XLA takes over."""
    case = Case(16, (6, 6), 3, 4)
    x, kernel, _ = arrays(case)
    ours, xla = bind(onednn, case), bind(jax.lax.conv_general_dilated, case)
    mesh = Mesh(np.array(jax.devices()[:8]), "d")
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))

    def gradients(x, kernel):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(xla(x, kernel)))

        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    exact = jax.jit(gradients)(x, kernel)
    assert MARK in program(sharded(ours, mesh), x, kernel)
    for a, b in zip(jax.jit(sharded(ours, mesh))(x, kernel), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    assert MARK not in program(ours, x, kernel)
    np.testing.assert_allclose(jax.jit(ours)(x, kernel), jax.jit(xla)(x, kernel), atol=1e-4)
    split = x.reshape(8, 2, *x.shape[1:])
    mapped = jax.pmap(lambda x: ours(x, kernel))(split).reshape(ours(x, kernel).shape)
    np.testing.assert_allclose(mapped, xla(x, kernel), atol=1e-4)


def test_threads_may_call_at_the_same_time(onednn):
    found = {case: bind(onednn, case) for case in CASES[:8]}
    given = {case: arrays(case) for case in found}
    with ThreadPoolExecutor(8) as pool:
        work = [(case, pool.submit(found[case], *given[case][:2])) for case in list(found) * 4]
    for case, future in work:
        close(future.result(), expected(case, *given[case])[0])


def test_what_onednn_does_not_do_goes_to_xla(onednn):
    x, kernel, _ = arrays(Case(2, (8, 8), 4, 4))
    half = dict(x=x.astype(jnp.bfloat16), kernel=kernel.astype(jnp.bfloat16))
    for changes in (
        half,
        dict(kernel=kernel[:, :, :1], feature_group_count=4),
        dict(lhs_dilation=(2, 2)),
        dict(rhs_dilation=(2, 2)),
        dict(padding=((-1, 0), (0, 0))),
        dict(padding=((3, 3), (3, 3))),
        dict(dimension_numbers=("NCHW", "OIHW", "NCHW"), kernel=jnp.ones((3, 8, 3, 3))),
        dict(x=x[:0]),
        dict(padding="VALID", x=x[:, :2]),
    ):
        plain = dict(window_strides=(1, 1), padding=((1, 1), (1, 1)), dimension_numbers=LAYOUT)
        settings = plain | dict(x=x, kernel=kernel) | changes
        x_, kernel_ = settings.pop("x"), settings.pop("kernel")
        assert MARK not in program(partial(onednn, **settings), x_, kernel_)
        xla = jax.lax.conv_general_dilated(x_, kernel_, **settings)
        np.testing.assert_array_equal(onednn(x_, kernel_, **settings), xla)


class OneConv(nn.Module):
    mode: str

    @nn.compact
    def __call__(self, x):
        norm = SimpleNamespace(kernels=self.mode, linear=lambda path, function: function)
        return Parts(norm, nn.relu, "before_act", jnp.float32).conv(x, 16, 3, 2, "conv")


def test_models_take_it_through_their_parts(onednn):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 9, 3)), jnp.float32)
    variables = OneConv("xla").init(jax.random.key(0), x)
    assert MARK not in program(OneConv("xla").apply, variables, x)
    xla = OneConv("xla").apply(variables, x)
    for mode in ("auto", "native"):
        assert MARK in program(OneConv(mode).apply, variables, x)
        np.testing.assert_allclose(OneConv(mode).apply(variables, x), xla, atol=1e-5)
