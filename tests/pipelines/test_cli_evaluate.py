"""`shine evaluate` on prediction files, which needs neither a run nor Ray."""

import json

import numpy as np
import pytest
import recorded

from pipelines.console import evaluation_table
from shine.data.annotations import write_jsonl
from shine.metrics.recall import METRICS
from shine.metrics.summary import Answers, evaluate_splits

TRUTH = [
    {"qid": n, "vid": "v", "query": "a", "duration": 20, "relevant_windows": [[2, 8]]}
    for n in range(3)
]
PREDICTED = [{"qid": n, "pred_relevant_windows": [[2, 8, 0.9], [0, 4, 0.1]]} for n in range(3)]


@pytest.fixture
def files(tmp_path):
    truth, predicted = tmp_path / "truth.jsonl", tmp_path / "predicted.jsonl"
    write_jsonl(truth, TRUTH)
    write_jsonl(predicted, PREDICTED)
    return truth, predicted


@pytest.mark.parametrize("kind", ["qvh", "cg"])
def test_recorded_predictions_give_the_official_report_beside_our_own(shine, kind):
    evaluator = {"qvh": "qvhighlights", "cg": "cg"}[kind]
    for truth in sorted(recorded.FOLDER.glob(f"eval_{kind}*_ground_truth*.jsonl")):
        name = truth.name.replace("ground_truth", "{}")
        predicted = truth.with_name(name.format("predictions"))
        status, out, _ = shine("evaluate", predicted, "--annotations", truth, "--json")
        assert status == 0
        result = json.loads(out)
        expected = recorded.facts(name.format("metrics").removesuffix(".jsonl"))["official_metrics"]
        assert result["official"][evaluator] == expected
        figure = result["metrics"]["mAP"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert abs(100 * figure["value"] - expected["brief"]["MR-full-mAP"]) <= 0.005
        assert len(result["queries"]["values"]["R5@0.5"]) == result["num_queries"]


def test_a_table_has_the_usual_figures(shine, files):
    truth, predicted = files
    status, out, _ = shine("evaluate", predicted, "--annotations", truth)
    assert status == 0
    for name in ("R1@0.5", "R5@0.7", "mIoU", "mAP@0.75", "short-mAP"):
        assert name in out
    assert "HL-min" not in out
    assert "long-mAP" not in out


def test_queries_without_a_prediction_are_counted(shine, files):
    truth, predicted = files
    write_jsonl(predicted, [PREDICTED[0] | {"pred_relevant_windows": []}, *PREDICTED[1:]])
    status, out, _ = shine("evaluate", predicted, "--annotations", truth)
    assert status == 0
    assert "1 of 3 queries have no prediction" in out
    assert "66.67" in out


def test_what_was_named_wrongly_is_told(shine, files, tmp_path):
    truth, predicted = files
    for arguments, says in (
        ((predicted,), "is a file; name its ground truth: shine evaluate"),
        ((tmp_path, "--annotations", truth), "is a folder; a run is evaluated on the splits"),
        ((tmp_path / "none",), "expected a finished run (run.json)"),
        ((tmp_path / "none", "--annotations", truth), "cannot read predictions"),
        ((predicted, "--annotations", tmp_path / "none"), "cannot read annotations"),
    ):
        status, out, err = shine("evaluate", *arguments)
        assert (status, out) == (2, "")
        assert says in err


def test_a_wrong_file_is_told(shine, files):
    truth, predicted = files
    for lines, says in (
        (PREDICTED[:2], "1 of 3 queries have no prediction, the first is '2'"),
        ([*PREDICTED, {"qid": 7, "pred_relevant_windows": []}], "1 of 4 queries are not in the"),
        ([*PREDICTED, PREDICTED[0]], "line 4: query id '0' was used on line 1"),
        ([PREDICTED[0] | {"pred_relevant_windows": [[1]]}, *PREDICTED[1:]], "line 1, query 0"),
    ):
        write_jsonl(predicted, lines)
        status, out, err = shine("evaluate", predicted, "--annotations", truth)
        assert (status, out) == (2, "")
        assert says in err
    predicted.write_text("{")
    assert "line 1: not valid JSON" in shine("evaluate", predicted, "--annotations", truth)[2]


def test_ground_truth_without_moments_is_told(shine, files):
    truth, predicted = files
    write_jsonl(truth, [{**row, "relevant_windows": None} for row in TRUTH])
    status, _, err = shine("evaluate", predicted, "--annotations", truth)
    assert status == 2
    assert "truth.jsonl, line 1: missing relevant_windows" in err


def test_a_figure_that_no_query_has_is_a_dash():
    unanswered = Answers(
        qids=["a", "b"],
        vids=["v", "w"],
        predicted=np.full((2, 1, 2), np.nan),
        scores=np.full((2, 1), np.nan),
        moments=np.array([[[0.0, 1.0]]] * 2),
        moment_mask=np.ones((2, 1), dtype=bool),
    )
    splits = dict.fromkeys(("test_trivial", "novel_composition"), unanswered)
    evaluation = evaluate_splits(splits, checkpoint="c", simulated=None, negatives=None)
    table = evaluation_table({"run": evaluation})
    *recalls, precision = (list(column.cells) for column in table.columns[3:])
    assert recalls == [["0.0"] * 3] * len(METRICS)
    assert precision == ["-"] * 3
