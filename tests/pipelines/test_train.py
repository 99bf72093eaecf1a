import json

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.errors import InputError
from shine.evaluation import evaluate_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_workers_give_the_losses_of_one(ray_cluster, root, tmp_path):
    """16 rows in batches of 5: the last batch has one row, so the second worker has none of it."""

    def drop_negatives(line):
        record = json.loads(line)
        if record["qid"].endswith("_1"):
            record["recomposed_queries"] = record["recomposed_queries"][:1]
        return json.dumps(record)

    lines = (root / "train.jsonl").read_text().splitlines()
    ragged = tmp_path / "ragged.jsonl"
    ragged.write_text("\n".join(map(drop_negatives, lines)))
    runs = {}
    for workers in (0, 2):
        overrides = (f"train.num_workers={workers}", f"data.train={ragged}", "train.epochs=3")
        folder = tmp_path / f"workers{workers}"
        run = train_run(tiny_config(root, *overrides), folder)
        assert run["status"] == "finished"
        assert (folder / run["best"] / "model.safetensors").exists()
        runs[workers] = losses(folder)
    for one, two in zip(runs[0], runs[2], strict=True):
        assert one["train"].keys() == two["train"].keys()
        for name in one["train"]:
            np.testing.assert_allclose(two["train"][name], one["train"][name], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(two["score"], one["score"], rtol=1e-5)
    assert evaluate_run(tmp_path / "workers2")["splits"]["test_trivial"]["num_queries"] == 4


def test_more_workers_than_the_cluster_has_are_refused_with_the_arithmetic(
    ray_cluster, root, tmp_path
):
    with pytest.raises(InputError, match=r"needs 64 CPUs, one per worker; the cluster has \d+"):
        train_run(tiny_config(root, "train.num_workers=64"), tmp_path / "run")


def test_what_a_worker_meets_reaches_the_user_as_one_sentence(ray_cluster, root, tmp_path):
    config = tiny_config(
        root, "train.num_workers=2", "train.learning_rate=1e30", "train.max_failures=0"
    )
    with pytest.raises(RuntimeError) as error:
        train_run(config, tmp_path / "run")
    assert "worker 0 failed: FloatingPointError: the loss is" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_run_that_loses_a_worker_ends_bit_for_bit_where_the_calm_one_does(
    ray_cluster, root, tmp_path
):
    config = tiny_config(root, "train.num_workers=2", "train.epochs=4", "model.dropout=0.2")
    calm = train_run(config, tmp_path / "calm")
    killed = []

    def kill_a_worker(record):
        if record["epoch"] == 2 and not killed:
            worker = next(p for p in psutil.Process().children(recursive=True)
                          if "RayTrainWorker" in " ".join(p.cmdline()))  # fmt: skip
            killed.append(worker.pid)
            worker.kill()

    broken = train_run(config, tmp_path / "broken", kill_a_worker)
    assert killed
    assert [r["epoch"] for r in losses(tmp_path / "broken")] == [1, 2, 3, 4]
    assert broken["best"] == calm["best"]
    expected, found = (
        load_file(tmp_path / name / calm["best"] / "model.safetensors")
        for name in ("calm", "broken")
    )
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_two_workers_train_with_terms_switched_off(ray_cluster, root, tmp_path):
    off = [f"loss.{name}_weight=0" for name in ("span", "giou", "rank", "intra", "inter")]
    config = tiny_config(root, "train.num_workers=2", "train.epochs=1", *off)
    assert train_run(config, tmp_path / "run")["status"] == "finished"
