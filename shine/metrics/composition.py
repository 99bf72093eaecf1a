"""What compositional grounding asks beyond recall: the gap to new pairs, and saliency that reads.

A model may locate moments from a single word. Two figures show whether it reads the sentence: how
much it loses on pairs of words it never saw together, and whether its saliency prefers the true
query to one with words altered.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from shine.metrics.bootstrap import RESAMPLES, difference_interval


def composition_gap(
    trivial: Float[np.ndarray, "trivial metric"],
    novel: Float[np.ndarray, "novel metric"],
) -> Float[np.ndarray, " metric"]:
    """Mean over test-trivial queries minus mean over novel-composition queries, per metric."""
    return np.nanmean(trivial, axis=0) - np.nanmean(novel, axis=0)


def composition_gap_interval(
    trivial: Float[np.ndarray, "trivial metric"],
    novel: Float[np.ndarray, "novel metric"],
    trivial_videos: Sequence[str],
    novel_videos: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[np.ndarray, "2 metric"]:
    """Low and high end of the 95 % interval of `composition_gap`, resampling videos."""
    return difference_interval(
        trivial, novel, trivial_videos, novel_videos, resamples=resamples, seed=seed
    )


def saliency_wins(
    saliency: Float[np.ndarray, "text query clip"],
    inside: Bool[np.ndarray, "query clip"],
    valid: Bool[np.ndarray, "text query"],
) -> tuple[Bool[np.ndarray, "level query"], Bool[np.ndarray, "level query"]]:
    """Whether the true query beats each of its negatives inside its moment, and where that counts.

    It wins where its mean saliency over the clips of the moment is strictly higher than the
    negative's mean over the same clips; a non-finite mean never wins.

    Args:
        saliency: logits; text 0 is the query, texts 1.. its negatives, least altered first.
        inside: True on real clips that overlap the query's moment.
        valid: False where a query lacks that text.

    Returns:
        Two masks: the wins, and the pairs that count, which have both texts and an inside clip.
    """
    # [text, query]; padding clips may hold anything, NaN included, so they are not multiplied by 0.
    total = np.where(inside, saliency, 0.0).sum(axis=2)
    mean = total / np.maximum(inside.sum(axis=1), 1)
    counted = valid[1:] & valid[:1] & inside.any(axis=1)
    return (mean[:1] > mean[1:]) & counted, counted
