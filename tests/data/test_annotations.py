import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shine.data.annotations import (
    Annotation,
    VideoIndex,
    clamp_moments,
    normalized,
    read_annotations,
    to_record,
    write_jsonl,
)
from shine.errors import InputError

CHARADES = Path(os.environ.get("SHINE_SHARED", "../shared")) / "data" / "charades_cg"
GOOD = {"qid": 1, "vid": "v", "query": "a b.", "duration": 9.5, "relevant_windows": [[1, 2.5]]}


def read(tmp_path, *records):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, records)
    return read_annotations(path)


def test_a_record_reads_as_an_annotation_and_back(tmp_path):
    (annotation,) = read(tmp_path, {**GOOD, "recomposed_queries": ["c b.", "c d."]})
    assert annotation == Annotation("1", "v", "a b.", 9.5, ((1.0, 2.5),), ("c b.", "c d."))
    assert read(tmp_path, to_record(annotation)) == [annotation]


def test_highlight_labels_read_and_write_back(tmp_path):
    labels = {"relevant_clip_ids": [0, 1], "saliency_scores": [[0, 4, 2], [1, 1, 3]]}
    (annotation,) = read(tmp_path, GOOD | labels)
    assert (annotation.clip_ids, annotation.clip_scores) == ((0, 1), ((0, 4, 2), (1, 1, 3)))
    assert to_record(annotation) | labels == to_record(annotation)
    assert read(tmp_path, to_record(annotation)) == [annotation]
    absent = {"relevant_clip_ids": None, "saliency_scores": None}
    assert read(tmp_path, GOOD | absent) == read(tmp_path, GOOD)


def test_a_failed_write_leaves_the_older_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [GOOD])

    def failing():
        yield {**GOOD, "qid": 2}
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_jsonl(path, failing())
    assert [row.qid for row in read_annotations(path)] == ["1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"relevant_windows": [[3, 3]]}, "is empty"),
        ({"relevant_windows": [[3, 2]]}, "is reversed"),
        ({"relevant_windows": [[9.5, 11]]}, "starts at or after the end of its video (9.5 s)"),
        ({"relevant_windows": [[-1, 2]]}, "starts before its video"),
        ({"relevant_windows": [[1, float("nan")]]}, "expected a moment [start, end]"),
        ({"relevant_windows": [[1, 2, 3]]}, "expected a moment [start, end]"),
        ({"relevant_windows": ["12"]}, "expected a moment [start, end]"),
        ({"relevant_windows": []}, "expected relevant_windows"),
        ({"relevant_windows": None}, "missing relevant_windows"),
        ({"duration": 0}, "positive duration"),
        ({"duration": True}, "positive duration"),
        ({"query": "  "}, "expected a sentence"),
        ({"vid": "../v"}, "without slashes"),
        ({"vid": ".."}, "without slashes"),
        ({"recomposed_queries": "x"}, "as a list of sentences"),
        ({"relevant_clip_ids": [0]}, "expected saliency_scores as a list"),
        ({"saliency_scores": [[1, 2, 3]]}, "expected relevant_clip_ids as a list"),
        ({"relevant_clip_ids": [1, 1], "saliency_scores": [[1], [1]]}, "none twice"),
        ({"relevant_clip_ids": [-1], "saliency_scores": [[1]]}, "clip numbers from 0"),
        ({"relevant_clip_ids": [0], "saliency_scores": [1]}, "with the scores of each clip"),
        ({"relevant_clip_ids": [0], "saliency_scores": [[0.5]]}, "with the scores of each clip"),
        ({"relevant_clip_ids": [0], "saliency_scores": [[1], [1]]}, "got 2 and 1"),
        ({"relevant_clip_ids": [0, 1], "saliency_scores": [[1, 2], [1]]}, "of every annotator"),
        ({"relevant_clip_ids": [0], "saliency_scores": [[]]}, "of every annotator"),
    ],
)
def test_a_wrong_record_is_told_with_file_and_line(tmp_path, change, says):
    with pytest.raises(InputError) as error:
        read(tmp_path, {**GOOD, "qid": 0}, GOOD | change)
    assert says in str(error.value)
    assert "a.jsonl, line 2" in str(error.value)


def test_ids_must_be_unique(tmp_path):
    with pytest.raises(InputError, match="line 2: query id '1' was used on line 1"):
        read(tmp_path, GOOD, GOOD)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"{\n", "line 1: not valid JSON"),
        (b"[1]\n", "line 1: expected an object"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_malformed_file_is_told(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_annotations(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot read annotations"):
        read_annotations(tmp_path / "none.jsonl")


@given(
    st.lists(st.sampled_from(["v", "w", "Ü", "\u4e16"]), min_size=1, max_size=30),
    st.sampled_from(["\n", "\r\n", "\n\n \n"]),
)
def test_an_index_groups_rows_by_video_as_a_whole_reading_does(tmp_path_factory, vids, ending):
    path = tmp_path_factory.mktemp("index") / "a.jsonl"
    records = [{**GOOD, "qid": i, "vid": vid, "query": f"é {i}"} for i, vid in enumerate(vids)]
    lines = (json.dumps(record, ensure_ascii=False) + ending for record in records)
    path.write_bytes("".join(lines).encode())
    grouped = {}
    for row, annotation in enumerate(read_annotations(path)):
        grouped.setdefault(annotation.vid, []).append((row, annotation))
    index = VideoIndex(path)
    assert (len(index), index.num_videos) == (len(vids), len(grouped))
    assert index.videos(0, len(grouped)) == list(grouped.values())
    for number, rows in enumerate(grouped.values()):
        assert index.videos(number, number + 1) == [rows]


def test_an_index_refuses_what_a_whole_reading_refuses(tmp_path):
    path = tmp_path / "a.jsonl"
    for content in ("", "{", json.dumps(GOOD | {"duration": -1}), f"{json.dumps(GOOD)}\n" * 2):
        path.write_text(content)
        with pytest.raises(InputError) as whole:
            read_annotations(path)
        with pytest.raises(InputError) as indexed:
            VideoIndex(path)
        assert str(indexed.value) == str(whole.value)


def test_only_the_end_of_a_moment_is_clamped():
    annotation = Annotation("q", "v", "a", 10.0, ((2.0, 11.5), (0.0, 10.0)))
    assert clamp_moments(annotation) == ((2.0, 10.0), (0.0, 10.0))


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    assert normalized(normalized(text)) == normalized(text)


def test_normalising_ignores_case_blanks_and_punctuation_at_word_ends():
    assert normalized(' Person  "opens" the door. ') == "person opens the door"
    assert normalized("the dog's toy!") == "the dog's toy"


@pytest.mark.skipif(not CHARADES.is_dir(), reason="needs the Charades-CG annotations")
def test_the_real_files_read_whole_with_the_known_counts():
    rows = {name: read_annotations(CHARADES / f"charades_cg_{name}.jsonl") for name in
            ("gpt_train", "test", "novel_composition", "novel_word")}  # fmt: skip
    assert [len(part) for part in rows.values()] == [8281, 3096, 3442, 695]
    clamped = [sum(clamp_moments(a) != a.moments for a in part) for part in rows.values()]
    assert clamped == [1255, 412, 452, 109]
    line = (CHARADES / "charades_cg_test.jsonl").read_text().splitlines()[0]
    assert to_record(rows["test"][0])["relevant_windows"] == json.loads(line)["relevant_windows"]
