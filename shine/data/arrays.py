"""Files of one array: numbers read without executing anything, and told about where they fail."""

import zlib
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float

from shine.errors import InputError

# What NumPy and zipfile raise for a file that is cut, damaged, encrypted or of another kind.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    OverflowError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TokenError,
    BadZipFile,
    zlib.error,
)


def read_matrix(path: Path, key: str, form: str) -> Float[np.ndarray, "row column"]:
    """The array of an npy or npz file as float32, with one row at least and finite numbers alone.

    An npz holds it under `key`, or one array alone. A leading axis of length 1 is taken off.

    Args:
        path: an existing file.
        key: name of the array in an npz.
        form: what an item of each axis is, such as `clip, feature`, for messages.

    Raises:
        InputError: the file does not hold such an array.
    """
    return checked_matrix(_load(path, key), str(path), form)


def checked_matrix(values: np.ndarray, where: str, form: str) -> Float[np.ndarray, "row column"]:
    """An array as float32, with one row at least and finite numbers alone; see `read_matrix`.

    Raises:
        InputError: it is none; the sentence begins with `where`.
    """
    shape = values.shape
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise InputError(f"{where}: expected numbers of shape [{form}], got {values.dtype} {shape}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        item = form.split(",")[0]
        raise InputError(
            f"{where}: NaN or infinity in {item} {int(np.argmin(finite))}; extract again"
        )
    return values


def unit_rows(values: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row column"]:
    """Rows of unit length, as published: x / (|x| + 1e-5)."""
    return values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-5)


def _load(path: Path, key: str) -> np.ndarray:
    try:
        with path.open("rb") as file:  # NumPy leaves one that it opened open where it fails
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                names = loaded.files
                member = loaded[key if key in names else names[0]] if names else None
    except _UNREADABLE as error:
        # NumPy's own message may advise to allow pickles, which would execute the file.
        reason = getattr(error, "strerror", None) or "the file is damaged or holds something else"
        raise InputError(
            f"{path}: cannot be read as a numeric array: {reason}; write it again with numpy.save"
        ) from None
    if isinstance(member, np.ndarray) and (key in names or len(names) == 1):
        return member
    raise InputError(f"{path}: expected one array or one named {key}: {names}")
