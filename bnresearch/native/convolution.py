"""A convolution and its two transposes as primitives of jax, computed by oneDNN on CPUs.

A convolution is bilinear, and so are its transposes: with y = x * w,

    forward(x, w) = y        data(g, w) = d<g, y>/dx        weights(x, g) = d<g, y>/dw,

and the transpose of each of the three in either argument is another of the three. Said once, this
gives derivatives of every order, forward and reverse mode alike. Under ``vmap``, on other
platforms, and where the compiler shares an array among devices, each is what XLA makes of it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad

from bnresearch.native.primitive import alike, make

Pads = tuple[tuple[int, int], tuple[int, int]]

LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolution(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> jax.Array:
    """Cross-correlation, as `jax.lax.conv_general_dilated` computes it.

    Only for what `supported` says yes to. Where there is no library, XLA computes it.

    Args:
      x: float32 ``[B, H, W, C]``.
      kernel: float32 ``[h, w, C, F]``.
      strides: two whole numbers.
      padding: of each side, ``((top, bottom), (left, right))``, or as jax names it ("SAME").

    Returns:
      float32 ``[B, H', W', F]`` with ``H' = (H + top + bottom - h) // stride + 1``.
    """
    pads = _pads(x.shape, kernel.shape, strides, padding)
    return _bind(FORWARD, x, kernel, strides=tuple(map(int, strides)), padding=pads, size=())


def supported(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    **settings: Any,
) -> bool:
    """Whether `convolution` does what `jax.lax.conv_general_dilated` would do with these arguments:
    two spatial dimensions, NHWC and HWIO, float32, neither dilation nor groups, no padding that is
    negative or as large as the kernel, nothing empty."""
    if x.ndim != 4 or kernel.ndim != 4 or not x.size or not kernel.size:
        return False
    wanted = settings.get("preferred_element_type") or x.dtype
    if not x.dtype == kernel.dtype == wanted == jnp.float32:
        return False
    if feature_group_count * batch_group_count != 1:
        return False
    if any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ()))):
        return False
    numbers, ours = (
        jax.lax.conv_dimension_numbers(x.shape, kernel.shape, layout)
        for layout in (dimension_numbers, LAYOUT)
    )
    if numbers != ours:
        return False
    pads = _pads(x.shape, kernel.shape, window_strides, padding)
    inside = all(0 <= p < k for k, pair in zip(kernel.shape, pads, strict=False) for p in pair)
    return inside and all(n > 0 for n in _outputs(x.shape, kernel.shape, window_strides, pads))


def _pads(x: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Any) -> Pads:
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x[1:3], kernel[:2], strides, padding)
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


def _outputs(
    x: Sequence[int], kernel: Sequence[int], strides: Sequence[int], pads: Pads
) -> tuple[int, int]:
    height, width = (
        (n + sum(pad) - k) // stride + 1
        for n, k, stride, pad in zip(x[1:3], kernel[:2], strides, pads, strict=True)
    )
    return height, width


# What each primitive computes, in XLA's words. All take (a, b, strides, padding, size); size is
# that of the result where the arguments leave it open: (H, W) of the data, (h, w) of the kernel.
def _forward(a: jax.Array, b: jax.Array, strides: Any, padding: Any, size: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(a, b, strides, padding, dimension_numbers=LAYOUT)


def _data(g: jax.Array, w: jax.Array, strides: Any, padding: Any, size: Any) -> jax.Array:
    x = jax.ShapeDtypeStruct((g.shape[0], *size, w.shape[2]), g.dtype)
    transposed = jax.linear_transpose(lambda x: _forward(x, w, strides, padding, ()), x)
    return transposed(g)[0]


def _weights(x: jax.Array, g: jax.Array, strides: Any, padding: Any, size: Any) -> jax.Array:
    w = jax.ShapeDtypeStruct((*size, x.shape[3], g.shape[3]), g.dtype)
    transposed = jax.linear_transpose(lambda w: _forward(x, w, strides, padding, ()), w)
    return transposed(g)[0]


def _bind(primitive: Primitive, a: jax.Array, b: jax.Array, **params: Any) -> jax.Array:
    return primitive.bind(*alike(a, b), **params)


def _forward_shape(x: Any, w: Any, strides: Any, padding: Any, size: Any) -> tuple[int, ...]:
    return x.shape[0], *_outputs(x.shape, w.shape, strides, padding), w.shape[3]


def _numbers(strides: Any, padding: Any, size: Any) -> dict[str, Any]:
    return {"strides": np.array(strides, np.int64), "padding": np.array(padding, np.int64).ravel()}


FORWARD = make("convolution_forward", _forward, _forward_shape, _numbers)
DATA = make(
    "convolution_data",
    _data,
    lambda g, w, size, **_: (g.shape[0], *size, w.shape[2]),
    _numbers,
)
WEIGHTS = make(
    "convolution_weights",
    _weights,
    lambda x, g, size, **_: (*size, x.shape[3], g.shape[3]),
    _numbers,
)


def _define_derivatives() -> None:
    """The rules get what is known, and of the argument to be transposed its shape."""

    def to_data(g: Any, w: Any, x: Any, p: Any) -> jax.Array:
        return _bind(DATA, g, w, **{**p, "size": tuple(x.aval.shape[1:3])})

    def to_weights(x: Any, g: Any, w: Any, p: Any) -> jax.Array:
        return _bind(WEIGHTS, x, g, **{**p, "size": tuple(w.aval.shape[:2])})

    def to_forward(x: Any, w: Any, p: Any) -> jax.Array:
        return _bind(FORWARD, x, w, **{**p, "size": ()})

    ad.defbilinear(
        FORWARD,
        lambda ct, x, w, **p: to_data(ct, w, x, p),
        lambda ct, x, w, **p: to_weights(x, ct, w, p),
    )
    ad.defbilinear(
        DATA,
        lambda ct, g, w, **p: to_forward(ct, w, p),
        lambda ct, g, w, **p: to_weights(ct, g, w, p),
    )
    ad.defbilinear(
        WEIGHTS,
        lambda ct, x, g, **p: to_data(g, ct, x, p),
        lambda ct, x, g, **p: to_forward(x, ct, p),
    )


_define_derivatives()
