"""Faults, each planted in a healthy model of every family, and what the doctor is to say of it.

``python tests/doctor_faults.py`` prints the table of planted against found, for docs/doctor.md.
"""

import dataclasses
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from doctor_zoo import (
    BATCH,
    COUNT,
    FAMILIES,
    TRAINED_ON,
    batches_of,
    compiled_for,
    family,
    moved,
    put,
    refreshed,
    start,
)

from bnresearch import doctor

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


# ---- Running statistics


def young(healthy):
    """Decay 0.999 after 30 steps."""
    model = dataclasses.replace(healthy.model, decay=0.999)
    steps = (healthy.batches * 2)[:30]
    variables = refreshed(model, unstarted(healthy), steps)
    return case(healthy, "young", EVERYWHERE, model, variables)


def young_site(healthy):
    """The same at one site."""
    site = places(healthy).late
    model = replanned(healthy, (site, "momentum", 0.999))
    steps = (healthy.batches * 2)[:30]
    after = refreshed(model, unstarted(healthy), steps)
    return case(healthy, "young", [site], model, statistics(healthy, site, source=after))


def slow(healthy):
    """Decay 0.999: statistics of the weights after an eighth of the training."""
    model = dataclasses.replace(healthy.model, decay=0.999)
    stale = refreshed(healthy.model, healthy.early, healthy.batches, times=3)
    variables = {**healthy.variables, "batch_stats": stale["batch_stats"]}
    return case(healthy, "slow", EVERYWHERE, model, variables)


def slow_site(healthy):
    """The same at one site."""
    site = places(healthy).late
    model = replanned(healthy, (site, "momentum", 0.999))
    stale = refreshed(healthy.model, healthy.early, healthy.batches, times=3)
    return case(healthy, "slow", [site], model, statistics(healthy, site, source=stale))


def first_channel(value):
    def change(x):
        return np.where(np.arange(len(x)) == 0, value, x).astype(np.float32)

    return change


def not_finite(healthy):
    """NaN in one running mean."""
    site = places(healthy).middle
    variables = statistics(healthy, site, mean=first_channel(np.nan))
    return case(healthy, "broken", [site], variables=variables)


def infinite(healthy):
    """Infinity in one running variance."""
    site = places(healthy).middle
    variables = statistics(healthy, site, var=first_channel(np.inf))
    return case(healthy, "broken", [site], variables=variables)


def negative(healthy):
    """A negative running variance."""
    site = places(healthy).middle
    variables = statistics(healthy, site, var=first_channel(-0.1))
    return case(healthy, "broken", [site], variables=variables)


def diverged(healthy):
    """Running variances a million times too large."""
    site = places(healthy).middle
    variables = statistics(healthy, site, var=lambda v: v * 1e6)
    return case(healthy, "broken", [site], variables=variables)


def shifted(healthy):
    """Running means off by two standard deviations."""
    site = places(healthy).middle
    deviation = np.sqrt(at(healthy.variables, f"batch_stats/{site}/var"))
    signs = np.where(np.arange(len(deviation)) % 2, 2, -2)
    variables = statistics(healthy, site, mean=lambda m: m + signs * deviation)
    return case(healthy, "evaluation_gap", [site], variables=variables)


def too_wide(healthy):
    """Running variances 16 times too small."""
    site = places(healthy).middle
    variables = statistics(healthy, site, var=lambda v: v / 16)
    return case(healthy, "evaluation_gap", [site], variables=variables)


def swapped(healthy):
    """Decay 0.1 for 0.9."""
    model = dataclasses.replace(healthy.model, decay=0.1)
    variables = refreshed(model, healthy.variables, healthy.batches)
    return case(healthy, "decay_swapped", EVERYWHERE, model, variables)


def swapped_site(healthy):
    """The same at one site."""
    site = places(healthy).middle
    model = replanned(healthy, (site, "momentum", 0.1))
    after = refreshed(model, healthy.variables, healthy.batches)
    variables = statistics(healthy, site, source=after)
    return case(healthy, "decay_swapped", [site], model, variables)


def never(healthy):
    """Statistics still at 0 and 1."""
    return case(healthy, "never_updated", EVERYWHERE, variables=unstarted(healthy))


def never_site(healthy):
    """The same at one site."""
    site = places(healthy).middle
    variables = statistics(healthy, site, source=unstarted(healthy))
    return case(healthy, "never_updated", [site], variables=variables)


# ---- Numbers


def half(healthy):
    """Running statistics of one site kept in bfloat16."""
    site = places(healthy).middle
    stored = {name: lambda x: jnp.asarray(x, jnp.bfloat16) for name in ("mean", "var")}
    return case(healthy, "half_precision", [site], variables=statistics(healthy, site, **stored))


def half_made(healthy):
    """One site told to compute in bfloat16, statistics too."""
    site = places(healthy).middle
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "force_float32_reductions": False}
    model = replanned(healthy, *((site, name, value) for name, value in half.items()))
    stored = {name: lambda x: jnp.asarray(x, jnp.bfloat16) for name in ("mean", "var")}
    variables = refreshed(model, statistics(healthy, site, **stored), healthy.batches)
    return case(healthy, "half_precision", [site], model, variables)


def cancelling(healthy):
    """A bias of 1,000 standard deviations before a site; flax computes E[x^2] - E[x]^2."""
    site, linear = places(healthy).offset, places(healthy).offset_bias
    model = replanned(healthy, (site, "bias", True))
    deviation = np.sqrt(at(healthy.variables, f"batch_stats/{site}/var"))
    mean = f"batch_stats/{site}/mean"
    variables = put(healthy.variables, f"params/{linear}/bias", 1000 * deviation)
    variables = put(variables, mean, lambda m: m + 1000 * deviation)
    variables = refreshed(model, variables, healthy.batches)
    return case(healthy, "cancellation", [site], model, variables)


def few(healthy):
    """Batches of 2, 3 or 8 examples."""
    size, sites = places(healthy).small, places(healthy).few
    batches = sizes(healthy.batches, size)
    variables = refreshed(healthy.model, healthy.variables, batches)
    return case(healthy, "few_values", sites, variables=variables, batches=batches)


# ---- The model


def dropped(healthy):
    """Dropout of a half before a site."""
    site = places(healthy).middle
    model = replanned(healthy, (site, "dropout", 0.5))
    variables = refreshed(model, healthy.variables, healthy.batches, times=2)
    return case(healthy, "dropout_before", [site], model, variables)


def biased(healthy):
    """A bias in the linear map before a site."""
    site, linear = places(healthy).fed, places(healthy).feeder
    size = len(at(healthy.variables, f"batch_stats/{site}/mean"))
    variables = put(healthy.variables, f"params/{linear}/bias", np.zeros(size, np.float32))
    model = replanned(healthy, (site, "bias", True))
    return case(healthy, "bias_before", [site], model, variables)


def doubled(healthy):
    """A second norm right behind a site, with statistics and parameters that undo nothing."""
    site = places(healthy).middle
    model = replanned(healthy, (site, "double", True))
    params, again = at(healthy.variables, f"params/{site}"), f"{site}_again"
    variables = healthy.variables
    for name in ("scale", "bias"):
        variables = put(variables, f"params/{again}/{name}", params[name])
    variables = put(variables, f"batch_stats/{again}/mean", params["bias"])
    variables = put(variables, f"batch_stats/{again}/var", params["scale"] ** 2)
    variables = refreshed(model, variables, healthy.batches)
    return case(healthy, "double", [again], model, variables)


def always_running(healthy):
    """A site that normalises with running statistics in training."""
    site = places(healthy).middle
    model = replanned(healthy, (site, "use", "running"))
    return case(healthy, "wrong_use", [site], model)


def always_batch(healthy):
    """A site that normalises with the batch in evaluation."""
    site = places(healthy).middle
    return case(healthy, "wrong_use", [site], replanned(healthy, (site, "use", "batch")))


def use_swapped(healthy):
    """``use_running_average=train``."""
    return case(healthy, "wrong_use", EVERYWHERE, replanned(healthy, ("*", "use", "swapped")))


def unmasked(healthy):
    """A site of a padded sequence that is handed no mask."""
    site = places(healthy).middle
    model = replanned(healthy, (site, "unmasked", True))
    variables = refreshed(model, healthy.variables, healthy.batches)
    return case(healthy, "padding", [site], model, variables)


def unmasked_everywhere(healthy):
    """Padded batches, and a model whose norms are handed no mask."""
    batches, model = healthy.batches, replanned(healthy, ("*", "unmasked", True))
    if "mask" not in batches[0]:
        batches, model = [short(batch) for batch in batches], healthy.model
    variables = refreshed(model, healthy.variables, batches)
    return case(healthy, "padding", EVERYWHERE, model, variables, batches)


def short(batch):
    """The last quarter of the examples is padding."""
    mask = np.arange(BATCH) < BATCH * 3 // 4
    return {
        "image": batch["image"] * mask[:, None, None, None],
        "label": batch["label"],
        "mask": mask,
    }


# ---- Parameters


def decayed(healthy):
    """Weight decay of all parameters, scales and biases of norms too."""
    return case(healthy, "scale_decay", EVERYWHERE, optimizer=optax.adamw(1e-3, weight_decay=0.01))


def decayed_site(healthy):
    """Weight decay of kernels, and of the scale of one site."""
    site = places(healthy).middle

    def mask(params):
        scales = {f"params/{site}/scale"}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                "/".join(["params", *(p.key for p in path)]) in scales or path[-1].key == "kernel"
            ),
            params,
        )

    optimizer = optax.chain(optax.add_decayed_weights(5e-4, mask), optax.sgd(0.1, 0.9))
    return case(healthy, "scale_decay", [site], optimizer=optimizer)


def scaled_away(healthy):
    """Scales near zero in half of the channels."""
    site = places(healthy).middle

    def half(value):
        return lambda x: np.where(np.arange(len(x)) % 2, x, value).astype(np.float32)

    variables = put(healthy.variables, f"params/{site}/scale", half(1e-6))
    variables = put(variables, f"params/{site}/bias", half(0.1))
    variables = refreshed(healthy.model, variables, healthy.batches, times=2)
    return case(healthy, "scale_zero", [site], variables=variables)


def without(axis):
    """Six channels of an axis of a kernel become zero."""
    return lambda kernel: kernel * np.expand_dims(np.arange(kernel.shape[axis]) >= 6, -3 - axis)


def unread(healthy):
    """Six channels that the next linear map does not read."""
    site, reader = places(healthy).middle, places(healthy).reader
    variables = put(healthy.variables, f"params/{reader}/kernel", without(-2))
    variables = refreshed(healthy.model, variables, healthy.batches, times=2)
    return case(healthy, "dead", [site], variables=variables)


def constant(healthy):
    """Six channels that are the same for all examples."""
    site, linear = places(healthy).fed, places(healthy).feeder
    variables = put(healthy.variables, f"params/{linear}/kernel", without(-1))
    variables = refreshed(healthy.model, variables, healthy.batches, times=8)
    return case(healthy, "dead", [site], variables=variables)


def freezing(site):
    """An optimizer that moves everything but the parameters of a site."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "fixed" if "/".join(p.key for p in path[:-1]) == site else "free",
            params,
        )

    return optax.multi_transform({"fixed": optax.set_to_zero(), "free": optax.adam(1e-3)}, labels)


def frozen_moves(healthy):
    """A site frozen by the optimizer, whose statistics move."""
    site = places(healthy).middle
    return case(healthy, "frozen_moves", [site], optimizer=freezing(site))


def frozen_rule(healthy):
    """A site that its owner believes frozen, whose statistics move."""
    site = places(healthy).middle
    return case(healthy, "frozen_moves", [site], frozen=(f"^{site}$",))


# ---- Devices


def on_devices(healthy, rounds=3):
    """The running statistics of eight devices that each see an eighth of every batch, stacked."""
    each = jax.vmap(lambda *args: moved(healthy.model, *args), in_axes=(0, 0, None))
    each = jax.jit(each)
    variables = jax.tree.map(lambda x: jnp.stack([x] * 8), healthy.variables)
    for batch in healthy.batches * rounds:
        parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        variables = {**variables, "batch_stats": each(variables, parts, jax.random.key(0))}
    return variables


def per_device(healthy):
    """Statistics of an eighth of the batch on each of eight devices, averaged at the end."""
    variables = jax.tree.map(lambda x: x.mean(0), on_devices(healthy))
    return case(healthy, "scope", EVERYWHERE, variables=variables)


def replicas(healthy):
    """One copy per device, [8, ...], whose statistics were never brought together."""
    return case(healthy, "scope", EVERYWHERE, variables=on_devices(healthy))


def synchronised(healthy):
    """``axis_name`` everywhere, where statistics of each device were wanted."""
    model = replanned(healthy, ("*", "axis_name", "batch"))
    return case(healthy, "scope", EVERYWHERE, model, scope="device")


def synchronised_site(healthy):
    """The same at one site."""
    site = places(healthy).middle
    model = replanned(healthy, (site, "axis_name", "batch"))
    return case(healthy, "scope", [site], model, scope="device")


# ---- Data


def sorted_by_class(healthy):
    """Training batches in the order of the labels."""
    sequences = "mask" in healthy.batches[0]
    labels = np.concatenate([b["label"] for b in batches_of(TRAINED_ON, BATCH, sequences)])
    rows = TRAINED_ON[np.argsort(labels, kind="stable")]
    batches = batches_of(rows, BATCH, sequences)[:COUNT]
    variables = refreshed(healthy.model, healthy.variables, batches)
    return case(healthy, "non_iid", EVERYWHERE, variables=variables, batches=batches)


def unscaled(healthy):
    """Evaluation inputs divided by 255 once more."""
    changed = with_inputs(healthy.eval_batches, lambda x: x / 255)
    return case(healthy, "preprocessing", [first_site(healthy)], eval_batches=changed)


def brightened(healthy):
    """Evaluation inputs brighter by a half."""
    changed = with_inputs(healthy.eval_batches, lambda x: x + 0.5)
    return case(healthy, "preprocessing", [first_site(healthy)], eval_batches=changed)


def first_site(healthy):
    return "norm1" if type(healthy.model).__name__ == "MLP" else "norm"


FAULTS = {
    "young": young,
    "young at a site": young_site,
    "slow": slow,
    "slow at a site": slow_site,
    "mean not finite": not_finite,
    "variance infinite": infinite,
    "variance negative": negative,
    "variance diverged": diverged,
    "mean shifted": shifted,
    "variance too small": too_wide,
    "decay swapped": swapped,
    "decay swapped at a site": swapped_site,
    "never updated": never,
    "never updated at a site": never_site,
    "statistics in bfloat16": half,
    "norm in bfloat16": half_made,
    "cancellation": cancelling,
    "tiny batches": few,
    "dropout before": dropped,
    "bias before": biased,
    "double": doubled,
    "running in training": always_running,
    "batch in evaluation": always_batch,
    "switch the wrong way round": use_swapped,
    "padding at a site": unmasked,
    "padding": unmasked_everywhere,
    "weight decay on scales": decayed,
    "weight decay on a scale": decayed_site,
    "scales near zero": scaled_away,
    "channels unread": unread,
    "channels constant": constant,
    "frozen by the optimizer": frozen_moves,
    "frozen by its owner": frozen_rule,
    "statistics per device": per_device,
    "replicas that differ": replicas,
    "synchronised": synchronised,
    "synchronised at a site": synchronised_site,
    "sorted by class": sorted_by_class,
    "inputs scaled twice": unscaled,
    "inputs shifted": brightened,
}

# What is not planted in a family, and why.
MASKED_ALIKE = "a mask of examples is the same at all sites"
AT_A_SITE = "at a site only: the whole model is compiled anew for it"
LEFT_OUT = {("padding at a site", name): MASKED_ALIKE for name in ("mlp", "resnet")} | {
    (fault, name): AT_A_SITE
    for fault in ("young", "slow", "decay swapped", "synchronised", "switch the wrong way round")
    for name in ("resnet", "encoder")
}

PLANTED = [(fault, name) for name in FAMILIES for fault in FAULTS if (fault, name) not in LEFT_OUT]


# ---- Planted against found


def diagnosed(fault, name):
    """The case, and what the doctor says of it."""
    healthy = family(name)
    with compiled_for(healthy.model):
        planted = FAULTS[fault](healthy)
        report = doctor.diagnose(
            planted.model, planted.variables, planted.batches, **planted.options
        )
    return planted, report


def hit(planted, report):
    """Whether the right check found it, at the right sites."""
    found = [finding for finding in report.findings if finding.check == planted.check]
    right = [f for f in found if planted.sites in (EVERYWHERE, tuple(f.sites))]
    return bool(right)


def others(planted, report):
    """What else the doctor calls serious."""
    return [finding.check for finding in report.serious if finding.check != planted.check]


def cell(planted, report):
    """The entry of the table for one case."""
    if not hit(planted, report):
        return "missed"
    where = "everywhere" if planted.sites == EVERYWHERE else ", ".join(planted.sites)
    return where + "".join(f"; also {check}" for check in others(planted, report))


def table(cells):
    """Markdown, from {(fault, family): (check, cell)}."""
    heads = ["planted", "how", "found by", *FAMILIES]
    lines = [heads, ["---"] * len(heads)]
    for fault, plant in FAULTS.items():
        how = " ".join(plant.__doc__.split()).removesuffix(".")
        check = next(cells[fault, name][0] for name in FAMILIES if (fault, name) in cells)
        found = [
            cells[fault, n][1] if (fault, n) in cells else LEFT_OUT[fault, n] for n in FAMILIES
        ]
        lines.append([fault, how, f"`{check}`", *found])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    """Prints the table."""
    cells = {}
    for fault, name in PLANTED:
        planted, report = diagnosed(fault, name)
        cells[fault, name] = planted.check, cell(planted, report)
        print(fault, name, cells[fault, name], file=sys.stderr)
    print(table(cells), end="")


if __name__ == "__main__":
    main()
