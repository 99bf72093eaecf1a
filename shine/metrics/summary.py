"""From the answers of a model to `evaluation.json`, and the difference of two such files.

The file holds every figure with its interval, and the per-query values behind them, so that two
runs can be compared on the same queries later.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, get_args

import numpy as np
from jaxtyping import Bool, Float

from shine.metrics.bootstrap import LEVEL, RESAMPLES, mean_interval
from shine.metrics.composition import composition_gap, composition_gap_interval, saliency_wins
from shine.metrics.figures import HEADLINE, moment_figures
from shine.metrics.highlights import Highlights, highlight_figures
from shine.metrics.official import Evaluator, official_report

T = TypeVar("T")

TRIVIAL, NOVEL = "test_trivial", "novel_composition"  # the two splits of the composition gap


class Interval(TypedDict):
    """A figure and its 95 % interval; the ends are None where none was asked for or can be made."""

    value: float
    low: float | None
    high: float | None


class Queries(TypedDict):
    """Per-query values of a split, in one order."""

    qid: list[str]
    vid: list[str]
    values: dict[str, list[float | None]]  # by figure; None where it does not ask about the query
    saliency_wins: dict[str, list[bool | None]]  # by level; None where the query lacks it


class SplitSummary(TypedDict):
    """Figures of one split, as fractions in [0, 1]."""

    num_queries: int
    num_videos: int
    num_unanswered: int  # queries without any prediction: recall misses them, mAP leaves them out
    metrics: dict[str, Interval]
    saliency_sanity: dict[str, Interval]  # by level; empty without negatives
    queries: Queries


class Bootstrap(TypedDict):
    """How the intervals were made."""

    resamples: int
    seed: int
    level: float
    cluster: str


class FileEvaluation(SplitSummary):
    """What is known of a prediction file; `metrics` has every figure of every length."""

    predictions: str
    annotations: str
    bootstrap: Bootstrap
    official: dict[str, dict[str, Any]]  # report by evaluator, in percent, rounded


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
    predicted: Float[np.ndarray, "query rank 2"]  # seconds, best first; NaN after the last
    scores: Float[np.ndarray, "query rank"]  # NaN after the last
    moments: Float[np.ndarray, "query moment 2"]  # annotated, seconds, padded
    moment_mask: Bool[np.ndarray, "query moment"]
    highlights: Highlights | None = None  # None: no labels, or no saliency
    # Text 0 is the query, texts 1.. its negatives, least altered first. None: no negatives.
    saliency: Float[np.ndarray, "text query clip"] | None = None
    inside: Bool[np.ndarray, "query clip"] | None = None  # real clips that overlap a moment
    text_valid: Bool[np.ndarray, "text query"] | None = None


def evaluate_split(answers: Answers, *, resamples: int = RESAMPLES, seed: int = 0) -> SplitSummary:
    """The figures of `HEADLINE` that one split has.

    Args:
        answers: at least one query.
        resamples: of each interval; 0 leaves the intervals None.
        seed: of the resamples.
    """
    figures = figures_of(answers)
    chosen = {name: figures[name] for name in HEADLINE if name in figures}
    return _summary(answers, chosen, resamples, seed)


def evaluate_file(
    answers: Answers,
    *,
    predictions: str,
    annotations: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> FileEvaluation:
    """Every figure of a prediction file, beside the reports of the official evaluators.

    Args:
        answers: at least one query.
        predictions: the file of the predictions.
        annotations: the file of the ground truth.
        resamples: of each interval; 0 leaves the intervals None.
        seed: of the resamples.
    """
    figures = figures_of(answers)
    evaluators: tuple[Evaluator, ...] = get_args(Evaluator)
    return {
        "predictions": predictions,
        "annotations": annotations,
        "bootstrap": _bootstrap(resamples, seed),
        "official": {evaluator: official_report(figures, evaluator) for evaluator in evaluators},
        **_summary(answers, figures, resamples, seed),
    }


def figures_of(answers: Answers) -> dict[str, Float[np.ndarray, " query"]]:
    """Every figure of a split, one value per query, NaN where it does not ask about the query."""
    figures = moment_figures(
        answers.predicted, answers.scores, answers.moments, answers.moment_mask
    )
    if answers.highlights is not None:
        figures |= highlight_figures(answers.highlights)
    return figures


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
        gap = _gap(
            _columns(trivial["values"]),
            _columns(novel["values"]),
            trivial["vid"],
            novel["vid"],
            resamples,
            seed,
        )
    return {
        "checkpoint": checkpoint,
        "simulated": simulated,
        "negatives": negatives,
        "bootstrap": _bootstrap(resamples, seed),
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
        name: _change(own["values"], other["values"]) for name, (own, other) in pairs.items()
    }
    splits: dict[str, SplitComparison] = {
        name: {
            "metrics": _means(changes[name], own["vid"], resamples, seed),
            "saliency_sanity": _means(
                _change(own["saliency_wins"], other["saliency_wins"]), own["vid"], resamples, seed
            ),
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
        "values": _reordered(queries["values"], order),
        "saliency_wins": _reordered(queries["saliency_wins"], order),
    }


def _reordered(columns: Mapping[str, list[T]], order: Sequence[int]) -> dict[str, list[T]]:
    return {name: [values[index] for index in order] for name, values in columns.items()}


def _columns(
    values: Mapping[str, Sequence[float | bool | None]],
) -> dict[str, Float[np.ndarray, " query"]]:
    """The columns as numbers, with NaN for None."""
    return {name: np.array(column, dtype=float) for name, column in values.items()}


def _change(
    first: Mapping[str, Sequence[float | bool | None]],
    second: Mapping[str, Sequence[float | bool | None]],
) -> dict[str, Float[np.ndarray, " query"]]:
    """Second minus first, per query, of the columns that both have."""
    before, after = _columns(first), _columns(second)
    return {name: after[name] - before[name] for name in before if name in after}


def _summary(
    answers: Answers,
    figures: Mapping[str, Float[np.ndarray, " query"]],
    resamples: int,
    seed: int,
) -> SplitSummary:
    assert len(answers.qids) == len(answers.vids) == len(answers.predicted) > 0
    queries: Queries = {
        "qid": [str(qid) for qid in answers.qids],
        "vid": [str(vid) for vid in answers.vids],
        "values": {
            name: [None if math.isnan(value) else value for value in values.tolist()]
            for name, values in figures.items()
        },
        "saliency_wins": _wins_by_level(answers),
    }
    return {
        "num_queries": len(answers.qids),
        "num_videos": len(set(queries["vid"])),
        "num_unanswered": int(np.isnan(answers.scores[:, 0]).sum()),
        "metrics": _means(figures, queries["vid"], resamples, seed),
        "saliency_sanity": _means(
            _columns(queries["saliency_wins"]), queries["vid"], resamples, seed
        ),
        "queries": queries,
    }


def _bootstrap(resamples: int, seed: int) -> Bootstrap:
    return {"resamples": resamples, "seed": seed, "level": LEVEL, "cluster": "video"}


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


def _means(
    columns: Mapping[str, Float[np.ndarray, " query"]],
    vids: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """The mean of each column over the queries that it knows; a column without any is left out."""
    known = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    if not known:
        return {}
    table = np.stack(list(known.values()), axis=1)  # [query, metric]
    ends = mean_interval(table, vids, resamples=resamples, seed=seed) if resamples else None
    return _by_name(known, np.nanmean(table, axis=0), ends)


def _gap(
    trivial: Mapping[str, Float[np.ndarray, " trivial"]],
    novel: Mapping[str, Float[np.ndarray, " novel"]],
    trivial_vids: Sequence[str],
    novel_vids: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    names = [
        name
        for name, values in trivial.items()
        if name in novel and not np.isnan(values).all() and not np.isnan(novel[name]).all()
    ]
    if not names:
        return {}
    first, second = (
        np.stack([columns[name] for name in names], axis=1) for columns in (trivial, novel)
    )
    ends = None
    if resamples:
        ends = composition_gap_interval(
            first, second, trivial_vids, novel_vids, resamples=resamples, seed=seed
        )
    return _by_name(names, composition_gap(first, second), ends)


def _by_name(
    names: Iterable[str],
    values: Float[np.ndarray, " metric"],
    ends: Float[np.ndarray, "2 metric"] | None,
) -> dict[str, Interval]:
    return {
        name: _interval(value, None if ends is None else ends[:, index])
        for index, (name, value) in enumerate(zip(names, values, strict=True))
    }


def _interval(value: float, ends: Float[np.ndarray, " 2"] | None) -> Interval:
    if ends is None or np.isnan(ends).any():
        return {"value": float(value), "low": None, "high": None}
    return {"value": float(value), "low": float(ends[0]), "high": float(ends[1])}
