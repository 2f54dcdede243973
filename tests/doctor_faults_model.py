"""Faults of the model, of its parameters, and of the data."""

import jax
import numpy as np
import optax
from doctor_case import EVERYWHERE, at, case, places, replanned, with_inputs
from doctor_zoo import BATCH, COUNT, TRAINED_ON, batches_of, put, refreshed

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
