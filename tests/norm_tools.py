"""What the tests of norms share: every kind of the table as one call on small arrays."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnresearch import norm
from bnresearch.layers import make_norm
from bnresearch.norm import NORMS, Scope
from bnresearch.sets import wide
from bnresearch.sites import standard

BATCH, POSITIONS, FEATURES = 8, 5, 4
SHAPE = (BATCH, POSITIONS, FEATURES)

# Options that fit 8 examples of 4 features and two or three steps, of whatever kind has them.
SMALL = dict(
    groups=2,
    size=2,
    examples_per_group=2,
    reference=4,
    features_per_group=2,
    domains=3,
    conditions=2,
    steps=3,
    window=3,
    warm_up=1,
    r_after=1,
    r_ramp=4,
    d_ramp=4,
    compensation="none",  # the other needs a linear map in front
    # Noise drawn for each value is another one on every device and for every shape.
    shift_jitter=0.0,
    stretch_jitter=0.0,
)

# Side inputs for 8 examples, of the kinds that ask for them.
SIDE = dict(domain=1, time=2, condition=np.random.default_rng(8).normal(size=(8, 2)).astype("f"))

# Their running statistics are given, and stay.
NEVER_MOVES = {"frozen"}


def options(kind, **changed):
    """All options of a kind, small enough for these arrays."""
    small = {name: value for name, value in SMALL.items() if name in NORMS[kind].options}
    return standard(kind, small | changed)


def numbers(kind, dtype=jnp.float32):
    """Its float options, as arrays."""
    return {k: jnp.asarray(v, dtype) for k, v in options(kind).items() if isinstance(v, float)}


def random(shape=SHAPE, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def start_params(kind, features=FEATURES):
    return NORMS[kind].params(features, options(kind))


def start_state(kind, features=FEATURES):
    state = NORMS[kind].state
    return None if state is None else state(features, options(kind))


def random_params(kind, seed=5):
    """Parameters all away from where they start, and from the bounds of those that have any."""
    rng = np.random.default_rng(seed)
    start = start_params(kind)
    if "gate" in start:  # of [0, 1]
        start = start | {"gate": np.full_like(start["gate"], 0.5)}
    return {k: jnp.asarray(v + 0.3 * rng.normal(size=v.shape), v.dtype) for k, v in start.items()}


def side_inputs(kind, batch=BATCH, use="batch"):
    """What the kind asks for besides x: random key (in training), domain, condition, time step."""
    wanted = NORMS[kind].context
    given = {k: v for k, v in SIDE.items() if k in wanted}
    if "condition" in given:
        given["condition"] = np.tile(given["condition"], (-(-batch // BATCH), 1))[:batch]
    if "rng" in wanted and use == "batch":
        given["rng"] = jax.random.key(7)
    return given


def fixed_context(kind, use="batch", scope=Scope()):
    """The context that is no array."""
    activates = NORMS[kind].activates
    nothing = dict.fromkeys(("mask", "rng", "domain", "condition", "time", "linear"))
    return nothing | {"use": use, "scope": scope, "activates": activates}


class Step(NamedTuple):
    """What one training step sees of a kind: its results, and the gradient of the loss (a weighted
    sum of the output, and the penalty) by input, parameters and running statistics."""

    loss: Any
    y: Any
    new: Any
    dx: Any
    dparams: Any
    drunning: Any


def step(kind, use, scope, changed, x, weights, params, running, numbers, given):
    chosen = options(kind, **dict(changed))

    def loss_of(x, params, running):
        context = fixed_context(kind, use, scope) | given
        result = norm.apply(NORMS[kind], x, params, running, context, chosen | numbers)
        loss = (wide(result.y) * weights).sum()
        if result.penalty is not None:
            loss = loss + result.penalty
        return loss, result

    value = jax.value_and_grad(loss_of, (0, 1, 2), has_aux=True)
    (loss, result), gradients = value(x, params, running)
    return Step(loss, result.y, result.running, *gradients)


@functools.cache
def compiled(kind, use="batch", scope=Scope(), changed=()):
    """``(x, weights, params, running, numbers, given) -> Step``, compiled once for all tests;
    ``changed`` are options, as pairs."""
    return jax.jit(functools.partial(step, kind, use, scope, changed))


def call(kind, x, weights=None, params=None, running=None, use="batch", changed=(), **given):
    """One compiled step, with what is not given filled in; in the precision of x."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    weights = random(x.shape, 1) if weights is None else weights
    params = random_params(kind) if params is None else params
    running = warm_state(kind) if running is None else running
    arrays = jax.tree.map(lambda a: jnp.asarray(a, dtype), (weights, params, running))
    given = side_inputs(kind, len(x), use) | given
    return compiled(kind, use, changed=changed)(
        jnp.asarray(x), *arrays, numbers(kind, dtype), given
    )


@functools.cache
def warm_state(kind):
    """Running statistics after two steps, those of the backward pass moved, too."""
    running = start_state(kind)
    if running is None:
        return None
    with jax.enable_x64(False):
        for seed in (11, 12):
            out = call(kind, random(seed=seed), running=running)
            running = moved_backward(out.new, out.drunning)
    return jax.tree.map(np.asarray, running)


def moved_backward(running, cotangent):
    """Entries named ``backward_...`` take the step that their cotangent is."""
    moved = {
        name: value + getattr(cotangent, name)
        for name, value in running._asdict().items()
        if name.startswith("backward_")
    }
    return running._replace(**moved)


def site(kind, use="batch", **changed):
    """The linen module of one site."""
    return make_norm(kind, options(kind, **changed), use=use)(
        name="norm", activation_follows=NORMS[kind].activates
    )


def site_call(kind, x):
    """Arguments of ``module.apply`` after the variables: input, side inputs, random keys."""
    given = side_inputs(kind, len(x))
    key = given.pop("rng", None)
    return (x,), given | ({} if key is None else {"rngs": {"norm": key}})


def assert_close(actual, wanted, tolerance):
    """Trees with leaves within ``tolerance`` relative to the largest value of each leaf (or to 0.1,
    where rounding of the inputs, which are around 1, is all there is)."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    named = jax.tree_util.tree_leaves_with_path(actual)
    for (path, a), b in zip(named, jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, path
        error = np.abs(a - b).max(initial=0)
        scale = max(np.abs(b).max(initial=0), 0.1)
        assert error <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {error / scale:.2e}"


def assert_same_bits(actual, wanted):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
