import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shine.data.annotations import Annotation, write_jsonl
from shine.errors import InputError
from shine.submission import Submission, answers_to, read_submission, to_records

TRUTH = [
    Annotation("1", "v", "a", 9.0, ((1.0, 2.5),), clip_ids=(0, 3), clip_scores=((1, 4), (2, 2))),
    Annotation("2", "w", "b", 4.0, ((0.0, 1.0), (2.0, 9.5))),
]
LINES = [
    {"qid": 2, "pred_relevant_windows": [], "pred_saliency_scores": [0.5]},
    {
        "qid": "1",
        "pred_relevant_windows": [[5, 3, 0.9], [-1, 200.5, 1]],
        "pred_saliency_scores": [0, -1.5, 2],
    },
]


def read(tmp_path, *records):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, records)
    return read_submission(path, TRUTH)


def test_lines_are_read_in_the_order_of_the_annotations(tmp_path):
    found = read(tmp_path, *LINES)
    nan = np.nan
    np.testing.assert_array_equal(found.moments, [[[5, 3], [-1, 200.5]], [[nan] * 2] * 2])
    np.testing.assert_array_equal(found.scores, [[0.9, 1], [nan, nan]])
    np.testing.assert_array_equal(found.saliency, [[0, -1.5, 2], [0.5, nan, nan]])


def test_saliency_may_be_left_out(tmp_path):
    lines = [{**line, "pred_saliency_scores": None} for line in LINES]
    assert read(tmp_path, *lines).saliency is None


@given(st.data())
def test_what_is_written_reads_back_equal(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("s") / "p.jsonl"
    number = st.floats(allow_nan=False, allow_infinity=False)
    window = st.tuples(number, number, number)
    rows = [data.draw(st.lists(window, max_size=4)) for _ in TRUTH]
    curves = [data.draw(st.lists(number, min_size=1, max_size=4)) for _ in TRUTH]
    longest, clips = max(1, *map(len, rows)), max(map(len, curves))
    ranked, saliency = np.full((2, longest, 3), np.nan), np.full((2, clips), np.nan)
    for row, (windows, curve) in enumerate(zip(rows, curves, strict=True)):
        ranked[row, : len(windows)] = np.array(windows).reshape(-1, 3)
        saliency[row, : len(curve)] = curve
    submission = Submission(ranked[..., :2], ranked[..., 2], saliency)
    write_jsonl(path, to_records(TRUTH, submission))
    found = read_submission(path, TRUTH)
    for name, value in vars(submission).items():
        np.testing.assert_array_equal(getattr(found, name), value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qid": None}, "line 2: missing qid"),
        ({"qid": 2}, "line 2: query id '2' was used on line 1"),
        ({"qid": 3}, "1 of 2 queries have no prediction, the first is '1'"),
        ({"pred_relevant_windows": None}, "line 2, query 1: expected pred_relevant_windows"),
        ({"pred_relevant_windows": [[1, 2]]}, "expected a predicted moment [start, end, score]"),
        ({"pred_relevant_windows": [1]}, "expected a predicted moment"),
        ({"pred_relevant_windows": [[1, 2, None]]}, "of finite numbers, got [1, 2, None]"),
        ({"pred_relevant_windows": [[1, 2, True]]}, "of finite numbers"),
        ({"pred_relevant_windows": [[1, float("inf"), 1]]}, "of finite numbers"),
        ({"pred_relevant_windows": [[float("nan"), 2, 1]]}, "of finite numbers"),
        ({"pred_relevant_windows": [[10**400, 2, 1]]}, "of finite numbers"),
        ({"pred_saliency_scores": []}, "line 2, query 1: expected pred_saliency_scores"),
        ({"pred_saliency_scores": [float("nan")]}, "list of finite numbers"),
        ({"pred_saliency_scores": None}, "line 2, query 1: expected pred_saliency_scores as on"),
    ],
)
def test_a_wrong_line_is_told_with_its_place(tmp_path, change, says):
    with pytest.raises(InputError) as error:
        read(tmp_path, LINES[0], LINES[1] | change)
    assert says in str(error.value)
    assert "p.jsonl" in str(error.value)


def test_queries_that_nobody_asked_about_are_told(tmp_path):
    with pytest.raises(InputError, match="1 of 3 queries are not in .*, the first is '3'"):
        read(tmp_path, *LINES, {"qid": 3, "pred_relevant_windows": []})


def test_answers_hold_raw_moments_and_the_labels_of_two_second_clips(tmp_path):
    answers = answers_to(TRUTH, read(tmp_path, *LINES), Path("t.jsonl"))
    assert answers.moments[answers.moment_mask].tolist() == [[1.0, 2.5], [0.0, 1.0], [2.0, 9.5]]
    assert answers.highlights is not None
    assert answers.highlights.num_clips.tolist() == [4, 0]
    assert answers.highlights.relevance[0].tolist() == [[1, 4], [0, 0], [0, 0], [2, 2]]
    bare = [replace(row, clip_ids=(), clip_scores=()) for row in TRUTH]
    assert answers_to(bare, read(tmp_path, *LINES), Path("t.jsonl")).highlights is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clip_ids": (0, 2)}, r"t.jsonl, query 2: clip 2 .* after the 2 clips of 2 s"),
        ({"clip_ids": (0, 1), "clip_scores": ((1,), (2,))}, "query 2: .* 2 annotators .* got 1"),
    ],
)
def test_labels_that_cannot_be_are_told(tmp_path, change, says):
    labelled = replace(TRUTH[1], clip_ids=(0, 1), clip_scores=((1, 1), (2, 2)))
    submission = read(tmp_path, *LINES)
    answers_to([TRUTH[0], labelled], submission, Path("t.jsonl"))
    with pytest.raises(InputError, match=says):
        answers_to([TRUTH[0], replace(labelled, **change)], submission, Path("t.jsonl"))


def test_a_record_is_a_line_of_the_field(tmp_path):
    (_, record) = to_records(TRUTH[::-1], read(tmp_path, *LINES))
    assert json.loads(json.dumps(record)) == record
    assert list(record) == ["qid", "query", "vid", "pred_relevant_windows", "pred_saliency_scores"]
