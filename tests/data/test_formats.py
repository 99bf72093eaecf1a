import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shine.data.annotations import VideoIndex, parse, read_annotations
from shine.data.formats import Layout, detect_layout, read_durations, read_entries
from shine.errors import InputError

ROW = {"qid": 1, "vid": "v", "query": "a b.", "duration": 9.5, "relevant_windows": [[1, 2.5]]}
CG = {
    "VID1": {
        "timestamps": [[0.0, 2.25], [1.5, 30.9]],
        "sentences": [" a person opens a door ", "a person runs"],
        "duration": 30.2,
        "novels": [{"Verb-Noun": [["open", "door"]]}, {"Verb-Adv": [["run", "fast"]]}],
    },
    "VID2": {"timestamps": [[0, 1]], "sentences": ["é"], "duration": 3},
}
TACOS = {
    "s1-d1.avi": {
        "timestamps": [[100, 250], [0, 30]],
        "sentences": ["he cuts", "he waits"],
        "fps": 29.4,
        "num_frames": 3000,
    }
}


def write(tmp_path, content, name="annotations.txt"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (json.dumps(ROW), Layout.JSON_LINES),
        ("\n\n  " + json.dumps(ROW) + "\n{", Layout.JSON_LINES),
        ("", Layout.JSON_LINES),
        ("{\n", Layout.JSON_LINES),
        ('["a##b"]', Layout.JSON_LINES),
        ('{"query": "no {\\"x\\": {} in here ##"}', Layout.JSON_LINES),
        (json.dumps(CG), Layout.PER_VIDEO),
        (json.dumps(CG, indent=4), Layout.PER_VIDEO),
        ("\ufeff" + json.dumps(TACOS), Layout.PER_VIDEO),
        ('{"a \\" b": {', Layout.PER_VIDEO),
        ("AB12 0.0 6.9##a person sits.\n", Layout.TEXT_LINES),
        ("\n\nbroken ##", Layout.TEXT_LINES),
    ],
)
def test_the_content_tells_the_layout_and_not_the_name(tmp_path, content, layout):
    for name in ("a.jsonl", "a.json", "a.txt"):
        assert detect_layout(write(tmp_path, content, name)) is layout


def test_one_object_per_video_reads_as_rows_in_its_order(tmp_path):
    first, second, third = read_annotations(write(tmp_path, json.dumps(CG)))
    assert (first.qid, first.vid, first.duration_seconds) == ("VID1_0", "VID1", 30.2)
    assert (first.query, first.moments) == (" a person opens a door ", ((0.0, 2.25),))
    assert (second.qid, second.moments) == ("VID1_1", ((1.5, 30.9),))
    assert (third.qid, third.query) == ("VID2_0", "é")


def test_what_is_new_in_a_query_stays_with_its_record(tmp_path):
    records = [entry.record for entry in read_entries(write(tmp_path, json.dumps(CG)))]
    assert [record.get("novels") for record in records] == [*CG["VID1"]["novels"], None]
    uneven = {"V": {**CG["VID1"], "novels": ["one"]}}
    records = [entry.record for entry in read_entries(write(tmp_path, json.dumps(uneven)))]
    assert [record["novels"] for record in records] == [["one"], ["one"]]


def test_frames_become_seconds(tmp_path):
    first, second = read_annotations(write(tmp_path, json.dumps(TACOS)))
    assert first.duration_seconds == 3000 / 29.4
    assert first.moments == ((100 / 29.4, 250 / 29.4),)
    assert second.moments == ((0.0, 30 / 29.4),)
    seconds = {"v": {**TACOS["s1-d1.avi"], "duration": 260}}
    assert read_annotations(write(tmp_path, json.dumps(seconds)))[0].moments == ((100.0, 250.0),)


def test_text_lines_need_the_durations_and_are_told_how_to_get_them(tmp_path):
    path = write(tmp_path, "AB 0.5 6.9##a person sits.\n\nCD 1 2##x##y\nAB 2 3##z \n")
    with pytest.raises(InputError, match="shine data convert .* --durations FILE --out"):
        read_annotations(path)
    records = [entry.record for entry in read_entries(path, {"AB": 30.0, "CD": 4.0})]
    assert [parse(record)[0].qid for record in records] == ["AB_0", "CD_0", "AB_1"]
    assert [record["query"] for record in records] == ["a person sits.", "x##y", "z"]
    assert records[0]["relevant_windows"] == [[0.5, 6.9]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("AB 1##x", "expected `vid start end##sentence`"),
        ("EF 1 2##x", "video EF has no duration in the file of durations"),
        ("AB one 2##x", "expected a moment [start, end] in seconds, got ['one', 2.0]"),
        ("AB nan 2##x", "expected a moment [start, end] in seconds, got [nan, 2.0]"),
        ("AB 1 2##", "expected a sentence as query, got ''"),
    ],
)
def test_a_wrong_text_line_is_told(tmp_path, line, reason):
    path = write(tmp_path, f"AB 1 2##x\n{line}\n")
    _, wrong = read_entries(path, {"AB": 30.0})
    assert wrong.place == "line 2"
    assert reason == (wrong.reason or parse(wrong.record)[1][0].reason)


@pytest.mark.parametrize(
    ("video", "says"),
    [
        ([1], "video v: expected an object with sentences"),
        ({"timestamps": [[0, 1]]}, "video v: expected an object with sentences"),
        ({"sentences": ["a", "b"], "timestamps": [[0, 1]]}, "each of the 2 sentences: 1"),
        ({"sentences": ["a"], "timestamps": 7}, "each of the 1 sentences: 7"),
        ({"sentences": ["a"], "timestamps": [[0, 1]]}, "video v, sentence 0: missing duration"),
        ({"sentences": ["a"], "duration": 9}, "sentence 0: missing relevant_windows"),
        ({"sentences": ["a"], "timestamps": [7], "duration": 9}, "sentence 0, query v_0: expected"),
        (
            {"sentences": ["a"], "timestamps": [[0, 1]], "fps": 0, "num_frames": 9},
            "expected fps above 0, got 0",
        ),
        (
            {"sentences": ["a"], "timestamps": [["x", 1]], "fps": 2, "num_frames": 9},
            "got ['x', 0.5]",
        ),
    ],
)
def test_a_wrong_video_is_told(tmp_path, video, says):
    path = write(tmp_path, json.dumps({"first": CG["VID2"], "v": video}))
    with pytest.raises(InputError) as error:
        read_annotations(path)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{path}, video v")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"v": {"duration": 1},\n "w": {"dura', "line 2, not valid JSON"),
        ('{"v": {}, "v": {}}', "'v' occurs twice in one object"),
        (b'{"v": {"sentences": ["\xff"]}}', "not UTF-8"),
        ('{"v": {"sentences": ' + "[" * 100_000, "nested too deeply"),
        ("[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, content, says):
    with pytest.raises(InputError, match=says):
        read_annotations(write(tmp_path, content))


def test_a_mark_of_byte_order_is_skipped(tmp_path):
    path = write(tmp_path, f"\ufeff{json.dumps(ROW)}\n{json.dumps(ROW | {'qid': 2})}\n")
    rows = read_annotations(path)
    assert [row.qid for row in rows] == ["1", "2"]
    assert VideoIndex(path).videos(0, 1) == [list(enumerate(rows))]


def test_reading_by_video_asks_to_convert_other_layouts(tmp_path):
    for content in (json.dumps(CG), "AB 1 2##x"):
        with pytest.raises(InputError, match="shine data convert .* --out OUT.jsonl"):
            VideoIndex(write(tmp_path, content))


def test_rows_whose_moments_are_withheld_are_read_on_request(tmp_path):
    path = write(tmp_path, json.dumps({k: v for k, v in ROW.items() if k != "relevant_windows"}))
    with pytest.raises(InputError, match="missing relevant_windows"):
        read_annotations(path)
    (row,) = read_annotations(path, need_moments=False)
    assert (row.qid, row.moments) == ("1", ())
    path.write_text(json.dumps(ROW | {"relevant_windows": "x"}))
    with pytest.raises(InputError, match="expected relevant_windows"):
        read_annotations(path, need_moments=False)


@pytest.mark.parametrize(
    "content",
    [
        '{"AB": 30.5, "CD": 4}',
        "AB,30.5\nCD,4\n",
        "vid,seconds\nAB,30.5\nCD,4\n",
        "\ufeffid,subject,length\r\nAB,x,30.5\r\nCD,y,4.0\r\n\r\n",
        '{"vid": "AB", "seconds": 30.5}\n\n{"vid": "CD", "seconds": "4"}\n',
        '{"vid": "0", "file": "0.mp4", "refused": "no pictures"}\n'
        '{"vid": "AB", "duration_seconds": 30.5, "clip_seconds": 1.0}\n'
        '{"vid": "CD", "duration_seconds": 4, "note": null}\n',
    ],
)
def test_durations_are_read_from_json_from_lines_and_from_tables(tmp_path, content):
    assert read_durations(write(tmp_path, content)) == {"AB": 30.5, "CD": 4.0}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "there are none"),
        ('{"vid": "AB", "refused": "no pictures"}', "there are none"),
        ('{"vid": "AB", "seconds": 1}\n{"seconds": 1}', "line 2: expected the name of a video"),
        (
            '{"vid": "AB", "seconds": 1}\n{"vid": "CD"}',
            "line 2: expected seconds of a video, got N",
        ),
        ('{"vid": "AB", "seconds": 1}\nCD,2', "line 2: not valid JSON"),
        ("AB\n", "line 1: expected seconds of a video, got None"),
        ("AB,x\n", "line 1: expected seconds of a video, got 'x'"),
        ("AB,0\n", "expected seconds"),
        ('{"AB": true}', "video AB: expected seconds of a video, got True"),
        ('{"AB": Infinity}', "expected seconds"),
        ("AB,1\nAB,2\n", "line 2: video AB has two durations"),
        ('{"AB": 1, "AB": 2}', "occurs twice"),
        ('{"AB": ', "not valid JSON"),
    ],
)
def test_wrong_durations_are_told(tmp_path, content, says):
    with pytest.raises(InputError, match=says):
        read_durations(write(tmp_path, content))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([*ROW, "recomposed_queries", "saliency_scores"]), json_values)
)
def test_any_record_is_an_annotation_or_has_a_defect(record):
    annotation, defects = parse(record)
    assert (annotation is None) == bool(defects)
    annotation, defects = parse(ROW | record)
    assert (annotation is None) == bool(defects)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=3),
        st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(
                ("sentences", "timestamps", "duration", "fps", "num_frames", "news"), json_values
            ),
        ),
        min_size=1,
    )
)
def test_any_object_of_videos_is_read_or_told(tmp_path_factory, videos):
    path = tmp_path_factory.mktemp("any") / "a"
    path.write_text(json.dumps(videos))
    for entry in read_entries(path):
        assert (entry.record is None) == bool(entry.reason)
    try:
        read_annotations(path)
    except InputError:
        pass
    else:
        assert all(entry.record for entry in read_entries(path))
