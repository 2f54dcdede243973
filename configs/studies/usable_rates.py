"""Learning rates that nets can use, with and without BatchNorm.

    python -m bnresearch study configs/studies/usable_rates.py --scale=quick --out=runs/usable_rates

Eight layers without skips, dense (100 units each) or convolutional (3x3, 4 layers of 8 and 4 of 16
features), on 8x8 digits: 300 steps of batch 60 with momentum SGD and a cosine schedule. A rate is
usable for a seed if the run does not diverge and ends with at least 90 % of the validation images
read. Besides He's start, the nets without a norm have the one that BatchNorm would give them on the
first batch (init.name=matched).

Found: BatchNorm can use 18 to 32 times the rate of a net without a norm, 6 to 18 times that of
layer and group norm (all supported, n = 10). At the best rate of each it reads 1.9 points more
(1.0 to 2.9) in the conv net; in the MLP nothing is shown. All verdicts: docs/studies.md.
Cost: 166 s at quick on two CPU cores (jax 0.10.2, 2026-11-20).
"""

from bnresearch.study import (
    Arm,
    Difference,
    Equivalence,
    Scale,
    Study,
    Tune,
    final,
    largest_usable,
    log_range,
    settings,
)

DENSE, CONV = "MLP, 8 layers", "conv net, 8 layers"
NETS = {
    DENSE: {
        "model.name": "mlp",
        "model.mlp.widths": (100,) * 8,
        "norm.group.groups": 10,
    },
    CONV: {
        "model.name": "plain",
        "model.plain.widths": (8, 16),
        "model.plain.convs": (4, 4),
        "norm.group.groups": 4,
    },
}
STEP = 3.0  # just under one step of the grid, which is 3.16


def claims_for(net: str) -> list[Difference | Equivalence]:
    """What Bjorck et al. say (all but 3 and 4), and what a pilot saw of layer and group norm."""
    where = {"net": net}

    def larger(control: str, factor: float) -> Difference:
        return Difference(
            treatment="batch", control=control, measure="largest rate", sesoi=factor, where=where
        )

    return [
        larger("none", STEP),
        larger("none_matched", STEP),
        larger("layer", 1.5),
        larger("group", 1.5),
        Equivalence(
            treatment="batch",
            control="none_matched",
            measure="accuracy",
            margin=1.0,
            where=where,
            at=0.01,
            text="at a rate of 0.01, which both can use, the difference is less than 1 point of "
            f"accuracy ({net})",
        ),
        Difference(
            treatment="batch", control="none_matched", measure="accuracy", sesoi=0.5, where=where
        ),
    ]


def get_study() -> Study:
    return Study(
        question="Does BatchNorm let nets use larger learning rates, and is that its benefit?",
        source="Bjorck, Gomes, Selman & Weinberger (2018), Understanding Batch Normalization, "
        "NeurIPS, arXiv:1806.02375: BatchNorm's gain comes from the larger rates it allows; at one "
        "small rate, nets with and without it do about equally well.",
        prediction="The largest usable rate with BatchNorm is more than one half-decade step above "
        "those without a norm, whatever their start, and above those with layer and group norm, "
        "which stand between. At a rate of 0.01 nothing is gained; at the best rate of each "
        "something is.",
        base="../digits_mlp.py",
        overrides={
            "train.duration": "300st",
            "train.eval_every": "100st",
            "train.log_every": "100st",
            "train.checkpoint_every": "never",
        },
        arms={
            "batch": Arm(overrides={"norm.kind": "batch"}, label="BatchNorm"),
            "layer": Arm(overrides={"norm.kind": "layer"}, label="LayerNorm"),
            "group": Arm(overrides={"norm.kind": "group"}, label="GroupNorm"),
            "none": Arm(overrides={"norm.kind": "none"}, label="no norm"),
            "none_matched": Arm(
                overrides={"norm.kind": "none", "init.name": "matched"},
                label="no norm, matched start",
            ),
        },
        axes={
            "net": settings(NETS),
            "rate": log_range("optim.learning_rate", 10**-2.5, 10, 8, label="learning rate"),
        },
        tune=Tune("rate", final("accuracy", "validation")),
        measures={
            "largest rate": largest_usable("rate", at_least=0.9),
            # A run that diverges reads what guessing reads.
            "accuracy": final("accuracy", diverged=10.0),
        },
        claims=[claim for net in NETS for claim in claims_for(net)],
        scales={
            "smoke": Scale(
                seeds=1,
                arms=("batch", "none_matched"),
                overrides={"train.duration": "20st", "train.eval_every": "20st"},
                axes={"rate": log_range("optim.learning_rate", 0.1, 10, 2, label="learning rate")},
            ),
            "quick": Scale(seeds=10),
            "full": Scale(
                seeds=30,
                overrides={"train.duration": "1000st"},
                axes={
                    # Quarter decades, among them all values of the other scales.
                    "rate": log_range("optim.learning_rate", 0.001, 10, 17, label="learning rate")
                },
            ),
        },
    )
