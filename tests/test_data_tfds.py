"""Sets of TensorFlow Datasets: reading, the cache of decoded arrays, preparing, and refusals.

Sets are written here in TFDS's own layout (ArrayRecord files and two JSON files), so that most
tests need neither a prepared copy nor a network.
"""

import importlib.util
import io
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tfds_tools import encoded, pictures, raw, settings, tiny, write_records, write_set

from bnresearch import data
from bnresearch.data import base, cache, tfds
from bnresearch.errors import UserError


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("BNRESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path


def test_a_prepared_set_is_read_without_its_code_and_without_tensorflow():
    train, test = tiny()
    dataset = data.load(settings(name="tiny", batch_size=8))
    assert dataset.info[:4] == (
        "tiny",
        (6, 6, 3),
        4,
        {"train": 36, "validation": 4, "test": 10},
    )
    images, labels = raw(dataset, "test")
    np.testing.assert_array_equal(images, [image for image, _ in test])
    np.testing.assert_array_equal(labels, [label for _, label in test])
    for split in ("train", "validation"):
        index = base.divide({"train": 40, "test": 10}, 0.1, 0)[split].indices
        np.testing.assert_array_equal(raw(dataset, split)[0], [train[i][0] for i in index])
    assert "tensorflow" not in sys.modules


def count_reads(monkeypatch):
    reads = []
    read = tfds.TfdsSource.read

    def counted(self, split, indices):
        reads.append((split, len(indices)))
        return read(self, split, indices)

    monkeypatch.setattr(tfds.TfdsSource, "read", counted)
    return reads


def test_second_start_maps_the_cache_and_decodes_nothing(monkeypatch, folders):
    tiny(count=1200)
    reads = count_reads(monkeypatch)
    first = data.load(settings(name="tiny", batch_size=8))
    assert sorted(reads) == [("test", 10), ("train", 200), ("train", 500), ("train", 500)]
    reads.clear()
    second = data.load(settings(name="tiny", batch_size=8))
    assert reads == []
    assert isinstance(second._stored["train"].image, np.memmap)
    assert second.info == first.info
    np.testing.assert_array_equal(raw(second, "train")[0], raw(first, "train")[0])
    names = [path.name for path in (folders / "cache" / "data").iterdir()]
    assert len(names) == 1
    assert names[0].startswith("tiny-1.0.0-")
    assert names[0].endswith(f"-format{cache.FORMAT}")


def test_another_split_seed_or_copy_of_the_set_does_not_mix_in_the_cache(folders):
    tiny()
    one = data.load(settings(name="tiny", batch_size=8))
    other = data.load(settings(name="tiny", batch_size=8, split_seed=1))
    assert one.info.mean != other.info.mean
    os.rename(folders / "tfds", folders / "before")
    tiny(count=50)
    assert data.load(settings(name="tiny", batch_size=8)).info.examples["train"] == 45


def test_a_damaged_cache_is_decoded_again(folders, capsys):
    tiny()
    images, _ = raw(data.load(settings(name="tiny", batch_size=8)), "train")
    (path,) = (folders / "cache" / "data").glob("*/train-image.npy")
    path.write_bytes(path.read_bytes()[:1000])
    again = data.load(settings(name="tiny", batch_size=8))
    np.testing.assert_array_equal(raw(again, "train")[0], images)
    assert "damaged; decoding again" in capsys.readouterr().err


def test_a_failed_decode_leaves_nothing(monkeypatch, folders):
    tiny()

    def fail(self, split, indices):
        raise RuntimeError("a broken picture")

    with monkeypatch.context() as patch:
        patch.setattr(tfds.TfdsSource, "read", fail)
        with pytest.raises(RuntimeError, match="a broken picture"):
            data.load(settings(name="tiny", batch_size=8))
    assert list((folders / "cache" / "data").iterdir()) == []
    assert data.load(settings(name="tiny", batch_size=8)).info.examples["test"] == 10


def test_a_damaged_picture_is_named_as_such(folders, capsys):
    picture = np.zeros((6, 6, 3), np.uint8)
    write_set("broken", "1.0.0", (6, 6, 3), 2, {"train": [(picture, 0)] * 9}, form="PNG")
    (path,) = (folders / "tfds" / "broken" / "1.0.0").glob("*train*")
    # Written again with the last picture cut off.
    write_records(path, [(encoded(picture, "PNG"), 0)] * 8 + [(b"no picture", 1)])
    with pytest.raises(UserError, match="picture of broken cannot be decoded"):
        data.load(settings(name="broken", batch_size=2))
    assert capsys.readouterr().err == ""
    assert list((folders / "cache" / "data").iterdir()) == []


def test_two_at_once_decode_both_and_share_one_copy(folders):
    tiny()
    results, start = [], threading.Barrier(2)

    def load():
        start.wait()
        results.append(data.load(settings(name="tiny", batch_size=8)))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(*(raw(dataset, "train")[0] for dataset in results))
    assert len(list((folders / "cache" / "data").iterdir())) == 1


def test_without_a_writable_cache_it_decodes_into_memory(monkeypatch, folders, capsys):
    tiny()
    (folders / "file").write_text("not a folder")
    monkeypatch.setenv("BNRESEARCH_CACHE", str(folders / "file"))
    dataset = data.load(settings(name="tiny", batch_size=8))
    assert dataset.info.examples == {"train": 36, "validation": 4, "test": 10}
    assert "decoding into memory" in capsys.readouterr().err


def test_hidden_test_labels_make_the_validation_split_the_test():
    examples = list(pictures(12, (6, 6, 1), 3))
    hidden = [(image, -1) for image, _ in examples]
    splits = {"train": examples * 2, "validation": examples, "test": hidden}
    write_set("hidden", "1.0.0", (6, 6, 1), 3, splits)
    dataset = data.load(settings(name="hidden", batch_size=4))
    assert dataset.info.examples == {"train": 22, "validation": 2, "test": 12}
    np.testing.assert_array_equal(raw(dataset, "test")[1], [label for _, label in examples])


def test_a_set_with_train_only_gets_a_test_part():
    write_set("only", "1.0.0", (6, 6, 3), 3, {"train": list(pictures(40, (6, 6, 3), 3))})
    dataset = data.load(settings(name="only", batch_size=4))
    assert dataset.info.examples == {"train": 31, "validation": 3, "test": 6}


def test_small_photographs_can_be_resized_into_memory():
    write_set("photos", "1.0.0", (None, None, 3), 3, {"train": list(pictures(40, (0, 0, 3), 3))})
    with pytest.raises(UserError, match="set data.image_size"):
        data.load(settings(name="photos", batch_size=4))
    dataset = data.load(settings(name="photos", batch_size=4, image_size=16, in_memory="yes"))
    assert dataset.info.shape == (16, 16, 3)
    assert dataset.feed(0, 0)["image"].shape == (31, 16, 16, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifra10", "did you mean cifar10"),
        ("digit", "did you mean digits"),
        ("xqzw", "nothing similar is known; 'python -m bnresearch list datasets'"),
        ("kaggle:something", "no dataset name"),
        ("../cifar10", "no dataset name"),
        ("mnist/foo", r"opened: ValueError: BuilderConfig foo not found [\w .]+; write name,"),
        ("ag_news_subset", "not image classification .* has .*title"),
    ],
)
def test_unknown_and_unfit_names(name, words, folders):
    with pytest.raises(UserError, match=words):
        data.load(settings(name=name))
    assert list(folders.iterdir()) == []


def test_a_prepared_set_without_labels_is_refused():
    tiny(labels=False)
    with pytest.raises(UserError, match="'label'"):
        data.load(settings(name="tiny"))


def test_a_set_prepared_for_reading_in_order_is_refused():
    tiny()
    path = Path(os.environ["TFDS_DATA_DIR"]) / "tiny" / "1.0.0" / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"tfrecord.*file_format='array_record'"):
        data.load(settings(name="tiny"))


def test_offline_a_set_that_is_not_there_says_what_to_do(monkeypatch, folders):
    pytest.importorskip("importlib_resources", reason="TFDS needs it to prepare sets")
    # A proxy that refuses every connection: no name is looked up, nothing leaves the machine.
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        data.load(settings(name="cifar100"))
    message = str(caught.value)
    assert f"'cifar100' is not in {folders / 'tfds'} and cannot be downloaded" in message
    assert "no connection to https://www.cs.toronto.edu" in message
    assert "Set TFDS_DATA_DIR to a folder with a prepared copy" in message
    assert "tfds build cifar100 --file_format=array_record" in message
    assert list(folders.iterdir()) == []


def test_a_silent_network_is_given_up(monkeypatch):
    monkeypatch.setattr(tfds, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(tfds, "_probe", lambda url: threading.Event().wait(5))
    assert tfds._unreachable("https://example.org") == (
        "https://example.org did not answer within 0.1 s"
    )


def test_imagenet_has_to_be_fetched_by_hand(folders):
    with pytest.raises(UserError, match=r"by hand into .*manual: .*ILSVRC2012_img_train.tar"):
        data.load(settings(name="imagenet2012", image_size=224))
    assert list(folders.iterdir()) == []


@pytest.fixture
def homemade():
    """A set whose code is registered with TFDS but that is not prepared; it needs no download."""
    pytest.importorskip("importlib_resources", reason="TFDS needs it to prepare sets")
    import tensorflow_datasets as module

    class HomemadeShapes(module.core.GeneratorBasedBuilder):
        VERSION = module.core.Version("1.0.0")
        fails = arrays = False

        def _info(self):
            return module.core.DatasetInfo(
                builder=self,
                features=module.features.FeaturesDict(
                    {
                        "image": module.features.Image(shape=(6, 6, 3)),
                        "label": module.features.ClassLabel(num_classes=4),
                    }
                ),
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for key, (image, label) in enumerate(pictures(20, (6, 6, 3), 4)):
                if self.fails and key == 10:
                    raise OSError("the disk is full")
                # TFDS encodes arrays with TensorFlow, and takes files as they are.
                picture = image if self.arrays else io.BytesIO(encoded(image, "PNG"))
                yield key, {"image": picture, "label": label}

    yield HomemadeShapes
    module.core.registered._DATASET_REGISTRY.pop("homemade_shapes")


def test_a_set_is_prepared_on_first_use(homemade, folders):
    dataset = data.load(settings(name="homemade_shapes", batch_size=4))
    assert dataset.info.examples == {"train": 15, "validation": 2, "test": 3}
    assert [path.name for path in (folders / "tfds").iterdir()] == ["homemade_shapes"]
    source = tfds.open_source("homemade_shapes")
    read = source.read("train", range(20))
    expected = {(image.tobytes(), label) for image, label in pictures(20, (6, 6, 3), 4)}
    assert {(image.tobytes(), label) for image, label in read} == expected


def test_failing_to_prepare_leaves_nothing(homemade, folders):
    homemade.fails = True
    with pytest.raises(UserError, match="cannot be prepared: .*the disk is full"):
        data.load(settings(name="homemade_shapes", batch_size=4))
    assert list(folders.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorflow"), reason="TensorFlow is installed")
def test_a_set_that_needs_tensorflow_says_so(homemade, folders):
    homemade.arrays = True
    with pytest.raises(UserError, match=r"needs TensorFlow, .*pip install 'bnresearch\[tfds\]'"):
        data.load(settings(name="homemade_shapes", batch_size=4))
    assert list(folders.iterdir()) == []


PREPARED = os.environ.get("TFDS_DATA_DIR", "")
needs_sets = pytest.mark.skipif(
    not all((Path(PREPARED) / name).is_dir() for name in ("cifar10", "fashion_mnist", "mnist")),
    reason="TFDS_DATA_DIR has no prepared cifar10, fashion_mnist and mnist",
)


@needs_sets
def test_cifar10_is_cifar10(monkeypatch):
    """Our decoding against TFDS's own, for every 500th picture."""
    monkeypatch.setenv("TFDS_DATA_DIR", PREPARED)
    import tensorflow_datasets as module

    source = tfds.open_source("cifar10")
    assert (source.shape, source.num_classes) == ((32, 32, 3), 10)
    assert source.lengths == {"train": 50000, "test": 10000}
    index = range(0, 50000, 500)
    theirs = module.data_source("cifar10", split="train", data_dir=PREPARED).__getitems__(
        list(index)
    )
    for (image, label), example in zip(source.read("train", index), theirs, strict=True):
        np.testing.assert_array_equal(image, example["image"])
        assert label == example["label"]


@needs_sets
@pytest.mark.slow
def test_mnist_in_memory(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", PREPARED)
    dataset = data.load(settings(name="mnist", validation_fraction=1 / 6))
    assert dataset.info.examples == {"train": 50000, "validation": 10000, "test": 10000}
    # The published counts of the test digits and the well-known mean of the training pictures.
    counts = np.bincount(raw(dataset, "test")[1])
    np.testing.assert_array_equal(counts, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    assert dataset.info.mean[0] / 255 == pytest.approx(0.1307, abs=5e-4)
    assert dataset.info.std[0] / 255 == pytest.approx(0.3081, abs=5e-4)
