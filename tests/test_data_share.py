"""Streams in several processes: each reads its share, and the batches are those of one process."""

import copy

import numpy as np
import pytest
from ml_collections import ConfigDict
from tfds_tools import put_together, same

from bnresearch import data
from bnresearch.data.base import Share
from bnresearch.errors import UserError


@pytest.fixture
def load():
    """data.load for the share of a small synthetic stream, closed at the end of the test."""
    opened = []

    def opener(share=Share(), **changes):
        config = ConfigDict(copy.deepcopy(data.DEFAULTS))
        config.update(name="synthetic", in_memory="no", workers=0, image_size=16, batch_size=16)
        config.update(eval_batch_size=16, augment="crop_flip")
        config.synthetic.update(shape=(24, 20, 3), examples=100, vary=0.3)
        config.update(changes)
        opened.append(data.load(config, share))
        return opened[-1]

    yield opener
    for dataset in opened:
        dataset.close()


@pytest.mark.parametrize(("count", "microbatches"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_the_shares_of_all_processes_are_the_whole_batch(load, count, microbatches):
    whole = load()
    shares = [load(Share(index, count, microbatches)) for index in range(count)]
    for step in (0, 1, 5, 6):  # 6 x 16 > 90: past the end of an epoch; at 5 it starts anew
        feeds = [one.feed(3, step) for one in shares]
        assert {len(feed["label"]) for feed in feeds} == {16 // count}
        same(put_together(feeds, microbatches), whole.feed(3, step))


@pytest.mark.parametrize("count", [2, 4])
def test_evaluation_counts_every_example_once_over_all_processes(load, count):
    whole = load()
    shares = [load(Share(index, count, 2)) for index in range(count)]
    unmasked = 0
    for step in range(whole.eval_steps("test")):
        feeds = [one.eval_feed("test", step) for one in shares]
        same(put_together(feeds, 1), whole.eval_feed("test", step))  # not cut into microbatches
        unmasked += sum(feed["mask"].sum() for feed in feeds)
    assert unmasked == whole.info.examples["test"] == 25


@pytest.mark.slow
def test_a_share_does_not_depend_on_workers_nor_on_where_reading_starts(load):
    alone, helped = (load(Share(1, 2, 2), workers=workers) for workers in (0, 2))
    alone.feed(3, 0)
    for step in (1, 2):
        same(helped.feed(3, step), alone.feed(3, step))
    same(helped.eval_feed("test", 1), alone.eval_feed("test", 1))


def test_a_process_reads_its_share_only(load, monkeypatch):
    dataset = load(Share(1, 4, 2))
    read, indices = dataset._source.read, []

    def noted(split, chosen):
        indices.extend(chosen)
        return read(split, chosen)

    monkeypatch.setattr(dataset._source, "read", noted)
    # As grain's workers ask for it, without what they read ahead.
    assert len(dataset._training(0)[5]["label"]) == len(indices) == 4
    indices.clear()
    dataset._evaluation("test")[1]
    np.testing.assert_array_equal(indices, np.arange(20, 24))


@pytest.mark.parametrize(
    ("share", "sizes", "words"),
    [
        (Share(0, 4), (18, 16), "data.batch_size is 18, but 4 processes .* a multiple of 4"),
        (Share(0, 2, 4), (20, 16), "20, but 2 processes .* in 4 microbatches: .* multiple of 8"),
        (Share(0, 1, 4), (18, 16), "18, but 1 process read"),
        (Share(0, 4, 2), (16, 18), "data.eval_batch_size is 18, but 4 .* it: choose .* of 4"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(load, share, sizes, words):
    with pytest.raises(UserError, match=words):
        load(share, batch_size=sizes[0], eval_batch_size=sizes[1])


def test_sets_in_memory_ignore_the_share(load):
    whole, part = load(in_memory="yes"), load(Share(1, 4), in_memory="yes", batch_size=18)
    same(part.eval_feed("test"), whole.eval_feed("test"))
