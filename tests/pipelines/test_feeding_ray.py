import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.errors import InputError

pytestmark = pytest.mark.ray


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


def test_streaming_without_processors_for_the_readers_is_refused(ray_cluster, root, tmp_path):
    config = tiny_config(root, "train.num_workers=64", "features.feed=streamed")
    says = r"needs 128 CPUs, two per worker, one of them to stream; the cluster has \d+; set train"
    with pytest.raises(InputError, match=says):
        train_run(config, tmp_path / "run")
