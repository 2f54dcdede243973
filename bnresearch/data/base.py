"""What a source of pictures and a dataset are, and how one is divided into train, validation and
test.

Imports neither jax nor grain: worker processes use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from bnresearch.errors import UserError

SPLITS = ("train", "validation", "test")

# Part of the examples that becomes the test set where a set comes without one.
TEST_FRACTION = 0.15


class DataInfo(NamedTuple):
    """What a model and a loop need to know; ``shape`` is (H, W, C) as the model sees it."""

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    examples: dict[str, int]  # for "train", "validation" and "test"
    mean: tuple[float, ...]  # per channel, on the scale 0..255 of the stored pixels
    std: tuple[float, ...]


@dataclass(frozen=True)  # no NamedTuple: index and count are methods of tuples
class Share:
    """The rows of each batch that one of several processes reads.

    A training batch of B rows is ``microbatches`` parts of B / microbatches rows, each part
    ``count`` blocks; this process has block ``index`` of every part, B / count rows. Of an
    evaluation batch, which is never cut into parts, it has block ``index`` of ``count``.
    """

    index: int = 0
    count: int = 1
    microbatches: int = 1


class Source(Protocol):
    """Pictures with labels that can be read in any order, also from a worker process
    (picklable)."""

    @property
    def name(self) -> str:
        """The set's name, for messages and the cache."""
        ...

    @property
    def version(self) -> str:
        """With the name the key of the cache; "" if reading is as fast as a cache would be."""
        ...

    @property
    def shape(self) -> tuple[int | None, int | None, int]:
        """(H, W, C); H and W are None where sizes differ from picture to picture."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1."""
        ...

    @property
    def lengths(self) -> Mapping[str, int]:
        """Of the stored splits: "train", and "test" if there is one."""
        ...

    def read(self, split: str, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """The pictures (uint8 [h, w, C]) and labels at ``indices`` of a stored split."""
        ...


class Dataset(Protocol):
    """One interface for sets on the device and streams; what is traced and what is not differs per
    method.

    A *feed* is a pytree of arrays that the host gives to the compiled step. ``train_batch`` and
    ``eval_batch`` are pure and traceable; they turn a feed into {"image": float32 [b, H, W, C]
    normalised by ``info.mean`` and ``info.std``, "label": int32 [b]}, for evaluation with "mask":
    bool [b]. ``rows`` (int32 [b]) are the positions within the batch that are made here: all of
    them, or one device's share. A feed with ``sharded_feed`` is one batch, of which each process
    gets the rows of its ``Share``; otherwise it is the whole set, on every device.
    """

    info: DataInfo
    sharded_feed: bool
    max_steps_per_feed: int

    def feed(
        self, seed: int, step: int, steps: int = 1, reader: str = "training"
    ) -> dict[str, Any]:
        """What the training steps [step, step + steps) need; shapes depend on neither. Who reads
        ahead of training, or behind it, names a reader of its own: each goes on where it was."""
        ...

    def train_batch(self, feed: dict[str, Any], seed: Any, step: Any, rows: Any) -> dict[str, Any]:
        """Rows of batch number ``step``; order and augmentation depend on (seed, step) alone."""
        ...

    def eval_steps(self, split: str) -> int:
        """How many evaluation steps cover ``split`` once."""
        ...

    def eval_feed(self, split: str, step: int = 0) -> dict[str, Any]:
        """What evaluation step ``step`` needs."""
        ...

    def eval_batch(self, feed: dict[str, Any], step: Any, rows: Any) -> dict[str, Any]:
        """Rows of evaluation batch ``step``, in stored order, padded, every example unmasked
        once."""
        ...

    def close(self) -> None:
        """Ends worker processes."""
        ...


class Part(NamedTuple):
    """A split as a choice of examples from a stored split; ``indices`` int64, ascending."""

    stored: str
    indices: np.ndarray


def divide(lengths: Mapping[str, int], fraction: float, seed: int) -> dict[str, Part]:
    """Train, validation and test as disjoint parts that together are everything stored.

    ``fraction`` of the stored training examples, drawn by ``seed``, becomes the validation part.
    The stored test split is the test part; without one, TEST_FRACTION of the training examples is
    drawn first, so that the test part depends on ``seed`` only. Draws are plain permutations, not
    stratified. RandomState is used because numpy froze its stream: a split stays the same in every
    version.
    """
    shuffled = np.random.RandomState(seed).permutation(lengths["train"])
    if "test" in lengths:
        test = Part("test", np.arange(lengths["test"]))
    else:
        count = round(TEST_FRACTION * len(shuffled))
        test = Part("train", np.sort(shuffled[:count]))
        shuffled = shuffled[count:]
    held = round(fraction * len(shuffled))
    parts = {
        "train": Part("train", np.sort(shuffled[held:])),
        "validation": Part("train", np.sort(shuffled[:held])),
        "test": test,
    }
    for name, part in parts.items():
        if not len(part.indices):
            raise UserError(
                f"the {name} part is empty: data.validation_fraction={fraction} of {len(shuffled)} "
                "training examples leaves nothing; choose another fraction"
            )
    return parts


def check_batch(name: str, batch_size: int, examples: int) -> None:
    """Refuses a batch that would hold an example twice."""
    if batch_size > examples:
        raise UserError(
            f"data.batch_size is {batch_size}, but {name} has {examples} training examples; "
            "choose a smaller batch"
        )


def check_share(share: Share, batch_size: int, eval_batch_size: int) -> None:
    """Refuses batches that the processes cannot divide evenly among themselves."""
    processes = f"{share.count} process{'es' * (share.count > 1)}"
    parts = f" in {share.microbatches} microbatches" if share.microbatches > 1 else ""
    for field, size, whole, cut in (
        ("batch_size", batch_size, share.count * share.microbatches, parts),
        ("eval_batch_size", eval_batch_size, share.count, ""),
    ):
        if size % whole:
            raise UserError(
                f"data.{field} is {size}, but {processes} read equal shares of it{cut}: choose a "
                f"multiple of {whole}"
            )


def normalise(image: Any, info: DataInfo) -> Any:
    """(image - mean) / std per channel in float32, for numpy arrays and tracers alike."""
    mean, std = np.asarray(info.mean, np.float32), np.asarray(info.std, np.float32)
    return (image.astype(np.float32) - mean) / std
