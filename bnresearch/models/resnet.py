"""Residual nets: the CIFAR and the ImageNet family, original (v1) and pre-activation (v2).

He et al. (2016a), Deep Residual Learning, arXiv:1512.03385: v1, both families, shortcuts A and B.
He et al. (2016b), Identity Mappings in Deep Residual Networks, arXiv:1603.05027: v2.
Goyal et al. (2017), arXiv:1706.02677: zero-gamma. He T. et al. (2018), arXiv:1812.01187: deep stem.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch.errors import UserError, lookup
from bnresearch.models.blocks import (
    Parts,
    check_finite,
    check_image,
    check_style,
    global_pool,
    head,
    max_pool,
    parts,
)


class Conv(NamedTuple):
    """One convolution of a branch or stem."""

    features: int
    kernel: int
    stride: int


# (features, stride) -> the convolutions of one residual branch.
Branch = Callable[[int, int], list[Conv]]


def basic(features: int, stride: int) -> list[Conv]:
    """Two 3x3 convolutions, the first one strided."""
    return [Conv(features, 3, stride), Conv(features, 3, 1)]


def bottleneck(features: int, stride: int) -> list[Conv]:
    """1x1 down, 3x3, 1x1 up to 4 times the features.

    The stride sits on the 3x3, as in torchvision ("v1.5"). The paper had it on the first 1x1, which
    never looks at three quarters of its input.
    """
    return [Conv(features, 1, 1), Conv(features, 3, stride), Conv(4 * features, 1, 1)]


class BlockV1(nn.Module):
    """act(shortcut(x) + branch(x)), each convolution of the branch with its norm behind it.

    The last norm of the branch, and that of a projection, have the addition behind them and no
    activation of their own: under either placement they stay on the branch, right behind their
    convolution, which therefore has no bias. All other sites follow `Parts.norm_act`.
    """

    parts: Parts
    convs: Sequence[Conv]
    shortcut: str
    zero_gamma: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p, y, end = self.parts, x, len(self.convs)
        trunk = x
        # The shortcut first: the last norm adds it, and wants to be called right behind its conv.
        if changes_shape(x, self.convs):
            trunk = resample(p, x, self.convs, self.shortcut)
            if self.shortcut == "projection":
                trunk = p.norm(name="norm_shortcut")(trunk)
        for i, conv in enumerate(self.convs[:-1], 1):
            y = p.conv(y, *conv, name=f"conv{i}", bias=p.linear_bias)
            y = p.norm_act(y, f"norm{i}")
        y = p.conv(y, *self.convs[-1], name=f"conv{end}")
        zero = {"scale_init": nn.initializers.zeros} if self.zero_gamma else {}
        return p.norm(name=f"norm{end}", **zero)(y, activation=p.act, add=trunk)


class BlockV2(nn.Module):
    """shortcut(x) + branch(x), norm and activation in front of each convolution of the branch.

    Where the shape changes, the shortcut starts behind the first norm and activation, which it
    shares with the branch, as in He's published code; elsewhere it carries the bare trunk.

    Biases, ``before_act``: no convolution has one, and every norm counts as directly following a
    linear map, also those that read the trunk. For kind "none" this is the net with a bias in every
    convolution that a norm would make needless, written differently: a bias at the end of a branch
    reaches all later readers of the trunk, so each of them sees a sum of biases; here each has one
    of its own instead. As many numbers and the same functions (a test holds this).
    Biases, ``after_act``: activations read the trunk, so every convolution has one. Only
    projections have none: the end of the branch beside them has.
    """

    parts: Parts
    convs: Sequence[Conv]
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.parts
        y = p.norm_act(x, "norm1")
        if changes_shape(x, self.convs):
            x = resample(p, y, self.convs, self.shortcut)
        for i, conv in enumerate(self.convs, 1):
            if i > 1:
                y = p.norm_act(y, f"norm{i}")
            y = p.conv(y, *conv, name=f"conv{i}", bias=p.linear_bias)
        return x + y


def changes_shape(x: jax.Array, convs: Sequence[Conv]) -> bool:
    """Whether a branch of ``convs`` changes the features or the size of ``x``."""
    return x.shape[-1] != convs[-1].features or max(conv.stride for conv in convs) > 1


def resample(p: Parts, x: jax.Array, convs: Sequence[Conv], shortcut: str) -> jax.Array:
    """``x`` in the shape that the branch of ``convs`` comes out with."""
    stride = max(conv.stride for conv in convs)
    return SHORTCUTS[shortcut](p, x, convs[-1].features, stride)


def pad(p: Parts, x: jax.Array, features: int, stride: int) -> jax.Array:
    """Option A: every stride-th position; channels that are missing are zero, at the end."""
    del p  # free of parameters
    missing = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, missing)))


def projection(p: Parts, x: jax.Array, features: int, stride: int) -> jax.Array:
    """Option B: a strided 1x1 convolution without bias."""
    return p.conv(x, features, 1, stride, "conv_shortcut")


class Stage(nn.Module):
    """One residual block per branch."""

    block: Callable[..., nn.Module]
    branches: Sequence[Sequence[Conv]]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, convs in enumerate(self.branches, 1):
            x = self.block(convs=convs, name=f"block{i}")(x)
        return x


class Stem(nn.Module):
    """From the image to the trunk.

    In v1 norm and activation follow each convolution. In v2 the last one stays bare, because the
    first block begins with a norm and activation of its own.
    """

    parts: Parts
    convs: Sequence[Conv]
    pool: bool
    bare: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.parts
        for i, conv in enumerate(self.convs, 1):
            x = p.conv(x, *conv, name=f"conv{i}", bias=p.linear_bias)
            if i < len(self.convs) or not self.bare:
                x = p.norm_act(x, f"norm{i}")
        return max_pool(x, 3) if self.pool else x


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global mean, head.

    Families: ``cifar`` has depth 6n+2, basic blocks and three stages of 16, 32, 64 features;
    ``imagenet`` has depth 18 or 34 (basic), 50 or 101 (bottleneck), and four stages of 64 to 512.
    The ResNet-18 that is common on CIFAR is family imagenet, depth 18, stem cifar.

    Versions: v1 is ``act(shortcut(x) + branch(x))``; v2 is ``shortcut(x) + branch(x)`` with norm
    and activation in front of each convolution, and once more in front of the mean.

    Placement ``after_act`` swaps norm and activation wherever they stand side by side: in v1 inside
    stem and branch, but not at the end of a branch or projection, where the addition comes first
    (`BlockV1`); in v2 everywhere, which gives activation -> norm -> conv (`BlockV2`).

    Padding is (k-1)//2 on both sides as in torch, not "SAME".

    Initialisation: convolutions He normal (fan_out), head LeCun normal, biases 0, scales 1. With
    zero_gamma the scale at the end of each v1 branch is 0, and a block starts as act(shortcut(x));
    kinds of norm without a scale ignore it.

    Attributes:
      num_classes: length of the logits.
      norm: constructor of norm modules, see `blocks.Parts`.
      dtype: of the convolutions; parameters and logits are float32.
      family: a key of FAMILIES.
      depth: see families.
      version: a key of VERSIONS.
      width: multiplies the features of every stage.
      stem: a key of STEMS, or "auto": that of the family.
      shortcut: where the shape changes; a key of SHORTCUTS, or "auto": that of the family.
      zero_gamma: start the last scale of each branch at 0 (v1 only).
      activation: a key of ACTIVATIONS.
      placement: a key of PLACEMENTS.
    """

    num_classes: int
    norm: Callable[..., Any]
    dtype: Any = jnp.float32
    family: str = "cifar"
    depth: int = 20
    version: str = "v1"
    width: float = 1.0
    stem: str = "auto"
    shortcut: str = "auto"
    zero_gamma: bool = False
    activation: str = "relu"
    placement: str = "before_act"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[B, H, W, C]`` to float32 logits ``[B, num_classes]``."""
        p, preactivated = parts(self), self.version == "v2"
        stem, stages = layout("resnet", self.family, self.depth, self.width, self.stem)
        x = x.astype(self.dtype)
        x = Stem(p, stem.convs, stem.pool, bare=preactivated, name="stem")(x)
        for i, branches in enumerate(stages, 1):
            x = Stage(self._block(p), branches, name=f"stage{i}")(x)
        if preactivated:
            x = p.norm_act(x, "norm")
        return head(global_pool(x), self.num_classes)

    def _block(self, p: Parts) -> Callable[..., nn.Module]:
        shortcut = auto(self.shortcut, FAMILIES[self.family].shortcut)
        if self.version == "v2":
            return partial(BlockV2, p, shortcut=shortcut)
        return partial(BlockV1, p, shortcut=shortcut, zero_gamma=self.zero_gamma)


class StemLayout(NamedTuple):
    """Convolutions for a number of features, whether max-pooling follows, how often both halve."""

    convs: Callable[[int], list[Conv]]
    pool: bool
    downsamplings: int


def deep_stem(features: int) -> list[Conv]:
    """Three 3x3 convolutions in place of the 7x7, as in ResNet-C and -D."""
    half = max(1, features // 2)
    return [Conv(half, 3, 2), Conv(half, 3, 1), Conv(features, 3, 1)]


class Family(NamedTuple):
    """Features of the first stage, what "auto" stands for, and (model, depth) -> blocks of
    each stage, and their branch."""

    features: int
    stem: str
    shortcut: str
    blocks: Callable[[str, int], tuple[tuple[int, ...], Branch]]


class StemConvs(NamedTuple):
    """The convolutions of a stem, and whether max-pooling follows."""

    convs: list[Conv]
    pool: bool


def layout(
    model: str, family: str, depth: int, width: float, stem: str
) -> tuple[StemConvs, list[list[list[Conv]]]]:
    """All convolutions of a residual net but for its shortcuts: of the stem, and stage by stage
    those of each block's branch. ``model`` is its name, for messages."""
    of = FAMILIES[family]
    blocks, branch = of.blocks(model, depth)
    features = round(of.features * width)
    start = STEMS[auto(stem, of.stem)]
    stages = []
    for i, count in enumerate(blocks):
        strides = [1 if i == 0 else 2] + [1] * (count - 1)
        stages.append([branch(features * 2**i, stride) for stride in strides])
    return StemConvs(start.convs(features), start.pool), stages


def cifar_blocks(model: str, depth: int) -> tuple[tuple[int, ...], Branch]:
    """Three stages of n = (depth - 2) / 6 basic blocks."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        near = (6 * n + 2, 6 * n + 8) if n >= 1 else (8, 14)
        raise UserError(
            f"model.{model}.depth {depth} is impossible in the cifar family: depths are 6n+2 "
            f"(20, 32, 44, 56, 110, ...); the nearest are {near[0]} and {near[1]}"
        )
    return (n, n, n), basic


def imagenet_blocks(model: str, depth: int) -> tuple[tuple[int, ...], Branch]:
    """The four stages of table 1 in He et al. (2016a)."""
    if depth not in IMAGENET:
        raise UserError(
            f"model.{model}.depth {depth} is unknown in the imagenet family; choose one of: "
            f"{', '.join(map(str, IMAGENET))}; for depths of 6n+2 take model.{model}.family=cifar"
        )
    return IMAGENET[depth]


def auto(value: str, own: str) -> str:
    """The family's ``own`` stem or shortcut if ``value`` is "auto"."""
    return own if value == "auto" else value


def check(options: Mapping[str, Any], input_shape: tuple[int, int, int]) -> None:
    """Raises UserError for options no ResNet can have, and for images that are too small."""
    check_style(options)
    lookup(VERSIONS, options["version"], "model.resnet.version")
    check_layout("resnet", options, input_shape)
    if options["zero_gamma"] and options["version"] == "v2":
        raise UserError(
            "model.resnet.zero_gamma is on, but v2 has no norm at the end of a branch, and a scale "
            "of 0 in front of relu is dead for ever (relu'(0) = 0, so nothing there gets a "
            "gradient); switch zero_gamma off or take version v1"
        )


def check_layout(model: str, options: Mapping[str, Any], input_shape: tuple[int, int, int]) -> None:
    """Raises UserError for a family, depth, width, stem or shortcut that cannot be, and for images
    too small for them; options a model does not have are not looked at."""
    family = lookup(FAMILIES, options["family"], f"model.{model}.family")
    if "shortcut" in options:
        lookup({**SHORTCUTS, "auto": None}, options["shortcut"], f"model.{model}.shortcut")
    lookup({**STEMS, "auto": None}, options["stem"], f"model.{model}.stem")
    blocks, _ = family.blocks(model, options["depth"])
    _check_width(model, options["width"], family.features)
    stem = STEMS[auto(options["stem"], family.stem)]
    advice = f"take model.{model}.stem=cifar" if stem.downsamplings else ""
    check_image(input_shape, stem.downsamplings + len(blocks) - 1, advice)


def _check_width(model: str, width: float, features: int) -> None:
    check_finite(width, f"model.{model}.width")
    if round(features * width) < 1:
        raise UserError(
            f"model.{model}.width {width} leaves no features: it multiplies {features}; "
            f"take at least {1 / features}"
        )


VERSIONS = {"v1": BlockV1, "v2": BlockV2}
SHORTCUTS = {"pad": pad, "projection": projection}
STEMS = {
    "cifar": StemLayout(lambda features: [Conv(features, 3, 1)], False, 0),
    "imagenet": StemLayout(lambda features: [Conv(features, 7, 2)], True, 2),
    "deep": StemLayout(deep_stem, True, 2),
}
IMAGENET = {
    18: ((2, 2, 2, 2), basic),
    34: ((3, 4, 6, 3), basic),
    50: ((3, 4, 6, 3), bottleneck),
    101: ((3, 4, 23, 3), bottleneck),
}
FAMILIES = {
    "cifar": Family(16, "cifar", "pad", cifar_blocks),
    "imagenet": Family(64, "imagenet", "projection", imagenet_blocks),
}
