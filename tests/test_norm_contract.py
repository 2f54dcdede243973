"""One contract over every kind of the table NORMS.

The lists below name the kinds that by definition do not fulfil a part of it, with the reason; what
holds for them instead is tested where the kind is.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from norm_tools import (
    BATCH,
    FEATURES,
    NEVER_MOVES,
    SHAPE,
    assert_close,
    assert_same_bits,
    call,
    fixed_context,
    numbers,
    options,
    random,
    random_params,
    side_inputs,
    site,
    site_call,
    start_params,
    start_state,
    step,
    warm_state,
)

from bnresearch import checkpoint, norm
from bnresearch.errors import UserError
from bnresearch.kind import keywords
from bnresearch.norm import CONTEXT, NORMS, Scope, page

SHAPES = [(BATCH, 4), (BATCH, 5, 4), (BATCH, 2, 2, 4), (BATCH, 2, 1, 2, 4)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

# One position per feature and example is one single value.
NEEDS_POSITIONS = {"instance", "batch_instance", "frn"}

# Their gradient in training is by definition not the derivative of what they compute.
NOT_THE_DERIVATIVE = {
    "stop_gradient": "the statistics of the batch count as constants",
    "renorm": "its corrections r and d count as constants",
    "mabn": "averages the statistics of the backward pass over past batches",
    "power": "averages the statistics of the backward pass over past batches",
    "online": "controls the gradient by what it has seen of past examples",
}

# What they keep of past batches counts as constant; the rest of their gradient is the derivative.
PAST_IS_CONSTANT = {"cross_iteration"}

# Their output at mean 1e4 and deviation 1 has no deviation of 1.
NOT_CENTRED = {
    "none": "passes its input on",
    "centre": "divides by nothing",
    "mean_only": "divides by nothing",
    "lp": "deviation 1 for normally distributed inputs only",
    "virtual": "deviation 1 for the reference batch",
    "noisy": "adds noise",
    "representative": "has a gate",
    "switchable": "its variance counts the differences of features and of examples, too",
    "frozen": "normalises with given statistics",
    "online": "normalises with past statistics",
    "scale_only": "subtracts nothing",
    "mabn": "subtracts nothing",
    "power": "subtracts nothing",
    "evonorm_b0": "subtracts nothing",
    "dyt": "saturates",
    "derf": "saturates",
    "rms": "subtracts nothing",
    "frn": "subtracts nothing",
    "evonorm_s0": "subtracts nothing",
    "proxy": "deviation 1 for normally distributed inputs only",
    "weight_norm": "normalises weights",
    "scaled_weight_standardisation": "normalises weights",
}

EVERY = sorted(NORMS)
every_kind = pytest.mark.parametrize("kind", EVERY)
masked_kinds = pytest.mark.parametrize("kind", [k for k in EVERY if "mask" in NORMS[k].context])
stateful_kinds = pytest.mark.parametrize("kind", [k for k in EVERY if NORMS[k].state])
batch_kinds = pytest.mark.parametrize("kind", [k for k in EVERY if NORMS[k].batch_dependent])
example_kinds = pytest.mark.parametrize("kind", [k for k in EVERY if not NORMS[k].batch_dependent])


def kept(state):
    """Running statistics as variables: what is there, by name."""
    return {} if state is None else {k: v for k, v in state._asdict().items() if v is not None}


def test_exceptions_name_kinds_of_the_table():
    for exceptions in (NEEDS_POSITIONS, NOT_THE_DERIVATIVE, PAST_IS_CONSTANT, NOT_CENTRED):
        assert set(exceptions) <= set(NORMS)


# ---- Shapes, dtypes, and when statistics move


@every_kind
def test_shapes_and_dtypes(kind):
    def trial(x):
        module, (args, given) = site(kind), site_call(kind, x)
        inputs = {name: value for name, value in given.items() if name != "rngs"}
        variables = module.init(jax.random.key(0), *args, **inputs)
        y, moved = module.apply(variables, *args, mutable=["batch_stats"], **given)
        return variables, y, moved

    for shape in SHAPES:
        for dtype in DTYPES:
            x = jax.ShapeDtypeStruct(shape, dtype)
            if kind in NEEDS_POSITIONS and len(shape) == 2:
                with pytest.raises(UserError, match="single value"):
                    jax.eval_shape(trial, x)
                continue
            variables, y, moved = jax.eval_shape(trial, x)
            assert (y.shape, y.dtype) == (shape, dtype)
            assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype("float32")}
            assert moved.get("batch_stats") == variables.get("batch_stats")  # shapes and dtypes


@every_kind
def test_integer_input_is_refused(kind):
    arrays = jnp.ones(SHAPE, jnp.int32), random_params(kind), start_state(kind)
    with pytest.raises(UserError, match="floating-point"):
        norm.apply(NORMS[kind], *arrays, fixed_context(kind) | side_inputs(kind), options(kind))


@every_kind
def test_initialisation_and_evaluation_move_nothing(kind):
    x = random() * 2 + 5
    args, given = site_call(kind, jnp.asarray(x))
    inputs = {name: value for name, value in given.items() if name != "rngs"}
    variables = site(kind).init(jax.random.key(0), *args, **inputs)
    wanted = start_params(kind)
    if NORMS[kind].linear_bias:
        wanted = {"bias": jnp.zeros(FEATURES)} | wanted
    assert_same_bits(variables.get("params", {}), wanted)
    stats = variables.get("batch_stats", {})
    assert_same_bits(stats, kept(start_state(kind)))

    _, still = site(kind, "running").apply(variables, *args, mutable=["batch_stats"], **inputs)
    assert_same_bits(still.get("batch_stats", {}), stats)
    y, moved = site(kind).apply(variables, *args, mutable=["batch_stats"], **given)
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} <= {jnp.dtype("float32")}
    assert_same_bits(site(kind).apply(variables, *args, **given), y)
    same = [np.array_equal(stats[name], moved["batch_stats"][name]) for name in stats]
    assert all(same) == (kind in NEVER_MOVES or not stats)


@every_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_computes_in_float32(kind, dtype):
    """The float32 result, rounded once; statistics as if the input had been float32."""
    x = jnp.asarray(random() + 3, dtype)
    half, single = call(kind, x), call(kind, x.astype(jnp.float32))
    assert half.y.dtype == half.dx.dtype == dtype
    rounding = jnp.finfo(dtype).eps / 2 * np.abs(single.y) + 2e-6 * np.abs(single.y).max()
    assert (np.abs(np.asarray(half.y, np.float32) - single.y) <= rounding).all()
    assert_close(half.new, single.new, 1e-6)


# ---- Numbers


@every_kind
def test_jit_equals_eager_and_repeats(kind):
    arrays = random(), random(seed=1), random_params(kind), warm_state(kind)
    jitted = call(kind, *arrays)  # float options are arguments of the compiled step,
    given = side_inputs(kind)
    eager = step(
        kind, "batch", Scope(), (), *jax.tree.map(jnp.asarray, arrays), {}, given
    )  # not here
    assert_close(jitted[:3], eager[:3], 1e-6)
    assert_close(jitted[3:], eager[3:], 1e-5)
    assert_same_bits(call(kind, *arrays), jitted)


@every_kind
def test_vmap_equals_a_loop(kind):
    seeds = [(random(seed=s), random(seed=s + 1), random_params(kind, s)) for s in (20, 30)]
    arrays = [(*seed, warm_state(kind)) for seed in seeds]
    given = side_inputs(kind)
    keys = [jax.random.key(s) for s in (1, 2)] if "rng" in given else [None, None]
    loop = [
        call(kind, *a, **({} if k is None else {"rng": k}))
        for a, k in zip(arrays, keys, strict=True)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    each = {name: 0 if name == "rng" else None for name in given}
    given |= {} if keys[0] is None else {"rng": jnp.stack(keys)}
    many = jax.vmap(functools.partial(step, kind, "batch", Scope(), ()), (0, 0, 0, 0, None, each))
    together = jax.jit(many)(*stacked, numbers(kind), given)
    for index, alone in enumerate(loop):
        assert_close(jax.tree.map(lambda a, i=index: a[i], together), alone, 2e-6)


@every_kind
@pytest.mark.parametrize("use", ["batch", "running"])
def test_float64_and_derivatives(kind, use):
    """Float32 against float64 of the same function, and its gradients against differences."""
    if use == "running" and "use" not in NORMS[kind].context:
        return
    arrays = random(), random(seed=1), random_params(kind), warm_state(kind)
    single = call(kind, *arrays, use=use)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), arrays)
        exact = call(kind, *double, use=use)
        if use == "running" or kind not in NOT_THE_DERIVATIVE:
            assert_derivatives(kind, use, double, exact)
    assert_close(single[:3], jax.tree.map(np.asarray, exact[:3]), 1e-6)
    assert_close(single[3:], jax.tree.map(np.asarray, exact[3:]), 1e-5)
    if use == "running":
        assert_same_bits(single.new, arrays[3])


def assert_derivatives(kind, use, arrays, exact):
    """The gradient by every array but the weights, along a random direction, against a central
    difference."""
    gradients = jax.tree.leaves((exact.dx, arrays[1], exact.dparams, exact.drunning))
    leaves, tree = jax.tree.flatten(arrays)
    state = len(gradients) - len(jax.tree.leaves(exact.drunning))
    h, weights = 1e-5, 1
    for index, gradient in enumerate(gradients):
        if index == weights or (index >= state and kind in PAST_IS_CONSTANT):
            continue
        direction = random(gradient.shape, 40 + index, np.float64)
        ends = []
        for side in (h, -h):
            moved = [*leaves[:index], leaves[index] + side * direction, *leaves[index + 1 :]]
            ends.append(float(call(kind, *jax.tree.unflatten(tree, moved), use=use).loss))
        terms = np.asarray(gradient * direction)
        tolerance = 1e-7 * max(np.abs(terms).sum(), 0.01)
        difference = (ends[0] - ends[1]) / (2 * h)
        assert terms.sum() == pytest.approx(difference, abs=tolerance), index


@every_kind
def test_mean_offset_does_not_cancel(kind):
    x = random() + np.float32(1e4)
    params = {k: np.ones_like(v) if k == "scale" else v for k, v in start_params(kind).items()}
    at_start = dict(params=params, running=start_state(kind))
    y = np.asarray(call(kind, x, **at_start).y, np.float64)
    with jax.enable_x64(True):
        # Where the few values of a set lie close together, the rounding of the mean shows.
        assert_close(y, np.asarray(call(kind, np.float64(x), **at_start).y), 2e-2)
    if kind not in NOT_CENTRED:
        assert y.std() == pytest.approx(1, abs=1e-3)


@every_kind
def test_whether_a_constant_per_feature_reaches_the_output(kind):
    """Where it does, the linear map in front keeps its bias."""
    constant = np.array([0.5, -1.0, 0.0, 2.0], np.float32)
    at_start = dict(params=start_params(kind), running=start_state(kind))
    y, shifted = (np.asarray(call(kind, random() + c, **at_start).y) for c in (0, constant))
    assert (np.abs(shifted - y).max() > 0.01) == NORMS[kind].linear_bias


# ---- Storage, options and docstrings


def variables(kind):
    return {"params": random_params(kind), "batch_stats": kept(warm_state(kind))}


def test_checkpoints_give_the_same_bits_back(tmp_path):
    saved = {
        part: {kind: variables(kind)[part] for kind in EVERY} for part in ("params", "batch_stats")
    }
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
    template = jax.tree.map(jnp.zeros_like, saved)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        number, restored = checkpoints.restore(template)
    assert number == 1
    assert_same_bits(restored, saved)
    assert_same_bits(serialization.from_bytes(template, serialization.to_bytes(saved)), saved)


class Noted(dict):
    """A dictionary that knows what it was asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.asked.add(name)
        return super().get(name, default)


@every_kind
def test_options_are_those_of_the_signature_and_none_is_idle(kind):
    entry = NORMS[kind]
    wanted = set(keywords(entry.function)) - set(CONTEXT)
    assert wanted <= set(entry.options)
    for name in wanted:
        default = inspect.signature(entry.function).parameters[name].default
        assert default in (inspect.Parameter.empty, entry.options[name]), name
    asked = Noted(options(kind))
    entry.params(FEATURES, asked)
    if entry.state is not None:
        entry.state(FEATURES, asked)
    assert set(entry.options) <= wanted | asked.asked


@every_kind
def test_docstring_is_a_page(kind):
    text = page(NORMS[kind]).text
    doc = inspect.getdoc(NORMS[kind].function)
    for heading in ("\nTraining: ", "\nInference: ", "\nPitfalls: ", "\nCitation: "):
        assert heading in doc, heading
    assert str(page(NORMS[kind]).year) in text[text.index("Citation: ") :]
    for name in set(NORMS[kind].options):
        assert name in doc, f"the docstring does not mention the option {name}"
    assert page(NORMS[kind]).formula.startswith("y = ")
