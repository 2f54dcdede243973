"""Nothing against nothing: does the verdict machine find a difference where there is none?

    python -m bnresearch study configs/studies/null.py --scale=quick --out=runs/null

Two arms with the same config, called by different names. They differ in their seeds alone, so that
whatever is found between them is chance. What must come out: neither difference supported nor
refuted, and the two equivalent within 2 points of accuracy.

Found: -0.17 points (-0.53 to 0.20, n = 20) and no difference in the loss, both inconclusive;
equivalence supported. Cost: 8 s on two CPU cores (jax 0.10.2, 2026-11-20).
"""

from bnresearch.study import Arm, Difference, Equivalence, Scale, Study, final


def get_study() -> Study:
    return Study(
        question="Is a digits MLP with BatchNorm better than the same one by another name?",
        source="A check of this laboratory itself: a null study.",
        prediction="No: the arms are the same, and differ by chance alone.",
        base="../digits_mlp.py",
        overrides={
            "train.duration": "300st",
            "train.log_every": "100st",
            "train.eval_every": "300st",
            "train.checkpoint_every": "never",
        },
        arms={
            "left": Arm(label="the one", first_seed=0),
            "right": Arm(label="the other", first_seed=1000),
        },
        measures={"accuracy": final("accuracy"), "loss": final("loss")},
        claims=[
            Difference(treatment="left", control="right", measure="accuracy"),
            Difference(treatment="left", control="right", measure="loss", direction="less"),
            Equivalence(treatment="left", control="right", measure="accuracy", margin=2.0),
        ],
        scales={
            "smoke": Scale(seeds=2, overrides={"train.duration": "20st"}),
            "quick": Scale(seeds=20),
            "full": Scale(seeds=100),
        },
    )
