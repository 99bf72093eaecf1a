"""Annotation files of the field: JSON Lines with one query of one video per line."""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from shine.errors import InputError
from shine.files import write_whole

Moment = tuple[float, float]  # [start, end] in seconds
LABEL_SECONDS = 2  # of a clip with a highlight label
MASK = "<mask>"  # stands for a word in `masked_queries`


@dataclass(frozen=True, slots=True)
class Annotation:
    """One query of one video with the moments that it describes, as annotated."""

    qid: str
    vid: str
    query: str
    duration_seconds: float
    moments: tuple[Moment, ...]  # may end after the video; clamp for training, not for evaluation
    negatives: tuple[str, ...] = ()  # hard negatives in the file itself, least altered first
    # Highlight labels of QVHighlights; both empty where the file has none.
    clip_ids: tuple[int, ...] = ()  # clips of `LABEL_SECONDS` with a label
    clip_scores: tuple[tuple[int, ...], ...] = ()  # of each such clip, one from every annotator


def read_annotations(path: str | Path) -> list[Annotation]:
    """Every line of an annotation file, in order.

    Raises:
        InputError: the file is missing, empty or malformed, a query id occurs twice, or a moment is
            empty, reversed or outside its video; the sentence names the file and the line.
    """
    path = Path(path)
    annotations: list[Annotation] = []
    lines: dict[str, int] = {}
    for number, record in read_records(path, "annotations"):
        where = f"{path}, line {number}"
        annotation = _annotation(record, where)
        if (first := lines.setdefault(annotation.qid, number)) != number:
            raise InputError(
                f"{where}: query id {annotation.qid!r} was used on line {first}; make ids unique"
            )
        annotations.append(annotation)
    if not annotations:
        raise InputError(f"{path}: expected at least one annotation, the file is empty")
    return annotations


class VideoIndex:
    """The lines of an annotation file by video, for files of which memory holds no more.

    Keeps three numbers a line.

    Args:
        path: an annotation file.

    Raises:
        InputError: as `read_annotations`.
    """

    def __init__(self, path: Path):
        self._path = path
        numbers, offsets, vids, qids = array("q"), array("q"), array("q"), array("q")
        for number, offset, record in _records(path, "annotations"):
            annotation = _annotation(record, f"{path}, line {number}")
            numbers.append(number)
            offsets.append(offset)
            vids.append(_digest(annotation.vid))
            qids.append(_digest(annotation.qid))
        if not numbers:
            raise InputError(f"{path}: expected at least one annotation, the file is empty")
        self._numbers, self._offsets = np.asarray(numbers), np.asarray(offsets)
        self._refuse_duplicates(np.asarray(qids))
        _, first, video = np.unique(np.asarray(vids), return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        self._order = np.argsort(rank[video], kind="stable")  # rows, video after video
        self._ends = np.cumsum(np.bincount(rank[video]))  # in that order

    def __len__(self) -> int:
        """How many rows the file has."""
        return len(self._order)

    @property
    def num_videos(self) -> int:
        """How many videos they are of."""
        return len(self._ends)

    def videos(self, start: int, stop: int) -> list[list[tuple[int, Annotation]]]:
        """The rows of some videos, each with its number, in the order of the file.

        Args:
            start: the first video, counted in the order of their first rows.
            stop: after the last one.
        """
        ends = self._ends[start:stop]
        begins = [self._ends[start - 1] if start else 0, *ends[:-1]]
        with self._path.open("rb") as file:
            return [
                [(row, self._row(file, row)) for row in self._order[begin:end].tolist()]
                for begin, end in zip(begins, ends, strict=True)
            ]

    def _row(self, file: BinaryIO, row: int) -> Annotation:
        file.seek(self._offsets[row])
        return _annotation(json.loads(file.readline()), f"{self._path}, line {self._numbers[row]}")

    def _refuse_duplicates(self, qids: np.ndarray) -> None:
        order = np.argsort(qids, kind="stable")
        again = np.flatnonzero(qids[order][1:] == qids[order][:-1])
        with self._path.open("rb") as file:
            for one, other in zip(order[again].tolist(), order[again + 1].tolist(), strict=True):
                if (qid := self._row(file, one).qid) == self._row(file, other).qid:
                    raise InputError(
                        f"{self._path}, line {self._numbers[other]}: query id {qid!r} was used on "
                        f"line {self._numbers[one]}; make ids unique"
                    )


def _digest(text: str) -> int:
    data = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(data, "big", signed=True)


def read_records(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with the numbers of their lines; blank lines are skipped.

    Args:
        path: the file.
        what: it holds, for the message where it cannot be read.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object.
    """
    for number, _, record in _records(path, what):
        yield number, record


def _records(path: Path, what: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The same with the place of each line in the file, in bytes."""
    try:
        with path.open("rb") as file:
            end = 0
            for number, line in enumerate(file, start=1):
                offset, end = end, end + len(line)
                if not (text := line.decode()).strip():
                    continue
                try:
                    record = json.loads(text)
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}: not valid JSON ({error.msg} at column "
                        f"{error.colno}); expected one object per line"
                    ) from None
                if not isinstance(record, dict):
                    raise InputError(
                        f"{path}, line {number}: expected an object with named values, got a "
                        f"{type(record).__name__}"
                    )
                yield number, offset, record
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {what} {path}: not UTF-8 text") from None


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """`records` stand in `path`, one JSON object a line."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(path, "".join(lines))


def to_record(annotation: Annotation) -> dict[str, Any]:
    """The line of an annotation file that reads back as `annotation`."""
    record: dict[str, Any] = {
        "qid": annotation.qid,
        "query": annotation.query,
        "duration": annotation.duration_seconds,
        "vid": annotation.vid,
        "relevant_windows": [list(moment) for moment in annotation.moments],
    }
    if annotation.negatives:
        record["recomposed_queries"] = list(annotation.negatives)
    if annotation.clip_ids:
        record["relevant_clip_ids"] = list(annotation.clip_ids)
        record["saliency_scores"] = [list(scores) for scores in annotation.clip_scores]
    return record


def clamp_moments(annotation: Annotation) -> tuple[Moment, ...]:
    """The moments of `annotation`, none ending after its video."""
    end = annotation.duration_seconds
    return tuple((start, min(stop, end)) for start, stop in annotation.moments)


def normalized(query: str) -> str:
    """`query` as compared with others: lower case, single blanks, no punctuation at word ends."""
    words = (word.strip(".,!?;:\"'()") for word in query.lower().split())
    return " ".join(word for word in words if word)


def _annotation(record: dict[str, Any], where: str) -> Annotation:
    missing = [
        key
        for key in ("qid", "vid", "query", "duration", "relevant_windows")
        if record.get(key) is None
    ]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    qid, vid, query = str(record["qid"]), record["vid"], record["query"]
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"{where}: expected a sentence as query, got {query!r}")
    if not isinstance(vid, str) or not vid or vid in (".", "..") or set(vid) & set("/\\\0"):
        raise InputError(
            f"{where}: expected a video id that can be a file name, without slashes; got {vid!r}"
        )
    duration = _seconds(record["duration"])
    if duration is None or duration <= 0:
        raise InputError(
            f"{where}: expected a positive duration in seconds, got {record['duration']!r}"
        )
    windows = record["relevant_windows"]
    if not isinstance(windows, list) or not windows:
        raise InputError(f"{where}: expected relevant_windows [[start, end], ...], got {windows!r}")
    clip_ids, clip_scores = _highlights(record, where)
    return Annotation(
        qid=qid,
        vid=vid,
        query=query,
        duration_seconds=duration,
        moments=tuple(_moment(window, duration, f"{where}, query {qid}") for window in windows),
        negatives=_negatives(record.get("recomposed_queries"), where),
        clip_ids=clip_ids,
        clip_scores=clip_scores,
    )


def _moment(window: Any, duration: float, where: str) -> Moment:
    ends = [_seconds(value) for value in window] if isinstance(window, Sequence) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        raise InputError(f"{where}: expected a moment [start, end] in seconds, got {window!r}")
    start, end = ends[0], ends[1]
    if end <= start:
        kind = "empty" if end == start else "reversed"
        raise InputError(f"{where}: the moment [{start}, {end}] is {kind}; correct or remove it")
    if start < 0:
        raise InputError(f"{where}: the moment [{start}, {end}] starts before its video")
    if start >= duration:
        raise InputError(
            f"{where}: the moment [{start}, {end}] starts at or after the end of its video "
            f"({duration} s); correct the moment or the duration"
        )
    return start, end


def _negatives(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: expected recomposed_queries as a list of sentences")
    return tuple(value)


def _highlights(
    record: dict[str, Any], where: str
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The clips of a record that annotators scored, and their scores."""
    ids, scores = record.get("relevant_clip_ids"), record.get("saliency_scores")
    if ids is None and scores is None:
        return (), ()
    if not _whole_numbers(ids) or len(set(ids)) != len(ids):
        raise InputError(
            f"{where}: expected relevant_clip_ids as a list of clip numbers from 0, none twice; "
            f"got {ids!r}"
        )
    if not isinstance(scores, list) or not all(map(_whole_numbers, scores)):
        raise InputError(
            f"{where}: expected saliency_scores as a list with the scores of each clip, got "
            f"{scores!r}"
        )
    if len(scores) != len(ids):
        raise InputError(
            f"{where}: expected as many saliency_scores as relevant_clip_ids, got {len(scores)} "
            f"and {len(ids)}"
        )
    if len({len(row) for row in scores}) > 1 or [] in scores:
        raise InputError(
            f"{where}: expected one score of every annotator for each clip in saliency_scores"
        )
    return tuple(ids), tuple(map(tuple, scores))


def _whole_numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
