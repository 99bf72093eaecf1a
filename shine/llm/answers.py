"""Answers that were paid for, kept by the key of their request on any fsspec URL.

A worker writes small immutable segments, `segments/<batch>-<SHA-256>.jsonl`; compaction merges them
into `answers-<SHA-256>.parquet`, sorted by key. A name carries the checksum of its content, so a
torn file is known and left out. Nothing is deleted before what replaces it is whole, so a process
killed at any time loses nothing, and several jobs may use one store at a time.
"""

import asyncio
import bisect
import functools
import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from shine.files import sha256
from shine.llm.request import Answer
from shine.storage import AbsentError, Storage

logger = logging.getLogger(__name__)

ADVICE: Final = "set negatives.llm.store to a place that can be read and written"
_Found = TypeVar("_Found")
SCHEMA: Final = pa.schema(
    [
        ("key", pa.binary(32)),
        ("content", pa.large_string()),
        ("problem", pa.large_string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("dollars", pa.float64()),
        ("model", pa.large_string()),
    ]
)
_SEGMENTS: Final = "segments"  # the folder of them
_SEGMENT: Final = re.compile(r"([A-Za-z0-9_]+)-([0-9a-f]{64})\.jsonl")
_PARQUET: Final = re.compile(r"answers-([0-9a-f]{64})\.parquet")
_RUN_ANSWERS: Final = 100_000  # of segments, sorted in memory at once
_GROUP_ANSWERS: Final = 20_000  # of a row group, and of a step of the merge
_LISTINGS: Final = 20  # while another job compacts


class Answers:
    """Answers by key: immutable, in one Arrow table sorted by it.

    `Answers(answers.table)` is the same again, without copying, also in another process.
    """

    def __init__(self, table: pa.Table):
        self.table: pa.Table = table.combine_chunks()
        self._keys = _keys(self.table)
        self._first = self._keys[:, 0].astype(np.uint64)
        # Almost always 1: keys whose first eight bytes are the same.
        self._most_alike = 1
        while len(self) > self._most_alike and np.any(
            self._first[self._most_alike :] == self._first[: -self._most_alike]
        ):
            self._most_alike += 1

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])[0]

    def get(self, key: str) -> Answer | None:
        """The answer to the request with this key, None where there is none."""
        (row,) = self._rows([key])
        return None if row < 0 else _answer(self.table.slice(row, 1).to_pylist()[0])

    def missing(self, keys: Sequence[str]) -> Bool[np.ndarray, " key"]:
        """Which of `keys` have no answer."""
        return self._rows(keys) < 0

    def _rows(self, keys: Sequence[str]) -> Int[np.ndarray, " key"]:
        wanted = np.frombuffer(bytes.fromhex("".join(keys)), ">u8").reshape(-1, 4)
        rows = np.full(len(keys), -1)
        if not len(self):
            return rows
        low = np.searchsorted(self._first, wanted[:, 0].astype(np.uint64))
        for offset in range(self._most_alike):
            place = np.minimum(low + offset, len(self) - 1)
            rows = np.where((self._keys[place] == wanted).all(axis=1), place, rows)
        return rows


class AnswerStore:
    """Answers in a folder or at a fsspec URL, which exists after the first write.

    Args:
        url: where; files in it that are not of a store are left alone.
        sleep: waits between the tries at a write to a remote storage.
    """

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep):
        self._storage = Storage(url, ADVICE, sleep=sleep)
        self._warned: set[str] = set()

    def load(self) -> Answers:
        """Every answer in the store.

        Of two with one key, that with content is taken, else the first by the name of its file.

        Raises:
            InputError: the storage fails.
        """
        return Answers(_relisting(self._load))

    def finished(self, batch: str) -> Mapping[str, Answer]:
        """The answers of a batch's segments by key: what an earlier attempt at it has written.

        Those that another job has compacted since are found by `load` alone.

        Raises:
            InputError: the storage fails.
        """
        return _relisting(lambda: self._finished(batch))

    def writer(
        self,
        batch: str,
        *,
        segment_answers: int,
        segment_seconds: float,
        offload: Callable[[Callable[[], None]], Awaitable[None]] = asyncio.to_thread,
    ) -> "SegmentWriter":
        """Writes segments of a batch.

        Args:
            batch: letters, digits and underscores.
            segment_answers: a segment holds so many at most.
            segment_seconds: one is written so long after its first answer at the latest.
            offload: runs a function that blocks.
        """
        assert re.fullmatch(r"[A-Za-z0-9_]+", batch), batch
        write = functools.partial(self.write_segment, batch)
        return SegmentWriter(write, segment_answers, segment_seconds, offload)

    def write_segment(self, batch: str, answers: Sequence[Answer]) -> None:
        """A segment with `answers` is durable.

        Raises:
            InputError: the storage fails, a remote one several times.
        """
        lines = "".join(
            json.dumps(_row(answer), ensure_ascii=False, allow_nan=False) + "\n"
            for answer in answers
        )
        data = lines.encode()
        name = f"{batch}-{hashlib.sha256(data).hexdigest()}.jsonl"
        self._storage.write(f"{_SEGMENTS}/{name}", data)

    def compact(self) -> None:
        """All answers are in one Parquet file; torn and foreign files stay.

        Memory holds a hundred thousand answers, however many there are.

        Raises:
            InputError: the storage fails.
        """
        _relisting(self._compact)

    def _compact(self) -> None:
        segments, parquets = self._list()
        if not segments and len(parquets) < 2:
            return
        with tempfile.TemporaryDirectory(prefix="shine-answers-") as folder:
            runs, torn = [], set[str]()
            for number, name in enumerate(parquets):
                path = Path(folder, f"parquet-{number}")
                if self._fetch(name, path):
                    runs.append((name, path))
                else:
                    torn.add(name)
            for number, (name, table) in enumerate(self._runs(segments, torn)):
                path = Path(folder, f"run-{number}")
                pq.write_table(table, path, row_group_size=_GROUP_ANSWERS)
                runs.append((name, path))
            done = [name for name in (*segments, *parquets) if name not in torn]
            if not runs or done == parquets[:1]:
                return
            merged = Path(folder, "merged")
            with pq.ParquetWriter(merged, SCHEMA, compression="zstd") as writer:
                for table in _merged([path for _, path in sorted(runs)]):
                    writer.write_table(table, row_group_size=_GROUP_ANSWERS)
            name = f"answers-{sha256(merged)}.parquet"
            self._storage.write(name, merged)
        self._storage.remove(*(old for old in done if old != name))

    def _runs(self, segments: Sequence[str], torn: set[str]) -> Iterator[tuple[str, pa.Table]]:
        """Tables sorted by key, each under the name of its first segment; adds to `torn`."""
        rows: list[dict[str, Any]] = []
        first = ""
        for name, segment in self._read_segments(segments):
            if segment is None:
                torn.add(name)
                continue
            first = first if rows else name
            rows += segment
            if len(rows) >= _RUN_ANSWERS:
                yield first, _sorted(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
        if rows:
            yield first, _sorted(pa.Table.from_pylist(rows, SCHEMA))

    def _load(self) -> pa.Table:
        segments, parquets = self._list()
        tables = [SCHEMA.empty_table()]
        with tempfile.TemporaryDirectory(prefix="shine-answers-") as folder:
            for name in parquets:
                path = Path(folder, "parquet")
                if self._fetch(name, path):
                    tables.append(pq.read_table(path, schema=SCHEMA, memory_map=False))
            tables += [table for _, table in self._runs(segments, set())]
        return _sorted(pa.concat_tables(tables))

    def _finished(self, batch: str) -> dict[str, Answer]:
        found: dict[str, Answer] = {}
        names = self._names(_SEGMENTS, _SEGMENT, prefix=f"{batch}-")
        for _, segment in self._read_segments(names):
            for answer in map(_answer, segment or ()):
                known = found.get(answer.key)
                if known is None or (known.problem and not answer.problem):
                    found[answer.key] = answer
        return found

    def _list(self) -> tuple[list[str], list[str]]:
        """Segments and Parquet files, sorted.

        Segments first: what is compacted between the two is then found in a Parquet file.
        """
        segments = self._names(_SEGMENTS, _SEGMENT)
        return segments, self._names("", _PARQUET)

    def _names(self, folder: str, pattern: re.Pattern[str], prefix: str = "") -> list[str]:
        """Files of a kind in a folder, sorted."""
        found = self._storage.names(folder, prefix)
        place = f"{folder}/" if folder else ""
        return [f"{place}{name}" for name in found if pattern.fullmatch(name)]

    def _read_segments(
        self, names: Sequence[str]
    ) -> Iterator[tuple[str, list[dict[str, Any]] | None]]:
        """The rows of each segment, None for a torn one."""
        for name, data in self._storage.read_each(names):
            if hashlib.sha256(data).hexdigest() != _checksum(name, _SEGMENT):
                self._warn(name)
                yield name, None
            else:
                lines = data.decode().split("\n")[:-1]
                yield name, [_stored(json.loads(line)) for line in lines]

    def _fetch(self, name: str, path: Path) -> bool:
        """`path` is a copy of `name`; False where that is torn."""
        self._storage.fetch(name, path)
        if sha256(path) == _checksum(name, _PARQUET):
            return True
        self._warn(name)
        return False

    def _warn(self, name: str) -> None:
        if not self._warned:
            logger.warning(
                "%s: %s is torn and left out, as any other such file will be",
                self._storage.shown,
                name,
            )
        self._warned.add(name)

    @property
    def torn(self) -> int:
        """Torn files met so far."""
        return len(self._warned)


class SegmentWriter:
    """Makes answers durable in segments; belongs to one event loop."""

    def __init__(
        self,
        write: Callable[[Sequence[Answer]], None],
        segment_answers: int,
        segment_seconds: float,
        offload: Callable[[Callable[[], None]], Awaitable[None]],
    ):
        self._write = write
        self._segment_answers = segment_answers
        self._segment_seconds = segment_seconds
        self._offload = offload
        self._buffer: list[Answer] = []
        self._segment: asyncio.Future[None] | None = None  # done when the buffer is durable
        self._timer: asyncio.TimerHandle | None = None
        self._writing: set[asyncio.Task[None]] = set()
        self._unwritten = 0

    @property
    def has_room(self) -> bool:
        """Whether one more answer leaves fewer than `segment_answers` unwritten."""
        return self._unwritten + 1 < self._segment_answers

    def add(self, answer: Answer) -> asyncio.Future[None]:
        """`answer` is in the segment begun, and durable when the future is done.

        The future raises InputError where the storage fails.
        """
        loop = asyncio.get_running_loop()
        if self._segment is None:
            self._segment = loop.create_future()
            self._timer = loop.call_later(self._segment_seconds, self.seal)
        segment = self._segment
        self._buffer.append(answer)
        self._unwritten += 1
        if len(self._buffer) >= self._segment_answers:
            self.seal()
        return asyncio.shield(segment)

    def seal(self) -> None:
        """The segment begun, if any, is being written."""
        if self._segment is None:
            return
        assert self._timer is not None
        self._timer.cancel()
        task = asyncio.get_running_loop().create_task(self._written(self._buffer, self._segment))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        self._buffer, self._segment, self._timer = [], None, None

    async def flush(self) -> None:
        """Every answer added is durable, or its future has raised."""
        self.seal()
        while self._writing:
            await asyncio.wait(self._writing)

    async def _written(self, answers: list[Answer], segment: asyncio.Future[None]) -> None:
        try:
            await self._offload(functools.partial(self._write, answers))
        except Exception as error:
            segment.set_exception(error)
            segment.exception()  # seen, even if nobody waits any more
        else:
            self._unwritten -= len(answers)
            segment.set_result(None)


def _relisting(read: Callable[[], _Found]) -> _Found:
    """What `read` gives, tried again where a file is gone that was listed."""
    for _ in range(_LISTINGS - 1):
        try:
            return read()
        except AbsentError:
            continue
    return read()


def _checksum(name: str, pattern: re.Pattern[str]) -> str:
    match = pattern.fullmatch(name.rsplit("/", 1)[-1])
    assert match is not None
    return match.groups()[-1]


def _row(answer: Answer) -> dict[str, Any]:
    """An answer as a line of a segment; what is no text is replaced."""
    return {
        "key": answer.key,
        "content": _text(answer.content),
        "problem": _text(answer.problem),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "dollars": answer.dollars,
        "model": _text(answer.model),
    }


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _stored(row: dict[str, Any]) -> dict[str, Any]:
    """A line of a segment as a row of a table."""
    return {**row, "key": bytes.fromhex(row["key"])}


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(**{**row, "key": row["key"].hex()})


def _keys(table: pa.Table) -> np.ndarray:
    """Keys as four big-endian numbers each, without copying: [row, 4]."""
    column = table.column("key").combine_chunks()
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if not len(chunk):
        return np.empty((0, 4), ">u8")
    values = np.frombuffer(chunk.buffers()[1], ">u8")
    return values[4 * chunk.offset : 4 * (chunk.offset + len(chunk))].reshape(-1, 4)


def _sorted(table: pa.Table) -> pa.Table:
    """By key; of equal keys the first with content, else the first."""
    keys = _keys(table).astype(np.uint64)
    has_problem = pc.call_function("not_equal", [table.column("problem"), ""]).to_numpy()
    order = np.lexsort((has_problem, *keys.T[::-1]))
    ordered = keys[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return table.take(order[first])


def _merged(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The rows of Parquet files sorted by key, merged step by step."""
    streams = [_steps(path) for path in paths]
    heads = [next(stream, None) for stream in streams]
    while any(head is not None for head in heads):
        bound = min(head["key"][-1].as_py() for head in heads if head is not None)
        taken = []
        for position, head in enumerate(heads):
            if head is None:
                continue
            cut = bisect.bisect_right(head["key"].to_pylist(), bound)
            taken.append(head.slice(0, cut))
            rest = head.slice(cut)
            heads[position] = rest if rest.num_rows else next(streams[position], None)
        yield _sorted(pa.concat_tables(taken))


def _steps(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_GROUP_ANSWERS):
            yield pa.Table.from_batches([batch], SCHEMA)
