"""Files of hard negatives: what a row holds, writing ours, reading ours and the field's."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from shine.data.annotations import MASK, normalized, read_records
from shine.errors import InputError

FORMAT: Final = "shine-negatives-1"
_METADATA: Final = b"shine"
_ROW_GROUP: Final = 8192  # rows
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class NegativeRecord:
    """The hard negatives of one query as they are stored; lists have one item per level."""

    qid: str
    vid: str
    query: str
    masked_queries: list[str]
    recomposed_queries: list[str]  # "" where the generator had nothing
    valid: list[bool]
    source: list[str]  # the generator
    attempts: list[int]  # sentences that were proposed for the level
    reasons: list[str]  # why a level is invalid; "" where it is valid
    refused: list[str]  # why the sentences before were not taken; "" where there were none
    tagger: str  # name and version
    seed: int
    # What the row cost. Of rows that share a request, the first one of the file bears it.
    requests: list[str]  # keys of the answers that its sentences were made of
    prompt_tokens: int
    completion_tokens: int
    dollars: float


SCHEMA: Final = pa.schema(
    [
        ("qid", pa.string()),
        ("vid", pa.string()),
        ("query", pa.string()),
        ("masked_queries", pa.list_(pa.string())),
        ("recomposed_queries", pa.list_(pa.string())),
        ("valid", pa.list_(pa.bool_())),
        ("source", pa.list_(pa.string())),
        ("attempts", pa.list_(pa.int64())),
        ("reasons", pa.list_(pa.string())),
        ("refused", pa.list_(pa.string())),
        ("tagger", pa.string()),
        ("seed", pa.int64()),
        ("requests", pa.list_(pa.string())),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("dollars", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class HardNegatives:
    """The hard negatives of one query, least altered first, as a training uses them."""

    queries: tuple[str, ...]
    valid: tuple[bool, ...]  # an invalid level takes no part in a loss
    source: tuple[str, ...]  # the generator of each level
    masked: tuple[str, ...] = ()  # the query with the masks of each level, where they are known


def write_negatives(
    path: Path, records: Iterable[NegativeRecord], metadata: Mapping[str, Any]
) -> None:
    """The records stand in `path`, a Parquet file; a reader never sees half of it.

    Args:
        path: the file; an older one is replaced at the end.
        records: in the order to be written; taken a few thousand at a time.
        metadata: how they were made, in values that JSON can hold.
    """
    note = json.dumps({"format": FORMAT, **metadata}, sort_keys=True).encode()
    schema = SCHEMA.with_metadata({_METADATA: note})
    rest = iter(records)
    with (
        _replacing(path) as part,
        pq.ParquetWriter(part, schema, compression="zstd") as writer,
    ):
        while group := [asdict(record) for record in islice(rest, _ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def write_field_jsonl(path: Path, records: Iterable[NegativeRecord], annotations: Path) -> None:
    """`path` is the annotation file with `masked_queries` and `recomposed_queries` in every line.

    So published programs read it; what is known of each level (`valid`, `source`, `attempts`,
    `reasons`) stands beside them. A reader never sees half of the file.

    Args:
        path: the file; an older one is replaced at the end.
        records: one per line of the annotation file, in its order.
        annotations: the annotation file.
    """
    lines = read_records(annotations, "annotations")
    with _replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for (_, line), record in zip(lines, records, strict=True):
            file.write(json.dumps({**line, **_field_values(record)}) + "\n")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which is `path` at the end unless something fails."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _field_values(record: NegativeRecord) -> dict[str, Any]:
    """What a line of the field's jsonl says of a query's negatives, and whether they are valid."""
    names = ("masked_queries", "recomposed_queries", "valid", "source", "attempts", "reasons")
    return {name: getattr(record, name) for name in names}


def read_negatives(path: str | Path) -> dict[str, HardNegatives]:
    """The hard negatives of every query in a file, by query id.

    Args:
        path: a Parquet file of `shine negatives generate`, a folder of such files, or JSON Lines of
            the field with `qid`, `vid`, `query` and `recomposed_queries`. Levels of the latter are
            valid as its list `valid` says, and without one unless they are empty, hold a
            placeholder, or equal the query, another query of the video or a lower level.

    Raises:
        InputError: the file is missing, malformed or without negatives, or a query id occurs twice.
    """
    path = Path(path)
    rows = _parquet_rows(path) if path.is_dir() or path.suffix == ".parquet" else _json_rows(path)
    negatives: dict[str, HardNegatives] = {}
    for where, qid, found in rows:
        if qid in negatives:
            raise InputError(f"{where}: query id {qid!r} occurs twice; make ids unique")
        negatives[qid] = found
    if not negatives:
        raise InputError(
            f"{path}: expected at least one query with negatives, found none; make them with "
            f"`shine negatives generate`"
        )
    return negatives


def _parquet_rows(path: Path) -> Iterator[tuple[str, str, HardNegatives]]:
    """(place, query id, negatives) of every row of a Parquet file or of a folder of them."""
    columns = ["qid", "recomposed_queries", "valid", "source", "masked_queries"]
    for part in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        with _open_parquet(part) as file:
            found = {field.name: field.type for field in file.schema_arrow}
            for name in columns:
                if found.get(name) != SCHEMA.field(name).type:
                    raise InputError(
                        f"{part}: expected a column {name!r} of {SCHEMA.field(name).type}, got "
                        f"{found.get(name, 'none')}; make it with `shine negatives generate`"
                    )
            for batch in file.iter_batches(_ROW_GROUP, columns=columns):
                for row in batch.to_pylist():
                    levels = [tuple(row[name] or ()) for name in columns[1:]]
                    if row["qid"] is None or len(set(map(len, levels))) > 1:
                        raise InputError(
                            f"{part}, query {row['qid']}: expected an id and as many values in "
                            f"{', '.join(columns[2:])} as in {columns[1]}, got "
                            f"{', '.join(str(len(level)) for level in levels)}"
                        )
                    yield str(part), row["qid"], HardNegatives(*levels)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except OSError as error:
        raise InputError(f"cannot read negatives {path}: {error.strerror or error}") from None
    except pa.ArrowInvalid:
        raise InputError(f"{path}: expected a Parquet file, got something else") from None


def _json_rows(path: Path) -> Iterator[tuple[str, str, HardNegatives]]:
    """(place, query id, negatives) of every line that has negatives."""
    records = read_records(path, "negatives")
    rows = [(where := f"{path}, line {n}", _checked(row, where)) for n, row in records]
    told: defaultdict[str, set[str]] = defaultdict(set)  # what is true somewhere in each video
    for _, row in rows:
        told[row["vid"]].add(normalized(row["query"]))
    for where, row in rows:
        if queries := tuple(row.get("recomposed_queries") or ()):
            valid = _per_level(row, "valid", bool, len(queries), where)
            source = _per_level(row, "source", str, len(queries), where)
            yield (
                where,
                str(row["qid"]),
                HardNegatives(
                    queries,
                    valid or _plainly_valid(queries, told[row["vid"]]),
                    source or ("file",) * len(queries),
                    _per_level(row, "masked_queries", str, len(queries), where),
                ),
            )


def _per_level(
    row: dict[str, Any], name: str, kind: type[Value], num_levels: int, where: str
) -> tuple[Value, ...]:
    """What a line says of each level, or of all at once; nothing where it is silent."""
    values: Any = row.get(name) or []
    if isinstance(values, str):
        values = [values] * num_levels
    if not isinstance(values, list):
        values = [values]
    if values and (len(values) != num_levels or not all(isinstance(v, kind) for v in values)):
        raise InputError(
            f"{where}: expected {name} as a list with one {kind.__name__} per recomposed query, "
            f"got {values!r}"
        )
    return tuple(values)


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    texts = row.get("recomposed_queries")
    if (
        row.get("qid") is None
        or not isinstance(row.get("vid"), str)
        or not isinstance(row.get("query"), str)
        or not isinstance(texts, list | None)
        or not all(isinstance(text, str) for text in texts or ())
    ):
        raise InputError(
            f"{where}: expected an object with qid, vid, query and a list of sentences as "
            f"recomposed_queries"
        )
    return row


def _plainly_valid(sentences: tuple[str, ...], told: set[str]) -> tuple[bool, ...]:
    texts = [normalized(sentence) for sentence in sentences]
    return tuple(
        bool(text) and text not in told and MASK not in text and text not in texts[:level]
        for level, text in enumerate(texts)
    )
