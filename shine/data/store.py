"""The packed store of clip features, opened: checksummed, memory-mapped views.

A store is a folder: `shard-*.arrow` (uncompressed Arrow IPC, the clips of many videos end to end),
`videos.parquet` (where each video lies) and `manifest.json`, written last: a folder without it was
never finished and is not read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from shine.errors import InputError
from shine.files import sha256

MANIFEST = "manifest.json"
VIDEOS = "videos.parquet"
FORMAT = 1


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
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{folder}: expected a store of format {FORMAT}, got {manifest.get('format')}; "
                f"pack the features again"
            )
        if not (folder / VIDEOS).is_file() or sha256(folder / VIDEOS) != manifest["videos_sha256"]:
            raise InputError(f"{folder / VIDEOS} is not the one that was packed; pack again")
        columns = pq.read_table(folder / VIDEOS).to_pydict()
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
