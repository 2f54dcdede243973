"""BatchNorm by the library of C++: values, derivatives, and where XLA goes on without it."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnresearch import native
from bnresearch.config import default_config
from bnresearch.kinds import batch
from bnresearch.native import batch_norm as fused
from bnresearch.native import build
from bnresearch.norm import Scope, Stats, batch_norm
from bnresearch.step import build_model

MARK = "bnresearch_norm"  # in the text of a program that calls the library
EPSILON = 1e-3


@pytest.fixture(autouse=True)
def library():
    """Skips where the extra cpu or a compiler is missing."""
    loaded = build.load()
    if isinstance(loaded, build.Missing):
        pytest.skip(str(loaded))


@pytest.fixture
def every_size(monkeypatch):
    monkeypatch.setattr(batch, "SMALLEST", 1)


class Case(NamedTuple):
    """Sets, values of each, features; what follows."""

    sets: int
    values: int
    features: int
    relu: bool = False
    add: bool = False


# Features below, at, above and beside the 16 of a vector; rows that leave a rest. The last two are
# several blocks for several threads, the one of several sets.
SIZES = [(1, 700, 16), (2, 513, 7), (1, 64, 100), (3, 40, 1030), (1, 70000, 1), (2, 9000, 40)]
CASES = [
    Case(*size, relu, add) for size in SIZES for relu in (False, True) for add in (False, True)
]


def arrays(case, seed=0):
    """The arguments of the function, and weights of its three results."""
    rng = np.random.default_rng(seed)
    shape, row = tuple(case[:3]), (case.sets, case.features)
    x, *others = (rng.normal(size=shape) for _ in range(3))
    scale, bias, *weights = (rng.normal(size=row) for _ in range(4))
    given = [3 * x + 5, scale, bias, *others[: case.add]]
    return tuple(np.float32(a) for a in given), tuple(np.float32(a) for a in (others[1], *weights))


def ours(case, x, scale, bias, *added):
    return fused.batch_norm(x, scale, bias, EPSILON, *(added or [None]), case.relu)


def plain(case, x, scale, bias, *added):
    """As anybody would write it, for jax to derive."""
    m, v = x.mean(1), x.var(1)
    y = (x - m[:, None]) / jnp.sqrt(v + EPSILON)[:, None] * scale[:, None] + bias[:, None]
    y = y + added[0] if added else y
    return (jax.nn.relu(y) if case.relu else y), m, v


def reverse(function, args, weights):
    results, back = jax.vjp(function, *args)
    return results, back(weights)


def in_float64(function, *args):
    """``function`` of float64 arrays, outside any other setting."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), args)
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def close(actual, wanted, tolerance=2e-6):
    """Relative to the largest value: a float32 sum of many terms."""

    def one(a, b):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))

    jax.tree.map(one, actual, wanted)


def program(function, *args):
    """The text of what is compiled; traced anew, whatever was traced before."""
    return jax.jit(lambda *given: function(*given)).lower(*args).as_text()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_float64(case):
    args, weights = arrays(case)
    run = partial(reverse, partial(ours, case))
    text = program(run, args, weights)
    assert [text.count(f"@{MARK}_{name}") for name in ("moments", "apply", "sums", "spread")] == [
        *(1, 1, 1, 1)
    ]
    wanted = in_float64(partial(reverse, partial(plain, case)), args, weights)
    close(jax.jit(run)(args, weights), wanted, 5e-6)


def loss(function, weights):
    def total(*args):
        y, m, v = function(*args)
        return sum((jnp.sin(a) * w).sum() for a, w in zip((y, m, v), weights, strict=True))

    return total


HIGHER = {
    "forward": lambda f, args, v: jax.jvp(f, args, v)[1],
    "forward over reverse": lambda f, args, v: jax.jvp(jax.grad(f, (0, 1, 2)), args, v)[1],
    "reverse over forward": lambda f, args, v: jax.grad(
        lambda *given: jax.jvp(f, given, v)[1], (0, 1, 2)
    )(*args),
    "reverse over reverse": lambda f, args, v: jax.grad(
        lambda *given: sum(
            (g * d).sum() for g, d in zip(jax.grad(f, (0, 1, 2))(*given), v, strict=False)
        ),
        (0, 1, 2),
    )(*args),
}


@pytest.mark.parametrize("order", HIGHER)
@pytest.mark.parametrize("case", [Case(2, 30, 5), Case(1, 30, 5, True, True)], ids=str)
def test_derivatives_of_every_order_and_both_modes(case, order):
    args, weights = arrays(case)
    direction = arrays(case, seed=1)[0]
    derive = HIGHER[order]
    actual = jax.jit(lambda a, v: derive(loss(partial(ours, case), weights), a, v))(args, direction)
    wanted = in_float64(
        lambda a, v, w: derive(loss(partial(plain, case), w), a, v), args, direction, weights
    )
    close(actual, wanted, 2e-5)


def test_moments_are_exact_at_an_offset():
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(1, 50000, 24)) + 1e4)
    m, v = fused.MOMENTS.bind(jnp.asarray(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(m, exact.mean(1), rtol=1e-7)
    np.testing.assert_allclose(v, exact.var(1), rtol=1e-6)


def test_what_is_not_finite_is_not_hidden():
    x = np.ones((1, 100, 20), np.float32)
    x[0, 3, 4], x[0, 5, 6] = np.nan, np.inf
    case = Case(*x.shape, relu=True)
    y, m, v = ours(case, jnp.asarray(x), jnp.ones((1, 20)), jnp.ones((1, 20)))
    bad = np.isin(np.arange(20), [4, 6])
    for found in (m, v, y.sum(1)):
        np.testing.assert_array_equal(np.isfinite(found[0]), ~bad)
    assert np.isnan(v[0, bad]).all() and np.isnan(y[0, :, bad]).all()


def test_it_repeats_to_the_bit():
    case = Case(1, 20000, 48, True)
    args, weights = arrays(case)
    run = jax.jit(partial(reverse, partial(ours, case)))
    first = run(args, weights)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, run(args, weights), first)


# Prints a digest of all results of one layer with several blocks.
DIGEST = """
import hashlib, jax
import test_native_norm as t
args, weights = t.arrays(t.Case(2, 9000, 40, True))
run = jax.jit(t.partial(t.reverse, t.partial(t.ours, t.Case(2, 9000, 40, True))))
content = b"".join(a.tobytes() for a in jax.tree.leaves(run(args, weights)))
print(hashlib.sha256(content).hexdigest())
"""


@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit():
    here = str(Path(__file__).parent)
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "NPROC": threads, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            cwd=here,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(found) == 1
    assert len(found.pop().strip()) == 64


def layer(x, *params, scope=Scope(), **given):
    """The kind "batch" in training: output and running statistics."""
    scale, bias, *add = params
    running = Stats(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
    given = dict(use="batch", activation=jax.nn.relu, scope=scope) | given
    return batch_norm(x, scale, bias, running, add=add[0] if add else None, **given)


def images(shape=(16, 6, 6, 8), seed=0):
    rng = np.random.default_rng(seed)
    x, add, t = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    scale, bias = jnp.asarray(rng.normal(size=(2, shape[-1])), jnp.float32)
    return x, scale, bias, add, t


def gradients(t, **given):
    def total(*args):
        y, new = layer(*args, **given)
        return (y * t).sum() + jnp.cos(new.mean).sum() + jnp.square(new.var).sum()

    return jax.grad(total, (0, 1, 2, 3))


SETS = {"whole": Scope(), "ghost": Scope(splits=4)}


@pytest.mark.parametrize("scope", SETS)
@pytest.mark.parametrize("activation", [None, jax.nn.relu], ids=["none", "relu"])
def test_the_layer_is_the_one_that_xla_computes(every_size, scope, activation):
    *args, t = images()
    with_library, by_xla = (
        gradients(t, activation=activation, scope=replace(SETS[scope], kernels=kernels))
        for kernels in ("auto", "xla")
    )
    assert MARK in program(with_library, *args)
    assert MARK not in program(by_xla, *args)
    close(jax.jit(with_library)(*args), jax.jit(by_xla)(*args), 1e-5)


def test_parameters_of_other_dtypes_count_as_float32(every_size):
    """As `bnresearch.BatchNorm` has them with ``param_dtype``."""
    x, scale, bias, add, t = images()
    half = [a.astype(jnp.bfloat16) for a in (scale, bias, add)]
    ours, by_xla = (gradients(t, scope=Scope(kernels=kernels)) for kernels in ("auto", "xla"))
    assert MARK in program(ours, x, *half)
    wide = jax.tree.map(np.float32, (jax.jit(ours)(x, *half), jax.jit(by_xla)(x, *half)))
    close(*wide, 1e-2)


def test_float32_without_parameters_where_float64_is_the_default(every_size):
    x, *_ = images()
    with jax.enable_x64(True):
        y, _ = jax.jit(lambda x: layer(x, None, None))(x)
        wanted, _ = jax.jit(lambda x: layer(x, None, None, scope=Scope(kernels="xla")))(x)
    close(y, np.asarray(wanted), 1e-5)


def test_on_the_data_only_the_parameters_are_derived(every_size):
    x, scale, bias, add, t = images()

    def total(*params):
        return (layer(x, *params)[0] * t).sum()

    wanted = gradients(t, scope=Scope(kernels="xla"))(x, scale, bias, add)
    run = jax.grad(total, (0, 1, 2))
    assert MARK in program(run, scale, bias, add)
    close(jax.jit(run)(scale, bias, add), wanted[1:], 1e-5)


def test_the_key_of_the_config_reaches_the_norms(every_size):
    shape, classes = (8, 8, 1), 10
    texts = {}
    for kernels in ("auto", "xla"):
        config = default_config()
        config.parallel.kernels = kernels
        model = build_model(config, classes, use="batch")
        variables = model.init(jax.random.key(0), jnp.ones((2, *shape)), train=False)
        run = partial(model.apply, train=True, mutable=["batch_stats"])
        texts[kernels] = program(run, variables, jnp.ones((16, *shape)))
    assert MARK in texts["auto"]
    assert MARK not in texts["xla"]


LEFT_TO_XLA = {
    "another activation": dict(activation=jax.nn.gelu),
    "a mask": dict(mask=jnp.arange(16) < 12),
    "another algorithm": dict(variance="fast"),
    "several devices in one program": dict(scope=Scope(parts=1, mesh=Mesh(jax.devices(), "d"))),
    "switched off": dict(scope=Scope(kernels="xla")),
}


@pytest.mark.parametrize("what", LEFT_TO_XLA)
def test_what_is_left_to_xla(every_size, what):
    x, scale, bias, *_ = images()
    assert MARK in program(layer, x, scale, bias)
    assert MARK not in program(partial(layer, **LEFT_TO_XLA[what]), x, scale, bias)


def test_half_precision_and_small_inputs_are_left_to_xla():
    x, scale, bias, *_ = images((64, 6, 6, 16))
    assert x.size >= batch.SMALLEST
    assert MARK in program(layer, x, scale, bias)
    assert MARK not in program(layer, x.astype(jnp.bfloat16), scale, bias)
    assert MARK not in program(layer, x[:1, :1], scale, bias)


def test_vmap_is_left_to_xla(every_size):
    *args, t = images()
    many = [jnp.stack([a, a + 1]) for a in args]
    run = gradients(t)
    mapped = jax.jit(jax.vmap(run))
    assert MARK not in program(jax.vmap(run), *many)
    wanted = jax.tree.map(lambda *a: np.stack(a), *(run(*(a[i] for a in many)) for i in range(2)))
    close(mapped(*many), wanted, 1e-5)


def test_each_of_eight_devices_computes_its_own(every_size):
    """Under shard_map with a scope of one device; where jit shares the arrays out, XLA goes on."""
    *args, t = images((16, 4, 4, 8))
    mesh = Mesh(np.array(jax.devices()[:8]), "d")
    rows = PartitionSpec("d")

    def own(x, scale, bias, add, t):
        y, new = layer(x, scale, bias, add, scope=Scope(pool="d"))
        return jax.lax.psum((y * t).sum() + jnp.square(new.var).sum(), "d")

    def total(*args):
        specs = (rows, PartitionSpec(), PartitionSpec(), rows, rows)
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(*args)

    def wanted(x, scale, bias, add, t):
        y, new = layer(x, scale, bias, add, scope=Scope(splits=8, kernels="xla"))
        return (y * t).sum() + 8 * jnp.square(new.var).sum()

    exact = jax.jit(jax.grad(wanted, (0, 1, 2, 3)))(*args, t)
    assert MARK in program(jax.grad(total, (0, 1, 2, 3)), *args, t)
    close(jax.jit(jax.grad(total, (0, 1, 2, 3)))(*args, t), exact, 1e-5)
    spread = [
        jax.device_put(a, NamedSharding(mesh, rows if a.ndim > 1 else PartitionSpec()))
        for a in args
    ]
    run = gradients(t, scope=Scope(splits=8))
    assert MARK not in program(run, *spread)
    close(jax.jit(run)(*spread), jax.jit(run)(*args), 1e-5)


def test_pmap_gives_each_device_its_own(every_size):
    x, scale, bias, add, t = images()

    def own(x, add, t):
        return gradients(t, scope=Scope(pool="d"))(x, scale, bias, add)[0]

    def wanted(x, add, t):
        return gradients(t, scope=Scope(kernels="xla"))(x, scale, bias, add)[0]

    parts = [a.reshape(4, 4, *a.shape[1:]) for a in (x, add, t)]
    mapped = jax.pmap(own, axis_name="d")
    assert MARK in mapped.lower(*parts).as_text()
    # The running statistics are those of all devices: here only what passes through the output.
    silent = [jnp.zeros_like(a) if a is parts[2] else a for a in parts]
    difference = mapped(*parts) - mapped(*silent)
    alone = [wanted(*(a[i] for a in parts)) - wanted(*(a[i] for a in silent)) for i in range(4)]
    close(difference, np.stack(alone), 1e-5)


@pytest.mark.parametrize("way", ["nothing is there", "nothing compiles"])
def test_without_the_library_xla_goes_on(every_size, monkeypatch, way):
    *args, t = images()
    wanted = jax.jit(gradients(t, scope=Scope(kernels="xla")))(*args)
    if way == "nothing is there":
        monkeypatch.setattr(native, "expected", lambda mode: False)
    else:
        monkeypatch.setattr(build, "ready", lambda: False)
    assert MARK not in program(gradients(t), *args)
    close(jax.jit(gradients(t))(*args), wanted, 1e-5)
