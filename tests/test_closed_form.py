"""The closed-form backward pass: its values, what it keeps and sends, and other derivatives."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norm_tools import fixed_context, options, random_params, side_inputs, warm_state

from bnresearch import norm
from bnresearch.layers import make_norm
from bnresearch.models.blocks import ACTIVATIONS
from bnresearch.norm import NORMS, Scope, Stats, batch_norm
from bnresearch.parallel import AXES, MODES, make_layout

FUSED = sorted(kind for kind in NORMS if "activation" in NORMS[kind].context)
SHAPE = (8, 3, 4)


def arrays(shape=SHAPE, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x, add, t = (rng.normal(size=shape).astype(dtype) for _ in range(3))
    scale, bias = rng.normal(size=(2, shape[-1])).astype(dtype)
    return x, add, t, scale, bias


def plain(x, scale, bias, axes=(0, 1), epsilon=1e-5):
    """Batch normalization and its statistics as anybody would write them, for jax to derive."""
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias, Stats(0.1 * mean, 0.1 * var + 0.9)


def ours(x, scale, bias, activation=None, add=None, scope=Scope(), mask=None):
    running = Stats(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
    given = dict(use="batch", activation=activation, add=add, scope=scope, mask=mask)
    return batch_norm(jnp.asarray(x), scale, bias, running, **given)


def close(actual, wanted, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), actual, wanted
    )


def losses(t):
    """The same loss of output and running statistics, for ours and for the plain function."""

    def weigh(y, new):
        return (jnp.tanh(y) * t).sum() + jnp.cos(new.mean).sum() + jnp.square(new.var).sum()

    return (
        lambda x, add, s, b: weigh(*ours(x, s, b, jax.nn.silu, add)),
        lambda x, add, s, b: (lambda y, new: weigh(jax.nn.silu(y + add), new))(*plain(x, s, b)),
    )


DERIVATIVES = {
    "reverse": lambda f, args, v: jax.grad(f, (0, 1, 2, 3))(*args),
    "forward": lambda f, args, v: jax.jvp(f, args, v)[1],
    "forward over reverse": lambda f, args, v: jax.jvp(jax.grad(f, (0, 1, 2, 3)), args, v)[1],
    "reverse over forward": lambda f, args, v: jax.grad(
        lambda *given: jax.jvp(f, given, v)[1], (0, 1, 2, 3)
    )(*args),
    "reverse over reverse": lambda f, args, v: jax.grad(
        lambda *given: sum(
            (g * d).sum() for g, d in zip(jax.grad(f, (0, 1, 2, 3))(*given), v, strict=True)
        ),
        (0, 1, 2, 3),
    )(*args),
}


@pytest.mark.parametrize("order", DERIVATIVES)
def test_derivatives_of_every_order_are_those_of_the_plain_formula(order):
    with jax.enable_x64(True):
        x, add, t, scale, bias = arrays(dtype=np.float64)
        direction = tuple(jnp.asarray(a) for a in arrays(seed=1, dtype=np.float64))
        args = tuple(jnp.asarray(a) for a in (x, add, scale, bias))
        direction = (direction[0], direction[1], direction[3], direction[4])
        actual, wanted = (
            jax.jit(lambda args, v, f=f: DERIVATIVES[order](f, args, v))(args, direction)
            for f in losses(t)
        )
        close(actual, wanted, 1e-8)  # the rate of running statistics is float32


def test_derivatives_at_an_offset_are_those_in_float64():
    x, add, t, scale, bias = arrays((64, 5, 4))
    x = x + np.float32(1e3)
    actual = jax.grad(losses(t)[0], (0, 1, 2, 3))(*map(jnp.asarray, (x, add, scale, bias)))
    with jax.enable_x64(True):
        args = (jnp.asarray(a, jnp.float64) for a in (x, add, scale, bias))
        wanted = jax.grad(losses(t)[1], (0, 1, 2, 3))(*args)
    close(actual, wanted, 3e-3)


def apply(kind, x, params, running, activation, add):
    context = fixed_context(kind) | side_inputs(kind) | dict(activation=activation, add=add)
    return norm.apply(NORMS[kind], x, params, running, context, options(kind)).y


@pytest.mark.parametrize("kind", FUSED)
def test_activation_and_addition_are_as_if_they_came_behind(kind):
    x, add, t, _, _ = arrays((8, 5, 4))
    params, running = jax.tree.map(jnp.asarray, (random_params(kind), warm_state(kind)))

    def fused(x, add, params):
        y = apply(kind, x, params, running, jax.nn.silu, add)
        return (y * t).sum(), y

    def behind(x, add, params):
        y = jax.nn.silu(apply(kind, x, params, running, None, None) + add)
        return (y * t).sum(), y

    results = (jax.grad(f, (0, 1, 2), has_aux=True)(x, add, params) for f in (fused, behind))
    close(*results, 2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_derived_where_it_is_applied(activation):
    x, add, t, scale, bias = arrays()
    act = ACTIVATIONS[activation]
    args = tuple(map(jnp.asarray, (x, add, scale, bias)))

    def fused(x, add, s, b):
        return (ours(x, s, b, act, add)[0] * t).sum()

    def behind(x, add, s, b):
        return (act(plain(x, s, b)[0] + add) * t).sum()

    close(*(jax.grad(f, (0, 1, 2, 3))(*args) for f in (fused, behind)), 2e-5)


@pytest.mark.parametrize("kind", ["batch", "ghost", "layer", "none"])
@pytest.mark.parametrize("use", ["batch", "running"])
def test_the_layer_applies_activation_and_addition_for_every_kind(kind, use):
    x, add, *_ = arrays()
    site = make_norm(kind, {"size": 4} if kind == "ghost" else {}, use=use)(name="norm1")
    variables = site.init(jax.random.key(0), x)
    behind = jax.nn.gelu(site.apply(variables, x, mutable=["batch_stats"])[0] + add)
    given = dict(activation=jax.nn.gelu, add=jnp.asarray(add), mutable=["batch_stats"])
    y = site.apply(variables, x, **given)[0]
    close(y, behind, 1e-6)


def kept(function, *args):
    """Bytes that the backward pass of a function keeps; shared buffers count once."""
    _, pull = jax.vjp(function, *args)
    leaves = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(pull)}
    return sum(leaves.values())


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_keeps_the_input_and_vectors(activation, dtype):
    x = jnp.asarray(arrays((32, 8, 8, 16))[0], dtype)
    scale, bias = jnp.ones(16), jnp.zeros(16)
    act = ACTIVATIONS[activation]
    theirs = nn.BatchNorm(use_running_average=False, dtype=dtype)
    variables = theirs.init(jax.random.key(0), x)

    def flax(x, params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return act(theirs.apply(given, x, mutable=["batch_stats"])[0])

    mine = kept(lambda x, s, b: ours(x, s, b, act)[0], x, scale, bias)
    assert x.nbytes < mine < x.nbytes + 10 * scale.nbytes
    assert mine <= 0.6 * kept(flax, x, variables["params"])


COLLECTIVE = (
    r"= .*?\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def messages(mode, scope, program):
    """How many collectives the compiled module of a program on eight devices has."""
    layout = make_layout(mode, scope, 8, 64)
    x, _, t, scale, bias = arrays((64, 3, 4))

    def step(state, feed, numbers, count):
        rows = layout.rows()
        return program(layout, state, *(layout.constrain(a[rows]) for a in feed))

    compiled = layout.compile(step, sharded_feed=False, donate=False)
    state, feed = layout.put((scale, bias)), layout.put((x, t))
    text = compiled.lower(state, feed, np.float32(0), np.float32(0)).compile().as_text()
    return len(re.findall(COLLECTIVE, text))


def sum_over(layout, mode, value):
    return jax.lax.psum(value, AXES) if mode == "shard_map" else layout.mean_over_devices(value)


# scope -> messages of a layer forward and backward; moving the running statistics once more where
# sets are smaller than the batch
MESSAGES = {"global": (1, 1), "group:2": (1, 1), "device": (0, 0), "ghost:4": (0, 0)}


@pytest.mark.parametrize("scope", MESSAGES)
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_sends_one_message_forward_and_one_backward(mode, scope):
    # Each program sends its result once more; nothing it needs is ready at the same time as it.
    def forward(layout, state, x, t):
        y, _ = ours(x, *state, jax.nn.relu, scope=layout.scope)
        return sum_over(layout, mode, (y * t).sum())

    def both(layout, state, x, t):
        def loss(x):
            return layout.mean_loss((ours(x, *state, jax.nn.relu, scope=layout.scope)[0] * t).sum())

        return sum_over(layout, mode, jnp.square(jax.grad(loss)(x)).sum())

    wanted_forward, wanted_backward = MESSAGES[scope]
    assert messages(mode, scope, forward) == wanted_forward + 1
    assert messages(mode, scope, both) == wanted_forward + wanted_backward + 1


@pytest.mark.parametrize("mode", MODES)
def test_one_message_is_exact_at_an_offset(mode):
    layout = make_layout(mode, "global", 8, 64)
    x = arrays((64, 4))[0] + np.float32(1e4)

    def step(state, feed, numbers, count):
        given = layout.constrain(feed[layout.rows()])
        return ours(given, None, None, scope=layout.scope)[1].var

    run = layout.compile(step, sharded_feed=False, donate=False)
    var = layout.get(run(layout.put(()), layout.put(x), np.float32(0), np.float32(0)))
    close(var, 0.9 + 0.1 * x.astype(np.float64).var(0), 1e-4)
