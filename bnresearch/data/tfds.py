"""Image classification sets of TensorFlow Datasets by name, read without TensorFlow.

A copy that is prepared (in TFDS_DATA_DIR, by default ~/tensorflow_datasets, in a format with random
access) is read as it is; otherwise TFDS downloads and prepares one, beside the others, whole or not
at all.
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnresearch.data.views import MODES, decode
from bnresearch.errors import UserError, nearest

# name, name/config, name:1.2.3, name/config:1.2.3; other forms reach for community sets on the
# network.
NAME = re.compile(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")

# How long the first address of a set may take to answer before this machine counts as offline.
PROBE_SECONDS = 15


class TfdsSource:
    """A ``base.Source`` over a prepared TFDS builder; pictures stay encoded until they are read."""

    def __init__(self, builder: Any):
        image = builder.info.features["image"]
        height, width, channels = image.shape
        self.name = builder.info.full_name.rsplit("/", 1)[0]
        self.shape = (height, width, channels or 3)
        self.num_classes = builder.info.features["label"].num_classes
        splits = _stored_splits(builder)
        self._records = {split: _records(builder, stored) for split, stored in splits.items()}
        self.lengths = {split: len(records) for split, records in self._records.items()}
        # The sizes tell apart two copies of one version, of which one is cut short (as in a test).
        sizes = sorted((s.name, s.num_examples, s.num_bytes) for s in builder.info.splits.values())
        self.version = f"{builder.version}-{zlib.crc32(repr(sizes).encode()):08x}"

    def read(self, split: str, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """See ``base.Source.read``."""
        stored, places = self._records[split], [int(i) for i in indices]
        # Several at once start threads of their own, which for one take longer than the reading.
        records = stored.__getitems__(places) if len(places) > 1 else [stored[i] for i in places]
        return [(self._decode(record["image"]), int(record["label"])) for record in records]

    def _decode(self, picture: bytes) -> np.ndarray:
        try:
            return decode(picture, self.shape[2])
        except OSError as error:
            raise UserError(
                f"a picture of {self.name} cannot be decoded ({error}): the prepared copy is "
                "damaged; prepare the set again"
            ) from error


def open_source(name: str, known: Iterable[str] = ()) -> TfdsSource:
    """The set ``name``, prepared now if it has to be; ``known`` are more names to suggest.

    Raises UserError for an unknown name, for a set that is not one of pictures with one label each,
    and where there is no copy and none can be made.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"data.name is {name!r}, which is no dataset name; write it as TensorFlow Datasets "
            "does: name, name/config or name:1.2.3"
        )
    builder = _prepared(name) or _make(name, known)
    _check_features(builder)
    _check_format(builder)
    return TfdsSource(builder)


def data_dir() -> Path:
    """Where prepared sets are, by TFDS's own rule."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared_names() -> list[str]:
    """What looks prepared in ``data_dir``: name, or name/config, of each folder with a version."""
    found = {
        str(info.parent.parent.relative_to(data_dir()))
        for depth in ("*/*", "*/*/*")
        for info in data_dir().glob(f"{depth}/dataset_info.json")
    }
    return sorted(found)


def _prepared(name: str) -> Any:
    """The newest prepared copy, of whatever version, read from its files alone; or None."""
    from tensorflow_datasets.core import read_only_builder, registered
    from tensorflow_datasets.core.naming import parse_builder_name_kwargs

    parsed, kwargs = parse_builder_name_kwargs(name)
    with _quiet(), contextlib.suppress(registered.DatasetNotFoundError):
        return read_only_builder.builder_from_files(str(parsed), data_dir=data_dir(), **kwargs)
    return None


def _make(name: str, known: Iterable[str]) -> Any:
    """Downloads and prepares what is not there yet, after the checks that take no time."""
    with _quiet():
        builder = _by_code(name, known)
        _check_features(builder)
        _check_can_prepare(builder, name)
    _prepare(builder, name)
    return _prepared(name)


def _by_code(name: str, known: Iterable[str]) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir(), file_format="array_record", try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        names = [*known, *tfds.list_builders(with_community_datasets=False)]
        close = nearest(name.split("/")[0].split(":")[0], names)
        close = close if close.startswith("did you mean") else "nothing similar is known;"
        raise UserError(
            f"unknown dataset {name!r}: {close} 'python -m bnresearch list datasets' shows those "
            "that come with it, 'tfds.list_builders()' those of TensorFlow Datasets"
        ) from error
    # An unknown config, a version that is gone, a builder that needs TensorFlow, ...
    except Exception as error:
        raise UserError(
            f"dataset {name!r} cannot be opened: {_why(error)}; write name, name/config or "
            "name:1.2.3 as the catalogue of TensorFlow Datasets has them"
        ) from error


def _stored_splits(builder: Any) -> dict[str, str]:
    """TFDS's names for "train" and "test".

    Where there is no test split or its labels are hidden, as in challenges, validation is the test.
    """
    names = builder.info.splits
    if "train" not in names:
        found = ", ".join(sorted(names))
        raise UserError(f"dataset {builder.name} has no split 'train', only {found}")
    for test in ("test", "validation"):
        if test in names and names[test].num_examples and _records(builder, test)[0]["label"] >= 0:
            return {"train": "train", "test": test}
    return {"train": "train"}


def _records(builder: Any, stored: str) -> Any:
    """A stored split with its pictures still encoded."""
    import tensorflow_datasets as tfds

    return builder.as_data_source(stored, decoders={"image": tfds.decode.SkipDecoding()})


def _check_features(builder: Any) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = found.get("image"), found.get("label")
    right = isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)
    if right and image.np_dtype == np.uint8 and (image.shape[2] or 3) in MODES:  # type: ignore
        return
    given = ", ".join(f"{key} ({type(value).__name__})" for key, value in found.items())
    raise UserError(
        f"dataset {builder.name} is not image classification as understood here: it needs the "
        "features 'image' (8 bits, 1, 3 or 4 channels) and 'label' (one class), but has "
        f"{given or features}"
    )


def _check_format(builder: Any) -> None:
    formats = {f.value for f in builder.info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        raise UserError(
            f"dataset {builder.name} is prepared in {builder.data_dir} as "
            f"{', '.join(sorted(formats))}, which cannot be read in random order; prepare it again "
            "with file_format='array_record', or set TFDS_DATA_DIR to another folder"
        )


def _check_can_prepare(builder: Any, name: str) -> None:
    """Bounds the wait without network: TFDS itself would retry for minutes."""
    manual = data_dir() / "downloads" / "manual"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        if not manual.is_dir():
            text = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
            raise _absent(builder, name, f"has to be downloaded by hand into {manual}: {text}")
        return
    try:
        urls = list(builder.url_infos or ())
    except ImportError as error:
        raise _absent(builder, name, f"cannot be prepared here: {error}") from error
    if urls and (reason := _unreachable(urls[0])):
        raise _absent(builder, name, f"cannot be downloaded: {reason}")


def _unreachable(url: str) -> str:
    """Why ``url`` does not answer, or nothing."""
    if not url.startswith("http"):
        return ""
    result = [f"{url} did not answer within {PROBE_SECONDS} s"]
    # In a thread: looking up a name without network can take longer than any timeout set here.
    thread = threading.Thread(target=lambda: result.append(_probe(url)), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return result[-1]


def _probe(url: str) -> str:
    import requests

    try:
        with requests.get(url, stream=True, timeout=PROBE_SECONDS) as response:
            return "" if response.ok else f"{url} answered {response.status_code} {response.reason}"
    except requests.RequestException as error:
        return f"no connection to {url} ({type(error).__name__})"


def _prepare(builder: Any, name: str) -> None:
    """Downloads and prepares in a hidden folder beside the prepared sets, and moves the result.

    Nothing is left of an attempt that fails.
    """
    root, target = data_dir(), Path(builder.data_dir)
    made = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    except OSError as error:
        reason = f"cannot be prepared, as {root} is not writable ({error})"
        raise _absent(builder, name, reason) from error
    try:
        _download(name, temporary, root)
        _move(temporary, root, target.relative_to(root))
    except Exception as error:  # whatever the set's own code raises: it comes from many hands
        raise _absent(builder, name, f"cannot be prepared: {_why(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # not empty: it went well
                root.rmdir()


def _download(name: str, folder: Path, root: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=folder, file_format="array_record", try_gcs=False)
    manual = root / "downloads" / "manual"
    config = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=manual)
    builder.download_and_prepare(download_dir=folder / "downloads", download_config=config)


def _move(temporary: Path, root: Path, relative: Path) -> None:
    """Renames the topmost folder of ``relative`` that ``root`` lacks, so that it appears whole."""
    for path in [*reversed(relative.parents), relative]:
        if not (root / path).exists():
            try:
                (temporary / path).rename(root / path)
            except OSError:
                if not (root / path).exists():  # else another process was faster
                    raise
            return


def _absent(builder: Any, name: str, reason: str) -> UserError:
    return UserError(
        f"dataset {name!r} is not in {data_dir()} and {reason}. Set TFDS_DATA_DIR to a folder with "
        "a prepared copy, or prepare one on a connected machine and copy it: "
        "pip install 'bnresearch[tfds]' && "
        f"tfds build {name} --file_format=array_record --data_dir=FOLDER"
    )


def _why(error: BaseException) -> str:
    """The reason in one line; builders that need TensorFlow bury that in a chain of errors."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ModuleNotFoundError) and link.name == "tensorflow":
            return "preparing it needs TensorFlow, which is not installed"
        link = link.__cause__ or link.__context__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    # Of what TFDS says, without all arguments before and the list that follows on further lines.
    text = re.sub(
        r"^Failed to construct dataset .*?}\": |\. Here are \d+ BuilderConfigs.*:$", "", text
    )
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's warnings about folders that are not there: what matters is a UserError."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
