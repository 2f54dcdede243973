"""scikit-learn's 8x8 digits, an MLP of 3x100 with BatchNorm.

    python -m bnresearch train --config=configs/digits_mlp.py --workdir=runs/digits_mlp

Expected: test accuracy 98.37 % (95 % interval 97.60 to 99.14, n = 5 seeds, 270 test images).
Cost: 2.0 s with compilation, then 0.36 s per run in the same process (median of 4), on two CPU
cores (jax 0.10.2, 2026-11-20).
"""

from ml_collections import ConfigDict

from bnresearch.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "digits"
    config.data.batch_size = 60
    config.data.validation_fraction = 0.15
    config.model.name = "mlp"
    config.model.mlp.widths = (100, 100, 100)
    config.optim.learning_rate = 0.1
    config.train.duration = "40ep"
    config.train.log_every = "1ep"
    config.train.eval_every = "2ep"
    config.train.checkpoint_every = "10ep"
    return config
