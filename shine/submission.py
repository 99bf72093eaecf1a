"""Prediction files of the field: JSON Lines with ranked moments and saliency for each query."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from shine.data.annotations import LABEL_SECONDS, Annotation, read_records
from shine.errors import InputError
from shine.metrics.highlights import Highlights
from shine.metrics.summary import Answers


@dataclass(frozen=True)
class Submission:
    """What was predicted for each of a list of annotations, in their order."""

    moments: Float[np.ndarray, "query rank 2"]  # seconds, best first; NaN after the last
    scores: Float[np.ndarray, "query rank"]  # NaN after the last
    saliency: Float[np.ndarray, "query clip"] | None  # NaN after the last clip; None: no saliency


def read_submission(path: Path, annotations: Sequence[Annotation]) -> Submission:
    """The predictions of a file for `annotations`, whatever the order of its lines.

    Moments may be inverted or lie outside their video, and a query may have none.

    Raises:
        InputError: the file cannot be read, a line is malformed, a query is missing, unknown or
            there twice, or only some lines have saliency; the sentence names the place.
    """
    lines: dict[str, int] = {}
    windows: dict[str, list[list[float]]] = {}
    curves: dict[str, list[float]] = {}
    for number, record in read_records(path, "predictions"):
        where = f"{path}, line {number}"
        if record.get("qid") is None:
            raise InputError(f"{where}: missing qid")
        qid = str(record["qid"])
        if (first := lines.setdefault(qid, number)) != number:
            raise InputError(
                f"{where}: query id {qid!r} was used on line {first}; keep one of them"
            )
        windows[qid] = _windows(record.get("pred_relevant_windows"), f"{where}, query {qid}")
        if record.get("pred_saliency_scores") is not None:
            curves[qid] = _curve(record["pred_saliency_scores"], f"{where}, query {qid}")
    wanted = [annotation.qid for annotation in annotations]
    _same_queries(path, list(lines), wanted)
    if silent := [qid for qid in wanted if curves and qid not in curves]:
        raise InputError(
            f"{path}, line {lines[silent[0]]}, query {silent[0]}: expected pred_saliency_scores as "
            f"on the other lines; give all queries saliency or none"
        )
    ranked = _padded([np.array(windows[qid]).reshape(-1, 3) for qid in wanted])
    return Submission(
        moments=ranked[..., :2],
        scores=ranked[..., 2],
        saliency=_padded([np.array(curves[qid]) for qid in wanted]) if curves else None,
    )


def to_records(annotations: Sequence[Annotation], submission: Submission) -> list[dict[str, Any]]:
    """The lines of a file that `read_submission` reads as `submission`."""
    ranked = np.concatenate([submission.moments, submission.scores[..., None]], axis=-1)
    records = []
    for row, annotation in enumerate(annotations):
        record: dict[str, Any] = {
            "qid": annotation.qid,
            "query": annotation.query,
            "vid": annotation.vid,
            "pred_relevant_windows": ranked[row][~np.isnan(submission.scores[row])].tolist(),
        }
        if submission.saliency is not None:
            curve = submission.saliency[row]
            record["pred_saliency_scores"] = curve[~np.isnan(curve)].tolist()
        records.append(record)
    return records


def answers_to(annotations: Sequence[Annotation], submission: Submission, truth: Path) -> Answers:
    """`submission` beside what `annotations` hold, as the metrics want it.

    Args:
        annotations: of the queries, in the order of the submission.
        submission: what was predicted.
        truth: the file of the annotations, for the message.

    Raises:
        InputError: a highlight label lies after the end of its video, or the queries were scored
            by different numbers of annotators.
    """
    moments = _padded([np.array(annotation.moments) for annotation in annotations])
    mask = ~np.isnan(moments[..., 0])
    labelled = any(annotation.clip_ids for annotation in annotations)
    return Answers(
        qids=[annotation.qid for annotation in annotations],
        vids=[annotation.vid for annotation in annotations],
        predicted=submission.moments,
        scores=submission.scores,
        moments=np.nan_to_num(moments),
        moment_mask=mask,
        highlights=_highlights(annotations, submission.saliency, truth)
        if labelled and submission.saliency is not None
        else None,
    )


def _highlights(
    annotations: Sequence[Annotation], saliency: Float[np.ndarray, "query clip"], truth: Path
) -> Highlights:
    counts = {a.qid: len(a.clip_scores[0]) for a in annotations if a.clip_ids}
    first, annotators = next(iter(counts.items()))
    num_clips = [int(a.duration_seconds // LABEL_SECONDS) if a.clip_ids else 0 for a in annotations]
    relevance = np.zeros((len(annotations), max(num_clips), annotators), dtype=np.int64)
    for row, annotation in enumerate(annotations):
        if not annotation.clip_ids:
            continue
        if counts[annotation.qid] != annotators:
            raise InputError(
                f"{truth}, query {annotation.qid}: expected saliency_scores of {annotators} "
                f"annotators as for query {first}, got {counts[annotation.qid]}"
            )
        if (last := max(annotation.clip_ids)) >= num_clips[row]:
            raise InputError(
                f"{truth}, query {annotation.qid}: clip {last} in relevant_clip_ids lies after the "
                f"{num_clips[row]} clips of {LABEL_SECONDS} s of its video "
                f"({annotation.duration_seconds} s)"
            )
        relevance[row, list(annotation.clip_ids)] = annotation.clip_scores
    return Highlights(saliency, relevance, np.array(num_clips))


def _same_queries(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := sorted(set(wanted) - set(found)):
        raise InputError(
            f"{path}: {len(missing)} of {len(wanted)} queries have no prediction, the first is "
            f"{missing[0]!r}; a query without a moment needs a line with an empty "
            f"pred_relevant_windows"
        )
    known = set(wanted)
    if unknown := [qid for qid in found if qid not in known]:
        raise InputError(
            f"{path}: {len(unknown)} of {len(found)} queries are not in the annotations, the first "
            f"is {unknown[0]!r}; evaluate the split that was predicted"
        )


def _windows(value: Any, where: str) -> list[list[float]]:
    if not isinstance(value, list):
        raise InputError(
            f"{where}: expected pred_relevant_windows [[start, end, score], ...], got {value!r}"
        )
    for window in value:
        if not isinstance(window, list) or len(window) != 3 or not all(map(_finite, window)):
            raise InputError(
                f"{where}: expected a predicted moment [start, end, score] of finite numbers, got "
                f"{window!r}"
            )
    return [[float(number) for number in window] for window in value]


def _curve(value: Any, where: str) -> list[float]:
    if not isinstance(value, list) or not value or not all(map(_finite, value)):
        raise InputError(
            f"{where}: expected pred_saliency_scores as a list of finite numbers, one for each clip"
        )
    return [float(number) for number in value]


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _padded(rows: Sequence[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "query ..."]:
    """The rows as one array, at least one long, with NaN after the last value of each."""
    longest = max(1, *map(len, rows))
    padded = np.full((len(rows), longest, *rows[0].shape[1:]), np.nan)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
