import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shine.metrics.average_precision import THRESHOLDS, average_precision, union_iou

# Few round numbers, so that equal overlaps and equal scores are common.
second = st.sampled_from([0.0, 2.0, 4.0, 5.0, 6.0, 8.0, 10.0])
prediction = st.tuples(second, second, st.sampled_from([0.1, 0.5, 0.9]))
moment = st.tuples(second, second).filter(lambda ends: ends[0] < ends[1])
query = st.tuples(st.lists(prediction, max_size=13), st.lists(moment, min_size=1, max_size=4))
queries = st.lists(query, min_size=1, max_size=4)


def padded(rows, width):
    array = np.full((len(rows), max(1, *map(len, rows)), width), np.nan)
    for own, row in zip(array, rows, strict=True):
        own[: len(row)] = np.array(row).reshape(-1, width)
    return array


def ap(rows):
    """The function under test on lists of (predictions, moments)."""
    ranked = padded([predictions for predictions, _ in rows], 3)
    moments = padded([moments for _, moments in rows], 2)
    mask = ~np.isnan(moments[..., 0])
    return average_precision(ranked[..., :2], ranked[..., 2], np.nan_to_num(moments), mask)


def slow_iou(one, other):
    shared = min(one[1], other[1]) - max(one[0], other[0])
    union = (one[1] - one[0]) + (other[1] - other[0]) - shared
    return shared / union if shared > 0 else 0.0


def slow_ap(predictions, moments, threshold):
    if not predictions:
        return np.nan
    ranked = sorted(predictions[:10], key=lambda row: -row[2])
    taken, points, found = set(), [(0.0, 0.0)], 0
    for rank, row in enumerate(ranked, start=1):
        overlaps = [slow_iou(row, moment) for moment in moments]
        for place in sorted(range(len(moments)), key=lambda i: (overlaps[i], i), reverse=True):
            if overlaps[place] < threshold:
                break
            if place not in taken:
                taken.add(place)
                found += 1
                break
        points.append((found / len(moments), found / rank))
    points.append((1.0, 0.0))
    return sum(
        (recall - points[i][0]) * max(precision for _, precision in points[i + 1 :])
        for i, (recall, _) in enumerate(points[1:])
    )


@given(queries)
def test_average_precision_is_its_spelt_out_form(rows):
    expected = [[slow_ap(*row, threshold) for threshold in THRESHOLDS] for row in rows]
    np.testing.assert_allclose(ap(rows), expected, atol=1e-12)


@given(queries)
def test_average_precision_lies_in_0_to_1_wherever_a_query_is_answered(rows):
    values = ap(rows)
    answered = np.array([bool(predictions) for predictions, _ in rows])
    assert (np.isnan(values).all(axis=1) == ~answered).all()
    assert ((values[answered] >= 0) & (values[answered] <= 1)).all()


@given(query.filter(lambda row: len(row[0]) > 1), st.randoms())
def test_order_matters_among_equal_scores_and_beyond_ten_predictions_alone(row, random):
    predictions = [(start, end, index / 16) for index, (start, end, _) in enumerate(row[0][:10])]
    shuffled = random.sample(predictions, len(predictions))
    np.testing.assert_array_equal(ap([(predictions, row[1])]), ap([(shuffled, row[1])]))


@given(st.lists(moment, min_size=1, max_size=10, unique=True))
def test_perfect_predictions_are_perfect(moments):
    assert (ap([([(*ends, 0.5) for ends in moments], moments)]) == 1).all()


def test_a_moment_is_found_once_and_a_duplicate_costs():
    first, second = (0.0, 10.0), (20.0, 30.0)
    twice = [(*first, 0.9), (*first, 0.8), (*second, 0.7)]
    assert (ap([(twice, [first, second])]) == (1 + 2 / 3) / 2).all()


def test_of_two_moments_overlapped_alike_the_later_is_found():
    early, late = (0.0, 8.0), (2.0, 10.0)
    predictions = [(0.0, 10.0, 0.9), (*late, 0.8)]  # the second overlaps the early moment by 0.6
    place = THRESHOLDS.index(0.8)
    assert ap([(predictions, [early, late])])[0, place] == 0.5
    assert ap([(predictions, [late, early])])[0, place] == 1.0


def test_the_eleventh_prediction_does_not_count_whatever_its_score():
    wrong = [(50.0, 51.0, 0.1)] * 10
    assert (ap([([*wrong, (0.0, 10.0, 1.0)], [(0.0, 10.0)])]) == 0).all()
    assert (ap([([*wrong[:9], (0.0, 10.0, 1.0)], [(0.0, 10.0)])]) == 1).all()


def test_an_overlap_equal_to_the_threshold_counts():
    values = ap([([(0.0, 5.0, 1.0)], [(0.0, 10.0)])])[0]
    assert values.tolist() == [1.0] + [0.0] * 9


def test_a_query_without_a_moment_does_not_count():
    values = average_precision(
        np.zeros((1, 2, 2)), np.ones((1, 2)), np.zeros((1, 1, 2)), np.zeros((1, 1), dtype=bool)
    )
    assert np.isnan(values).all()


def test_inverted_empty_and_missing_moments_overlap_nothing():
    broken = np.array([[[5.0, 2.0], [3.0, 3.0], [np.nan, np.nan], [12.0, 2.0]]])
    moments = np.array([[[2.0, 5.0], [2.0, 12.0]]])
    np.testing.assert_array_equal(union_iou(broken, moments), np.zeros((1, 4, 2)))
