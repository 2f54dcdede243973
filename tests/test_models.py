"""Models: published parameter counts, biases, initialisation, names, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from bnresearch.errors import UserError
from bnresearch.layers import make_norm
from bnresearch.models import ACTIVATIONS, MODELS, options
from bnresearch.models.blocks import Parts
from bnresearch.models.resnet import BlockV1, basic, bottleneck
from bnresearch.norm import NORMS

# Small ones with all their parts; widths fit the 4 groups of group norm.
SMALL = {
    "mlp": {"widths": (16, 12)},
    "plain": {"widths": (4, 8), "convs": (1, 2)},
    "resnet": {"depth": 8, "width": 0.25, "shortcut": "projection"},
    "fixup": {"depth": 8, "width": 0.25, "shortcut": "projection"},
    "skipinit": {"depth": 8, "width": 0.25, "shortcut": "projection"},
    "nf_resnet": {"depth": 8, "width": 0.25},
}
WITH_SITES = [name for name, entry in MODELS.items() if entry.sites]
PLACEMENTS = ("before_act", "after_act")
# Kinds that take statistics over positions, which an MLP does not have.
NEEDS_POSITIONS = {"instance", "batch_instance", "frn"}
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def norm_of(kind):
    """Any kind with options for 4 features and their multiples."""
    small = {"groups": 2, "features_per_group": 2}
    changed = {name: value for name, value in small.items() if name in NORMS[kind].options}
    return make_norm(kind, changed)


def build(name, kind="batch", num_classes=10, dtype=jnp.float32, **changed):
    return MODELS[name].module(num_classes, norm_of(kind), dtype, **changed)


def shapes(model, image=(8, 8, 3)):
    """Paths and shapes of the parameters, without computing any."""
    images = jnp.zeros((2, *image))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, False))["params"]
    return {path: p.shape for path, p in flatten_dict(params, sep="/").items()}


def count(image=(32, 32, 3), **changed):
    return sum(math.prod(shape) for shape in shapes(build("resnet", **changed), image).values())


def outputs(model, variables, x):
    """What each module gives in training, by module path; "" is the model."""
    rngs = {"dropout": jax.random.key(1)}
    run = jax.jit(
        lambda v, x: model.apply(
            v, x, True, rngs=rngs, capture_intermediates=True, mutable=["intermediates"]
        )
    )
    seen = flatten_dict(run(variables, x)[1]["intermediates"], sep="/")
    return {path.removesuffix("__call__").strip("/"): value[0] for path, value in seen.items()}


# ------------------------------------------------------------------------------ parameter counts


# torchvision's documented counts for 1000 classes.
# v2: norms read the trunk where v1 has them at the ends of branches. Stem + ends of branches and
# starts of branches + final norm have equally many features, so only norm_shortcut goes:
# 18, 34: 2 * (128 + 256 + 512) = 1,792 fewer; 50, 101: 2 * (256 + 512 + 1024 + 2048) = 7,680 fewer.
@pytest.mark.parametrize(
    ("depth", "v1", "v2"),
    [
        (18, 11_689_512, 11_687_720),
        (34, 21_797_672, 21_795_880),
        (50, 25_557_032, 25_549_352),
        (101, 44_549_160, 44_541_480),
    ],
)
def test_imagenet_resnets_have_the_published_number_of_parameters(depth, v1, v2):
    changed = {"num_classes": 1000, "family": "imagenet", "depth": depth}
    assert count((224, 224, 3), **changed) == v1
    assert count((224, 224, 3), **changed, version="v2") == v2


# He et al. (2016a), table 6: 0.27, 0.46, 0.66, 0.85, 1.7 M. No projections, so v2 has as many.
@pytest.mark.parametrize(
    ("depth", "number"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)],
)
def test_cifar_resnets_have_the_published_number_of_parameters(depth, number):
    assert count(depth=depth) == number
    assert count(depth=depth, version="v2") == number


def test_counts_of_variants():
    assert count(family="imagenet", depth=18, stem="cifar") == 11_173_962
    # ResNet-20 with projections: 16*32 + 32*64 weights, 2 * (32 + 64) in their norms.
    assert count(depth=20, shortcut="projection") == 269_722 + 2_560 + 192
    # Deep stem of 64: 27*32 + 9*32*32 + 9*32*64 weights and 2*64 in two more norms, for 49*3*64.
    deep = {"num_classes": 1000, "family": "imagenet", "depth": 50, "stem": "deep"}
    assert count((64, 64, 3), **deep) == 25_557_032 + 28_512 + 128 - 9_408
    # Without a norm a bias stands where scale and bias stood: 16 + 6*(16 + 32 + 64) = 688 fewer.
    assert count(depth=20, kind="none") == 269_722 - 688


def test_width_multiplies_features():
    found = shapes(build("resnet", depth=8, width=2.0))
    assert found["stem/conv1/kernel"] == (3, 3, 3, 32)
    assert found["stage3/block1/conv1/kernel"] == (3, 3, 64, 128)


# ------------------------------------------------------------------------- biases and kind "none"


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", WITH_SITES)
def test_none_has_exactly_the_biases_of_batch(name, version):
    changed = SMALL[name] | ({"version": version} if name == "resnet" else {})
    batch = shapes(build(name, "batch", **changed))
    none = shapes(build(name, "none", **changed))
    assert none == {path: shape for path, shape in batch.items() if not path.endswith("/scale")}
    linear = [path.replace("kernel", "bias") for path in batch if path.endswith("/kernel")]
    assert [path for path in linear if path in batch] == ["head/bias"]


def biases(name, **changed):
    found = shapes(build(name, "none", **SMALL[name], **changed))
    return {path.removesuffix("/bias") for path in found if path.endswith("/bias")}


def test_biases_of_none_after_the_activation():
    after = {"placement": "after_act"}
    assert biases("mlp", **after) == {"dense1", "dense2", "head"}
    assert biases("plain", **after) == {"stage1/conv1", "stage2/conv1", "stage2/conv2", "head"}
    # v1: the sites at the end of branches and projections are not swapped.
    blocks = [f"stage{i}/block1/" for i in (1, 2, 3)]
    v1 = {"stem/conv1", "head"} | {b + site for b in blocks for site in ("conv1", "norm2")}
    v1 |= {b + "norm_shortcut" for b in blocks[1:]}
    assert biases("resnet", **after) == v1
    v2 = {"stem/conv1", "head"} | {b + site for b in blocks for site in ("conv1", "conv2")}
    assert biases("resnet", version="v2", **after) == v2


# ------------------------------------------------------------------------------- initialisation


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", WITH_SITES)
def test_kernels_are_bitwise_equal_for_all_kinds_of_norm(name, placement):
    def kernels(kind, seed=0, **changed):
        model = build(name, kind, **SMALL[name], placement=placement, **changed)
        images = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)  # only parameters are computed
        params = model.lazy_init(jax.random.key(seed), images, False)["params"]
        return {k: v for k, v in flatten_dict(params, sep="/").items() if k.endswith("kernel")}

    first = kernels("batch")
    assert len(first) >= 3
    for kind in NORMS.keys() - (NEEDS_POSITIONS if name == "mlp" else set()):
        jax.tree.map(np.testing.assert_array_equal, first, kernels(kind))
    jax.tree.map(np.testing.assert_array_equal, first, kernels("batch", activation="tanh"))
    other = kernels("batch", seed=1)  # the comparison is not vacuous
    assert all(np.any(first[path] != other[path]) for path in first)


def test_standard_deviations_at_the_start():
    def std(name, path, **changed):
        model = build(name, num_classes=500, **changed)
        params = model.init(jax.random.key(0), IMAGES, False)["params"]
        return float(np.std(flatten_dict(params, sep="/")[path]))

    # 3x3 kernels to 128 features: fan_out 1152. 8*8*3 = 192 inputs: fan_in 192.
    wide = {"widths": (32, 128), "convs": (1, 1)}
    assert std("plain", "stage2/conv1/kernel", **wide) == pytest.approx((2 / 1152) ** 0.5, rel=0.02)
    assert std("mlp", "dense1/kernel", widths=(200,)) == pytest.approx((2 / 192) ** 0.5, rel=0.02)
    assert std("mlp", "head/kernel", widths=(200,)) == pytest.approx((1 / 200) ** 0.5, rel=0.02)
    assert std("mlp", "head/bias", widths=(200,)) == 0


def test_zero_gamma_makes_a_block_the_identity_on_its_trunk():
    parts = Parts(norm_of("batch"), ACTIVATIONS["relu"], "before_act", jnp.float32)
    x = np.abs(np.random.default_rng(1).normal(size=(4, 8, 8, 4))).astype(np.float32)
    for convs in (basic(4, 1), bottleneck(1, 1)):

        def start(zero_gamma, convs=convs):
            block = BlockV1(parts, convs, "pad", zero_gamma)
            return block.init_with_output(jax.random.key(0), x)[0]

        np.testing.assert_array_equal(start(zero_gamma=True), x)
        assert np.abs(start(zero_gamma=False) - x).mean() > 0.1


def test_zero_gamma_is_at_the_ends_of_branches_only():
    model = build("resnet", **SMALL["resnet"], zero_gamma=True)
    params = flatten_dict(model.init(jax.random.key(0), IMAGES, True)["params"], sep="/")
    scales = {k: v for k, v in params.items() if k.endswith("/scale")}
    zero = {path for path, scale in scales.items() if not scale.any()}
    assert zero == {f"stage{i}/block1/norm2/scale" for i in (1, 2, 3)}
    assert all((scales[path] == 1).all() for path in set(scales) - zero)


# --------------------------------------------------------------------------- contract of all models


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(name):
    model = build(name, num_classes=7, dtype=jnp.bfloat16, **SMALL[name])
    variables = model.init(jax.random.key(0), IMAGES, False)
    seen = outputs(model, variables, IMAGES)
    logits = seen[""]
    assert logits.shape == (4, 7)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    inner = [p for p in seen if p.split("/")[-1].startswith(("conv", "dense", "norm"))]
    assert len(inner) >= 4
    assert {seen[path].dtype for path in inner} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", MODELS)
def test_defaults_pass_their_own_check(name):
    MODELS[name].check(options(name), (28, 28, 1))
    assert not {"norm", "num_classes", "dtype", "parent", "name"} & set(options(name))
    assert shapes(build(name, **options(name))) == shapes(build(name))


def test_dense_says_whether_there_are_convolutions():
    for name, entry in MODELS.items():
        ranks = {len(shape) for shape in shapes(build(name, **SMALL[name])).values()}
        assert entry.dense == (4 not in ranks)


def test_sites_are_named_by_stage_and_block():
    found = shapes(build("resnet", depth=8, version="v2"))
    sites = {path.removesuffix("/scale") for path in found if path.endswith("/scale")}
    assert sites == {f"stage{i}/block1/norm{j}" for i in (1, 2, 3) for j in (1, 2)} | {"norm"}


def test_dropout_zeroes_in_training_only():
    model = build("mlp", "none", widths=(1000,), dropout=0.75, activation="identity")
    variables = model.init(jax.random.key(0), IMAGES, False)
    plain = build("mlp", "none", widths=(1000,), activation="identity")
    evaluated = model.apply(variables, IMAGES, False)
    np.testing.assert_array_equal(evaluated, plain.apply(variables, IMAGES, True))
    seen = outputs(model, variables, IMAGES)
    before, after = seen["norm1"], seen["dropout1"]
    dropped = after == 0
    assert abs(dropped.mean() - 0.75) < 0.03  # 4000 units: 4 standard errors
    np.testing.assert_allclose(after[~dropped], 4 * before[~dropped], rtol=1e-6)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "changed", "image", "words"),
    [
        ("mlp", {"activation": "rleu"}, 8, "unknown activation 'rleu'.*leaky_relu.*relu"),
        ("mlp", {"placement": "after"}, 8, "unknown placement 'after'.*after_act, before_act"),
        ("mlp", {"widths": (100, 0)}, 8, "model.mlp.widths has 0"),
        ("mlp", {"widths": (100, 2.5)}, 8, "model.mlp.widths has 2.5"),
        ("mlp", {"dropout": 1.0}, 8, "model.mlp.dropout is 1.0.*below 1"),
        ("mlp", {"dropout": -0.1}, 8, "model.mlp.dropout is -0.1"),
        ("mlp", {"dropout": math.nan}, 8, "model.mlp.dropout is nan"),
        ("plain", {"activation": "swish"}, 8, "unknown activation 'swish'"),
        ("plain", {"placement": ""}, 8, "unknown placement ''"),
        ("plain", {"widths": (-1, 2, 2)}, 8, "model.plain.widths has -1"),
        ("plain", {"convs": (1, 0, 2)}, 8, "model.plain.convs has 0"),
        ("plain", {"convs": (1, 2)}, 8, "names 3 stages.*names 2"),
        ("plain", {"widths": (), "convs": ()}, 8, "at least one"),
        ("plain", {}, 3, "3x3 are too small.*2 times.*at least 4x4.*fewer stages"),
        ("resnet", {"activation": "reluu"}, 8, "unknown activation 'reluu'"),
        ("resnet", {"placement": "both"}, 8, "unknown placement 'both'"),
        ("resnet", {"family": "mnist"}, 8, "unknown model.resnet.family 'mnist'.*cifar, imagenet"),
        ("resnet", {"version": "v3"}, 8, "unknown model.resnet.version 'v3'.*v1, v2"),
        ("resnet", {"stem": "wide"}, 8, "unknown model.resnet.stem.*auto, cifar, deep, imagenet"),
        ("resnet", {"shortcut": "C"}, 8, "unknown model.resnet.shortcut.*auto, pad, projection"),
        ("resnet", {"depth": 21}, 8, "depth 21 is impossible.*6n.2.*nearest are 20 and 26"),
        ("resnet", {"depth": 2}, 8, "depth 2 is impossible.*nearest are 8 and 14"),
        ("resnet", {"depth": -4}, 8, "depth -4 is impossible.*nearest are 8 and 14"),
        ("resnet", {"family": "imagenet"}, 64, "depth 20 is unknown.*18, 34, 50, 101"),
        ("resnet", {"width": 0.0}, 8, "model.resnet.width is 0.0"),
        ("resnet", {"width": math.nan}, 8, "model.resnet.width is nan"),
        ("resnet", {"width": math.inf}, 8, "model.resnet.width is inf"),
        ("resnet", {"width": 0.01}, 8, "width 0.01 leaves no features.*0.0625"),
        ("resnet", {"zero_gamma": True, "version": "v2"}, 8, "zero_gamma is on.*relu.*dead"),
        ("resnet", {}, 3, "3x3 are too small.*2 times.*4x4; enlarge"),
        ("resnet", {"family": "imagenet", "depth": 18}, 28, "28x28.*5 times.*32x32.*stem=cifar"),
        ("resnet", {"stem": "deep"}, 15, "15x15.*4 times.*at least 16x16"),
    ],
)
def test_check_refuses_in_words(name, changed, image, words):
    with pytest.raises(UserError, match=words):
        MODELS[name].check(options(name) | changed, (image, image, 3))


@pytest.mark.parametrize(
    ("name", "changed", "smallest"),
    [
        ("mlp", {}, 1),
        ("plain", {}, 4),
        ("resnet", {}, 4),
        ("resnet", {"family": "imagenet", "depth": 18, "stem": "cifar"}, 8),
        ("resnet", {"family": "imagenet", "depth": 18}, 32),
    ],
)
def test_the_smallest_images_end_as_one_pixel(name, changed, smallest):
    MODELS[name].check(options(name) | changed, (smallest, smallest, 1))
    sizes = []

    def record(following, arguments, keywords, context):
        y = following(*arguments, **keywords)
        if isinstance(context.module, nn.Conv):
            sizes.append(y.shape[1:3])
        return y

    with nn.intercept_methods(record):
        shapes(build(name, **changed), (smallest, smallest, 1))
    assert sizes[-1:] == ([] if name == "mlp" else [(1, 1)])
