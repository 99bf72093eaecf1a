"""The recorded results of the official evaluators, reached to the last printed digit."""

import numpy as np
import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st

from shine.data.annotations import read_annotations
from shine.metrics.average_precision import THRESHOLDS
from shine.metrics.figures import BUCKETS, moment_figures
from shine.metrics.official import official_report
from shine.metrics.summary import figures_of
from shine.submission import answers_to, read_submission

EVALUATORS = {"qvh": "qvhighlights", "cg": "cg"}
SETS = [
    (evaluator, path.name)
    for kind, evaluator in EVALUATORS.items()
    for path in sorted(recorded.FOLDER.glob(f"eval_{kind}*_ground_truth*.jsonl"))
]


def read(truth):
    path = recorded.FOLDER / truth
    annotations = read_annotations(path)
    predictions = recorded.FOLDER / truth.replace("ground_truth", "predictions")
    answers = answers_to(annotations, read_submission(predictions, annotations), path)
    metrics = recorded.facts(truth.replace("ground_truth", "metrics").removesuffix(".jsonl"))
    return answers, figures_of(answers), metrics


def test_there_are_recorded_results_of_both_evaluators():
    assert {evaluator for evaluator, _ in SETS} == set(EVALUATORS.values())


@pytest.mark.parametrize(("evaluator", "truth"), SETS)
def test_official_results_are_reproduced(evaluator, truth):
    _, figures, metrics = read(truth)
    expected = metrics["official_metrics"]
    found = official_report(figures, evaluator)
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("truth", [truth for evaluator, truth in SETS if evaluator == "cg"])
def test_unrounded_results_are_reproduced(truth):
    answers, figures, metrics = read(truth)
    unrounded = dict(metrics["unrounded"])
    iou = unrounded.pop("per_query_top1_iou")
    np.testing.assert_array_equal(figures["mIoU"], [iou[qid] for qid in answers.qids])
    for name, value in unrounded.items():
        assert 100 * figures[name].mean() == pytest.approx(value, abs=1e-12)
    for name, value in metrics["r1_0.3_0.5_0.7_and_miou"].items():
        assert float(f"{100 * figures[name].mean():.2f}") == value


def random_answers(seed, queries=12):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 60, (queries, 3))
    moments = np.stack([start, start + rng.uniform(1, 90, (queries, 3))], axis=-1)
    mask = np.arange(3) < rng.integers(1, 4, (queries, 1))
    predicted = np.repeat(moments[:, :1], 7, axis=1) + rng.normal(scale=8, size=(queries, 7, 2))
    return predicted, -np.sort(-rng.random((queries, 7))), moments, mask


@given(st.integers(0, 1000))
def test_the_order_of_queries_changes_no_value(seed):
    answers = random_answers(seed)
    order = np.random.default_rng(seed).permutation(len(answers[0]))
    there = moment_figures(*answers)
    here = moment_figures(*(part[order] for part in answers))
    for name, values in there.items():
        np.testing.assert_array_equal(here[name], values[order])


@given(st.integers(0, 1000))
def test_five_moments_recall_at_least_what_one_does_and_every_moment_is_in_one_bucket(seed):
    predicted, scores, moments, mask = random_answers(seed)
    figures = moment_figures(predicted, scores, moments, mask)
    for threshold in (0.5, 0.7):
        assert (figures[f"R5@{threshold}"] >= figures[f"R1@{threshold}"]).all()
    np.testing.assert_allclose(
        figures["mAP"], np.mean([figures[f"mAP@{t}"] for t in THRESHOLDS], axis=0)
    )
    lengths = moments[..., 1] - moments[..., 0]
    for name, (low, high) in BUCKETS.items():
        asked = (mask & (lengths > low) & (lengths <= high)).any(axis=1)
        known = ~np.isnan(figures.get(f"{name}-mIoU", np.full(len(mask), np.nan)))
        np.testing.assert_array_equal(known, asked)


def test_the_fifth_moment_counts_and_the_sixth_does_not():
    predicted = np.zeros((2, 6, 2))
    predicted[0, 4] = predicted[1, 5] = [2.0, 8.0]
    moments = np.full((2, 1, 2), [2.0, 8.0])
    figures = moment_figures(predicted, np.ones((2, 6)), moments, np.ones((2, 1), dtype=bool))
    assert figures["R5@0.7"].tolist() == [1.0, 0.0]
    assert figures["R1@0.3"].tolist() == [0.0, 0.0]


def test_buckets_are_open_below_and_closed_above():
    moments = np.array([[[0.0, 10.0]], [[0.0, 30.0]], [[0.0, 150.0]], [[0.0, 151.0]]])
    answers = moments, np.ones((4, 1)), moments, np.ones((4, 1), dtype=bool)
    figures = moment_figures(*answers)
    for row, name in enumerate(BUCKETS):
        assert np.flatnonzero(~np.isnan(figures[f"{name}-mAP"])).tolist() == [row]
    assert figures["mAP"].tolist() == [1.0] * 4


def test_a_length_that_no_moment_has_is_zero_or_nothing():
    moments = np.array([[[0.0, 5.0]]])
    figures = moment_figures(moments, np.ones((1, 1)), moments, np.ones((1, 1), dtype=bool))
    report = official_report(figures, "cg")
    assert set(report["long"]["MR-mAP"].values()) == {0.0}
    assert report["middle"]["MR-R1"]["average"] == 0.0
    report = official_report(figures, "qvhighlights")
    assert set(report["long"]["MR-R1"].values()) == {None}
    assert report["brief"]["MR-short-mAP"] == 100.0
