import json
from dataclasses import replace

import numpy as np
import pytest

from shine.metrics.composition import saliency_wins
from shine.metrics.figures import HEADLINE
from shine.metrics.highlights import Highlights
from shine.metrics.summary import (
    Answers,
    compare,
    evaluate_file,
    evaluate_split,
    evaluate_splits,
    figures_of,
)


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
        predicted=moments + rng.uniform(-shift, shift, (queries, 5, 2)),
        scores=-np.sort(-rng.random((queries, 5))),
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
    figures = figures_of(split)
    assert list(summary["metrics"]) == [name for name in HEADLINE if not name.startswith("HL-")]
    for name, figure in summary["metrics"].items():
        value = figures[name].mean()
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
        assert gap["low"] <= gap["value"] <= gap["high"]
    assert both["composition_gap"].keys() == trivial.keys()


def test_evaluation_is_json_that_reads_back_equal_and_holds_no_nan():
    result = evaluate(test_trivial=answers(), novel_composition=answers(seed=1))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_without_negatives_or_resamples_the_places_stay_empty():
    split = answers()
    bare = replace(split, saliency=None, inside=None, text_valid=None)
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
        columns = [*values["values"].values(), *values["saliency_wins"].values()]
        lists = [values["qid"], values["vid"], *columns]
        for column in lists:
            column.reverse()
    same = compare(first, shuffled, resamples=50)
    figures = [
        *same["composition_gap"].values(),
        *(f for s in same["splits"].values() for group in s.values() for f in group.values()),
    ]
    assert len(figures) == 7 + 2 * (7 + 3)
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


def test_queries_that_a_figure_does_not_ask_about_take_no_part():
    split = answers()
    unanswered = np.arange(40) % 4 == 0
    split.predicted[unanswered], split.scores[unanswered] = np.nan, np.nan
    relevance = np.random.default_rng(3).integers(0, 5, (40, 12, 3))
    num_clips = np.where(np.arange(40) % 2, 12, 0)
    labels = Highlights(split.saliency[0], relevance, num_clips)
    summary = evaluate_split(replace(split, highlights=labels), resamples=50)
    values = summary["queries"]["values"]
    assert summary["num_unanswered"] == 10
    assert [value is None for value in values["mAP"]] == unanswered.tolist()
    assert [value == 0 for value in values["R1@0.3"]][::4] == [True] * 10
    assert [value is None for value in values["HL-min-VeryGood-mAP"]] == (num_clips == 0).tolist()
    for name, figure in summary["metrics"].items():
        known = [value for value in values[name] if value is not None]
        assert figure["value"] == pytest.approx(np.mean(known))
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_file_has_every_figure_of_every_length_that_its_moments_have():
    split = answers()  # moments of 2 to 5 s
    result = evaluate_file(split, predictions="p", annotations="a", resamples=20)
    names = set(result["metrics"])
    assert {"R1@0.95", "mAP@0.75", "short-mAP", "short-R1@0.5", "short-R5@0.7"} <= names
    assert not any(name.startswith(("middle-", "long-", "HL-")) for name in names)
    assert result["official"]["cg"]["long"]["MR-mAP"]["average"] == 0.0
    assert result["official"]["qvhighlights"]["brief"]["MR-long-mAP"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_intervals_without_a_resample_that_counts_stay_empty():
    split = answers(queries=30)
    vids = [f"v{row}" for row in range(30)]
    split.predicted[1:], split.scores[1:] = np.nan, np.nan
    value = figures_of(split)["mAP"][0]
    ends = []
    for seed in range(10):  # one video of 30 counts, and a resample misses it one time in e
        figure = evaluate_split(replace(split, vids=vids), resamples=1, seed=seed)["metrics"]["mAP"]
        assert figure["value"] == value
        ends += [figure["low"], figure["high"]]
    assert set(ends) == {None, value}
