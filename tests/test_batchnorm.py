"""bnresearch.BatchNorm in the place of flax.linen.BatchNorm: equal where flax is right."""

import functools
import subprocess
import sys
from dataclasses import fields

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from against_tools import close, draw
from batchnorm_tools import eager, evaluation, pair, start, training
from flax import linen as nn

import bnresearch


class Net(nn.Module):
    """A model that somebody wrote with flax: `library` is the one import that changes."""

    library: object

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(
            self.library.BatchNorm, use_running_average=not train, momentum=0.9
        )
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(norm()(x))
        x = nn.Dense(8, use_bias=False)(x)
        x = nn.relu(norm(scale_init=nn.initializers.normal(1.0), use_bias=False)(x))
        x = nn.Dense(16, use_bias=False)(x.mean((1, 2)))
        return nn.Dense(3)(norm(bias_init=nn.initializers.normal(), name="last")(x))


@functools.cache
def trained(library, dtype, steps=2):
    """The variables at the start; loss, logits and gradient of each SGD step, and logits in
    evaluation; the variables at the end."""
    model = Net(library)
    x, labels = draw((16, 8, 8, 2))[0].astype(dtype), np.arange(16) % 3
    init = jax.jit(functools.partial(model.init, train=False))
    start = variables = init(jax.random.key(0), x[:1])

    @jax.jit
    def step(variables):
        def loss_of(params):
            logits, new = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            chosen = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], 1)
            return -chosen.mean(), (logits, new)

        (loss, (logits, new)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            variables["params"]
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params, **new}, (loss, logits, grads)

    seen = []
    for _ in range(steps):
        variables, results = step(variables)
        seen.append(results)
    seen.append(jax.jit(functools.partial(model.apply, train=False))(variables, x))
    return start, seen, variables


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-6), (np.float32, 5e-5)])
def test_one_import_changes_nothing(dtype, tolerance):
    """Three norms on top of each other amplify the rounding of float32 (1e-5 after two steps)."""
    with jax.enable_x64(dtype == np.float64):
        start, seen, end = trained(nn, dtype)
        our_start, our_seen, our_end = trained(bnresearch, dtype)
    assert jax.tree.structure(start) == jax.tree.structure(our_start)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(our_start), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    close(our_seen, seen, tolerance)
    close(our_end, end, tolerance)


def test_fields_are_those_of_flax_and_one_more():
    names, ours = ([f.name for f in fields(c)] for c in (nn.BatchNorm, bnresearch.BatchNorm))
    own = [n for n in ours if n not in ("parent", "name")]
    assert own == [
        "use_running_average",
        "axis",
        "momentum",
        "epsilon",
        "dtype",
        "param_dtype",
        "use_bias",
        "use_scale",
        "bias_init",
        "scale_init",
        "axis_name",
        "axis_index_groups",
        "use_fast_variance",
        "force_float32_reductions",
        "on_single",
    ]
    assert own[:-1] == [n for n in names if n not in ("parent", "name")]
    assert isinstance(bnresearch.BatchNorm(), nn.BatchNorm)


FIELDS = [
    dict(momentum=0.3, epsilon=0.1),
    dict(use_fast_variance=False),
    dict(axis=1),
    dict(axis=-3),
    dict(axis=(1, -1)),
    dict(axis=(-1, 2, 1), bias_init=nn.initializers.normal()),
    dict(axis=0),
    dict(use_bias=False),
    dict(use_scale=False),
    dict(use_bias=False, use_scale=False),
    dict(scale_init=nn.initializers.normal(), bias_init=nn.initializers.normal()),
    dict(dtype=jnp.bfloat16),
    dict(dtype=jnp.float16, param_dtype=jnp.float16),
    dict(param_dtype=jnp.bfloat16),
    dict(force_float32_reductions=False),
]
CASES = [(fields, dtype) for fields in FIELDS for dtype in (jnp.float32, jnp.bfloat16)]
CASES += [({}, jnp.int32), (dict(use_bias=False, use_scale=False), jnp.int32)]


@pytest.mark.parametrize(
    ("changed", "dtype"), CASES, ids=lambda c: "-".join(c) if isinstance(c, dict) else c.__name__
)
def test_every_field_means_what_it_means_in_flax(changed, dtype):
    x = jnp.asarray(draw((8, 3, 5, 4))[0] * 3, dtype)
    theirs, ours = pair(**changed)
    wanted, actual = start(theirs, x), start(ours, x)
    assert jax.tree.structure(wanted) == jax.tree.structure(actual)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and (a == b).all()
    narrow = changed.get("force_float32_reductions", True) is False and dtype == jnp.bfloat16
    tolerance = 1e-2 if narrow else 1e-6
    y, stats = training(ours, x, actual)
    wanted_y, wanted_stats = training(theirs, x, wanted)
    assert y.dtype == wanted_y.dtype
    close((y, stats), (wanted_y, wanted_stats), tolerance)
    after = {**actual, "batch_stats": wanted_stats}
    evaluated = [evaluation(m, x, after) for m in (ours, theirs)]
    assert evaluated[0].dtype == evaluated[1].dtype
    close(*evaluated, 1e-2 if evaluated[0].dtype != jnp.float32 else 1e-6)


@pytest.mark.parametrize("axis", [-1, 1, (1, 3)])
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (8, 3, 5, 1), (5, 1), (8, 3, 5, 4)])
def test_masks_broadcast_as_in_flax(axis, shape):
    x, weights = draw((8, 3, 5, 4))
    mask = np.random.default_rng(3).random(shape) < 0.7
    theirs, ours = pair(axis=axis)
    variables = start(theirs, x, mask=mask)

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, x):
        def loss(x):
            y, stats = eager(module, x, variables, mask=mask)
            return (y * weights).sum(), (y, stats)

        return jax.grad(loss, has_aux=True)(x)

    close(run(ours, x), run(theirs, x), 2e-6)


def test_the_call_says_what_the_field_does_not():
    x = draw((8, 4))[0]
    module = bnresearch.BatchNorm()
    variables = module.init(jax.random.key(0), x, True)
    y, _ = module.apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-5)
    close(module.apply(variables, x, True), x / np.sqrt(1 + 1e-5), 1e-6)
    with pytest.raises(ValueError, match="use_running_average"):
        module.apply(variables, x)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        module.apply(variables, x, False)


def test_checkpoints_load_both_ways(tmp_path):
    (_, _, theirs), (start, _, ours) = (trained(m, np.float32) for m in (nn, bnresearch))
    for saved, name in [(theirs, "theirs"), (ours, "ours")]:
        loaded = flax.serialization.from_bytes(start, flax.serialization.to_bytes(saved))
        jax.tree.map(np.testing.assert_array_equal, loaded, saved)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / name, start)
        jax.tree.map(np.testing.assert_array_equal, restored, saved)
    x = draw((16, 8, 8, 2), seed=5)[0]
    outputs = [Net(library).apply(theirs, x, train=False) for library in (nn, bnresearch)]
    close(*outputs, 1e-6)


def test_the_package_loads_no_jax_for_the_drop_in():
    code = """
import sys, bnresearch
assert not any(name in sys.modules for name in ("jax", "flax")), "imported at once"
assert bnresearch.BatchNorm.__module__ == "bnresearch.batchnorm"
assert "jax" in sys.modules
from bnresearch import BatchNorm
try:
    bnresearch.BatchNrom
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "module 'bnresearch' has no attribute 'BatchNrom'", done.stderr
