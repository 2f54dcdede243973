"""CIFAR-10, the wide ResNet-18 with a 3x3 stem that is common there: one-cycle, 30 epochs, bf16.

    python -m bnresearch train --config=configs/cifar10_resnet18.py --workdir=runs/cifar10_resnet18

Expected: no whole run is on record yet; it wants an accelerator.
Cost: two busy CPU cores made 34 images/s at batch 128 (jax 0.10.2, 2026-11-20, one run of 6 steps):
about 11 hours for the 30 epochs.
"""

from ml_collections import ConfigDict

from bnresearch.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dtype = "bfloat16"
    config.data.name = "cifar10"
    config.data.batch_size = 512
    config.data.eval_batch_size = 500
    config.data.validation_fraction = 0.1
    config.data.augment = "crop_flip"
    config.data.pad = 4
    config.model.name = "resnet"
    config.model.resnet.family = "imagenet"
    config.model.resnet.depth = 18
    config.model.resnet.stem = "cifar"
    config.task.classification.label_smoothing = 0.1
    config.optim.learning_rate = 0.4
    config.optim.sgd.nesterov = True
    config.optim.weight_decay = 5e-4
    config.optim.schedule.name = "one_cycle"
    config.train.duration = "30ep"
    config.train.log_every = "50st"
    return config
