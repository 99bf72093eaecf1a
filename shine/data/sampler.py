"""The order of the rows and the partners of a training, a function of (seed, epoch) alone.

Nothing here knows of workers: `GlobalBatch` is what a step of the whole run consumes, and
`shine.data.dataset.collate` cuts a worker's share from it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows of one step with, for each, the row whose query serves as its negative query."""

    rows: Int[np.ndarray, " row"]
    partners: Int[np.ndarray, " row"]  # -1 where the row has none
    draws: Float[np.ndarray, "row 4"]  # in [0, 1), for what else a step chooses at random


def epoch_batches(
    lengths: Int[np.ndarray, " row"],
    videos: Int[np.ndarray, " row"],
    texts: Int[np.ndarray, " row"],
    *,
    batch_size: int,
    bucket_batches: int,
    seed: int,
    epoch: int,
    next_row: bool = False,
) -> list[GlobalBatch]:
    """The batches of one epoch: every row once, the last batch shorter where they do not divide.

    One permutation of all rows; inside windows of `bucket_batches` batches the rows are sorted by
    length, so that a batch pads little; the order of the batches is then shuffled.

    Args:
        lengths: clips of each row's video.
        videos: a number for each row's video.
        texts: a number for each row's text, equal for equal texts.
        batch_size: rows of a step of the whole run.
        bucket_batches: batches in a window; 1 does not sort.
        seed: of the run.
        epoch: counted from 0.
        next_row: the partner of a row is the next one of its batch, of the last the first, as
            published; it may be of the same video, have the same text or be the row itself.
    """
    random = np.random.default_rng([seed, epoch])
    draws = np.random.default_rng([seed, epoch, 1]).random((len(lengths), 4))  # of each row
    order = random.permutation(len(lengths))
    window = batch_size * bucket_batches
    order = np.concatenate(
        [
            part[np.argsort(lengths[part], kind="stable")]
            for part in np.split(order, range(window, len(order), window))
        ]
    )
    batches = np.split(order, range(batch_size, len(order), batch_size))
    shuffled = [batches[index] for index in random.permutation(len(batches))]
    if next_row:
        return [GlobalBatch(rows, np.roll(rows, -1), draws[rows]) for rows in shuffled]
    return [
        GlobalBatch(rows, partners(videos[rows], texts[rows], rows, random), draws[rows])
        for rows in shuffled
    ]


def partners(
    videos: Int[np.ndarray, " row"],
    texts: Int[np.ndarray, " row"],
    rows: Int[np.ndarray, " row"],
    random: np.random.Generator,
) -> Int[np.ndarray, " row"]:
    """For each row another one of the batch at random, of another video and with another text.

    -1 where there is none. The same query can be the partner of several rows.
    """
    allowed = (videos[:, None] != videos) & (texts[:, None] != texts)
    drawn = np.where(allowed, random.random(allowed.shape), -1.0)
    return np.where(allowed.any(axis=1), rows[drawn.argmax(axis=1)], -1)
