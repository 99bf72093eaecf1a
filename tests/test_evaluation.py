import os

import pytest
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.evaluation import evaluate_run


def test_an_evaluation_that_is_stopped_leaves_the_files_of_the_one_before(tmp_path, monkeypatch):
    root = tiny_data(tmp_path / "data")
    run = tmp_path / "run"
    train_run(tiny_config(root, "train.epochs=1"), run)
    evaluate_run(run)
    results = [
        run / "evaluation.json",
        run / "examples.json",
        run / "predictions/test_trivial.jsonl",
    ]
    before = [path.read_bytes() for path in results]
    replace = os.replace
    for stopped in results:

        def stop(source, target, stopped=stopped):
            if target == stopped:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run)
        assert [path.read_bytes() for path in results] == before
        assert not list(run.rglob("*.part"))
