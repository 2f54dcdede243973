"""Kinds that whiten: besides mean and variance of each feature, correlations are taken away."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnresearch.errors import UserError, lookup
from bnresearch.kinds.batch import affine, batch_moments
from bnresearch.sets import Scope, Sets, Stats

METHODS = ("zca", "pca")
TRACKS = ("whitening", "covariance")
PRECISION = jax.lax.Precision.HIGHEST  # products of matrices in full float32 on accelerators, too


class Whitening(NamedTuple):
    """Running mean (``[features]``), and running whitening matrices or covariances of the groups
    (``[groups, size, size]``)."""

    mean: jax.Array
    matrix: jax.Array


def group_length(features: int, features_per_group: int) -> int:
    """Features per group: ``features_per_group``, or all of them where there are fewer.

    Raises:
      UserError: the number of features is no multiple.
    """
    size = min(features_per_group, features)
    if size < 1 or features % size:
        divisors = [n for n in range(1, features + 1) if features % n == 0]
        raise UserError(
            f"features_per_group={features_per_group} of a whitening norm on {features} features: "
            f"they do not divide; choose one of {', '.join(map(str, divisors))}"
        )
    return size


def whitening_start(features: int, options: Mapping[str, Any]) -> Whitening:
    """Mean 0, identity matrices."""
    size = group_length(features, options["features_per_group"])
    return Whitening(jnp.zeros(features), jnp.tile(jnp.eye(size), (features // size, 1, 1)))


def _rows(sets: Sets, values: jax.Array, splits: int, size: int) -> jax.Array:
    """``[sets, values, groups, size]``; zeros where the mask leaves values out."""
    if sets.mask is not None:
        values = jnp.where(sets.mask, values, 0)
    return values.reshape(splits, -1, values.shape[-1] // size, size)


def _covariance(sets: Sets, centred: jax.Array, scope: Scope, size: int) -> jax.Array:
    """Biased covariances of the groups in each set, ``[sets, groups, size, size]``: products of
    what is centred with the merged mean, summed over the merged devices."""
    if sets.mask is not None and sets.mask.shape[-1] != 1:
        raise UserError(
            "whitening takes a mask of examples or positions, not one per feature: a covariance "
            "needs both of its features"
        )
    rows = _rows(sets, centred, scope.splits, size)
    total = jnp.einsum("sngi,sngj->sgij", rows, rows, precision=PRECISION)
    if scope.merge is not None:
        total = jax.lax.psum(total, scope.merge, axis_index_groups=scope.merge_groups)
    count = jnp.asarray(sets.count, total.dtype).reshape(-1, 1, 1, 1)
    return total / jnp.maximum(count, 1)


def _between(sets: Sets, mean: jax.Array, scope: Scope, size: int) -> jax.Array:
    """What the spread of the sets' means adds to the covariance of the whole batch."""
    away = mean.reshape(scope.splits, -1) - sets.batch_mean(mean)
    away = away.reshape(scope.splits, -1, size)
    return away[..., :, None] * away[..., None, :]


def _rotate(centred: jax.Array, matrix: jax.Array) -> jax.Array:
    """The groups of features times the matrices ``[sets, groups, size, size]``."""
    sets, _, size, _ = matrix.shape
    rows = centred.reshape(sets, -1, centred.shape[-1] // size, size)
    product = jnp.einsum("sgij,sngj->sngi", matrix, rows, precision=PRECISION)
    return product.reshape(centred.shape)


def _whiten(
    whitening: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Whitening,
    *,
    use: str,
    decay: Any,
    epsilon: Any,
    features_per_group: int,
    track: str,
    on_single: str,
    scope: Scope,
    mask: Any,
) -> tuple[jax.Array, Whitening]:
    """Both kinds; ``whitening`` makes whitening matrices of covariances ``[..., size, size]``."""
    lookup(dict.fromkeys(TRACKS), track, "track of a whitening norm")
    size = group_length(x.shape[-1], features_per_group)

    def matrix_of(covariance: jax.Array) -> jax.Array:
        return whitening(covariance + epsilon * jnp.eye(size, dtype=covariance.dtype))

    if use == "running":
        sets = Sets(x)
        matrix = running.matrix if track == "whitening" else matrix_of(running.matrix)
        y = _rotate(sets.x - running.mean, matrix[None])
        return sets.join(affine(y, scale, bias)), running
    stats_before = Stats(running.mean, jnp.ones_like(running.mean))
    sets, centred, stats = batch_moments(
        x, stats_before, scope=scope, mask=mask, on_single=on_single
    )
    covariance = _covariance(sets, centred, scope, size)
    matrix = matrix_of(covariance)
    if sets.mask is not None:
        matrix = _without_values(sets, matrix, running.matrix, track, matrix_of, on_single)
    y = sets.join(affine(_rotate(centred, matrix), scale, bias))
    tracked = matrix
    if track == "covariance":
        tracked = covariance + _between(sets, stats.mean, scope, size)
    rate = (1 - decay) * jnp.asarray(sets.batch_count() > 0, centred.dtype).max()
    mean = sets.batch_mean(stats.mean)
    whole = sets.batch_mean(tracked).reshape(running.matrix.shape)
    return y, Whitening(
        (1 - rate) * running.mean + rate * mean, (1 - rate) * running.matrix + rate * whole
    )


def _without_values(
    sets: Sets,
    matrix: jax.Array,
    running: jax.Array,
    track: str,
    matrix_of: Callable[[jax.Array], jax.Array],
    on_single: str,
) -> jax.Array:
    """The running matrix for sets without a value; NaN for those of one, which only the compiled
    program knows (see `batch_moments`)."""
    count = sets.count.reshape(-1, 1, 1, 1)
    instead = running if track == "whitening" else matrix_of(running)
    matrix = jnp.where(count == 0, instead, matrix)
    return jnp.where(count == 1, jnp.nan, matrix) if on_single == "error" else matrix


@jax.custom_jvp
def inverse_root(matrix: jax.Array) -> jax.Array:
    """``matrix^(-1/2)`` of symmetric positive matrices ``[..., n, n]``.

    Its derivative is written without the gaps between eigenvalues that the derivatives of
    eigenvectors divide by: it is finite and right for equal eigenvalues, too (once; the second
    derivative goes through the eigenvectors).
    """
    values, vectors = _eigenpairs(matrix)
    return _around(vectors, jax.lax.rsqrt(values)[..., None, :] * jnp.eye(values.shape[-1]))


@inverse_root.defjvp
def _inverse_root_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    values, vectors = _eigenpairs(primals[0])
    root = jnp.sqrt(values)
    left, right = root[..., :, None], root[..., None, :]
    # (1 / left - 1 / right) / (left^2 - right^2), with the gap cancelled.
    slope = -1 / (left * right * (left + right))
    inner = _around(jnp.swapaxes(vectors, -1, -2), tangents[0])
    out = _around(vectors, jax.lax.rsqrt(values)[..., None, :] * jnp.eye(values.shape[-1]))
    return out, _around(vectors, slope * (inner + jnp.swapaxes(inner, -1, -2)) / 2)


def _around(vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    """``vectors @ matrix @ vectors^T``."""
    return jnp.einsum("...ij,...jk,...lk->...il", vectors, matrix, vectors, precision=PRECISION)


def _eigenpairs(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, kept above rounding, and eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    floor = jnp.finfo(values.dtype).eps * values[..., -1:]
    return jnp.maximum(values, floor), vectors


@jax.custom_jvp
def _stable_eigenpairs(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_eigenpairs` with a derivative that stays finite."""
    return _eigenpairs(matrix)


@_stable_eigenpairs.defjvp
def _stable_eigenpairs_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[Any, Any]:
    values, vectors = _eigenpairs(primals[0])
    inner = _around(jnp.swapaxes(vectors, -1, -2), tangents[0])
    inner = (inner + jnp.swapaxes(inner, -1, -2)) / 2
    gap = values[..., None, :] - values[..., :, None]
    rounding = 10 * jnp.finfo(values.dtype).eps * values[..., -1:, None]
    slope = gap / (jnp.square(gap) + jnp.square(rounding))
    turned = jnp.einsum("...ij,...jk->...ik", vectors, slope * inner, precision=PRECISION)
    return (values, vectors), (jnp.diagonal(inner, axis1=-2, axis2=-1), turned)


def _principal(matrix: jax.Array) -> jax.Array:
    """Rows: eigenvectors over the roots of their eigenvalues, largest first. The largest component
    of each is positive, so that it does not flip from batch to batch."""
    values, vectors = _stable_eigenpairs(matrix)
    largest = jnp.abs(vectors).argmax(-2, keepdims=True)
    sign = jnp.sign(jnp.take_along_axis(vectors, largest, axis=-2))
    rows = vectors * (jax.lax.stop_gradient(sign) * jax.lax.rsqrt(values)[..., None, :])
    return jnp.swapaxes(rows[..., ::-1], -1, -2)


def decorrelated_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Whitening,
    *,
    use: str,
    method: str = "zca",
    features_per_group: int = 16,
    track: str = "whitening",
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Whitening]:
    """Decorrelated batch normalization (Huang, Yang, Lang & Deng, 2018).

        y = scale * C^(-1/2) (x - m) + bias,  C = E[(x - m) (x - m)^T] + epsilon * I

    m and C are mean and biased covariance of the features in each group of ``features_per_group``
    contiguous ones, over all other axes, merged over devices and sets like the moments of batch
    norm. x is ``[batch, ..., features]``; scale, bias and the running mean are ``[features]``, the
    running matrix is ``[groups, size, size]``, float32.

    Training: the output of a group has the identity as covariance. The gradient flows through the
    eigenvalues; for zca it does not divide by the gaps between them.
    Inference: with the running mean and the running whitening matrix.
    Options: ``method`` zca (C^(-1/2), the whitening that changes x least) or pca (onto the
    principal axes, largest first); ``features_per_group``, or all features where there are fewer;
    ``track`` whitening (average of the matrices that whitened) or covariance (average of C,
    whitened at inference: the only one for pca); ``decay`` of the running statistics; ``on_single``
    error, warn or beta; ``scale`` and ``bias`` false to leave them out. A mask leaves positions
    out.
    Pitfalls: needs many more values than ``features_per_group``: with fewer, C is singular and
    epsilon decides. pca swaps and turns axes from one batch to the next, which keeps networks from
    learning (the paper's stochastic axis swapping), and its gradient is huge where two eigenvalues
    are nearly equal: it is cut off at rounding. An eigendecomposition per group and step is slow on
    accelerators.
    Citation: Huang, Yang, Lang & Deng (2018), Decorrelated Batch Normalization, CVPR,
    arXiv:1804.08450.

    Raises:
      UserError: a group size that does not divide the features; pca with track="whitening"; batch
        statistics over one single value; integer input; a mask or sets that do not fit.
    """
    lookup(dict.fromkeys(METHODS), method, "norm.decorrelated.method")
    if method == "pca" and track == "whitening":
        raise UserError(
            "norm.decorrelated.method=pca swaps axes from batch to batch, so an average of its "
            "matrices means nothing; set norm.decorrelated.track=covariance"
        )
    return _whiten(
        inverse_root if method == "zca" else _principal,
        x,
        scale,
        bias,
        running,
        use=use,
        decay=decay,
        epsilon=epsilon,
        features_per_group=features_per_group,
        track=track,
        on_single=on_single,
        scope=scope,
        mask=mask,
    )


def _newton(iterations: int, matrix: jax.Array) -> jax.Array:
    """``matrix^(-1/2)`` by Newton's iteration from the identity, on the matrix over its trace.

    ``P <- (3 P - P^3 C) / 2`` amplifies rounding and diverges beyond some ten steps. The same P
    comes out of a pair, P and its approximation of ``C^(1/2)``, which does not.
    """
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
    product = functools.partial(jnp.matmul, precision=PRECISION)
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    inverse, root = jnp.broadcast_to(identity, matrix.shape), matrix / trace
    for _ in range(iterations):
        step = 1.5 * identity - 0.5 * product(inverse, root)
        inverse, root = product(step, inverse), product(root, step)
    return inverse * jax.lax.rsqrt(trace)


def iterative_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: Whitening,
    *,
    use: str,
    iterations: int = 5,
    features_per_group: int = 64,
    track: str = "whitening",
    decay: Any = 0.9,
    epsilon: Any = 1e-5,
    on_single: str = "error",
    scope: Scope = Scope(),
    mask: Any = None,
) -> tuple[jax.Array, Whitening]:
    """Iterative normalization (Huang, Zhou, Zhu, Liu & Shao, 2019).

        y = scale * P_T / sqrt(tr C) (x - m) + bias,  C = E[(x - m) (x - m)^T] + epsilon * I
        P_0 = I,  P_{k+1} = (3 P_k - P_k^3 C / tr C) / 2,  T = iterations

    Decorrelated batch norm whose C^(-1/2) comes from a few steps of Newton's method: products of
    matrices only, and directions of small variance are whitened less, the fewer steps the less. m
    and C as there, per group of ``features_per_group`` contiguous features. x is ``[batch, ...,
    features]``; scale, bias and the running mean are ``[features]``, the running matrix is
    ``[groups, size, size]``, float32.

    Training: as above; the gradient flows through all iterations.
    Inference: with the running mean and the running whitening matrix.
    Options: ``iterations``; ``features_per_group``, or all features where there are fewer;
    ``track`` whitening (average of the matrices that whitened) or covariance (average of C,
    whitened at inference); ``decay`` of the running statistics; ``on_single`` error, warn or beta;
    ``scale`` and ``bias`` false to leave them out. A mask leaves positions out of the statistics.
    Pitfalls: needs many more values than ``features_per_group``. After 5 iterations eigenvalues far
    below the trace are not whitened yet: the output's variance is below 1, the more so the larger
    the group (with one feature per group it is 1). More iterations come close to decorrelated norm.
    Citation: Huang, Zhou, Zhu, Liu & Shao (2019), Iterative Normalization: Beyond Standardization
    towards Efficient Whitening, CVPR, arXiv:1904.03441.

    Raises:
      UserError: a group size that does not divide the features; batch statistics over one single
        value; integer input; a mask or sets that do not fit.
    """
    return _whiten(
        functools.partial(_newton, iterations),
        x,
        scale,
        bias,
        running,
        use=use,
        decay=decay,
        epsilon=epsilon,
        features_per_group=features_per_group,
        track=track,
        on_single=on_single,
        scope=scope,
        mask=mask,
    )
