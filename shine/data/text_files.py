"""Which texts a configuration needs, and their tokens in files of other programs."""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from shine.config import Config, TextConfig
from shine.data.annotations import Annotation, read_annotations
from shine.data.arrays import UNREADABLE, read_matrix, unit_rows
from shine.data.text_store import Identity
from shine.errors import InputError
from shine.language.negatives import HardNegatives, read_negatives

_MASK: Final = "attention_mask.npy"
_HEADER_BYTES: Final = 2**16


class TextOrigin(NamedTuple):
    """Where a text stands: the query of a row, or one of its hard negatives."""

    qid: str
    level: int | None  # None: the query


def needed_texts(config: Config) -> dict[str, TextOrigin]:
    """Every distinct text that a run of `config` and its evaluation read, with its first place.

    Queries of all splits come first, then the valid hard negatives of the levels that the loss
    uses, and all valid ones of `evaluate.negatives`.

    Raises:
        InputError: an annotation file or one of negatives is missing or wrong.
    """
    data = config.data
    train = read_annotations(config.path(data.train))
    validation = [read_annotations(config.path(file)) for file in data.validation.values()]
    tests = [read_annotations(config.path(file)) for file in data.tests.values()]
    found: dict[str, TextOrigin] = {}
    for rows in (train, *validation, *tests):
        for row in rows:
            found.setdefault(row.query, TextOrigin(row.qid, None))
    if levels := config.loss.num_hard_negatives:
        negatives = read_negatives(config.path(data.negatives or data.train))
        _add_negatives(found, train, negatives, levels)
    if config.evaluate.negatives is not None:
        negatives = read_negatives(config.path(config.evaluate.negatives))
        for rows in tests:
            _add_negatives(found, rows, negatives, None)
    for text, origin in found.items():
        if not _is_unicode(text):
            raise InputError(
                f"a text of query {origin.qid!r} has half a character of UTF-16 in it, {text!r}; "
                f"correct its file"
            )
    return found


def text_files(config: Config, origins: Mapping[str, TextOrigin]) -> dict[str, Path]:
    """The file of each text that another program encoded.

    Raises:
        InputError: files are missing, or an id cannot be part of a file name.
    """
    folder = config.path(config.text.folder)
    if not folder.is_dir():
        raise InputError(
            f"no folder of text features {folder}: set text.folder to the folder with one npz per "
            f"query, or text.encoder=lexical"
        )
    paths = {text: folder / _file_name(origin, config.text) for text, origin in origins.items()}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} files of text features are missing, the first is "
            f"{missing[0]}; check text.folder, text.query_file and text.negative_file, or set "
            f"text.encoder=hugging_face, which encodes any text"
        )
    return paths


def read_tokens(path: Path, config: TextConfig) -> Float[np.ndarray, "token width"]:
    """The tokens of a file as they are stored, without padding.

    Where an npz has an array `attention_mask`, the rows where it is not 0 are the tokens; otherwise
    rows of zeros at the end are padding.

    Raises:
        InputError: the file does not hold [token, width] numbers.
    """
    tokens = read_matrix(path, "last_hidden_state", "token, width")
    if tokens.shape[1] != config.width:
        raise InputError(
            f"{path}: expected tokens of {config.width} columns (text.width), got {tokens.shape[1]}"
        )
    mask = _read_mask(path, len(tokens))
    if mask is None:
        return as_tokens(tokens, config, str(path))
    return stored_tokens(tokens[mask], config, str(path))


def as_tokens(
    vectors: Float[np.ndarray, "row width"], config: TextConfig, where: str = "the query"
) -> Float[np.ndarray, "token width"]:
    """Token vectors of another program as a store holds them, without padding.

    Rows of zeros at the end are padding.

    Raises:
        InputError: no row is left, or a number is too large; the sentence begins with `where`.
    """
    real = np.flatnonzero(vectors.any(axis=1))
    if not len(real):
        raise InputError(f"{where}: every token is zero, so there is none; encode the text again")
    return stored_tokens(vectors[: real[-1] + 1], config, where)


def stored_tokens(
    vectors: Float[np.ndarray, "token width"], config: TextConfig, where: str
) -> Float[np.ndarray, "token width"]:
    """Token vectors as a store holds them: normalised, in its type.

    Raises:
        InputError: a number is too large for the type; the sentence begins with `where`.
    """
    tokens = unit_rows(vectors, where) if config.normalize else vectors
    with np.errstate(over="ignore"):
        stored = tokens.astype(config.dtype)
    if not np.isfinite(stored).all():
        raise InputError(f"{where}: numbers too large for {config.dtype}; set text.dtype=float32")
    return stored


def _read_mask(path: Path, num_rows: int) -> Bool[np.ndarray, " row"] | None:
    """Which rows of a file are tokens; None where it does not say so."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if _MASK not in archive.namelist():
                return None
            with archive.open(_MASK) as member:
                content = member.read(8 * num_rows + _HEADER_BYTES)  # a longer one is cut: refused
        mask = np.load(io.BytesIO(content), allow_pickle=False)
    except UNREADABLE:
        raise InputError(
            f"{path}: its attention_mask cannot be read as {num_rows} numbers, one for each row; "
            f"write the file again"
        ) from None
    if mask.size != num_rows or mask.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: expected an attention_mask of {num_rows} numbers, one for each row, got "
            f"{mask.dtype} {mask.shape}; write the file again"
        )
    if not mask.any():
        raise InputError(f"{path}: attention_mask has no token; encode the text again")
    return mask.reshape(-1) != 0


def file_identity(config: TextConfig) -> Identity:
    """Who made the tokens of a store of precomputed text, as far as files tell."""
    return {
        "encoder": "precomputed",
        "folder": config.folder,
        "query_file": config.query_file,
        "negative_file": config.negative_file,
        "width": config.width,
        "normalize": config.normalize,
        "dtype": config.dtype,
    }


def file_state(path: Path) -> str:
    """A file as it is, in a word that changes when it is written again."""
    state = path.stat()
    return f"{path.name} {state.st_size} {state.st_mtime_ns}"


def _add_negatives(
    found: dict[str, TextOrigin],
    rows: Sequence[Annotation],
    negatives: Mapping[str, HardNegatives],
    num_levels: int | None,
) -> None:
    for row in rows:
        for level, text in _valid_levels(negatives.get(row.qid), num_levels):
            found.setdefault(text, TextOrigin(row.qid, level))


def _valid_levels(row: HardNegatives | None, num_levels: int | None) -> Iterator[tuple[int, str]]:
    if row is not None:
        levels = zip(row.queries, row.valid, strict=False)
        for level, (text, valid) in list(enumerate(levels))[:num_levels]:
            if valid:
                yield level, text


def _file_name(origin: TextOrigin, config: TextConfig) -> str:
    if set(origin.qid) & set("/\\\0") or origin.qid in {".", ".."}:
        raise InputError(
            f"query id {origin.qid!r} cannot be part of a file name, as text.encoder=precomputed "
            f"needs; use ids without slashes"
        )
    name = config.query_file if origin.level is None else config.negative_file
    return name.replace("{qid}", origin.qid).replace("{level}", str(origin.level))


def _is_unicode(text: str) -> bool:
    return re.search("[\ud800-\udfff]", text) is None
