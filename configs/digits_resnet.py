"""scikit-learn's 8x8 digits, a ResNet-8 (He et al., 2016) with BatchNorm, shifted by a pixel.

    python -m bnresearch train --config=configs/digits_resnet.py --workdir=runs/digits_resnet

Expected: test accuracy 99.93 % (95 % interval 99.72 to 100, n = 5 seeds, 270 test images).
Cost: 6.9 s with compilation, then 4.4 s (median of 4), on two CPU cores (jax 0.10.2, 2026-11-20).
"""

from ml_collections import ConfigDict

from bnresearch.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "digits"
    config.data.batch_size = 60
    config.data.validation_fraction = 0.15
    config.data.augment = "crop"
    config.data.pad = 1
    config.model.name = "resnet"
    config.model.resnet.depth = 8
    config.optim.learning_rate = 0.1
    config.optim.weight_decay = 5e-4
    config.optim.schedule.warmup = "1ep"
    config.train.duration = "40ep"
    config.train.eval_every = "5ep"
    config.train.checkpoint_every = "10ep"
    return config
