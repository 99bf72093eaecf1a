"""The packed store of clip features, opened: mapped into memory, or read by ranges where it lies.

A store is a folder at any URL: `shard-*.arrow` (uncompressed Arrow IPC, the clips of many videos
end to end), `videos-*.parquet` (where each video lies) and `manifest.json`, written last: a folder
without it was never finished and is not read.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from shine.data.layout import FORMAT, MANIFEST
from shine.data.local_copy import default_cache, is_whole, local_copy
from shine.data.shards import Listing, ShardFile, map_matrix, read_listing
from shine.errors import InputError
from shine.files import sha256
from shine.storage import Storage

_HEAD: Final = 4096  # bytes of a shard that hold all that lies before its clips

_VIDEOS: Final = pa.schema(
    [
        pa.field("vid", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("num_clips", pa.int64(), nullable=False),
    ]
)

Place = tuple[str, int, int]  # shard, first clip in it, clips


def part_widths(width: int, manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Columns of the parts of a stored clip, each followed by temporal end points in a batch.

    One part holds all video features; a second one those of audio, where the store has some.
    """
    audio = manifest.get("audio_width", 0)
    return (width - audio, audio) if audio else (width,)


@dataclass(frozen=True)
class FeatureStore:
    """A packed store, opened: views into memory-mapped shards that a node's processes share."""

    folder: Path | str  # with the shards
    manifest: dict[str, Any]
    _place: Mapping[str, Place]
    _shards: Mapping[str, np.ndarray]  # shard -> [clip, feature]

    @classmethod
    def open(cls, place: str | Path, cache: Path | None = None) -> "FeatureStore":
        """The store at a path or URL; from another machine it is copied once to this one.

        Args:
            place: of the store.
            cache: the folder for copies; None: in the user's folder of caches.

        Raises:
            InputError: there is no finished store, it does not hold what its manifest says, or
                the disk has no room for a copy.
        """
        storage = open_storage(place)
        index = _read_index(storage)
        folder = storage.local()
        if folder is None:
            folder = local_copy(storage, index.files, cache or default_cache(), index.digest)
        for file in index.files:
            if not is_whole(folder / file.name, file):
                raise _cut(folder / file.name, file)
        shards = {file.name: map_matrix(folder / file.name) for file in index.files}
        _check_places(index, {name: matrix.shape for name, matrix in shards.items()}, storage)
        return FeatureStore(folder, index.manifest, index.places, shards)

    @property
    def width(self) -> int:
        """Columns of a stored clip."""
        return self.manifest["width"]

    @property
    def clip_width(self) -> int:
        """Columns of a clip vector as a model sees it: with temporal end points after each part."""
        return self.width + 2 * len(self.parts)

    @property
    def parts(self) -> tuple[int, ...]:
        """Columns of the parts of a stored clip; see `part_widths`."""
        return part_widths(self.width, self.manifest)

    @property
    def simulated(self) -> str | None:
        """What was simulated, where the features are not those of real videos."""
        return self.manifest["simulated"]

    def num_clips(self, vid: str) -> int:
        """Clips of one video.

        Raises:
            InputError: the store does not hold the video.
        """
        return self.place(vid)[2]

    def place(self, vid: str) -> Place:
        """Where the clips of one video lie.

        Raises:
            InputError: the store does not hold the video.
        """
        if vid not in self._place:
            raise InputError(
                f"the feature store {self.folder} does not hold video {vid}; add its file to "
                f"features.sources and pack again"
            )
        return self._place[vid]

    def clips(self, vid: str) -> np.ndarray:
        """The clips of one video, [clip, feature]; of a mapped store a read-only view."""
        return self.read([vid], [self.num_clips(vid)])[0]

    def read(self, vids: Sequence[str], lengths: Sequence[int]) -> list[np.ndarray]:
        """The first `lengths` clips of videos, each [clip, feature], as they are stored."""
        found = []
        for vid, length in zip(vids, lengths, strict=True):
            shard, offset, _ = self.place(vid)
            found.append(self._shards[shard][offset : offset + length])
        return found

    def gather(
        self, vids: Sequence[str], lengths: Int[np.ndarray, " video"]
    ) -> Float[Tensor, "video clip feature"]:
        """The first `lengths` clips of videos as a model sees them, 0 on padding."""
        return torch.from_numpy(padded(self.read(vids, lengths.tolist()), lengths, self.parts))

    def verify(self) -> None:
        """Every shard is the one that was packed.

        Raises:
            InputError: a shard was changed or cut after packing.
        """
        for shard in self.manifest["shards"]:
            if self._digest(shard["name"]) != shard["sha256"]:
                raise InputError(
                    f"{self.folder}/{shard['name']} was changed after packing; pack the features "
                    f"again"
                )

    def _digest(self, name: str) -> str:
        return sha256(Path(self.folder) / name)


@dataclass(frozen=True)
class RangeStore(FeatureStore):
    """A packed store read where it lies, the range of bytes of each video that is asked for."""

    _storage: Storage
    _begins: dict[str, int] = field(default_factory=dict)  # shard -> byte of its first clip

    @classmethod
    def open(cls, place: str | Path, cache: Path | None = None) -> "RangeStore":
        """The store at a path or URL, of which nothing but where its videos lie is read.

        Raises:
            InputError: there is no finished store, or a shard is missing or not as long as it was.
        """
        storage = open_storage(place)
        index = _read_index(storage)
        sizes = storage.sizes()
        for file in index.files:
            where = f"{storage.shown.rstrip('/')}/{file.name}"
            if file.name not in sizes:
                raise InputError(
                    f"{where} is missing; pack the features again, or copy the whole store"
                )
            if sizes[file.name] not in (None, file.bytes):
                raise _cut(where, file)
        return RangeStore(storage.shown, index.manifest, index.places, {}, storage)

    @classmethod
    def of(cls, place: str | Path, manifest: dict[str, Any]) -> "RangeStore":
        """The store with a known manifest, to be read by places alone."""
        storage = open_storage(place)
        return RangeStore(storage.shown, manifest, {}, {}, storage)

    def read(self, vids: Sequence[str], lengths: Sequence[int]) -> list[np.ndarray]:
        """See `FeatureStore`; all ranges are asked for at once."""
        places = [self.place(vid)[:2] for vid in vids]
        return self.read_places(
            [(*place, length) for place, length in zip(places, lengths, strict=True)]
        )

    def read_places(self, places: Sequence[Place]) -> list[np.ndarray]:
        """The clips that lie at `places`, each [clip, feature].

        Raises:
            InputError: the storage cannot be read, or a shard is not what was packed.
        """
        self._find_begins({shard for shard, _, _ in places})
        dtype = np.dtype(self.manifest["dtype"])
        row = self.width * dtype.itemsize
        ranges = [
            (shard, first, first + length * row)
            for shard, offset, length in places
            for first in [self._begins[shard] + offset * row]
        ]
        found = self._storage.read_ranges(ranges)
        for content, (name, first, stop) in zip(found, ranges, strict=True):
            if len(content) != stop - first:
                raise InputError(f"{self.folder}/{name} is cut short; pack the features again")
        return [np.frombuffer(content, dtype).reshape(-1, self.width) for content in found]

    def _find_begins(self, shards: set[str]) -> None:
        new = sorted(shards - self._begins.keys())
        heads = self._storage.read_ranges([(name, 0, _HEAD) for name in new])
        for name, head in zip(new, heads, strict=True):
            self._begins[name] = _first_clip(head, f"{self.folder}/{name}")

    def _digest(self, name: str) -> str:
        return self._storage.sha256(name)


def padded(
    stored: Sequence[np.ndarray], lengths: Int[np.ndarray, " video"], parts: Sequence[int]
) -> Float[np.ndarray, "video clip feature"]:
    """Stored clips as a model sees them: temporal end points after each part, 0 on padding.

    Args:
        stored: of each video [clip, column], at least as many as its length.
        lengths: clips of each video that are taken.
        parts: columns of the parts of a stored clip.
    """
    times = end_points(lengths)
    clips = np.zeros((*times.shape[:2], sum(parts) + 2 * len(parts)), np.float32)
    for index, (video, length) in enumerate(zip(stored, lengths.tolist(), strict=True)):
        for taken, column, width in columns_of(parts):
            clips[index, :length, column : column + width] = video[:length, taken : taken + width]
    for _, column, width in columns_of(parts):
        clips[..., column + width : column + width + 2] = times
    return clips


def end_points(lengths: Int[np.ndarray, " video"]) -> Float[np.ndarray, "video clip 2"]:
    """Where each clip begins and ends in its video, from 0 to 1; 0 on padding."""
    longest = int(lengths.max(initial=1))
    count = lengths[:, None].astype(np.float32)
    start = np.arange(longest, dtype=np.float32) / count
    mask = np.arange(longest) < lengths[:, None]
    return np.stack([start, start + 1 / count], axis=-1) * mask[..., None]


def open_storage(place: str | Path) -> Storage:
    """The folder of a store that is to be read."""
    return Storage(
        place, "check features.store, or make it with `shine features pack --config ...`"
    )


@dataclass(frozen=True)
class _Index:
    """What a store holds, and where."""

    manifest: dict[str, Any]
    digest: str  # of the manifest
    files: list[ShardFile]
    places: dict[str, Place]


def _read_index(storage: Storage) -> _Index:
    """The manifest of a store and where its videos lie.

    Raises:
        InputError: there is no finished store of this format.
    """
    if not storage.exists(MANIFEST):
        raise InputError(
            f"no feature store in {storage.shown}: make it with `shine features pack --config "
            f"...`, or set features.store"
        )
    content = storage.read(MANIFEST)
    where = f"{storage.shown.rstrip('/')}/{MANIFEST}"
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not valid JSON; pack the features again") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{storage.shown}: expected a store of format {FORMAT}, got {found}; pack the features "
            f"again"
        )
    listed = read_listing(
        _Manifest, content, where=where, maker="packing", advice="pack the features again"
    )
    places = _places(storage, listed.videos)
    return _Index(manifest, hashlib.sha256(content).hexdigest(), listed.shards, places)


class _Manifest(Listing):
    """That of clips."""

    width: Annotated[int, Field(ge=1)]
    audio_width: Annotated[int, Field(ge=0)] = 0
    clip_seconds: float
    normalize: bool
    dtype: Literal["float16", "float32"]
    num_videos: int
    num_clips: int
    simulated: str | None
    videos: ShardFile
    shards: list[ShardFile]

    @property
    def files(self) -> list[ShardFile]:
        """See `Listing`."""
        return [self.videos, *self.shards]


def _cut(where: str | Path, file: ShardFile) -> InputError:
    return InputError(
        f"{where}: not a whole shard, expected {file.bytes} bytes; pack the features again"
    )


def _places(storage: Storage, videos: ShardFile) -> dict[str, Place]:
    where = f"{storage.shown.rstrip('/')}/{videos.name}"
    content = storage.read(videos.name) if storage.exists(videos.name) else b""
    if hashlib.sha256(content).hexdigest() != videos.sha256:
        raise InputError(f"{where} is not the one that was packed; pack the features again")
    try:
        table = pq.read_table(io.BytesIO(content)).select(_VIDEOS.names).cast(_VIDEOS)
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise InputError(
            f"{where} is not as packing writes it ({' '.join(str(error).split())[:100]}); pack the "
            f"features again"
        ) from None
    columns = [column.to_pylist() for column in table.columns]
    return {vid: tuple(place) for vid, *place in zip(*columns, strict=True)}


def _check_places(index: _Index, shapes: Mapping[str, tuple[int, ...]], storage: Storage) -> None:
    """Every video lies within its shard.

    Raises:
        InputError: one does not.
    """
    width = index.manifest["width"]
    for vid, (shard, offset, length) in index.places.items():
        rows, columns = shapes.get(shard, (0, 0))
        if not 0 <= offset <= offset + length <= rows or columns != width:
            raise InputError(
                f"{storage.shown}: video {vid} does not lie within {shard}, which holds {rows} "
                f"clips of {columns} columns; pack the features again"
            )


def _first_clip(head: bytes, where: str) -> int:
    """The byte of a shard where its clips begin: after two messages, a schema and a batch.

    Raises:
        InputError: it is not such a file.
    """
    place = len(b"ARROW1\0\0")
    for _ in range(2):  # a message: its mark and its length, as four bytes each, then itself
        length = int.from_bytes(head[place + 4 : place + 8], "little")
        if head[:6] != b"ARROW1" or head[place : place + 4] != b"\xff" * 4 or length > _HEAD:
            raise InputError(f"{where}: not a whole shard; pack the features again")
        place += 8 + length
    return place


def columns_of(parts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Of each part: its first column as stored, its first column in a batch, and its width."""
    taken = 0
    for number, width in enumerate(parts):
        yield taken, taken + 2 * number, width
        taken += width
