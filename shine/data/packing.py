"""From raw features to a packed store (`shine.data.store`).

The videos are packed in units that are planned before anything is read, so a store is the same
whoever packs it. Beside the shards of a unit lies a record of what it was made from; packing that
was stopped goes on with the units whose records still hold. The manifest is written last: until
then a reader sees the store that was there.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shine.config import Config, FeaturesConfig, SourceConfig
from shine.data.arrays import MAX_BYTES, unit_rows
from shine.data.layout import FORMAT, MANIFEST
from shine.data.pooling import num_pooled, pool_clips
from shine.data.shards import ShardFile, write_content, write_matrices
from shine.data.sources import RawSource, VideoRefused, located, open_source
from shine.errors import InputError
from shine.storage import AbsentError, Storage, shown

# Sources whose clips are joined may differ in their number by so many clips, or by this share.
_SPARE_CLIPS, _SPARE_SHARE = 2, 0.1
VIDEOS_PER_UNIT: Final = 128
SHARD_BYTES: Final = 128 * 2**20  # of clips, unless one video has more
_RECORDS: Final = "building"  # how names of records begin
_RECORD: Final = re.compile(rf"{_RECORDS}-\d+-[0-9a-f]{{32}}\.json")
# What packing writes beside the manifest and the records, also that of earlier formats.
_OURS: Final = re.compile(r"(shard-[\w.-]+\.arrow|videos(-\w+)?\.parquet)")


@dataclass(frozen=True, slots=True)
class Unit:
    """Videos that one worker packs, in shards of their own."""

    index: int
    vids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One written shard and the videos in it."""

    file: ShardFile
    vids: tuple[str, ...]
    num_clips: tuple[int, ...]  # of each video


@dataclass(frozen=True, slots=True)
class Refusal:
    """A video that was left out."""

    vid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Packed:
    """What became of a unit."""

    shards: tuple[Shard, ...]
    refused: tuple[Refusal, ...]

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Packed":
        """What `to_json` wrote."""
        values = json.loads(text)
        shards = tuple(
            Shard(ShardFile(**shard["file"]), tuple(shard["vids"]), tuple(shard["num_clips"]))
            for shard in values["shards"]
        )
        return cls(shards, tuple(Refusal(**refusal) for refusal in values["refused"]))


# Packs units, in their order: (config, widths, units) -> what became of each.
Runner = Callable[[FeaturesConfig, Sequence[int], Sequence[Unit]], Iterable[Packed]]


def open_store(url: str) -> Storage:
    """The folder of a packed store."""
    return Storage(url, "set features.store to a folder or URL that can be written")


class Packer:
    """Packs units of one store.

    Args:
        config: of the store, with absolute places.
        widths: columns that the clips of each source must have.
    """

    def __init__(self, config: FeaturesConfig, widths: Sequence[int]):
        self._config = config
        self._widths = widths
        self._storage = open_store(config.store)
        self._sources = [open_source(part) for part in config.parts]

    def pack(self, unit: Unit) -> Packed:
        """What became of the videos of `unit`, whose shards are written, now or before.

        A video that cannot be used is left out with its reason.

        Raises:
            InputError: a storage failed.
        """
        record = self._record(unit)
        if self._storage.exists(record):
            known = Packed.from_json(self._storage.read(record))
            if all(_is_as_written(self._storage, shard.file) for shard in known.shards):
                return known
        packed = self._pack(unit)
        self._storage.write(record, packed.to_json().encode())
        return packed

    def _record(self, unit: Unit) -> str:
        """The name of the record of `unit`, another one where anything that decides it is."""
        settings = self._config.model_dump(mode="json")
        decides = [
            FORMAT,
            [settings[name] for name in ("sources", "audio", "clip_seconds", "normalize", "dtype")],
            self._widths,
            [(vid, [source.version(vid) for source in self._sources]) for vid in unit.vids],
        ]
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        return f"{_RECORDS}-{unit.index:05d}-{digest[:32]}.json"

    def _pack(self, unit: Unit) -> Packed:
        refused: list[Refusal] = []
        shards: list[Shard] = []
        vids: list[str] = []
        arrays: list[np.ndarray] = []

        def write() -> None:
            number = f".{len(shards)}" if shards else ""
            file = write_matrices(self._storage, f"shard-{unit.index:05d}{number}", arrays)
            shards.append(Shard(file, tuple(vids), tuple(map(len, arrays))))
            vids.clear()
            arrays.clear()

        for vid in unit.vids:
            try:
                clips = self._clips(vid)
            except VideoRefused as error:
                refused.append(Refusal(vid, str(error)))
                continue
            if arrays and sum(array.nbytes for array in arrays) + clips.nbytes > SHARD_BYTES:
                write()
            vids.append(vid)
            arrays.append(clips)
        if arrays:
            write()
        return Packed(tuple(shards), tuple(refused))

    def _clips(self, vid: str) -> np.ndarray:
        """The clips of one video as the store holds them."""
        parts = [
            source.read(vid, width)
            for source, width in zip(self._sources, self._widths, strict=True)
        ]
        try:
            return stored_clips(parts, self._config, f"features of video {vid}")
        except InputError as error:
            raise VideoRefused(str(error)) from None


def source_widths(config: FeaturesConfig, vids: Sequence[str]) -> tuple[int, ...]:
    """Columns of the clips in each source: those of the first video that can be read.

    Args:
        config: with absolute places.
        vids: videos to look for, in this order.

    Raises:
        InputError: a source is missing or none of its videos can be read, or the columns do not add
            up to `config.width`.
    """
    sources = [open_source(part) for part in config.parts]
    if config.width is not None and len(sources) == 1:
        return (config.width,)
    widths = tuple(_first_width(source, vids) for source in sources)
    if config.width is not None and sum(widths) != config.width:
        found = " + ".join(
            f"{width} ({shown(part.path).rstrip('/').rsplit('/', 1)[-1]})"
            for width, part in zip(widths, config.parts, strict=True)
        )
        raise InputError(
            f"expected clips of {config.width} columns (features.width), the files have {found} = "
            f"{sum(widths)}; correct the width or the sources"
        )
    return widths


def _first_width(source: RawSource, vids: Iterable[str]) -> int:
    reason = ""
    for vid in vids:
        try:
            return source.read(vid).shape[1]
        except VideoRefused as error:
            reason = reason or str(error)
    raise InputError(f"no video could be packed; the first reason: {reason}")


def stored_clips(
    parts: Sequence[np.ndarray], config: FeaturesConfig, where: str = "the features"
) -> np.ndarray:
    """The clips of one video as a store holds them: those of all sources, side by side.

    Each part is brought to the clips of the store. There are as many as the shortest part has.

    Args:
        parts: float32 [clip, feature], one for each of `config.parts`.
        config: of the store.
        where: begins the message where the parts cannot be joined.

    Raises:
        InputError: the numbers of clips do not belong together, or values do not fit.
    """
    parts = [
        _pooled(part, source, config.clip_seconds, where)
        for part, source in zip(parts, config.parts, strict=True)
    ]
    lengths = [len(part) for part in parts]
    if max(lengths) - min(lengths) > max(_SPARE_CLIPS, _SPARE_SHARE * max(lengths)):
        places = [shown(part.path) for part in config.parts]
        found = ", ".join(f"{n} in {place}" for n, place in zip(lengths, places, strict=True))
        raise InputError(
            f"{where}: the numbers of clips differ too much to be of one stride ({found}); extract "
            f"all with clips of {config.clip_seconds:g} s, or set clip_seconds of the source"
        )
    parts = [part[: min(lengths)] for part in parts]
    if config.normalize:
        parts = [unit_rows(part, where) for part in parts]
    largest = max(max(part.max(), -part.min()) for part in parts)
    if largest > np.finfo(config.dtype).max:
        raise InputError(
            f"{where}: {largest:.3g} does not fit {config.dtype}; set "
            f"features.dtype=float32 or features.normalize=true"
        )
    return np.concatenate(parts, axis=1, dtype=config.dtype, casting="same_kind")


def _pooled(clips: np.ndarray, source: SourceConfig, clip_seconds: float, where: str) -> np.ndarray:
    """The clips of one source at the length of those of the store."""
    if source.clip_seconds is None or source.clip_seconds == clip_seconds:
        return clips
    count = num_pooled(len(clips), source.clip_seconds, clip_seconds)
    if count * clips.shape[1] * 4 > MAX_BYTES:
        raise InputError(
            f"{where}: {count} clips of {clip_seconds:g} s take more than {MAX_BYTES >> 20} MiB; "
            f"correct features.clip_seconds or clip_seconds of {shown(source.path)}"
        )
    return pool_clips(clips, source.clip_seconds, clip_seconds, source.pool)


def _is_as_written(storage: Storage, file: ShardFile) -> bool:
    """Whether `storage` holds `file` as it was written.

    Raises:
        InputError: the storage failed.
    """
    return (
        storage.exists(file.name)
        and storage.size(file.name) == file.bytes
        and storage.sha256(file.name) == file.sha256
    )


def pack_units(
    config: FeaturesConfig, widths: Sequence[int], units: Sequence[Unit]
) -> Iterator[Packed]:
    """What became of each unit, packed in this process."""
    packer = Packer(config, widths)
    return map(packer.pack, units)


def pack_store(
    config: Config,
    vids: Iterable[str],
    simulated: str | None = None,
    *,
    run: Runner = pack_units,
) -> dict[str, Any]:
    """The features of `vids` stand in the store of `config`.

    Files of the store that it replaces, and of packing that was stopped, are removed at the end.

    Args:
        config: its data.root and its section of features.
        vids: the videos, in any order.
        simulated: what is simulated about them, if anything is.
        run: packs the units.

    Returns:
        The manifest, with `refused`: `vid` and `reason` of each video that was left out.

    Raises:
        InputError: no video could be packed, a storage failed, or something other than a feature
            store is at its place; what stood in the store stands.
    """
    names = sorted(set(vids))
    settings = located(config)
    storage = open_store(settings.store)
    _replaced(storage)
    widths = source_widths(settings, names)
    units = [
        Unit(index, tuple(names[start : start + VIDEOS_PER_UNIT]))
        for index, start in enumerate(range(0, len(names), VIDEOS_PER_UNIT))
    ]
    packed = list(run(settings, widths, units))
    refused = [refusal for part in packed for refusal in part.refused]
    shards = [shard for part in packed for shard in part.shards]
    if not shards:
        raise InputError(f"no video could be packed; the first reason: {refused[0].reason}")
    present = storage.names()
    if missing := sorted({shard.file.name for shard in shards}.difference(present)):
        raise InputError(
            f"{storage.shown} lost {missing[0]} while it was packed, to another job that packs to "
            f"the same store; let that one end, then pack again"
        )
    records, built = _built(storage, present)
    old = (_replaced(storage) | built).intersection(present)
    manifest = _write_manifest(storage, shards, config.features, widths, simulated)
    kept = {manifest["videos"]["name"], *(shard["name"] for shard in manifest["shards"])}
    # Records last: packing that is stopped here leaves what names the rest.
    for name in [*sorted(filter(_OURS.fullmatch, old - kept)), *records]:
        storage.remove(name)
    return {**manifest, "refused": [asdict(refusal) for refusal in refused]}


def _replaced(storage: Storage) -> set[str]:
    """The files that the manifest of the feature store in a folder lists; none without a manifest.

    Raises:
        InputError: the manifest is that of something else.
    """
    if not storage.exists(MANIFEST):
        return set()
    try:
        manifest = json.loads(storage.read(MANIFEST))
        if manifest["format"] == 1:
            return {"videos.parquet", *manifest["shards"]}
        return {manifest["videos"]["name"], *(shard["name"] for shard in manifest["shards"])}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{storage.shown.rstrip('/')}/{MANIFEST} is not the manifest of a feature store; set "
            f"features.store to another folder, or remove this one"
        ) from None


def _built(storage: Storage, names: Iterable[str]) -> tuple[list[str], set[str]]:
    """The records of packing among the files of a folder, and the shards that they name."""
    records, shards = [], set()
    for name in filter(_RECORD.fullmatch, names):
        try:
            packed = Packed.from_json(storage.read(name))
            shards.update([shard.file.name for shard in packed.shards])
        except AbsentError:  # another job removed it
            continue
        except InputError:
            raise
        except (ValueError, KeyError, TypeError):  # a file of somebody else
            continue
        records.append(name)
    return records, shards


def _write_manifest(
    storage: Storage,
    shards: Sequence[Shard],
    config: FeaturesConfig,
    widths: Sequence[int],
    simulated: str | None,
) -> dict[str, Any]:
    """The store is complete and can be opened; returns its manifest."""
    rows = [
        {"vid": vid, "shard": shard.file.name, "offset": offset, "num_clips": length}
        for shard in shards
        for vid, length, offset in zip(
            shard.vids,
            shard.num_clips,
            np.cumsum((0, *shard.num_clips[:-1])).tolist(),
            strict=True,
        )
    ]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content)
    videos = write_content(storage, "videos", "parquet", content.getvalue())
    manifest = {
        "format": FORMAT,
        "width": sum(widths),
        "audio_width": 0 if config.audio is None else widths[-1],
        "clip_seconds": config.clip_seconds,
        "normalize": config.normalize,
        "dtype": config.dtype,
        "num_videos": len(rows),
        "num_clips": sum(row["num_clips"] for row in rows),
        "simulated": simulated,
        "sources": [_described(part) for part in config.parts],
        "videos": asdict(videos),
        "shards": [asdict(shard.file) for shard in shards],
    }
    storage.write(MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def _described(source: SourceConfig) -> Any:
    """A source as it was configured; a URL without its parameters, which may be a signature."""
    return source.model_copy(update={"path": shown(source.path)}).model_dump(mode="json")
