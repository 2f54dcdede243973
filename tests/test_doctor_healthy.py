"""The doctor has nothing serious to say of healthy models."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from doctor_faults_model import freezing
from doctor_zoo import FAMILIES, MLP, Encoder, ResNet, compiled_for, family, trained

from bnresearch import doctor

BATCH_NORM = dict(library="batch", options=(("decay", 0.95),))
GHOST = dict(library="ghost", options=(("size", 16),))
GROUP = dict(library="group", options=(("groups", 4),))


class Made(NamedTuple):
    """How a healthy model is made."""

    model: Any
    training: dict


def made(model, **training):
    return Made(model, training)


# Models that are equal share what is compiled for them.
HEALTHY = {
    "mlp": made(FAMILIES["mlp"], seed=1),
    "mlp, another seed": made(FAMILIES["mlp"], seed=2, epochs=12),
    "mlp by SGD": made(FAMILIES["mlp"], optimizer="sgd", epochs=12),
    "mlp, norm after the activation, slow decay, batches of 32": made(
        MLP(after=True, widths=(48, 24), decay=0.99), size=32, epochs=24
    ),
    "mlp, dropout behind the last norm, batches of 128": made(
        MLP(library="ours", dropout=0.3, widths=(64, 32), decay=0.95), size=128, epochs=30
    ),
    "mlp, kind batch": made(MLP(**BATCH_NORM, widths=(32, 32))),
    "mlp, kind ghost": made(MLP(**GHOST, widths=(32, 32)), epochs=12),
    "mlp, kind group": made(MLP(**GROUP, widths=(32, 32))),
    "mlp of one layer": made(MLP(widths=(64,))),
    "mlp of four layers": made(MLP(widths=(24,) * 4, library="ours"), epochs=12),
    "resnet": made(FAMILIES["resnet"], seed=1, epochs=12),
    "resnet, zero-gamma": made(FAMILIES["resnet"], zero=("stage1/norm2",), epochs=12),
    "resnet, pre-activation": made(ResNet(pre=True, decay=0.95), epochs=12),
    "resnet of two stages, batches of 32": made(ResNet(library="ours", depth=2), size=32),
    "resnet, kind ghost": made(ResNet(**GHOST), epochs=12),
    "encoder": made(FAMILIES["encoder"], seed=1, epochs=20),
    "encoder by SGD": made(FAMILIES["encoder"], optimizer="sgd", epochs=20),
    "encoder, norms behind the branches": made(Encoder(post=True, width=24), epochs=20),
    "encoder of two layers, dropout": made(
        Encoder(library="ours", depth=2, dropout=0.1, decay=0.95), epochs=20
    ),
    "encoder, kind batch": made(Encoder(**BATCH_NORM), epochs=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_serious(name):
    healthy = trained(HEALTHY[name].model, **HEALTHY[name].training)
    report = diagnosed(healthy)
    assert report.serious == [], report.table()
    if report.examined.losses:
        assert report.examined.losses["running"].mean() < 0.4, "is it healthy?"


def diagnosed(healthy, **options):
    options = {"eval_batches": healthy.eval_batches} | options
    with compiled_for(healthy.model):
        return doctor.diagnose(healthy.model, healthy.variables, healthy.batches, **options)


# ---- What looks like a fault and is none: nothing at all is found


@functools.cache
def ordered():
    """Evaluation batches in the order of the labels: running statistics do not mind."""
    batches = family("mlp").eval_batches
    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    order = np.argsort(whole["label"], kind="stable")
    parts = {name: np.split(array[order], len(batches)) for name, array in whole.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def kernels_only(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


INNOCENT = {
    "evaluation in the order of the labels": lambda: dict(eval_batches=ordered()),
    "no evaluation batches": lambda: dict(eval_batches=None),
    "weight decay of kernels": lambda: dict(
        optimizer=optax.adamw(1e-3, weight_decay=0.1, mask=kernels_only)
    ),
    "gradient clipping and a warm-up from 0": lambda: dict(
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 100), momentum=0.9),
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INNOCENT)
def test_nothing_found(name):
    assert diagnosed(family("mlp"), **INNOCENT[name]()).findings == []


@pytest.mark.slow
def test_a_norm_that_is_really_frozen():
    """By the optimizer and in the model: it normalises with running statistics in training."""
    healthy, site = family("mlp"), "norm2"
    model = dataclasses.replace(healthy.model, plan=((site, "use", "running"),))
    frozen = diagnosed(healthy._replace(model=model), optimizer=freezing(site), frozen=(site,))
    assert frozen.findings == []
