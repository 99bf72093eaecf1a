"""Recall and IoU of predicted moments, one value per query; means are the caller's.

Follows the evaluators of the field: the overlap of a pair is intersection over hull, which equals
intersection over union wherever two moments meet. Non-finite and inverted predictions are misses.
"""

import numpy as np
from jaxtyping import Bool, Float

THRESHOLDS = (0.3, 0.5, 0.7)  # IoU, of the tables of compositional grounding
METRICS = (*(f"R1@{threshold}" for threshold in THRESHOLDS), "mIoU")


def hull_iou(
    first: Float[np.ndarray, "*#pair 2"], second: Float[np.ndarray, "*#pair 2"]
) -> Float[np.ndarray, "*#pair"]:
    """Intersection over hull of paired moments; 0 for inverted or non-finite ones or a zero hull.

    Args:
        first: `[start, end]` in any one unit; the leading axes broadcast with `second`.
        second: the other moment of each pair.
    """
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        shared = np.minimum(first[..., 1], second[..., 1]) - np.maximum(
            first[..., 0], second[..., 0]
        )
        hull = np.maximum(first[..., 1], second[..., 1]) - np.minimum(first[..., 0], second[..., 0])
    counts = (shared > 0) & (hull > 0) & np.isfinite(hull)
    return np.divide(shared, hull, out=np.zeros(hull.shape), where=counts)


def best_iou(
    predicted: Float[np.ndarray, "query rank 2"],
    moments: Float[np.ndarray, "query moment 2"],
    moment_mask: Bool[np.ndarray, "query moment"],
) -> Float[np.ndarray, "query rank"]:
    """IoU of every prediction with the annotated moment it meets best; 0 without a moment.

    Args:
        predicted: `[start, end]` in seconds.
        moments: annotated moments in seconds, padded.
        moment_mask: True on the moments that count.
    """
    pairs = hull_iou(predicted[:, :, None], moments[:, None])  # [query, rank, moment]
    return np.where(moment_mask[:, None], pairs, 0.0).max(axis=2)


def top1_iou(
    predicted: Float[np.ndarray, "query 2"],
    moments: Float[np.ndarray, "query moment 2"],
    moment_mask: Bool[np.ndarray, "query moment"],
) -> Float[np.ndarray, " query"]:
    """`best_iou` of the first prediction of each query."""
    return best_iou(predicted[:, None], moments, moment_mask)[:, 0]


def per_query(iou: Float[np.ndarray, " query"]) -> Float[np.ndarray, "query metric"]:
    """What each query adds to each of `METRICS`: its hits (0 or 1) and its IoU.

    The mean over the first axis is the table of a split; keeping the rows lets an interval
    resample them.
    """
    hits = iou[:, None] >= np.array(THRESHOLDS)
    return np.concatenate([hits.astype(float), iou[:, None]], axis=1)
