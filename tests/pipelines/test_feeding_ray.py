import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from stores import copied
from tiny import tiny_config, tiny_data

from pipelines import feeding
from pipelines.feeding import StreamedFeed
from pipelines.train import train_run
from shine.data.feeding import collated_ahead
from shine.data.loading import Source
from shine.engine import RunOrder
from shine.errors import InputError

pytestmark = pytest.mark.ray
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(folder):
    timed = ("seconds", "data_seconds", "samples_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in records(folder)]


def test_two_workers_that_stream_end_bit_for_bit_where_two_that_map_do(ray_cluster, root, tmp_path):
    """16 rows in batches of 5: the last batch has one row, so the second worker has none of it."""
    ends = {}
    for feed in ("mapped", "streamed"):
        config = tiny_config(root, "train.num_workers=2", f"features.feed={feed}",
                             "train.epochs=3", "model.dropout=0.2")  # fmt: skip
        run = train_run(config, tmp_path / feed)
        ends[feed] = load_file(tmp_path / feed / run["best"] / "model.safetensors")
    assert untimed(tmp_path / "mapped") == untimed(tmp_path / "streamed")
    assert all(torch.equal(ends["mapped"][name], ends["streamed"][name]) for name in ends["mapped"])


def assert_same(one, other):
    for field in fields(one):
        value, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected), field.name
        else:
            assert_same(value, expected)


def test_what_is_streamed_is_batch_by_batch_what_is_mapped(ray_cluster, root, monkeypatch):
    """From within an epoch to within the second pipeline, for each of two workers."""
    monkeypatch.setattr(feeding, "_PLANNED", 5)
    config = tiny_config(root, "train.epochs=3", "features.feed=streamed")
    streamed = Source.open(config).training()
    mapped = Source.open(tiny_config(root, "train.epochs=3")).training()
    order = RunOrder(streamed, config, 3)
    for rank in range(2):
        share = {"rank": rank, "world_size": 2, "device": CPU}
        found = list(StreamedFeed(str(root / "store"))(streamed, order, **share))
        expected = list(collated_ahead(mapped, order, **share))
        assert len(found) == len(expected) == 3 * 4 - 3
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


def test_a_shard_that_is_cut_while_it_is_streamed_is_one_sentence(ray_cluster, root, tmp_path):
    place = copied(root / "store", str(tmp_path))
    config = tiny_config(root, "features.feed=streamed", f"features.store={place}")
    dataset = Source.open(config).training()
    for path in tmp_path.glob("shard-*.arrow"):
        path.write_bytes(path.read_bytes()[:700])  # its head, and few clips or none
    order = RunOrder(dataset, config, 0)
    with pytest.raises(InputError, match=r"shard-.*\.arrow is cut short; pack the features again"):
        list(StreamedFeed(place)(dataset, order, rank=0, world_size=1, device=CPU))


def test_streaming_without_processors_for_the_readers_is_refused(ray_cluster, root, tmp_path):
    config = tiny_config(root, "train.num_workers=64", "features.feed=streamed")
    says = r"needs 128 CPUs, two per worker, one of them to stream; the cluster has \d+; set train"
    with pytest.raises(InputError, match=says):
        train_run(config, tmp_path / "run")
