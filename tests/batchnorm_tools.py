"""What the tests of bnresearch.BatchNorm share: it and flax.linen.BatchNorm, side by side."""

import functools

import jax
from flax import linen as nn

import bnresearch

TRAIN = dict(use_running_average=False)


def pair(**changed):
    return nn.BatchNorm(**{**TRAIN, **changed}), bnresearch.BatchNorm(**{**TRAIN, **changed})


def start(module, x, **given):
    return jax.jit(module.init)(jax.random.key(1), x, **given)


def eager(module, x, variables, **given):
    """Output and new statistics of one training step."""
    y, new = module.apply(variables, x, mutable=["batch_stats"], **given)
    return y, new["batch_stats"]


training = jax.jit(eager, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def evaluation(module, x, variables):
    return module.clone(use_running_average=True).apply(variables, x)
