"""What the doctor refuses, and what it takes as it is."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from bnresearch import doctor
from bnresearch.errors import UserError


class Net(nn.Module):
    """A small one."""

    norm: bool = True
    width: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm1")(x) if self.norm else x
        return nn.Dense(2, name="head")(nn.relu(x))


class TwoInputs(Net):
    """It needs something that nobody can guess."""

    @nn.compact
    def __call__(self, x, other, train=False):
        return nn.BatchNorm(use_running_average=not train, name="norm1")(x + other)


def variables(width=3, norm=True, inputs=4):
    stats = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
    affine = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    kernels = {
        "dense": {"kernel": jnp.ones((inputs, width)), "bias": jnp.zeros(width)},
        "head": {"kernel": jnp.ones((width, 2)), "bias": jnp.zeros(2)},
    }
    if not norm:
        return {"params": kernels}
    return {"params": {**kernels, "norm1": affine}, "batch_stats": {"norm1": stats}}


def batches(count=3, size=8, width=4):
    rng = np.random.default_rng(0)
    for _ in range(count):
        x = rng.normal(size=(size, width)).astype(np.float32)
        yield {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}


def refused(*parts, model=None, given=None, data=None, **options):
    """``diagnose`` refuses it in one message with these parts, before anything is compiled."""
    model = Net() if model is None else model
    given = variables() if given is None else given
    with pytest.raises(UserError) as error:
        doctor.diagnose(model, given, batches() if data is None else data, **options)
    for part in parts:
        assert part in str(error.value), str(error.value)


def without(tree, *path):
    """The nested dict without one entry."""
    first, *rest = path
    if not rest:
        return {name: value for name, value in tree.items() if name != first}
    return {**tree, first: without(tree[first], *rest)}


def two_shapes():
    yield from batches(2)
    yield from batches(1, width=5)


REFUSED = {
    "a model without norms": (
        dict(model=Net(norm=False), given=variables(norm=False)),
        ["no norm", "flax.linen"],
    ),
    "no module": (dict(model=Net), ["not a flax.linen module", "call="]),
    "a call that nobody can guess": (dict(model=TwoInputs()), ["TwoInputs", "other", "call="]),
    "other widths": (
        dict(given=variables(width=5)),
        ["params/dense/kernel", "float32[4, 5]", "float32[4, 3]", "batch_stats/norm1/mean"],
    ),
    "a missing parameter": (
        dict(given=without(variables(), "params", "norm1", "scale")),
        ["params/norm1/scale"],
    ),
    "missing statistics": (
        dict(given=without(variables(), "batch_stats", "norm1", "var")),
        ["batch_stats/norm1/var"],
    ),
    "no statistics at all": (
        dict(given=without(variables(), "batch_stats")),
        ["batch_stats/norm1/mean"],
    ),
    "superfluous statistics": (
        dict(given=variables() | {"batch_stats": {"norm1": {}, "norm2": {"mean": jnp.zeros(3)}}}),
        ["batch_stats/norm2/mean", "batch_stats/norm1/mean"],
    ),
    "parameters alone": (dict(given=variables()["params"]), ["params"]),
    "batches of another width": (dict(data=batches(width=6)), ["[8, 6]", "params/dense/kernel"]),
    "batches of two shapes": (dict(data=two_shapes()), ["batch 2", "[8, 5]", "[8, 4]"]),
    "batches without an input": (dict(data=[{"pixels": np.zeros((8, 4))}]), ["pixels", "image"]),
    "no batches": (dict(data=[]), ["there are no batches"]),
    "fewer batches than asked for": (dict(count=5), ["3 batches", "5", "allow_fewer=True"]),
    "a rule that matches nothing": (
        dict(frozen=("^norm1$", "stage1/.*")),
        ["stage1/.*", "matches no", "norm1"],
    ),
    "an unknown scope": (dict(scope="globl"), ["globl", "global", "device"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, compiled):
    given, parts = REFUSED[what]
    refused(*parts, **given)
    assert not [name for name in compiled if name in ("jit(look)", "jit(train)", "jit(losses)")]


@pytest.fixture(scope="module")
def whole():
    """What is found with all three batches."""
    return doctor.diagnose(Net(), variables(), batches())


def test_fewer_batches_when_that_is_said(whole):
    report = doctor.diagnose(Net(), variables(), batches(), count=5, allow_fewer=True)
    assert report.examined.batches == 3
    assert report.findings == whole.findings


def test_no_more_batches_than_asked_for_are_drawn():
    endless, drawn = batches(count=10**9), []

    def counted():
        for batch in endless:
            drawn.append(1)
            yield batch

    report = doctor.diagnose(Net(), variables(), counted(), count=2)
    assert report.examined.batches == len(drawn) == 2


def test_tuples_and_dicts_are_the_same(whole):
    pairs = [(batch["x"], batch["label"]) for batch in batches()]
    assert doctor.diagnose(Net(), variables(), pairs).findings == whole.findings


def test_a_call_that_is_given(whole):
    def call(variables, batch, train, **rest):
        return Net().apply(variables, batch["pixels"], train, **rest)

    data = [{"pixels": batch["x"], "label": batch["label"]} for batch in batches()]
    report = doctor.diagnose(Net(), variables(), data, call=call)
    # What mends it is called the same way.
    unmended = [[f._replace(mend="") for f in r.findings] for r in (report, whole)]
    assert unmended[0] == unmended[1]
    mends = [f.mend for f in report.findings if "recalibrate(" in f.mend]
    assert mends and all("batches, call=call)" in mend for mend in mends)


def test_nothing_is_changed(whole):
    given = variables()
    doctor.diagnose(Net(), given, batches())
    assert given["batch_stats"]["norm1"]["mean"].tolist() == [0, 0, 0]
    assert "never_updated" in [found.check for found in whole.serious]
