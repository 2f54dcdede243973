"""What a planted fault is, where it can be in a family, and how it gets there."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from doctor_zoo import put, start

EVERYWHERE = "everywhere"


class Case(NamedTuple):
    """What the doctor is shown, and what it is to find.

    Attributes:
      options: of ``diagnose``.
      check: the name of the check that must find it.
      sites: those that it must name, or EVERYWHERE: some or none (the whole model).
    """

    model: Any
    variables: Any
    batches: list
    options: dict
    check: str
    sites: Any


def replanned(healthy, *plan):
    """The model with these lines in its plan."""
    return dataclasses.replace(healthy.model, plan=plan)


class Places(NamedTuple):
    """Where in a family a fault can be.

    Attributes:
      middle: a site in the middle, and ``reader``: the only linear map that reads it.
      fed: a site right behind the linear map ``feeder``.
      late: a site whose statistics move until late in the training.
      offset: a site behind the bias ``offset_bias``, which reaches no other one.
      small: the size of batches that are too small at the sites ``few``.
    """

    middle: str
    reader: str
    fed: str
    feeder: str
    late: str
    offset: str
    offset_bias: str
    small: int
    few: Any


PLACES = {
    "MLP": Places(
        middle="norm2",
        reader="dense3",
        fed="norm2",
        feeder="dense2",
        late="norm1",
        offset="norm2",
        offset_bias="dense2",
        small=8,
        few=EVERYWHERE,
    ),
    "ResNet": Places(
        middle="stage1/norm1",
        reader="stage1/conv2",
        fed="stage1/norm1",
        feeder="stage1/conv1",
        late="stage1/norm1",
        offset="stage1/norm1",
        offset_bias="stage1/conv1",
        small=3,  # 12 values at 2x2 pixels
        few=("stage1/norm1", "stage1/norm2"),
    ),
    "Encoder": Places(
        middle="layer1/norm2",
        reader="layer1/up",
        fed="norm",
        feeder="embed",
        late="layer1/norm2",
        offset="last_norm",
        offset_bias="layer1/down",
        small=2,
        few=EVERYWHERE,
    ),
}


def places(healthy):
    return PLACES[type(healthy.model).__name__]


def case(healthy, check, sites, model=None, variables=None, batches=None, **options):
    """The healthy model, but for what is given."""
    return Case(
        model or healthy.model,
        variables or healthy.variables,
        batches or healthy.batches,
        {"eval_batches": healthy.eval_batches} | options,
        check,
        sites if sites == EVERYWHERE else tuple(sites),
    )


def statistics(healthy, site, mean=None, var=None, source=None):
    """The variables with statistics of one site changed, or those of another source there."""
    variables = healthy.variables
    for name, change in (("mean", mean), ("var", var)):
        path = f"batch_stats/{site}/{name}"
        if source is not None:
            change = at(source, path)
        variables = variables if change is None else put(variables, path, change)
    return variables


def at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def unstarted(healthy):
    """The variables with running statistics as before the first step."""
    first = start(healthy.model, healthy.batches[0], 0)
    return {**healthy.variables, "batch_stats": first["batch_stats"]}


def sizes(batches, size):
    """As many batches, of the first examples of each."""
    return [jax.tree.map(lambda x: x[:size], batch) for batch in batches]


def with_inputs(batches, change):
    """The batches with their inputs changed; padding stays zero."""

    def changed(batch):
        name = "x" if "x" in batch else "image"
        x = np.asarray(change(batch[name]), np.float32)
        return {**batch, name: x * batch["mask"][..., None] if "mask" in batch else x}

    return [changed(batch) for batch in batches]


def first_value(value):
    """The very first number of an array becomes this one."""
    return lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, value, x).astype(np.float32)
