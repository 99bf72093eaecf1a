"""Matrices end to end in files: uncompressed Arrow IPC, mapped into memory, named by checksum."""

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from jaxtyping import Shaped
from pydantic import BaseModel, ConfigDict, ValidationError

from shine.errors import InputError
from shine.files import sha256
from shine.storage import Storage


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A written file, as a manifest lists it."""

    name: str  # carries the beginning of the checksum
    sha256: str
    bytes: int


class Listing(BaseModel, ABC):
    """What reading a store relies on in its manifest."""

    model_config = ConfigDict(strict=True)

    @property
    @abstractmethod
    def files(self) -> Sequence[ShardFile]:
        """Every file that it names."""


_Listing = TypeVar("_Listing", bound=Listing)


def write_matrices(
    storage: Storage, stem: str, matrices: Sequence[Shaped[np.ndarray, "_ column"]]
) -> ShardFile:
    """A file of `storage` holds `matrices`, end to end, and is whole.

    Args:
        storage: of the file.
        stem: how its name begins.
        matrices: at least one, of one width and type.
    """
    flat = np.concatenate(matrices)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    table = pa.table({"rows": column})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=len(flat))
        shard = _named(stem, "arrow", sha256(path), path.stat().st_size)
        storage.write(shard.name, path)
    return shard


def write_content(storage: Storage, stem: str, ending: str, content: bytes) -> ShardFile:
    """A file of `storage` holds `content`; its name begins with `stem`."""
    file = _named(stem, ending, hashlib.sha256(content).hexdigest(), len(content))
    storage.write(file.name, content)
    return file


def read_listing(
    kind: type[_Listing], content: bytes, *, where: str, maker: str, advice: str
) -> _Listing:
    """The manifest of a store, in JSON, as `kind` describes it.

    Raises:
        InputError: it is of another form, or names files outside its folder; the sentence begins
            with `where`, names the work that writes such files, and ends with `advice`.
    """
    try:
        listing = kind.model_validate_json(content)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise InputError(
            f"{where} is not as {maker} writes it ({key}: {wrong['msg']}); {advice}"
        ) from None
    if any(PurePosixPath(file.name).name != file.name for file in listing.files):
        raise InputError(f"{where} names files outside its folder; {advice}")
    return listing


def _named(stem: str, ending: str, digest: str, size: int) -> ShardFile:
    return ShardFile(f"{stem}-{digest[:12]}.{ending}", digest, size)


def map_matrix(path: Path) -> Shaped[np.ndarray, "row column"]:
    """The rows of a file that `write_matrices` wrote, a read-only view of the mapped file.

    Raises:
        InputError: it is not such a file, or not whole.
    """
    try:
        column = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column(0)
        width = column.type.list_size
    except (OSError, pa.ArrowInvalid, AttributeError) as error:
        raise InputError(f"{path}: not a whole shard ({error}); make the store again") from None
    return column.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
