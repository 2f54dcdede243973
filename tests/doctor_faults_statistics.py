"""Faults of statistics: the running ones, their numbers, the devices they come from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from doctor_case import (
    EVERYWHERE,
    at,
    case,
    first_value,
    places,
    replanned,
    sizes,
    statistics,
    unstarted,
)
from doctor_zoo import moved, put, refreshed

from bnresearch.net import of_model

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


def not_finite(healthy):
    """NaN in one running mean."""
    site = places(healthy).middle
    variables = statistics(healthy, site, mean=first_value(np.nan))
    return case(healthy, "broken", [site], variables=variables)


def infinite(healthy):
    """Infinity in one running variance."""
    site = places(healthy).middle
    variables = statistics(healthy, site, var=first_value(np.inf))
    return case(healthy, "broken", [site], variables=variables)


def negative(healthy):
    """A negative running variance."""
    site = places(healthy).middle
    variables = statistics(healthy, site, var=first_value(-0.1))
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


def overflow(healthy):
    """A weight that overflowed: inputs are not finite from the site behind it on."""
    site, linear = places(healthy).fed, places(healthy).feeder
    sites = of_model(healthy.model).sites(healthy.variables, healthy.batches[0])
    variables = put(healthy.variables, f"params/{linear}/kernel", first_value(np.inf))
    return case(healthy, "not_finite", sites[sites.index(site) :], variables=variables)


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
