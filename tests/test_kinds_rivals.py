"""Normalisers without batch statistics against float64 numpy that works with labelled sets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from bnresearch.errors import UserError
from bnresearch.kinds import activating, pointwise, rivals

SHAPES = [(3, 4), (3, 5, 4), (3, 2, 3, 4), (3, 2, 1, 3, 4)]
AFFINE = {"scale": [1.0, -2.0, 3.0, 0.5], "bias": [0.0, 0.5, -1.0, 2.0]}
V, THRESHOLD = [1.0, 0.3, -2.0, 0.0], [-0.5, 0.0, 0.5, 1.0]
PROXY = {"proxy_bias": [0.1, -0.2, 0.0, 0.5], "proxy_scale": [0.2, 0.0, -0.3, 0.1]}

# name: function, parameters besides scale and bias, options, and what makes a set: of (example,
# position, feature) the parts that its values have in common.
PLAIN = {
    "layer": (rivals.layer_norm, {}, {}, lambda b, p, c: (b,)),
    "layer_features": (rivals.layer_norm, {}, {"over": "features"}, lambda b, p, c: (b, p)),
    "rms": (rivals.rms_norm, {}, {}, lambda b, p, c: (b, p)),
    "rms_example": (rivals.rms_norm, {}, {"over": "example"}, lambda b, p, c: (b,)),
    "group": (rivals.group_norm, {}, {"groups": 2}, lambda b, p, c: (b, c // 2)),
    "instance": (rivals.instance_norm, {}, {}, lambda b, p, c: (b, c)),
    "positional": (rivals.positional_norm, {}, {}, lambda b, p, c: (b, p)),
}
OWN_ACTIVATION = {
    "frn": (activating.frn, {"threshold": THRESHOLD}, {}, lambda b, p, c: (b, c)),
    "evonorm_s0": (activating.evonorm_s0, {"v": V}, {"groups": 2}, lambda b, p, c: (b, c // 2)),
    "proxy": (activating.proxy_norm, PROXY, {"groups": 2}, lambda b, p, c: (b, c // 2)),
}
POINTWISE = {
    "dyt": (pointwise.dyt, {"alpha": 0.7}, {}, None),
    "derf": (pointwise.derf, {"alpha": 0.7, "shift": 0.2}, {}, None),
}
KINDS = PLAIN | OWN_ACTIVATION | POINTWISE
CENTRED = ("layer", "layer_features", "group", "instance", "positional")
every_kind = pytest.mark.parametrize("kind", KINDS)


def call(kind, x, affine=AFFINE, **changes):
    """The kind on x, with all its parameters in float32 at least."""
    function, params, options, _ = KINDS[kind]
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    params = {name: jnp.asarray(value, dtype) for name, value in {**affine, **params}.items()}
    if not affine:
        params |= {"scale": None, "bias": None}
    return function(jnp.asarray(x), **params, **options, **changes)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def set_means(values, labels):
    """Each value replaced by the mean of all values with its label."""
    _, index = np.unique(labels, return_inverse=True)
    index = index.ravel()
    means = np.bincount(index, values.ravel()) / np.bincount(index)
    return means[index].reshape(values.shape)


def expected(kind, x, epsilon, activates=True):
    """The kind in float64, from its sets."""
    scale, bias = np.array(AFFINE["scale"]), np.array(AFFINE["bias"])
    if kind in POINTWISE:
        return scale * (np.tanh(0.7 * x) if kind == "dyt" else special.erf(0.7 * x + 0.2)) + bias
    flat = x.reshape(len(x), -1, 4)
    b, p, c = np.indices(flat.shape)
    labels = sum(part * 1000**n for n, part in enumerate(KINDS[kind][3](b, p, c)))
    mean = set_means(flat, labels)
    second = set_means(flat**2, labels)
    if kind in ("rms", "rms_example", "frn"):
        y = flat / np.sqrt(second + epsilon)
    elif kind == "evonorm_s0":
        numerator = flat * special.expit(np.array(V) * flat) if activates else flat
        y = numerator / np.sqrt(second - mean**2 + epsilon)
    else:
        y = (flat - mean) / np.sqrt(second - mean**2 + epsilon)
    y = (scale * y + bias).reshape(x.shape)
    if kind == "frn" and activates:
        return np.maximum(y, THRESHOLD)
    return proxied(y) if kind == "proxy" and activates else y


def proxied(h):
    scale, bias = np.array(AFFINE["scale"]), np.array(AFFINE["bias"])
    shift, spread = np.array(PROXY["proxy_bias"]), 1 + np.array(PROXY["proxy_scale"])
    levels = np.sqrt(2) * special.erfinv(2 * (np.arange(256)[:, None] + 0.5) / 256 - 1)
    proxy = np.clip(scale * (shift + spread * levels / levels.std()) + bias, 0, None)
    return (np.clip(h, 0, None) - proxy.mean(0)) / np.sqrt(proxy.var(0) + 0.03)


def assert_close(actual, wanted, tolerance):
    """Within ``tolerance``, relative to the largest value."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max()


def default_epsilon(kind):
    return 1e-6 if kind in ("rms", "rms_example", "frn") else 1e-5


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(k, s) for k in KINDS for s in SHAPES if s != (3, 4) or k not in ("instance", "frn")],
)
def test_values_equal_float64(kind, shape):
    x = np.float32(random(shape) + 0.3).astype(np.float64)
    wanted = expected(kind, x, default_epsilon(kind))
    assert_close(call(kind, x.astype(np.float32)), wanted, 1e-6)
    assert_close(jax.jit(partial(call, kind))(x.astype(np.float32)), wanted, 1e-6)
    if kind in PLAIN:  # an epsilon that tells
        y = call(kind, x.astype(np.float32), epsilon=jnp.float32(0.5))
        assert_close(y, expected(kind, x, 0.5), 1e-6)
        bare = (wanted - AFFINE["bias"]) / AFFINE["scale"]
        assert_close(call(kind, x.astype(np.float32), affine={}), bare, 1e-6)


@every_kind
def test_gradients_equal_float64(kind):
    x, weights = random((3, 5, 4)), random((3, 5, 4), seed=1)

    def gradient(dtype):
        loss = lambda x: (call(kind, x) * weights.astype(dtype)).sum()  # noqa: E731
        return np.asarray(jax.grad(loss)(jnp.asarray(x, dtype)), np.float64)

    with jax.enable_x64(True):
        wanted = gradient(np.float64)
        h, direction = 1e-6, random((3, 5, 4), seed=2)
        difference = (call(kind, x + h * direction) - call(kind, x - h * direction)) / (2 * h)
        assert float((difference * weights).sum()) == pytest.approx(
            (wanted * direction).sum(), rel=1e-6
        )
    assert_close(gradient(np.float32), wanted, 1e-5)


@every_kind
def test_half_precision_is_rounded_at_the_end_only(kind):
    x = jnp.asarray(random((3, 64, 4)) + 3, jnp.bfloat16)
    y = call(kind, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, call(kind, x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", CENTRED)
def test_large_offset_does_not_cancel(kind):
    x = np.float32(random((3, 512, 4)) + 1e4)
    y = np.asarray(call(kind, x, affine={}, epsilon=0.0), np.float64).reshape(-1, 4)
    assert (y**2).mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", PLAIN | OWN_ACTIVATION)
def test_masked_positions_do_not_count(kind):
    """Each example on its own, cut to the positions that count, gives the same."""
    x = np.float32(random((4, 6, 4)))
    mask = np.arange(6) < np.array([6, 2, 3, 0])[:, None]
    x[~mask] *= 1e6
    y = np.asarray(jax.jit(partial(call, kind))(x, mask=mask))
    for row, keep, got in zip(x[:3], mask, y, strict=False):
        assert_close(got[keep], call(kind, row[keep][None])[0], 1e-6)
    assert np.isfinite(y).all()
    assert np.isfinite(call(kind, x, mask=mask, epsilon=0.0)).all()
    for spread in (mask[..., None], np.broadcast_to(mask[..., None], x.shape)):
        np.testing.assert_allclose(call(kind, x, mask=spread)[mask], y[mask], rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.where(mask[..., None], call(kind, x, mask=mask), 0).sum())(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~mask], 0)


@pytest.mark.parametrize("kind", PLAIN | OWN_ACTIVATION)
def test_a_mask_of_examples_changes_nothing(kind):
    x = np.float32(random((4, 6, 4)))
    np.testing.assert_array_equal(call(kind, x, mask=np.arange(4) < 2), call(kind, x))


def test_a_mask_of_features():
    x = np.float32(random((3, 5, 6)))
    mask = np.broadcast_to(np.array([0, 1, 1, 1, 1, 1], bool), x.shape)
    y = rivals.layer_norm(x, None, None, over="features", mask=mask)
    assert_close(y[..., 1:], rivals.layer_norm(x[..., 1:], None, None, over="features"), 1e-6)
    y = rivals.group_norm(x, None, None, groups=2, mask=mask)
    for part in (slice(1, 3), slice(3, 6)):
        assert_close(y[..., part], rivals.layer_norm(x[..., part], None, None), 1e-6)


@every_kind
def test_scale_invariance_and_its_negative_controls(kind):
    """y(100 x) = y(x) at epsilon 0 for what divides by a deviation. Not so pointwise functions, nor
    the sigmoid of EvoNorm-S0."""
    x = np.float32(random((3, 5, 4)))
    changes = {} if kind in POINTWISE else {"epsilon": 0.0}
    small, large = (np.asarray(call(kind, a * x, **changes)) for a in (1, 100))
    if kind in (*POINTWISE, "evonorm_s0"):
        assert np.abs(large - small).max() > 0.1
    else:
        assert_close(large, small, 1e-6)


def test_group_norm_holds_layer_and_instance_norm():
    x, group = np.float32(random((3, 2, 3, 4))), partial(rivals.group_norm, scale=None, bias=None)
    assert_close(group(x, groups=1), rivals.layer_norm(x, None, None), 1e-6)
    assert_close(group(x, groups=4), rivals.instance_norm(x, None, None), 1e-6)
    np.testing.assert_array_equal(call("positional", x), call("layer_features", x))
    np.testing.assert_array_equal(rivals.identity(x), x)


@pytest.mark.parametrize("kind", OWN_ACTIVATION)
def test_without_activation_only_the_norm_is_left(kind):
    x = random((3, 5, 4))
    wanted = expected(kind, x, default_epsilon(kind), activates=False)
    assert_close(call(kind, np.float32(x), activates=False), wanted, 1e-6)
    assert np.abs(call(kind, np.float32(x)) - wanted).max() > 0.1


def test_frn_over_one_position_needs_the_learned_epsilon():
    x = np.float32(random((6, 4)))
    options = {"scale": True, "bias": True, "learned_epsilon": True}
    start = activating.frn_start(4, options)
    plain = {name: start[name] for name in ("scale", "bias", "threshold")}
    with pytest.raises(UserError, match=r"over one single .*norm.frn.learned_epsilon=true"):
        activating.frn(x, **plain)
    y = activating.frn(x, **plain, extra_epsilon=jnp.float32(-2.0), activates=False)
    assert_close(y, x / np.sqrt(x**2 + 2 + 1e-6), 1e-6)
    assert "extra_epsilon" not in activating.frn_start(4, {"learned_epsilon": False})
    assert float(start["extra_epsilon"]) == pytest.approx(1e-4)


def test_proxy_mean_and_deviation_are_those_of_a_rectified_normal():
    """At the start: E relu(N) = 1 / sqrt(2 pi), E relu(N)^2 = 1/2."""
    start = activating.proxy_start(4, {})
    x = np.float32(random((3, 50, 4)))
    y = activating.proxy_norm(x, **start, samples=100_000, proxy_epsilon=0.0)
    h = np.maximum(rivals.layer_norm(x, None, None), 0)
    mean = 1 / np.sqrt(2 * np.pi)
    assert_close(y, (h - mean) / np.sqrt(0.5 - mean**2), 1e-4)


@pytest.mark.parametrize(
    ("start", "names"),
    [
        (activating.frn_start, {"scale": 1, "bias": 0, "threshold": 0}),
        (activating.evonorm_s0_start, {"scale": 1, "bias": 0, "v": 1}),
        (activating.proxy_start, {"scale": 1, "bias": 0, "proxy_bias": 0, "proxy_scale": 0}),
        (pointwise.dyt_start, {"scale": 1, "bias": 0, "alpha": 0.5}),
        (pointwise.derf_start, {"scale": 1, "bias": 0, "alpha": 0.5, "shift": 0}),
    ],
)
def test_what_parameters_start_from(start, names):
    params = start(4, {"scale": True, "bias": True})
    assert {name: float(jnp.unique(value)[0]) for name, value in params.items()} == names
    for name, value in params.items():
        assert value.dtype == jnp.float32
        assert value.shape == (() if name in ("alpha", "shift") else (4,))
    assert set(start(4, {"scale": False, "bias": False})) == set(names) - {"scale", "bias"}
    assert float(pointwise.dyt_start(4, {"alpha_start": 0.2})["alpha"]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("kind", "shape", "changes", "message"),
    [
        ("group", (2, 3, 4), {"groups": 3}, r"norm.group.groups=3 on 4 features.*1, 2, 4$"),
        ("group", (2, 3, 4), {"groups": 0}, r"norm.group.groups=0 on 4 features"),
        ("group", (2, 4), {"groups": 4}, r"norm.kind=group over one single value"),
        ("evonorm_s0", (2, 3, 4), {"groups": 8}, r"norm.evonorm_s0.groups=8 on 4 .*1, 2, 4$"),
        ("evonorm_s0", (2, 4), {"groups": 4}, r"norm.kind=evonorm_s0 over one single value"),
        ("instance", (2, 4), {}, r"norm.kind=instance over one single value .*\(2, 4\)"),
        ("instance", (2, 1, 1, 4), {}, r"norm.kind=layer\|rms"),
        ("layer", (2, 4), {"over": "batch"}, r"unknown norm.layer.over 'batch'.*features"),
        ("rms", (2, 4), {"over": "batch"}, r"unknown norm.rms.over"),
        ("layer_features", (2, 3, 1), {}, r"norm.kind=layer over one single value"),
        ("positional", (2, 3, 1), {}, r"norm.kind=positional over one single value"),
        ("proxy", (2, 3, 4), {"samples": 1}, r"norm.proxy.samples=1 "),
        ("frn", (2, 3, 4), {"mask": np.ones((3, 2), bool)}, r"mask of shape \(3, 2\)"),
        ("layer", (4,), {}, r"takes \[batch, ..., features\]"),
    ],
)
def test_refusals(kind, shape, changes, message):
    function, params, options, _ = KINDS[kind]
    with pytest.raises(UserError, match=message):
        function(jnp.ones(shape), None, None, **params, **{**options, **changes})


@every_kind
def test_integers_are_refused(kind):
    with pytest.raises(UserError, match=r"floating-point input, not int32"):
        call(kind, np.ones((2, 3, 4), np.int32))
