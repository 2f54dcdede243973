"""Data: a batch is a function of (seed, step), whatever the set and wherever it lives.

``load(config)`` gives a dataset with one interface (see ``bnresearch.data.base.Dataset``) for two
ways of delivery: sets that fit live on the device and are cropped, flipped and normalised inside
the compiled step (``memory.py``); the others stream through grain with worker processes
(``stream.py``). Where the pictures come from is a ``Source``: scikit-learn's digits, anything
prepared by TensorFlow Datasets, or made up on the fly.

To add a source: one class with the fields and methods of ``base.Source``, and one line in DATASETS.
Nothing heavy is imported here: worker processes import this module, and a run pays only for what it
uses.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bnresearch.data.base import Dataset, Share, Source, check_batch, divide
from bnresearch.errors import UserError, lookup

DEFAULTS: dict[str, Any] = {
    "name": "digits",  # a name in DATASETS, or any TensorFlow Datasets image classification set
    "batch_size": 60,  # examples per training step, over all devices
    "eval_batch_size": 256,  # examples per evaluation step, over all devices
    "validation_fraction": 0.1,  # of the training examples, held out by split_seed; between 0 and 1
    "split_seed": 0,  # which examples are held out; the order of training depends on the run's seed
    "augment": "none",  # none | crop | crop_flip; in memory: shifted, streams: random-resized crop
    "pad": 4,  # pixels of black around in-memory images before a crop of the old size is taken
    "image_size": 0,  # height and width that the model sees; 0: as stored
    "in_memory": "auto",  # yes | no (stream) | auto: yes where pictures have one shape and fit
    "workers": -1,  # processes that read and decode a stream; -1: one per CPU core, 0: none
    "synthetic": {  # only for the dataset "synthetic"
        "shape": (32, 32, 3),  # height, width, channels
        "classes": 10,
        "examples": 2000,  # for training and validation; a quarter as many more for the test
        "vary": 0.0,  # sizes vary by up to this part of the shape, as photographs do
    },
}


AUGMENTS = ("none", "crop", "crop_flip")
IN_MEMORY = ("auto", "yes", "no")

# More than this is taken for a slip: one batch in float32, or a set held in memory.
MOST_BYTES = 32 * 2**30

# What "auto" still puts on the device: four times CIFAR-10 at 64x64.
IN_MEMORY_BYTES = 2 * 2**30


def load(config: Mapping[str, Any], share: Share = Share()) -> Dataset:
    """The dataset that ``config`` asks for; its fields are those of DEFAULTS.

    Of each batch a stream reads the rows of ``share`` only; a set in memory is whole everywhere.
    Raises UserError for every setting that cannot work, for an unknown name, and for a set that is
    neither prepared on this machine nor can be downloaded.
    """
    check(config)
    opener = DATASETS.get(config["name"], _tfds)
    source = opener(config)
    streams = _streams(source, config)
    _check_memory(source, config, streams)
    if streams:
        from bnresearch.data.stream import Stream

        return Stream(source, config, share)
    from bnresearch.data.memory import InMemory

    return InMemory(source, config)


class Outline(NamedTuple):
    """What is known of a dataset before a picture is read; ``shape`` is None where sizes differ."""

    shape: tuple[int, int, int] | None
    num_classes: int


def outline(config: Mapping[str, Any]) -> Outline:
    """Raises UserError as `load` does, for all that can be seen without reading pictures."""
    check(config)
    source = DATASETS.get(config["name"], _tfds)(config)
    _check_memory(source, config, _streams(source, config))
    parts = divide(source.lengths, config["validation_fraction"], config["split_seed"])
    check_batch(source.name, config["batch_size"], len(parts["train"].indices))
    height, width, channels = source.shape
    if config["image_size"]:
        height = width = config["image_size"]
    shape = None if height is None or width is None else (height, width, channels)
    return Outline(shape, source.num_classes)


def check(config: Mapping[str, Any]) -> None:
    """Refuses values that no dataset can take, before anything is read."""
    lookup(dict.fromkeys(AUGMENTS), config["augment"], "data.augment")
    lookup(dict.fromkeys(IN_MEMORY), config["in_memory"], "data.in_memory")
    for field, (least, end) in _RANGES.items():
        if config[field] < least:
            raise UserError(f"data.{field} is {config[field]}, but must be at least {least}")
        if config[field] >= end:
            shown = f"2**{end.bit_length() - 1}"
            raise UserError(f"data.{field} is {config[field]}, but must be below {shown}")
    if not 0 < config["validation_fraction"] < 1:
        raise UserError(
            f"data.validation_fraction is {config['validation_fraction']}, but must lie between "
            "0 and 1: it is the part of the training examples that is held out to choose with"
        )


# From the first number up to, and without, the second. Positions in a batch are int32.
_RANGES = {
    "batch_size": (1, 2**31),
    "eval_batch_size": (1, 2**31),
    "split_seed": (0, 2**32),
    "pad": (0, 2**15),
    "image_size": (0, 2**15),
    "workers": (-1, 2**10),
}


def _streams(source: Source, config: Mapping[str, Any]) -> bool:
    if config["in_memory"] != "auto":
        return config["in_memory"] == "no"
    if None in source.shape:
        return True
    return sum(source.lengths.values()) * _picture_bytes(source, config) > IN_MEMORY_BYTES


def _picture_bytes(source: Source, config: Mapping[str, Any]) -> int:
    """The bytes of one picture as the model sees it, in uint8; 0 where sizes differ."""
    height, width, channels = source.shape
    return (config["image_size"] ** 2 or (height or 0) * (width or 0)) * channels


def _check_memory(source: Source, config: Mapping[str, Any], streams: bool) -> None:
    """Refuses what no machine here can hold: in float32 one batch, in uint8 a set in memory."""
    picture = _picture_bytes(source, config)
    sizes = {f"data.{key}": 4 * config[key] * picture for key in ("batch_size", "eval_batch_size")}
    if not streams:
        sizes["data.in_memory"] = sum(source.lengths.values()) * picture
    for key, size in sizes.items():
        if size > MOST_BYTES:
            raise UserError(
                f"{key}={config[key.removeprefix('data.')]} with pictures of {picture:,} pixel "
                f"values takes {size / 2**30:,.0f} GiB, at most {MOST_BYTES // 2**30} can be held; "
                "choose smaller pictures (data.image_size), smaller batches, or in_memory=no"
            )


def _digits(config: Mapping[str, Any]) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, embedded."""
    from bnresearch.data.digits import Digits

    return Digits()


def _synthetic(config: Mapping[str, Any]) -> Source:
    """Made-up pictures of any shape, size and number of classes."""
    from bnresearch.data.synthetic import Synthetic

    return Synthetic(seed=config["split_seed"], **config["synthetic"])


def _tfds(config: Mapping[str, Any]) -> Source:
    from bnresearch.data.tfds import open_source

    return open_source(config["name"], known=DATASETS)


# Every other name is looked up in TensorFlow Datasets.
DATASETS = {
    "digits": _digits,
    "synthetic": _synthetic,
}


def describe() -> list[tuple[str, str]]:
    """Names with a line each: those of DATASETS, and the TFDS sets that lie prepared here."""
    from bnresearch.data.tfds import prepared_names

    rows = [(name, (opener.__doc__ or "").strip()) for name, opener in DATASETS.items()]
    rows += [(name, "TensorFlow Datasets, prepared on this machine") for name in prepared_names()]
    return [*rows, ("any other name", "TensorFlow Datasets: downloaded and prepared at first use")]
