"""Schedules, durations, parameter groups and optimizers: all from optax, all numbers as data."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from bnresearch.errors import UserError, lookup
from bnresearch.models.blocks import in_head

Schedule = Callable[[Any], Any]


def defaults() -> dict[str, Any]:
    """The config's ``optim`` with its defaults."""
    return dict(
        name="sgd",
        learning_rate=0.1,  # the peak: after warm-up
        schedule=dict(
            name="cosine",
            warmup="0ep",  # linear: the first of n steps has 1/n of the peak
            **{name: dict(entry.options) for name, entry in SCHEDULES.items()},
        ),
        weight_decay=0.0,
        decay_norms_and_biases=False,
        clip_norm=0.0,  # of the whole gradient; 0: no clipping
        agc=0.0,  # adaptive clipping: largest ratio of gradient to weights, per unit; 0: none
        **{name: dict(entry.options) for name, entry in OPTIMIZERS.items()},
    )


def parse_duration(key: str, text: str, *, positive: bool = False) -> tuple[float, str]:
    """``"10ep"`` (epochs, may be fractional) or ``"500st"`` (optimizer steps) as number, unit."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ep|st)", text)
    if not match:
        raise UserError(
            f"{key}={text!r} is no duration; write epochs as '10ep' or steps as '500st'"
        )
    if positive and float(match[1]) == 0:
        raise UserError(f"{key}={text!r} must be longer than nothing")
    return float(match[1]), match[2]


def steps(key: str, text: str, steps_per_epoch: float) -> int:
    """A duration in whole optimizer steps; at least 1 unless it is zero."""
    number, unit = parse_duration(key, text)
    count = number * (steps_per_epoch if unit == "ep" else 1)
    if count >= 2**31:
        raise UserError(f"{key}={text!r} is {count:.3g} steps; give less than 2**31")
    return max(1, round(count)) if count else 0


class ScheduleEntry(NamedTuple):
    """``make(warmup, rest, **options)`` gives the shape of the ``rest`` of the steps, behind the
    ``warmup``: step of the rest -> factor, at most 1."""

    make: Callable[..., Schedule]
    options: Mapping[str, Any]


def _constant(warmup: int, rest: int) -> Schedule:
    return optax.constant_schedule(1.0)


def _cosine(warmup: int, rest: int, final: float) -> Schedule:
    return optax.cosine_decay_schedule(1.0, rest, alpha=final)


def _step(warmup: int, rest: int, boundaries: tuple[float, ...], factor: float) -> Schedule:
    drops: dict[int, float] = {}
    for boundary in boundaries:
        step = round(boundary * (warmup + rest)) - warmup
        if step < 1:
            raise UserError(
                f"optim.schedule.step.boundaries={boundaries}: a drop at {boundary} of the "
                f"training lies in its warm-up ({warmup} of {warmup + rest} steps); shorten that"
            )
        drops[step] = drops.get(step, 1.0) * factor  # in short runs two can fall on one step
    return optax.piecewise_constant_schedule(1.0, drops)


def _one_cycle(warmup: int, rest: int, rise: float, start: float, final: float) -> Schedule:
    if warmup:
        raise UserError(
            "optim.schedule.warmup has no place before one_cycle, which rises by itself; set the "
            "warm-up to '0ep' and optim.schedule.one_cycle.rise to the part that rises"
        )
    if int(rise * rest) < 1:
        raise UserError(
            f"optim.schedule.one_cycle.rise={rise} of {rest} steps is less than one step; lengthen "
            "train.duration or the rise"
        )
    # optax starts at peak / div_factor and ends at start / final_div_factor.
    return optax.cosine_onecycle_schedule(rest, 1.0, rise, 1 / start, start / final)


# boundaries and rise are fractions of the whole training.
SCHEDULES: dict[str, ScheduleEntry] = {
    "constant": ScheduleEntry(_constant, {}),
    "cosine": ScheduleEntry(_cosine, dict(final=0.0)),
    "step": ScheduleEntry(_step, dict(boundaries=(0.5, 0.75), factor=0.1)),
    "one_cycle": ScheduleEntry(_one_cycle, dict(rise=0.3, start=0.04, final=4e-6)),
}


def schedule(config: ConfigDict, total: int, steps_per_epoch: float) -> Schedule:
    """Step -> factor of the peak learning rate, over ``total`` steps with linear warm-up."""
    warmup = steps("optim.schedule.warmup", config.warmup, steps_per_epoch)
    if warmup >= total > 0:
        raise UserError(
            f"optim.schedule.warmup={config.warmup!r} ({warmup} steps) is not shorter than the "
            f"training ({total} steps); shorten it or lengthen train.duration"
        )
    shape = SCHEDULES[config.name].make(warmup, total - warmup, **config[config.name])
    if not warmup:
        return shape
    rise = optax.linear_schedule(1 / warmup, 1.0, warmup - 1) if warmup > 1 else shape
    return optax.join_schedules([rise, shape], [warmup])


class OptimizerEntry(NamedTuple):
    """``make(learning_rate, weight_decay, mask, **options)`` and the default options."""

    make: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any]


def _sgd(rate: Any, decay: Any, mask: Any, momentum: Any, nesterov: bool) -> Any:
    sgd = optax.sgd(rate, momentum, nesterov)
    return sgd if decay is None else optax.chain(optax.add_decayed_weights(decay, mask), sgd)


def _adamw(rate: Any, decay: Any, mask: Any, **options: Any) -> Any:
    return optax.adamw(rate, weight_decay=0.0 if decay is None else decay, mask=mask, **options)


def _lars(rate: Any, decay: Any, mask: Any, **options: Any) -> Any:
    # You et al. 2017: what is not decayed is not scaled by the trust ratio either.
    masks = dict(weight_decay_mask=True, trust_ratio_mask=True)
    if mask is not None:
        masks = dict(weight_decay_mask=mask, trust_ratio_mask=mask)
    return optax.lars(rate, 0.0 if decay is None else decay, **masks, **options)


def _lamb(rate: Any, decay: Any, mask: Any, **options: Any) -> Any:
    return optax.lamb(rate, weight_decay=0.0 if decay is None else decay, mask=mask, **options)


# Weight decay is added to the gradient before momentum in sgd and lars (as the papers do), and
# decoupled from it in adamw (Loshchilov & Hutter, 2019) and lamb (You et al., 2020).
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": OptimizerEntry(_sgd, dict(momentum=0.9, nesterov=False)),
    "adamw": OptimizerEntry(_adamw, dict(b1=0.9, b2=0.999, eps=1e-8)),
    "lars": OptimizerEntry(_lars, dict(momentum=0.9, nesterov=False, trust_coefficient=0.001)),
    "lamb": OptimizerEntry(_lamb, dict(b1=0.9, b2=0.999, eps=1e-6)),
}


def validate(config: ConfigDict) -> None:
    """Raise a UserError for schedule options that cannot be."""
    parse_duration("optim.schedule.warmup", config.schedule.warmup)
    boundaries = config.schedule.step.boundaries
    if list(boundaries) != sorted(set(boundaries)) or any(not 0 < b < 1 for b in boundaries):
        raise UserError(
            f"optim.schedule.step.boundaries={boundaries}: give rising fractions between 0 and 1"
        )
    cycle = config.schedule.one_cycle
    if not (0 < cycle.rise < 1 and 0 < cycle.final <= cycle.start <= 1):
        raise UserError("optim.schedule.one_cycle needs 0 < rise < 1 and 0 < final <= start <= 1")
    for name in ("sgd", "lars"):
        if config.name == name and config[name].nesterov and not config[name].momentum:
            raise UserError(f"optim.{name}.nesterov needs a momentum; optim.{name}.momentum is 0")


def decay_mask(params: Any) -> Any:
    """True for the weights, False for scales and biases: whatever is called so, and whatever is one
    number, or one per feature, by any name."""

    def is_weight(path: tuple[Any, ...], leaf: Any) -> bool:
        return path[-1].key not in ("scale", "bias") and leaf.ndim > 1

    return jax.tree_util.tree_map_with_path(is_weight, params)


def adaptive_clip(ratio: Any) -> optax.GradientTransformation:
    """Adaptive gradient clipping (Brock et al., 2021).

        g <- g * min(1, ratio * max(||w||, 1e-3) / ||g||)

    Norms are taken unit by unit: over the fan-in of each output feature for kernels, over the whole
    of anything with one axis or none (biases, scales). The head is not clipped. optax's formula; it
    takes kernels of three axes for those of attention, not for one-dimensional convolutions.

    Pitfall: what starts at 0 (biases, the last kernels of Fixup) begins with gradients of at most
    ratio * 1e-3.
    Citation: Brock, De, Smith & Simonyan (2021), High-Performance Large-Scale Image Recognition
    Without Normalization, ICML, arXiv:2102.06171.
    """

    def outside_head(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: not in_head(path), params)

    return optax.masked(optax.adaptive_grad_clip(ratio), outside_head)


def make_optimizer(
    config: ConfigDict, numbers: Mapping[str, Any], factor: Any
) -> optax.GradientTransformation:
    """The gradient transformation of one step.

    Args:
      config: the ``optim`` part of a config; decides the structure only.
      numbers: values by dotted key (``"optim.learning_rate"`` ...), may be traced.
      factor: of the peak learning rate at this step, from ``schedule``.
    """
    entry = lookup(OPTIMIZERS, config.name, "optim.name")
    options = dict(config[config.name].items())
    for name in options:
        options[name] = numbers.get(f"optim.{config.name}.{name}", options[name])
    if config.name == "sgd" and not config.sgd.momentum:
        options["momentum"] = None
    decay = numbers["optim.weight_decay"] if config.weight_decay else None
    mask = None if config.decay_norms_and_biases else decay_mask
    optimizer = entry.make(numbers["optim.learning_rate"] * factor, decay, mask, **options)
    clips = []
    if config.agc:
        clips.append(adaptive_clip(numbers["optim.agc"]))
    if config.clip_norm:
        clips.append(optax.clip_by_global_norm(numbers["optim.clip_norm"]))
    return optax.chain(*clips, optimizer) if clips else optimizer
