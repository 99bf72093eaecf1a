"""Files of one array: numbers read without executing anything, and told about where they fail.

What a file claims is compared with what it has and with a bound before memory is taken for it.
"""

import io
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from shine.errors import InputError

MAX_BYTES: Final = 2**30  # of one array, and as float32
_RATIO: Final = 1032  # no deflated byte stands for more
_MAX_HEADER: Final = 2**16  # bytes that describe the array of an npy file
_SHOWN_NAMES: Final = 5
# What NumPy, zipfile and h5py raise for a file that is cut, damaged, encrypted or another kind.
UNREADABLE: Final = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    OverflowError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_matrix(path: Path, key: str, form: str) -> Float[np.ndarray, "row column"]:
    """The array of a file as float32, with one row at least and finite numbers alone.

    The kind of file is told by its content: npy, npz, what torch.save wrote, safetensors. One of
    several arrays holds it under `key`, or one array alone. A leading axis of length 1 is taken
    off.

    Args:
        path: an existing file.
        key: name of the array in a file of several.
        form: what an item of each axis is, such as `clip, feature`, for messages.

    Raises:
        InputError: the file does not hold such an array.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            if head.startswith(b"PK\3\4") and _is_of_torch(file):
                head = b"\x80"
            if not head.startswith(b"\x80") and head[8:9] != b"{":
                values = _read_numpy(file, key, form, str(path))
                return checked_matrix(values, str(path), form)
    except UNREADABLE as error:
        raise _unreadable(str(path), error) from None
    # Reading tensors loads torch, which most sources do not need.
    from shine.data.tensors import read_safetensors, read_torch

    read = read_torch if head.startswith(b"\x80") else read_safetensors
    return checked_matrix(read(path, key, form), str(path), form)


def parse_matrix(
    content: bytes | memoryview, key: str, form: str, where: str
) -> Float[np.ndarray, "row column"]:
    """The array in the bytes of an npy or npz file; see `read_matrix`.

    Raises:
        InputError: they do not hold such an array; the sentence begins with `where`.
    """
    try:
        values = _read_numpy(io.BytesIO(content), key, form, where)
    except UNREADABLE as error:
        raise _unreadable(where, error) from None
    return checked_matrix(values, where, form)


def checked_matrix(values: np.ndarray, where: str, form: str) -> Float[np.ndarray, "row column"]:
    """An array as float32, with one row at least and finite numbers alone; see `read_matrix`.

    Raises:
        InputError: it is none; the sentence begins with `where`.
    """
    check_claim(values.shape, values.dtype, where, form)
    values = values[0] if values.ndim == 3 else values
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        item = form.split(",")[0]
        raise InputError(
            f"{where}: NaN or infinity in {item} {int(np.argmin(finite))}; extract again"
        )
    return values


def check_claim(shape: tuple[int, ...], dtype: np.dtype[Any], where: str, form: str) -> None:
    """An array of this shape and type can be a matrix, and is not too large to be one's features.

    Raises:
        InputError: it is not; the sentence begins with `where`.
    """
    matrix = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(matrix) != 2 or min(matrix) < 1 or dtype.kind not in "fiu":
        raise InputError(f"{where}: expected numbers of shape [{form}], got {dtype} {shape}")
    if math.prod(matrix) * max(dtype.itemsize, 4) > MAX_BYTES:
        raise InputError(
            f"{where}: an array of shape {shape} takes more than {MAX_BYTES >> 20} MiB; cut the "
            f"video into several, or write its array again if it is not as long"
        )


def chosen(names: Collection[str], key: str, where: str) -> str:
    """The one of several arrays that is meant: `key`, or the only one.

    Raises:
        InputError: neither is there; the sentence begins with `where`.
    """
    if key in names:
        return key
    if len(names) == 1:
        return next(iter(names))
    shown = [f"{name!a:.60}" for name in list(names)[:_SHOWN_NAMES]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    raise InputError(
        f"{where}: expected one array or one named {key}: [{', '.join(shown)}]{more}; set `key` of "
        f"the source"
    )


def unit_rows(
    values: Float[np.ndarray, "row column"], where: str
) -> Float[np.ndarray, "row column"]:
    """Rows of unit length, as published: x / (|x| + 1e-5).

    Raises:
        InputError: the length of a row is no number of this type; the sentence begins with `where`.
    """
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        largest = np.abs(values).max()
        raise InputError(f"{where}: {largest:.3g} is too large to be normalised; extract again")
    return values / (lengths + 1e-5)


def _unreadable(where: str, error: BaseException) -> InputError:
    if isinstance(error, InputError):
        return error
    # NumPy's own message may advise to allow pickles, which would execute the file.
    reason = getattr(error, "strerror", None) or "the file is damaged or holds something else"
    return InputError(
        f"{where}: cannot be read as a numeric array: {reason}; write it again with numpy.save"
    )


def _is_of_torch(file: io.BufferedIOBase) -> bool:
    with zipfile.ZipFile(file) as archive:
        found = any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in archive.namelist())
    file.seek(0)
    return found


def _read_numpy(file: io.BufferedIOBase, key: str, form: str, where: str) -> np.ndarray:
    """The array of an npy or npz file that stands at its beginning."""
    if file.read(4) != b"PK\3\4":
        length = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read_npy(file, length, form, where)
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        entry = members[chosen(members.keys(), key, where)]
        stored = entry.compress_type == zipfile.ZIP_STORED
        if not stored and entry.compress_type != zipfile.ZIP_DEFLATED:
            raise InputError(f"{where}: compressed in a way that numpy.savez does not; save again")
        ratio = 1 if stored else _RATIO
        if entry.file_size > ratio * entry.compress_size:
            raise ValueError("an archive that claims more than it can hold")
        with archive.open(entry) as member:
            assert isinstance(member, zipfile.ZipExtFile)
            values = _read_npy(member, entry.file_size, form, where)
            if member.read(1):  # which compares the checksum at the end
                raise ValueError("a member that is longer than its array")
        return values


def _read_npy(file: io.BufferedIOBase, length: int, form: str, where: str) -> np.ndarray:
    """The array of an npy file of `length` bytes, which is read to its end."""
    with warnings.catch_warnings(action="ignore"):  # on a header that Python 2 wrote
        version = np.lib.format.read_magic(file)
        readers = {  # 3.0 is for names of records
            (1, 0): (np.lib.format.read_array_header_1_0, 2),
            (2, 0): (np.lib.format.read_array_header_2_0, 4),
        }
        read_header, num_bytes = readers[version]
        size = file.read(num_bytes)
        described = int.from_bytes(size, "little")
        if described > _MAX_HEADER:  # NumPy would read it whole
            raise ValueError("a header longer than any of numbers")
        shape, fortran, dtype = read_header(io.BytesIO(size + file.read(described)))
    check_claim(shape, dtype, where, form)
    count = math.prod(shape)
    if count * dtype.itemsize > length - file.tell():
        raise ValueError("fewer numbers than the header claims")
    values = np.empty(count, dtype)
    view = values.data.cast("B")
    done = 0
    while done < len(view):
        step = file.readinto(view[done:])
        if not step:
            raise EOFError
        done += step
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
