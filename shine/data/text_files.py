"""Which texts a configuration needs, and their tokens in files of other programs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from shine.config import Config, TextConfig
from shine.data.annotations import Annotation, read_annotations
from shine.data.arrays import read_matrix, unit_rows
from shine.data.text_store import Identity
from shine.errors import InputError
from shine.language.negatives import HardNegatives, read_negatives


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
            f"{missing[0]}; check text.folder, text.query_file and text.negative_file"
        )
    return paths


def read_tokens(path: Path, config: TextConfig) -> Float[np.ndarray, "token width"]:
    """The tokens of a file as they are stored, without padding.

    Raises:
        InputError: the file does not hold [token, width] numbers.
    """
    tokens = read_matrix(path, "last_hidden_state", "token, width")
    if tokens.shape[1] != config.width:
        raise InputError(
            f"{path}: expected tokens of {config.width} columns (text.width), got {tokens.shape[1]}"
        )
    return as_tokens(tokens, config, str(path))


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
    tokens = unit_rows(vectors) if config.normalize else vectors
    with np.errstate(over="ignore"):
        stored = tokens.astype(config.dtype)
    if not np.isfinite(stored).all():
        raise InputError(f"{where}: numbers too large for {config.dtype}; set text.dtype=float32")
    return stored


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
