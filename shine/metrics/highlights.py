"""Highlight detection: does the saliency of clips follow what annotators scored?

The rule is that of the QVHighlights evaluator. A clip is a highlight of an annotator at a level if
the score reaches it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}  # least score of a highlight, of 0 to 4


@dataclass(frozen=True)
class Highlights:
    """The saliency that a model gives to the clips of each query, and what annotators gave."""

    saliency: Float[np.ndarray, "query predicted"]  # logits; NaN after the last of a query
    relevance: Int[np.ndarray, "query clip annotator"]  # 0 on clips that none was asked about
    num_clips: Int[np.ndarray, " query"]  # of the video; 0 where a query has no labels


def highlight_figures(highlights: Highlights) -> dict[str, Float[np.ndarray, " query"]]:
    """AP and HIT@1 of each query at each level, under the published names; NaN without labels."""
    figures = {}
    labelled = highlights.num_clips > 0
    for name, least in LEVELS.items():
        positive = highlights.relevance >= least
        precision = highlight_ap(highlights.saliency, positive, highlights.num_clips)
        hit = highlight_hit(highlights.saliency, positive)
        figures[f"HL-min-{name}-mAP"] = np.where(labelled, precision, np.nan)
        figures[f"HL-min-{name}-Hit1"] = np.where(labelled, hit, np.nan)
    return figures


def highlight_hit(
    saliency: Float[np.ndarray, "query predicted"],
    positive: Bool[np.ndarray, "query clip annotator"],
) -> Float[np.ndarray, " query"]:
    """1 where any annotator calls the most salient clip a highlight, the first of equals; else 0.

    All clips that were predicted take part; one after the labelled clips is no highlight.
    """
    top = np.where(np.isnan(saliency), -np.inf, saliency).argmax(axis=1)
    inside = np.minimum(top, positive.shape[1] - 1)
    hit = positive[np.arange(len(top)), inside].any(axis=1) & (top < positive.shape[1])
    return hit.astype(float)


def highlight_ap(
    saliency: Float[np.ndarray, "query predicted"],
    positive: Bool[np.ndarray, "query clip annotator"],
    num_clips: Int[np.ndarray, " query"],
) -> Float[np.ndarray, " query"]:
    """Mean over annotators of the AP of the clips ranked by saliency, 0 for one without highlights.

    Predictions are cut to `num_clips`, or filled with saliency 0. Clips of equal saliency enter
    together; AP is the mean, over the points where recall grows, of the best precision at that
    recall or a higher one.
    """
    clips = positive.shape[1]
    missing = max(clips - saliency.shape[1], 0)
    scores = np.nan_to_num(np.pad(saliency, ((0, 0), (0, missing)))[:, :clips], nan=0.0)
    scores = np.where(np.arange(clips) < num_clips[:, None], scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    scores = np.take_along_axis(scores, order, axis=1)
    ranked = np.take_along_axis(positive, order[..., None], axis=1)

    # Padding ranks last and holds no highlight, so it adds no point where recall grows.
    last = np.ones(scores.shape, dtype=bool)  # of the clips of equal saliency
    last[:, :-1] = scores[:, 1:] != scores[:, :-1]
    last = last[..., None]  # [query, clip, 1]
    found = ranked.cumsum(axis=1)  # [query, clip, annotator]
    precision = np.where(last, found / np.arange(1, clips + 1)[:, None], 0.0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.maximum.accumulate(np.where(last, found, 0), axis=1)
    grows = np.diff(reached, axis=1, prepend=0) > 0
    total, points = np.where(grows, best, 0.0).sum(axis=1), grows.sum(axis=1)
    return np.divide(total, points, out=np.zeros(total.shape), where=points > 0).mean(axis=1)
