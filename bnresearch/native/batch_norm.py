"""BatchNorm with what stands behind it, in the fewest passes over the data, on CPUs.

XLA sums columns of an array well as long as nothing but the array is summed: behind a ReLU its
backward pass takes up to ten times as long as reading the values. The library reads them once for
the moments, once for the output, and twice for the gradient: for its two sums, and for itself.

With ``centred = x - m``, ``a = scale / sqrt(v + epsilon)`` and y > 0 standing for "everywhere"
where there is no ReLU, the tangent of ``y = relu(centred * a + b + added)`` is

    [y > 0] * (a dx - a dm + centred * (da - a dv / (2 (v + epsilon))) + db + dadded),
    dm = mean(dx),  dv = 2 mean(centred * dx),

one primitive, linear in the tangents, whose transpose is the closed form of the backward pass: for
a gradient g of y, ``s = sum [y > 0] g`` and ``t = sum [y > 0] g * centred`` are those of b and a,
and with those of m and v, ``c = gm - a s`` and ``d = gv - a t / (2 (v + epsilon))``,

    [y > 0] * a * g + c / n + 2 * d / n * centred

is that of x. Derivatives of any order and mode are those of these formulae in jax's words.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from bnresearch.native.primitive import alike, make

# Below so many values the calls cost more than the passes that they save.
SMALLEST = 1 << 15


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: Any,
    added: jax.Array | None = None,
    relu: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(x - m) / sqrt(v + epsilon) * scale + bias + added``, or the positive part of that, with
    mean and biased variance of each set.

    Args:
      x: float32 ``[sets, values, features]``.
      scale, bias: float32 ``[sets, features]``.
      epsilon: a number.
      added: of the shape of x, or None.
      relu: whether ReLU follows.

    Returns:
      y, like x; m and v, ``[sets, features]``. For the backward pass x, vectors, and
      with ReLU what was added are kept.
    """
    arrays = [x, scale, bias, jnp.asarray(epsilon, x.dtype)]
    return _batch_norm(relu, *alike(*arrays, *([] if added is None else [added])))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(
    relu: bool, x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: jax.Array, *added: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    m, v = MOMENTS.bind(x)
    y = APPLY.bind(x, m, scale * jax.lax.rsqrt(v + epsilon), bias, *added, relu=relu)
    return y, m, v


@_batch_norm.defjvp
def _batch_norm_jvp(relu: bool, primals: Any, tangents: Any) -> Any:
    x, scale, bias, epsilon, *added = primals
    tx, tscale, tbias, tepsilon, *tadded = tangents
    y, m, v = _batch_norm(relu, *primals)
    inverse = jax.lax.rsqrt(v + epsilon)
    a, half = scale * inverse, jnp.square(inverse) / 2
    ta = inverse * tscale - a * half * tepsilon
    known = [x, m, a, half, bias, *(added if relu else [])]
    ty, tm, tv = TANGENT.bind(*known, tx, ta, tbias, *tadded, relu=relu, add=bool(added))
    return (y, m, v), (ty, tm, tv)


# What the primitives compute. Vectors are [sets, features]; a leading axis of length 1 would make
# XLA's sums twice as slow.


def _sum(x: jax.Array) -> jax.Array:
    return x[0].sum(0)[None] if len(x) == 1 else x.sum(1)


def _moments(x: jax.Array) -> jax.Array:
    m = _sum(x) / x.shape[1]
    return jnp.stack([m, _sum(jnp.square(x - m[:, None])) / x.shape[1]])


def _apply(
    x: jax.Array, m: jax.Array, a: jax.Array, b: jax.Array, *added: jax.Array, relu: bool
) -> jax.Array:
    y = (x - m[:, None]) * a[:, None] + b[:, None]
    y = y + added[0] if added else y
    return jax.nn.relu(y) if relu else y


def _through(g: jax.Array, *affine: jax.Array, relu: bool) -> jax.Array:
    return jnp.where(_apply(*affine, relu=False) > 0, g, 0) if relu else g


def _sums(
    x: jax.Array, g: jax.Array, m: jax.Array, a: jax.Array, b: jax.Array, *added: Any, relu: bool
) -> jax.Array:
    g = _through(g, x, m, a, b, *added, relu=relu)
    return jnp.stack([_sum(g), _sum((x - m[:, None]) * g)])


def _spread(
    x: jax.Array,
    g: jax.Array,
    m: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *added: jax.Array,
    relu: bool,
) -> list[jax.Array]:
    g = _through(g, x, m, a, b, *added, relu=relu)
    dx = g * a[:, None] + c[:, None] + (x - m[:, None]) * d[:, None]
    return [dx, g] if added else [dx]


def _tangent(
    x: jax.Array,
    m: jax.Array,
    a: jax.Array,
    half: jax.Array,
    b: jax.Array,
    *rest: jax.Array,
    relu: bool,
    add: bool,
) -> list[jax.Array]:
    """``rest``: what was added, if ReLU follows; then the tangents of x, a, b and of the added."""
    added, (tx, ta, tb, *tadded) = _apart(rest, relu, add)
    centred, n = x - m[:, None], x.shape[1]
    tm, tv = _sum(tx) / n, _sum(centred * tx) * (2 / n)
    ty = a[:, None] * tx + centred * (ta - a * half * tv)[:, None] + (tb - a * tm)[:, None]
    ty = ty + tadded[0] if add else ty
    return [_through(ty, x, m, a, b, *added, relu=relu), tm, tv]


def _apart(rest: tuple[Any, ...], relu: bool, add: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    known = int(relu and add)
    return rest[:known], rest[known:]


def _transpose(
    cotangents: Any, x: Any, m: Any, a: Any, half: Any, b: Any, *rest: Any, relu: bool, add: bool
) -> list[Any]:
    """The closed form at the top of this file; None for what is known."""
    known, linear = _apart(rest, relu, add)
    wanted = [ad.is_undefined_primal(t) for t in linear]
    g, gm, gv = (ad.instantiate_zeros(ct) for ct in cotangents)
    x, g, m, a, half, b, gm, gv, *added = alike(x, g, m, a, half, b, gm, gv, *known)
    s, t = SUMS.bind(x, g, m, a, b, *added, relu=relu)
    c, d = (gm - a * s) / x.shape[1], (gv - a * half * t) * (2 / x.shape[1])
    dx, *dadded = SPREAD.bind(x, g, m, a, b, c, d, *added, relu=relu)
    found = [dx, t, s, *(dadded or [g] * add)]
    found = [value if want else None for value, want in zip(found, wanted, strict=True)]
    return [None] * (5 + len(added)) + found


def _vectors(x: Any, *_: Any, **__: Any) -> tuple[int, ...]:
    return 2, x.shape[0], x.shape[2]


MOMENTS = make("norm_moments", _moments, _vectors)
APPLY = make("norm_apply", _apply, lambda x, *_, **__: x.shape, dict)
SUMS = make("norm_sums", _sums, _vectors, dict)
SPREAD = make(
    "norm_spread",
    _spread,
    lambda x, g, m, a, b, c, d, *added, relu: [x.shape] * (1 + len(added)),
    dict,
    multiple=True,
)
TANGENT = make("", _tangent, lambda x, m, *_, **__: [x.shape, m.shape, m.shape], multiple=True)
ad.primitive_transposes[TANGENT] = _transpose
