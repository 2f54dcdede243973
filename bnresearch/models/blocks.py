"""What all models are made of: linear layers, activations, and where normalisation stands."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnresearch import native
from bnresearch.errors import UserError, lookup
from bnresearch.reparam import PLAIN, Hooks

Initializer = Callable[..., jax.Array]

# He et al. (2015), for relu, whatever the activation: then kernels are equal for one seed in all
# arms of a comparison. Convolutions preserve the variance of the gradient (fan_out, as torchvision
# and He's published code), dense layers that of the signal (fan_in).
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DENSE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
# LeCun et al. (1998): the head is followed by no activation, so its gain is 1.
HEAD_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

# The name of the last layer in all models.
HEAD = "head"


@dataclass(frozen=True)
class Parts:
    """The pieces a net is built from; a block gets these and never sees an option of the norm.

    **Placement, written once.** Every norm that has an activation beside it is made by `norm_act`:
    ``before_act`` is norm -> activation, ``after_act`` is activation -> norm.

    **Biases follow from it.** A bias straight before a norm is needless, because the norm has its
    own. So under ``before_act`` linear layers have none (and a norm of kind "none" is just that
    bias); under ``after_act`` the activation stands between, so the linear layer has a bias
    (`linear_bias`) and a norm of kind "none" is the identity.

    Attributes:
      norm: a `layers.NormMaker`: ``norm(name=, after_linear=, scale_init=, activation_follows=)``
        -> module, and ``norm.linear(path, function)``, which lets it reparametrise kernels;
        ``after_linear=False`` says that no bias was left out for the sake of this norm,
        ``activation_follows=True`` that a norm which brings its activation may apply it here.
      act: the activation.
      placement: a key of PLACEMENTS.
      dtype: in which convolutions and dense layers compute; parameters are float32.
    """

    norm: Any
    act: Callable[[jax.Array], jax.Array]
    placement: str
    dtype: Any

    @property
    def linear_bias(self) -> bool:
        """Whether a linear layer that leads to `norm_act` has a bias of its own."""
        return PLACEMENTS[self.placement]

    def norm_act(self, x: jax.Array, name: str) -> jax.Array:
        """Norm and activation in the order of the placement; same shape. A norm that brings its
        activation stands for both."""
        norm = self.norm(name=name, after_linear=not self.linear_bias, activation_follows=True)
        if norm.activates:
            return norm(x)
        return norm(self.act(x)) if self.linear_bias else norm(x, activation=self.act)

    def conv(
        self,
        x: jax.Array,
        features: int,
        kernel: int,
        stride: int,
        name: str,
        bias: bool = False,
        init: Initializer = CONV_INIT,
        hooks: Hooks = PLAIN,
    ) -> jax.Array:
        """``[B, H, W, C]`` to ``[B, ceil(H/stride), ceil(W/stride), features]``; odd kernels."""
        # Models without norm sites have no maker of norms that could say.
        mode = getattr(self.norm, "kernels", "auto")
        convolve = native.conv_general_dilated(mode)
        if hooks.conv:
            convolve = functools.partial(hooks.conv, convolve=convolve)
        layer = nn.Conv(
            features,
            (kernel, kernel),
            strides=stride,
            padding=_padding(kernel),
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=init,
            # Where the layer stands is known once it stands there.
            conv_general_dilated=lambda *a, **k: self.norm.linear(site(layer), convolve)(*a, **k),
            name=name,
        )
        return layer(x)

    def dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        """``[B, C]`` to ``[B, features]``, with a bias where the placement asks for one."""
        multiply = jax.lax.dot_general
        layer = nn.Dense(
            features,
            self.linear_bias,
            dtype=self.dtype,
            kernel_init=DENSE_INIT,
            dot_general=lambda *a, **k: self.norm.linear(site(layer), multiply)(*a, **k),
            name=name,
        )
        return layer(x)


def site(layer: nn.Module) -> tuple[str, ...]:
    """The path of the norm that belongs to a convolution or dense layer: that of the same number
    beside it (conv1 and norm1), in front of it or behind."""
    *above, name = layer.path
    return (*above, re.sub(r"^(conv|dense)", "norm", name))


class NoNorm:
    """What a model without norm sites hands to its parts in the place of ``norm``: it leaves
    kernels as they are, and cannot be called."""

    def linear(self, path: tuple[str, ...], function: Callable[..., jax.Array]) -> Callable:
        """See `layers.NormMaker.linear`."""
        return function


def parts(model: Any) -> Parts:
    """The Parts of a model, from its fields norm, activation, placement and dtype."""
    return Parts(model.norm, ACTIVATIONS[model.activation], model.placement, model.dtype)


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Max-pooling with stride 2, padded like a convolution (with -inf)."""
    return nn.max_pool(x, (window, window), (2, 2), _padding(window))


def global_pool(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` to ``[B, C]``: the mean over positions, in float32."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def head(x: jax.Array, num_classes: int, init: Initializer = HEAD_INIT) -> jax.Array:
    """``[B, C]`` to float32 logits ``[B, num_classes]``; computed in float32 whatever came in."""
    x = x.astype(jnp.float32)
    return nn.Dense(num_classes, dtype=jnp.float32, kernel_init=init, name=HEAD)(x)


def in_head(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at a jax key path belongs to the head, whose name is always the same:
    what changes hidden layers (initialisers, adaptive clipping) leaves it alone."""
    return path[0].key == HEAD


def check_style(options: Mapping[str, Any]) -> None:
    """Raises UserError for an unknown activation or placement."""
    lookup(ACTIVATIONS, options["activation"], "activation")
    lookup(PLACEMENTS, options["placement"], "placement")


def check_positive(values: Sequence[int], what: str) -> None:
    """Raises UserError unless all ``values`` are whole numbers above 0."""
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"{what} has {value!r}, but needs whole numbers above 0; change it to, say, 16"
            )


def check_image(input_shape: tuple[int, int, int], downsamplings: int, advice: str) -> None:
    """Raises UserError if halving the image ``downsamplings`` times leaves less than a pixel.

    Padded layers would run on smaller images too, but on nothing except their own padding.
    """
    height, width, _ = input_shape
    smallest = 2**downsamplings
    if min(height, width) < smallest:
        ways = [advice] * bool(advice) + ["enlarge the images with data.image_size"]
        raise UserError(
            f"images of {height}x{width} are too small: this model halves them {downsamplings} "
            f"times and needs at least {smallest}x{smallest}; {' or '.join(ways)}"
        )


def check_finite(value: float, what: str) -> None:
    """Raises UserError unless 0 < value < infinity (NaN is refused too)."""
    if not 0 < value < math.inf:
        raise UserError(f"{what} is {value}, but must be a finite number above 0; 1.0 is the usual")


def _padding(kernel: int) -> list[tuple[int, int]]:
    # (k-1)//2 on both sides, as in torch. "SAME" differs at stride 2: for even sizes it pads only
    # at the end, which shifts the grid by one pixel against published nets and their weights.
    pad = (kernel - 1) // 2
    return [(pad, pad), (pad, pad)]


# placement -> whether a linear layer keeps its own bias.
PLACEMENTS = {"before_act": False, "after_act": True}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "elu": nn.elu,
    "leaky_relu": nn.leaky_relu,
    "identity": lambda x: x,
}
