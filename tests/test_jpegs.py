"""JPEGs: what they are decoded to, the made-up set of ImageNet's sizes, and streams of it."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from tfds_tools import put_together, same, settings

from benchmarks import jpegs
from bnresearch import data
from bnresearch.data import tfds
from bnresearch.data.base import Share
from bnresearch.data.views import decode
from bnresearch.errors import UserError


@pytest.fixture(scope="module")
def photograph():
    return Image.open(io.BytesIO(jpegs.picture(0, "train", 0))).convert("RGB")


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_are_decoded_to_the_bits_that_pillow_gives(photograph, subsampling, progressive):
    for width, height in ((500, 375), (497, 371), (17, 9), (1, 1)):
        image = photograph.crop((0, 0, width, height))
        for quality in (30, 95):
            options = dict(quality=quality, subsampling=subsampling, progressive=progressive)
            jpeg = encoded(image, **options)
            pixels = decode(jpeg, 3)
            assert (pixels.shape, pixels.dtype) == ((height, width, 3), np.uint8)
            np.testing.assert_array_equal(pixels, by_pillow(jpeg))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_colours_too(photograph, mode):
    """ImageNet has both."""
    jpeg = encoded(photograph.convert(mode))
    np.testing.assert_array_equal(decode(jpeg, 3), by_pillow(jpeg))


def test_a_turn_that_is_only_noted_is_not_made(photograph):
    notes = Image.Exif()
    notes[0x0112] = 6  # to be shown turned by 90 degrees
    turned = encoded(photograph, exif=notes.tobytes())
    np.testing.assert_array_equal(decode(turned, 3), decode(encoded(photograph), 3))


def test_a_jpeg_cut_short_is_refused(photograph):
    with pytest.raises(OSError, match="truncated"):
        decode(encoded(photograph)[:5000], 3)


def test_pictures_have_the_sizes_they_should():
    rng = np.random.default_rng(0)
    sizes = np.array([jpegs._size(rng) for _ in range(4000)])
    np.testing.assert_array_equal(np.median(sizes, 0), (500, 375))
    np.testing.assert_allclose(sizes.mean(0), (466, 406), rtol=0.02)
    assert ((sizes == (500, 375)).all(1).mean()) == pytest.approx(0.5, abs=0.03)
    kilobytes = [len(jpegs.picture(0, "train", i)) / 1000 for i in range(40)]
    assert 85 < np.mean(kilobytes) < 130


def test_a_picture_depends_on_seed_split_and_index():
    ways = [(0, "train", 1), (1, "train", 1), (0, "validation", 1), (0, "train", 2)]
    assert len({jpegs.picture(*way) for way in ways}) == 4
    assert jpegs.picture(0, "train", 1) == jpegs.picture(0, "train", 1)


class Here(ThreadPoolExecutor):
    """Instead of processes, which take seconds to start."""

    def __init__(self, *_):
        super().__init__(1)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A set of 64 pictures in six files."""
    monkeypatch.setattr(jpegs, "PER_FILE", 13)
    monkeypatch.setattr(jpegs, "ProcessPoolExecutor", Here)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return jpegs.make(tmp_path / "tfds", 64)


def test_a_made_set_is_a_prepared_one(prepared):
    names = sorted(path.name for path in prepared.glob("*record*"))
    assert names[0] == "imagenet_sized-train.array_record-00000-of-00005"
    assert len(names) == 6
    assert list(prepared.parents[1].iterdir()) == [prepared.parent]  # nothing unfinished
    source = tfds.open_source(jpegs.NAME)
    assert (source.name, source.shape, source.num_classes) == (jpegs.NAME, (None, None, 3), 1000)
    assert source.lengths == {"train": 62, "test": 2}
    for split, stored, index in (("train", "train", 40), ("test", "validation", 1)):
        ((image, label),) = source.read(split, [index])
        np.testing.assert_array_equal(image, by_pillow(jpegs.picture(0, stored, index)))
        assert label == index


def test_making_a_set_goes_on_where_it_was(prepared, tmp_path, monkeypatch):
    write, written = jpegs.write, []

    def fail(file, seed):
        if len(written) == 3:
            raise OSError("the disk is full")
        written.append(file.path.name)
        write(file, seed)

    root = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(jpegs, "write", fail)
        with pytest.raises(OSError, match="the disk is full"):
            jpegs.make(root, 64)
    assert not (root / jpegs.NAME).exists()
    before = {path.name: path.stat().st_mtime_ns for path in root.glob(".partial-*/*")}
    assert sorted(before) == sorted(written)
    again = jpegs.make(root, 64)
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in again.iterdir()}.items()
    for path in prepared.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert jpegs.make(root, 64) == again
    with pytest.raises(UserError, match="holds 64 made-up pictures, seed 0, not 65"):
        jpegs.make(root, 65)


def test_a_set_that_does_not_fit_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        jpegs.main([str(tmp_path / "new"), "--count=1000000000"])
    assert "115000.0 GB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stream_of_it_goes_on_at_any_step_with_any_workers_and_processes(prepared):
    config = settings(name=jpegs.NAME, image_size=32, batch_size=16, eval_batch_size=2)
    config.update(augment="crop_flip", workers=0)
    whole = data.load(config)
    expected = {step: whole.feed(7, step) for step in (0, 4, 5)}  # 56 pictures: past an epoch
    config.workers = 2
    anew = data.load(config)
    same(anew.feed(7, 4), expected[4])
    same(anew.feed(7, 5), expected[5])
    shares = [data.load(config, Share(index, 2, 2)) for index in range(2)]
    for step, batch in expected.items():
        same(put_together([one.feed(7, step) for one in shares], 2), batch)
    for dataset in (whole, anew, *shares):
        dataset.close()
