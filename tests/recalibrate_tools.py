"""What the tests of recalibration share: a model, and its statistics by hand in float64."""

import jax
import numpy as np
from flax import linen as nn

EPSILON = 1e-5
X = np.random.default_rng(0).normal(size=(130, 6)).astype("f") * 2 + 1
WAYS = ("one_pass", "layer_after_layer")


class Mlp(nn.Module):
    norm: type = nn.BatchNorm
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        for index in (1, 2):
            x = nn.Dense(5, name=f"dense{index}")(x)
            more = {} if mask is None else {"mask": mask[:, None]}
            x = self.norm(use_running_average=not train, name=f"norm{index}")(x, **more)
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="head")(x)


def random_variables():
    """Random parameters, and running statistics that are wrong."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(Mlp().init, jax.random.key(0), X)
    return jax.tree.map(lambda a: rng.uniform(0.3, 1.5, a.shape).astype("f"), shapes)


def cut(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


def by_hand(variables, batches, how, keep=lambda batch: slice(None)):
    """Mean and variance of both norms' inputs, in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    rows = [np.asarray(batch, np.float64) for batch in batches]
    found = {}
    for index in (1, 2):
        dense, affine = params[f"dense{index}"], params[f"norm{index}"]
        rows = [x @ dense["kernel"] + dense["bias"] for x in rows]
        counted = [x[keep(batch)] for x, batch in zip(rows, batches, strict=True)]
        every = np.concatenate(counted)
        found[f"norm{index}"] = {"mean": every.mean(0), "var": every.var(0)}
        outputs = []
        for x, own in zip(rows, counted, strict=True):
            by = own if how == "one_pass" else every
            z = (x - by.mean(0)) / np.sqrt(by.var(0) + EPSILON)
            outputs.append(np.maximum(z * affine["scale"] + affine["bias"], 0))
        rows = outputs
    return found


def assert_close(actual, wanted, tolerance=3e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
