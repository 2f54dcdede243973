"""Streams: batch = f(seed, step) for any number of workers, views, evaluation, ImageNet by name."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_data_tfds import PREPARED, needs_sets, pictures, write_set
from tfds_tools import same

from bnresearch import data
from bnresearch.data import stream, views
from bnresearch.errors import UserError


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("BNRESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path


@pytest.fixture
def load():
    """data.load for a small synthetic stream, closed at the end of the test."""
    opened = []

    def opener(**changes):
        config = ConfigDict(copy.deepcopy(data.DEFAULTS))
        config.update(name="synthetic", in_memory="no", workers=0, image_size=16, batch_size=7)
        config.update(eval_batch_size=16, augment="crop_flip")
        config.synthetic.update(shape=(24, 20, 3), examples=100, vary=0.3)
        config.update(changes)
        opened.append(data.load(config))
        return opened[-1]

    yield opener
    for dataset in opened:
        dataset.close()


def test_stream_has_the_interface_of_a_dataset(load):
    dataset = load()
    assert dataset.info.shape == (16, 16, 3)
    assert dataset.info.examples == {"train": 90, "validation": 10, "test": 25}
    assert (dataset.sharded_feed, dataset.max_steps_per_feed) == (True, 1)
    feed = dataset.feed(0, 0)
    assert (feed["image"].shape, feed["image"].dtype) == ((7, 16, 16, 3), np.uint8)
    assert (feed["label"].shape, feed["label"].dtype) == ((7,), np.int32)
    batch = jax.jit(dataset.train_batch)(feed, 0, 0, jnp.arange(7))
    mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(dataset.info.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(batch["image"], (feed["image"] - mean) / std, atol=1e-5)
    np.testing.assert_array_equal(batch["label"], feed["label"])
    with pytest.raises(ValueError, match="a stream has 1"):
        dataset.feed(0, 0, 2)


@pytest.mark.slow
def test_batches_do_not_depend_on_workers_nor_on_where_reading_starts(load):
    reference = load()
    expected = [reference.feed(3, step) for step in range(16)]
    dataset = load(workers=2)
    for step in range(4):
        same(dataset.feed(3, step), expected[step])
    for step in range(7, 16):  # a jump, then on past the end of the epoch
        same(dataset.feed(3, step), expected[step])


def test_a_step_out_of_order_and_another_seed_start_anew(load):
    dataset = load()
    first = [dataset.feed(3, step) for step in range(3)]
    same(dataset.feed(3, 1), first[1])
    same(dataset.feed(3, 2), first[2])
    assert not np.array_equal(dataset.feed(4, 0)["image"], first[0]["image"])
    same(dataset.feed(3, 0), first[0])


def test_a_reader_aside_leaves_that_of_training_where_it_is(load, monkeypatch):
    dataset, started = load(), []

    class Reader(stream._Reader):
        def __init__(self, batches, seed, step, *rest):
            started.append(step)
            super().__init__(batches, seed, step, *rest)

    expected = [load().feed(3, step) for step in range(6)]
    monkeypatch.setattr(stream, "_Reader", Reader)
    same(dataset.feed(3, 0), expected[0])
    for step in (4, 5):
        same(dataset.feed(3, step, reader="aside"), expected[step])
    same(dataset.feed(3, 1), expected[1])
    assert started == [0, 4]


def test_every_example_once_per_epoch_although_the_batch_does_not_divide(load):
    dataset = load(augment="none", batch_size=16)
    feed = dataset.eval_feed("train")
    steps = dataset.eval_steps("train")
    feeds = [dataset.eval_feed("train", step) for step in range(steps)]
    assert steps == 6  # 90 = 5 x 16 + 10
    same(feeds[0], feed)
    images = np.concatenate([f["image"] for f in feeds])
    mask = np.concatenate([f["mask"] for f in feeds])
    known = {image.tobytes(): i for i, image in enumerate(images[mask])}
    assert len(known) == 90
    # Without augmentation a training view is the evaluation view: examples can be recognised.
    seen = np.concatenate([dataset.feed(5, step)["image"] for step in range(45)])
    order = np.array([known[image.tobytes()] for image in seen]).reshape(8, 90)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(90))
    assert len({tuple(epoch) for epoch in order}) == 8
    # grain's shuffle adds epoch and seed: the next run's first epoch must not be our second.
    other = np.concatenate([dataset.feed(6, step)["image"] for step in range(6)])[:90]
    assert not np.array_equal([known[image.tobytes()] for image in other], order[1])


def test_augmentation_differs_between_epochs(load):
    dataset = load(batch_size=90)
    one, two = dataset.feed(0, 0), dataset.feed(0, 1)
    views_of = [{image.tobytes() for image in feed["image"]} for feed in (one, two)]
    assert not views_of[0] & views_of[1]


def test_evaluation_is_padded_masked_and_can_be_repeated(load):
    dataset = load()
    assert dataset.eval_steps("test") == 2
    rounds = [[dataset.eval_feed("test", step) for step in range(2)] for _ in range(2)]
    for one, other in zip(*rounds, strict=True):
        same(one, other)
    mask = np.concatenate([feed["mask"] for feed in rounds[0]])
    np.testing.assert_array_equal(mask, np.arange(32) < 25)
    labels = np.concatenate([feed["label"] for feed in rounds[0]])
    np.testing.assert_array_equal(labels[mask], np.arange(25) % 10)
    last = rounds[0][1]
    # Padding begins again: real pictures, for norms that use the statistics of the batch.
    np.testing.assert_array_equal(last["image"][~last["mask"]], rounds[0][0]["image"][:7])
    batch = jax.jit(dataset.eval_batch)(last, 1, jnp.arange(16))
    np.testing.assert_array_equal(batch["mask"], last["mask"])
    info = dataset.info
    np.testing.assert_allclose(
        batch["image"], (last["image"] - np.array(info.mean)) / info.std, atol=1e-5
    )


def test_centre_view_is_the_middle_of_the_resized_picture():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[:, None], 128, 1)
    image = np.stack([ramp, np.tile(np.arange(128, dtype=np.uint8), (64, 1))], -1)
    image = np.concatenate([image, image[..., :1]], -1)  # rows, columns, rows
    view = views.centre_view(image, 28, 32)
    # Shorter side 64 -> 32 halves; the middle 28 of 32 rows and of 64 columns remain.
    np.testing.assert_allclose(view[:, 14, 0], 2 * np.arange(2, 30) + 0.5, atol=1)
    np.testing.assert_allclose(view[14, :, 1], 2 * np.arange(18, 46) + 0.5, atol=1)
    whole = views.centre_view(image[:, :64], 64, 64)
    np.testing.assert_array_equal(whole, image[:, :64])


def test_random_boxes_have_the_published_areas_and_ratios():
    rng = np.random.default_rng(0)
    boxes = np.array([views._random_box(300, 400, rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 400
    assert bottom.max() <= 300
    area, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.075 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77
    assert 1.31 < ratio.max() < 1.35
    # Small areas fit always: there the area is uniform.
    np.testing.assert_allclose(
        ((area > 0.1) & (area < 0.3)).sum(), ((area > 0.3) & (area < 0.5)).sum(), rtol=0.15
    )
    assert abs(np.median(left / (400 - (right - left)).clip(1)) - 0.5) < 0.05


def test_very_long_pictures_get_the_middle():
    assert views._random_box(10, 1000, np.random.default_rng(0)) == (493, 0, 506, 10)
    assert views._random_box(1000, 10, np.random.default_rng(0)) == (0, 493, 10, 506)


def test_flips_mirror_half_of_the_views():
    image = np.tile(np.arange(64, dtype=np.uint8)[:, None], (64, 1, 3))
    rising = []
    for seed in range(400):
        view = views.random_view(image, 16, True, np.random.default_rng(seed)).astype(int)
        rising.append(view[0, -1, 0] > view[0, 0, 0])
        straight = views.random_view(image, 16, False, np.random.default_rng(seed)).astype(int)
        np.testing.assert_array_equal(view if rising[-1] else view[:, ::-1], straight)
    assert abs(np.mean(rising) - 0.5) < 4 * 0.5 / 20


def prepare_imagenet():
    """A dozen JPEGs under ImageNet's name; its test split has no labels."""
    shape = (None, None, 3)
    train, held = list(pictures(20, shape, 1000)), list(pictures(6, shape, 1000, seed=1))
    splits = {"train": train, "validation": held, "test": [(image, -1) for image, _ in held]}
    write_set("imagenet2012", "5.1.0", shape, 1000, splits, form="JPEG")
    return train, held


def test_imagenet_by_name(load):
    _, held = prepare_imagenet()
    with pytest.raises(UserError, match="differ in size; set data.image_size"):
        load(name="imagenet2012", image_size=0)
    dataset = load(name="imagenet2012", in_memory="auto", image_size=56, batch_size=6)
    assert dataset.info[:4] == (
        "imagenet2012",
        (56, 56, 3),
        1000,
        {"train": 18, "validation": 2, "test": 6},
    )
    assert dataset.feed(0, 0)["image"].shape == (6, 56, 56, 3)
    feed = dataset.eval_feed("test")
    np.testing.assert_array_equal(feed["label"][feed["mask"]], range(6))
    for view, (image, _) in zip(feed["image"], held, strict=False):
        # Shorter side to 256/224 of 56, the middle of it; JPEG blurs the edges of the tiles.
        expected = views.centre_view(image, 56, 64).astype(int)
        assert np.median(np.abs(view - expected)) <= 3


@pytest.mark.slow
def test_imagenet_with_workers_gives_the_same_batches(load):
    prepare_imagenet()
    config = dict(name="imagenet2012", image_size=32, batch_size=6)
    alone, helped = load(**config), load(**config, workers=2)
    for step in range(5):
        same(helped.feed(1, step), alone.feed(1, step))


@needs_sets
def test_a_set_that_would_fit_can_be_streamed_at_another_size(load, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", PREPARED)
    dataset = load(name="fashion_mnist", image_size=40, batch_size=32)
    assert dataset.info.shape == (40, 40, 1)
    assert dataset.info.examples == {"train": 54000, "validation": 6000, "test": 10000}
    assert dataset.feed(0, 0)["image"].shape == (32, 40, 40, 1)
    feed = dataset.eval_feed("test")
    import tensorflow_datasets as module

    theirs = module.data_source("fashion_mnist", split="test", data_dir=PREPARED)
    np.testing.assert_array_equal(feed["label"], [theirs[i]["label"] for i in range(16)])
    assert not (Path(os.environ["BNRESEARCH_CACHE"]) / "data").exists()


SCRIPT = """
import copy, os, sys, time
import numpy as np
from bnresearch import data

class Spy:
    # Stands in for a source: tells from within a worker what a worker has loaded and may touch.
    name, version, shape, num_classes, lengths = "spy", "", (4, 4, 3), 10, {"train": 100}

    def read(self, split, indices):
        jax = sys.modules.get("jax")
        backends = jax and jax._src.xla_bridge._backends
        platforms = jax.config.jax_platforms if jax else "cpu"
        ours = [m for m in sys.modules if m.startswith("bnresearch")]
        light = not {"bnresearch.data.memory", "flax", "optax", "tensorflow"} & set(sys.modules)
        facts = [not backends, platforms == "cpu", light, bool(ours)]
        return [(np.full((4, 4, 3), sum(facts), np.uint8), os.getpid() % 65536)] * len(indices)

if __name__ == "__main__":
    from bnresearch.data.stream import Stream
    config = dict(data.DEFAULTS, batch_size=4, workers=2, augment="none")
    dataset = Stream(Spy(), config)
    feeds = [dataset.feed(0, step) for step in range(4)]
    print({int(n) for feed in feeds for n in feed["image"].ravel()}, flush=True)
    print(len({int(n) for feed in feeds for n in feed["label"]}), flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
    if sys.argv[1] == "close":
        dataset.close()
"""


def workers_of(process):
    """Process ids of the workers that ``process`` started (Linux)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = status.with_name("cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == process.pid and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def run_script(tmp_path, mode):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = dict(os.environ, PYTHONPATH=str(Path(data.__file__).parents[2]))
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["close", "forget"])
def test_workers_stay_light_and_end_quietly(tmp_path, mode):
    output, errors = run_script(tmp_path, mode).communicate(timeout=50)
    # All four facts held in every example, and two processes made them.
    assert output.split("\n")[:2] == ["{4}", "2"]
    assert errors == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_when_the_run_is_killed_but_not_by_its_signals(tmp_path):
    process = run_script(tmp_path, "wait")
    assert process.stdout.readline() == "{4}\n"
    assert process.stdout.readline() == "2\n"
    workers = workers_of(process)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.5)
    assert sorted(workers_of(process)) == sorted(workers)
    process.kill()
    process.communicate()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_auto_workers_are_the_cores_given_to_the_process(load, monkeypatch):
    monkeypatch.setattr(stream.os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert load(workers=-1)._workers == 3
