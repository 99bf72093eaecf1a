"""Rows of a training in memory, the same ones for both sides of a comparison.

Features and token vectors are random: they have the sizes of the published SHINE training on
Charades-CG, and no file is read but, if one is named, the annotations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import plain
from shine.config import LossConfig, TrainConfig
from shine.data.annotations import Annotation, read_annotations
from shine.data.dataset import Dataset
from shine.data.sampler import epoch_batches
from shine.data.store import FeatureStore
from shine.data.text import LexicalEncoder, TextTable
from shine.language.negatives import HardNegatives, read_negatives

CLIP_SECONDS = 0.5
CLIP_WIDTH = 1024  # I3D; two temporal end points come on top
TOKEN_WIDTH = 512  # CLIP
TOKENS = 32
CLIPS = 62
LEVELS = 3
BATCH_SIZE = 32
BUCKET_BATCHES = TrainConfig().bucket_batches

Lengths = Literal["equal", "real"]

# Quantiles of the 8,281 training rows of Charades-CG, for where its file is not at hand: seconds of
# a video, words of a query, share of the video that the moment covers. Linear between them.
_SHARE = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
_SECONDS = (5.5, 12.4, 18.0, 21.5, 28.4, 30.7, 32.8, 38.3, 43.0, 59.9, 194.3)
_WORDS = (2, 3, 3, 4, 4, 6, 7, 9, 9, 10, 10)
_COVERED = (0.04, 0.10, 0.13, 0.16, 0.20, 0.26, 0.35, 0.43, 0.46, 0.49, 0.51)


@dataclass(frozen=True)
class Examples:
    """One window of rows: our data set, and what the published files would hold of each row."""

    dataset: Dataset
    rows: Sequence[plain.Row]


def examples(
    lengths: Lengths, annotations: Path | None, loss: LossConfig, seed: int = 0
) -> Examples:
    """The rows of one bucketing window (equal lengths: of one batch), drawn with `seed`.

    Args:
        lengths: every row of 62 clips and 32 tokens, or the lengths of Charades-CG.
        annotations: its training file, with recomposed queries; None: lengths from its quantiles.
        loss: says which texts a batch needs.
        seed: of the choice of rows and of the features.
    """
    random = np.random.default_rng(seed)
    if lengths == "equal":
        seconds = np.full(BATCH_SIZE, CLIPS * CLIP_SECONDS)
        rows, negatives = _drawn(random, seconds, np.full(BATCH_SIZE, TOKENS))
    elif annotations is not None:
        found = read_annotations(annotations)
        chosen = random.permutation(len(found))[: BATCH_SIZE * BUCKET_BATCHES]
        rows, negatives = [found[row] for row in chosen], read_negatives(annotations)
    else:
        share = random.random((2, BATCH_SIZE * BUCKET_BATCHES))
        seconds = np.interp(share[0], _SHARE, _SECONDS)
        rows, negatives = _drawn(random, seconds, np.interp(share[1], _SHARE, _WORDS).round())

    durations = {row.vid: row.duration_seconds for row in rows}
    videos = {
        vid: _clips(random, max(1, round(seconds / CLIP_SECONDS)))
        for vid, seconds in durations.items()
    }
    encoder = LexicalEncoder(TOKEN_WIDTH)
    dataset = Dataset.build(
        rows,
        _store(videos),
        TextTable(encoder, TOKENS),
        max_moments=5,
        negatives=negatives,
        num_levels=loss.num_hard_negatives,
        with_partner=loss.with_partner,
    )
    published = [
        plain.Row(
            clips=videos[row.vid].astype(np.float32),
            tokens=encoder(row.query)[:TOKENS],
            moment=row.moments[0],
            clip_seconds=CLIP_SECONDS,
            hard_negatives=tuple(
                encoder(text)[:TOKENS]
                for text in negatives[row.qid].queries[: loss.num_hard_negatives]
            ),
        )
        for row in rows
    ]
    return Examples(dataset, published)


def bucketed(dataset: Dataset, seed: int = 0) -> list:
    """The batches that our sampler makes of the rows."""
    return epoch_batches(
        dataset.num_clips,
        dataset.video,
        dataset.same_text,
        batch_size=BATCH_SIZE,
        bucket_batches=BUCKET_BATCHES,
        seed=seed,
        epoch=0,
    )


def shuffled(num_rows: int, seed: int = 0) -> list[np.ndarray]:
    """The rows in batches at random, as the published loader takes them."""
    order = np.random.default_rng(seed).permutation(num_rows)
    return np.split(order, range(BATCH_SIZE, num_rows, BATCH_SIZE))


def _drawn(
    random: np.random.Generator, seconds: np.ndarray, words: np.ndarray
) -> tuple[list[Annotation], dict[str, HardNegatives]]:
    """Rows of made-up queries with hard negatives of as many words, each of a video of its own."""
    rows, negatives = [], {}
    for number, (duration, count) in enumerate(zip(seconds.tolist(), words, strict=True)):
        texts = [
            " ".join(f"word{word}" for word in random.integers(0, 2000, int(count)))
            for _ in range(1 + LEVELS)
        ]
        length = duration * float(np.interp(random.random(), _SHARE, _COVERED))
        start = float(random.uniform(0, duration - length))
        qid = f"q{number}"
        rows.append(
            Annotation(
                qid=qid,
                vid=f"v{number}",
                query=texts[0],
                duration_seconds=duration,
                moments=((start, start + length),),
            )
        )
        negatives[qid] = HardNegatives(tuple(texts[1:]), (True,) * LEVELS, ("random",) * LEVELS)
    return rows, negatives


def _clips(random: np.random.Generator, count: int) -> np.ndarray:
    """Unit vectors in the type that a packed store holds."""
    clips = random.standard_normal((count, CLIP_WIDTH))
    return (clips / np.linalg.norm(clips, axis=1, keepdims=True)).astype(np.float16)


def _store(videos: dict[str, np.ndarray]) -> FeatureStore:
    """A store with one shard, in memory."""
    place, end = {}, 0
    for vid, clips in videos.items():
        place[vid] = ("memory", end, len(clips))
        end += len(clips)
    manifest = {"width": CLIP_WIDTH, "clip_seconds": CLIP_SECONDS}
    return FeatureStore(
        Path("memory"), manifest, place, {"memory": np.concatenate([*videos.values()])}
    )
