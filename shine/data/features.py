"""Clip features: raw files in, one packed and checksummed store, memory-mapped views out.

A store is a folder: `shard-*.arrow` (uncompressed Arrow IPC, the clips of many videos end to end),
`videos.parquet` (where each video lies) and `manifest.json`, written last: a folder without it was
never finished and is not read.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from shine.config import FeaturesConfig
from shine.data.arrays import read_matrix, unit_rows
from shine.errors import InputError
from shine.files import sha256, write_whole

MANIFEST = "manifest.json"
_VIDEOS = "videos.parquet"
_FORMAT = 1
# Folders whose clips are joined may differ in their number by so many clips, or by this share.
_SPARE_CLIPS, _SPARE_SHARE = 2, 0.1


@dataclass(frozen=True, slots=True)
class Shard:
    """One written shard: what the manifest needs to know of it."""

    file: str
    sha256: str
    vids: tuple[str, ...]
    num_clips: tuple[int, ...]  # of each video
    refused: tuple[str, ...]  # one sentence for each video that was left out

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Shard":
        """The shard whose `asdict` came back from another process with lists for tuples."""
        return cls(
            record["file"],
            record["sha256"],
            tuple(record["vids"]),
            tuple(record["num_clips"]),
            tuple(record["refused"]),
        )


def read_feature_file(source: Path, vid: str, width: int | None) -> np.ndarray:
    """The clips of one video, float32 [clip, feature], from `{vid}.npy` or `{vid}.npz`.

    An npz holds its array under `features`, or one array alone. Nothing in a file is executed.

    Raises:
        InputError: there is no such file, or it is not a finite [clip, feature] array of `width`.
    """
    path = next((p for ext in ("npy", "npz") if (p := source / f"{vid}.{ext}").is_file()), None)
    if path is None:
        raise InputError(f"no features of video {vid}: expected {source / vid}.npy or .npz")
    clips = read_matrix(path, "features", "clip, feature")
    if width is not None and clips.shape[1] != width:
        raise InputError(
            f"{path}: expected {width} columns, got {clips.shape[1]}; check features.width and "
            f"that every file comes from the same extractor"
        )
    return clips


def source_widths(config: FeaturesConfig, vids: Sequence[str]) -> tuple[int, ...]:
    """Columns of the clips in each of `config.folders`: those of the first file that can be read.

    Args:
        config: with absolute folders.
        vids: videos to look for, in this order.

    Raises:
        InputError: a folder is missing or none of its files can be read, or the columns do not add
            up to `config.width`.
    """
    for folder in config.folders:
        if not Path(folder).is_dir():
            raise InputError(
                f"no folder of features {folder}: set features.sources to folders with one "
                f"{{vid}}.npy or {{vid}}.npz per video"
            )
    if config.width is not None and len(config.folders) == 1:
        return (config.width,)
    widths = tuple(_first_width(Path(folder), vids) for folder in config.folders)
    if config.width is not None and sum(widths) != config.width:
        found = " + ".join(
            f"{width} ({Path(folder).name})"
            for width, folder in zip(widths, config.folders, strict=True)
        )
        raise InputError(
            f"expected clips of {config.width} columns (features.width), the files have {found} = "
            f"{sum(widths)}; correct the width or the folders"
        )
    return widths


def _first_width(source: Path, vids: Iterable[str]) -> int:
    reason = ""
    for vid in vids:
        try:
            return read_feature_file(source, vid, None).shape[1]
        except InputError as error:
            reason = reason or str(error)
    raise InputError(f"no video could be packed; the first reason: {reason}")


def write_shard(
    folder: Path, index: int, vids: Sequence[str], config: FeaturesConfig, widths: Sequence[int]
) -> Shard:
    """One shard with the clips of `vids`, read from `config.folders` (absolute).

    A video one of whose files cannot be used is left out with its reason; the others are written.

    Args:
        folder: of the store.
        index: of the shard.
        vids: the videos.
        config: of the store.
        widths: columns that the files of each folder must have.
    """
    kept: list[str] = []
    arrays: list[np.ndarray] = []
    refused: list[str] = []
    for vid in vids:
        try:
            parts = [
                read_feature_file(Path(source), vid, width)
                for source, width in zip(config.folders, widths, strict=True)
            ]
            clips = stored_clips(parts, config, f"features of video {vid}")
        except InputError as error:
            refused.append(str(error))
            continue
        kept.append(vid)
        arrays.append(clips)
    if not arrays:
        return Shard("", "", (), (), tuple(refused))
    flat = np.concatenate(arrays)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    name = f"shard-{index:05d}.arrow"
    temporary = folder / f".{name}.{os.getpid()}"
    table = pa.table({"clips": column})
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=len(flat))
    digest = sha256(temporary)
    temporary.replace(folder / name)
    return Shard(name, digest, tuple(kept), tuple(len(clips) for clips in arrays), tuple(refused))


def stored_clips(
    parts: Sequence[np.ndarray], config: FeaturesConfig, where: str = "the features"
) -> np.ndarray:
    """The clips of one video as a store holds them: those of all folders, side by side.

    There are as many as the shortest part has.

    Args:
        parts: float32 [clip, feature], one for each of `config.folders`.
        config: of the store.
        where: begins the message where the parts cannot be joined.

    Raises:
        InputError: the numbers of clips do not belong together, or values do not fit.
    """
    lengths = [len(part) for part in parts]
    if max(lengths) - min(lengths) > max(_SPARE_CLIPS, _SPARE_SHARE * max(lengths)):
        found = ", ".join(f"{n} in {f}" for n, f in zip(lengths, config.folders, strict=True))
        raise InputError(
            f"{where}: the numbers of clips differ too much to be of one stride ({found}); extract "
            f"all with clips of {config.clip_seconds:g} s"
        )
    if config.normalize:
        parts = [unit_rows(part) for part in parts]
    clips = np.concatenate([part[: min(lengths)] for part in parts], axis=1)
    if np.abs(clips).max() > np.finfo(config.dtype).max:
        raise InputError(
            f"{where}: {np.abs(clips).max():.3g} does not fit {config.dtype}; set "
            f"features.dtype=float32 or features.normalize=true"
        )
    return clips.astype(config.dtype)


def write_manifest(
    folder: Path,
    shards: Iterable[Shard],
    config: FeaturesConfig,
    widths: Sequence[int],
    simulated: str | None,
) -> dict[str, Any]:
    """The store in `folder` is complete and can be opened; returns its manifest."""
    shards = [shard for shard in shards if shard.file]
    rows = [
        {"vid": vid, "shard": shard.file, "offset": offset, "num_clips": length}
        for shard in shards
        for vid, length, offset in zip(
            shard.vids,
            shard.num_clips,
            np.cumsum((0, *shard.num_clips[:-1])).tolist(),
            strict=True,
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / _VIDEOS)
    manifest = {
        "format": _FORMAT,
        "width": sum(widths),
        "audio_width": 0 if config.audio is None else widths[-1],
        "clip_seconds": config.clip_seconds,
        "normalize": config.normalize,
        "dtype": config.dtype,
        "num_videos": len(rows),
        "num_clips": sum(row["num_clips"] for row in rows),
        "simulated": simulated,
        "videos_sha256": sha256(folder / _VIDEOS),
        "shards": {shard.file: shard.sha256 for shard in shards},
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def part_widths(width: int, manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Columns of the parts of a stored clip, each followed by temporal end points in a batch.

    One part holds all video features; a second one those of audio, where the store has some.
    """
    audio = manifest.get("audio_width", 0)
    return (width - audio, audio) if audio else (width,)


@dataclass(frozen=True)
class FeatureStore:
    """A packed store, opened: views into memory-mapped shards that a node's processes share."""

    folder: Path
    manifest: dict[str, Any]
    _place: dict[str, tuple[str, int, int]]  # vid -> (shard, offset, num_clips)
    _shards: dict[str, np.ndarray]  # shard -> [clip, feature]

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """The store in `folder`.

        Raises:
            InputError: there is no finished store, or it does not hold what its manifest says.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except OSError:
            raise InputError(
                f"no feature store in {folder}: make it with `shine features pack --config ...`, "
                f"or set features.store"
            ) from None
        except ValueError:
            raise InputError(
                f"{folder / MANIFEST} is not valid JSON; pack the features again"
            ) from None
        if manifest.get("format") != _FORMAT:
            raise InputError(
                f"{folder}: expected a store of format {_FORMAT}, got {manifest.get('format')}; "
                f"pack the features again"
            )
        if (
            not (folder / _VIDEOS).is_file()
            or sha256(folder / _VIDEOS) != manifest["videos_sha256"]
        ):
            raise InputError(f"{folder / _VIDEOS} is not the one that was packed; pack again")
        columns = pq.read_table(folder / _VIDEOS).to_pydict()
        place = {
            vid: (shard, offset, length)
            for vid, shard, offset, length in zip(
                columns["vid"],
                columns["shard"],
                columns["offset"],
                columns["num_clips"],
                strict=True,
            )
        }
        shards = {name: cls._map(folder / name) for name in manifest["shards"]}
        return cls(folder, manifest, place, shards)

    @staticmethod
    def _map(path: Path) -> np.ndarray:
        try:
            column = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{path}: not a whole shard ({error}); pack the features again"
            ) from None
        width = column.type.list_size
        return column.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)

    @property
    def width(self) -> int:
        """Columns of a stored clip."""
        return self.manifest["width"]

    @property
    def clip_width(self) -> int:
        """Columns of a clip vector as a model sees it: with temporal end points after each part."""
        return self.width + 2 * len(part_widths(self.width, self.manifest))

    @property
    def simulated(self) -> str | None:
        """What was simulated, where the features are not those of real videos."""
        return self.manifest["simulated"]

    def num_clips(self, vid: str) -> int:
        """Clips of one video.

        Raises:
            InputError: the store does not hold the video.
        """
        return self._find(vid)[2]

    def clips(self, vid: str) -> np.ndarray:
        """The clips of one video, [clip, feature], a read-only view of the mapped file."""
        shard, offset, length = self._find(vid)
        return self._shards[shard][offset : offset + length]

    def verify(self) -> None:
        """Every shard is the one that was packed.

        Raises:
            InputError: a shard was changed or cut after packing.
        """
        for name, digest in self.manifest["shards"].items():
            if sha256(self.folder / name) != digest:
                raise InputError(f"{self.folder / name} was changed after packing; pack again")

    def _find(self, vid: str) -> tuple[str, int, int]:
        if vid not in self._place:
            raise InputError(
                f"the feature store {self.folder} does not hold video {vid}; add its file to "
                f"features.sources and pack again"
            )
        return self._place[vid]
