"""Every normaliser of the house under one name: the table NORMS.

To add one: a pure function in `bnresearch.kinds`, and a row in this file. What a function may ask
for and give back is written at `kind.Kind`; docs/own_norm.md has a worked example.
"""

from bnresearch import averages
from bnresearch.averages import Running
from bnresearch.conventions import CONVENTIONS, PRESETS, complete
from bnresearch.errors import lookup
from bnresearch.kind import CONTEXT, Kind, Page, Result, apply, page, update
from bnresearch.kinds import (
    ablations,
    activating,
    backward,
    branches,
    history,
    mixtures,
    modulated,
    online,
    pointwise,
    rivals,
    starts,
    variants,
    weights,
    whitening,
)
from bnresearch.kinds.batch import batch_norm, normalise
from bnresearch.moments import moments
from bnresearch.sets import Scope, Sets, Stats, pool, whole_batch

__all__ = [
    "CONTEXT",
    "CONVENTIONS",
    "NORMS",
    "PRESETS",
    "Kind",
    "Page",
    "Result",
    "Running",
    "Scope",
    "Sets",
    "Stats",
    "apply",
    "batch_norm",
    "complete",
    "kind_of",
    "moments",
    "normalise",
    "page",
    "pool",
    "update",
    "whole_batch",
]

AFFINE = dict(scale=True, bias=True)

BATCH = dict(**PRESETS["bnresearch"].options, window=16, track="variance", **AFFINE)

# For kinds that have little use for more.
FEW = dict(decay=0.9, epsilon=1e-5, on_single="error", **AFFINE)

NORMS: dict[str, Kind] = {
    # Statistics of the batch.
    "batch": Kind(batch_norm, BATCH, starts.affine, averages.start, averages.update),
    "ghost": Kind(
        variants.ghost_norm,
        dict(size=32, **BATCH),
        starts.affine,
        averages.start,
        averages.update,
    ),
    "renorm": Kind(
        variants.batch_renorm,
        FEW | dict(decay=0.99, r_max=3.0, d_max=5.0, warm_up=5000, r_ramp=40000, d_ramp=25000),
        starts.affine,
        variants.renorm_state,
        variants.renorm_update,
    ),
    "frozen": Kind(
        variants.frozen_norm,
        dict(epsilon=1e-5, trainable=True, **AFFINE),
        starts.affine,
        starts.stats,
        linear_bias=True,
    ),
    "extended": Kind(variants.extended_norm, FEW, starts.affine, starts.stats, averages.update),
    "regularized": Kind(
        variants.regularized_norm,
        dict(mean_penalty=0.01, std_penalty=0.01, **FEW),
        starts.affine,
        starts.stats,
        averages.update,
    ),
    # Parts of batch norm, for ablations.
    "centre": Kind(
        ablations.centre_norm,
        dict(decay=0.9, on_single="error", **AFFINE),
        starts.affine,
        starts.stats,
        averages.update,
    ),
    "mean_only": Kind(
        ablations.mean_only_norm,
        dict(decay=0.9, on_single="error", bias=True),
        ablations.mean_only_start,
        starts.stats,
        averages.update,
    ),
    "scale_only": Kind(
        ablations.scale_only_norm,
        FEW,
        starts.affine,
        starts.stats,
        ablations.scale_only_update,
        linear_bias=True,
    ),
    "lp": Kind(ablations.lp_norm, dict(p=1.0, **FEW), starts.affine, starts.stats),
    "stop_gradient": Kind(
        ablations.stop_gradient_norm, FEW, starts.affine, starts.stats, averages.update
    ),
    "noisy": Kind(
        ablations.noisy_norm,
        dict(shift=0.5, stretch=1.25, shift_jitter=0.1, stretch_jitter=0.1, **FEW),
        starts.affine,
        starts.stats,
        averages.update,
    ),
    # Several statistics at one site, or an affine that depends on something.
    "split": Kind(
        branches.split_norm,
        dict(splits=2, shared=False, **BATCH),
        branches.split_start,
        branches.split_state,
    ),
    "domain": Kind(
        branches.domain_norm,
        dict(domains=2, shared=False, **BATCH),
        branches.domain_start,
        branches.domain_state,
    ),
    "recurrent": Kind(
        branches.recurrent_norm,
        dict(steps=100, scale_start=0.1, **FEW),
        branches.recurrent_start,
        branches.recurrent_state,
    ),
    "conditional": Kind(
        modulated.conditional_norm,
        dict(conditions=10, **FEW),
        modulated.conditional_start,
        starts.stats,
        averages.update,
    ),
    "batch_instance": Kind(
        modulated.batch_instance_norm,
        FEW,
        modulated.batch_instance_start,
        starts.stats,
        averages.update,
    ),
    "representative": Kind(
        modulated.representative_norm, FEW, modulated.representative_start, starts.stats
    ),
    # Statistics of more than this batch.
    "virtual": Kind(
        history.virtual_batch_norm,
        dict(reference=0, own=True, **FEW),
        starts.affine,
        starts.stats,
    ),
    "cross_iteration": Kind(
        history.cross_iteration_norm,
        dict(window=8, compensation="taylor", warm_up=100, **FEW),
        starts.affine,
        history.history_start,
    ),
    "mabn": Kind(
        backward.moving_average_norm,
        FEW | dict(window=16, decay=0.98, warm_up=100, r_max=5.0, r_after=1000),
        starts.affine,
        backward.mabn_start,
        linear_bias=True,
        weights="centred",
    ),
    "power": Kind(
        backward.power_norm,
        dict(backward_decay=0.9, groups=1, warm_up=10000, **FEW),
        starts.affine,
        backward.power_start,
        linear_bias=True,
    ),
    "online": Kind(
        online.online_norm,
        dict(decay=0.999, backward_decay=0.99, epsilon=1e-5, guard="clamp", clamp=5.0, **AFFINE),
        starts.affine,
        online.online_start,
        linear_bias=True,
    ),
    # Whole covariances.
    "decorrelated": Kind(
        whitening.decorrelated_norm,
        dict(method="zca", features_per_group=16, track="whitening", **FEW),
        starts.affine,
        whitening.whitening_start,
    ),
    "iter_norm": Kind(
        whitening.iterative_norm,
        dict(iterations=5, features_per_group=64, track="whitening", **FEW),
        starts.affine,
        whitening.whitening_start,
    ),
    # Between batch and example.
    "switchable": Kind(
        mixtures.switchable_norm,
        BATCH,
        mixtures.switchable_start,
        averages.start,
        averages.update,
        linear_bias=True,
    ),
    "batch_group": Kind(
        mixtures.batch_group_norm,
        BATCH | dict(examples_per_group=0, features_per_group=1, track="second_moment"),
        starts.affine,
        averages.start,
        averages.update,
        linear_bias=True,
    ),
    "evonorm_b0": Kind(
        mixtures.evonorm_b0,
        BATCH,
        mixtures.evonorm_b0_start,
        averages.start,
        averages.update,
        activates=True,
        linear_bias=True,
    ),
    # One example at a time.
    "layer": Kind(
        rivals.layer_norm,
        dict(epsilon=1e-5, over="example", **AFFINE),
        starts.affine,
        linear_bias=True,
    ),
    "rms": Kind(
        rivals.rms_norm,
        dict(epsilon=1e-6, over="features", scale=True, bias=False),
        starts.affine,
        linear_bias=True,
    ),
    "group": Kind(
        rivals.group_norm,
        dict(epsilon=1e-5, groups=32, **AFFINE),
        starts.affine,
        linear_bias=True,
    ),
    "instance": Kind(rivals.instance_norm, dict(epsilon=1e-5, **AFFINE), starts.affine),
    "positional": Kind(
        rivals.positional_norm,
        dict(epsilon=1e-5, scale=False, bias=False),
        starts.affine,
        linear_bias=True,
    ),
    "frn": Kind(
        activating.frn,
        dict(epsilon=1e-6, learned_epsilon=False, **AFFINE),
        activating.frn_start,
        activates=True,
        linear_bias=True,
    ),
    "evonorm_s0": Kind(
        activating.evonorm_s0,
        dict(epsilon=1e-5, groups=32, **AFFINE),
        activating.evonorm_s0_start,
        activates=True,
        linear_bias=True,
    ),
    "proxy": Kind(
        activating.proxy_norm,
        dict(epsilon=1e-5, proxy_epsilon=0.03, groups=1, samples=256, **AFFINE),
        activating.proxy_start,
        activates=True,
        linear_bias=True,
    ),
    # Functions of one value.
    "dyt": Kind(
        pointwise.dyt,
        dict(alpha_start=0.5, **AFFINE),
        pointwise.dyt_start,
        linear_bias=True,
    ),
    "derf": Kind(
        pointwise.derf,
        dict(alpha_start=0.5, **AFFINE),
        pointwise.derf_start,
        linear_bias=True,
    ),
    "none": Kind(rivals.identity, linear_bias=True),
    # The weights in front of the site.
    "weight_norm": Kind(
        weights.weight_norm,
        dict(gain=1.4142135, **AFFINE),
        starts.affine,
        linear_bias=True,
        weights="weight_norm",
    ),
    "weight_standardisation": Kind(
        weights.weight_standardisation,
        dict(epsilon=1e-5, groups=32, **AFFINE),
        starts.affine,
        linear_bias=True,
        weights="standardise",
    ),
    "scaled_weight_standardisation": Kind(
        weights.scaled_weight_standardisation,
        dict(gain=1.7128585, **AFFINE),
        starts.affine,
        linear_bias=True,
        weights="scaled_standardise",
    ),
}

# What others call them, or where to find what is no kind here: for the message only.
_ALSO = {
    "batch (norm.scope says over which devices)": "bn batch_norm batchnorm sync_bn syncbn",
    "ghost": "gbn ghost_batch_norm virtual_batch_size",
    "renorm": "brn batch_renorm renormalization",
    "split": "advprop auxiliary aux_bn split_bn",
    "domain": "dsbn domain_specific",
    "conditional (by a side input) or cross_iteration (over time)": "cbn film",
    "batch_instance": "bin",
    "virtual": "vbn reference",
    "lp (norm.lp.p)": "l1 l2 lp_norm",
    "centre": "center center_only centre_only",
    "scale_only": "batch_rms",
    "decorrelated": "dbn zca pca whitening",
    "iter_norm": "iterative iternorm",
    "switchable": "sn switch_norm",
    "power": "powernorm power_norm pn",
    "layer": "ln layer_norm layernorm",
    "rms": "rms_norm rmsnorm",
    "group": "gn group_norm groupnorm",
    "instance": "in instance_norm",
    "positional": "pono",
    "frn": "tlu filter_response",
    "evonorm_b0 or evonorm_s0": "evonorm evonorm_b evonorm_s",
    "dyt": "dynamic_tanh",
    "weight_norm": "wn weightnorm",
    "weight_standardisation": "ws weight_standardization",
    "scaled_weight_standardisation": "scaled_ws",
    "norm.weights=spectral_norm": "spectral spectral_norm",
    "model.name=fixup|skipinit|nf_resnet": "fixup skipinit rezero nf_resnet",
    "none": "identity no off",
}
OTHER_NAMES = {name: here for here, names in _ALSO.items() for name in names.split()}


def kind_of(name: str, what: str = "norm.kind") -> Kind:
    """The row of a kind.

    Raises:
      UserError: no such kind; the message lists them, and says what others' names are called here.
    """
    return lookup(NORMS, name, what, OTHER_NAMES)
