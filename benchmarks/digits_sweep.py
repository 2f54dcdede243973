"""Ten learning rates of an MLP with BatchNorm, ten seeds each: what `benchmarks.sweep` times.

`full` has 2,000 runs, to see how long it takes to find out that all of them are done.
"""

from bnresearch.study import Scale, Study, final, log_range

STEPS, EVALUATIONS = 500, 5


def get_study() -> Study:
    return Study(
        question="How long do 100 runs take?",
        source="benchmarks/sweep.py",
        prediction="None: this is a benchmark.",
        base="../configs/digits_mlp.py",
        overrides={
            "train.duration": f"{STEPS}st",
            "train.eval_every": f"{STEPS // EVALUATIONS}st",
            "train.log_every": f"{STEPS // EVALUATIONS}st",
            "train.checkpoint_every": "never",
        },
        arms={"batch": {}},
        axes={"rate": log_range("optim.learning_rate", 0.01, 1.0, 10, label="learning rate")},
        measures={"accuracy": final("accuracy")},
        scales={"smoke": Scale(seeds=1), "quick": Scale(seeds=10), "full": Scale(seeds=200)},
    )
