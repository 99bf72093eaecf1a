"""Matrices end to end in files: uncompressed Arrow IPC, mapped into memory, named by checksum."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from jaxtyping import Shaped

from shine.errors import InputError
from shine.files import sha256
from shine.storage import Storage


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A written file, as a manifest lists it."""

    name: str  # carries the beginning of the checksum
    sha256: str
    bytes: int


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
        digest = sha256(path)
        shard = ShardFile(f"{stem}-{digest[:12]}.arrow", digest, path.stat().st_size)
        storage.write(shard.name, path)
    return shard


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
