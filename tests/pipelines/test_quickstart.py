import json

import pytest

from pipelines.quickstart import run_quickstart
from shine.data.annotations import normalized, read_annotations
from shine.data.grammar import VERBS
from shine.data.planted import WorldConfig
from shine.language.negatives import read_negatives

pytestmark = pytest.mark.ray

SMALL = WorldConfig(train_rows=300, validation_rows=20, test_rows=20)
SHORT = (
    "train.epochs=1",
    "model.hidden=16",
    "model.feedforward=16",
    "evaluate.bootstrap=50",
    "negatives.tagger=shine",  # not one that happens to be installed
)


def words(annotations):
    return {word for a in annotations for word in normalized(a.query).split()}


@pytest.fixture(scope="module")
def quickstart(ray_cluster, tmp_path_factory):
    out = tmp_path_factory.mktemp("quick") / "start"
    return out, run_quickstart(out, planted=SMALL, overrides=SHORT)


def test_one_command_leaves_two_evaluated_runs_and_a_page(quickstart):
    out, result = quickstart
    page = (out / "report.html").read_text()
    assert result["report"] == str(out / "report.html")
    assert "planted world, seed 0" in page
    assert "grammar" in page
    for name in ("baseline", "shine"):
        evaluation = json.loads((out / name / "evaluation.json").read_text())
        assert evaluation["simulated"] == "planted world, seed 0"
        assert evaluation["negatives"] == "grammar"
        assert set(evaluation["splits"]) == {"test_trivial", "novel_composition", "novel_word"}
        assert "R1@0.5" in evaluation["composition_gap"]


def test_no_negative_shows_a_word_that_no_training_query_has(quickstart):
    world = quickstart[0] / "world"
    known = words(read_annotations(world / "train.jsonl"))
    novel = words(read_annotations(world / "novel_word.jsonl")) - known
    assert novel
    negatives = read_negatives(world / "negatives.parquet")
    assert len(negatives) == 300
    shown = {w for row in negatives.values() for text in row.queries for w in
             normalized(text).split()}  # fmt: skip
    assert shown <= known


def test_how_many_novel_pairs_the_negatives_happen_to_hold_is_counted(quickstart):
    """A pair of training words is no leak of a word. Pinned, so that a change is seen."""
    world = quickstart[0] / "world"
    manifest = json.loads((world / "world.json").read_text())
    negatives = read_negatives(world / "negatives.parquet")
    texts = [set(normalized(text).split()) for row in negatives.values() for text in row.queries]
    pairs = [tuple(pair) for pair in manifest["pairs"]["novel_composition"]]
    forms = {verb: {verb, VERBS[verb].present, VERBS[verb].participle} for verb, _ in pairs}
    held = {(v, n) for v, n in pairs if any(n in text and forms[v] & text for text in texts)}
    assert (len(held), len(pairs)) == (1, 18)


def test_started_again_it_leaves_finished_runs_alone(quickstart):
    out, result = quickstart
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoint_*/*")}
    page = (out / "report.html").read_bytes()
    assert run_quickstart(out, planted=SMALL, overrides=SHORT) == result
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoint_*/*")} == before
    assert (out / "report.html").read_bytes() == page
