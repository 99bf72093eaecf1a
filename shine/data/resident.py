"""Clips that stay on the device which trains: the processor sends numbers of clips alone."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from shine.data.store import FeatureStore, columns_of, end_points
from shine.errors import InputError

_PIECE: Final = 2**26  # bytes on their way to the device at a time


@dataclass(frozen=True)
class ResidentStore(FeatureStore):
    """A packed store whose clips are a matrix on a device, in the type that is stored."""

    _matrix: Shaped[Tensor, "clip column"]  # the last row, of zeros, stands for padding
    _first: Mapping[str, int]  # shard -> row of its first clip

    @classmethod
    def load(cls, store: FeatureStore, device: torch.device) -> "ResidentStore":
        """A copy of a mapped store on `device`.

        Raises:
            InputError: the device has no room for it.
        """
        shards = store._shards
        dtype = torch.from_numpy(np.zeros(0, store.manifest["dtype"])).dtype
        sizes = [len(matrix) for matrix in shards.values()]
        _check_room(store, (sum(sizes) + 1) * store.width * dtype.itemsize, device)
        matrix = torch.zeros(sum(sizes) + 1, store.width, dtype=dtype, device=device)
        first = dict(zip(shards, np.cumsum([0, *sizes]).tolist(), strict=False))
        rows = max(1, _PIECE // (store.width * dtype.itemsize))
        for name, clips in shards.items():
            for start in range(0, len(clips), rows):
                piece = torch.from_numpy(np.array(clips[start : start + rows]))
                matrix[first[name] + start :][: len(piece)] = piece.to(device)
        return cls(store.folder, store.manifest, store._place, shards, matrix, first)

    def gather(
        self, vids: Sequence[str], lengths: Int[np.ndarray, " video"]
    ) -> Float[Tensor, "video clip feature"]:
        """See `FeatureStore`; one indexing operation on the device, which holds the result."""
        places = [self.place(vid) for vid in vids]
        first = np.array([self._first[shard] + offset for shard, offset, _ in places], np.int64)
        position = np.arange(lengths.max(initial=1))
        real = position < lengths[:, None]
        index = np.where(real, first[:, None] + position, len(self._matrix) - 1)
        stored = self._matrix[self._sent(index)]  # [video, clip, column]
        times = self._sent(end_points(lengths))
        clips = times.new_empty(*index.shape, self.clip_width)
        for taken, column, width in columns_of(self.parts):
            clips[..., column : column + width] = stored[..., taken : taken + width]
            clips[..., column + width : column + width + 2] = times
        return clips

    def _sent(self, values: np.ndarray) -> Tensor:
        """An array on the device; the process does not wait for it."""
        here = torch.from_numpy(values)
        if self._matrix.device.type == "cuda":
            here = here.pin_memory()
        return here.to(self._matrix.device, non_blocking=True)


def _check_room(store: FeatureStore, wanted: int, device: torch.device) -> None:
    free = _free_bytes(device)
    if free is not None and wanted > free:
        raise InputError(
            f"features.feed=resident needs {wanted / 1e9:.3g} GB for the clips of {store.folder}, "
            f"and {device} has {free / 1e9:.3g} GB free; set features.feed=mapped"
        )


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None
