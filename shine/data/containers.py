"""Files of many videos' features, hdf5 and lmdb: one array at a time, and nothing outside the file.

An hdf5 file can name other files (external links and storage, virtual datasets) and filters that
are loaded as code; a dataset of it may claim to be larger than it is, and a compressed chunk may
hold more than it claims. Only plain data of the file itself is read.
"""

import math
import zlib
from itertools import product
from pathlib import Path
from typing import Any, Final

import h5py
import lmdb
import numpy as np
from jaxtyping import Float

from shine.data.arrays import (
    MAX_BYTES,
    UNREADABLE,
    check_claim,
    checked_matrix,
    chosen,
    parse_matrix,
)
from shine.errors import InputError

_FORM: Final = "clip, feature"
_MAX_CHUNKS: Final = 2**20
_FILTERS: Final = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


class Hdf5:
    """An hdf5 file, opened. For one process.

    Args:
        path: of the file.
        where: what to call it.
        key: of the array of a video whose name is a group.

    Raises:
        InputError: it cannot be opened.
    """

    def __init__(self, path: Path, where: str, key: str):
        self._where = where
        self._key = key
        try:
            self._file = h5py.File(path, "r")
        except UNREADABLE as error:
            raise _damaged(where, error) from None

    def read(self, name: str) -> Float[np.ndarray, "clip feature"] | None:
        """The array under `name`, a path of groups; None where there is none.

        Raises:
            InputError: it cannot be used.
        """
        where = f"{self._where}, {name!a}"
        try:
            dataset = self._find(name, where)
            if dataset is None:
                return None
            _check_plain(dataset, where)
            values = np.empty(dataset.shape, dataset.dtype)
            dataset.read_direct(values)
        except InputError:
            raise
        except UNREADABLE as error:
            raise _damaged(where, error) from None
        return checked_matrix(values, where, _FORM)

    def holds(self, name: str) -> bool:
        """Whether there is a dataset under `name`, in the file itself."""
        try:
            return self._find(name, self._where) is not None
        except UNREADABLE:
            return False

    def _find(self, name: str, where: str) -> h5py.Dataset | None:
        found: Any = self._file
        for part in filter(None, name.split("/")):
            if not isinstance(found, h5py.Group) or found.get(part, getlink=True) is None:
                return None
            found = _followed(found, part, where)
        if isinstance(found, h5py.Group):
            found = _followed(found, chosen(found.keys(), self._key, where), where)
        if not isinstance(found, h5py.Dataset):
            raise InputError(
                f"{where}: expected a dataset, or a group of one; set `file` of the source to its "
                f"path, such as '{{vid}}/features'"
            )
        return found


def _followed(group: h5py.Group, part: str, where: str) -> Any:
    """What lies in `group` itself, not where a link leads to."""
    if type(group.get(part, getlink=True)) is not h5py.HardLink:
        raise InputError(
            f"{where}: a link to another place, which is not followed; copy the data into the file"
        )
    return group[part]


def _check_plain(dataset: h5py.Dataset, where: str) -> None:
    """All numbers of the dataset lie in this file, and reading takes no more than their memory.

    Raises:
        InputError: they do not, or it would.
    """
    settings = dataset.id.get_create_plist()
    if dataset.is_virtual or settings.get_external_count():
        raise InputError(f"{where}: its numbers lie in another file; copy them into this one")
    shape = dataset.shape or ()
    check_claim(shape, dataset.dtype, where, _FORM)
    if dataset.chunks is None:
        if dataset.id.get_storage_size() < math.prod(shape) * dataset.dtype.itemsize:
            raise ValueError("fewer numbers than the shape claims")
        return
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    if not _FILTERS.issuperset(filters) or len(set(filters)) != len(filters):
        raise InputError(
            f"{where}: compressed with something else than gzip; write it again with "
            f"compression='gzip' or without"
        )
    if math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_BYTES:
        raise ValueError("a chunk larger than any array")
    grid: list[int] = [-(-n // step) for n, step in zip(shape, dataset.chunks, strict=True)]
    count = math.prod(grid)
    if count > _MAX_CHUNKS or dataset.id.get_num_chunks() != count:
        raise ValueError("not as many chunks as the shape claims")
    if h5py.h5z.FILTER_DEFLATE in filters:
        _check_chunks(dataset, filters, grid)


def _check_chunks(dataset: h5py.Dataset, filters: list[int], grid: list[int]) -> None:
    """No chunk inflates to more than its numbers: HDF5 would take memory for all that comes."""
    assert dataset.chunks is not None
    expected = math.prod(dataset.chunks) * dataset.dtype.itemsize
    deflate = filters.index(h5py.h5z.FILTER_DEFLATE)
    checksum = (
        filters.index(h5py.h5z.FILTER_FLETCHER32) if h5py.h5z.FILTER_FLETCHER32 in filters else None
    )
    inner = 4 if checksum is not None and checksum < deflate else 0  # bytes of a checksum
    outer = 4 if checksum is not None and checksum > deflate else 0
    for place in product(*map(range, grid)):
        offset = tuple(i * step for i, step in zip(place, dataset.chunks, strict=True))
        skipped, content = dataset.id.read_direct_chunk(offset)
        if skipped & (1 << deflate):
            continue
        stream = zlib.decompressobj()
        size = len(stream.decompress(content[: len(content) - outer], expected + inner + 1))
        if size != expected + inner:
            raise ValueError("a chunk that does not hold what its shape claims")


class Lmdb:
    """An lmdb, opened: values are the bytes of npy or npz files. For one process.

    The library trusts the pages in the file: one that was cut is told, one whose pages were damaged
    in place may end the process.

    Args:
        path: of the file, or of its folder.
        where: what to call it.
        key: of the array in an npz.

    Raises:
        InputError: it cannot be opened.
    """

    def __init__(self, path: Path, where: str, key: str):
        self._where = where
        self._key = key
        file = path / "data.mdb" if path.is_dir() else path
        try:
            self._environment = lmdb.open(
                str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False
            )
            pages = self._environment.info()["last_pgno"] + 1
            self._size = file.stat().st_size
            whole = pages * self._environment.stat()["psize"] <= self._size
        except (lmdb.Error, *UNREADABLE) as error:
            raise _damaged(where, error) from None
        if not whole:  # a page behind the end of the file would end the process
            self._environment.close()
            raise _damaged(where, EOFError())

    def read(self, name: str) -> Float[np.ndarray, "clip feature"] | None:
        """The array under the key `name`; None where there is none.

        Raises:
            InputError: it cannot be used.
        """
        where = f"{self._where}, {name!a}"
        try:
            with self._environment.begin(buffers=True) as transaction:
                value = transaction.get(name.encode())
                if value is None:
                    return None
                if len(value) > min(self._size, MAX_BYTES):
                    raise InputError(f"{where}: a value of {len(value)} bytes, which is too many")
                return parse_matrix(value, self._key, _FORM, where)
        except lmdb.Error as error:
            raise _damaged(where, error) from None

    def holds(self, name: str) -> bool:
        """Whether there is a value under the key `name`."""
        try:
            with self._environment.begin(buffers=True) as transaction:
                return transaction.get(name.encode()) is not None
        except lmdb.Error:  # a key longer than any can be
            return False


def _damaged(where: str, error: BaseException) -> InputError:
    reason = getattr(error, "strerror", None) or "it is damaged or not whole"
    return InputError(f"{where}: cannot be read: {reason}; write it again")
