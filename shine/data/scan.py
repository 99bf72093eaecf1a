"""One annotation file in columns, and every defect that its rows show by themselves."""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from jaxtyping import Bool, Float, Int

from shine.data.annotations import MASK, Annotation, normalized, parse
from shine.data.formats import Entry, Layout, detect_layout, read_entries
from shine.data.strides import other_duration
from shine.errors import InputError

_ODD: Final = np.int64(0x1E3779B97F4A7C15)  # spreads small numbers over those of 64 bits


@dataclass(frozen=True, slots=True)
class Example:
    """One occurrence of a defect."""

    file: str
    place: str  # in the file; "" for all of it
    qid: str | None
    detail: str


@dataclass
class Findings:
    """How often each kind of defect occurs in a file, and where.

    Args:
        most: examples that are kept of each kind.
    """

    most: int | None = 5
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, kind: str, example: Example) -> None:
        """One more of a kind, seen at a place."""
        self.counts[kind] += 1
        self._keep(kind, example)

    def add_rows(
        self,
        kind: str,
        scan: "Scan",
        rows: Int[np.ndarray, " found"],
        detail: Callable[[int], str],
        earlier: Int[np.ndarray, " row"] | None = None,
    ) -> None:
        """Rows of a file that show a kind; their places are read from the file again.

        Args:
            kind: of defect.
            scan: the file.
            rows: numbers of its usable rows, one for each occurrence.
            detail: what is to be said of an occurrence, by its number.
            earlier: of each row of the file, the one that it repeats, to be named after the detail.
        """
        if not len(rows):
            return
        self.counts[kind] += len(rows)
        kept = rows[: self.most].tolist()
        others = [] if earlier is None else earlier[kept].tolist()
        places = scan.places([*kept, *others])
        for index, row in enumerate(kept):
            place, qid = places[row]
            words = detail(index)
            if others:
                words = f"{words} {', query '.join(places[others[index]])}"
            self._keep(kind, Example(str(scan.path), place, qid, words))

    def _keep(self, kind: str, example: Example) -> None:
        examples = self.examples.setdefault(kind, [])
        if self.most is None or len(examples) < self.most:
            examples.append(example)


@dataclass(frozen=True, eq=False)
class Scan:
    """The usable rows of a file in columns; texts are kept as hashes of this process.

    Some 150 bytes a row, and the distinct names of videos.
    """

    path: Path
    role: str
    layout: Layout | None  # None: the file cannot be read
    findings: Findings
    unusable: set[int]  # entries that are no row
    entry: Int[np.ndarray, " row"]  # which entry of the file a row is
    line: Int[np.ndarray, " row"]  # in a file of lines: its number, and where it begins
    offset: Int[np.ndarray, " row"]
    video: Int[np.ndarray, " row"]  # number of the video, the same in all files of a check
    qid: Int[np.ndarray, " row"]
    query: Int[np.ndarray, " row"]
    text: Int[np.ndarray, " row"]  # of the normalised query
    pair: Int[np.ndarray, " row"]  # of the video and the normalised query
    whole: Int[np.ndarray, " row"]  # of the pair and the moments
    duration: Float[np.ndarray, " row"]  # seconds
    words: Int[np.ndarray, " row"]
    moment_row: Int[np.ndarray, " moment"]
    start: Float[np.ndarray, " moment"]  # seconds
    end: Float[np.ndarray, " moment"]
    num_negatives: Int[np.ndarray, " row"]
    negative_row: Int[np.ndarray, " negative"]
    negative_level: Int[np.ndarray, " negative"]
    negative_text: Int[np.ndarray, " negative"]  # of the normalised sentence
    negative_pair: Int[np.ndarray, " negative"]
    negative_masked: Bool[np.ndarray, " negative"]  # a placeholder is left in it
    durations: Mapping[str, float] | None  # with which the file was read

    def __len__(self) -> int:
        return len(self.entry)

    def places(self, rows: Iterable[int]) -> dict[int, tuple[str, str]]:
        """The place in the file and the query id of some rows."""
        if self.layout is Layout.JSON_LINES:
            with self.path.open("rb") as file:
                return {row: self._line(file, row) for row in rows}
        wanted = {int(self.entry[row]): row for row in rows}
        return {
            wanted[number]: (entry.place, str(entry.record["qid"]))
            for number, entry in enumerate(read_entries(self.path, self.durations))
            if number in wanted and entry.record is not None
        }

    def _line(self, file: BinaryIO, row: int) -> tuple[str, str]:
        file.seek(self.offset[row])
        return f"line {self.line[row]}", str(json.loads(file.readline())["qid"])


def scan_file(
    path: Path,
    role: str,
    videos: dict[str, int],
    *,
    durations: Mapping[str, float] | None = None,
    most: int | None = 5,
) -> Scan:
    """A file in columns, with the defects of its rows: those that `parse` tells.

    Args:
        path: the file, of any layout; one that cannot be read has that defect.
        role: of the file in a run.
        videos: numbers of videos by name; gets those of the file.
        durations: seconds of each video, for a layout that does not say them.
        most: examples to keep of each kind; None: all.
    """
    findings, unusable, columns = Findings(most), set(), _Columns()
    layout = None
    try:
        layout = detect_layout(path)
        for number, entry in enumerate(read_entries(path, durations)):
            if entry.record is None:
                unusable.add(number)
                findings.add("malformed", Example(str(path), entry.place, None, entry.reason))
                continue
            annotation, defects = parse(entry.record)
            if annotation is None:
                unusable.add(number)
                qid = entry.record.get("qid")
                for defect in defects:
                    example = Example(
                        str(path), entry.place, None if qid is None else str(qid), defect.reason
                    )
                    findings.add(defect.kind, example)
                continue
            columns.add(number, entry, annotation, videos)
        if not columns.numbers["entry"] and not unusable:
            findings.add("no_rows", Example(str(path), "", None, "the file is empty"))
    except InputError as error:
        findings.add("unreadable", Example(str(path), "", None, str(error)))
    return Scan(path, role, layout, findings, unusable, **columns.arrays(), durations=durations)


class _Columns:
    """Columns of a scan as they grow."""

    def __init__(self):
        whole = "entry line offset video qid query text pair whole words moment_row num_negatives"
        negative = (f"negative_{name}" for name in ("row", "level", "text", "pair"))
        self.numbers = {name: array("q") for name in (*whole.split(), *negative)}
        self._seconds = {name: array("d") for name in ("duration", "start", "end")}
        self._masked = array("b")

    def add(
        self, number: int, entry: Entry, annotation: Annotation, videos: dict[str, int]
    ) -> None:
        """One more row."""
        numbers, row = self.numbers, len(self.numbers["entry"])
        query = normalized(annotation.query)
        numbers["query"].append(hash(annotation.query))
        numbers["entry"].append(number)
        numbers["line"].append(entry.line)
        numbers["offset"].append(entry.offset)
        numbers["video"].append(videos.setdefault(annotation.vid, len(videos)))
        numbers["qid"].append(hash(annotation.qid))
        numbers["text"].append(hash(query))
        numbers["pair"].append(hash((annotation.vid, query)))
        numbers["whole"].append(hash((annotation.vid, query, annotation.moments)))
        numbers["words"].append(len(annotation.query.split()))
        numbers["moment_row"].extend([row] * len(annotation.moments))
        self._seconds["duration"].append(annotation.duration_seconds)
        self._seconds["start"].extend(start for start, _ in annotation.moments)
        self._seconds["end"].extend(end for _, end in annotation.moments)
        numbers["num_negatives"].append(len(annotation.negatives))
        for level, sentence in enumerate(annotation.negatives):
            negative = normalized(sentence)
            numbers["negative_row"].append(row)
            numbers["negative_level"].append(level)
            numbers["negative_text"].append(hash(negative))
            numbers["negative_pair"].append(hash((annotation.vid, negative)))
            self._masked.append(MASK in sentence)

    def arrays(self) -> dict[str, Any]:
        """The columns by name."""
        whole = {name: np.asarray(column).view(np.int64) for name, column in self.numbers.items()}
        seconds = {name: np.asarray(column) for name, column in self._seconds.items()}
        return whole | seconds | {"negative_masked": np.asarray(self._masked).view(np.bool_)}


def repeated(
    values: Int[np.ndarray, " row"],
) -> tuple[Int[np.ndarray, " again"], Int[np.ndarray, " row"]]:
    """Rows whose value an earlier row has, rising; and the first row with the value of each row."""
    _, index, inverse = np.unique(values, return_index=True, return_inverse=True)
    first = index[inverse]
    return np.flatnonzero(first != np.arange(len(values))), first


def check_rows(
    scan: Scan, clip_seconds: float, *, reference: bool = False
) -> Int[np.ndarray, " refused"]:
    """The findings of a scan have what its rows show beside each other.

    Args:
        scan: the file.
        clip_seconds: by more than so many, durations of one video may not differ.
        reference: as published, such durations are used as they are.

    Returns:
        The usable rows that training refuses beside the others.
    """
    findings = scan.findings
    used, first = repeated(scan.qid)
    findings.add_rows("qid", scan, used, lambda _: "also the id of", first)
    rows = np.delete(np.arange(len(scan)), used)
    differing = _durations(scan, rows, clip_seconds, reference=reference)
    _moments(scan)
    same, first_same = repeated(scan.whole)
    findings.add_rows("same_row", scan, same, lambda _: "as in", first_same)
    pairs, first_pair = repeated(scan.pair)
    others = np.setdiff1d(pairs, same)
    findings.add_rows("same_query", scan, others, lambda _: "other moment in", first_pair)
    _negatives(scan)
    return np.union1d(used, differing).astype(np.int64)


def _durations(
    scan: Scan, rows: Int[np.ndarray, " some"], clip_seconds: float, *, reference: bool
) -> Int[np.ndarray, " refused"]:
    """Rows that give their video another duration than its first row, where that is refused."""
    _, first = repeated(scan.video[rows])
    durations, stated = scan.duration[rows], scan.duration[rows][first]
    far = other_duration(durations, stated, clip_seconds) & (not reference)
    for kind, where in (("duration", far), ("duration_near", (durations != stated) & ~far)):
        pairs = np.stack([durations, stated], axis=1)[where]

        def seconds(index: int, pairs: np.ndarray = pairs) -> str:
            return f"{pairs[index, 0]:g} s here, {pairs[index, 1]:g} s in an earlier row"

        scan.findings.add_rows(kind, scan, rows[where], seconds)
    return rows[far]


def beyond_seconds(scan: Scan) -> Float[np.ndarray, " row"]:
    """Seconds by which the moments of each row end after its video, the largest; 0 at least."""
    beyond = np.zeros(len(scan))
    np.maximum.at(beyond, scan.moment_row, scan.end - scan.duration[scan.moment_row])
    return beyond


def _moments(scan: Scan) -> None:
    beyond = beyond_seconds(scan)
    late = np.flatnonzero(beyond > 0)
    scan.findings.add_rows(
        "beyond", scan, late, lambda index: f"ends {beyond[late[index]]:.4g} s after its video"
    )
    fills = (scan.start <= 0) & (scan.end >= scan.duration[scan.moment_row])
    rows = np.unique(scan.moment_row[fills])
    scan.findings.add_rows(
        "fills", scan, rows, lambda index: f"covers all {scan.duration[rows[index]]:g} s"
    )


def _negatives(scan: Scan) -> None:
    """Hard negatives in the file that no loss should rank below their query, and uneven lists."""
    row, level, text = scan.negative_row, scan.negative_level, scan.negative_text
    if not len(row):
        return
    equal, empty = text == scan.text[row], text == hash("")
    before = np.zeros(len(row), bool)
    before[repeated(text + row * _ODD)[0]] = True  # the same sentence in the same row
    kinds = {
        "negative_empty": empty,
        "negative_equal": equal,
        "negative_true": np.isin(scan.negative_pair, scan.pair) & ~equal,
        "negative_repeated": before & ~empty,
        "negative_masked": scan.negative_masked,
    }
    for kind, where in kinds.items():
        levels = level[where]
        scan.findings.add_rows(
            kind, scan, row[where], lambda index, levels=levels: f"level {levels[index] + 1}"
        )
    usual = int(np.bincount(scan.num_negatives).argmax())
    odd = np.flatnonzero(scan.num_negatives != usual)
    scan.findings.add_rows(
        "negative_levels",
        scan,
        odd,
        lambda index: f"{scan.num_negatives[odd[index]]} levels, most rows have {usual}",
    )
