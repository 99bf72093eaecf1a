import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shine.data.annotations import write_jsonl

QUERY = "a person opens the door."


@pytest.fixture
def negatives(tmp_path):
    path = tmp_path / "negatives.jsonl"
    rows = [
        {
            "qid": f"q{i}",
            "vid": f"v{i}",
            "query": QUERY,
            "masked_queries": ["a person <mask> the door.", "a person <mask> the <mask>."],
            "recomposed_queries": ["a person closes the door.", "a person closes the <mask>."],
        }
        for i in range(3)
    ]
    write_jsonl(path, rows)
    return path


@pytest.fixture
def ours(tmp_path, negatives):
    path = tmp_path / "ours.parquet"
    levels = {
        "valid": [True, False],
        "source": ["llm", "corpus"],
        "reasons": ["", "a slot is not filled"],
    }
    rows = [{**json.loads(line), **levels} for line in negatives.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_an_audit_prints_every_count_and_its_rule(shine, negatives):
    status, out, _ = shine("negatives", "audit", negatives)
    assert status == 0
    text = " ".join(out.split())
    assert "a mask is left" in text
    assert "Texts are put in lower case" in text
    assert "plausibility was not judged" in text


def test_an_audit_compares_files_and_writes_page_and_json(shine, negatives, ours, tmp_path):
    out = tmp_path / "runs" / "audit"
    test = tmp_path / "test.jsonl"
    write_jsonl(test, [{"query": "a person closes the door."}])
    status, printed, err = shine(
        "negatives", "audit", negatives, ours, "--test", test, "--tagger", "shine",
        "--out", out, "--json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads(printed)
    assert result == json.loads((out / "audit.json").read_text())
    theirs, mine = result["audits"]
    left = [
        next(entry for entry in one["defects"] if entry["key"] == "mask_left")["count"]
        for one in (theirs, mine)
    ]
    assert left == [3, 0]  # ours says itself that the level is invalid
    assert mine["invalid"] == 3
    assert theirs["tests"][0]["shown_pairs"] == 1
    assert "ours" in (out / "audit.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.jsonl"], "cannot read"),
        (["{negatives}", "--train", "none.jsonl"], "cannot read"),
        (["{negatives}", "--test", "none.jsonl"], "cannot read"),
        (["{negatives}", "--test", "{negatives}", "--tagger", "none"], "language.tagger is 'none'"),
        (["{negatives}", "--out", "{negatives}"], "cannot write the audit"),
    ],
)
def test_wrong_input_of_an_audit_is_one_sentence(shine, negatives, arguments, says):
    arguments = [argument.format(negatives=negatives) for argument in arguments]
    status, _, err = shine("negatives", "audit", *arguments)
    assert status == 2
    assert says in err


def test_show_prints_levels_verdicts_and_what_is_wrong(shine, negatives, ours):
    status, out, _ = shine("negatives", "show", negatives, "q1")
    assert status == 0
    assert QUERY in out
    assert "a person <mask> the <mask>." in out
    assert "not judged by the file" in out
    assert "! a mask is left in the sentence" in out
    status, out, _ = shine("negatives", "show", ours, "q1")
    assert status == 0
    assert "level 1, llm, valid" in out
    assert "level 2, corpus, invalid: a slot is not filled" in out
    shown = json.loads(shine("negatives", "show", ours, "q1", "--json")[1])
    assert shown["valid"] == [True, False]


def test_show_names_the_nearest_ids(shine, negatives):
    status, _, err = shine("negatives", "show", negatives, "q9")
    assert status == 2
    assert "no query 'q9' among 3; the nearest: q" in err


def test_texts_of_a_file_cannot_steer_the_terminal(shine, tmp_path):
    path = tmp_path / "hostile.jsonl"
    hostile = "a person \x1b[2J\u202e[bold]closes[/bold] the door."
    row = {"qid": "q\x1b[1m", "vid": "v", "query": QUERY, "recomposed_queries": [hostile, QUERY]}
    write_jsonl(path, [row])
    for arguments in (("show", path, "q\x1b[1m"), ("audit", path)):
        status, out, _ = shine("negatives", *arguments)
        assert status == 0
        assert "\x1b[2J" not in out
        assert "\u202e" not in out
        assert "[bold]closes[/bold]" in " ".join(out.split())
