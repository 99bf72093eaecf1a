import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shine.metrics.recall import (
    METRICS,
    hull_iou,
    per_query,
    top1_iou,
)

GOLDEN = Path(os.environ.get("SHINE_GOLDEN", Path(__file__).parents[1] / "golden"))

seconds = st.floats(-20, 200, allow_nan=False).map(lambda value: round(value, 2))
moment = st.tuples(seconds, seconds)
rows = st.lists(
    st.tuples(moment, st.lists(moment, min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)


def pad(moments):
    width = max(map(len, moments))
    padded = np.full((len(moments), width, 2), 7.0)
    mask = np.zeros((len(moments), width), dtype=bool)
    for row, own in enumerate(moments):
        padded[row, : len(own)] = own
        mask[row, : len(own)] = True
    return padded, mask


def slow_iou(one, other):
    shared = min(one[1], other[1]) - max(one[0], other[0])
    hull = max(one[1], other[1]) - min(one[0], other[0])
    return shared / hull if shared > 0 and hull > 0 else 0.0


@given(rows)
def test_top1_iou_is_that_of_the_moment_met_best(rows):
    predicted = np.array([row[0] for row in rows])
    moments, mask = pad([row[1] for row in rows])
    expected = [max(slow_iou(first, m) for m in own) for first, own in rows]
    np.testing.assert_array_equal(top1_iou(predicted, moments, mask), expected)


@given(moment, moment, seconds)
def test_iou_is_symmetric_bounded_and_blind_to_a_common_shift(one, other, shift):
    first, second = np.array(one), np.array(other)
    value = hull_iou(first, second)
    assert 0 <= value <= 1
    assert value == hull_iou(second, first)
    np.testing.assert_allclose(hull_iou(first + shift, second + shift), value, atol=1e-9)
    if value == 1:
        np.testing.assert_array_equal(first, second)


def test_equal_moments_meet_fully_and_padding_never_counts():
    moments, mask = pad([[(2.0, 5.0)], [(0.0, 1.0), (4.0, 8.0)]])
    # 7, 7 is what the padding holds; a wide one would win if the mask were ignored
    moments[0, 1] = [0.0, 100.0]
    predicted = np.array([[0.0, 100.0], [4.0, 8.0]])
    np.testing.assert_allclose(top1_iou(predicted, moments, mask), [0.03, 1.0])


@pytest.mark.parametrize(
    "predicted",
    [(5.0, 2.0), (3.0, 3.0), (np.nan, 4.0), (-np.inf, np.inf), (np.inf, np.inf), (0.0, np.inf)],
)
def test_a_prediction_that_is_no_interval_is_a_miss(predicted):
    moments, mask = pad([[(2.0, 5.0)]])
    assert top1_iou(np.array([predicted]), moments, mask) == [0.0]


def test_a_zero_hull_is_a_miss_without_a_warning():
    moments, mask = pad([[(3.0, 3.0)]])
    assert top1_iou(np.array([[3.0, 3.0]]), moments, mask) == [0.0]


def test_an_iou_equal_to_the_threshold_is_a_hit():
    moments, mask = pad([[(0.0, 10.0)]])
    iou = top1_iou(np.array([[0.0, 5.0]]), moments, mask)
    at_half = METRICS.index("R1@0.5")
    assert per_query(iou)[0, at_half] == 1.0
    assert per_query(np.nextafter(iou, 0))[0, at_half] == 0.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_columns_of_per_query_average_to_the_metrics(values):
    iou = np.array(values)
    shares = [sum(value >= t for value in values) / len(values) for t in (0.3, 0.5, 0.7)]
    expected = [*shares, sum(values) / len(values)]
    np.testing.assert_allclose(per_query(iou).mean(axis=0), expected)
    assert METRICS == ("R1@0.3", "R1@0.5", "R1@0.7", "mIoU")


def _lines(name):
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"{path} is missing; SHINE_GOLDEN names the folder of golden files")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_recorded_evaluator_agrees_query_by_query():
    truth = {row["qid"]: row for row in _lines("eval_cg_ground_truth.jsonl")}
    answers = {row["qid"]: row for row in _lines("eval_cg_predictions.jsonl")}
    recorded = json.loads((GOLDEN / "eval_cg_metrics.json").read_text())
    assert truth.keys() == answers.keys()

    moments, mask = pad([row["relevant_windows"] for row in truth.values()])
    first = np.array([answers[qid]["pred_relevant_windows"][0][:2] for qid in truth])
    iou = top1_iou(first, moments, mask)

    expected = recorded["unrounded"]["per_query_top1_iou"]
    np.testing.assert_array_equal(iou, [expected[qid] for qid in truth])
    for name, value in zip(METRICS, per_query(iou).mean(axis=0), strict=True):
        assert 100 * value == pytest.approx(recorded["unrounded"][name], abs=1e-12)
        assert float(f"{100 * value:.2f}") == recorded["r1_0.3_0.5_0.7_and_miou"][name]
