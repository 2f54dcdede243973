"""How each finding is mended: in the code of one's own model, and by a command for a run."""

from collections.abc import Mapping
from typing import NamedTuple


class Mend(NamedTuple):
    """What to write for a model of one's own, and for a run; ``{workdir}`` is the run's folder."""

    model: str
    run: str


RECALIBRATE = Mend(
    "variables = bnresearch.recalibrate(model, variables, batches)",
    "python -m bnresearch eval --workdir={workdir} --stats=precise --save={workdir}_precise",
)
TRAIN = "python -m bnresearch train --config=... --workdir=... "

MENDS: Mapping[str, Mend] = {
    "not_finite": Mend(
        "go back to a checkpoint before, with a lower learning rate or clipped gradients "
        "(optax.clip_by_global_norm); and look at the batches: np.isfinite(x).all()",
        TRAIN + "--config.optim.learning_rate=..., or --config.optim.clip_norm=1",
    ),
    "broken": Mend(
        f"{RECALIBRATE.model}  # then look for what made them diverge: the batch, the learning "
        "rate",
        RECALIBRATE.run,
    ),
    "never_updated": Mend(
        "y, new = model.apply(variables, x, train=True, mutable=['batch_stats'])  # and keep "
        f"new['batch_stats']; to repair what is there: {RECALIBRATE.model}",
        RECALIBRATE.run,
    ),
    "young": Mend(
        f"{RECALIBRATE.model}  # or train longer, or nn.BatchNorm(momentum=0.9)",
        f"{RECALIBRATE.run}  # in the next training --config.norm.batch.average=debiased",
    ),
    "scope": Mend(
        "nn.BatchNorm(axis_name='batch') where the step is a pmap or shard_map over 'batch', "
        "without axis_name for statistics per device; to repair what is there: "
        f"{RECALIBRATE.model}",
        f"{TRAIN}--config.norm.scope=global",
    ),
    "decay_swapped": Mend(
        f"nn.BatchNorm(momentum=0.9)  # torch's 0.1; to repair what is there: {RECALIBRATE.model}",
        f"{RECALIBRATE.run}  # in the next training --config.norm.batch.decay=0.9",
    ),
    "half_precision": Mend(
        "variables['batch_stats'] = jax.tree.map(lambda s: s.astype('float32'), "
        "variables['batch_stats']), and nn.BatchNorm(force_float32_reductions=True); then "
        f"{RECALIBRATE.model}",
        f"{TRAIN}--config.norm.batch.stat_dtype=float32",
    ),
    "slow": Mend(
        f"{RECALIBRATE.model}  # or a smaller decay: nn.BatchNorm(momentum=0.9)",
        f"{RECALIBRATE.run}  # in the next training --config.norm.batch.decay=0.9",
    ),
    "evaluation_gap": RECALIBRATE,
    "cancellation": Mend(
        "nn.BatchNorm(use_fast_variance=False), or bnresearch.BatchNorm; or subtract a constant "
        "from the input first",
        f"{TRAIN}--config.norm.batch.variance=two_pass",
    ),
    "dropout_before": Mend(
        f"put the dropout behind the last norm, or {RECALIBRATE.model} (it sees no dropout)",
        RECALIBRATE.run,
    ),
    "bias_before": Mend(
        "nn.Dense(..., use_bias=False) or nn.Conv(..., use_bias=False)",
        "leave the bias out in the model",
    ),
    "scale_decay": Mend(
        "optax.adamw(..., mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))",
        f"{TRAIN}--config.optim.decay_norms_and_biases=False",
    ),
    "scale_zero": Mend(
        "leave scales out of weight decay, lower the learning rate, or start them at 1 "
        "(scale_init=nn.initializers.ones)",
        f"{TRAIN}--config.optim.decay_norms_and_biases=False, or a lower optim.learning_rate",
    ),
    "dead": Mend(
        "lower the learning rate, or an activation that never closes (nn.leaky_relu, nn.gelu)",
        f"{TRAIN}--config.optim.learning_rate=..., or an activation that never closes "
        "(--config.model.mlp.activation=leaky_relu)",
    ),
    "few_values": Mend(
        "a larger batch, axis_name over all devices, or a norm without batch statistics "
        "(nn.GroupNorm, nn.LayerNorm)",
        f"{TRAIN}--config.data.batch_size=..., --config.norm.scope=global, or "
        "--config.norm.kind=group",
    ),
    "padding": Mend(
        "nn.BatchNorm(...)(x, mask=mask[..., None])  # mask: [batch, time], True for data",
        "hand the norms mask=, see bnresearch.layers.site_inputs",
    ),
    "non_iid": Mend(
        "shuffle the examples before they are cut into batches",
        "the data of a run are shuffled from (seed, step); look at the source of the data",
    ),
    "wrong_use": Mend(
        "nn.BatchNorm(use_running_average=not train)",
        "hand the model norms made with use='batch' in training, 'running' in evaluation",
    ),
    "double": Mend("leave one of the two norms out", "leave one of the two norms out"),
    "frozen_moves": Mend(
        "nn.BatchNorm(use_running_average=True) at the frozen sites, in training, too",
        TRAIN + "--config.norm.rules=\"('PATTERN -> frozen',)\"",
    ),
    "preprocessing": Mend(
        "give evaluation the same scaling, channel order and resizing as training",
        "give evaluation the same scaling, channel order and resizing as training",
    ),
}
