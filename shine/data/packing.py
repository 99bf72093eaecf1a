"""From raw feature files to a packed store (`shine.data.store`)."""

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
from shine.data.store import FORMAT, MANIFEST, VIDEOS
from shine.errors import InputError
from shine.files import sha256, write_whole

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
    pq.write_table(pa.Table.from_pylist(rows), folder / VIDEOS)
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
        "videos_sha256": sha256(folder / VIDEOS),
        "shards": {shard.file: shard.sha256 for shard in shards},
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest
