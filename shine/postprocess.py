"""From the moments that a model ranks to those it answers with, corrected or as published."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from shine.config import EvaluateConfig
from shine.spans import temporal_nms

MOST = 10  # moments of a query that enter non-maximum suppression


class Ranked(NamedTuple):
    """Moments with their scores, best first; NaN after the last that is left."""

    moments: Float[np.ndarray, "row slot 2"]  # seconds
    scores: Float[np.ndarray, "row slot"]


def finish(
    moments: Float[np.ndarray, "row slot 2"],
    scores: Float[np.ndarray, "row slot"],
    durations: Float[np.ndarray, " row"],
    settings: EvaluateConfig,
) -> Ranked:
    """The moments after everything that `settings` asks for.

    Args:
        moments: `[start, end]` in seconds, best first.
        scores: in [0, 1], descending.
        durations: seconds of each row's video.
        settings: `compat` chooses between `corrected` and `published`.
    """
    if settings.compat == "reference":
        ranked = published(
            moments,
            scores,
            limit_seconds=settings.limit_seconds,
            round_seconds=settings.round_seconds,
        )
    else:
        ranked = corrected(moments, scores, durations, round_seconds=settings.round_seconds)
    if settings.nms_threshold is not None:
        ranked = suppressed(*ranked, settings.nms_threshold)
    return ranked


def corrected(
    moments: Float[np.ndarray, "row slot 2"],
    scores: Float[np.ndarray, "row slot"],
    durations: Float[np.ndarray, " row"],
    *,
    round_seconds: float | None,
) -> Ranked:
    """Moments snapped to multiples of `round_seconds`, cut to their video, none without length."""
    if round_seconds is not None:
        moments = _snapped(moments, round_seconds)
    moments = np.clip(moments, 0.0, durations[:, None, None])
    return _kept(moments, scores, moments[..., 0] < moments[..., 1])


def published(
    moments: Float[np.ndarray, "row slot 2"],
    scores: Float[np.ndarray, "row slot"],
    *,
    limit_seconds: float | None,
    round_seconds: float | None,
) -> Ranked:
    """Numbers of four decimals, cut to `limit_seconds` whatever the video, then snapped.

    A moment may lose all its length and stays; without a limit it may leave its video.
    """
    moments, scores = _four_decimals(moments), _four_decimals(scores)
    if limit_seconds is not None:
        moments = np.clip(moments, 0.0, limit_seconds)
    if round_seconds is not None:
        moments = _snapped(moments, round_seconds)
    return Ranked(moments, scores)


def suppressed(
    moments: Float[np.ndarray, "row slot 2"],
    scores: Float[np.ndarray, "row slot"],
    threshold: float,
) -> Ranked:
    """The first ten without those that overlap a better one by more than `threshold`."""
    moments, scores = moments[:, :MOST], scores[:, :MOST]
    keep = temporal_nms(
        torch.from_numpy(np.nan_to_num(moments)),
        torch.from_numpy(np.nan_to_num(scores, nan=-1.0)),
        threshold,
    )
    return _kept(moments, scores, keep.numpy())


def _kept(
    moments: Float[np.ndarray, "row slot 2"],
    scores: Float[np.ndarray, "row slot"],
    keep: Bool[np.ndarray, "row slot"],
) -> Ranked:
    """The moments of the mask by score, equal scores in their order, then NaN."""
    scores = np.where(keep, scores, np.nan)
    order = np.argsort(-scores, axis=1, kind="stable")  # NaN comes last
    moments = np.where(keep[..., None], moments, np.nan)
    return Ranked(
        np.take_along_axis(moments, order[..., None], axis=1),
        np.take_along_axis(scores, order, axis=1),
    )


def _snapped(
    moments: Float[np.ndarray, "row slot 2"], step: float
) -> Float[np.ndarray, "row slot 2"]:
    """Ends at the nearest multiple of `step`, halfway ones at the even multiple."""
    return np.round(moments / step) * step


def _four_decimals(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The numbers as a file with four decimals holds them."""
    written = [float(f"{value:.4f}") for value in values.ravel().tolist()]
    return np.array(written).reshape(values.shape)
