"""A set of JPEGs of ImageNet's sizes, prepared as TensorFlow Datasets does, to measure input with.

    python -m benchmarks.jpegs FOLDER --count=50000
    TFDS_DATA_DIR=FOLDER python -m bnresearch train --config=configs/imagenet_resnet50.py \\
        --config.data.name=imagenet_sized --workdir=runs/a

Pictures are parts of the two photographs that come with scikit-learn, of any light, mirrored or
not, under grain as of film: decoders find the details of photographs in them. There is nothing to
be learnt: labels go round. A picture depends on (seed, split, index) and on the version of Pillow,
which encodes it. What was made before an interruption is not made again; the set appears when it
is whole.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.measure import say
from bnresearch.errors import UserError

NAME, VERSION, CLASSES = "imagenet_sized", "1.0.0", 1000
SPLITS = ("train", "validation")
HELD_OUT = 25  # one picture in so many is for validation, as about in ImageNet
PER_FILE = 500

# Width and height, and how often; the remaining ones are drawn. With those the means are 466x406
# pixels and 108 KB. ImageNet's training pictures have 115 KB (a tar of 148 GB holds 1.28 million).
SIZES = {(500, 375): 0.50, (375, 500): 0.13, (500, 333): 0.12, (333, 500): 0.04, (500, 500): 0.05}
LONGER = (420, 0.5, 80, 3000)  # of a drawn one: median, spread of the logarithm, least, most
RATIO = (2 / 3, 3 / 2)  # of its width to its height
QUALITY = (93, 98)  # of the encoder, from the first to below the second
GRAIN = (3.0, 9.0)  # standard deviation of the grain, of 255
KILOBYTES = 115  # of disk that a picture takes


class File(NamedTuple):
    """Which pictures go into one file of the set."""

    folder: Path
    split: str
    number: int
    of: int
    first: int
    count: int

    @property
    def path(self) -> Path:
        """Its place, by TFDS's naming."""
        name = f"{NAME}-{self.split}.array_record-{self.number:05d}-of-{self.of:05d}"
        return self.folder / name


def main(argv: Sequence[str] | None = None) -> None:
    """Make a set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jpegs", description=__doc__)
    parser.add_argument("folder", type=Path, help="where sets lie: a TFDS_DATA_DIR")
    parser.add_argument("--count", type=int, default=50_000, help="pictures, those held out too")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other pictures")
    options = parser.parse_args(argv)
    try:
        make(options.folder, options.count, options.seed)
    except UserError as error:
        parser.error(str(error))


def make(root: Path, count: int, seed: int = 0) -> Path:
    """The folder of a set of ``count`` pictures under ``root``, made unless it is there."""
    target, words = root / NAME / VERSION, f"{count} made-up pictures, seed {seed}"
    if target.exists():
        found = json.loads((target / "dataset_info.json").read_text())["description"]
        if found != words:
            raise UserError(f"{target} holds {found}, not {words}: remove it, or name a new folder")
        say(f"{words}: already in {target}")
        return target
    _check(root, count, seed)
    partial = root / f".partial-{NAME}-{count}-{seed}"
    partial.mkdir(parents=True, exist_ok=True)
    files = [file for split in SPLITS for file in divided(partial, split, count)]
    _write_all([file for file in files if not file.path.exists()], seed)
    describe(partial, files, words)
    target.parent.mkdir(exist_ok=True)
    partial.rename(target)
    say(f"{words}, in {target}")
    return target


def divided(folder: Path, split: str, count: int) -> list[File]:
    """The files of a split of a set of ``count`` pictures."""
    held = max(1, count // HELD_OUT)
    number = {"train": count - held, "validation": held}[split]
    starts = range(0, number, PER_FILE)
    return [
        File(folder, split, i, len(starts), first, min(PER_FILE, number - first))
        for i, first in enumerate(starts)
    ]


def describe(folder: Path, files: Sequence[File], words: str) -> None:
    """Write the two JSON files by which TFDS knows a prepared set."""
    import tensorflow_datasets as tfds

    splits = []
    for split in SPLITS:
        its = [file for file in files if file.split == split]
        size = sum(file.path.stat().st_size for file in its)
        splits.append(tfds.core.SplitInfo(split, [file.count for file in its], size))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(),
        split_infos=splits,
        version=VERSION,
        description=words,
        check_data=False,  # it would read with TensorFlow
    )


@cache
def features() -> Any:
    """Those of imagenet2012."""
    import tensorflow_datasets as tfds

    image = tfds.features.Image(encoding_format="jpeg")
    label = tfds.features.ClassLabel(num_classes=CLASSES)
    return tfds.features.FeaturesDict({"image": image, "label": label})


def write(file: File, seed: int) -> None:
    """One file, under another name until it is whole."""
    from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

    unfinished = file.path.with_name(f"unfinished-{os.getpid()}")
    ArrayRecordFileAdapter.write_examples(unfinished, _examples(file, seed))
    unfinished.rename(file.path)


def picture(seed: int, split: str, index: int) -> bytes:
    """A JPEG."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    width, height = _size(rng)
    photographs = _photographs()
    photograph = photographs[rng.integers(len(photographs))]
    box = _part(photograph.size, width / height, rng)
    part = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(part)[:, :: 1 if rng.random() < 0.5 else -1].astype(np.float32)
    pixels *= rng.uniform(0.6, 1.3, 3).astype(np.float32)
    grain = rng.standard_normal((height, width, 1), np.float32)
    pixels += rng.uniform(*GRAIN) * grain
    encoded = io.BytesIO()
    quality, colours = int(rng.integers(*QUALITY)), "4:4:4" if rng.random() < 0.2 else "4:2:0"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        encoded, "JPEG", quality=quality, subsampling=colours
    )
    return encoded.getvalue()


@cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of a picture."""
    which = int(np.searchsorted(np.cumsum(list(SIZES.values())), rng.random(), "right"))
    if which < len(SIZES):
        return list(SIZES)[which]
    median, spread, least, most = LONGER
    longer = float(np.clip(median * np.exp(spread * rng.standard_normal()), least, most))
    ratio = float(np.exp(rng.uniform(*np.log(RATIO))))
    return round(longer * min(1, ratio)), round(longer * min(1, 1 / ratio))


def _part(
    size: tuple[int, int], ratio: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box of this ratio of width to height, of 0.6 or more of the largest such box's sides."""
    width = min(size[0], size[1] * ratio) * rng.uniform(0.6, 1)
    height = width / ratio
    left, top = rng.uniform(0, size[0] - width), rng.uniform(0, size[1] - height)
    return left, top, left + width, top + height


def _examples(file: File, seed: int) -> Iterator[tuple[int, bytes]]:
    for index in range(file.first, file.first + file.count):
        example = {"image": picture(seed, file.split, index), "label": index % CLASSES}
        yield index, features().serialize_example(example)


def _check(root: Path, count: int, seed: int) -> None:
    if count < 2 or seed < 0:
        raise UserError(f"--count={count} --seed={seed}: at least 2 pictures, and no seed below 0")
    above = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    wanted, free = 1000 * KILOBYTES * count, shutil.disk_usage(above).free
    if wanted > free:
        raise UserError(
            f"{count} pictures take {wanted / 1e9:.1f} GB, but {above} has {free / 1e9:.1f} GB "
            "left: make fewer, or name another folder"
        )


def _write_all(files: Sequence[File], seed: int) -> None:
    """All of them by all cores; each that is done stays, whatever happens."""
    cores = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        work = [pool.submit(write, file, seed) for file in files]
        try:
            for done, one in enumerate(as_completed(work), 1):
                one.result()
                if done % max(1, len(work) // 20) == 0 or done == len(work):
                    say(f"{done} of {len(work)} files")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
