import json

import numpy as np
import pytest

from shine.metrics.composition import saliency_wins
from shine.metrics.recall import METRICS, per_query, top1_iou
from shine.metrics.summary import Answers, compare, evaluate_split, evaluate_splits


def answers(queries=40, texts=4, clips=12, seed=0, shift=1.0, prefix="q"):
    """A made-up split: predictions off by up to `shift` seconds, negatives that score less."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 6, queries)
    moments = np.stack([start, start + rng.uniform(2, 5, queries)], axis=1)[:, None]
    saliency = rng.normal(size=(texts, queries, clips))
    saliency[0] += 0.5
    valid = rng.random((texts, queries)) < 0.9
    valid[0] = True
    return Answers(
        qids=[f"{prefix}{i}" for i in range(queries)],
        vids=[f"v{i % 11}" for i in range(queries)],
        predicted=moments[:, 0] + rng.uniform(-shift, shift, (queries, 2)),
        moments=moments,
        moment_mask=np.ones((queries, 1), dtype=bool),
        saliency=saliency,
        inside=rng.random((queries, clips)) < 0.4,
        text_valid=valid,
    )


def evaluate(**splits):
    return evaluate_splits(
        splits, checkpoint="checkpoint_000003", simulated=None, negatives="grammar", resamples=200
    )


def test_figures_of_a_split_are_the_means_of_its_queries():
    split = answers()
    summary = evaluate_split(split, resamples=200)
    expected = per_query(top1_iou(split.predicted, split.moments, split.moment_mask)).mean(axis=0)
    for name, value in zip(METRICS, expected, strict=True):
        figure = summary["metrics"][name]
        assert figure["value"] == pytest.approx(value)
        assert figure["low"] <= figure["value"] <= figure["high"]
    wins, counted = saliency_wins(split.saliency, split.inside, split.text_valid)
    found = [summary["saliency_sanity"][f"level_{level}"]["value"] for level in (1, 2, 3)]
    np.testing.assert_allclose(found, wins.sum(axis=1) / counted.sum(axis=1))
    assert (summary["num_queries"], summary["num_videos"]) == (40, 11)


def test_gap_needs_both_splits():
    assert evaluate(test_trivial=answers())["composition_gap"] == {}
    both = evaluate(test_trivial=answers(), novel_composition=answers(seed=1, shift=2.0))
    trivial, novel = (both["splits"][name]["metrics"] for name in both["splits"])
    for name, gap in both["composition_gap"].items():
        assert gap["value"] == pytest.approx(trivial[name]["value"] - novel[name]["value"])
        assert gap["low"] < gap["value"] < gap["high"]


def test_evaluation_is_json_that_reads_back_equal_and_holds_no_nan():
    result = evaluate(test_trivial=answers(), novel_composition=answers(seed=1))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_without_negatives_or_resamples_the_places_stay_empty():
    split = answers()
    bare = Answers(split.qids, split.vids, split.predicted, split.moments, split.moment_mask)
    summary = evaluate_split(bare, resamples=0)
    assert summary["saliency_sanity"] == {}
    assert {(f["low"], f["high"]) for f in summary["metrics"].values()} == {(None, None)}


def test_a_level_that_no_query_has_is_left_out():
    split = answers()
    split.text_valid[2] = False
    assert evaluate_split(split, resamples=10)["saliency_sanity"].keys() == {"level_1", "level_3"}


def test_comparison_pairs_queries_by_name_and_not_by_place():
    first = evaluate(test_trivial=answers(), novel_composition=answers(seed=1))
    shuffled = json.loads(json.dumps(first))
    for split in shuffled["splits"].values():
        values = split["queries"]
        lists = [values["qid"], values["vid"], values["iou"], *values["saliency_wins"].values()]
        for column in lists:
            column.reverse()
    same = compare(first, shuffled, resamples=50)
    figures = [
        *same["composition_gap"].values(),
        *(f for s in same["splits"].values() for group in s.values() for f in group.values()),
    ]
    assert len(figures) == 4 + 2 * (4 + 3)
    assert all(figure == {"value": 0.0, "low": 0.0, "high": 0.0} for figure in figures)


def test_comparison_is_second_minus_first_with_a_paired_interval():
    first = evaluate(test_trivial=answers(shift=3.0), novel_composition=answers(shift=3.0, seed=1))
    second = evaluate(test_trivial=answers(shift=0.1), novel_composition=answers(shift=3.0, seed=1))
    change = compare(first, second)
    figure = change["splits"]["test_trivial"]["metrics"]["mIoU"]
    values = [e["splits"]["test_trivial"]["metrics"]["mIoU"]["value"] for e in (first, second)]
    assert figure["value"] == pytest.approx(values[1] - values[0])
    assert 0 < figure["low"] < figure["value"] < figure["high"]
    assert change["composition_gap"]["mIoU"]["value"] == pytest.approx(figure["value"])


def test_splits_with_other_queries_are_not_compared():
    first = evaluate(test_trivial=answers(), novel_word=answers(seed=2))
    second = evaluate(test_trivial=answers(prefix="other"), novel_word=answers(seed=3))
    assert compare(first, second, resamples=10)["splits"].keys() == {"novel_word"}
