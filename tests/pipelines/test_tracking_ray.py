import json

import pytest
from test_tracking import shown
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.tracking import curves

pytestmark = pytest.mark.ray


def test_two_workers_leave_each_point_once(ray_cluster, tmp_path):
    root = tiny_data(tmp_path / "data")
    run = tmp_path / "run"
    train_run(tiny_config(root, "train.num_workers=2"), run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [
        (name.replace("@", "_"), line["step"], pytest.approx(value, rel=1e-6))
        for line in lines
        for name, value in curves(line).items()
    ]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert shown(run) == expected
