"""CIFAR-10, ResNet-20 as He et al. (2016) trained it: 64k steps of 128, flips and padded crops.

    python -m bnresearch train --config=configs/cifar10_resnet20.py --workdir=runs/cifar10_resnet20

Expected: the paper's table 6 has 8.75 % test error, trained on all 50,000 images; here 5,000 of
them are held out for validation. No whole run is on record yet.
Cost: two CPU cores that did other work as well made 369 images/s (jax 0.10.2, 2026-11-20, one run
of one epoch, 50.9 % test accuracy): about six hours for the whole run.
"""

from ml_collections import ConfigDict

from bnresearch.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.validation_fraction = 0.1
    config.data.augment = "crop_flip"
    config.data.pad = 4
    config.model.name = "resnet"
    config.model.resnet.depth = 20
    config.optim.learning_rate = 0.1
    config.optim.weight_decay = 1e-4
    config.optim.decay_norms_and_biases = True
    config.optim.schedule.name = "step"
    config.optim.schedule.step.boundaries = (0.5, 0.75)
    config.train.duration = "64000st"
    config.train.log_every = "100st"
    config.train.eval_every = "1ep"
    config.train.checkpoint_every = "1ep"
    return config
