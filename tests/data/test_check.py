import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import copied
from tiny import tiny_config, tiny_data

from shine.config import load_config
from shine.data.annotations import read_annotations, write_jsonl
from shine.data.check import KINDS, check, config_files, convert, with_roles
from shine.data.loading import Source
from shine.data.packing import pack_store
from shine.errors import InputError

CHARADES = Path(os.environ.get("SHINE_SHARED", "../shared")) / "data" / "charades_cg"
SPLITS = ("gpt_train", "test", "novel_composition", "novel_word")
ROW = {
    "qid": "a",
    "vid": "v",
    "query": "a person sits.",
    "duration": 10.0,
    "relevant_windows": [[1.0, 4.0]],
}


def checked(tmp_path, *rows, **options):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows)
    return check([("train", path)], **options)


def counts(report):
    return {entry["kind"]: entry["count"] for entry in report["defects"]}


def examples(report, kind):
    return [
        (example["place"], example["qid"], example["detail"])
        for entry in report["defects"]
        if entry["kind"] == kind
        for example in entry["examples"]
    ]


def rows(*changes):
    """Rows of different queries of one video, each with a change."""
    return [
        {**ROW, "qid": str(n), "query": f"a person does {n}", **change}
        for n, change in enumerate(changes)
    ]


@pytest.fixture(scope="module")
def charades():
    if not CHARADES.is_dir():
        pytest.skip("needs the Charades-CG annotations; set SHINE_SHARED to their folder")
    files = [CHARADES / f"charades_cg_{name}.jsonl" for name in SPLITS]
    return check(with_roles(files, None))


def test_the_published_files_have_every_count_of_the_specification(charades):
    train, trivial, composition, word = charades["files"]
    assert [file["rows"] for file in charades["files"]] == [8281, 3096, 3442, 695]
    assert [file["videos"] for file in charades["files"]] == [3555, 1689, 2480, 580]
    assert [file["queries"] for file in charades["files"]] == [4926, 2240, 2495, 589]
    assert train["moments_by_seconds"] == [6216, 2061, 4, 0]
    assert trivial["moments_by_seconds"] == [2285, 811, 0, 0]
    assert composition["moments_by_seconds"] == [2772, 666, 4, 0]
    assert word["moments_by_seconds"] == [469, 224, 2, 0]
    assert train["rows_beyond"] == {
        "any": 1255,
        "over_half_second": 1113,
        "over_one_second": 494,
        "over_a_tenth_of_the_moment": 655,
        "most_seconds": 1.5,
    }
    beyond = [
        tuple(f["rows_beyond"][k] for k in ("any", "over_half_second", "over_one_second"))
        for f in (trivial, composition, word)
    ]
    assert beyond == [(412, 390, 186), (452, 403, 179), (109, 102, 45)]
    assert trivial["rows_beyond"]["most_seconds"] == pytest.approx(1.54)
    assert train["long"] | {"seconds": 150} == {
        "seconds": 150,
        "videos": 4,
        "rows": 8,
        "rows_with_later_moment": 3,
    }
    assert sum(file["long"]["rows"] for file in (trivial, composition, word)) == 5
    assert sum(f["long"]["rows_with_later_moment"] for f in (trivial, composition, word)) == 4
    assert [file["rows_nearly_filled"] for file in charades["files"]] == [0] * 4
    assert [file["rows_up_to_one_second"] for file in charades["files"]] == [0] * 4


@pytest.mark.parametrize(
    ("split", "duration", "moment", "share", "words"),
    [
        (0, (5.5, 30.7, 31.0, 194.3), (2.4, 7.4, 8.3, 80.8), 0.28, (5.9, 10)),
        (1, (8.8, 30.7, 31.1, 178.4), (2.5, 7.5, 8.4, 28.9), 0.28, (6.0, 10)),
        (2, (8.1, 30.7, 30.8, 178.4), (2.5, 6.7, 7.7, 57.7), 0.26, (6.9, 10)),
        (3, (9.0, 30.8, 31.4, 122.9), (2.7, 8.1, 9.0, 36.0), 0.29, (7.2, 10)),
    ],
)
def test_the_published_files_have_the_known_lengths(
    charades, split, duration, moment, share, words
):
    file = charades["files"][split]
    for name, known in (("duration_seconds", duration), ("moment_seconds", moment)):
        found = [file[name][part] for part in ("min", "median", "mean", "max")]
        assert found == pytest.approx(known, abs=0.0501)
    assert file["mean_share"] == pytest.approx(share, abs=0.005)
    assert (file["words"]["mean"], file["words"]["max"]) == pytest.approx(words, abs=0.0501)


def test_the_published_negatives_have_the_known_defects(charades):
    found = counts(charades)
    assert found["negative_equal"] == 6
    assert found["negative_equal"] + found["negative_true"] == 25
    assert found["negative_repeated"] == 8
    assert found["negative_masked"] == 1
    assert "negative_levels" not in found
    assert charades["files"][0]["negatives"]["rows_with_a_query_of_the_file"] == 1286


def test_the_published_splits_overlap_as_known_and_training_would_refuse_nothing(charades):
    assert [
        (overlap["roles"], overlap["videos"], overlap["pairs"], overlap["severity"])
        for overlap in charades["overlaps"]
    ] == [
        (["test", "test"], 1337, 0, "note"),
        (["test", "test"], 304, 0, "note"),
        (["test", "test"], 114, 0, "note"),
    ]
    assert charades["refused"] == 0


STA = CHARADES / "charades_sta_test.jsonl"


@pytest.mark.skipif(not STA.is_file(), reason="needs the Charades-STA test annotations")
def test_charades_sta_test_overlaps_with_charades_cg_train():
    report = check([("train", CHARADES / "charades_cg_gpt_train.jsonl"), ("test", STA)])
    (overlap,) = report["overlaps"]
    assert (overlap["videos"], overlap["severity"]) == (729, "warning")


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"duration": None}, "missing", "missing duration"),
        ({"query": 7}, "value", "expected a sentence as query, got 7"),
        ({"query": "half \ud800"}, "value", "expected a sentence"),
        ({"vid": "../v"}, "value", "without slashes"),
        ({"qid": [1]}, "value", "expected text or a whole number as qid"),
        ({"duration": float("inf")}, "value", "expected a positive duration"),
        ({"duration": 10**400}, "value", "expected a positive duration"),
        ({"relevant_windows": []}, "value", "expected relevant_windows"),
        ({"recomposed_queries": [1]}, "optional", "as a list of sentences"),
        ({"relevant_clip_ids": [0]}, "optional", "expected saliency_scores"),
        ({"relevant_windows": [[1]]}, "moment", "expected a moment"),
        ({"relevant_windows": [[1, float("nan")]]}, "moment", "expected a moment"),
        ({"relevant_windows": [[2, 2]]}, "empty", "is empty"),
        ({"relevant_windows": [[3, 2]]}, "reversed", "is reversed"),
        ({"relevant_windows": [[-1, 2]]}, "before", "starts before its video"),
        ({"relevant_windows": [[10, 12]]}, "after", "at or after the end of its video"),
        ({"qid": "0"}, "qid", "also the id of line 1, query 0"),
        ({"duration": 12}, "duration", "12 s here, 10 s in an earlier row"),
        ({"duration": 10.5}, "duration_near", "10.5 s here, 10 s in an earlier row"),
        ({"relevant_windows": [[1, 12.25]]}, "beyond", "ends 2.25 s after its video"),
        ({"relevant_windows": [[0, 10]]}, "fills", "covers all 10 s"),
        ({"query": " A person does 0. "}, "same_row", "as in line 1, query 0"),
        (
            {"query": "a person does 0", "relevant_windows": [[2, 3]]},
            "same_query",
            "other moment in line 1, query 0",
        ),
        ({"recomposed_queries": [" ."]}, "negative_empty", "level 1"),
        ({"recomposed_queries": ["x", "A person does 1."]}, "negative_equal", "level 2"),
        ({"recomposed_queries": ["a person does 0"]}, "negative_true", "level 1"),
        ({"recomposed_queries": ["x", "y", "X!"]}, "negative_repeated", "level 3"),
        ({"recomposed_queries": ["a <mask> sits"]}, "negative_masked", "level 1"),
    ],
)
def test_each_defect_is_told_where_it_is(tmp_path, change, kind, says):
    report = checked(tmp_path, *rows({}, change))
    assert counts(report)[kind] == 1
    ((place, qid, detail),) = examples(report, kind)
    assert place == "line 2"
    assert qid == (None if change.get("qid") == [1] else str(change.get("qid", "1"))) or kind == (
        "value"
    )
    assert says in detail
    assert bool(report["refused"]) == (KINDS[kind].severity == "refused")


def test_every_defect_of_a_row_is_told_and_not_the_first(tmp_path):
    wrong = {"query": "", "duration": -1, "relevant_windows": [[3, 2], [2, 2], [0, 1]]}
    report = checked(tmp_path, *rows({}, wrong, {"vid": None, "qid": None}))
    assert counts(report) == {"missing": 1, "value": 2, "empty": 1, "reversed": 1}
    assert examples(report, "missing") == [("line 3", None, "missing qid, vid")]
    assert (report["files"][0]["rows"], report["files"][0]["unusable"]) == (1, 2)


def test_every_malformed_line_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a"\n[1]\n\n\xff\n' + json.dumps(ROW).encode())
    report = check([("train", path)])
    assert counts(report) == {"malformed": 3}
    assert [place for place, *_ in examples(report, "malformed")] == ["line 1", "line 2", "line 4"]


def test_files_that_cannot_be_read_are_defects_beside_those_of_the_others(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "text").write_text("V 0 1##x\n")
    (tmp_path / "good").write_text(json.dumps(ROW))
    files = [("train", tmp_path / n) for n in ("none", "empty", "text", "good")]
    report = check(files)
    assert counts(report) == {"unreadable": 2, "no_rows": 1}
    assert report["refused"] == 3
    assert report["files"][3]["rows"] == 1


def test_rows_with_other_numbers_of_negatives_are_told(tmp_path):
    three = {"recomposed_queries": ["x", "y", "z"]}
    report = checked(tmp_path, *rows(three, three, {"recomposed_queries": ["x"]}, {}))
    assert counts(report) == {"negative_levels": 2}
    assert [detail for *_, detail in examples(report, "negative_levels")] == [
        "1 levels, most rows have 3",
        "0 levels, most rows have 3",
    ]


def test_examples_are_few_and_counts_whole(tmp_path):
    report = checked(tmp_path, *rows({}, *[{"relevant_windows": [[1, 11]]}] * 20))
    assert counts(report)["beyond"] == 20
    assert [place for place, *_ in examples(report, "beyond")] == [f"line {n}" for n in range(2, 7)]


def test_defects_of_other_layouts_are_told_by_video(tmp_path):
    path = tmp_path / "a"
    video = {"sentences": ["x", "y", "x"], "timestamps": [[0, 1], [0, 7], [0, 1]], "duration": 5}
    path.write_text(json.dumps({"v": video, "w": {"sentences": [1, 2], "timestamps": []}}))
    report = check([("train", path)])
    assert counts(report) == {"malformed": 1, "beyond": 1, "fills": 1, "same_row": 1}
    assert examples(report, "beyond") == [
        ("video v, sentence 1", "v_1", "ends 2 s after its video")
    ]
    assert examples(report, "same_row")[0][2] == "as in video v, sentence 0, query v_0"


def test_overlaps_are_judged_by_role(tmp_path):
    files = {}
    for name, vids in {"a": "xy", "b": "yz", "c": "zy", "d": "q"}.items():
        files[name] = tmp_path / name
        row = {**ROW, "duration": 10.5} if name == "c" else ROW
        write_jsonl(
            files[name],
            [{**(row if vid == "z" else ROW), "qid": f"{name}{vid}", "vid": vid} for vid in vids],
        )
    roles = ("train", "validation one", "test two", "test three")
    report = check(list(zip(roles, files.values(), strict=True)))
    assert [(o["roles"], o["videos"], o["pairs"], o["severity"]) for o in report["overlaps"]] == [
        (["train", "validation one"], 1, 1, "warning"),
        (["train", "test two"], 1, 1, "warning"),
        (["validation one", "test two"], 2, 2, "warning"),
    ]
    assert [overlap["other_durations"] for overlap in report["overlaps"]] == [0, 0, 1]
    example = report["overlaps"][0]["examples"][0]
    assert (example["place"], example["qid"]) == ("line 1", "by")
    assert "line 2, query ay" in example["detail"]
    assert report["refused"] == 0


CHANGES = (
    {},
    {"vid": "w"},
    {"qid": "0"},
    {"qid": 0},
    {"query": ""},
    {"query": "a person does 0"},
    {"duration": "10"},
    {"duration": 10.75},
    {"relevant_windows": None},
    {"relevant_windows": [[1, 2], [3, 3]]},
    {"relevant_windows": [[9, 12]]},
    {"relevant_windows": [[10, 12]]},
    {"recomposed_queries": ["x", None]},
)


@given(st.lists(st.sampled_from(CHANGES), max_size=5), st.sampled_from([b"", b"{\n", b"\xff\n"]))
def test_the_check_refuses_what_reading_refuses(tmp_path_factory, changes, noise):
    path = tmp_path_factory.mktemp("agree") / "a.jsonl"
    write_jsonl(path, rows(*changes))
    path.write_bytes(path.read_bytes() + noise)
    refused = check([("train", path)])["refused"]
    try:
        read_annotations(path)
    except InputError:
        assert refused
    else:
        assert not refused


@given(st.lists(st.sampled_from((*CHANGES, {"duration": 30})), min_size=1, max_size=6))
def test_what_is_converted_is_every_good_row_unchanged_and_nothing_refuses_it(
    tmp_path_factory, changes
):
    folder = tmp_path_factory.mktemp("convert")
    path, out = folder / "a.jsonl", folder / "out" / "b.jsonl"
    records = [{**row, "more": {"kept": [0.1, 1e300]}} for row in rows(*changes)]
    write_jsonl(path, records)
    try:
        result = convert(path, out)
    except InputError:
        assert not out.exists()
        assert check([("train", path)])["refused"]
        return
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row for row in records if row in written] == written
    assert len(written) == result["rows"] == len(records) - result["num_left_out"]
    assert check([("train", out)])["refused"] == 0
    assert len(read_annotations(out)) == len(written)
    named = {(example["place"]) for example in result["left_out"]}
    assert named == {f"line {n}" for n, row in enumerate(records, 1) if row not in written}


def test_floats_and_text_survive_conversion_exactly(tmp_path):
    path, out = tmp_path / "a", tmp_path / "b.jsonl"
    sentences = ["  a  b\n", "ünï\u2028code", "c"]
    moments = [[0.1 + 0.2, 7], [1e-300, 30.000000000000004], [5, 4]]
    news = [{"NOUN": ["a"]}, {}, {}]
    video = {"sentences": sentences, "timestamps": moments, "duration": 30.3, "news": news}
    path.write_text(json.dumps({"v": video}))
    result = convert(path, out)
    assert (result["rows"], result["num_left_out"]) == (2, 1)
    assert [(e["place"], e["qid"], e["kind"]) for e in result["left_out"]] == [
        ("video v, sentence 2", "v_2", "reversed")
    ]
    found = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert [row["query"] for row in found] == sentences[:2]
    assert [row["relevant_windows"] for row in found] == [[moment] for moment in moments[:2]]
    assert [row["news"] for row in found] == news[:2]


def test_a_conversion_never_overwrites_its_source_or_writes_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows({"query": ""}))
    with pytest.raises(InputError, match="would be overwritten"):
        convert(path, tmp_path / "x" / ".." / "a.jsonl")
    with pytest.raises(InputError, match="training would refuse every row"):
        convert(path, tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="cannot read annotations"):
        convert(tmp_path / "none", tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [ROW])
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "folder", path / "b.jsonl", path / "c" / "b.jsonl"):
        with pytest.raises(InputError, match=f"cannot write {out}: .*; name another --out"):
            convert(path, out)
    assert sorted(tmp_path.rglob("*")) == [path, tmp_path / "folder"]


@pytest.mark.parametrize(("clip_seconds", "kept"), [(0.5, 1), (1.0, 1), (2.0, 2)])
def test_what_is_converted_for_clips_is_what_training_on_them_takes(tmp_path, clip_seconds, kept):
    path, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(path, rows({}, {"duration": 11.5}))
    config = load_config(None, [f"features.clip_seconds={clip_seconds}"])
    assert check([("train", path)], config, None)["refused"] == 2 - kept
    assert convert(path, out, clip_seconds=clip_seconds)["rows"] == kept
    assert check([("train", out)], config, None)["refused"] == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


def run_check(config):
    return check(config_files(config), config)


def test_a_good_configuration_has_no_defect(root):
    report = run_check(tiny_config(root))
    assert report["refused"] == 0
    assert [file["role"] for file in report["files"]] == ["train", "validation val",
                                                          "test test_trivial"]  # fmt: skip
    assert report["features"]["deviating"] == []
    assert report["features"]["clip_seconds"] == dict.fromkeys(("min", "median", "mean", "max"), 1)


def test_without_a_store_the_raw_features_are_counted(root, tmp_path):
    packed = run_check(tiny_config(root))["features"]
    raw = run_check(tiny_config(root, "features.store=none"))["features"]
    assert raw["place"].endswith("features")
    assert {**raw, "place": ""} == {**packed, "place": ""}


def test_a_store_elsewhere_is_asked_where_its_videos_lie_alone(root, tmp_path):
    here = run_check(tiny_config(root))
    place = copied(root / "store", "memory://checked")
    there = run_check(tiny_config(root, f"features.store={place}", f"features.cache={tmp_path}"))
    assert there["features"]["place"] == place
    assert {**there, "features": {**here["features"]}} == here
    assert not list(tmp_path.iterdir())


def test_features_that_cannot_be_used_are_told_by_video(root, tmp_path):
    config = tiny_config(root, f"features.sources=[{tmp_path}]", "features.store=none")
    for vid in ("v0", "v1"):
        np.save(tmp_path / f"{vid}.npy", np.load(root / "features" / f"{vid}.npy"))
    np.save(tmp_path / "v2.npy", np.full((9, 8), np.nan, np.float32))
    report = run_check(config)
    assert counts(report)["features_missing"] == 10
    details = [detail for *_, detail in examples(report, "features_missing")]
    assert any("NaN" in detail for detail in details)
    assert details[1].startswith("no features of video 'v3'")
    config = tiny_config(root, "features.sources=[none]", "features.store=none")
    assert counts(run_check(config)) == {"features_unreadable": 1}
    assert counts(run_check(tiny_config(root, "features.width=9"))) == {"features_unreadable": 1}


lengths = st.integers(1, 12)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    videos=st.lists(st.tuples(lengths, st.sampled_from([0.0, 0.5, 1.25, 3.0])), min_size=1,
                    max_size=5),
    again=st.none() | st.sampled_from([0.5, 2.5]),
    max_clips=st.none() | st.integers(1, 4),
    reference=st.booleans(),
    absent=st.booleans(),
)  # fmt: skip
def test_the_check_refuses_what_training_refuses(
    tmp_path_factory, videos, again, max_clips, reference, absent
):
    root = tmp_path_factory.mktemp("run")
    (root / "features").mkdir()
    records = []
    for number, (clips, extra) in enumerate(videos):
        np.save(root / "features" / f"v{number}.npy", np.ones((clips, 8), np.float32))
        duration = clips + extra
        moment = [max(duration - 2.0, 0.0), duration]
        records.append(
            {
                **ROW,
                "qid": str(number),
                "vid": f"v{number}",
                "duration": duration,
                "relevant_windows": [moment],
                "recomposed_queries": ["x", "y", "z"],
            }
        )
    if again is not None:
        records.append({**records[0], "qid": "again", "duration": records[0]["duration"] + again})
    write_jsonl(root / "train.jsonl", records)
    config = tiny_config(
        root,
        "data.validation={}",
        "data.tests={}",
        f"data.max_clips={max_clips or 'null'}",
        f"data.compat={'reference' if reference else 'corrected'}",
    )
    pack_store(config, [f"v{number}" for number in range(len(videos) - absent)] or ["v0"])
    refused = run_check(config)["refused"]
    try:
        Source.open(config).training()
    except InputError:
        assert refused
    else:
        assert not refused


def test_deviating_videos_are_listed_with_their_true_stride(root):
    report = run_check(tiny_config(root, f"data.train={_stretched(root, 1)}"))
    assert counts(report) == {"stride": 1}
    (video,) = report["features"]["deviating"]
    assert video["clip_seconds"] == video["duration_seconds"] / video["num_clips"] == 2
    assert report["refused"] == 0
    many = run_check(tiny_config(root, f"data.train={_stretched(root, 3)}"))
    assert counts(many) == {"stride_many": 3}
    assert many["refused"] == 3
    published = tiny_config(root, f"data.train={_stretched(root, 3)}", "data.compat=reference")
    assert run_check(published)["refused"] == 0


def _stretched(root, videos):
    """A training file in which the first videos last twice as long."""
    records = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    vids = [f"v{number}" for number in range(videos)]
    for record in records:
        record["duration"] *= 1 + (record["vid"] in vids)
    write_jsonl(root / f"stretched{videos}.jsonl", records)
    return f"stretched{videos}.jsonl"
