"""The store of encoded texts: each distinct text once, its tokens mapped into memory.

A store is a folder or any fsspec URL: `shard-*.arrow` (the tokens of many texts end to end),
`texts-*.parquet` (where each text lies) and `manifest.json`, written last: without it there is no
store. Names carry checksums and shards are never changed, so a store can grow while others read it.
`part-*.parquet` tells of a shard that no manifest names yet: a job that was stopped goes on there.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from shine.config import Config, TextConfig
from shine.data.local_copy import is_whole, local_copy
from shine.data.shards import (
    Listing,
    ShardFile,
    map_matrix,
    read_listing,
    write_content,
    write_matrices,
)
from shine.errors import InputError
from shine.files import sha256
from shine.storage import Storage, is_url

MANIFEST: Final = "manifest.json"
FORMAT: Final = "shine-texts-1"
_SHARD_BYTES: Final = 2**26  # of tokens; a job that is stopped loses at most so many
_OURS: Final = re.compile(r"(shard-.*\.arrow|texts-.*\.parquet)")
_PART: Final = re.compile(r"part-([0-9a-f]{12})-([0-9a-f]{12})\.parquet")  # encoder, checksum
_METADATA: Final = b"shine"
_SCHEMA: Final = pa.schema(
    [
        ("text", pa.large_string()),
        ("source", pa.large_string()),  # of precomputed tokens: their file, as it was
        ("shard", pa.string()),
        ("offset", pa.int64()),  # its first row
        ("num_tokens", pa.int64()),
        ("truncated", pa.bool_()),  # the encoder cut the text at its own limit
    ]
)
# What tells people where the tokens come from, but does not make them others.
_INFORMAL: Final = {"model", "folder", "query_file", "negative_file"}

Identity = dict[str, Any]  # who made the tokens of a store, and how


@dataclass(frozen=True, slots=True)
class Places:
    """Where texts lie: the number of a matrix, the first row in it, and how many rows follow."""

    matrix: Int[np.ndarray, " text"]
    start: Int[np.ndarray, " text"]
    length: Int[np.ndarray, " text"]

    @classmethod
    def none(cls) -> "Places":
        """The places of no text."""
        empty = np.zeros(0, np.int64)
        return cls(empty, empty, empty)

    def then(self, other: "Places") -> "Places":
        """These places, and the others after them."""
        return Places(
            np.concatenate([self.matrix, other.matrix]),
            np.concatenate([self.start, other.start]),
            np.concatenate([self.length, other.length]),
        )

    def cut(self, most: int) -> "Places":
        """The same places with at most so many rows."""
        return Places(self.matrix, self.start, np.minimum(self.length, most))

    def of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Matrix, first row and number of rows of some of the texts, shaped as `numbers`."""
        return self.matrix[numbers], self.start[numbers], self.length[numbers]


class TextStore:
    """A store, opened: matrices mapped into memory, which the processes of a node share.

    Args:
        url: where it is, for messages.
        folder: of its files on this machine.
        manifest: of it.
        texts: one row for each, as in its Parquet file.
        matrices: of its shards, in the order of the manifest.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        manifest: Mapping[str, Any],
        texts: pa.Table,
        matrices: Sequence[Float[np.ndarray, "_ width"]],
    ):
        self.folder = folder
        self.manifest = manifest
        self.matrices = matrices
        self._url = url
        self._texts = texts["text"].combine_chunks()
        names = [shard["name"] for shard in manifest["shards"]]
        numbers = _index_in(texts["shard"], pa.array(names, pa.string()))
        self._places = Places(
            numbers.to_numpy().astype(np.int64),
            texts["offset"].to_numpy(),
            texts["num_tokens"].to_numpy(),
        )

    @classmethod
    def open(cls, config: Config, cache: Path) -> "TextStore":
        """The store that `config.text` names.

        Args:
            config: of the run.
            cache: the folder for a copy of a store elsewhere.

        Raises:
            InputError: there is none, it is another encoder's, or it is not whole.
        """
        storage = text_storage(config)
        manifest = read_manifest(storage)
        if manifest is None:
            raise InputError(
                f"no text store in {storage.shown}: make it with `shine text encode --config ...`, "
                f"or set text.encoder=lexical"
            )
        _check_encoder(storage.shown, manifest["encoder"], config.text)
        texts, shards = ShardFile(**manifest["texts"]), _shards(manifest)
        files = [texts, *shards]
        folder = storage.local()
        if folder is None:
            key = f"texts-{_digest([storage.shown, manifest['encoder']])[:16]}"
            folder = local_copy(storage, files, cache, key)
        for file in files:
            if not is_whole(folder / file.name, file):
                raise _changed(folder / file.name)
        content = (folder / texts.name).read_bytes()
        if hashlib.sha256(content).hexdigest() != texts.sha256:
            raise _changed(folder / texts.name)
        matrices = [map_matrix(folder / shard.name) for shard in shards]
        table = pq.read_table(io.BytesIO(content))
        return cls(storage.shown, folder, manifest, table, matrices)

    @property
    def width(self) -> int:
        """Columns of a token."""
        return self.manifest["encoder"]["width"]

    def verify(self) -> None:
        """Every shard is the one that was written.

        Raises:
            InputError: one was changed.
        """
        for shard in _shards(self.manifest):
            if sha256(self.folder / shard.name) != shard.sha256:
                raise _changed(self.folder / shard.name)

    def find(self, texts: Sequence[str]) -> Places:
        """Where `texts` lie.

        Raises:
            InputError: some are not in the store.
        """
        found = _index_in(pa.array(texts, pa.large_string()), self._texts)
        if found.null_count:
            first = texts[found.is_null().index(True).as_py()]
            raise InputError(
                f"{found.null_count} of {len(texts)} texts are not in the text store {self._url}, "
                f"the first is {first!r}; run `shine text encode` with this configuration, which "
                f"encodes what is missing"
            )
        return Places(*self._places.of(found.to_numpy()))


class TextWriter:
    """Adds texts to a store, or begins one; nothing counts before its shard is whole.

    One job at a time writes to a store.

    Args:
        storage: of the store.
        identity: of the encoder.

    Raises:
        InputError: the store is another encoder's.
    """

    def __init__(self, storage: Storage, identity: Identity):
        self._storage = storage
        self._identity = identity
        self._manifest = manifest = read_manifest(storage)
        self._rows: dict[str, dict[str, Any]] = {}
        self._shards: dict[str, ShardFile] = {}
        if manifest is not None:
            _check_identity(storage.shown, manifest["encoder"], identity)
            self._take(storage.read(manifest["texts"]["name"]), _shards(manifest))
        self._take_parts()
        self._pending: list[dict[str, Any]] = []
        self._vectors: list[np.ndarray] = []
        self._num_tokens = 0

    def missing(self, sources: Mapping[str, str]) -> list[str]:
        """The texts of `sources`, text -> file as it is, that the store lacks or has of another."""
        return [
            text
            for text, source in sources.items()
            if text not in self._rows or self._rows[text]["source"] != source
        ]

    def lengths(self, texts: Iterable[str]) -> list[int]:
        """Tokens of each of `texts`, after `finish`."""
        return [self._rows[text]["num_tokens"] for text in texts]

    def add(
        self,
        text: str,
        tokens: Float[np.ndarray, "token width"],
        *,
        source: str = "",
        truncated: bool = False,
    ) -> None:
        """A text is in the store, if not at once then after `finish`.

        Args:
            text: that the store lacks.
            tokens: in the type of the store.
            source: the file that they come from, as it is.
            truncated: whether the encoder cut the text.
        """
        self._pending.append(
            {
                "text": text,
                "source": source,
                "offset": self._num_tokens,
                "num_tokens": len(tokens),
                "truncated": truncated,
            }
        )
        self._vectors.append(tokens)
        self._num_tokens += len(tokens)
        if self._num_tokens * tokens.itemsize * tokens.shape[1] >= _SHARD_BYTES:
            self._flush()

    def finish(self) -> dict[str, Any]:
        """The store holds every text that was added; returns its manifest.

        Raises:
            InputError: another job changed the store meanwhile.
        """
        self._flush()
        rows = sorted(self._rows.values(), key=lambda row: row["text"])
        used = {row["shard"] for row in rows}
        shards = [self._shards[name] for name in sorted(used)]
        texts = self._write_table("texts", rows, {})
        gone = used - set(self._storage.names())
        if gone:
            raise InputError(
                f"{self._storage.shown}/{min(gone)} was removed by another job that wrote the same "
                f"text store; run one at a time, and this one again"
            )
        manifest = {
            "format": FORMAT,
            "encoder": self._identity,
            "num_texts": len(rows),
            "num_tokens": sum(row["num_tokens"] for row in rows),
            "num_truncated": sum(row["truncated"] for row in rows),
            "texts": asdict(texts),
            "shards": [asdict(shard) for shard in shards],
        }
        if manifest != self._manifest:
            self._storage.write(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        present = self._storage.names()
        parts = {name: part.shard.name for name in present if (part := self._part(name))}
        old = {*_listed(self._manifest), *parts.values()}.intersection(present)
        # Parts last: a job that is stopped here leaves what names the rest.
        for name in [*sorted(filter(_OURS.fullmatch, old - {texts.name, *used})), *parts]:
            self._storage.remove(name)
        return manifest

    def _flush(self) -> None:
        """What was added is durable."""
        if not self._pending:
            return
        shard = write_matrices(self._storage, f"shard-{len(self._shards):05d}", self._vectors)
        rows = [{**row, "shard": shard.name} for row in self._pending]
        self._write_table(f"part-{self._key}", rows, asdict(shard))
        self._shards[shard.name] = shard
        self._rows.update({row["text"]: row for row in rows})
        self._pending, self._vectors, self._num_tokens = [], [], 0

    def _write_table(
        self, stem: str, rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]
    ) -> ShardFile:
        schema = _SCHEMA.with_metadata({_METADATA: json.dumps(metadata).encode()})
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([*rows], schema=schema), sink, compression="zstd")
        return write_content(self._storage, stem, "parquet", sink.getvalue())

    def _take(self, content: bytes, shards: Sequence[ShardFile]) -> None:
        """The rows of a table count, with the shards that they name."""
        rows = pq.read_table(io.BytesIO(content)).to_pylist()
        self._shards.update({shard.name: shard for shard in shards})
        self._rows.update({row["text"]: row for row in rows})

    def _take_parts(self) -> None:
        """What a stopped job of the same encoder has written counts."""
        names = self._storage.names()
        for name in names:
            part = self._part(name) if name.startswith(f"part-{self._key}-") else None
            if (
                part is not None
                and part.shard.name in names
                and self._storage.size(part.shard.name) == part.shard.bytes
            ):
                self._take(part.content, [part.shard])

    def _part(self, name: str) -> "_Part | None":
        """The shard that a file tells of, which no manifest names yet; None of any other file."""
        if not (match := _PART.fullmatch(name)):
            return None
        content = self._storage.read(name)
        if hashlib.sha256(content).hexdigest()[:12] != match[2]:
            return None
        note = pq.read_schema(io.BytesIO(content)).metadata[_METADATA]
        return _Part(content, ShardFile(**json.loads(note)))

    @property
    def _key(self) -> str:
        return _digest(_essence(self._identity))[:12]


@dataclass(frozen=True, slots=True)
class _Part:
    content: bytes  # a table of texts
    shard: ShardFile  # that they lie in


def text_storage(config: Config) -> Storage:
    """The storage of the text store that a configuration names."""
    name = config.text.store
    place = name if is_url(name) else config.path(name)
    return Storage(place, "set text.store to a folder or URL that can be read and written")


def read_manifest(storage: Storage) -> dict[str, Any] | None:
    """The manifest of a text store; None where there is no store.

    Raises:
        InputError: it is not one of this format.
    """
    if not storage.exists(MANIFEST):
        return None
    where = f"{storage.shown}/{MANIFEST}"
    try:
        content = storage.read(MANIFEST)
        manifest = json.loads(content)
        found = manifest.get("format")
    except InputError:
        raise
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{where} is not the manifest of a text store; set text.store") from None
    if found != FORMAT:
        raise InputError(
            f"{where}: expected a text store of format {FORMAT}, got {found}; set text.store to "
            f"another folder, or remove this one and run `shine text encode` again"
        )
    advice = "remove the store and run `shine text encode` again"
    read_listing(_Manifest, content, where=where, maker="encoding", advice=advice)
    return manifest


class _Manifest(Listing):
    """That of texts."""

    encoder: dict[str, Any]
    num_texts: int
    num_tokens: int
    num_truncated: int
    texts: ShardFile
    shards: list[ShardFile]

    @property
    def files(self) -> list[ShardFile]:
        """See `Listing`."""
        return [self.texts, *self.shards]


def encoder_digest(identity: Identity) -> str:
    """SHA-256 of what makes the tokens of an encoder what they are."""
    return _digest(_essence(identity))


def encoder_checksum(config: Config) -> dict[str, str]:
    """The digest of the encoder of a configuration's store, by a name; none where it has no store.

    Of the encoder alone: texts may be added to a store while runs read it.
    """
    if config.text.encoder == "lexical":
        return {}
    manifest = read_manifest(text_storage(config))
    return {} if manifest is None else {encoder_name(config): encoder_digest(manifest["encoder"])}


def encoder_name(config: Config) -> str:
    """The name of the text encoder among the checksums of a run."""
    return f"text.encoder={config.text.encoder}"


def _changed(path: Path) -> InputError:
    return InputError(
        f"{path} is not as its manifest says; remove the store and run `shine text encode` again"
    )


def _check_identity(where: str, stored: Identity, wanted: Identity) -> None:
    if _essence(stored) == _essence(wanted):
        return
    differ = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
    told = ", ".join(f"{key} {stored.get(key)!r}, not {wanted.get(key)!r}" for key in differ)
    raise InputError(
        f"the text store {where} is another encoder's ({told}); set text.store to another folder, "
        f"or remove this one"
    )


def _check_encoder(where: str, stored: Identity, config: TextConfig) -> None:
    """The store was made as the configuration says, as far as that can be told unread."""
    keys = ["encoder", "normalize", "dtype"]
    keys.append("model" if config.encoder == "hugging_face" else "width")
    for key in keys:
        if stored.get(key) != getattr(config, key):
            raise InputError(
                f"the text store {where} is another encoder's: expected text.{key}="
                f"{getattr(config, key)}, got {stored.get(key)}; set text.store to the store of "
                f"this configuration, or correct text.{key}"
            )


def _essence(identity: Identity) -> Identity:
    return {key: value for key, value in identity.items() if key not in _INFORMAL}


def _index_in(values: Any, known: pa.Array) -> Any:
    """The number of each value in `known`, null where it is none of them."""
    return pc.call_function("index_in", [values], pc.SetLookupOptions(known))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _listed(manifest: Mapping[str, Any] | None) -> set[str]:
    """The files that a manifest lists."""
    if manifest is None:
        return set()
    return {manifest["texts"]["name"], *(shard.name for shard in _shards(manifest))}


def _shards(manifest: Mapping[str, Any]) -> list[ShardFile]:
    return [ShardFile(**entry) for entry in manifest["shards"]]
