import gc
import itertools
import json
import threading
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stores import copied, write_store
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.data.dataset import dealt, wanted_clips
from shine.data.feeding import AHEAD, ahead, collated_ahead
from shine.data.loading import Source
from shine.data.resident import ResidentStore
from shine.data.sampler import GlobalBatch
from shine.data.store import FeatureStore, RangeStore
from shine.engine import LocalBackend, RunOrder, train
from shine.errors import InputError

CPU = torch.device("cpu")
FEEDS = ("mapped", "resident", "streamed")  # the last one: by ranges, without a cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def elsewhere(root):
    return copied(root / "store", "memory://elsewhere")


def tensors(part):
    """Every tensor of a batch by its name."""
    found = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
        else:
            found |= {f"{field.name}.{name}": tensor for name, tensor in tensors(value).items()}
    return found


def assert_same(one, other):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def fed(config, rank, world_size, step=0):
    dataset = Source.open(config, CPU).training()
    order = RunOrder(dataset, config, step)
    return list(collated_ahead(dataset, order, rank=rank, world_size=world_size, device=CPU))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_way_to_read_a_store_gives_the_same_batches_in_the_same_order(
    root, elsewhere, tmp_path, world_size
):
    """16 rows in batches of 5: the last batch of an epoch has one, so some workers have none."""
    cache = f"features.cache={tmp_path}"
    for rank in range(world_size):
        found = [
            fed(tiny_config(root, f"features.feed={feed}", f"features.store={store}", cache),
                rank, world_size)
            for feed, store in itertools.product(FEEDS, (root / "store", elsewhere))
        ]  # fmt: skip
        assert len(found[0]) == 2 * 4
        for batches in found[1:]:
            for one, other in zip(found[0], batches, strict=True):
                assert_same(one, other)


def test_a_feed_starts_at_any_batch(root):
    config = tiny_config(root, "train.epochs=3")
    whole = fed(config, 0, 1)
    for step in range(len(whole) + 1):
        rest = fed(config, 0, 1, step)
        assert len(rest) == len(whole) - step
        for one, other in zip(whole[step:], rest, strict=True):
            assert_same(one, other)


def test_a_worker_reads_each_video_of_a_batch_once(root):
    read = []

    class Watched(FeatureStore):
        def read(self, vids, lengths):
            read.append(list(vids))
            return super().read(vids, lengths)

    config = tiny_config(root)
    source = Source.open(config)
    store = source.store
    watched = Watched(store.folder, store.manifest, store._place, store._shards)
    dataset = Source(config, watched, source.texts).training()
    order = list(RunOrder(dataset, config, 0))
    list(collated_ahead(dataset, order, rank=0, world_size=2, device=CPU))
    assert len(read) == len(order)
    for vids, batch in zip(read, order, strict=True):
        mine = {dataset.annotations[row].vid for row in batch.rows[::2].tolist()}
        assert len(vids) == len(mine)
        assert set(vids) == mine


@pytest.mark.parametrize("feed", ["resident", "streamed"])
def test_a_run_in_this_process_ends_bit_for_bit_where_the_mapped_one_does(
    root, elsewhere, tmp_path, feed
):
    changes = ("model.dropout=0.2", "train.epochs=3")
    mapped = train_run(tiny_config(root, *changes), tmp_path / "mapped")
    changes += (f"features.feed={feed}", f"features.store={elsewhere}")
    other = train_run(tiny_config(root, *changes, f"features.cache={tmp_path}"), tmp_path / "other")
    assert mapped["score"] == other["score"]
    expected, found = (
        load_file(tmp_path / name / run["best"] / "model.safetensors")
        for name, run in (("mapped", mapped), ("other", other))
    )
    assert all(torch.equal(expected[key], found[key]) for key in expected)


class StoppedError(Exception):
    pass


class StoppedBackend(LocalBackend):
    def report(self, record, write):
        super().report(record, write)
        if record["epoch"] == 2:
            raise StoppedError


def test_a_stopped_run_that_reads_ranges_ends_where_the_calm_mapped_one_does(
    root, elsewhere, tmp_path
):
    changes = ("model.dropout=0.2", "train.epochs=4")
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    calm.mkdir()
    broken.mkdir()
    train(tiny_config(root, *changes), calm, LocalBackend(calm, CPU))
    changes += ("features.feed=streamed", f"features.store={elsewhere}")
    with pytest.raises(StoppedError):
        train(tiny_config(root, *changes), broken, StoppedBackend(broken, CPU))
    resumed = LocalBackend(broken, CPU)
    train(tiny_config(root, *changes), broken, resumed)
    last = resumed.latest_checkpoint().name
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected, found = load_file(calm / last / name), load_file(broken / last / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    records = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert all(0 < record["data_seconds"] <= record["seconds"] for record in records)


def test_a_store_that_breaks_while_its_ranges_are_read_is_told_in_one_sentence(root, tmp_path):
    url = copied(root / "store", "memory://breaking")
    config = tiny_config(root, "features.feed=streamed", f"features.store={url}")
    dataset = Source.open(config).training()
    order = RunOrder(dataset, config, 0)
    feed = collated_ahead(dataset, order, rank=0, world_size=1, device=CPU)
    next(feed)
    for shard in dataset.store.manifest["shards"]:
        dataset.store._storage.write(shard["name"], b"cut")
    with pytest.raises(InputError, match=r"is cut short; pack the features again"):
        list(feed)


def test_a_store_that_does_not_fit_the_device_is_refused(tmp_path):
    write_store(tmp_path)
    store = FeatureStore.open(tmp_path)
    huge = np.broadcast_to(np.zeros(6, np.float16), (10**13, 6))
    shards = dict.fromkeys(store._shards, huge)
    store = FeatureStore(store.folder, store.manifest, store._place, shards)
    with pytest.raises(
        InputError, match=r"needs 2\.4e\+05 GB .* cpu has .* set features\.feed=map"
    ):
        ResidentStore.load(store, CPU)


def test_a_resident_store_is_one_matrix_in_the_stored_type(tmp_path):
    write_store(tmp_path)
    store = FeatureStore.open(tmp_path)
    matrix = ResidentStore.load(store, CPU)._matrix
    assert (matrix.dtype, tuple(matrix.shape)) == (torch.float16, (18 + 1, 6))


def test_ranges_read_ahead_hold_a_few_batches_however_large_the_store_is(tmp_path):
    """64 MB of clips through 1 MB batches; what Python and NumPy allocate stays far below."""
    videos = {f"v{number}": 64 for number in range(512)}
    write_store(tmp_path, lengths=videos, shards=[list(videos)], width=1024)
    store = RangeStore.open(tmp_path)
    batch_bytes = 8 * 64 * 1026 * 4
    vids = list(videos)
    gc.collect()
    tracemalloc.start()
    try:
        parts = (store.gather(vids[i : i + 8], np.full(8, 64)) for i in range(0, len(vids), 8))
        total = sum(len(clips) for clips in ahead(parts))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == len(vids)
    assert peak < (AHEAD + 4) * batch_bytes < 64 * batch_bytes / 8


@given(st.integers(0, 20), st.integers(1, 4), st.integers(0, 20))
def test_items_come_in_order_and_no_more_are_made_than_may_wait(count, most, taken):
    made = []

    def items():
        for number in range(count):
            made.append(number)
            yield number

    found = []
    waiting = ahead(items(), most)
    for item in itertools.islice(waiting, taken):
        found.append(item)
        assert len(made) <= len(found) + most + 1
    assert found == list(range(min(count, taken)))
    waiting.close()
    assert not any("_make" in thread.name for thread in threading.enumerate())


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        yield 2
        raise InputError("the third")

    waiting = ahead(items())
    assert [next(waiting), next(waiting)] == [1, 2]
    with pytest.raises(InputError, match="the third"):
        next(waiting)


def test_a_share_without_rows_wants_no_clips(root):
    dataset = Source.open(tiny_config(root)).training()
    batch = GlobalBatch(np.array([3]), np.array([-1]), np.zeros((1, 4)))
    vids, lengths, video = wanted_clips(dataset, dealt(batch, 1, 2))
    assert (vids, len(lengths), len(video)) == ([], 0, 0)
