"""ImageNet, ResNet-50 in bf16: Goyal et al. (2017), with label smoothing and a cosine.

    TFDS_DATA_DIR=... python -m bnresearch train --config=configs/imagenet_resnet50.py \\
        --workdir=runs/imagenet_resnet50

imagenet2012 has to lie prepared in TFDS_DATA_DIR (array_record). 90 epochs, 5 of warm-up, the rate
0.1 per 256 images, zero-gamma, weight decay on weights only, evaluation at 224 of 256.
Expected: Goyal et al. report 23.6 to 23.7 % top-1 error for their step schedule without label
smoothing. No whole run of this config is on record yet.
Cost: not measured; configs/imagenet_resnet50_smoke.py runs the same code within minutes.
"""

from ml_collections import ConfigDict

from bnresearch.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dtype = "bfloat16"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.batch_size = 1024
    config.data.eval_batch_size = 1000
    config.data.validation_fraction = 0.01
    config.data.augment = "crop_flip"
    config.data.in_memory = "no"
    config.model.name = "resnet"
    config.model.resnet.family = "imagenet"
    config.model.resnet.depth = 50
    config.model.resnet.zero_gamma = True
    config.norm.batch.decay = 0.9
    config.task.classification.label_smoothing = 0.1
    config.optim.learning_rate = 0.4  # 0.1 per 256 images
    config.optim.sgd.nesterov = True
    config.optim.weight_decay = 1e-4
    config.optim.decay_norms_and_biases = False
    config.optim.schedule.name = "cosine"
    config.optim.schedule.warmup = "5ep"
    config.train.duration = "90ep"
    config.train.log_every = "100st"
    config.train.eval_every = "1ep"
    config.train.checkpoint_every = "1000st"
    return config
