import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.errors import InputError
from shine.language.negatives import (
    SCHEMA,
    HardNegatives,
    NegativeRecord,
    read_negatives,
    write_field_jsonl,
    write_negatives,
)

PUBLISHED = Path(os.environ.get("SHINE_SHARED", "../shared")) / (
    "data/charades_cg/charades_cg_gpt_train.jsonl"
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def record_fields(draw):
    rows = []
    for qid in draw(st.lists(texts, min_size=1, max_size=6, unique=True)):
        levels = draw(st.integers(0, 4))
        lists = {
            name: draw(st.lists(texts, min_size=levels, max_size=levels))
            for name in ("masked_queries", "recomposed_queries", "source", "reasons", "refused")
        }
        lists["attempts"] = draw(st.lists(st.integers(0, 9), min_size=levels, max_size=levels))
        valid = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
        one = {"qid": qid, "vid": draw(texts), "query": draw(texts), "tagger": "shine 1"}
        cost = {
            "requests": draw(st.lists(texts, max_size=2)),
            "prompt_tokens": draw(st.integers(0, 9000)),
            "completion_tokens": draw(st.integers(0, 9000)),
            "dollars": draw(st.floats(0, 1)),
        }
        rows.append(
            {**one, **cost, **lists, "valid": valid, "seed": draw(st.integers(-(2**63), 2**63 - 1))}
        )
    return rows


def record(qid, *recomposed):
    count = len(recomposed)
    return NegativeRecord(
        qid=qid,
        vid="v",
        query="a person opens a door.",
        masked_queries=["a person <mask> a door."] * count,
        recomposed_queries=list(recomposed),
        valid=[True] * count,
        source=["corpus"] * count,
        attempts=[1] * count,
        reasons=[""] * count,
        refused=[""] * count,
        tagger="shine 1",
        seed=0,
        requests=[],
        prompt_tokens=0,
        completion_tokens=0,
        dollars=0.0,
    )


@given(fields=record_fields())
@settings(max_examples=30, deadline=None)
def test_records_read_back_as_written(tmp_path_factory, fields):
    rows = [NegativeRecord(**one) for one in fields]
    path = tmp_path_factory.mktemp("negatives") / "n.parquet"
    write_negatives(path, iter(rows), {"generator": "corpus", "ratios": [0.5]})
    assert [NegativeRecord(**row) for row in pq.read_table(path).to_pylist()] == rows
    schema = pq.read_schema(path)
    assert schema.remove_metadata() == SCHEMA
    assert json.loads(schema.metadata[b"shine"]) == {
        "format": "shine-negatives-1",
        "generator": "corpus",
        "ratios": [0.5],
    }
    assert read_negatives(path) == {
        row.qid: HardNegatives(
            tuple(row.recomposed_queries),
            tuple(row.valid),
            tuple(row.source),
            tuple(row.masked_queries),
        )
        for row in rows
    }


def test_equal_records_give_equal_bytes_and_no_part_file_stays(tmp_path):
    rows = [record(f"q{i}", "x", "y") for i in range(9000)]
    for name in ("a", "b"):
        write_negatives(
            tmp_path / f"{name}.parquet", iter(rows), {"seed": 0, "generator": "corpus"}
        )
    a, b = (hashlib.sha256((tmp_path / f"{n}.parquet").read_bytes()).digest() for n in "ab")
    assert a == b
    assert len(read_negatives(tmp_path / "a.parquet")) == 9000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "n.parquet"
    write_negatives(path, [record("old", "x")], {})

    def failing():
        yield record("new", "x")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_negatives(path, failing(), {})
    assert list(read_negatives(path)) == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["n.parquet"]


def test_a_folder_of_files_reads_as_one(tmp_path):
    write_negatives(tmp_path / "1.parquet", [record("a", "x")], {})
    write_negatives(tmp_path / "2.parquet", [record("b", "y")], {})
    assert list(read_negatives(tmp_path)) == ["a", "b"]
    write_negatives(tmp_path / "3.parquet", [record("b", "z")], {})
    with pytest.raises(InputError, match=r"3\.parquet: query id 'b' occurs twice"):
        read_negatives(tmp_path)


def test_the_fields_jsonl_keeps_what_the_annotations_say_and_reads_back(tmp_path):
    source = lines(
        tmp_path / "train.jsonl",
        {**row("q1", "a person opens a door."), "duration": 9.5, "relevant_windows": [[0, 4]]},
        {**row("q2", "a person opens a box."), "duration": 8, "other": "kept"},
    )
    one, two = record("q1", "a person closes a door."), record("q2", "x", "")
    two.valid[1] = False
    out = tmp_path / "negatives.jsonl"
    write_field_jsonl(out, [one, two], source)
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["duration"] == 9.5
    assert first["relevant_windows"] == [[0, 4]]
    assert first["masked_queries"] == ["a person <mask> a door."]
    assert first["recomposed_queries"] == ["a person closes a door."]
    assert (second["other"], second["valid"]) == ("kept", [True, False])
    found = read_negatives(out)
    assert found["q1"].queries == ("a person closes a door.",)
    assert found["q2"].valid == (True, False)
    assert found["q2"].source == ("corpus", "corpus")
    with pytest.raises(ValueError, match="shorter"):
        write_field_jsonl(out, [one], source)
    assert len(out.read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["negatives.jsonl", "train.jsonl"]


def test_a_line_must_speak_of_every_level(tmp_path):
    path = lines(tmp_path / "n.jsonl", row("a", "q", "x", "y", valid=[True]))
    with pytest.raises(InputError, match="line 1: expected valid as a list with one bool per"):
        read_negatives(path)


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def row(qid, query, *recomposed, vid="v", **more):
    return {"qid": qid, "vid": vid, "query": query, "recomposed_queries": list(recomposed), **more}


def test_the_fields_files_are_judged_by_what_can_be_seen(tmp_path):
    path = lines(
        tmp_path / "n.jsonl",
        row(
            "a",
            "Person opens the door.",
            "person  opens the door",  # the query
            "person closes the door.",
            "person closes the door!",  # the level below
            "person closes <mask>.",
            "person reads a book.",  # true elsewhere in the video
            "person masks the door.",
            " ",
        ),
        row("b", "A person sits.", "person opens the door.", vid="w", source="grammar"),
        row(3, "person reads a book."),
    )
    found = read_negatives(path)
    assert found["a"].valid == (False, True, False, False, False, True, False)
    assert found["a"].source == ("file",) * 7
    assert found["b"] == HardNegatives(("person opens the door.",), (True,), ("grammar",))
    assert "3" not in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one query with negatives"),
        ('{"qid": 1, "vid": "v", "query": "q"}', "at least one query with negatives"),
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: expected an object"),
        ('{"qid": 1, "vid": "v"}', "line 1: expected an object with qid, vid, query"),
        ('{"qid": 1, "vid": "v", "query": "q", "recomposed_queries": "x"}', "list of sentences"),
        ('{"qid": 1, "vid": "v", "query": "q", "recomposed_queries": [1]}', "list of sentences"),
    ],
)
def test_a_malformed_jsonl_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "n.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_negatives(path)


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    path = lines(tmp_path / "n.jsonl", row(1, "q", "x"), row("1", "q", "y"))
    with pytest.raises(InputError, match=r"line 2: query id '1' occurs twice"):
        read_negatives(path)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match=f"cannot read negatives .*{name}"):
        read_negatives(tmp_path / name)


def test_other_parquet_files_are_refused(tmp_path):
    path = tmp_path / "n.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match="expected a Parquet file"):
        read_negatives(path)
    table = pa.table({"qid": ["a"], "recomposed_queries": [["x"]], "valid": ["yes"]})
    pq.write_table(table, path)
    with pytest.raises(InputError, match=r"column 'valid' of list<.*bool>, got string"):
        read_negatives(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        read_negatives(tmp_path / "empty")


def test_lists_of_different_lengths_are_refused(tmp_path):
    path = tmp_path / "n.parquet"
    bad = record("q7", "x", "y")
    bad.valid.pop()
    write_negatives(path, [bad], {})
    with pytest.raises(InputError, match="query q7: .* got 2, 1, 2"):
        read_negatives(path)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs the published Charades-CG files")
def test_the_published_file_has_the_defects_that_were_counted_in_it():
    found = read_negatives(PUBLISHED)
    invalid = [level for negatives in found.values() for level in negatives.valid if not level]
    assert len(found) == 8281
    # 6 equal to the query, 19 true elsewhere in the video, 8 repeated, 1 with a placeholder.
    assert len(invalid) == 6 + 19 + 8 + 1
