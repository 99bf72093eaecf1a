"""Average precision of ranked moments, one value per query and IoU threshold.

The rule is that of the QVHighlights evaluator: ten predictions count, precision is interpolated as
in PASCAL VOC 2011, and each annotated moment can be found once.
"""

import numpy as np
from jaxtyping import Bool, Float

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # IoU, 0.5 to 0.95
MOST = 10  # predictions of a query that count


def average_precision(
    predicted: Float[np.ndarray, "query rank 2"],
    scores: Float[np.ndarray, "query rank"],
    moments: Float[np.ndarray, "query moment 2"],
    moment_mask: Bool[np.ndarray, "query moment"],
) -> Float[np.ndarray, "query threshold"]:
    """AP of each query at each of `THRESHOLDS`; NaN without a prediction or without a moment.

    The first ten predictions of the list are taken and then ranked by score, equal scores in the
    order of the list. A prediction is right at a threshold if an annotated moment that no better
    one has found overlaps it so far; it finds the one that it overlaps most, the later of equals.

    Args:
        predicted: `[start, end]` in seconds; NaN after the last prediction of a query.
        scores: higher is better; NaN after the last.
        moments: annotated moments in seconds, padded.
        moment_mask: True on the moments that count.
    """
    order = np.argsort(-scores[:, :MOST], axis=1, kind="stable")  # NaN comes last
    ranked = np.take_along_axis(predicted, order[..., None], axis=1)
    overlap = np.where(moment_mask[:, None], union_iou(ranked, moments), -1.0)
    right = _right(overlap)  # [query, rank, threshold]
    num_moments = np.maximum(moment_mask.sum(axis=1), 1)[:, None, None]
    rank = np.arange(1, right.shape[1] + 1)[:, None]
    found = np.cumsum(right, axis=1)
    recall = found / num_moments
    # Predictions after the last are wrong ones at the end: they lower no precision that counts.
    precision = np.maximum.accumulate((found / rank)[:, ::-1], axis=1)[:, ::-1]
    gained = np.diff(recall, axis=1, prepend=0.0)
    nothing = np.isnan(scores[:, :1]) | ~np.any(moment_mask, axis=1, keepdims=True)
    return np.where(nothing, np.nan, (gained * precision).sum(axis=1))


def union_iou(
    predicted: Float[np.ndarray, "query rank 2"], moments: Float[np.ndarray, "query moment 2"]
) -> Float[np.ndarray, "query rank moment"]:
    """Intersection over union of every pair; 0 where a moment is inverted, empty or NaN."""
    first, second = predicted[:, :, None], moments[:, None]
    shared = np.minimum(first[..., 1], second[..., 1]) - np.maximum(first[..., 0], second[..., 0])
    union = (first[..., 1] - first[..., 0]) + (second[..., 1] - second[..., 0]) - shared
    counts = (shared > 0) & (union > 0)
    return np.divide(shared, union, out=np.zeros(shared.shape), where=counts)


def _right(
    overlap: Float[np.ndarray, "query rank moment"],
) -> Bool[np.ndarray, "query rank threshold"]:
    """Whether each prediction finds a moment that none before it found; padding overlaps by -1."""
    num_queries, num_ranks, num_moments = overlap.shape
    thresholds = np.array(THRESHOLDS)
    right = np.zeros((num_queries, num_ranks, len(thresholds)), dtype=bool)
    taken = np.zeros((num_queries, len(thresholds), num_moments), dtype=bool)
    for rank in range(num_ranks):
        own = overlap[:, rank, None]  # [query, 1, moment]
        free = np.where((own >= thresholds[:, None]) & ~taken, own, -1.0)
        latest = num_moments - 1 - free[..., ::-1].argmax(axis=2)  # [query, threshold]
        best = np.arange(num_moments) == latest[..., None]
        right[:, rank] = free.max(axis=2) >= 0
        taken |= best & right[:, rank, :, None]
    return right
