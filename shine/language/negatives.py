"""Files of hard negatives: what a row holds, writing ours, reading ours and the field's."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from shine.data.annotations import MASK, normalized, read_records
from shine.errors import InputError

FORMAT: Final = "shine-negatives-1"
_METADATA: Final = b"shine"
_ROW_GROUP: Final = 8192  # rows


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
    reasons: list[str]  # why a level is invalid; "" where it is valid
    tagger: str  # name and version
    seed: int


SCHEMA: Final = pa.schema(
    [
        ("qid", pa.string()),
        ("vid", pa.string()),
        ("query", pa.string()),
        ("masked_queries", pa.list_(pa.string())),
        ("recomposed_queries", pa.list_(pa.string())),
        ("valid", pa.list_(pa.bool_())),
        ("source", pa.list_(pa.string())),
        ("reasons", pa.list_(pa.string())),
        ("tagger", pa.string()),
        ("seed", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class HardNegatives:
    """The hard negatives of one query, least altered first, as a training uses them."""

    queries: tuple[str, ...]
    valid: tuple[bool, ...]  # an invalid level takes no part in a loss
    source: tuple[str, ...]  # the generator of each level


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
    part = path.with_name(path.name + ".part")
    rest = iter(records)
    try:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            while group := [asdict(record) for record in islice(rest, _ROW_GROUP)]:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_negatives(path: str | Path) -> dict[str, HardNegatives]:
    """The hard negatives of every query in a file, by query id.

    Args:
        path: a Parquet file of `shine negatives generate`, a folder of such files, or JSON Lines of
            the field with `qid`, `vid`, `query` and `recomposed_queries`. Levels of the latter are
            valid unless they are empty, hold a placeholder, or equal the query, another query of
            the video or a lower level.

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
    columns = ["qid", "recomposed_queries", "valid", "source"]
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
                            f"valid and source as in recomposed_queries, got "
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
            valid = _plainly_valid(queries, told[row["vid"]])
            source = (str(row.get("source", "file")),) * len(queries)
            yield where, str(row["qid"]), HardNegatives(queries, valid, source)


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
