"""Annotation files of the field; `shine.data.formats` describes their layouts and our schema."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from shine.data.formats import Layout, detect_layout, finite, json_lines, read_entries
from shine.errors import InputError

Moment = tuple[float, float]  # [start, end] in seconds
LABEL_SECONDS = 2  # of a clip with a highlight label
_MOMENT_KINDS = ("moment", "empty", "reversed", "before", "after")  # of defects
_NO_NAME = frozenset("/\\\0")  # cannot be part of the name of a file
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


@dataclass(frozen=True, slots=True)
class Defect:
    """Why a row cannot be used."""

    kind: str  # a key of `shine.data.check.KINDS`
    reason: str  # what was expected, what came, what to do


def read_annotations(path: str | Path, *, need_moments: bool = True) -> list[Annotation]:
    """Every row of an annotation file, in order; the layout is told by the content.

    Args:
        path: the file.
        need_moments: whether a row without moments, as in a test split whose answers are withheld,
            is an error; else it has none.

    Raises:
        InputError: the file is missing, empty or malformed, a query id occurs twice, or a moment is
            empty, reversed or outside its video; the sentence names the file and the line.
    """
    path = Path(path)
    annotations: list[Annotation] = []
    places: dict[str, str] = {}
    for entry in read_entries(path):
        where = f"{path}, {entry.place}"
        if entry.record is None:
            raise InputError(f"{where}: {entry.reason}")
        annotation = _annotation(entry.record, where, need_moments=need_moments)
        if (first := places.setdefault(annotation.qid, entry.place)) != entry.place:
            raise InputError(_used(where, annotation.qid, first))
        annotations.append(annotation)
    if not annotations:
        raise InputError(f"{path}: expected at least one annotation, the file is empty")
    return annotations


class VideoIndex:
    """The lines of an annotation file by video, for files of which memory holds no more.

    Keeps three numbers a line.

    Args:
        path: an annotation file, JSON Lines.

    Raises:
        InputError: as `read_annotations`.
    """

    def __init__(self, path: Path):
        self._path = path
        numbers, offsets, vids, qids = array("q"), array("q"), array("q"), array("q")
        if (layout := detect_layout(path)) is not Layout.JSON_LINES:
            raise InputError(
                f"{path}: expected JSON Lines, which can be read video by video, got {layout}; "
                f"convert it with `shine data convert {path} --out OUT.jsonl`"
            )
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
                    where = f"{self._path}, line {self._numbers[other]}"
                    raise InputError(_used(where, qid, f"line {self._numbers[one]}"))


def _used(where: str, qid: str, first: str) -> str:
    return f"{where}: query id {qid!r} was used on {first}; make ids unique"


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
    for entry in json_lines(path, what):
        if entry.record is None:
            raise InputError(f"{path}, {entry.place}: {entry.reason}")
        yield entry.line, entry.offset, entry.record


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """`records` stand in `path`, one JSON object a line; until the end, what was there."""
    building = path.with_name(path.name + ".part")
    try:
        with building.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(map(_line, records))
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def _line(record: dict[str, Any]) -> str:
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character, which JSON can hold and UTF-8 cannot
        return json.dumps(record) + "\n"
    return line


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


def parse(
    record: dict[str, Any], *, need_moments: bool = True
) -> tuple[Annotation | None, list[Defect]]:
    """The annotation of a record of the schema; or none, and every defect that prevents it."""
    defects = _wrong_values(record, need_moments)
    duration = finite(record.get("duration"))
    moments: list[Moment] = []
    windows = record.get("relevant_windows")
    for window in windows if isinstance(windows, list) else ():
        moment = _moment(window, duration if duration and duration > 0 else None)
        if isinstance(moment, Defect):
            defects.append(moment)
        else:
            moments.append(moment)
    try:
        negatives = _negatives(record.get("recomposed_queries"))
        clip_ids, clip_scores = _highlights(record)
    except InputError as error:
        return None, [*defects, Defect("optional", str(error))]
    if defects or duration is None:
        return None, defects
    return Annotation(
        qid=str(record["qid"]),
        vid=record["vid"],
        query=record["query"],
        duration_seconds=duration,
        moments=tuple(moments),
        negatives=negatives,
        clip_ids=clip_ids,
        clip_scores=clip_scores,
    ), []


def _wrong_values(record: dict[str, Any], need_moments: bool) -> list[Defect]:
    """What is wrong with the values that every row has, but for single moments."""
    needed = ("qid", "vid", "query", "duration", *(("relevant_windows",) * need_moments))
    missing = [name for name in needed if record.get(name) is None]
    defects = [Defect("missing", f"missing {', '.join(missing)}")] if missing else []
    expected = {
        "qid": (_is_id, "text or a whole number as qid, got"),
        "query": (_is_sentence, "a sentence as query, got"),
        "vid": (_is_name, "a video id that can be a file name, without slashes; got"),
        "duration": (_is_duration, "a positive duration in seconds, got"),
        "relevant_windows": (
            _is_filled_list if need_moments else _is_list,
            "relevant_windows [[start, end], ...], got",
        ),
    }
    for name, (is_good, what) in expected.items():
        value = record.get(name)
        if value is not None and not is_good(value):
            defects.append(Defect("value", f"expected {what} {value!r}"))
    return defects


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) or _is_text(value)


def _is_sentence(value: Any) -> bool:
    return _is_text(value) and bool(value.strip())


def _is_name(value: Any) -> bool:
    return _is_text(value) and value not in (".", "..") and not set(value) & _NO_NAME


def _is_text(value: Any) -> bool:
    """Whether it is text, and without half a character, which JSON can hold and no file can."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_duration(value: Any) -> bool:
    seconds = finite(value)
    return seconds is not None and seconds > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_filled_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _annotation(record: dict[str, Any], where: str, *, need_moments: bool = True) -> Annotation:
    annotation, defects = parse(record, need_moments=need_moments)
    if annotation is None:
        query = f", query {record['qid']}" if defects[0].kind in _MOMENT_KINDS else ""
        raise InputError(f"{where}{query}: {defects[0].reason}")
    return annotation


def _moment(window: Any, duration: float | None) -> Moment | Defect:
    """A moment, or what is wrong with it; without a duration, its video has no end."""
    ends = [finite(value) for value in window] if isinstance(window, list) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return Defect("moment", f"expected a moment [start, end] in seconds, got {window!r}")
    start, end = ends[0], ends[1]
    what = f"the moment [{start}, {end}]"
    if end <= start:
        kind = "empty" if end == start else "reversed"
        return Defect(kind, f"{what} is {kind}; correct or remove it")
    if start < 0:
        return Defect("before", f"{what} starts before its video")
    if duration is not None and start >= duration:
        return Defect(
            "after",
            f"{what} starts at or after the end of its video ({duration} s); correct the moment "
            f"or the duration",
        )
    return start, end


def _negatives(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError("expected recomposed_queries as a list of sentences")
    return tuple(value)


def _highlights(
    record: dict[str, Any],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The clips of a record that annotators scored, and their scores."""
    ids, scores = record.get("relevant_clip_ids"), record.get("saliency_scores")
    if ids is None and scores is None:
        return (), ()
    if not _whole_numbers(ids) or len(set(ids)) != len(ids):
        raise InputError(
            f"expected relevant_clip_ids as a list of clip numbers from 0, none twice; got {ids!r}"
        )
    if not isinstance(scores, list) or not all(map(_whole_numbers, scores)):
        raise InputError(
            f"expected saliency_scores as a list with the scores of each clip, got {scores!r}"
        )
    if len(scores) != len(ids):
        raise InputError(
            f"expected as many saliency_scores as relevant_clip_ids, got {len(scores)} "
            f"and {len(ids)}"
        )
    if len({len(row) for row in scores}) > 1 or [] in scores:
        raise InputError("expected one score of every annotator for each clip in saliency_scores")
    return tuple(ids), tuple(map(tuple, scores))


def _whole_numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )
