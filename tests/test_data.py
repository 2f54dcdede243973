"""In-memory data: splits, epochs, augmentation, normalisation, evaluation, refusals."""

import copy
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict
from sklearn.datasets import load_digits

from bnresearch import data
from bnresearch.data import base, memory
from bnresearch.errors import UserError


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNRESEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def settings(**changes):
    synthetic = changes.pop("synthetic", {})
    config = ConfigDict(copy.deepcopy(data.DEFAULTS) | changes)
    config.synthetic.update(synthetic)
    return config


def stored(dataset, split):
    """The raw examples of a split as numpy arrays."""
    feed = dataset.eval_feed(split)
    return np.asarray(feed["image"]), np.asarray(feed["label"])


def batches(dataset, seed, steps, size):
    """What the train step sees, one batch after the other."""
    step_fn = jax.jit(dataset.train_batch)
    for step in range(steps):
        feed = dataset.feed(seed, step)
        yield jax.device_get(step_fn(feed, seed, step, jnp.arange(size)))


def test_digits_are_those_of_scikit_learn_divided_once():
    dataset = data.load(settings())
    assert dataset.info.shape == (8, 8, 1)
    assert dataset.info.num_classes == 10
    assert dataset.info.examples == {"train": 1374, "validation": 153, "test": 270}
    assert (dataset.sharded_feed, dataset.max_steps_per_feed) == (False, 512)
    images, labels = load_digits(return_X_y=True)
    parts = [stored(dataset, split) for split in base.SPLITS]
    assert parts[0][0].dtype == np.uint8
    assert parts[0][1].dtype == np.int32
    found = np.concatenate(
        [np.column_stack([image.reshape(len(image), -1), label]) for image, label in parts]
    )
    expected = np.column_stack([images, labels])
    # As sets of (pixels, label): no digit occurs twice in scikit-learn's file.
    assert len(np.unique(expected, axis=0)) == 1797
    np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(expected, axis=0))


def test_division_is_disjoint_complete_and_fixed_by_the_seed():
    parts = base.divide({"train": 1000}, 0.2, 7)
    assert {name: len(part.indices) for name, part in parts.items()} == {
        "train": 680,
        "validation": 170,
        "test": 150,
    }
    together = np.sort(np.concatenate([part.indices for part in parts.values()]))
    np.testing.assert_array_equal(together, np.arange(1000))
    # A change of this digest would give everybody other test examples.
    digest = hashlib.sha256(parts["test"].indices.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "980f91110be310aa"
    other = base.divide({"train": 1000}, 0.2, 8)
    assert not np.array_equal(parts["test"].indices, other["test"].indices)


def test_test_part_does_not_depend_on_the_validation_fraction():
    small, large = (base.divide({"train": 1000}, fraction, 7) for fraction in (0.1, 0.5))
    np.testing.assert_array_equal(small["test"].indices, large["test"].indices)
    assert not set(large["train"].indices) & set(small["validation"].indices)


def test_a_stored_test_split_is_kept_whole():
    parts = base.divide({"train": 50, "test": 20}, 0.1, 0)
    assert parts["test"].stored == "test"
    np.testing.assert_array_equal(parts["test"].indices, np.arange(20))
    assert set(parts["train"].indices) | set(parts["validation"].indices) == set(range(50))
    assert (len(parts["train"].indices), len(parts["validation"].indices)) == (45, 5)


def test_every_example_once_per_epoch_although_the_batch_does_not_divide():
    config = settings(name="synthetic", batch_size=16, synthetic={"examples": 100, "vary": 0.0})
    dataset = data.load(config)
    count, size = dataset.info.examples["train"], 16
    assert (count, count % size) == (90, 10)
    seen = np.concatenate([b["image"] for b in batches(dataset, 5, 45, size)])  # eight epochs
    known = {image.tobytes(): i for i, image in enumerate(stored(dataset, "train")[0])}
    raw = np.rint(seen * dataset.info.std + dataset.info.mean).astype(np.uint8)
    order = np.array([known[image.tobytes()] for image in raw]).reshape(8, count)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    assert len({tuple(epoch) for epoch in order}) == 8


def test_order_depends_on_seed_and_epoch_alone():
    dataset = data.load(settings(name="synthetic", batch_size=16, synthetic={"examples": 100}))
    first = dataset.feed(5, 0)
    again = data.load(settings(name="synthetic", batch_size=30, synthetic={"examples": 100}))
    np.testing.assert_array_equal(first["order"][0], again.feed(5, 0)["order"][0])
    assert not np.array_equal(first["order"][0], dataset.feed(6, 0)["order"][0])
    # Started late, as after a resume: row 0 of the feed is then epoch 711.
    late = dataset.feed(5, 4000)
    assert int(late["epoch"]) == 4000 * 16 // 90
    key = jax.random.fold_in(jax.random.key(5), memory.ORDER)
    expected = jax.random.permutation(jax.random.fold_in(key, 711), 90)
    np.testing.assert_array_equal(late["order"][0], expected)


def test_feed_keeps_arrays_and_shapes():
    dataset = data.load(settings(batch_size=100))
    feeds = [dataset.feed(0, step, steps) for step, steps in ((0, 1), (3, 512), (40_000, 7))]
    for feed in feeds[1:]:
        assert feed["image"] is feeds[0]["image"]
        assert feed["label"] is feeds[0]["label"]
        assert jax.tree.map(jnp.shape, feed) == jax.tree.map(jnp.shape, feeds[0])
    assert dataset.feed(0, 40_000)["order"] is feeds[2]["order"]
    last = feeds[1]["epoch"] + len(feeds[1]["order"]) - 1
    assert int(last) >= (515 * 100 - 1) // 1374
    with pytest.raises(ValueError, match="at most 512"):
        dataset.feed(0, 0, 513)


def test_positions_stay_exact_where_their_number_leaves_int32():
    dataset = data.load(settings(name="synthetic", batch_size=64, synthetic={"examples": 100}))
    step = 2**31 - 10
    feed, rows = dataset.feed(3, step), jnp.arange(64)
    batch = jax.jit(dataset.train_batch)(feed, 3, jnp.int32(step), rows)
    numbers = step * 64 + np.arange(64, dtype=object)
    order = np.asarray(feed["order"])
    index = [order[int(g) // 90 - int(feed["epoch"]), int(g) % 90] for g in numbers]
    np.testing.assert_array_equal(batch["label"], stored(dataset, "train")[1][index])


@pytest.mark.parametrize("augment", data.AUGMENTS)
def test_rows_can_be_made_in_slices(augment):
    dataset = data.load(settings(batch_size=48, augment=augment, pad=1))
    feed = dataset.feed(2, 30)
    step_fn = jax.jit(dataset.train_batch)
    whole = step_fn(feed, 2, 30, jnp.arange(48))
    slices = [step_fn(feed, 2, 30, jnp.arange(i, i + 6)) for i in range(0, 48, 6)]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *slices)
    np.testing.assert_array_equal(joined["image"], whole["image"])
    np.testing.assert_array_equal(joined["label"], whole["label"])


def test_shard_map_and_jit_see_the_same_batch():
    dataset = data.load(settings(batch_size=48, augment="crop_flip", pad=1))
    feed, mesh = dataset.feed(2, 30), Mesh(np.array(jax.devices()), ("data",))
    rows = jnp.arange(48)
    whole = jax.jit(dataset.train_batch)(feed, 2, 30, rows)
    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec(), PartitionSpec("data"))
    split = jax.jit(
        jax.shard_map(
            dataset.train_batch, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data")
        )
    )(feed, jnp.int32(2), jnp.int32(30), rows)
    np.testing.assert_array_equal(split["image"], whole["image"])
    np.testing.assert_array_equal(split["label"], whole["label"])


def padded_crop(image, down, right, mirror, pad):
    """The plain way: pad with black, cut out, mirror."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    view = padded[pad + down : pad + down + height, pad + right : pad + right + width]
    return view[:, ::-1] if mirror else view


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmentation_is_pad_crop_and_flip(augment):
    shape, size, pad = (12, 10, 3), 64, 3
    config = settings(name="synthetic", batch_size=size, augment=augment, pad=pad)
    config.synthetic.update(shape=shape, examples=200)
    dataset = data.load(config)
    feed = dataset.feed(4, 1)
    batch = jax.jit(dataset.train_batch)(feed, 4, 1, jnp.arange(size))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(4), memory.AUGMENT), 1)
    draws = memory.draw(key, jnp.arange(size), pad, augment == "crop_flip")
    down, right, mirror = jax.device_get(draws)
    index = np.asarray(feed["order"])[0, size : 2 * size]
    images = stored(dataset, "train")[0][index]
    rows = zip(images, down, right, mirror, strict=True)
    expected = np.stack([padded_crop(image, *draw, pad) for image, *draw in rows])
    expected = (expected - np.float32(dataset.info.mean)) / np.float32(dataset.info.std)
    np.testing.assert_allclose(batch["image"], expected, rtol=0, atol=1e-6)
    assert set(mirror) == ({False, True} if augment == "crop_flip" else {False})


def test_draws_are_even_and_fresh_at_every_step():
    rows = jnp.arange(9000)
    draws = []
    for step in (0, 1):
        key = jax.random.fold_in(jax.random.key(0), step)
        draws.append([np.asarray(d) for d in memory.draw(key, rows, 2, True)])
    down, right, mirror = draws[0]
    for shift in (down, right):
        values, counts = np.unique(shift, return_counts=True)
        np.testing.assert_array_equal(values, [-2, -1, 0, 1, 2])
        np.testing.assert_allclose(counts, 1800, atol=4 * 1800**0.5)
    assert abs(mirror.mean() - 0.5) < 4 * 0.5 / 9000**0.5
    assert abs(np.corrcoef(down, right)[0, 1]) < 4 / 9000**0.5
    assert (draws[0][0] != draws[1][0]).mean() > 0.7


def test_training_part_is_normalised_and_the_others_by_its_numbers():
    dataset = data.load(settings(name="synthetic", synthetic={"examples": 300}))
    raw = stored(dataset, "train")[0].astype(np.float64)
    np.testing.assert_allclose(dataset.info.mean, raw.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.info.std, raw.std((0, 1, 2)), rtol=1e-12)
    epoch = np.concatenate([b["image"] for b in batches(dataset, 0, 5, 54)])[:270]
    epoch = epoch.astype(np.float64)
    np.testing.assert_allclose(epoch.mean((0, 1, 2)), 0, atol=0.02)
    rows = jnp.arange(256)
    train = dataset.eval_batch(dataset.eval_feed("train"), 0, rows)["image"]
    rest = dataset.eval_batch(dataset.eval_feed("train"), 1, rows)["image"][: 270 - 256]
    whole = np.concatenate([train, rest]).astype(np.float64)
    np.testing.assert_allclose(whole.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(whole.std((0, 1, 2)), 1, atol=1e-6)
    image, _ = stored(dataset, "test")
    test = dataset.eval_batch(dataset.eval_feed("test"), 0, jnp.arange(len(image)))["image"]
    np.testing.assert_allclose(test, (image - dataset.info.mean) / dataset.info.std, atol=1e-5)


def test_a_constant_channel_becomes_zero():
    sums = np.array([[[9 * 7], [9 * 49]]] * 4)
    assert memory._moments(sums, 9) == ((7.0,), (1.0,))


def test_evaluation_counts_every_example_once_in_stored_order():
    dataset = data.load(settings(eval_batch_size=64))
    assert dataset.eval_steps("test") == 5  # 270 = 4 x 64 + 14
    step_fn = jax.jit(dataset.eval_batch)
    made = [
        jax.device_get(step_fn(dataset.eval_feed("test", i), i, jnp.arange(64))) for i in range(5)
    ]
    images, labels, mask = (
        np.concatenate([m[k] for m in made]) for k in ("image", "label", "mask")
    )
    np.testing.assert_array_equal(mask, np.arange(320) < 270)
    raw, expected = stored(dataset, "test")
    np.testing.assert_array_equal(labels[mask], expected)
    # Padding begins again: real pictures, for norms that use the statistics of the batch.
    np.testing.assert_array_equal(images[~mask], images[:50])
    info = dataset.info
    np.testing.assert_allclose(images[mask], (raw - info.mean) / info.std, atol=1e-5)


def test_synthetic_is_a_function_of_seed_and_index_and_can_be_learned():
    config = settings(name="synthetic", synthetic={"examples": 400, "classes": 4})
    first, again = data.load(config), data.load(config)
    np.testing.assert_array_equal(stored(first, "train")[0], stored(again, "train")[0])
    other = data.load(settings(name="synthetic", split_seed=1, synthetic={"examples": 400}))
    assert not np.array_equal(stored(first, "test")[0][:90], stored(other, "test")[0][:90])
    images, labels = stored(first, "train")
    means = np.stack([images[labels == c].mean(0) for c in range(4)])
    test, truth = stored(first, "test")
    guess = ((test[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (guess == truth).mean() == 1.0


def test_image_size_resizes_when_decoding():
    dataset = data.load(settings(image_size=16))
    assert dataset.info.shape == (16, 16, 1)
    small = data.load(settings())
    large, raw = stored(dataset, "train")[0], stored(small, "train")[0]
    assert large.shape == (1374, 16, 16, 1)
    # Enlarging twice keeps the mean of every picture up to rounding.
    np.testing.assert_allclose(large.mean((1, 2)), raw.mean((1, 2)), atol=0.6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 1375}, "1374 training examples"),
        ({"batch_size": 0}, "at least 1"),
        ({"eval_batch_size": 0}, "at least 1"),
        ({"augment": "mixup"}, "none.*|crop, crop_flip"),
        ({"in_memory": "maybe"}, "auto, no, yes"),
        ({"validation_fraction": 0.0}, "between 0 and 1"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
        ({"validation_fraction": float("nan")}, "between 0 and 1"),
        ({"validation_fraction": 1e-9}, "validation part is empty"),
        ({"validation_fraction": 0.9999}, "train part is empty"),
        ({"pad": -1}, "at least 0"),
        ({"pad": 8, "augment": "crop"}, "8x8"),
        ({"workers": -2}, "at least -1"),
        ({"split_seed": -1}, "at least 0"),
        ({"split_seed": 2**32}, "below"),
        ({"image_size": -1}, "at least 0"),
        ({"name": "synthetic", "synthetic": {"shape": (8, 8)}}, "height, width, channels"),
        ({"name": "synthetic", "synthetic": {"classes": 0}}, "at least 1"),
        ({"name": "synthetic", "synthetic": {"examples": 1}}, "at least 2"),
        ({"name": "synthetic", "synthetic": {"vary": 1.0}}, "below 1"),
        ({"name": "synthetic", "synthetic": {"vary": 0.2}}, "set data.image_size"),
        (
            {"name": "synthetic", "in_memory": "yes", "synthetic": {"vary": 0.2}},
            "set data.image_size",
        ),
        ({"name": "synthetic", "in_memory": "no", "synthetic": {"shape": (8, 9, 3)}}, "8x9"),
    ],
)
def test_refusals_in_words(changes, words):
    with pytest.raises(UserError, match=words):
        data.load(settings(**changes))


def test_auto_streams_what_is_large_or_varies():
    large = {"shape": (64, 64, 3), "examples": 200_000}  # 250,000 x 12,288 bytes = 3.1e9
    for synthetic, size, streams in (
        ({}, 0, False),
        ({}, 40, False),
        (large, 0, True),
        ({"vary": 0.2}, 32, True),
    ):
        config = settings(name="synthetic", image_size=size, synthetic=synthetic)
        assert data._streams(data._synthetic(config), config) is streams


def test_positions_beyond_int32_are_refused():
    with pytest.raises(UserError, match="32-bit"):
        memory._check_int32(4096, 2**20)
