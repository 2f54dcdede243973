"""BatchNorm before or after the activation.

    python -m bnresearch study configs/studies/placement.py --scale=quick --out=runs/placement

Three nets and three activations, six learning rates each: an MLP (3 layers of 100) on
Fashion-MNIST, 300 steps of batch 60; a plain conv net (2 layers of 8 and 2 of 16 features) on 8x8
digits, 300 steps; a ResNet-8 of half width on digits, 150 steps. In the ResNet the norm at the end
of a branch stays there under either placement, because the addition comes between it and the
activation. Needs Fashion-MNIST in TFDS_DATA_DIR.

Found: with sigmoid in the MLP, after is better by 1.4 points (1.1 to 1.6, n = 10), which refutes
the prediction; eight of nine claims are inconclusive. All verdicts: docs/studies.md.
Cost: 197 s at quick on two CPU cores (jax 0.10.2, 2026-11-20).
"""

from bnresearch.study import (
    Arm,
    Difference,
    Equivalence,
    Scale,
    Study,
    Tune,
    final,
    log_range,
    settings,
)

DENSE, CONV, RESNET = "MLP, Fashion-MNIST", "conv net, digits", "ResNet-8, digits"
NETS = {
    DENSE: {
        "data.name": "fashion_mnist",
        "data.validation_fraction": 0.1,
        "data.eval_batch_size": 1000,
        "model.name": "mlp",
        "train.duration": "300st",
    },
    CONV: {
        "model.name": "plain",
        "model.plain.widths": (8, 16),
        "model.plain.convs": (2, 2),
        "train.duration": "300st",
    },
    RESNET: {
        "model.name": "resnet",
        "model.resnet.depth": 8,
        "model.resnet.width": 0.5,
        "train.duration": "150st",
    },
}
ACTIVATIONS = ("relu", "tanh", "sigmoid")
MODELS = ("mlp", "plain", "resnet")


def placed(where: str) -> dict[str, str]:
    return {f"model.{model}.placement": where for model in MODELS}


def activated(name: str) -> dict[str, str]:
    return {f"model.{model}.activation": name for model in MODELS}


def better(first: str, second: str, net: str, activation: str) -> Difference:
    where = {"net": net, "activation": activation}
    return Difference(treatment=first, control=second, measure="accuracy", sesoi=0.5, where=where)


def equal(net: str, activation: str) -> Equivalence:
    where = {"net": net, "activation": activation}
    return Equivalence(
        treatment="after", control="before", measure="accuracy", margin=0.5, where=where
    )


def get_study() -> Study:
    return Study(
        question="Should BatchNorm stand before or after the activation?",
        source="Ioffe & Szegedy (2015), arXiv:1502.03167, section 3.2: before, where the input is "
        "more symmetric. Mishkin, Sergievskiy & Matas (2017), Systematic evaluation of CNN "
        "advances on the ImageNet, arXiv:1606.02228, and the tables of their caffenet-benchmark: "
        "with ReLU after is better in CaffeNet (0.493 against 0.478 with scale and bias) and worse "
        "in GoogLeNet (0.596 against 0.603). He et al. (2016), arXiv:1603.05027: in ResNets the "
        "place matters where it is on the skip path, which it is not here.",
        prediction="With ReLU after is better in the plain conv net and equal elsewhere. With "
        "tanh, which is symmetric, nothing changes. With sigmoid before is better: what goes in "
        "would saturate it, and what comes out is all positive.",
        base="../digits_mlp.py",
        overrides={
            "train.eval_every": "100st",
            "train.log_every": "100st",
            "train.checkpoint_every": "never",
        },
        arms={
            "before": Arm(overrides=placed("before_act"), label="before the activation"),
            "after": Arm(overrides=placed("after_act"), label="after the activation"),
        },
        axes={
            "net": settings(NETS),
            "activation": settings({name: activated(name) for name in ACTIVATIONS}),
            "rate": log_range("optim.learning_rate", 0.01, 10**0.5, 6, label="learning rate"),
        },
        tune=Tune("rate"),
        measures={
            # A run that diverges reads what guessing reads.
            "accuracy": final("accuracy", diverged=10.0),
            "loss": final("loss"),
        },
        claims=[
            equal(DENSE, "relu"),
            better("after", "before", CONV, "relu"),
            equal(RESNET, "relu"),
            *(equal(net, "tanh") for net in NETS),
            *(better("before", "after", net, "sigmoid") for net in NETS),
        ],
        scales={
            "smoke": Scale(
                seeds=1,
                axes={
                    "net": settings({DENSE: {**NETS[DENSE], "train.duration": "5st"}}),
                    "activation": settings({"relu": activated("relu")}),
                    "rate": log_range("optim.learning_rate", 0.1, 1, 2, label="learning rate"),
                },
            ),
            "quick": Scale(seeds=10),
            "full": Scale(
                seeds=30,
                axes={
                    "net": settings(
                        {name: {**net, "train.duration": "1000st"} for name, net in NETS.items()}
                    )
                },
            ),
        },
    )
