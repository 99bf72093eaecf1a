"""Percentile bootstrap intervals of means, resampling videos.

Queries of one video share its clips, so they are not independent: a resample draws videos with
replacement and takes all queries of each (the cluster bootstrap of Field and Welsh, 2007). The
intervals speak about the choice of test videos, not about the seed of a training.

A query may hold NaN in a column: it then takes no part in the mean of that column.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
RESAMPLES = 1000
_CHUNK_NUMBERS = 1 << 21  # 16 MiB of weights at a time


def mean_interval(
    values: Float[np.ndarray, "query ..."],
    videos: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Float[np.ndarray, "2 ..."]:
    """Low and high end of the interval of the mean over queries.

    Args:
        values: one row per query; the columns share their resamples.
        videos: the video of each query.
        resamples: how many means the percentiles are taken from, at least 1.
        seed: of the resamples; equal arguments give equal intervals.
        level: share of the resampled means between the two ends.
    """
    names, code = np.unique(np.asarray(videos), return_inverse=True)
    means = np.concatenate(
        [
            _weighted_mean(weights, values, code)
            for weights in _resamples(len(names), resamples, seed)
        ]
    )
    return _percentiles(means, level)


def difference_interval(
    first: Float[np.ndarray, "first ..."],
    second: Float[np.ndarray, "second ..."],
    first_videos: Sequence[str],
    second_videos: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Float[np.ndarray, "2 ..."]:
    """Low and high end of the interval of mean(first) - mean(second) for two sets of queries.

    Videos are drawn from both sets together, so a video that has queries in both keeps them
    together and their correlation counts. Resamples that miss one set altogether are left out.
    """
    together = np.concatenate([np.asarray(first_videos), np.asarray(second_videos)])
    names, code = np.unique(together, return_inverse=True)
    differences = np.concatenate(
        [
            _weighted_mean(weights, first, code[: len(first)])
            - _weighted_mean(weights, second, code[len(first) :])
            for weights in _resamples(len(names), resamples, seed)
        ]
    )
    return _percentiles(differences, level)


def _resamples(
    num_videos: int, resamples: int, seed: int
) -> Iterator[Float[np.ndarray, "resample video"]]:
    """How often each video is drawn, in chunks; the chunk size changes no number."""
    rng = np.random.default_rng(seed)
    even = np.full(num_videos, 1 / num_videos)
    chunk = max(1, _CHUNK_NUMBERS // num_videos)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        yield rng.multinomial(num_videos, even, size=size).astype(float)


def _weighted_mean(
    weights: Float[np.ndarray, "resample video"],
    values: Float[np.ndarray, "query ..."],
    code: np.ndarray,
) -> Float[np.ndarray, "resample ..."]:
    """Mean over the queries of the drawn videos; NaN where none of these has a value."""
    counted = ~np.isnan(values)
    sums = np.zeros((weights.shape[1], *values.shape[1:]))
    counts = np.zeros_like(sums)
    np.add.at(sums, code, np.where(counted, values, 0.0))
    np.add.at(counts, code, counted)
    total, number = (np.tensordot(weights, part, axes=1) for part in (sums, counts))
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def _percentiles(
    means: Float[np.ndarray, "resample ..."], level: float
) -> Float[np.ndarray, "2 ..."]:
    """Over the resamples that have a mean; NaN where none has."""
    ends = np.full((2, *means.shape[1:]), np.nan)
    known = ~np.isnan(means).all(axis=0)
    shares = [(1 - level) / 2, (1 + level) / 2]
    ends[:, known] = np.nanquantile(means[:, known], shares, axis=0)
    return ends
