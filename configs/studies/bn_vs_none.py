"""Does BatchNorm help an MLP to read handwritten digits?

    scripts/quickstart.sh
    python -m bnresearch study configs/studies/bn_vs_none.py --scale=quick --out=runs/quickstart

The first question. Three hidden layers of 100 units on scikit-learn's 8x8 digits, with BatchNorm
and without any norm; the latter also from the start that BatchNorm would have given it on the first
batch (init.name=matched), so that what is left is not a matter of initialisation.

Found: BatchNorm can use a rate ten times as large (supported, n = 10); the gain at the best rate of
each, 0.4 points (0.0 to 0.9) against the matched start, is too small to be told from the 0.5 points
that would matter. Numbers and time: README.md.
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
)


def get_study() -> Study:
    return Study(
        question="Does BatchNorm help an MLP to read handwritten digits?",
        source="Ioffe & Szegedy (2015), Batch Normalization, ICML, arXiv:1502.03167, section 4.1: "
        "such a net (with sigmoids, on MNIST) learns faster and ends higher with BatchNorm.",
        prediction="Where both nets train well, at a rate of 0.1, they read equally well. "
        "BatchNorm takes rates several times as large, and at its best one reads more.",
        base="../digits_mlp.py",
        overrides={"train.eval_every": "5ep", "train.checkpoint_every": "never"},
        arms={
            "batch": Arm(overrides={"norm.kind": "batch"}, label="BatchNorm"),
            "none": Arm(overrides={"norm.kind": "none"}, label="no norm"),
            "none_matched": Arm(
                overrides={"norm.kind": "none", "init.name": "matched"},
                label="no norm, matched start",
            ),
        },
        axes={"rate": log_range("optim.learning_rate", 0.01, 10**0.5, 6, label="learning rate")},
        tune=Tune("rate"),
        measures={
            # A run that diverges reads what guessing reads.
            "accuracy": final("accuracy", diverged=10.0),
            "largest rate": largest_usable("rate", at_least=0.9),
        },
        claims=[
            Difference(treatment="batch", control="none", measure="accuracy", sesoi=0.5),
            Difference(treatment="batch", control="none_matched", measure="accuracy", sesoi=0.5),
            Equivalence(
                treatment="batch", control="none_matched", measure="accuracy", margin=1.0, at=0.1
            ),
            Difference(treatment="batch", control="none_matched", measure="largest rate", sesoi=3),
        ],
        scales={
            "smoke": Scale(
                seeds=2,
                overrides={"train.duration": "2ep", "train.eval_every": "1ep"},
                axes={"rate": log_range("optim.learning_rate", 0.1, 1, 2, label="learning rate")},
            ),
            "quick": Scale(seeds=10),
            "full": Scale(seeds=50),
        },
    )
