"""Models compute what plain numpy does, from the formulae in their docstrings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bnresearch.layers import make_norm
from bnresearch.models import ACTIVATIONS, MODELS
from bnresearch.models.blocks import Parts
from bnresearch.models.resnet import STEMS, BlockV1, BlockV2, Stem, basic, bottleneck
from bnresearch.norm import NORMS

PLACEMENTS = ("before_act", "after_act")
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def norm_of(kind):
    return make_norm(kind, NORMS[kind].options)


PARTS = {
    placement: Parts(norm_of("batch"), ACTIVATIONS["relu"], placement, jnp.float32)
    for placement in PLACEMENTS
}


def build(name, kind="batch", **changed):
    return MODELS[name].module(10, norm_of(kind), **changed)


def random_params(model, *inputs):
    """Path -> float64 array, all away from what they are at the start; nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        around = 1.0 if path.endswith("scale") else 0.0
        spread = 0.3 if len(shape) == 1 else (2 / math.prod(shape[:-1])) ** 0.5
        return around + spread * rng.normal(size=shape)

    found = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))["params"]
    return {path: draw(path, p.shape) for path, p in flatten_dict(found, sep="/").items()}


def apply(model, params, *inputs):
    tree = unflatten_dict({path: np.float32(p) for path, p in params.items()}, sep="/")
    run = jax.jit(lambda p: model.apply({"params": p}, *inputs, mutable=["batch_stats"])[0])
    return run(tree)


def np_conv(x, params, name, stride=1):
    kernel = params[f"{name}/kernel"]
    size, pad = kernel.shape[0], (kernel.shape[0] - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.tensordot(patch, kernel, 3)
    return y + params.get(f"{name}/bias", 0)


def np_norm(x, params, name):
    if f"{name}/scale" not in params:  # kind "none"
        return x + params.get(f"{name}/bias", 0)
    axes = tuple(range(x.ndim - 1))
    x = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    return x * params[f"{name}/scale"] + params[f"{name}/bias"]


def np_norm_act(x, params, name, placement):
    if placement == "before_act":
        return np.maximum(np_norm(x, params, name), 0)
    return np_norm(np.maximum(x, 0), params, name)


def np_max_pool(x, window):
    pad = (window - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-np.inf)
    n = (x.shape[1] - window) // 2 + 1
    parts = [x[:, 2 * i : 2 * i + window, 2 * j : 2 * j + window].max((1, 2), keepdims=True)
             for i in range(n) for j in range(n)]  # fmt: skip
    return np.concatenate(parts, 1).reshape(len(x), n, n, -1)


def np_head(x, params):
    return x @ params["head/kernel"] + params["head/bias"]


def np_shortcut(x, params, at, features, stride):
    if f"{at}conv_shortcut/kernel" in params:
        return np_conv(x, params, f"{at}conv_shortcut", stride)
    zeros = np.zeros((*x[:, ::stride, ::stride].shape[:3], features - x.shape[-1]))
    return np.concatenate([x[:, ::stride, ::stride], zeros], -1)


def np_block_v1(x, params, at, strides, placement):
    y, last = x, len(strides)
    for i, stride in enumerate(strides[:-1], 1):
        y = np_conv(y, params, f"{at}conv{i}", stride)
        y = np_norm_act(y, params, f"{at}norm{i}", placement)
    y = np_norm(np_conv(y, params, f"{at}conv{last}"), params, f"{at}norm{last}")
    if y.shape != x.shape:
        x = np_shortcut(x, params, at, y.shape[-1], max(strides))
        if f"{at}conv_shortcut/kernel" in params:
            x = np_norm(x, params, f"{at}norm_shortcut")
    return np.maximum(x + y, 0)


def np_block_v2(x, params, at, strides, placement):
    first = y = np_norm_act(x, params, f"{at}norm1", placement)
    y = np_conv(y, params, f"{at}conv1", strides[0])
    for i, stride in enumerate(strides[1:], 2):
        y = np_norm_act(y, params, f"{at}norm{i}", placement)
        y = np_conv(y, params, f"{at}conv{i}", stride)
    if y.shape != x.shape:
        x = np_shortcut(first, params, at, y.shape[-1], max(strides))
    return x + y


def np_resnet(x, params, version, placement, blocks=1):
    """The cifar family with ``blocks`` per stage."""
    block = {"v1": np_block_v1, "v2": np_block_v2}[version]
    x = np_conv(x, params, "stem/conv1")
    if version == "v1":
        x = np_norm_act(x, params, "stem/norm1", placement)
    for stage in (1, 2, 3):
        for i in range(1, blocks + 1):
            stride = 2 if stage > 1 and i == 1 else 1
            x = block(x, params, f"stage{stage}/block{i}/", (stride, 1), placement)
    if version == "v2":
        x = np_norm_act(x, params, "norm", placement)
    return np_head(x.mean((1, 2)), params)


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("version", "shortcut"), [("v1", "pad"), ("v2", "projection")])
def test_resnet_computes_what_numpy_does(version, shortcut, placement, kind):
    changed = {"depth": 8, "width": 0.25, "version": version, "shortcut": shortcut}
    model = build("resnet", kind, placement=placement, **changed)
    params = random_params(model, IMAGES, True)
    expected = np_resnet(IMAGES, params, version, placement)
    np.testing.assert_allclose(apply(model, params, IMAGES, True), expected, atol=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("branch", "strides"), [(basic, (2, 1)), (bottleneck, (1, 2, 1))])
def test_blocks_that_change_shape_compute_what_numpy_does(version, placement, branch, strides):
    zero = {"zero_gamma": False} if version == "v1" else {}
    module, reference = {"v1": (BlockV1, np_block_v1), "v2": (BlockV2, np_block_v2)}[version]
    # Option A in v1 and projection in v2 are in the test above; here the other way round.
    shortcut = {"v1": "projection", "v2": "pad"}[version]
    block = module(PARTS[placement], branch(4, 2), shortcut, **zero)
    x = IMAGES[:, :7]  # an odd height
    params = random_params(block, x)
    expected = reference(x, params, "", strides, placement)
    np.testing.assert_allclose(apply(block, params, x), expected, atol=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_plain_computes_what_numpy_does(placement):
    model = build("plain", widths=(4, 6), convs=(1, 2), placement=placement)
    x = params = random_params(model, IMAGES, True)
    x = np_conv(IMAGES, params, "stage1/conv1")
    x = np_max_pool(np_norm_act(x, params, "stage1/norm1", placement), 2)
    for i in (1, 2):
        x = np_conv(x, params, f"stage2/conv{i}")
        x = np_norm_act(x, params, f"stage2/norm{i}", placement)
    expected = np_head(x.mean((1, 2)), params)
    np.testing.assert_allclose(apply(model, params, IMAGES, True), expected, atol=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_mlp_computes_what_numpy_does(placement):
    model = build("mlp", widths=(6, 5), placement=placement)
    params = random_params(model, IMAGES, True)
    x = IMAGES.reshape(4, -1)
    for i in (1, 2):
        x = x @ params[f"dense{i}/kernel"] + params.get(f"dense{i}/bias", 0)
        x = np_norm_act(x, params, f"norm{i}", placement)
    expected = np_head(x, params)
    np.testing.assert_allclose(apply(model, params, IMAGES, True), expected, atol=1e-4)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", ["imagenet", "deep"])
def test_stems_with_pooling_compute_what_numpy_does(name, version):
    convs, bare = STEMS[name].convs(4), version == "v2"
    stem = Stem(PARTS["before_act"], convs, STEMS[name].pool, bare)
    x = np.random.default_rng(1).normal(size=(2, 18, 18, 3)).astype(np.float32)
    params = random_params(stem, x)
    y = x
    for i in range(1, len(convs) + 1):
        y = np_conv(y, params, f"conv{i}", 2 if i == 1 else 1)
        if i < len(convs) or not bare:
            y = np_norm_act(y, params, f"norm{i}", "before_act")
    np.testing.assert_allclose(apply(stem, params, x), np_max_pool(y, 3), atol=1e-4)


def test_v2_without_norm_is_the_net_with_a_bias_in_every_convolution():
    model = build("resnet", "none", depth=14, width=0.25, version="v2")
    rng = np.random.default_rng(2)
    params = random_params(model, IMAGES, True)
    everywhere = {path: v for path, v in params.items() if "norm" not in path}
    trunk = everywhere["stem/conv1/bias"] = rng.normal(size=4)
    for stage, features in ((1, 4), (2, 8), (3, 16)):
        for block in (1, 2):
            at = f"stage{stage}/block{block}/"
            params[at + "norm1/bias"] = trunk
            everywhere[at + "conv1/bias"] = params[at + "norm2/bias"]
            end = everywhere[at + "conv2/bias"] = rng.normal(size=features)
            # Where the shape changes, the trunk starts anew behind norm1 and the activation.
            trunk = end if len(trunk) != features else trunk + end
    params["norm/bias"] = trunk
    expected = np_resnet(IMAGES, everywhere, "v2", "before_act", blocks=2)
    np.testing.assert_allclose(apply(model, params, IMAGES, True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.array([-2.0, 0.0, 0.5, 3.0])
    formula = {
        "relu": np.maximum(x, 0),
        "tanh": np.tanh(x),
        "sigmoid": 1 / (1 + np.exp(-x)),
        "gelu": x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "silu": x / (1 + np.exp(-x)),
        "elu": np.where(x > 0, x, np.exp(x) - 1),
        "leaky_relu": np.where(x > 0, x, 0.01 * x),
        "identity": x,
    }[name]
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(x)), formula, atol=1e-6)
