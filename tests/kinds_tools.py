"""What the tests of the batch family share: arrays, float64 formulae, and comparisons."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from bnresearch.kinds import ablations, variants
from bnresearch.sets import Stats

EPSILON, DECAY = 1e-5, 0.9
SCALE, BIAS = np.array([1.0, -2.0, 3.0, 0.5]), np.array([0.0, 0.5, -1.0, 2.0])
MEAN, VAR = np.array([0.3, -0.2, 0.0, 1.0]), np.array([0.8, 1.5, 1.0, 0.25])
AFFINE = {"scale": jnp.float32(SCALE), "bias": jnp.float32(BIAS)}
RUNNING = Stats(jnp.float32(MEAN), jnp.float32(VAR))
LATE = variants.Renormed(*RUNNING, jnp.float32(1e6))  # long after the schedule


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 1.5 + 0.4


def lp(centred, p):
    constant = (np.sqrt(np.pi) / (2 ** (p / 2) * special.gamma((p + 1) / 2))) ** (1 / p)
    return constant * (np.abs(centred) ** p).mean(0) ** (1 / p)


def renormed(z, m, v):
    s, rs = np.sqrt(v + EPSILON), np.sqrt(VAR + EPSILON)
    return (z - m) / s * np.clip(s / rs, 1 / 1.1, 1.1) + np.clip((m - MEAN) / rs, -0.2, 0.2)


# name: function, options, the output before the affine from (values, mean, "variance"), and the
# "variance" that this kind keeps, of values about a mean (None: the variance).
KINDS = {
    "centre": (ablations.centre_norm, {}, lambda z, m, v: z - m, None),
    "scale_only": (
        ablations.scale_only_norm,
        {},
        lambda z, m, v: z / np.sqrt(m**2 + v + EPSILON),
        None,
    ),
    "stop_gradient": (
        ablations.stop_gradient_norm,
        {},
        lambda z, m, v: (z - m) / np.sqrt(v + EPSILON),
        None,
    ),
    "lp": (
        ablations.lp_norm,
        {},
        lambda z, m, v: (z - m) / np.sqrt(v + EPSILON),
        lambda centred: lp(centred, 1) ** 2,
    ),
    "lp_3": (
        ablations.lp_norm,
        {"p": 3.0},
        lambda z, m, v: (z - m) / np.sqrt(v + EPSILON),
        lambda centred: lp(centred, 3) ** 2,
    ),
    "extended": (
        variants.extended_norm,
        {},
        lambda z, m, v: (z - m) / np.sqrt(v.mean() + EPSILON),
        None,
    ),
    "renorm": (variants.batch_renorm, {"decay": DECAY, "r_max": 1.1, "d_max": 0.2}, renormed, None),
    "regularized": (
        variants.regularized_norm,
        {},
        lambda z, m, v: (z - m) / np.sqrt(v + EPSILON),
        None,
    ),
}


def call(kind, x, use="batch", **changes):
    function, options, _, _ = KINDS[kind]
    running = changes.pop("running", LATE if kind == "renorm" else RUNNING)
    return function(jnp.asarray(x), **AFFINE, running=running, use=use, **options, **changes)[:2]


def moments(kind, values, mean=None):
    measure = KINDS[kind][3] or (lambda centred: (centred**2).mean(0))
    mean = values.mean(0) if mean is None else mean
    return mean, measure(values - mean)


def expected(kind, x, counted, splits=1):
    """Output and new running statistics; ``counted`` says which positions count."""
    normalised = KINDS[kind][2]
    y = [
        normalised(values.reshape(-1, 4), *moments(kind, values[rows]))
        for values, rows in zip(np.split(x, splits), np.split(counted, splits), strict=True)
    ]
    m, v = moments(kind, x[counted])
    mean = DECAY * MEAN + (1 - DECAY) * m
    if kind == "scale_only":  # mean^2 + var averages E[x^2]
        var = DECAY * (VAR + MEAN**2) + (1 - DECAY) * (v + m**2) - mean**2
    elif kind == "renorm":  # the deviation is averaged
        deviation = DECAY * np.sqrt(VAR + EPSILON) + (1 - DECAY) * np.sqrt(v + EPSILON)
        var = deviation**2 - EPSILON
    else:
        var = DECAY * VAR + (1 - DECAY) * v
    return np.concatenate(y).reshape(x.shape) * SCALE + BIAS, Stats(mean, var)


def assert_close(actual, wanted, tolerance=2e-6):
    """Within ``tolerance``, relative to the largest value."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max()


def assert_all_close(actual, wanted, tolerance=2e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(partial(assert_close, tolerance=tolerance), actual, wanted)
