"""Checks of single sites: how a norm is made and called, what comes in, what becomes of it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from bnresearch.doctor.examine import Examination, Site, distance, pooled
from bnresearch.doctor.finding import Finding, few
from bnresearch.doctor.statistics import hurts
from bnresearch.doctor.structure import Maker
from bnresearch.values import FEW

LOST = 0.05  # relative error of a variance from which on digits are lost
SHIFT, BIG_SHIFT = 0.03, 0.2  # |log| of a variance ratio worth a word, a serious one
VERY_FEW = 4  # values per set
NOTHING = 1e-3  # a scale that lets nothing through
SOME, MOST = 0.05, 0.5  # shares of features


def _finite(site: Site) -> bool:
    return bool(np.isfinite(site.look["mean"]).all() and np.isfinite(site.look["var"]).all())


def not_finite(examined: Examination) -> Iterator[Finding]:
    """NaN or infinity in what goes into a norm, whatever its running statistics."""
    lost = [site.path for site in examined.sites.values() if site.look and not _finite(site)]
    if lost:
        yield Finding(
            "not_finite",
            "serious",
            "What goes into a norm is not finite",
            f"In the order of execution {lost[0]} is the first site with NaN or infinity in its "
            "input, under the statistics of the batch itself: a weight in front of it is not "
            "finite, or a batch is not.",
            lost,
        )


def wrong_use(examined: Examination) -> Iterator[Finding]:
    """use_running_average the wrong way round, in training or in evaluation."""
    structure = examined.structure
    still = examined.frozen | (examined.treatment.still if examined.treatment else frozenset())
    running, batch = [], []
    for path in structure.keepers:
        frozen = path in still or structure.made[path].frozen
        if any(call.use == "running" for call in structure.training[path]) and not frozen:
            running.append(path)
        if any(call.use == "batch" for call in structure.evaluation[path]):
            batch.append(path)
    if running:
        yield Finding(
            "wrong_use",
            "serious",
            "Training normalises with running statistics",
            f"A training call of the model takes the running statistics at {few(running)}, so "
            "that they never move and no gradient goes through the statistics of the batch.",
            running,
        )
    if batch:
        yield Finding(
            "wrong_use",
            "serious",
            "Evaluation normalises with the statistics of its batch",
            f"An evaluation call takes batch statistics at {few(batch)}: what is predicted for an "
            "example depends on the examples around it, and is empty for one alone.",
            batch,
        )


def frozen_moves(examined: Examination) -> Iterator[Finding]:
    """A norm that is meant to be frozen, whose statistics go on moving."""
    still = examined.treatment.still if examined.treatment else frozenset()
    sites = [
        s for s in examined.keepers if s.moved and (s.path in examined.frozen or s.path in still)
    ]
    if not sites:
        return
    paths = [site.path for site in sites]
    how = (
        "the optimizer leaves its parameters alone" if paths[0] in still else "you named it frozen"
    )
    yield Finding(
        "frozen_moves",
        "serious",
        "A frozen norm still updates its statistics",
        f"A training call moves the running statistics of {few(paths)}, though {how}: which "
        "parameters are trained and which statistics move are two switches.",
        paths,
    )


def double(examined: Examination) -> Iterator[Finding]:
    """A norm straight on the output of a norm."""
    found = {}
    for path, calls in examined.structure.training.items():
        for call in calls:
            if call.maker is not None and call.maker.what == "norm":
                found[path] = call.maker.path
    if found:
        keepers = examined.structure.keepers
        noise = any(path in keepers and before in keepers for path, before in found.items())
        pairs = few([f"{path} on {before}" for path, before in found.items()])
        yield Finding(
            "double",
            "warning",
            "A norm stands on the output of a norm",
            f"{pairs}: the second one normalises again what the first one has normalised"
            + (", and the noise of the batch comes in twice." if noise else "."),
            list(found),
        )


def bias_before(examined: Examination) -> Iterator[Finding]:
    """A bias in the linear map in front of a norm that subtracts the mean over the batch."""
    found = {}
    for path in examined.structure.keepers:
        for call in examined.structure.training[path]:
            biased = call.maker is not None and call.maker.what == "linear" and call.maker.bias
            if call.maker is not None and biased and call.use == "batch":
                found[path] = call.maker.path
    if found:
        yield Finding(
            "bias_before",
            "note",
            "A bias before a norm does nothing",
            f"The bias of {few(list(found.values()))} is subtracted again by the norm behind it; "
            "its gradient is 0, and weight decay or rounding is all that moves it.",
            list(found),
        )


def few_values(examined: Examination) -> Iterator[Finding]:
    """Batch statistics over too few values."""
    moving = [s for s in examined.keepers if not s.made.frozen]
    values = {s.path: examined.values.get(s.path, s.values) for s in moving}
    sites = [path for path, count in values.items() if count < FEW]
    if not sites:
        return
    least = min(values.values())
    gain = 1 / math.sqrt(max(2 * (least - 1), 0.5))
    cut = ", in sets" if least < min(s.values for s in moving) else ""
    yield Finding(
        "few_values",
        "serious" if least <= VERY_FEW else "warning",
        "Statistics are taken over too few values",
        f"One set has {least:.0f} values at {few(sites)} (batches of {examined.size}{cut}): its "
        f"standard deviation scatters by about {gain:.0%}, which is noise in training that "
        "evaluation does not have.",
        sites,
        {"values": {path: values[path] for path in sites}},
    )


def cancellation(examined: Examination) -> Iterator[Finding]:
    """A variance computed as E[x^2] - E[x]^2 in float32 where the mean is many deviations."""
    found: dict[str, tuple[float, float]] = {}
    for site in examined.keepers:
        if not (site.made.fast and site.look):
            continue
        v, m = site.look["var"], site.look["mean"]
        scale = v + site.made.epsilon
        error = np.abs(site.look["fast"] - v) / scale
        offset = np.abs(m) / np.sqrt(np.maximum(v, 1e-30))
        worst = np.unravel_index(int(error.argmax()), error.shape)
        if error[worst] > LOST:
            found[site.path] = float(error[worst]), float(offset[worst])
    if found:
        path = max(found, key=lambda p: found[p][0])
        error_of, offset_of = found[path]
        yield Finding(
            "cancellation",
            "serious",
            "The variance loses its digits",
            f"At {path} a mean is {offset_of:,.0f} standard deviations, and E[x^2] - E[x]^2 in "
            f"float32 gives a variance that is off by {error_of:.0%}; in two passes it is exact.",
            sorted(found, key=lambda p: -found[p][0]),
            {"relative error": {p: e for p, (e, _) in found.items()}},
        )


# ---- Dropout


def dropout_before(examined: Examination) -> Iterator[Finding]:
    """Dropout before a norm: in training it sees a larger variance than in evaluation (Li et al.,
    2019, Understanding the Disharmony between Dropout and Batch Normalization)."""
    if not examined.structure.dropouts:
        return
    measured: dict[str, float] = {}
    predicted: dict[str, float | None] = {}
    for site in examined.keepers:
        maker = _dropout_of(examined, site)
        ratio, error = _variance_ratio(site)
        if maker is None and (abs(math.log(ratio)) < max(BIG_SHIFT, 5 * error) or measured):
            continue
        measured[site.path] = ratio
        if maker is not None:
            predicted[site.path] = _predicted(examined, site, maker)
    if not measured:
        return
    path = min(measured, key=measured.__getitem__)
    largest = max(abs(math.log(ratio)) for ratio in measured.values())
    said = {p: r for p, r in predicted.items() if r is not None}
    foretold = f", {said[path]:.3g} predicted" if path in said else ""
    yield Finding(
        "dropout_before",
        _severity(largest, hurts(examined)),
        "Dropout before a norm shifts its variance",
        f"At {path} the variance in evaluation is {measured[path]:.3g} times that in "
        f"training{foretold}: the running statistics are those of training.",
        list(measured),
        {"measured": measured, "predicted": said},
    )


def _severity(shift: float, harmful: bool) -> str:
    if shift > BIG_SHIFT and harmful:
        return "serious"
    return "warning" if shift > SHIFT else "note"


def _dropout_of(examined: Examination, site: Site) -> Maker | None:
    """The dropout that made the input of a site, by itself or through one linear map."""
    for call in examined.structure.training[site.path]:
        for maker in (call.maker, call.maker.before if call.maker else None):
            if maker is not None and maker.what == "dropout":
                return maker
            if maker is None or maker.what != "linear":
                break
    return None


def _variance_ratio(site: Site) -> tuple[float, float]:
    """Variance of the input without dropout over that with it, mean over features, and the standard
    error of its logarithm over the batches."""
    without, with_it = site.look["var"], site.trained["var"]
    alive = (without > 1e-10).all(0) & (with_it > 1e-10).all(0)
    if not alive.any():
        return 1.0, 0.0
    one, other = pooled(site.look).var[alive], pooled(site.trained).var[alive]
    logs = np.log(without[:, alive] / with_it[:, alive]).mean(1)
    error = logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return float(np.exp(np.log(one / other).mean())), float(error)


def _predicted(examined: Examination, site: Site, maker: Maker) -> float | None:
    """The same ratio from the rate alone. Kept with probability p and divided by it, a value h gets
    the variance ``(1 - p) / p * E[h^2]`` on top, so that a site behind weights w has

        v / (v + (1 - p) / p * sum_i w_i^2 E[h_i^2])

    (w = 1 for a dropout right before it: Li et al.'s v / ((c^2 + v) / p - c^2))."""
    square = examined.dropped.get(maker.path)
    if square is None:
        return None
    keep, v = 1 - maker.rate, site.precise.var
    kernel = _kernel_between(examined, site)
    if kernel is not None:
        if kernel.shape[-2] != len(square):
            return None
        square = np.einsum("...io,i->o", np.square(kernel), square)
    alive = v > 1e-10
    if square.shape != v.shape or not alive.any():
        return None
    ratio = v[alive] / (v[alive] + (1 - keep) / keep * square[alive])
    return float(np.exp(np.log(ratio).mean()))


def _kernel_between(examined: Examination, site: Site) -> Any:
    """The kernel of the linear map that made the input of a site, or None."""
    maker = next((c.maker for c in examined.structure.training[site.path] if c.maker), None)
    if maker is None or maker.what != "linear":
        return None
    flat = flatten_dict(examined.variables["params"])
    return np.asarray(flat[(*maker.path.split("/"), "kernel")], float)


# ---- Scales, channels, weight decay


def scale_decay(examined: Examination) -> Iterator[Finding]:
    """Weight decay on the scale or the bias of a norm."""
    treatment = examined.treatment
    if treatment is None or not treatment.decayed:
        return
    paths = [path for path in examined.sites if path in treatment.decayed]
    scales = [s.scale for p in paths if (s := examined.sites[p]).scale is not None]
    size = float(np.mean(np.abs(np.concatenate(scales)))) if scales else math.nan
    yield Finding(
        "scale_decay",
        "warning",
        "Weight decay acts on the scales of norms",
        f"Without a gradient the optimizer shrinks scale or bias at {few(paths)}; their scales "
        f"are {size:.2g} on average. It pulls the signal to zero rather than the weights.",
        paths,
        {"mean scale": size},
    )


def scale_zero(examined: Examination) -> Iterator[Finding]:
    """Scales so near zero that nothing passes."""
    shares = {
        site.path: float(np.mean(np.abs(site.scale) < NOTHING))
        for site in examined.sites.values()
        if site.scale is not None
    }
    found = {path: share for path, share in shares.items() if share >= SOME}
    if found:
        path = max(found, key=found.__getitem__)
        yield Finding(
            "scale_zero",
            "serious" if found[path] > MOST else "warning",
            "Scales near zero",
            f"{found[path]:.0%} of the scales at {path} are below {NOTHING:g}: these channels "
            "carry nothing but their bias.",
            sorted(found, key=lambda p: -found[p]),
            {"share": found},
        )


def dead(examined: Examination) -> Iterator[Finding]:
    """Channels that no gradient reaches, or that are constant: they cannot learn any more."""
    found = {}
    for site in examined.sites.values():
        if not site.look or not _finite(site):
            continue
        constant = np.asarray(site.look["constant"].astype(bool).all(0))
        scales = np.ones(len(constant)) if site.scale is None else np.abs(site.scale)
        felt = site.felt if len(site.felt) == len(constant) else np.ones_like(constant)
        share = float(np.mean((constant & (scales >= NOTHING)) | ~felt))
        if share >= SOME:
            found[site.path] = share
    # Nothing at all: behind stop_gradient, or a layer that starts at zero, on purpose.
    partly = {path: share for path, share in found.items() if share < 1}
    if found:
        path = max(partly or found, key=found.__getitem__)
        yield Finding(
            "dead",
            "serious" if partly and partly[path] >= MOST else "warning",
            "Dead channels",
            f"{found[path]:.0%} of the channels at {path} are constant, or no gradient of the "
            f"output reaches them in any of {examined.batches} batches: a ReLU behind them never "
            "opens, weights behind them are 0, or a stop_gradient stands there.",
            sorted(found, key=lambda p: -found[p]),
            {"share": found},
        )


# ---- Padding


def padding(examined: Examination) -> Iterator[Finding]:
    """Padded positions that count as data in the statistics."""
    found: Mapping[str, tuple[float, float]] = {}
    for site in examined.keepers:
        if "unpadded_mean" not in site.look:
            continue
        inside, everything = pooled(site.look, "unpadded_"), site.precise
        found = {**found, site.path: distance(everything, inside)}
    worst = {path: max(shift) for path, shift in found.items()}
    if not worst or max(worst.values()) < SHIFT:
        return
    path = max(worst, key=worst.__getitem__)
    mean, log_ratio = found[path]
    yield Finding(
        "padding",
        "serious" if worst[path] > 0.1 else "warning",
        "Padding counts as data",
        f"{examined.padding:.0%} of the positions are padding, and the norms get no mask: at "
        f"{path} the mean is off by {mean:.2g} standard deviations and the variance by a factor "
        f"of {math.exp(log_ratio):.3g}.",
        [p for p in found if worst[p] >= SHIFT],
        {"padded": examined.padding, "shift": found},
    )
