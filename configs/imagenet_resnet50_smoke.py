"""The code path of imagenet_resnet50 on made-up photographs, small and short.

    python -m bnresearch train --config=configs/imagenet_resnet50_smoke.py --workdir=runs/smoke

Streamed through worker processes, random-resized crops and flips, bf16, warm-up, label smoothing,
zero-gamma, checkpoints: ten steps of 32 images at 64x64 that prove that it all runs.
Expected: it ends with exit code 0; its accuracy means nothing.
Cost: 71 s on two busy CPU cores, most of it compilation (jax 0.10.2, 2026-11-20, one run).
"""

from pathlib import Path

from ml_collections import ConfigDict

from bnresearch.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("imagenet_resnet50.py"))
    config.data.name = "synthetic"
    config.data.synthetic.shape = (96, 128, 3)  # height and width vary by half around these
    config.data.synthetic.vary = 0.5
    config.data.synthetic.classes = 1000
    config.data.synthetic.examples = 400
    config.data.image_size = 64
    config.data.batch_size = 32
    config.data.eval_batch_size = 32
    config.data.validation_fraction = 0.1
    config.optim.learning_rate = 0.0125
    config.optim.schedule.warmup = "2st"
    config.train.duration = "10st"
    config.train.log_every = "5st"
    config.train.eval_every = "10st"
    config.train.checkpoint_every = "5st"
    return config
