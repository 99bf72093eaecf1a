import json
import os

import numpy as np
import pytest
import yaml
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.data.annotations import write_jsonl
from shine.evaluation import evaluate_predictions, evaluate_run


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


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A run on clips of 2 s, and the test file of its data, which has highlight labels."""
    root = tiny_data(tmp_path_factory.mktemp("labelled") / "data")
    random = np.random.default_rng(0)
    for path in root.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["duration"] *= 2
            row["relevant_clip_ids"] = [0, 2, 3, 5]
            row["saliency_scores"] = random.integers(0, 5, (4, 3)).tolist()
        write_jsonl(path, rows)
    clip_seconds(root, 2.0)
    run = root.parent / "run"
    train_run(tiny_config(root, "train.epochs=1", "features.clip_seconds=2"), run)
    return run, root


def clip_seconds(root, seconds):
    path = root / "store" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_seconds": seconds}))


SETTINGS = {
    "corrected": {},
    "corrected, all steps": {"round_seconds": 1.0, "nms_threshold": 0.5},
    "reference": {"compat": "reference"},
    "reference, all steps": {
        "compat": "reference",
        "round_seconds": 2.0,
        "limit_seconds": 25.0,
        "nms_threshold": 0.5,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_prediction_file_of_a_run_measures_as_the_run_did(labelled, settings):
    run, root = labelled
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"] |= {"compat": "corrected", "nms_threshold": None, **settings}
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    summary = evaluate_run(run)["splits"]["test_trivial"]
    file = evaluate_predictions(run / "predictions" / "test_trivial.jsonl", root / "test.jsonl")

    assert "HL-min-VeryGood-mAP" in summary["metrics"]
    for name, values in summary["queries"]["values"].items():
        assert file["queries"]["values"][name] == values, name
    assert file["num_unanswered"] == summary["num_unanswered"]


def test_saliency_of_other_clips_than_the_labelled_ones_is_not_measured(labelled):
    run, root = labelled
    clip_seconds(root, 1.5)
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    for row in rows:
        row["duration"] *= 0.75
    write_jsonl(root / "other.jsonl", rows)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["features"]["clip_seconds"] = 1.5
    config["data"]["tests"] = {"test_trivial": "other.jsonl"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    values = evaluate_run(run)["splits"]["test_trivial"]["queries"]["values"]
    assert "mAP" in values
    assert not any(name.startswith("HL-") for name in values)

    file = evaluate_predictions(run / "predictions" / "test_trivial.jsonl", root / "other.jsonl")
    of_file = file["queries"]["values"]  # a file does not say of what clips it is
    assert any(name.startswith("HL-") for name in of_file)
    assert {name: of_file[name] for name in values} == values
