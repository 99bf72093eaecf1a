import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.config import EvaluateConfig
from shine.data.loading import Source
from shine.engine import LocalBackend, MetricsLog, learning_rate, selection_score, train
from shine.evaluation import evaluate_run, load_run_model
from shine.models import build_model
from shine.prediction import predict


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A finished run: its folder, what `train_run` returned, and the records it announced."""
    folder = tmp_path_factory.mktemp("runs") / "shine"
    records = []
    run = train_run(tiny_config(root), folder, records.append)
    return folder, run, records


class InterruptionError(Exception):
    pass


class InterruptedBackend(LocalBackend):
    """Dies in its n-th report, before or after the checkpoint is kept."""

    def __init__(self, folder, fatal, *, kept):
        super().__init__(folder, torch.device("cpu"))
        self._left, self._kept = fatal, kept

    def report(self, record, write):
        self._left -= 1
        if self._left == 0 and not self._kept:
            raise InterruptionError
        super().report(record, write)
        if self._left == 0:
            raise InterruptionError


def test_a_run_leaves_its_records_configuration_and_best_checkpoint(finished):
    folder, run, records = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert records == lines
    assert run == json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    best = max(lines, key=lambda line: line["score"])
    assert run["score"] == best["score"]
    assert (folder / run["best"] / "model.safetensors").exists()
    terms = {"span", "giou", "label", "rank", "negative", "intra", "inter", "aux", "total"}
    terms |= {f"fine_{n}" for n in range(1, 5)}
    assert {f"loss/{term}" for term in terms} == set(lines[0]["train"])
    assert lines[0]["score"] == selection_score(lines[0]["validation"])
    assert set(lines[0]["validation"]["val"]) == {"R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "mAP"}
    environment = json.loads((folder / "environment.json").read_text())
    assert {"train.jsonl", "val.jsonl", "test.jsonl", "store/manifest.json"} <= set(
        environment["checksums"]
    )


def test_a_finished_run_is_left_alone(finished, root):
    folder, run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    records = []
    assert train_run(tiny_config(root), folder, records.append) == run
    assert not records
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_a_folder_of_another_configuration_is_refused(finished, root):
    with pytest.raises(ValueError, match="another configuration"):
        train_run(tiny_config(root, "train.seed=9"), finished[0])


def test_who_watches_and_how_features_come_make_no_other_run(finished, root, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["tracking"]  # as written before there was such a section
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    other = tiny_config(root, "tracking.tensorboard=false", "features.feed=resident")
    assert train_run(other, folder)["status"] == "finished"


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("fatal", [1, 3])
def test_an_interrupted_run_ends_bit_for_bit_where_the_calm_one_does(root, tmp_path, fatal, kept):
    config = tiny_config(root, "train.epochs=4", "model.dropout=0.2", "train.drop_epoch=2")
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    for folder in (calm, broken):
        folder.mkdir()
    train(config, calm, LocalBackend(calm, torch.device("cpu")))
    with pytest.raises(InterruptionError):
        train(config, broken, InterruptedBackend(broken, fatal, kept=kept))
    torch.rand(3)  # what happens between the two must not matter
    resumed = LocalBackend(broken, torch.device("cpu"))
    train(config, broken, resumed)
    last = resumed.latest_checkpoint().name
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected, found = load_file(calm / last / name), load_file(broken / last / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)

    def records(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "data_seconds", "samples_per_second")
        return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]

    assert records(calm) == records(broken)


def test_a_torn_last_line_of_the_records_is_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n{"step": 6}\n{"step": 9}\n{"st')
    log = MetricsLog(path, 6)
    log.append({"step": 7})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 6, 7]


def test_training_lowers_the_loss(root, tmp_path):
    config = tiny_config(root, "train.epochs=15", "train.learning_rate=0.003")
    train_run(config, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["loss/total"] < 0.8 * lines[0]["train"]["loss/total"]


def test_without_validation_the_last_epoch_is_kept_and_said(root, tmp_path):
    config = tiny_config(root, "data.validation={}")
    run = train_run(config, tmp_path / "run")
    assert run["best_epoch"] == 2
    assert run["score"] is None
    assert "published protocol" in run["selection"]


def test_average_precision_chooses_the_checkpoint_where_it_is_asked_to():
    scores = {
        "a": {"R1@0.5": 0.6, "R1@0.7": 0.3, "mIoU": 0.3, "mAP": 0.2},
        "b": {"R1@0.5": 0.2, "R1@0.7": 0.1, "mIoU": 0.3, "mAP": 0.5},
    }
    assert selection_score(scores) == pytest.approx(0.3)
    assert selection_score(scores, "mAP") == pytest.approx(0.35)
    assert selection_score({}, "mAP") is None


def test_an_exploding_loss_ends_the_run_with_its_epoch(root, tmp_path):
    config = tiny_config(root, "train.learning_rate=1e30", "train.epochs=5")
    with pytest.raises(FloatingPointError, match=r"the loss is \S+ in epoch \d"):
        train_run(config, tmp_path / "run")


def test_predictions_do_not_depend_on_the_batching_and_keep_the_order_of_rows(root):
    config = tiny_config(root)
    source = Source.open(config)
    dataset = source.training()
    torch.manual_seed(0)
    model = build_model(config.model, clip_width=10, token_width=8)
    rows = np.random.default_rng(0).permutation(len(dataset))
    whole, single = (
        predict(model, dataset, rows, EvaluateConfig(batch_size=size), device=torch.device("cpu"))
        for size in (100, 1)
    )
    np.testing.assert_allclose(whole.moments, single.moments, atol=1e-4)
    np.testing.assert_allclose(whole.scores, single.scores, atol=1e-5)
    np.testing.assert_allclose(whole.saliency, single.saliency, atol=1e-4)
    assert (np.diff(whole.scores, axis=1) <= 0).all()
    for index, row in enumerate(rows):
        end = dataset.annotations[row].duration_seconds
        assert (whole.moments[index] >= 0).all()
        assert (whole.moments[index] <= end).all()
        curve = whole.saliency[index]
        assert np.isfinite(curve).sum(axis=1).tolist() == [dataset.num_clips[row]] * len(curve)


def test_evaluation_writes_figures_predictions_and_examples(finished):
    folder, run, _ = finished
    evaluation = evaluate_run(folder)
    assert evaluation == json.loads((folder / "evaluation.json").read_text())
    assert evaluation["checkpoint"] == run["best"]
    summary = evaluation["splits"]["test_trivial"]
    assert summary["num_queries"] == 4
    assert set(summary["saliency_sanity"]) == {"level_1", "level_2", "level_3"}
    lines = (folder / "predictions" / "test_trivial.jsonl").read_text().splitlines()
    assert len(lines) == 4
    first = json.loads(lines[0])
    assert len(first["pred_relevant_windows"][0]) == 3
    examples = json.loads((folder / "examples.json").read_text())
    assert [text["label"] for text in examples[0]["texts"]] == [
        "query", "level 1", "level 2", "level 3"]  # fmt: skip


def test_a_checkpoint_of_another_model_is_refused(finished, root):
    folder, run, _ = finished
    config = tiny_config(root, "model.hidden=32")
    with pytest.raises(ValueError, match="not a checkpoint of the configured model"):
        load_run_model(folder, config, Source.open(config), run["best"])


def test_the_rate_falls_to_a_tenth_after_each_drop():
    settings = tiny_config("x", "train.learning_rate=1", "train.drop_epoch=3").train
    rates = [learning_rate(settings, epoch) for epoch in range(7)]
    np.testing.assert_allclose(rates, [1, 1, 1, 0.1, 0.1, 0.1, 0.01])
