"""Clips of one length made of clips of another."""

from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Float

Pool = Literal["mean", "max", "nearest"]


def num_pooled(num_clips: int, clip_seconds: float, pooled_seconds: float) -> int:
    """How many clips of `pooled_seconds` cover `num_clips` of `clip_seconds`."""
    old, new = _ticks(clip_seconds, pooled_seconds)
    return -(-num_clips * old // new)


def pool_clips(
    clips: Float[np.ndarray, "clip feature"],
    clip_seconds: float,
    pooled_seconds: float,
    pool: Pool,
) -> Float[np.ndarray, "pooled feature"]:
    """The same video in clips of `pooled_seconds`; the last one may be partial.

    A new clip is the mean of the clips that it overlaps in time, weighted by how long; their
    maximum; or the one at its center, the earlier of two. It may also be shorter than they are.

    Args:
        clips: of `clip_seconds` each, from the start of the video.
        clip_seconds: of a clip.
        pooled_seconds: of a new clip.
        pool: which of the three.
    """
    old, new = _ticks(clip_seconds, pooled_seconds)
    if old == new:
        return clips
    end = len(clips) * old
    starts = np.arange(num_pooled(len(clips), clip_seconds, pooled_seconds)) * new
    if pool == "nearest":
        centers = starts + np.minimum(starts + new, end)  # in half ticks
        return clips[(centers - 1) // (2 * old)]
    # The video is cut wherever a clip of either length begins.
    cuts = np.union1d(np.arange(len(clips)) * old, starts)
    pieces = clips[cuts // old]
    first = np.searchsorted(cuts, starts)
    if pool == "max":
        return np.maximum.reduceat(pieces, first)
    ticks = np.diff(cuts, append=end)
    covered = np.minimum(starts + new, end) - starts
    weights = (ticks / covered[cuts // new]).astype(np.float32)
    return np.add.reduceat(pieces * weights[:, None], first)


def _ticks(clip_seconds: float, pooled_seconds: float) -> tuple[int, int]:
    """Both lengths in whole numbers of a common unit."""
    if pooled_seconds < clip_seconds:
        new, old = _ticks(pooled_seconds, clip_seconds)
        return old, new
    ratio = Fraction(pooled_seconds / clip_seconds).limit_denominator(10**6)
    return ratio.denominator, ratio.numerator
