"""The nets that need no norm, and adaptive clipping."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnresearch import optim
from bnresearch.config import default_config
from bnresearch.errors import UserError
from bnresearch.experiment import CPU_INIT, prepare
from bnresearch.layers import make_norm
from bnresearch.models import ACTIVATIONS, MODELS, blocks, fixup, nf_resnet, options, skipinit
from bnresearch.models.blocks import Parts
from bnresearch.models.resnet import basic, bottleneck, layout
from bnresearch.train import run

NONE = make_norm("none")
PARTS = Parts(NONE, ACTIVATIONS["relu"], "before_act", jnp.float32)
FREE = [name for name, entry in MODELS.items() if not entry.sites]
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def build(name, **changed):
    return MODELS[name].module(10, NONE, **changed)


def start(name, images=IMAGES, **changed):
    """The model, its parameters at the start, by path."""
    model = build(name, **changed)
    init = jax.jit(lambda x: model.init(jax.random.key(0), x, False), compiler_options=CPU_INIT)
    params = init(images)["params"]
    return model, params, flatten_dict(params, sep="/")


def outputs(model, params, images):
    """What each module gives, by its path; "" is the model."""
    run = jax.jit(
        lambda p, x: model.apply(
            {"params": p}, x, False, capture_intermediates=True, mutable=["intermediates"]
        )
    )
    seen = flatten_dict(run(params, images)[1]["intermediates"], sep="/")
    return {k.removesuffix("__call__").strip("/"): np.asarray(v[0]) for k, v in seen.items()}


# ------------------------------------------------------------------------ nets at the start


def test_fixup_starts_as_zero_with_identical_blocks():
    model, params, flat = start("fixup", depth=14, width=0.5)
    seen = outputs(model, params, IMAGES)
    assert not seen[""].any()
    for stage in (1, 2, 3):
        assert not seen[f"stage{stage}/block2/conv2"].any()
        first, second = (seen[f"stage{stage}/block{i}"] for i in (1, 2))
        np.testing.assert_array_equal(first, second)
        assert first.std() > 0.1
    assert not flat["head/kernel"].any()
    scalars = {path.split("/")[-1]: p for path, p in flat.items() if p.shape == ()}
    assert {name: float(p) for name, p in scalars.items()} == {
        "scale": 1, "bias1a": 0, "bias1b": 0, "bias2a": 0, "bias2b": 0, "bias1": 0, "bias": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "branches", "convs"),
    [
        ({"depth": 14, "width": 1.0}, 6, 2),
        pytest.param(
            {"family": "imagenet", "depth": 50, "width": 0.125}, 16, 3, marks=pytest.mark.slow
        ),
    ],
)
def test_fixup_rescales_the_kernels_of_resnet(changed, branches, convs):
    """L^(-1/(2m-2)): 6^(-1/2) for 6 branches of 2 convolutions, 16^(-1/4) for 16 of 3."""
    images = np.zeros((1, 32, 32, 3), np.float32)
    flat = start("fixup", images, shortcut="projection", **changed)[2]
    resnet = start("resnet", images, shortcut="projection", **changed)[2]
    factor = branches ** (-1 / (2 * convs - 2))
    for path in (path for path in flat if path.endswith("kernel") and path != "head/kernel"):
        last, outside = f"conv{convs}/" in path, "stem" in path or "shortcut" in path
        expected = resnet[path] * (1 if outside else 0 if last else factor)
        np.testing.assert_allclose(flat[path], expected, rtol=1e-5)


def test_a_fixup_block_computes_its_formula():
    block = fixup.Block(PARTS, basic(6, 2), 4, "pad")
    x = np.abs(IMAGES[..., :2])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.normal(size=p.shape).astype(np.float32),
        block.init(jax.random.key(0), x)["params"],
    )

    def conv(y, name, stride):
        return jax.lax.conv_general_dilated(
            y, params[name]["kernel"], (stride, stride), [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    y = np.maximum(conv(x + params["bias1a"], "conv1", 2) + params["bias1b"], 0)
    y = conv(y + params["bias2a"], "conv2", 1) * params["scale"] + params["bias2b"]
    shortcut = np.pad(x[:, ::2, ::2] + params["bias1a"], [(0, 0)] * 3 + [(0, 4)])
    found = block.apply({"params": params}, x)
    np.testing.assert_allclose(found, np.maximum(shortcut + y, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convs", [basic(3, 1), bottleneck(3, 1)], ids=["basic", "bottleneck"])
def test_a_skipinit_block_is_the_identity_at_the_start(convs):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, convs[-1].features)).astype(np.float32)

    def y(alpha):
        block = skipinit.Block(PARTS, convs, "pad", alpha)
        return block.init_with_output(jax.random.key(0), x)

    out, variables = y(0.0)
    np.testing.assert_array_equal(out, x)
    assert variables["params"]["alpha"] == 0
    whole, half = y(1.0)[0] - x, y(0.5)[0] - x
    assert whole.std() > 0.1
    np.testing.assert_allclose(half, whole / 2, atol=1e-5)


@pytest.mark.parametrize("name", ["skipinit", "nf_resnet"])
def test_kernels_are_bitwise_those_of_resnet(name):
    flat = start(name, depth=8, **({"shortcut": "projection"} if name == "skipinit" else {}))[2]
    resnet = start("resnet", depth=8, version="v2", shortcut="projection")[2]
    kernels = [path for path in flat if path.endswith("kernel")]
    assert len(kernels) == 10
    for path in kernels:
        np.testing.assert_array_equal(flat[path], resnet[path])


def test_nf_resnet_knows_its_variances():
    stem, stages = layout("nf_resnet", "cifar", 14, 1.0, "auto")
    plans, std = nf_resnet.plan(stem.convs[-1].features, stages, 0.5)
    assert [[p.beta**2 for p in stage] for stage in plans] == [
        pytest.approx([1, 1.25]),
        pytest.approx([1.5, 1.25]),
        pytest.approx([1.5, 1.25]),
    ]
    assert std**2 == pytest.approx(1.5)
    projects = [[p.projects for p in stage] for stage in plans]
    assert projects == [[False, False], [True, False], [True, False]]


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_signal_of_nf_resnet_follows_its_variances(activation, monkeypatch):
    """Width 64, alpha 1: 1, 2, 3, 4; 2, 3, 4; 2, 3, 4, within 5 %. Images are wrapped around,
    because what zero padding takes away is not in the prediction."""
    monkeypatch.setattr(blocks, "_padding", lambda kernel: "CIRCULAR")
    changed = {"depth": 20, "width": 4.0, "alpha": 1.0, "zero_gain": False}
    changed["activation"] = activation
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    model, params, _ = start("nf_resnet", images, **changed)
    seen = outputs(model, params, images)
    found = [seen["stem"].var()]
    found += [seen[f"stage{i}/block{j}"].var() for i in (1, 2, 3) for j in (1, 2, 3)]
    assert found == pytest.approx([1, 2, 3, 4, 2, 3, 4, 2, 3, 4], rel=0.05)
    branches = [seen[f"stage{i}/block{j}/conv2_gain"].var() for i in (1, 2, 3) for j in (1, 2, 3)]
    assert branches == pytest.approx([1] * 9, rel=0.06)


def test_a_skip_gain_of_zero_starts_nf_blocks_as_the_identity():
    model, params, flat = start("nf_resnet", depth=14)
    seen = outputs(model, params, IMAGES)
    for stage in (1, 2, 3):
        first, second = (seen[f"stage{stage}/block{i}"] for i in (1, 2))
        np.testing.assert_array_equal(first, second)
    assert {float(p) for path, p in flat.items() if path.endswith("skip_gain")} == {0}


@pytest.mark.parametrize("name", FREE)
def test_models_without_sites_never_call_norm(name):
    model = MODELS[name].module(10, norm=None, depth=8)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), IMAGES)
    assert set(shapes) == {"params"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"depth": 21}, "model.{}.depth 21 is impossible.*nearest are 20 and 26"),
        ({"family": "imagenet"}, "model.{}.depth 20 is unknown.*model.{}.family=cifar"),
        ({"family": "mnist"}, "unknown model.{}.family 'mnist'"),
        ({"stem": "wide"}, "unknown model.{}.stem 'wide'"),
        ({"width": 0.0}, "model.{}.width is 0.0"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"family": "imagenet", "depth": 18}, "8x8 are too small.*model.{}.stem=cifar"),
    ],
)
@pytest.mark.parametrize("name", FREE)
def test_impossible_options_are_refused(name, changed, words):
    with pytest.raises(UserError, match=words.replace("{}", name)):
        MODELS[name].check(options(name) | changed, (8, 8, 3))


@pytest.mark.parametrize("name", ["nf_resnet", "skipinit"])
@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_impossible_alphas_are_refused(name, alpha):
    with pytest.raises(UserError, match=f"model.{name}.alpha is {alpha}"):
        MODELS[name].check(options(name) | {"alpha": alpha}, (8, 8, 3))


# ------------------------------------------------------------------------ adaptive clipping


def test_adaptive_clipping_is_the_formula_unit_by_unit():
    rng = np.random.default_rng(0)

    def tree(scale):
        return {
            "conv": {"kernel": scale * rng.normal(size=(3, 3, 2, 4)), "bias": np.zeros(4)},
            "dense": {"kernel": scale * rng.normal(size=(6, 5)), "alpha": np.array(0.5)},
            "head": {"kernel": scale * rng.normal(size=(5, 3)), "bias": np.zeros(3)},
        }

    params = tree(1.0)
    gradients = jax.tree.map(lambda p: np.array(rng.normal(size=p.shape) * 0.3), params)
    gradients["dense"]["kernel"] *= [1e-3, 1, 1, 1e-3, 1]  # two outputs stay unclipped
    params, gradients = (jax.tree.map(jnp.float32, tree) for tree in (params, gradients))
    clip = optim.adaptive_clip(0.1)
    found, _ = clip.update(gradients, clip.init(params), params)

    def expected(g, w):
        axes = tuple(range(g.ndim - 1)) if g.ndim > 1 else None
        length, limit = (np.sqrt((a**2).sum(axes, keepdims=True)) for a in (g, w))
        return g * np.minimum(1, 0.1 * np.maximum(limit, 1e-3) / length)

    for layer in ("conv", "dense"):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5),
            found[layer], jax.tree.map(expected, gradients[layer], params[layer]),
        )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found["head"], gradients["head"])
    unclipped = found["dense"]["kernel"] == gradients["dense"]["kernel"]
    np.testing.assert_array_equal(unclipped.all(0), [True, False, False, True, False])


def step_with(**settings):
    """One SGD step without momentum and with rate 1 from weights 3, 4 and gradient 2, 2."""
    config = default_config().optim
    config.update(settings)
    config.sgd.momentum = 0.0
    numbers = {f"optim.{key}": jnp.float32(v) for key, v in settings.items()}
    numbers |= {"optim.learning_rate": jnp.float32(1), "optim.sgd.momentum": jnp.float32(0)}
    params = {"dense": {"kernel": jnp.array([[3.0], [4.0]])}, "head": {"bias": jnp.zeros(1)}}
    optimizer = optim.make_optimizer(config, numbers, 1.0)
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 2.0), params)
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def test_adaptive_clipping_comes_before_the_optimizer_and_before_clip_norm():
    """|w| = 5, so the kernel's gradient comes out at length 0.5; the head keeps its 2."""
    update = step_with(agc=0.1)
    np.testing.assert_allclose(update["dense"]["kernel"], -0.5 / math.sqrt(2), rtol=1e-6)
    assert update["head"]["bias"] == -2
    both = step_with(agc=0.1, clip_norm=1.0)
    total = math.hypot(0.5, 2)
    np.testing.assert_allclose(both["dense"]["kernel"], -0.5 / math.sqrt(2) / total, rtol=1e-6)
    off = step_with()
    np.testing.assert_array_equal(off["dense"]["kernel"], -2)


def test_weight_decay_spares_scalars_and_vectors_of_any_name():
    flat = start("nf_resnet", depth=8)[1]
    mask = flatten_dict(optim.decay_mask(flat), sep="/")
    assert {path for path, decayed in mask.items() if decayed} == {
        path for path in mask if path.endswith("kernel")
    }
    fixed = flatten_dict(optim.decay_mask(start("fixup", depth=8)[1]), sep="/")
    assert not fixed["stage1/block1/bias1a"] and fixed["stage1/block1/conv1/kernel"]


# ------------------------------------------------------------------------- configs and learning


def digits(*overrides):
    config = default_config()
    config.data.name, config.data.batch_size = "digits", 100
    config.norm.kind, config.parallel.devices = "none", 1
    config.update_from_flattened_dict(dict(overrides))
    return config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [("model.name", "fixup"), ("norm.kind", "batch")],
            "norm.kind=batch, but model fixup has no",
        ),
        ([("model.name", "skipinit"), ("norm.weights", "weight_norm")], "norm.weights=weight_norm"),
        (
            [("model.name", "fixup"), ("init.name", "lsuv")],
            "init.name=lsuv would replace the start",
        ),
        ([("model.name", "nf_resnet"), ("init.name", "orthogonal")], "init.name=orthogonal would"),
        ([("init.name", "xavier")], "unknown init.name 'xavier'.*he, lsuv, matched, orthogonal"),
        ([("optim.agc", -1.0)], "optim.agc=-1.0 is negative"),
    ],
)
def test_impossible_configs_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        prepare(digits(*overrides))


SHORT = [("train.duration", "20ep"), ("train.eval_every", "20ep"), ("train.log_every", "20ep"),
         ("optim.schedule.warmup", "1ep")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "floor"),
    [
        ([("model.name", "fixup"), ("model.fixup.depth", 8)], 0.93),
        ([("model.name", "skipinit"), ("model.skipinit.depth", 8)], 0.93),
        ([("model.name", "nf_resnet"), ("model.nf_resnet.depth", 8)], 0.93),
        (
            [
                ("model.name", "nf_resnet"),
                ("model.nf_resnet.depth", 8),
                ("model.nf_resnet.zero_gain", False),
                ("optim.agc", 0.1),
            ],
            0.93,
        ),
        ([("model.name", "mlp"), ("init.name", "orthogonal")], 0.93),
        ([("model.name", "mlp"), ("init.name", "lsuv")], 0.93),
    ],
    ids=["fixup", "skipinit", "nf_resnet", "nf_resnet with agc", "orthogonal", "lsuv"],
)
def test_every_control_learns_the_digits(changed, floor, tmp_path):
    config = digits(*SHORT, *changed)
    result = run(config, tmp_path / "run", show="off")
    assert result["metrics"]["test"]["accuracy"] >= floor
