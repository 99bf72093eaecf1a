"""Clips of a video against its seconds: the rules that training follows and a check foretells."""

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_DERIVED = 0.1  # of the videos of a split may have other seconds per clip than stated


def clip_strides(
    durations: Float[np.ndarray, " row"], num_clips: Int[np.ndarray, " row"], nominal: float
) -> tuple[Float[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """Seconds of a clip of each video, and where they are derived from its duration.

    Clips of `nominal` seconds tile a video up to one clip; where they do not, the true stride is
    the duration over their number.
    """
    derived = np.abs(num_clips * nominal - durations) > nominal
    return np.where(derived, durations / num_clips, nominal), derived


def too_many_derived(num_derived: int, num_videos: int) -> bool:
    """Whether so many videos depart from the stated stride that the statement is wrong."""
    return num_derived > max(1, MOST_DERIVED * num_videos)


def other_duration(
    durations: Float[np.ndarray, " row"], first: Float[np.ndarray, " row"], nominal: float
) -> Bool[np.ndarray, " row"]:
    """Where a row gives its video another duration than the first row of the video did."""
    return np.abs(durations - first) > nominal


def kept_clips(
    stored: Int[np.ndarray, " row"], max_clips: int | None, *, reference: bool
) -> Int[np.ndarray, " row"]:
    """Clips of each video that are used; 0 where none is left.

    Published: without a limit, the default of -1 ends a slice, which cuts the last clip.
    """
    if max_clips is not None:
        return stored.clip(max=max_clips)
    return stored - 1 if reference else stored


def begins_in_reach(
    start: Float[np.ndarray, "row moment"],
    clip_seconds: Float[np.ndarray, " row"],
    num_clips: Int[np.ndarray, " row"],
) -> Bool[np.ndarray, "row moment"]:
    """Which moments begin in the kept clips, or within a clip after them."""
    return start < (clip_seconds * num_clips + clip_seconds)[:, None]
