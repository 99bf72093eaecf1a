"""From the answers of a model to `evaluation.json`, and the difference of two such files.

The file holds every figure with its interval, and the per-query values behind them, so that two
runs can be compared on the same queries later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float

from shine.metrics.bootstrap import LEVEL, RESAMPLES, mean_interval
from shine.metrics.composition import composition_gap, composition_gap_interval, saliency_wins
from shine.metrics.recall import METRICS, per_query, top1_iou

TRIVIAL, NOVEL = "test_trivial", "novel_composition"  # the two splits of the composition gap


class Interval(TypedDict):
    """A figure and its 95 % interval; the ends are None where none was asked for."""

    value: float
    low: float | None
    high: float | None


class Queries(TypedDict):
    """Per-query values of a split, in one order."""

    qid: list[str]
    vid: list[str]
    iou: list[float]
    saliency_wins: dict[str, list[bool | None]]  # by level; None where the query lacks it


class SplitSummary(TypedDict):
    """Figures of one split, as fractions in [0, 1]."""

    num_queries: int
    num_videos: int
    metrics: dict[str, Interval]
    saliency_sanity: dict[str, Interval]  # by level; empty without negatives
    queries: Queries


class Bootstrap(TypedDict):
    """How the intervals were made."""

    resamples: int
    seed: int
    level: float
    cluster: str


class Evaluation(TypedDict):
    """The content of `evaluation.json`."""

    checkpoint: str
    simulated: str | None
    negatives: str | None  # who made the negatives of `saliency_sanity`
    bootstrap: Bootstrap
    splits: dict[str, SplitSummary]
    composition_gap: dict[str, Interval]  # empty unless both splits were evaluated


@dataclass(frozen=True)
class Answers:
    """What a model answered on one split: one entry per query along the `query` axis."""

    qids: Sequence[str]
    vids: Sequence[str]
    predicted: Float[np.ndarray, "query 2"]  # the first moment, seconds
    moments: Float[np.ndarray, "query moment 2"]  # annotated, seconds, padded
    moment_mask: Bool[np.ndarray, "query moment"]
    # Text 0 is the query, texts 1.. its negatives, least altered first. None: no negatives.
    saliency: Float[np.ndarray, "text query clip"] | None = None
    inside: Bool[np.ndarray, "query clip"] | None = None  # real clips that overlap a moment
    text_valid: Bool[np.ndarray, "text query"] | None = None


def evaluate_split(answers: Answers, *, resamples: int = RESAMPLES, seed: int = 0) -> SplitSummary:
    """The figures of one split.

    Args:
        answers: at least one query.
        resamples: of each interval; 0 leaves the intervals None.
        seed: of the resamples.
    """
    assert len(answers.qids) == len(answers.vids) == len(answers.predicted) > 0
    iou = top1_iou(answers.predicted, answers.moments, answers.moment_mask)
    queries: Queries = {
        "qid": [str(qid) for qid in answers.qids],
        "vid": [str(vid) for vid in answers.vids],
        "iou": iou.tolist(),
        "saliency_wins": _wins_by_level(answers),
    }
    return {
        "num_queries": len(iou),
        "num_videos": len(set(queries["vid"])),
        "metrics": _means(per_query(iou), queries["vid"], resamples, seed),
        "saliency_sanity": {
            level: _mean(*_known(wins, queries["vid"]), resamples, seed)
            for level, wins in queries["saliency_wins"].items()
        },
        "queries": queries,
    }


def evaluate_splits(
    splits: Mapping[str, Answers],
    *,
    checkpoint: str,
    simulated: str | None,
    negatives: str | None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """The content of `evaluation.json` for all splits of a run.

    Args:
        splits: answers by split; the composition gap needs `test_trivial` and `novel_composition`.
        checkpoint: name of the checkpoint that answered.
        simulated: what about the data is simulated, in words; None for real data.
        negatives: who made the negatives in `Answers.saliency`; None without.
        resamples: of each interval; 0 leaves the intervals None.
        seed: of the resamples.
    """
    summaries = {
        name: evaluate_split(answers, resamples=resamples, seed=seed)
        for name, answers in splits.items()
    }
    gap: dict[str, Interval] = {}
    if TRIVIAL in summaries and NOVEL in summaries:
        trivial, novel = (summaries[name]["queries"] for name in (TRIVIAL, NOVEL))
        values = per_query(np.array(trivial["iou"])), per_query(np.array(novel["iou"]))
        gap = _gap(*values, trivial["vid"], novel["vid"], resamples, seed)
    return {
        "checkpoint": checkpoint,
        "simulated": simulated,
        "negatives": negatives,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": LEVEL, "cluster": "video"},
        "splits": summaries,
        "composition_gap": gap,
    }


class SplitComparison(TypedDict):
    """Differences of two runs on the same queries of one split, second minus first."""

    metrics: dict[str, Interval]
    saliency_sanity: dict[str, Interval]


class Comparison(TypedDict):
    """Differences of two runs, second minus first; only what both answered on equal queries."""

    splits: dict[str, SplitComparison]
    composition_gap: dict[str, Interval]


def compare(
    first: Evaluation, second: Evaluation, *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """What changes from the first run to the second, with paired intervals.

    The values are subtracted query by query before videos are resampled, so that hard and easy
    queries cancel: the interval is that of the difference, not read off two overlapping intervals.
    Splits whose sets of queries differ between the runs are left out.
    """
    pairs = {
        name: (own["queries"], _align(second["splits"][name]["queries"], own["queries"]))
        for name, own in first["splits"].items()
        if name in second["splits"]
        and set(own["queries"]["qid"]) == set(second["splits"][name]["queries"]["qid"])
    }
    changes = {
        name: per_query(np.array(other["iou"])) - per_query(np.array(own["iou"]))
        for name, (own, other) in pairs.items()
    }
    splits: dict[str, SplitComparison] = {
        name: {
            "metrics": _means(changes[name], own["vid"], resamples, seed),
            "saliency_sanity": _sanity_change(own, other, resamples, seed),
        }
        for name, (own, other) in pairs.items()
    }
    gap: dict[str, Interval] = {}
    if TRIVIAL in pairs and NOVEL in pairs:
        vids = pairs[TRIVIAL][0]["vid"], pairs[NOVEL][0]["vid"]
        gap = _gap(changes[TRIVIAL], changes[NOVEL], *vids, resamples, seed)
    return {"splits": splits, "composition_gap": gap}


def _align(queries: Queries, to: Queries) -> Queries:
    """The same values in the order of the queries `to`."""
    place = {qid: index for index, qid in enumerate(queries["qid"])}
    order = [place[qid] for qid in to["qid"]]
    return {
        "qid": to["qid"],
        "vid": to["vid"],
        "iou": [queries["iou"][index] for index in order],
        "saliency_wins": {
            level: [wins[index] for index in order]
            for level, wins in queries["saliency_wins"].items()
        },
    }


def _sanity_change(
    first: Queries, second: Queries, resamples: int, seed: int
) -> dict[str, Interval]:
    """Per level, over the queries whose win is known in both runs."""
    changes = {
        level: [
            None if before is None or after is None else float(after) - float(before)
            for before, after in zip(first["saliency_wins"][level], wins, strict=True)
        ]
        for level, wins in second["saliency_wins"].items()
        if level in first["saliency_wins"]
    }
    return {
        level: _mean(*_known(change, first["vid"]), resamples, seed)
        for level, change in changes.items()
        if any(value is not None for value in change)
    }


def _wins_by_level(answers: Answers) -> dict[str, list[bool | None]]:
    """Wins of `saliency_wins` by level; levels that no query has are left out."""
    if answers.saliency is None:
        return {}
    assert answers.inside is not None
    assert answers.text_valid is not None
    wins, counted = saliency_wins(answers.saliency, answers.inside, answers.text_valid)
    values = wins.astype(object)  # [level, query]
    values[~counted] = None
    return {
        f"level_{level}": row.tolist()
        for level, row in enumerate(values, start=1)
        if counted[level - 1].any()
    }


def _known(
    values: Sequence[float | bool | None], vids: Sequence[str]
) -> tuple[Float[np.ndarray, " query"], list[str]]:
    """The values that are there, with their videos."""
    pairs = [(value, vid) for value, vid in zip(values, vids, strict=True) if value is not None]
    return np.array([value for value, _ in pairs], dtype=float), [vid for _, vid in pairs]


def _mean(
    values: Float[np.ndarray, " query"], vids: Sequence[str], resamples: int, seed: int
) -> Interval:
    ends = mean_interval(values, vids, resamples=resamples, seed=seed) if resamples else None
    return _interval(values.mean(), ends)


def _means(
    values: Float[np.ndarray, "query metric"], vids: Sequence[str], resamples: int, seed: int
) -> dict[str, Interval]:
    """The means of the columns, which are those of `METRICS`."""
    ends = mean_interval(values, vids, resamples=resamples, seed=seed) if resamples else None
    return _by_metric(values.mean(axis=0), ends)


def _gap(
    trivial: Float[np.ndarray, "trivial metric"],
    novel: Float[np.ndarray, "novel metric"],
    trivial_vids: Sequence[str],
    novel_vids: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    ends = None
    if resamples:
        ends = composition_gap_interval(
            trivial, novel, trivial_vids, novel_vids, resamples=resamples, seed=seed
        )
    return _by_metric(composition_gap(trivial, novel), ends)


def _by_metric(
    values: Float[np.ndarray, " metric"], ends: Float[np.ndarray, "2 metric"] | None
) -> dict[str, Interval]:
    return {
        name: _interval(value, None if ends is None else ends[:, index])
        for index, (name, value) in enumerate(zip(METRICS, values, strict=True))
    }


def _interval(value: float, ends: Float[np.ndarray, " 2"] | None) -> Interval:
    low, high = (None, None) if ends is None else map(float, ends)
    return {"value": float(value), "low": low, "high": high}
