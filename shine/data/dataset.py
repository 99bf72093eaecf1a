"""One split, ready to be batched: annotations joined with features, token vectors and negatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from shine.data.annotations import Annotation, clamp_moments, normalized
from shine.data.batch import Batch, Inputs, Targets
from shine.data.features import FeatureStore
from shine.data.sampler import GlobalBatch
from shine.data.text import TextTable
from shine.language.negatives import HardNegatives
from shine.spans import to_spans


@dataclass(frozen=True)
class Dataset:
    """Rows of one split as arrays; row i is annotation i.

    Labels use the moments clamped to the video; `annotations` keeps them as they are.
    """

    annotations: Sequence[Annotation]
    store: FeatureStore
    texts: TextTable
    text: Int[np.ndarray, "row level"]  # numbers in `texts`: the query, then its hard negatives
    text_valid: Bool[np.ndarray, "row level"]
    same_text: Int[np.ndarray, " row"]  # equal for queries that are equal once normalised
    video: Int[np.ndarray, " row"]  # equal for rows of one video
    num_clips: Int[np.ndarray, " row"]
    clip_seconds: Float[np.ndarray, " row"]
    moments: Float[np.ndarray, "row moment 2"]  # seconds, clamped to the video, for training
    annotated: Float[np.ndarray, "row moment 2"]  # seconds, as annotated, for evaluation
    moment_mask: Bool[np.ndarray, "row moment"]
    span_clips: Int[np.ndarray, "row moment 2"]  # first and last clip of each moment for training
    relevance: Int[np.ndarray, "row clip"]  # graded label, 0 outside the moments
    inside: Bool[np.ndarray, "row clip"]  # clips that overlap a moment, up to the longest video
    has_outside: Bool[np.ndarray, " row"]
    num_clamped: int  # rows with a moment that ends after its video

    @classmethod
    def build(
        cls,
        annotations: Sequence[Annotation],
        store: FeatureStore,
        texts: TextTable,
        *,
        max_moments: int,
        negatives: Mapping[str, HardNegatives] | None = None,
        num_levels: int = 0,
    ) -> "Dataset":
        """The rows of `annotations`, with the first `num_levels` hard negatives of each.

        A row without an entry in `negatives`, or with fewer levels, keeps its place: the missing
        levels are marked invalid and the terms that need them are masked.

        Raises:
            InputError: a video is not in the store.
        """
        clamped = [clamp_moments(annotation) for annotation in annotations]
        durations = np.array([annotation.duration_seconds for annotation in annotations])
        num_clips = np.array([store.num_clips(annotation.vid) for annotation in annotations])
        moments, moment_mask = _pad_moments([row[:max_moments] for row in clamped])
        clip_seconds = _clip_seconds(durations, num_clips, store.manifest["clip_seconds"])
        ends = _end_clips(_pad_moments(clamped)[0], clip_seconds, num_clips)  # of cut moments too
        inside = _inside(ends, _pad_moments(clamped)[1], num_clips)

        found = [(negatives or {}).get(annotation.qid) for annotation in annotations]
        queries = [
            [a.query, *_levels(a.query, row, num_levels)]
            for a, row in zip(annotations, found, strict=True)
        ]
        valid = [
            [True, *((row.valid if row else ()) + (False,) * num_levels)[:num_levels]]
            for row in found
        ]
        numbers = texts.add(query for row in queries for query in row)
        return cls(
            annotations=annotations,
            store=store,
            texts=texts,
            text=numbers.reshape(len(annotations), 1 + num_levels),
            text_valid=np.array(valid, bool),
            same_text=_numbered([normalized(a.query) for a in annotations]),
            video=_numbered([a.vid for a in annotations]),
            num_clips=num_clips,
            clip_seconds=clip_seconds,
            moments=moments,
            annotated=_pad_moments([row.moments[:max_moments] for row in annotations])[0],
            moment_mask=moment_mask,
            span_clips=ends[:, : moments.shape[1]],
            relevance=inside.astype(np.int64),
            inside=inside,
            has_outside=inside.sum(axis=1) < num_clips,
            num_clamped=sum(
                row != annotation.moments
                for row, annotation in zip(clamped, annotations, strict=True)
            ),
        )

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def extent_seconds(self) -> Float[np.ndarray, " row"]:
        """Seconds that a span of 0 to 1 covers: all clips of the video, the last one whole.

        Not the duration: a video of 30.2 s has 31 clips of 1 s, and clip i must lie at i / 31.
        """
        return self.num_clips * self.clip_seconds


def collate_inputs(
    dataset: Dataset,
    rows: Int[np.ndarray, " row"],
    numbers: Int[np.ndarray, "row text"],
) -> Inputs:
    """The model's view of `rows`, each distinct video once, `numbers` naming the texts."""
    _, first, video = np.unique(dataset.video[rows], return_index=True, return_inverse=True)
    vids = [dataset.annotations[row].vid for row in rows[first].tolist()]
    lengths = dataset.num_clips[rows[first]]
    longest = int(lengths.max(initial=1))
    width = dataset.store.width
    clips = np.zeros((len(vids), longest, width + 2), np.float32)
    for index, vid in enumerate(vids):  # copies out of the mapped file, one slice a video
        clips[index, : lengths[index], :width] = dataset.store.clips(vid)
    clip_mask = np.arange(longest) < lengths[:, None]
    share = 1 / lengths[:, None].astype(np.float32)
    start = np.arange(longest, dtype=np.float32) * share
    clips[..., width:] = np.stack([start, start + share], axis=-1) * clip_mask[..., None]
    tokens, token_mask = dataset.texts.gather(numbers.T)
    return Inputs(
        clips=torch.from_numpy(clips),
        clip_mask=torch.from_numpy(clip_mask),
        video=torch.from_numpy(video.astype(np.int64)),
        tokens=torch.from_numpy(tokens),
        token_mask=torch.from_numpy(token_mask),
    )


def collate(dataset: Dataset, batch: GlobalBatch, *, rank: int, world_size: int) -> Batch:
    """The share of worker `rank` of a training batch; it may hold no row at all.

    The rows are dealt like cards. Counts are taken over the whole batch, which every worker knows,
    so no worker needs to ask another.
    """
    has_partner = batch.partners >= 0
    valid = np.concatenate(
        [
            dataset.text_valid[batch.rows, :1],
            has_partner[:, None],
            dataset.text_valid[batch.rows, 1:],
        ],
        axis=1,
    )
    mine = slice(rank, None, world_size)
    rows, partners = batch.rows[mine], batch.partners[mine]
    partner_text = np.where(has_partner[mine], dataset.text[partners, 0], dataset.text[rows, 0])
    numbers = np.concatenate(
        [dataset.text[rows, :1], partner_text[:, None], dataset.text[rows, 1:]], axis=1
    )
    inputs = collate_inputs(dataset, rows, numbers)
    real = inputs.clip_mask[inputs.video].numpy()
    inside = dataset.inside[rows, : real.shape[1]]
    moments = dataset.moments[rows] / dataset.extent_seconds[rows, None, None]
    outside = real & ~inside
    draws = batch.draws[mine]
    above = np.stack([_draw(inside, draws[:, 0]), _draw(inside, draws[:, 1])], axis=1)
    below = np.stack([_draw(outside, draws[:, 2]), _draw(outside, draws[:, 3])], axis=1)
    counts = valid.astype(np.float64)

    def count(value: Any) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32) / world_size

    targets = Targets(
        spans=to_spans(torch.from_numpy(moments)).float(),
        moment_mask=torch.from_numpy(dataset.moment_mask[rows]),
        span_clips=torch.from_numpy(dataset.span_clips[rows]),
        relevance=torch.from_numpy(dataset.relevance[rows, : real.shape[1]].astype(np.float32)),
        inside=torch.from_numpy(inside),
        outside=torch.from_numpy(outside),
        pairs=torch.from_numpy(np.stack([above, below], axis=-1)),
        has_pairs=torch.from_numpy(dataset.has_outside[rows]),
        text_valid=torch.from_numpy(np.ascontiguousarray(valid[mine].T)),
        num_rows=count(len(batch.rows)),
        num_moments=count(dataset.moment_mask[batch.rows].sum()),
        num_outside=count(dataset.has_outside[batch.rows].sum()),
        num_pairs=count(2 * dataset.has_outside[batch.rows].sum()),
        num_both=count(counts.T @ counts),
    )
    return Batch(inputs, targets)


def _levels(query: str, row: HardNegatives | None, num_levels: int) -> list[str]:
    """The hard negatives of a query; the query itself holds the place of a missing one."""
    texts = list(row.queries[:num_levels]) if row else []
    return texts + [query] * (num_levels - len(texts))


def _numbered(values: Sequence[str]) -> Int[np.ndarray, " row"]:
    return np.unique(np.array(values, dtype=object), return_inverse=True)[1].astype(np.int64)


def _pad_moments(rows: Sequence[Sequence[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Moments as [row, moment, 2] and their mask; padding is the whole first second."""
    longest = max((len(row) for row in rows), default=1)
    filler = (0.0, 1.0)
    padded = [[*row, *[filler] * (longest - len(row))] for row in rows]
    mask = np.arange(longest) < np.array([len(row) for row in rows])[:, None]
    return np.array(padded, np.float64).reshape(len(rows), longest, 2), mask


def _clip_seconds(durations: np.ndarray, num_clips: np.ndarray, nominal: float) -> np.ndarray:
    """Seconds of a clip of each row: the nominal ones, or the true stride where they cannot be.

    Nominal clips tile a video up to one clip; anything else means another stride than was stated.
    """
    agrees = np.abs(num_clips * nominal - durations) <= nominal
    return np.where(agrees, nominal, durations / num_clips)


def _end_clips(
    moments: np.ndarray, clip_seconds: np.ndarray, num_clips: np.ndarray
) -> Int[np.ndarray, "row moment 2"]:
    """First and last clip that overlap a moment: floor(start / clip) to ceil(end / clip) - 1."""
    scaled = moments / clip_seconds[:, None, None]
    last_clip = num_clips[:, None] - 1
    first = np.minimum(np.floor(scaled[..., 0]), last_clip)
    last = np.clip(np.ceil(scaled[..., 1]) - 1, first, last_clip)
    return np.stack([first, last], axis=-1).astype(np.int64)


def _inside(
    ends: np.ndarray, mask: np.ndarray, num_clips: np.ndarray
) -> Bool[np.ndarray, "row clip"]:
    """True on the clips of a moment, up to the longest video."""
    clip = np.arange(num_clips.max(initial=1))
    hit = (clip >= ends[..., :1]) & (clip <= ends[..., 1:]) & mask[..., None]
    return hit.any(axis=1)


def _draw(mask: Bool[np.ndarray, "row clip"], draws: np.ndarray) -> Int[np.ndarray, " row"]:
    """One clip of the mask of each row, chosen by a number in [0, 1); 0 where the mask is empty."""
    wanted = np.floor(draws * mask.sum(axis=1))
    return ((mask.cumsum(axis=1) > wanted[:, None]) & mask).argmax(axis=1)
