"""BatchNorm in small and in large batches, and its rivals there.

    python -m bnresearch study configs/studies/batch_size.py --scale=quick --out=runs/batch_size

Batches of 2 to 512 at a fixed number of examples seen: a plain conv net (2 layers of 8 and 2 of 16
features) on 8x8 digits for 16 epochs, and an MLP (3 layers of 100) on Fashion-MNIST for 0.4 epochs,
about 21,000 examples each. The learning rate is 0.1 * sqrt(batch size / 32) for all arms.
Running averages remember at least 320 examples, so that small batches are not judged by averages
that are themselves noise: decay 0.9 from batch 32 up, 1 - batch size / 320 below. BatchRenorm's
schedule is the paper's in parts of the training: plain for 4 %, d_max 5 at 20 %, r_max 3 at 30 %.
GhostNorm takes ghosts of 16 examples; in smaller batches it is BatchNorm. Needs Fashion-MNIST in
TFDS_DATA_DIR.

Found: in batches of 2 the MLP loses 63 points with BatchNorm (59 to 67, n = 10) and the conv net
none: there GroupNorm is 1.3 points worse (0.8 to 1.9), which refutes the prediction. BatchRenorm
gains 3.8 points (3.3 to 4.3) in the MLP in batches of 4. All verdicts: docs/studies.md.
Cost: 223 s at quick on two CPU cores (jax 0.10.2, 2026-11-20).
"""

from collections.abc import Sequence

from bnresearch.study import (
    Arm,
    Axis,
    Difference,
    Equivalence,
    Scale,
    Slope,
    Study,
    final,
    settings,
    zipped,
)

SIZES = (2, 4, 8, 32, 128, 512)
EXAMPLES = 21_000  # seen in a run, about
DENSE, CONV = "MLP, Fashion-MNIST", "conv net, digits"
NETS = {
    CONV: {
        "model.name": "plain",
        "model.plain.widths": (8, 16),
        "model.plain.convs": (2, 2),
        "norm.group.groups": 4,
        "train.duration": "16ep",
        "train.log_every": "4ep",
        "train.eval_every": "4ep",
    },
    DENSE: {
        "data.name": "fashion_mnist",
        "data.validation_fraction": 0.1,
        "data.eval_batch_size": 1000,
        "model.name": "mlp",
        "norm.group.groups": 10,
        "train.duration": "0.4ep",
        "train.log_every": "0.1ep",
        "train.eval_every": "0.1ep",
    },
}


def batch_sizes(sizes: Sequence[int]) -> Axis:
    """What changes with the batch size besides it."""
    decays = [1 - 0.1 * min(size / 32, 1) for size in sizes]
    steps = [EXAMPLES / size for size in sizes]
    return zipped(
        {
            "data.batch_size": sizes,
            "optim.learning_rate": [0.1 * (size / 32) ** 0.5 for size in sizes],
            "norm.batch.decay": decays,
            "norm.ghost.decay": decays,
            "norm.renorm.decay": decays,
            "norm.ghost.size": [min(size, 16) for size in sizes],
            "norm.renorm.warm_up": [round(0.04 * n) for n in steps],
            "norm.renorm.d_ramp": [round(0.2 * n) for n in steps],
            "norm.renorm.r_ramp": [round(0.3 * n) for n in steps],
        },
        label="batch size",
        log=True,
    )


def better(first: str, second: str, net: str, size: int, sesoi: float) -> Difference:
    where = {"net": net, "batch size": size}
    return Difference(treatment=first, control=second, measure="accuracy", sesoi=sesoi, where=where)


def widening(net: str) -> Slope:
    return Slope(
        arm="group",
        control="batch",
        axis="batch size",
        measure="accuracy",
        direction="less",
        sesoi=0.1,
        log_x="2",
        where={"net": net},
        text=f"the smaller the batch, the better GroupNorm against BatchNorm ({net}): by more than "
        "0.1 points per halving",
    )


def get_study() -> Study:
    return Study(
        question="How small, and how large, may the batches of BatchNorm be?",
        source="Wu & He (2018), Group Normalization, ECCV, arXiv:1803.08494: in batches of 2 a "
        "ResNet-50 errs 10.6 points more with BatchNorm than with GroupNorm, which does not care; "
        "in batches of 32 they are 0.5 apart. Ioffe (2017), Batch Renormalization, NeurIPS, "
        "arXiv:1702.03275: better in batches of 4. Hoffer, Hubara & Soudry (2017), Train longer, "
        "generalize better, NeurIPS, arXiv:1705.08741: ghosts help in large batches.",
        prediction="GroupNorm is better in batches of 2, as good in batches of 32, and the "
        "difference grows as batches shrink. Dense, in batches of 2, nothing below the last "
        "BatchNorm learns: two values are normalised to +1 and -1 whatever they are. BatchRenorm "
        "is better in batches of 4, ghosts are in batches of 512.",
        base="../digits_mlp.py",
        overrides={"train.checkpoint_every": "never"},
        arms={
            "batch": Arm(overrides={"norm.kind": "batch"}, label="BatchNorm"),
            "group": Arm(overrides={"norm.kind": "group"}, label="GroupNorm"),
            "ghost": Arm(overrides={"norm.kind": "ghost"}, label="GhostNorm"),
            "renorm": Arm(overrides={"norm.kind": "renorm"}, label="BatchRenorm"),
        },
        axes={"net": settings(NETS), "batch size": batch_sizes(SIZES)},
        measures={
            # A run that diverges reads what guessing reads.
            "accuracy": final("accuracy", diverged=10.0),
            "loss": final("loss"),
        },
        claims=[
            better("group", "batch", CONV, 2, 0.5),
            better("group", "batch", DENSE, 2, 10.0),
            *(
                Equivalence(
                    treatment="group",
                    control="batch",
                    measure="accuracy",
                    margin=1.0,
                    where={"net": net, "batch size": 32},
                )
                for net in NETS
            ),
            *(widening(net) for net in NETS),
            *(better("renorm", "batch", net, 4, 0.5) for net in NETS),
            *(better("ghost", "batch", net, 512, 0.5) for net in NETS),
        ],
        scales={
            "smoke": Scale(
                seeds=1,
                arms=("batch", "renorm"),
                axes={
                    "net": settings({DENSE: {**NETS[DENSE], "train.duration": "5st"}}),
                    "batch size": batch_sizes((4, 32)),
                },
            ),
            "quick": Scale(seeds=10),
            "full": Scale(seeds=30, axes={"batch size": batch_sizes([2**i for i in range(1, 10)])}),
        },
    )
