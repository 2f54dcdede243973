"""Sets written in TFDS's own layout, for the tests that read them."""

import copy
import io
import json
import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from bnresearch import data


def settings(**changes):
    return ConfigDict(copy.deepcopy(data.DEFAULTS) | changes)


def pictures(count, shape, classes, seed=0):
    """Smooth pictures (JPEG keeps them almost); sizes vary where ``shape`` has none."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        height, width = (n or int(rng.integers(40, 90)) for n in shape[:2])
        tile = rng.integers(0, 256, (2, 2, shape[2]), np.uint8)
        rows, columns = np.arange(height) * 2 // height, np.arange(width) * 2 // width
        yield tile[rows[:, None], columns], index % classes


def encoded(image, form):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, form)
    return buffer.getvalue()


def write_set(name, version, shape, classes, splits, form="PNG", labels=True):
    """A prepared set as TFDS leaves it; ``splits``: name -> pictures and labels."""
    folder = Path(os.environ["TFDS_DATA_DIR"]) / name / version
    folder.mkdir(parents=True)
    described = []
    for split, examples in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        write_records(path, [(encoded(image, form), label) for image, label in examples])
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths, size = [str(len(examples))], str(path.stat().st_size)
        described.append(
            dict(name=split, filepathTemplate=template, shardLengths=lengths, numBytes=size)
        )
    info = dict(name=name, version=version, fileFormat="array_record", splits=described)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features(shape, classes, labels)))
    return folder


def write_records(path, examples):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for picture, label in examples:
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(picture)
        example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()


def features(shape, classes, labels=True):
    root = "tensorflow_datasets.core.features."
    dimensions = [str(n or -1) for n in shape]
    image = dict(dtype="uint8", shape=dict(dimensions=dimensions))
    found = {"image": dict(pythonClassName=root + "image_feature.Image", image=image)}
    if labels:
        label = dict(numClasses=str(classes))
        name = root + "class_label_feature.ClassLabel"
        found["label"] = dict(pythonClassName=name, classLabel=label)
    name = root + "features_dict.FeaturesDict"
    return dict(pythonClassName=name, featuresDict=dict(features=found))


def tiny(count=40, **changes):
    """A prepared set "tiny" with pictures of 6x6 pixels."""
    train = list(pictures(count, (6, 6, 3), 4))
    test = list(pictures(10, (6, 6, 3), 4, seed=1))
    write_set("tiny", "1.0.0", (6, 6, 3), 4, {"train": train, "test": test}, **changes)
    return train, test


def raw(dataset, split):
    feed = dataset.eval_feed(split)
    return np.asarray(feed["image"]), np.asarray(feed["label"])


def same(one, other):
    """Two feeds are equal, bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def put_together(feeds, microbatches):
    """The whole batch of the feeds of all processes, after the words of ``data.base.Share``."""
    whole = {}
    for name in feeds[0]:
        parts = [np.split(feed[name], microbatches) for feed in feeds]  # [process][microbatch]
        rows = [parts[p][m] for m in range(microbatches) for p in range(len(feeds))]
        whole[name] = np.concatenate(rows)
    return whole
