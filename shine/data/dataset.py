"""One split, ready to be batched: annotations joined with features, token vectors and negatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shine.data.annotations import LABEL_SECONDS, Annotation, clamp_moments, normalized
from shine.data.batch import Batch, Inputs, Targets
from shine.data.sampler import GlobalBatch
from shine.data.store import FeatureStore, padded
from shine.data.strides import (
    begins_in_reach,
    clip_strides,
    kept_clips,
    other_duration,
    too_many_derived,
)
from shine.data.text import TextTable
from shine.errors import InputError
from shine.language.negatives import HardNegatives
from shine.spans import to_spans


@dataclass(frozen=True)
class Dataset:
    """Rows of one split as arrays; row i is annotation i.

    Labels use the moments clamped to the video (`reference`: as annotated); `annotations` keeps
    them as they are.
    """

    annotations: Sequence[Annotation]
    store: FeatureStore
    texts: TextTable
    text: Int[np.ndarray, "row level"]  # numbers in `texts`: the query, then its hard negatives
    text_valid: Bool[np.ndarray, "row level"]
    same_text: Int[np.ndarray, " row"]  # equal for queries that are equal once normalised
    video: Int[np.ndarray, " row"]  # equal for rows of one video
    num_clips: Int[np.ndarray, " row"]  # that are kept
    clip_seconds: Float[np.ndarray, " row"]
    moments: Float[np.ndarray, "row moment 2"]  # seconds, within the kept clips, for training
    annotated: Float[np.ndarray, "row moment 2"]  # seconds, as annotated, for evaluation
    moment_mask: Bool[np.ndarray, "row moment"]
    in_reach: Bool[np.ndarray, "row moment"]  # moments that begin in the kept clips
    max_moments: int  # of a row in a training batch
    span_clips: Int[np.ndarray, "row moment 2"]  # first and last clip of each moment for training
    relevance: Int[np.ndarray, "row clip"]  # graded label, 0 outside the moments
    contrast: Int[np.ndarray, "row 2"]  # clips of the highest and of the lowest grade
    has_contrast: Bool[np.ndarray, " row"]  # False where the row has no such two clips
    inside: Bool[np.ndarray, "row clip"]  # clips that overlap a moment, up to the longest video
    has_outside: Bool[np.ndarray, " row"]
    has_pairs: Bool[np.ndarray, " row"]  # rows with clips for the saliency hinge
    num_clamped: int  # rows with a moment that ends after its video
    num_derived: int  # videos whose seconds per clip are not the stated ones
    with_partner: bool  # whether a training batch has the queries of partners
    reference: bool  # labels, saliency pairs and partners as published

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
        max_clips: int | None = None,
        with_partner: bool = True,
        reference: bool = False,
    ) -> "Dataset":
        """The rows of `annotations`, with the first `num_levels` hard negatives of each.

        A row without an entry in `negatives`, or with fewer levels, keeps its place: the missing
        levels are marked invalid and the terms that need them are masked.

        Args:
            annotations: of one split.
            store: with a video of each.
            texts: gets their queries and hard negatives.
            max_moments: of a row in a training batch; of more, so many are drawn.
            negatives: by query id.
            num_levels: of hard negatives.
            max_clips: further clips of a video are cut. None: all are kept, but for the last one
                under `reference`.
            with_partner: whether a training batch has the queries of partners.
            reference: labels, saliency pairs and partners as published.

        Raises:
            InputError: a video is not in the store, has no clip left, or has another duration in
                another row; or the seconds per clip do not fit the durations of many videos.
        """
        durations = np.array([annotation.duration_seconds for annotation in annotations])
        stored = np.array([store.num_clips(annotation.vid) for annotation in annotations])
        vids = np.array([annotation.vid for annotation in annotations], dtype=object)
        nominal = float(store.manifest["clip_seconds"])
        num_clips = _kept(stored, max_clips, reference, vids)
        annotated, mask = _pad_moments([annotation.moments for annotation in annotations])
        if reference:
            clip_seconds, num_derived = np.full(len(annotations), nominal), 0
            moments, in_reach, num_clamped = annotated, mask, 0
            ends = _published_end_clips(moments, nominal, num_clips)
        else:
            clip_seconds, num_derived = _clip_seconds(vids, durations, stored, nominal)
            clamped = [clamp_moments(annotation) for annotation in annotations]
            moments, in_reach = _cut(_pad_moments(clamped)[0], mask, clip_seconds, num_clips)
            num_clamped = sum(
                row != annotation.moments
                for row, annotation in zip(clamped, annotations, strict=True)
            )
            ends = _end_clips(moments, clip_seconds, num_clips)
        inside = _inside(ends, in_reach, num_clips)
        has_outside = inside.sum(axis=1) < num_clips
        relevance, contrast, has_contrast = _grades(
            annotations, inside, clip_seconds, num_clips, reference=reference
        )

        found = [(negatives or {}).get(annotation.qid) for annotation in annotations]
        valid = [
            [True, *((row.valid if row else ()) + (False,) * num_levels)[:num_levels]]
            for row in found
        ]
        queries = [
            [a.query, *_levels(a.query, row, num_levels)]
            for a, row in zip(annotations, found, strict=True)
        ]
        numbers = texts.add(query for row in queries for query in row)
        return cls(
            annotations=annotations,
            store=store,
            texts=texts,
            text=numbers.reshape(len(annotations), 1 + num_levels),
            text_valid=np.array(valid, bool),
            same_text=_numbered([normalized(a.query) for a in annotations]),
            video=_numbered(vids.tolist()),
            num_clips=num_clips,
            clip_seconds=clip_seconds,
            moments=moments,
            annotated=annotated,
            moment_mask=mask,
            in_reach=in_reach,
            max_moments=max_moments,
            span_clips=ends,
            relevance=relevance,
            contrast=contrast,
            has_contrast=has_contrast,
            inside=inside,
            has_outside=has_outside,
            has_pairs=(has_outside & inside.any(axis=1)) | has_contrast | reference,
            num_clamped=num_clamped,
            num_derived=num_derived,
            with_partner=with_partner,
            reference=reference,
        )

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def label_seconds(self) -> Float[np.ndarray, " row"]:
        """Seconds that a span label of 0 to 1 covers: all kept clips, the last one whole.

        Not the duration: a video of 30.2 s has 31 clips of 1 s, and clip i must lie at i / 31.
        """
        return self.num_clips * self.clip_seconds

    @property
    def extent_seconds(self) -> Float[np.ndarray, " row"]:
        """Seconds that a predicted span of 0 to 1 covers: those of the labels.

        The published programs use the duration here, whatever the labels cover.
        """
        if self.reference:
            return np.array([annotation.duration_seconds for annotation in self.annotations])
        return self.label_seconds


def wanted_clips(
    dataset: Dataset, rows: Int[np.ndarray, " row"]
) -> tuple[list[str], Int[np.ndarray, " video"], Int[np.ndarray, " row"]]:
    """The distinct videos of `rows`, how many clips of each are kept, and the video of each row."""
    _, first, video = np.unique(dataset.video[rows], return_index=True, return_inverse=True)
    vids = [dataset.annotations[row].vid for row in rows[first].tolist()]
    return vids, dataset.num_clips[rows[first]], video.astype(np.int64)


def collate_inputs(
    dataset: Dataset,
    rows: Int[np.ndarray, " row"],
    numbers: Int[np.ndarray, "row text"],
    stored: Sequence[np.ndarray] | None = None,
) -> Inputs:
    """The model's view of `rows`, each distinct video once.

    Args:
        dataset: of the rows.
        rows: to be seen.
        numbers: of their texts.
        stored: the clips of their videos (`wanted_clips`) as the store holds them, where they were
            read before.
    """
    vids, lengths, video = wanted_clips(dataset, rows)
    tokens, token_mask = dataset.texts.gather(numbers.T)
    clips, clip_mask = gather_clips(dataset.store, vids, lengths, stored)
    return Inputs(
        clips=clips,
        clip_mask=clip_mask,
        video=torch.from_numpy(video),
        tokens=torch.from_numpy(tokens),
        token_mask=torch.from_numpy(token_mask),
    )


def collate(
    dataset: Dataset,
    batch: GlobalBatch,
    *,
    rank: int,
    world_size: int,
    stored: Sequence[np.ndarray] | None = None,
) -> Batch:
    """The share of worker `rank` of a training batch; it may hold no row at all.

    The rows are dealt like cards. Counts are taken over the whole batch, which every worker knows,
    so no worker needs to ask another.

    Args:
        dataset: of the rows.
        batch: of the whole run.
        rank: of the worker.
        world_size: number of workers.
        stored: see `collate_inputs`.
    """
    mine = slice(rank, None, world_size)
    rows = dealt(batch, rank, world_size)
    numbers, valid = _batch_texts(dataset, batch)
    inputs = collate_inputs(dataset, rows, numbers[mine], stored)
    real = inputs.clip_mask[inputs.video].numpy()
    inside = dataset.inside[rows, : real.shape[1]]
    chosen = _chosen_moments(dataset.in_reach[rows], dataset.max_moments, batch.draws[mine, 0])
    moments = np.take_along_axis(dataset.moments[rows], chosen[..., None], axis=1)
    num_moments = dataset.in_reach[batch.rows].sum(axis=1).clip(max=dataset.max_moments)
    counts = valid.astype(np.float64)

    def count(value: Any) -> Tensor:
        return torch.tensor(value, dtype=torch.float32) / world_size

    targets = Targets(
        spans=to_spans(torch.from_numpy(moments / dataset.label_seconds[rows, None, None])).float(),
        moment_mask=torch.from_numpy(np.take_along_axis(dataset.in_reach[rows], chosen, axis=1)),
        span_clips=torch.from_numpy(
            np.take_along_axis(dataset.span_clips[rows], chosen[..., None], axis=1)
        ),
        relevance=torch.from_numpy(dataset.relevance[rows, : real.shape[1]].astype(np.float32)),
        inside=torch.from_numpy(inside),
        outside=torch.from_numpy(real & ~inside),
        pairs=torch.from_numpy(_pairs(dataset, rows, inside, real & ~inside, batch.draws[mine])),
        has_pairs=torch.from_numpy(dataset.has_pairs[rows]),
        text_valid=torch.from_numpy(np.ascontiguousarray(valid[mine].T)),
        num_rows=count(len(batch.rows)),
        num_moments=count(num_moments.sum()),
        num_outside=count(dataset.has_outside[batch.rows].sum()),
        num_pairs=count(2 * dataset.has_pairs[batch.rows].sum()),
        num_both=count(counts.T @ counts),
    )
    return Batch(inputs, targets)


def _batch_texts(
    dataset: Dataset, batch: GlobalBatch
) -> tuple[Int[np.ndarray, "row text"], Bool[np.ndarray, "row text"]]:
    """Numbers of the texts of every row of a batch, and which of them it has."""
    text, valid = dataset.text[batch.rows], dataset.text_valid[batch.rows]
    if not dataset.with_partner:
        return text[:, :1], valid[:, :1]
    has_partner = batch.partners >= 0
    partner = np.where(has_partner, dataset.text[batch.partners, 0], text[:, 0])
    return (
        np.concatenate([text[:, :1], partner[:, None], text[:, 1:]], axis=1),
        np.concatenate([valid[:, :1], has_partner[:, None], valid[:, 1:]], axis=1),
    )


def dealt(batch: GlobalBatch, rank: int, world_size: int) -> Int[np.ndarray, " row"]:
    """The rows of a batch that worker `rank` has."""
    return batch.rows[rank::world_size]


def gather_clips(
    store: FeatureStore,
    vids: Sequence[str],
    lengths: Int[np.ndarray, " video"],
    stored: Sequence[np.ndarray] | None = None,
) -> tuple[Float[Tensor, "video clip feature"], Bool[Tensor, "video clip"]]:
    """The first `lengths` clips of videos, temporal end points after each part, and their mask."""
    mask = torch.from_numpy(np.arange(lengths.max(initial=1)) < lengths[:, None])
    if stored is None:
        return store.gather(vids, lengths), mask
    return torch.from_numpy(padded(stored, lengths, store.parts)), mask


def _levels(query: str, row: HardNegatives | None, num_levels: int) -> list[str]:
    """The hard negatives of a query; the query holds the place of a missing or invalid one."""
    pairs = zip(row.queries, row.valid, strict=False) if row else ()
    texts = [text if valid else query for text, valid in pairs][:num_levels]
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


def _kept(
    stored: Int[np.ndarray, " row"], max_clips: int | None, reference: bool, vids: np.ndarray
) -> Int[np.ndarray, " row"]:
    """Clips of each row's video that are used."""
    kept = kept_clips(stored, max_clips, reference=reference)
    if not kept.all():
        raise InputError(
            f"video {vids[kept.argmin()]} has one clip, and data.compat=reference cuts the last "
            f"one; set data.max_clips or leave the video out"
        )
    return kept


def _clip_seconds(
    vids: np.ndarray, durations: np.ndarray, num_clips: np.ndarray, nominal: float
) -> tuple[Float[np.ndarray, " row"], int]:
    """Seconds of a clip of each row, and of how many videos they are not the nominal ones.

    Nominal clips tile a video up to one clip. Where they do not, the true stride is derived from
    the duration; where that happens to many videos, the statement is wrong and not the videos.
    """
    _, first, video = np.unique(vids, return_index=True, return_inverse=True)
    other = other_duration(durations, durations[first][video], nominal)
    if other.any():
        row = int(other.argmax())
        raise InputError(
            f"video {vids[row]} has a duration of {durations[row]:g} s in one row and of "
            f"{durations[first][video][row]:g} s in another; correct the annotations"
        )
    clip_seconds, odd = clip_strides(durations, num_clips, nominal)
    wrong = np.flatnonzero(odd[first])
    if too_many_derived(len(wrong), len(first)):
        example = first[wrong[0]]
        median = np.median(durations[first[wrong]] / num_clips[first[wrong]])
        raise InputError(
            f"{len(wrong)} of {len(first)} videos do not have as many clips as their duration "
            f"needs: {vids[example]} has {num_clips[example]} clips x {nominal:g} s "
            f"(features.clip_seconds) = {num_clips[example] * nominal:g} s, but lasts "
            f"{durations[example]:g} s; the median of these videos is {median:.4g} s per clip; "
            f"set features.clip_seconds to the true stride, or extract the features again"
        )
    return clip_seconds, len(wrong)


def _cut(
    moments: np.ndarray, mask: np.ndarray, clip_seconds: np.ndarray, num_clips: np.ndarray
) -> tuple[Float[np.ndarray, "row moment 2"], Bool[np.ndarray, "row moment"]]:
    """Moments that end with the kept clips, and which of them begin there.

    Clips may end up to one clip before their video; a moment after them is that of the last clip.
    """
    clip = clip_seconds[:, None]
    covered = clip * num_clips[:, None]
    start, end = moments[..., 0], moments[..., 1]
    in_reach = mask & begins_in_reach(start, clip_seconds, num_clips)
    start = np.where(start < covered, start, covered - clip)
    return np.stack([start, np.minimum(end, covered)], axis=-1), in_reach


def _end_clips(
    moments: np.ndarray, clip_seconds: np.ndarray, num_clips: np.ndarray
) -> Int[np.ndarray, "row moment 2"]:
    """First and last clip that overlap a moment: floor(start / clip) to ceil(end / clip) - 1."""
    scaled = moments / clip_seconds[:, None, None]
    last_clip = num_clips[:, None] - 1
    first = np.minimum(np.floor(scaled[..., 0]), last_clip)
    last = np.clip(np.ceil(scaled[..., 1]) - 1, first, last_clip)
    return np.stack([first, last], axis=-1).astype(np.int64)


def _published_end_clips(
    moments: np.ndarray, clip_seconds: float, num_clips: np.ndarray
) -> Int[np.ndarray, "row moment 2"]:
    """First and last clip of a moment as published: a last clip that it fills in part is left out.

    A moment within one clip then gets the clip before it.
    """
    begin, end = np.trunc(moments / clip_seconds).astype(np.int64).transpose(2, 0, 1)
    last = np.maximum(np.minimum(end, num_clips[:, None]) - 1, 0)
    return np.stack([np.minimum(begin, last), last], axis=-1)


def _inside(
    ends: np.ndarray, mask: np.ndarray, num_clips: np.ndarray
) -> Bool[np.ndarray, "row clip"]:
    """True on the clips of a moment, up to the longest video."""
    clip = np.arange(num_clips.max(initial=1))
    hit = (clip >= ends[..., :1]) & (clip <= ends[..., 1:]) & mask[..., None]
    return hit.any(axis=1)


def _grades(
    annotations: Sequence[Annotation],
    inside: Bool[np.ndarray, "row clip"],
    clip_seconds: Float[np.ndarray, " row"],
    num_clips: Int[np.ndarray, " row"],
    *,
    reference: bool,
) -> tuple[Int[np.ndarray, "row clip"], Int[np.ndarray, "row 2"], Bool[np.ndarray, " row"]]:
    """Relevance, clips of the highest and the lowest grade, and which rows have such a contrast.

    A grade is the sum of what the annotators gave; a row without grades has 1 inside its moments.
    A clip has the label of the time that its middle shows; published: of its number, and the
    lowest grade may equal the highest.
    """
    relevance = inside.astype(np.int64)
    contrast = np.zeros((len(annotations), 2), np.int64)
    has_contrast = np.zeros(len(annotations), bool)
    for row, annotation in enumerate(annotations):
        if not annotation.clip_ids:
            continue
        ids, length = np.array(annotation.clip_ids), num_clips[row]
        labels = np.full(ids.max() + 2, -1, np.int64)  # the last one stands for all that follow
        labels[ids] = np.array(annotation.clip_scores, np.int64).sum(axis=1)
        step = 1.0 if reference else clip_seconds[row] / LABEL_SECONDS
        label = np.floor((np.arange(length) + 0.5) * step).astype(np.int64)
        grades = labels[label.clip(max=len(labels) - 1)]
        relevance[row, :length] = grades.clip(min=0)
        if reference:
            rising = ids[np.argsort(labels[ids], kind="stable")]  # ties in the order of the file
            contrast[row] = rising[[-1, 0]].clip(max=length - 1)
            has_contrast[row] = True
        else:
            labelled = np.where(grades < 0, grades.max(), grades)
            contrast[row] = grades.argmax(), labelled.argmin()
            has_contrast[row] = grades.max() > labelled.min()
    return relevance, contrast, has_contrast


def _chosen_moments(
    in_reach: Bool[np.ndarray, "row moment"], most: int, draws: Float[np.ndarray, " row"]
) -> Int[np.ndarray, "row chosen"]:
    """Places of at most `most` moments of each row, those in reach first; of more, some drawn."""
    order = np.argsort(~in_reach, axis=1, kind="stable")
    for row in np.flatnonzero(in_reach.sum(axis=1) > most):
        random = np.random.default_rng(int(draws[row] * 2**53))  # of this row alone
        places = np.flatnonzero(in_reach[row])
        order[row, :most] = np.sort(random.choice(places, most, replace=False))
    return order[:, :most]


def _pairs(
    dataset: Dataset,
    rows: Int[np.ndarray, " row"],
    inside: Bool[np.ndarray, "row clip"],
    outside: Bool[np.ndarray, "row clip"],
    draws: Float[np.ndarray, "row 4"],
) -> Int[np.ndarray, "row pair 2"]:
    """Two pairs of clips of each row, of which the first should be the more salient one.

    Random clips inside against random clips outside; with grades, the first pair is that of the
    highest and the lowest grade, and the second one too where the moment fills the video.
    Published: two different clips of each kind; clips 0 and 1 where fewer than two lie outside.
    """
    above, below = _draw(inside, draws[:, 0]), _draw(outside, draws[:, 2])
    if dataset.reference:
        other_above = _draw_other(inside, above, draws[:, 1])
        other_below = _draw_other(outside, below, draws[:, 3])
        few = (outside.sum(axis=1) < 2) & ~dataset.has_contrast[rows]
        below = np.where(few, 0, below)
        other_below = np.where(few, np.minimum(1, dataset.num_clips[rows] - 1), other_below)
    else:
        other_above, other_below = _draw(inside, draws[:, 1]), _draw(outside, draws[:, 3])
    easy = np.stack([above, below], axis=1)
    other = np.stack([other_above, other_below], axis=1)
    contrast, has_contrast = dataset.contrast[rows], dataset.has_contrast[rows][:, None]
    filled = has_contrast & ~outside.any(axis=1, keepdims=True)
    first, second = np.where(has_contrast, contrast, easy), np.where(filled, contrast, other)
    return np.stack([first, second], axis=1)


def _draw(mask: Bool[np.ndarray, "row clip"], draws: np.ndarray) -> Int[np.ndarray, " row"]:
    """One clip of the mask of each row, chosen by a number in [0, 1); 0 where the mask is empty."""
    wanted = np.floor(draws * mask.sum(axis=1))
    return ((mask.cumsum(axis=1) > wanted[:, None]) & mask).argmax(axis=1)


def _draw_other(
    mask: Bool[np.ndarray, "row clip"], drawn: Int[np.ndarray, " row"], draws: np.ndarray
) -> Int[np.ndarray, " row"]:
    """Another clip of the mask of each row than `drawn`; that one again where there is no other."""
    rest = mask & (np.arange(mask.shape[1]) != drawn[:, None])
    return np.where(rest.any(axis=1), _draw(rest, draws), drawn)
