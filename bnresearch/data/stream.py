"""Sets that do not fit: read, decoded and cropped by grain's worker processes, one batch per feed.

Training views are random-resized crops (and flips), evaluation views the middle of the picture;
both come to the device as uint8 and are normalised in the step. Batch ``step`` depends on (seed,
step) alone, for any number of workers and of processes, each of which reads its share only, and
reading can start at any step: grain shuffles by formula and seeds every example by its number.

Imports no jax: worker processes load this module. (grain itself imports jax where it is installed;
the workers are told to stay on the CPU and never start a backend.)
"""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import parent_process
from typing import Any

import grain
import numpy as np
from absl import flags

from bnresearch.data.base import (
    DataInfo,
    Part,
    Share,
    Source,
    check_batch,
    check_share,
    divide,
    normalise,
)
from bnresearch.data.views import centre_view, random_view
from bnresearch.errors import UserError, lookup

# Of ImageNet's training set, on the scale 0..1, as everybody rounds them; reading a whole stream to
# compute them would take hours. Any other number of channels gets their average.
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = 0.449, 0.226

# Evaluation resizes the shorter side to 256 for a view of 224 (Krizhevsky et al. 2012).
SHORTER = 256 / 224

# Finished batches that wait in each worker.
AHEAD = 2


class Stream:
    """See ``base.Dataset``. A feed is this process's share of one batch of B rows.

    {"image": uint8 [B / share.count, H, W, C], "label": int32 [B / share.count]}. Put together, the
    shares of all processes are the same batch for any number of processes. Feeds come fast in the
    order of their steps; a step out of order restarts the workers there.
    """

    sharded_feed = True
    max_steps_per_feed = 1

    def __init__(self, source: Source, config: Mapping[str, Any], share: Share = Share()):
        self._source, self._size = source, config["image_size"] or _native_size(source)
        self._share = share
        self._batch, self._eval_batch = config["batch_size"], config["eval_batch_size"]
        self._augment = config["augment"]
        self._workers = config["workers"] if config["workers"] >= 0 else _cores()
        self._parts = divide(source.lengths, config["validation_fraction"], config["split_seed"])
        self.info = _info(source, self._size, self._parts)
        check_batch(source.name, self._batch, self.info.examples["train"])
        check_share(share, self._batch, self._eval_batch)
        self._readers: dict[str, _Reader] = {}
        # Also when nobody calls close(): at exit grain's own clean-up comes too late and fails with
        # noise.
        weakref.finalize(self, _close_all, self._readers)

    def feed(
        self, seed: int, step: int, steps: int = 1, reader: str = "training"
    ) -> dict[str, np.ndarray]:
        """The batch of training step ``step``: a feed serves one step only."""
        if steps > self.max_steps_per_feed:
            raise ValueError(f"{steps} steps in one feed; a stream has {self.max_steps_per_feed}")
        return self._read(reader, self._training(seed), seed, step)

    def train_batch(self, feed: dict[str, Any], seed: Any, step: Any, rows: Any) -> dict[str, Any]:
        """See ``base.Dataset``; the feed is cropped already and holds ``rows`` only."""
        return {"image": normalise(feed["image"], self.info), "label": feed["label"]}

    def eval_steps(self, split: str) -> int:
        """See ``base.Dataset``."""
        part = lookup(self._parts, split, "split")
        return -(-len(part.indices) // self._eval_batch)

    def eval_feed(self, split: str, step: int = 0) -> dict[str, np.ndarray]:
        """A padded batch with "mask": bool [b]; after the last one the workers begin the next
        evaluation."""
        step %= self.eval_steps(split)
        return self._read(split, self._evaluation(split), None, step, self.eval_steps(split))

    def eval_batch(self, feed: dict[str, Any], step: Any, rows: Any) -> dict[str, Any]:
        """See ``base.Dataset``; the feed holds ``rows`` only."""
        return self.train_batch(feed, None, step, rows) | {"mask": feed["mask"]}

    def close(self) -> None:
        """Ends all worker processes; another feed would start new ones."""
        _close_all(self._readers)

    def _training(self, seed: int) -> grain.MapDataset:
        """This process's share of all training batches of a run, endless, by their number."""
        # grain adds the epoch to the seed of a shuffle: without spreading the seeds, epoch 1 of run
        # 0 would have the order of epoch 0 of run 1.
        order, views = (int(n) for n in np.random.SeedSequence(seed).generate_state(2))
        part = self._parts["train"]
        view = TrainView(self._source, part, self._size, self._augment)
        numbers = grain.MapDataset.range(len(part.indices)).shuffle(seed=order).repeat()
        # Seeded by the place in the run, before anything is left to other processes.
        examples = numbers.random_map(view, seed=views)
        share = self._share
        size = self._batch // (share.count * share.microbatches)
        blocks = examples.batch(size)[share.index :: share.count]
        if share.microbatches == 1:
            return blocks
        return blocks.batch(share.microbatches, batch_fn=_joined)

    def _evaluation(self, split: str) -> grain.MapDataset:
        view = EvalView(self._source, self._parts[split], self._size)
        padded = self.eval_steps(split) * self._eval_batch
        share = self._share
        blocks = grain.MapDataset.range(padded).map(view).batch(self._eval_batch // share.count)
        return blocks[share.index :: share.count].repeat()

    def _read(
        self, name: str, batches: grain.MapDataset, seed: int | None, step: int, cycle: int = 0
    ) -> dict[str, np.ndarray]:
        reader = self._readers.get(name)
        if reader is None or not reader.stands_at(seed, step):
            if reader is not None:
                reader.close()
            reader = self._readers[name] = _Reader(batches, seed, step, cycle, self._workers)
        return next(reader)


class TrainView:
    """Number of a training example and a generator -> {"image", "label"}; runs in the workers."""

    def __init__(self, source: Source, part: Part, size: int, augment: str):
        self._source, self._part, self._size, self._augment = source, part, size, augment

    def __call__(self, number: int, rng: np.random.Generator) -> dict[str, Any]:
        index = self._part.indices[number]
        ((image, label),) = self._source.read(self._part.stored, [index])
        if self._augment == "none":
            view = centre_view(image, self._size, round(SHORTER * self._size))
        else:
            view = random_view(image, self._size, self._augment == "crop_flip", rng)
        return {"image": view, "label": np.int32(label)}


class EvalView:
    """Position in a split -> {"image", "label", "mask"}; behind the end it begins again, masked."""

    def __init__(self, source: Source, part: Part, size: int):
        self._source, self._part, self._size = source, part, size

    def __call__(self, position: int) -> dict[str, Any]:
        count = len(self._part.indices)
        index = self._part.indices[position % count]
        ((image, label),) = self._source.read(self._part.stored, [index])
        image = centre_view(image, self._size, round(SHORTER * self._size))
        return {"image": image, "label": np.int32(label), "mask": np.bool_(position < count)}


class _Reader:
    """Batches from ``step`` on, and which one comes next; ``cycle`` batches form one evaluation."""

    def __init__(
        self, batches: grain.MapDataset, seed: int | None, step: int, cycle: int, workers: int
    ):
        self._seed, self._step, self._cycle = seed, step, cycle
        # Workers decode one by one, there are as many as cores; without any, two threads here do.
        threads = 0 if workers else 2
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
        if workers and not flags.FLAGS.is_parsed():
            # Used as a library, without a command line: grain reads flags of its own.
            flags.FLAGS.mark_as_parsed()
        stream = batches[step:].to_iter_dataset(reading)
        self._batches = iter(stream.mp_prefetch(processes, worker_init_fn=_start_worker))

    def stands_at(self, seed: int | None, step: int) -> bool:
        return (self._seed, self._step) == (seed, step)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        self._step += 1
        if self._cycle:
            self._step %= self._cycle
        # Copies, because grain's arrays are shared memory that is freed by chance if one lives on
        # elsewhere.
        return {name: np.array(array, subok=False) for name, array in batch.items()}

    def close(self) -> None:
        self._batches.close()


def _joined(blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _close_all(readers: dict[str, _Reader]) -> None:
    while readers:
        readers.popitem()[1].close()


def _start_worker(index: int, count: int) -> None:
    """Keeps a worker off the accelerators, out of Ctrl-C, and alive no longer than the run."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # A terminal and a scheduler signal every process; the run decides when to stop and then ends
    # its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    if parent := parent_process():
        parent.join()
    os._exit(1)


def _cores() -> int:
    """Cores that this process may use: a scheduler may have given it a part of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _native_size(source: Source) -> int:
    height, width, _ = source.shape
    if height is None or height != width:
        found = "differ in size" if height is None else f"are {height}x{width}, not square"
        raise UserError(
            f"the images of {source.name} {found}; set data.image_size to the height and width "
            "that the model sees"
        )
    return height


def _info(source: Source, size: int, parts: dict[str, Part]) -> DataInfo:
    channels = source.shape[2]
    mean = RGB_MEAN if channels == 3 else (GREY_MEAN,) * channels
    std = RGB_STD if channels == 3 else (GREY_STD,) * channels
    mean, std = (tuple(255 * v for v in values) for values in (mean, std))
    examples = {split: len(part.indices) for split, part in parts.items()}
    return DataInfo(source.name, (size, size, channels), source.num_classes, examples, mean, std)
