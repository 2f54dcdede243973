"""Decoded sets as memory-mapped arrays in the user's cache folder, whole or not at all.

One folder per name, version, image size and FORMAT holds, per stored split, ``<split>-image.npy``
(uint8 [N, H, W, C]), ``<split>-label.npy`` (int32 [N]) and ``<split>-sums.npy`` (int64 [N, 2, C]:
per image and channel the sum and the sum of squares of its pixels, from which the mean and variance
of any part of the set follow exactly). It is filled under a temporary name and renamed when
complete; of two processes that decode at once the second throws its copy away.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bnresearch.data.base import Source
from bnresearch.data.views import centre_view

# To be raised when decoding or the layout changes: older folders are then left alone.
FORMAT = 1

# Examples read and decoded at a time by one thread.
CHUNK = 500

# A temporary folder this old was left behind by a process that was killed.
STALE_SECONDS = 24 * 3600


class Arrays(NamedTuple):
    """One stored split, memory-mapped or in memory."""

    image: np.ndarray
    label: np.ndarray
    sums: np.ndarray


def cache_folder() -> Path:
    """BNRESEARCH_CACHE, or bnresearch in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    if own := os.environ.get("BNRESEARCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnresearch"


def decoded(source: Source, size: int = 0) -> dict[str, Arrays]:
    """All stored splits of ``source`` as arrays, resized to ``size`` x ``size`` unless it is 0.

    Without a writable cache folder everything is decoded into memory, with a line on stderr that
    says so.
    """
    if not source.version:
        return _decode(source, size, None)
    sized = f"-{size}px" if size else ""
    name = f"{source.name}-{source.version}{sized}-format{FORMAT}".replace("/", "-")
    folder = cache_folder() / "data" / name
    if arrays := _open(folder, source):
        return arrays
    try:
        _fill(folder, source, size)
    except OSError as error:
        print(f"data: no cache in {folder.parent} ({error}); decoding into memory", file=sys.stderr)
        return _decode(source, size, None)
    return _open(folder, source) or _decode(source, size, None)


def _open(folder: Path, source: Source) -> dict[str, Arrays] | None:
    if not folder.is_dir():
        return None
    try:
        arrays = {
            split: Arrays(
                *(np.load(_path(folder, split, f), mmap_mode="r") for f in Arrays._fields)
            )
            for split in source.lengths
        }
        if all(len(arrays[split].image) == n for split, n in source.lengths.items()):
            return arrays
    except (OSError, ValueError):
        pass
    print(f"data: {folder} is damaged; decoding again", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _path(folder: Path, split: str, field: str) -> Path:
    return folder / f"{split}-{field}.npy"


def _fill(folder: Path, source: Source, size: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        for arrays in _decode(source, size, temporary).values():
            for array in arrays:
                array.flush()  # type: ignore[attr-defined]
        temporary.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        temporary.rename(folder)
    except OSError:
        # A rename onto a full folder fails: another process was faster and its copy is as good.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(folder: Path) -> None:
    for path in folder.glob(".partial-*"):
        if path.stat().st_mtime < time.time() - STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _decode(source: Source, size: int, folder: Path | None) -> dict[str, Arrays]:
    """Reads every example once, into files in ``folder`` or into memory."""
    return {split: _decode_split(source, split, size, folder) for split in source.lengths}


def _decode_split(source: Source, split: str, size: int, folder: Path | None) -> Arrays:
    height, width, channels = source.shape
    count, shape = source.lengths[split], (size or height, size or width, channels)
    arrays = Arrays(
        _empty(folder, split, "image", (count, *shape), np.uint8),
        _empty(folder, split, "label", (count,), np.int32),
        _empty(folder, split, "sums", (count, 2, channels), np.int64),
    )
    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    # Threads help, because decoders and file reads release Python's lock.
    with ThreadPoolExecutor() as pool:
        work = pool.map(lambda chunk: _copy(source, split, chunk, size, arrays), chunks)
        for _ in _progress(work, f"{source.name} {split}", len(chunks)):
            pass
    return arrays


def _empty(folder: Path | None, split: str, field: str, shape: tuple, dtype: type) -> np.ndarray:
    if folder is None:
        return np.empty(shape, dtype)
    path = _path(folder, split, field)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # The file is a hole so far: on a full disk, writing to the map would kill the process.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _copy(source: Source, split: str, chunk: range, size: int, arrays: Arrays) -> None:
    for index, (image, label) in zip(chunk, source.read(split, chunk), strict=True):
        arrays.image[index] = centre_view(image, size, size) if size else image
        arrays.label[index] = label
    part = slice(chunk.start, chunk.stop)
    pixels = arrays.image[part].astype(np.int64)
    arrays.sums[part, 0] = pixels.sum((1, 2))
    arrays.sums[part, 1] = np.einsum("nhwc,nhwc->nc", pixels, pixels)


def _progress(work: Iterator[None], what: str, total: int) -> Iterator[None]:
    """A bar on a terminal; in a log a line every five seconds, none for what takes less."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        label = f"decoding {what}"
        yield from track(work, label, total, console=Console(stderr=True), transient=True)
        return
    said = time.monotonic()
    for done, item in enumerate(work, 1):
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"data: decoding {what}: {100 * done // total} %", file=sys.stderr)
        yield item
