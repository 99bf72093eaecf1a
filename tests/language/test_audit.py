import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tagged import plain, tagged

from shine.audit_page import write_audit
from shine.audit_tables import audit_notes, audit_tables
from shine.data.annotations import write_jsonl
from shine.errors import InputError
from shine.language.audit import (
    DEFECTS,
    EXAMPLES,
    Models,
    audit,
    find_row,
    read_rows,
    row_defects,
)
from shine.language.tagging import load_tagger

CHARADES = Path(os.environ.get("SHINE_SHARED", "../shared")) / "data/charades_cg"
needs_charades = pytest.mark.skipif(
    not CHARADES.is_dir(), reason="needs the annotations; set SHINE_SHARED to their folder"
)

QUERY = "person opens a door."
MASKED = ["person <mask> a door.", "person <mask> a <mask>."]


class FakeTagger:
    """Tags from a table, so that tests need no weights; an unknown sentence is an error."""

    def __init__(self, sentences):
        self._known = {plain(words): words for words in map(tagged, sentences)}

    def __call__(self, texts):
        return [self._known[text] for text in texts]


def row(*negatives, qid="q1", vid="v1", query=QUERY, masked=None, **more):
    masked = MASKED[: len(negatives)] if masked is None else masked
    entry = {"qid": qid, "vid": vid, "query": query, "recomposed_queries": list(negatives)}
    return {**entry, **({"masked_queries": masked} if masked else {}), **more}


def audited(tmp_path, *rows, **options):
    path = tmp_path / "negatives.jsonl"
    write_jsonl(path, rows)
    return audit(path, **options)


def counts(result):
    return {entry["key"]: entry["count"] for entry in result["defects"] if entry["count"]}


@pytest.fixture(scope="module")
def published():
    tests = [CHARADES / f"charades_cg_novel_{kind}.jsonl" for kind in ("composition", "word")]
    return audit(CHARADES / "charades_cg_gpt_train.jsonl", tests=tests)


@needs_charades
def test_the_published_negatives_have_every_count_of_the_specification(published):
    found = {entry["key"]: entry for entry in published["defects"]}
    assert (published["rows"], published["negatives"]) == (8281, 24843)
    assert found["length"]["count"] == 2544
    assert found["slot_kept"]["count"] == 1270
    assert found["other_changed"]["count"] == 912
    assert found["equals_query"]["count"] == 6
    assert found["true_of_video"]["count"] == 19
    assert found["true_somewhere"]["count"] == 1400
    assert found["true_somewhere"]["by_level"][0] == 1031
    assert found["new_word"]["count"] == 10969
    assert published["training"] == {"captions": 8281, "distinct_captions": 4920, "words": 790}
    composition, word = published["tests"]
    assert composition["equal_negatives"] == 92
    assert (composition["equal_queries"], composition["distinct_queries"]) == (36, 2492)
    assert word["equal_negatives"] == 8
    assert (word["unseen_words"], word["shown_words"]) == (277, 137)
    assert (word["queries_with_shown_word"], word["queries"]) == (500, 695)


@needs_charades
def test_the_published_negatives_have_the_other_defects_that_were_found(published):
    found = counts(published)
    assert found["equal_levels"] == 8
    assert found["nearer_level"] == 162
    assert found["mask_left"] == 1
    assert found["odd_blank"] == 1
    assert [round(level["overlap"], 2) for level in published["levels"]] == [0.66, 0.44, 0.29]
    assert found["slot_kept_any"] > found["slot_kept"]
    assert found["other_changed_any"] > found["other_changed"]


def test_good_negatives_have_no_defect(tmp_path):
    good = row("person closes a door.", "person closes a window.")
    other = row(qid="q2", vid="v2", query="person closes a big window.", masked=[])
    result = audited(tmp_path, good, other)
    assert counts(result) == {}
    assert result["examples"] == {}
    assert result["rows_by_levels"] == {"0": 1, "2": 1}
    assert [level["changed"]["mean"] for level in result["levels"]] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("negative", "keys"),
    [
        ("person closes up a door.", {"length"}),
        ("woman closes up a door.", {"length", "other_changed_any"}),
        ("Person OPENS a door!", {"slot_kept", "slot_kept_any", "equals_query"}),
        ("person then opens a door.", {"length", "slot_kept_any"}),
        ("woman closes a door.", {"other_changed", "other_changed_any"}),
        ("person <mask> a door.", {"mask_left"}),
        ("person [MASK] a door.", {"mask_left"}),
        ("person shuts\u00a0a door.", {"odd_blank"}),
        ("person shu\u200bts a door.", {"odd_blank"}),
        (" . ", {"empty", "length", "other_changed_any"}),
    ],
)
def test_each_defect_of_one_negative_is_told(tmp_path, negative, keys):
    (record,) = read_rows(write(tmp_path, row(negative)))
    assert row_defects(record) == [keys]


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    return path


def test_an_article_that_agrees_with_the_new_word_is_counted_apart(tmp_path):
    masked = ["person <mask> a <mask>."]
    (record,) = read_rows(write(tmp_path, row("person eats an apple.", masked=masked)))
    assert row_defects(record) == [{"other_changed", "other_changed_any", "article_changed"}]
    (record,) = read_rows(write(tmp_path, row("person shuts an door.")))
    assert row_defects(record) == [{"other_changed", "other_changed_any"}]


def test_levels_are_compared_with_those_below(tmp_path):
    masked = [MASKED[1]] * 3
    negatives = ["person eats a soup.", "person eats a door.", "Person eats a soup"]
    (record,) = read_rows(write(tmp_path, row(*negatives, masked=masked)))
    assert [
        keys & {"equal_levels", "nearer_level", "no_further_level"} for keys in row_defects(record)
    ] == [  # fmt: skip
        set(),
        {"nearer_level", "no_further_level"},
        {"equal_levels"},
    ]


def test_true_captions_are_told_by_where_they_are_true(tmp_path):
    rows = [
        row("person eats soup.", "person sits down.", "a dog runs.", masked=[]),
        row(qid="q2", query="person eats soup.", masked=[]),
        row(qid="q3", vid="v2", query="Person sits down", masked=[]),
    ]
    result = audited(tmp_path, *rows)
    assert counts(result) == {
        "true_of_video": 1,
        "true_elsewhere": 1,
        "true_somewhere": 2,
        "new_word": 1,
        "no_further_level": 1,
    }
    assert result["new_words"] == 2  # dog, runs
    assert result["examples"]["true_elsewhere"] == [
        {"qid": "q1", "level": 2, "query": QUERY, "negative": "person sits down."}
    ]


def test_training_captions_may_stand_in_other_files(tmp_path):
    train = tmp_path / "train.jsonl"
    write_jsonl(train, [{"vid": "v9", "query": "person fixes a door."}])
    result = audited(tmp_path, row("person fixes a door."), train=[train])
    assert result["training"]["captions"] == 1
    assert counts(result) == {"true_elsewhere": 1, "true_somewhere": 1}


def test_levels_that_a_file_marks_invalid_count_apart(tmp_path):
    path = tmp_path / "n.parquet"
    levels = {
        "valid": [True, False],
        "source": ["corpus", "random"],
        "reasons": ["", "equal to the query"],
        "further": [1, 2],
    }
    record = row("person shuts a door.", QUERY, **levels)
    pq.write_table(pa.Table.from_pylist([record]), path)
    result = audit(path)
    assert (result["negatives"], result["invalid"]) == (1, 1)
    assert counts(result) == {"new_word": 1}
    assert result["reasons"] == {"equal to the query": 1}
    assert result["sources"] == {"corpus": [1, 0], "random": [0, 1]}


def test_a_parquet_file_of_others_needs_four_columns(tmp_path):
    path = tmp_path / "n.parquet"
    pq.write_table(
        pa.Table.from_pylist([row("person shuts a door.", masked=[]) | {"qid": 7}]), path
    )
    result = audit(path)
    assert (result["rows"], result["invalid"]) == (1, None)
    missing = {entry["key"] for entry in result["defects"] if entry["count"] is None}
    assert missing == {key for key in missing if "slot" in key or "changed" in key} | {
        "length",
        "template_differs",
    }
    pq.write_table(pa.table({"qid": ["a"]}), path)
    with pytest.raises(InputError, match="expected the columns vid, query"):
        audit(path)


def test_repeated_ids_and_templates_that_do_not_fit_are_counted(tmp_path):
    result = audited(tmp_path, row("a b.", masked=["<mask> b."]), row(masked=[]))
    assert counts(result) == {"template_differs": 1, "repeated_id": 1, "new_word": 1}


def test_words_and_pairs_that_only_test_queries_have_are_traced(tmp_path):
    tests = tmp_path / "tests.jsonl"
    write_jsonl(
        tests,
        [
            {"query": "person closes a door."},  # the pair is new, and shown
            {"query": "person closes a window."},  # known
            {"query": "person paints a door."},  # the word is new, and shown
            {"query": "person welds a door."},  # new and never shown
        ],
    )
    sentences = [
        f"person/NN {verb} a/DT {noun}/NN ./."
        for verb in ("closes/VBZ=close", "paints/VBZ=paint", "welds/VBZ=weld", "opens/VBZ=open")
        for noun in ("door", "window")
    ]
    rows = [
        row("person closes a door.", "person paints a window.", masked=[]),
        row(qid="q2", vid="v2", query="person closes a window.", masked=[]),
        row("person opens a window.", qid="q3", vid="v3", query="person fixes a cup.", masked=[]),
    ]
    result = audited(tmp_path, *rows, tests=[tests], tagger=FakeTagger(sentences))
    (found,) = result["tests"]
    assert found["equal_negatives"] == 1
    assert found["equal_queries"] == 1
    assert (found["unseen_words"], found["shown_words"]) == (2, 1)
    assert found["queries_with_shown_word"] == 1
    assert found["unseen_pairs"] == 3  # close, paint, weld a door
    assert found["shown_pairs"] == 1
    assert found["negatives_with_pair"] == 1
    assert found["queries_with_unseen_pair"] == 3
    assert found["queries_with_shown_pair"] == 1
    without = audited(tmp_path, *rows, tests=[tests])["tests"][0]
    assert "unseen_pairs" not in without
    assert without["shown_words"] == 1


def test_examples_are_few_whatever_the_count(tmp_path):
    rows = [row(QUERY, qid=f"q{i}", vid=f"v{i}") for i in range(20)]
    result = audited(tmp_path, *rows)
    assert counts(result)["equals_query"] == 20
    assert [one["qid"] for one in result["examples"]["equals_query"]] == [
        f"q{i}" for i in range(EXAMPLES)
    ]


def test_few_captions_leave_plausibility_out_and_say_so(tmp_path):
    result = audited(tmp_path, row("person shuts a door."), models=Models())
    assert result["plausibility"] is None
    assert "1 training captions are too few" in result["plausibility_missing"]


def test_plausibility_puts_fitting_words_above_drawn_ones(tmp_path):
    verbs = {"opens": ("door", "box", "bag"), "eats": ("soup", "bread", "apple")}
    rows = []
    for i in range(360):
        verb, other = ("opens", "eats") if i % 2 else ("eats", "opens")
        noun, near = verbs[verb][i % 3], verbs[verb][(i + 1) % 3]
        far = verbs[other][i % 3]
        query = f"person {verb} the {noun}."
        masked = [f"person {verb} the <mask>."] * 2
        negatives = (f"person {verb} the {near}.", f"person {verb} the {far}.")
        rows.append(row(*negatives, qid=f"q{i}", vid=f"v{i}", query=query, masked=masked))
    models = Models()
    result = audited(tmp_path, *rows, models=models)
    found = result["plausibility"]
    near, far = (entry["per_word"] for entry in found["negatives"])
    assert found["shuffled"]["per_word"] < far < near
    assert near == pytest.approx(found["true"]["per_word"], abs=0.2)
    assert found["true"]["above_p5"] >= 0.9
    first, second = found["negatives"]
    assert first["changed_words"] > second["changed_words"] + 1
    assert first["changed_words"] == pytest.approx(first["words_replaced"], abs=0.5)
    # The same captions are learned once, in whatever file they stand.
    assert audited(tmp_path, *reversed(rows), models=models)["plausibility"]["true"] == (
        pytest.approx(found["true"], abs=1e-6)
    )
    assert len(vars(models)["_known"]) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"vid": "v", "query": "a"}, "line 1: expected a qid"),
        ({"qid": "q", "vid": 3, "query": "a"}, "expected a text as vid, got 3"),
        (row("a") | {"recomposed_queries": "a"}, "expected a list of sentences"),
        (row("a") | {"masked_queries": ["b", "c"]}, "as many masked_queries"),
        (row("a") | {"valid": [1]}, "list of true and false"),
        (row("a") | {"source": []}, "a source for each of 1 levels"),
        (row("a") | {"reasons": ["", "b"]}, "a list of texts for each of 1 levels, got"),
        (row("a") | {"reasons": [7]}, "a list of texts for each of 1 levels, got"),
        (row("a") | {"reasons": [{"b": "c"}]}, "a list of texts for each of 1 levels, got"),
        (row("a") | {"reasons": [["b", 0]]}, "a list of texts for each of 1 levels, got"),
        (row("a") | {"reasons": "b"}, "a list of texts for each of 1 levels, got"),
        (row(masked=[]), "none of its 1 rows has recomposed_queries"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(tmp_path, line, says):
    with pytest.raises(InputError, match=says):
        audited(tmp_path, line)


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        audit(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        audit(tmp_path / "none.parquet")
    with pytest.raises(InputError, match="found none"):
        audit(tmp_path)
    (tmp_path / "broken.parquet").write_text("nothing")
    with pytest.raises(InputError, match="no Parquet file"):
        audit(tmp_path / "broken.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="found none"):
        audit(tmp_path / "empty.jsonl")


def test_a_query_is_found_and_a_missing_one_gets_the_nearest_ids(tmp_path):
    path = write(tmp_path, *(row("a.", qid=f"AB{i}_train_0", masked=[]) for i in range(9)))
    assert find_row(path, "AB3_train_0").qid == "AB3_train_0"
    with pytest.raises(InputError, match="no query 'AB33_train_0' among 9; the nearest: AB3_"):
        find_row(path, "AB33_train_0")


def test_the_page_holds_every_count_and_runs_nothing(tmp_path):
    hostile = '<script>alert("x")</script> opens a door.'
    one = audited(tmp_path, row(hostile, QUERY), row("a.", qid="q2", vid="v2", masked=[]))
    other = {**one, "file": "other/negatives.jsonl"}
    page = write_audit([one, other], tmp_path / "out").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("other/negatives") > 1
    assert "http" not in page
    for table in audit_tables([one, other]):
        assert table.title in page
        for group in table.groups:
            for line in group.lines:
                assert len(line.cells) == len(table.headings), line.name
    for note in audit_notes([one, other]):
        assert note.split(" ' ")[0][:20] in page
    stored = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert stored == {"audits": [json.loads(json.dumps(one)), json.loads(json.dumps(other))]}
    assert all(defect.text in page for defect in DEFECTS)


def test_the_shipped_tagger_finds_pairs_in_any_inflection(tmp_path):
    tests = tmp_path / "tests.jsonl"
    write_jsonl(tests, [{"query": "a person washes the window."}])
    rows = [
        row("the man is washing the windows.", query="the man is opening windows.", masked=[]),
        row("a person eats.", qid="q2", query="a person washes the cups.", masked=[]),
    ]
    (found,) = audited(tmp_path, *rows, tests=[tests], tagger=load_tagger("shine"))["tests"]
    assert (found["unseen_pairs"], found["shown_pairs"]) == (1, 1)
