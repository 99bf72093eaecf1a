"""Layouts of annotation files, told by content; whatever the layout, a row comes in one schema.

The schema is that of the field's JSON Lines, one object for one query of one video, UTF-8:

    qid                  text or whole number, unique in its file
    vid                  text, the name of the video and of its features; no slashes
    query                text, the sentence
    duration             number above 0, seconds of the video
    relevant_windows     [[start, end], ...], seconds; 0 <= start < end and start < duration. An end
                         may lie after the duration: labels are cut there, evaluation is not
    recomposed_queries   optional: hard negatives, sentences, least altered first
    masked_queries       optional: the query with the masks of each level
    relevant_clip_ids    optional: clips of 2 s that annotators scored, from 0, none twice
    saliency_scores      optional, with the former: of each such clip, a whole number from each
                         annotator
    novels, news         optional: what is new in a query of a compositional test split, as its
                         authors note it; no training or evaluation reads them

Further values of a row are kept by `shine data convert` and read by nothing. The other layouts:

    per-video JSON   {vid: {"sentences", "timestamps", "duration"}}, as ActivityNet Captions and
                     the compositional splits of VISA (with "novels" or "news"); timestamps are
                     frames where a video has "fps" and "num_frames" and no "duration", as in TACoS
    text lines       vid start end##sentence, as Charades-STA, which say no duration

Their queries have no ids; the n-th one of a video, from 0, gets {vid}_{n}.
"""

import codecs
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from shine.errors import InputError

_HEAD: Final = 1 << 16  # bytes that tell a layout
_OPENS_A_VIDEO: Final = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')
_TEXT_LINE: Final = re.compile(r"(\S+)\s+(\S+)\s+([^\s#]+)\s*##(.*)", re.DOTALL)
_EXTRAS: Final = ("novels", "news")
_VIDEO_NAMES: Final = ("vid", "id", "video_id")
_SECONDS_NAMES: Final = ("seconds", "duration", "length", "duration_seconds")


class Layout(StrEnum):
    """How an annotation file is laid out."""

    JSON_LINES = "JSON Lines"
    PER_VIDEO = "per-video JSON"
    TEXT_LINES = "text lines"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a file as a record of the schema; or why there is none."""

    place: str  # in the file: "line 3", "video v, sentence 0"
    record: dict[str, Any] | None
    reason: str = ""  # where there is no record
    line: int = 0  # its number, and where it begins, in bytes, in a file of lines
    offset: int = 0


def detect_layout(path: Path) -> Layout:
    """The layout of an annotation file, by its first bytes; JSON Lines where it is none of ours.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise InputError(f"cannot read annotations {path}: {error.strerror}") from None
    if _OPENS_A_VIDEO.match(head):
        return Layout.PER_VIDEO
    if b"##" in head.partition(b"\n")[0] and head[:1] not in b'{["':
        return Layout.TEXT_LINES
    return Layout.JSON_LINES


def read_entries(path: Path, durations: Mapping[str, float] | None = None) -> Iterator[Entry]:
    """The rows of an annotation file of any layout, in its order.

    Args:
        path: the file.
        durations: seconds of each video, for a layout that does not say them.

    Raises:
        InputError: the file cannot be read, is damaged as a whole, or says no durations.
    """
    layout = detect_layout(path)
    if layout is Layout.JSON_LINES:
        return json_lines(path, "annotations")
    return _text_lines(path, durations) if layout is Layout.TEXT_LINES else _videos(path)


def json_lines(path: Path, what: str) -> Iterator[Entry]:
    """The objects of a JSON Lines file; blank lines are skipped.

    Args:
        path: the file.
        what: it holds, for the message where it cannot be read.

    Raises:
        InputError: the file cannot be read.
    """
    for number, offset, text in _lines(path, what):
        record, reason = _object(text)
        yield Entry(f"line {number}", record, reason, number, offset)


def _object(text: str | None) -> tuple[dict[str, Any] | None, str]:
    """The object of a line; or none, and why."""
    if text is None:
        return None, "not UTF-8 text"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON ({_json_fault(error)}); expected one object per line"
    if not isinstance(record, dict):
        return None, f"expected an object with named values, got a {type(record).__name__}"
    return record, ""


def _lines(path: Path, what: str) -> Iterator[tuple[int, int, str | None]]:
    """(number, place in bytes, text) of each line that is not blank; None for text in no UTF-8."""
    try:
        with path.open("rb") as file:
            end = 0
            for number, line in enumerate(file, start=1):
                offset, end = end, end + len(line)
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    offset, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode()
                except UnicodeDecodeError:
                    text = None
                if text is None or text.strip():
                    yield number, offset, text
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _text_lines(path: Path, durations: Mapping[str, float] | None) -> Iterator[Entry]:
    if durations is None:
        raise InputError(
            f"{path}: lines `vid start end##sentence` do not say how long the videos are; convert "
            f"them with `shine data convert {path} --durations FILE --out OUT.jsonl`, where FILE "
            f"has the seconds of each video"
        )
    return _text_entries(path, durations)


def _text_entries(path: Path, durations: Mapping[str, float]) -> Iterator[Entry]:
    counts: Counter[str] = Counter()
    for number, _, text in _lines(path, "annotations"):
        place = f"line {number}"
        match = _TEXT_LINE.fullmatch((text or "").strip())
        if match is None:
            reason = "not UTF-8 text" if text is None else "expected `vid start end##sentence`"
            yield Entry(place, None, reason)
            continue
        vid, start, end, query = match.groups()
        row = _row(vid, counts[vid], query, durations.get(vid), [_number(start), _number(end)])
        counts[vid] += 1
        if vid in durations:
            yield Entry(place, row)
        else:
            yield Entry(place, None, f"video {vid} has no duration in the file of durations")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _row(vid: str, number: int, query: Any, duration: Any, window: Any) -> dict[str, Any]:
    row = {"qid": f"{vid}_{number}", "query": query, "duration": duration, "vid": vid}
    return row if window is None else row | {"relevant_windows": [window]}


def _videos(path: Path) -> Iterator[Entry]:
    """The sentences of a file with one object for each video, which is read at once."""
    videos = _whole_json(path, "annotations")
    if not isinstance(videos, dict):
        raise InputError(f"{path}: expected one object with the videos by name")
    for vid, video in videos.items():
        yield from _video_entries(vid, video)


def _video_entries(vid: str, video: Any) -> Iterator[Entry]:
    place = f"video {vid}"
    sentences = video.get("sentences") if isinstance(video, dict) else None
    if not isinstance(sentences, list):
        yield Entry(place, None, "expected an object with sentences, timestamps and duration")
        return
    windows = video.get("timestamps")
    windows = [None] * len(sentences) if windows is None else windows
    if not isinstance(windows, list) or len(windows) != len(sentences):
        found = len(windows) if isinstance(windows, list) else repr(windows)
        yield Entry(
            place, None, f"expected a timestamp of each of the {len(sentences)} sentences: {found}"
        )
        return
    duration = video.get("duration")
    if duration is None and {"fps", "num_frames"} <= video.keys():
        fps = finite(video["fps"])
        if fps is None or fps <= 0:
            yield Entry(place, None, f"expected fps above 0, got {video['fps']!r}")
            return
        duration = _over(video["num_frames"], fps)
        windows = [
            [_over(end, fps) for end in window] if isinstance(window, list) else window
            for window in windows
        ]
    for number, (query, window) in enumerate(zip(sentences, windows, strict=True)):
        row = _row(vid, number, query, duration, window)
        for name in _EXTRAS:
            if (extra := video.get(name)) is not None:
                dealt = isinstance(extra, list) and len(extra) == len(sentences)
                row[name] = extra[number] if dealt else extra
        yield Entry(f"{place}, sentence {number}", row)


def _over(frames: Any, fps: float) -> Any:
    """Seconds of a number of frames; what is no number stays, to be told."""
    number = finite(frames)
    return frames if number is None else number / fps


def finite(value: Any) -> float | None:
    """`value` where it is a finite number, truth values not counted; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _whole_json(path: Path, what: str) -> Any:
    """The value of a JSON file, in which no object has a name twice."""
    try:
        return json.loads(_text(path, what), object_pairs_hook=_distinct)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}, " if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}: {line}not valid JSON ({_json_fault(error)})") from None


def _text(path: Path, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {what} {path}: not UTF-8 text") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"{name!r} occurs twice in one object; make the names unique")
    return values


def read_durations(path: Path) -> dict[str, float]:
    """Seconds of each video: of a JSON object {vid: seconds}, JSON Lines, or a table with commas.

    Lines, as `shine features extract` writes, and columns have names: one of vid, id, video_id and
    one of seconds, duration, length, duration_seconds. Lines of videos that were refused do not
    count. Of a table whose first line has no such names, the first two columns count.

    Raises:
        InputError: the file cannot be read, or a video has no positive number of seconds, or two.
    """
    text = _text(path, "durations")
    if _is_of_lines(text):
        pairs = list(_lines_of_videos(path))
    elif text.lstrip().startswith("{"):
        videos = _whole_json(path, "durations")
        pairs = [(f"video {vid}", vid, value) for vid, value in videos.items()]
    else:
        pairs = list(_table(text))
    durations: dict[str, float] = {}
    for place, vid, value in pairs:
        seconds = finite(_number(value) if isinstance(value, str) else value)
        if seconds is None or seconds <= 0:
            raise InputError(f"{path}, {place}: expected seconds of a video, got {value!r}")
        if durations.setdefault(vid, seconds) != seconds:
            raise InputError(f"{path}, {place}: video {vid} has two durations; keep one")
    if not durations:
        raise InputError(f"{path}: expected the seconds of each video, there are none")
    return durations


def _is_of_lines(text: str) -> bool:
    """Whether the first line is an object that names its video."""
    record, _ = _object(text.lstrip().partition("\n")[0])
    return record is not None and any(isinstance(record.get(name), str) for name in _VIDEO_NAMES)


def _lines_of_videos(path: Path) -> Iterator[tuple[str, str, Any]]:
    for entry in json_lines(path, "durations"):
        record = entry.record
        if record is None:
            raise InputError(f"{path}, {entry.place}: {entry.reason}")
        if "refused" in record:
            continue
        vid = next((record[name] for name in _VIDEO_NAMES if name in record), None)
        if not isinstance(vid, str):
            raise InputError(f"{path}, {entry.place}: expected the name of a video, got {vid!r}")
        seconds = (record[name] for name in _SECONDS_NAMES if name in record)
        yield entry.place, vid, next(seconds, None)


def _table(text: str) -> Iterator[tuple[str, str, str | None]]:
    lines = csv.reader(io.StringIO(text, newline=""))
    column, seconds = 0, 1
    for number, cells in enumerate(lines, start=1):
        names = [cell.strip().lower() for cell in cells]
        if number == 1 and set(names) & set(_VIDEO_NAMES) and set(names) & set(_SECONDS_NAMES):
            column = next(i for i, name in enumerate(names) if name in _VIDEO_NAMES)
            seconds = next(i for i, name in enumerate(names) if name in _SECONDS_NAMES)
        elif any(names):
            value = cells[seconds].strip() if len(cells) > max(column, seconds) else None
            yield f"line {number}", cells[column].strip() if len(cells) > column else "", value
