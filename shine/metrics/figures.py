"""Every figure of a table, one value per query; means, intervals and comparisons follow from them.

A query that a figure does not ask about holds NaN there: one without a moment of that length, one
without highlight labels, and in mean average precision one without a prediction.
"""

import numpy as np
from jaxtyping import Bool, Float

from shine.metrics.average_precision import THRESHOLDS, average_precision
from shine.metrics.recall import METRICS, best_iou

BUCKETS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150)}  # seconds, (low, high]
RECALLS = (0.3, *THRESHOLDS)  # IoU thresholds of R1
# The figures of a run: recall, precision over all lengths, and the strictest level of highlights.
HEADLINE = (
    *METRICS,
    "R5@0.5",
    "R5@0.7",
    "mAP",
    "HL-min-VeryGood-mAP",
    "HL-min-VeryGood-Hit1",
)


def moment_figures(
    predicted: Float[np.ndarray, "query rank 2"],
    scores: Float[np.ndarray, "query rank"],
    moments: Float[np.ndarray, "query moment 2"],
    moment_mask: Bool[np.ndarray, "query moment"],
) -> dict[str, Float[np.ndarray, " query"]]:
    """`R1@t`, `R5@t`, `mIoU`, `mAP@t` and `mAP` by name; with the prefix of a bucket for a length.

    A bucket keeps the annotated moments of its lengths and all predictions; one without any moment
    is left out.

    Args:
        predicted: `[start, end]` in seconds, best first; NaN after the last of a query.
        scores: higher is better; NaN after the last.
        moments: annotated moments in seconds, padded.
        moment_mask: True on real moments, at least one per query.
    """
    figures = _figures(predicted, scores, moments, moment_mask)
    length = moments[..., 1] - moments[..., 0]
    for name, (low, high) in BUCKETS.items():
        inside = moment_mask & (low < length) & (length <= high)
        if inside.any():
            bucket = _figures(predicted, scores, moments, inside)
            figures |= {f"{name}-{figure}": values for figure, values in bucket.items()}
    return figures


def _figures(
    predicted: Float[np.ndarray, "query rank 2"],
    scores: Float[np.ndarray, "query rank"],
    moments: Float[np.ndarray, "query moment 2"],
    moment_mask: Bool[np.ndarray, "query moment"],
) -> dict[str, Float[np.ndarray, " query"]]:
    iou = best_iou(predicted[:, :5], moments, moment_mask)  # [query, rank]
    first, five = iou[:, 0], iou.max(axis=1)
    figures = {f"R1@{threshold}": (first >= threshold).astype(float) for threshold in RECALLS}
    figures |= {f"R5@{threshold}": (five >= threshold).astype(float) for threshold in (0.5, 0.7)}
    figures["mIoU"] = first
    counts = moment_mask.any(axis=1)
    figures = {name: np.where(counts, values, np.nan) for name, values in figures.items()}
    precision = average_precision(predicted, scores, moments, moment_mask)
    figures |= {f"mAP@{t}": precision[:, index] for index, t in enumerate(THRESHOLDS)}
    figures["mAP"] = precision.mean(axis=1)
    return figures
