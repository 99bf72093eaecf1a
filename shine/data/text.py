"""Who turns a query into token vectors, and a table that holds each distinct text once."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from shine.config import Config, TextConfig
from shine.data.annotations import Annotation
from shine.data.arrays import read_matrix, unit_rows
from shine.errors import InputError
from shine.language.negatives import HardNegatives

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@runtime_checkable
class TextEncoder(Protocol):
    """Encodes queries; the same text always gives the same vectors."""

    width: int

    def __call__(self, text: str) -> np.ndarray:
        """The token vectors of `text`, float32 [token, width], at least one token."""
        ...


class LexicalEncoder:
    """One fixed vector per word: from a table where it has one, else drawn from the word's hash.

    Deterministic and without a download. Unit vectors of unrelated words are nearly orthogonal, so
    nothing is known of an unseen word; the table of a simulated world holds all its words.
    """

    def __init__(self, width: int, table: dict[str, np.ndarray] | None = None):
        self.width = width
        self._known = dict(table or {})

    def __call__(self, text: str) -> np.ndarray:
        """See `TextEncoder`; a text without a word is one token, the empty word."""
        words = _WORD.findall(text.lower()) or [""]
        return np.stack([self._vector(word) for word in words])

    def _vector(self, word: str) -> np.ndarray:
        vector = self._known.get(word)
        if vector is None:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            drawn = np.random.default_rng(seed).standard_normal(self.width)
            vector = (drawn / np.linalg.norm(drawn)).astype(np.float32)
            self._known[word] = vector
        return vector


class PrecomputedEncoder:
    """Token vectors that another program wrote, one npz file for each query and hard negative.

    A text must be located, by the ids of its query, before it is encoded.
    """

    def __init__(self, folder: Path, config: TextConfig):
        self.width = config.width
        self._folder = folder
        self._config = config
        self._paths: dict[str, Path] = {}

    def locate(
        self,
        annotations: Sequence[Annotation],
        negatives: Mapping[str, HardNegatives] | None = None,
        num_levels: int = 0,
    ) -> None:
        """The texts of `annotations` and the valid ones of their hard negatives have their files.

        Equal texts share the file of the first.

        Raises:
            InputError: files are missing, or an id cannot be part of a file name.
        """
        found = dict(self._paths)
        for annotation in annotations:
            found.setdefault(annotation.query, self._path(annotation.qid, None))
        for annotation in annotations:
            row = (negatives or {}).get(annotation.qid)
            if row is not None:
                levels = zip(row.queries[:num_levels], row.valid, strict=False)
                for level, (text, valid) in enumerate(levels):
                    if valid:
                        found.setdefault(text, self._path(annotation.qid, level))
        missing = [path for text, path in found.items() if text not in self._paths]
        missing = [path for path in missing if not path.is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(found)} files of text features are "
                f"missing, the first is {missing[0]}; check text.folder, text.query_file and "
                f"text.negative_file"
            )
        self._paths = found

    def __call__(self, text: str) -> np.ndarray:
        """See `TextEncoder`.

        Raises:
            InputError: the text was not located, or its file does not hold [token, width] numbers.
        """
        if text not in self._paths:
            raise InputError(
                f"this run has precomputed text alone (text.encoder) and no file for {text!r}; ask "
                f"a query of its annotation files, or train with text.encoder=lexical"
            )
        path = self._paths[text]
        tokens = read_matrix(path, "last_hidden_state", "token, width")
        if tokens.shape[1] != self.width:
            raise InputError(
                f"{path}: expected tokens of {self.width} columns (text.width), got "
                f"{tokens.shape[1]}"
            )
        return as_tokens(tokens, self._config, str(path))

    def _path(self, qid: str, level: int | None) -> Path:
        if set(qid) & set("/\\\0") or qid in {".", ".."}:
            raise InputError(
                f"query id {qid!r} cannot be part of a file name, as text.encoder=precomputed "
                f"needs; use ids without slashes"
            )
        name = self._config.query_file if level is None else self._config.negative_file
        return self._folder / name.replace("{qid}", qid).replace("{level}", str(level))


def as_tokens(
    vectors: Float[np.ndarray, "row width"], config: TextConfig, where: str = "the query"
) -> Float[np.ndarray, "token width"]:
    """Token vectors of another program as a model is given them: without padding, normalised.

    Rows of zeros at the end are padding.

    Raises:
        InputError: no row is left; the sentence begins with `where`.
    """
    real = np.flatnonzero(vectors.any(axis=1))
    if not len(real):
        raise InputError(f"{where}: every token is zero, so there is none; encode the text again")
    tokens = vectors[: real[-1] + 1]
    return unit_rows(tokens) if config.normalize else tokens


def build_encoder(config: Config) -> TextEncoder:
    """The encoder that `config.text` names.

    Raises:
        InputError: its word table or its folder cannot be read.
    """
    if config.text.encoder == "precomputed":
        folder = config.path(config.text.folder)
        if not folder.is_dir():
            raise InputError(
                f"no folder of text features {folder}: set text.folder to the folder with one npz "
                f"per query, or text.encoder=lexical"
            )
        return PrecomputedEncoder(folder, config.text)
    if config.text.word_vectors is None:
        return LexicalEncoder(config.text.width)
    table = read_word_vectors(config.path(config.text.word_vectors))
    return LexicalEncoder(len(next(iter(table.values()))), table)


def read_word_vectors(path: Path) -> dict[str, np.ndarray]:
    """The table of a simulated world: word -> float32 [width].

    Raises:
        InputError: the file is missing or is not such a table.
    """
    try:
        table = pq.read_table(path, columns=["word", "vector"])
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"cannot read word vectors {path}: {error}") from None
    vectors = np.stack(table["vector"].to_numpy()).astype(np.float32)
    return dict(zip(table["word"].to_pylist(), vectors, strict=True))


class TextTable:
    """Every distinct text, encoded once; texts are then named by their number.

    The vectors lie end to end, so a batch of ragged texts is gathered in one indexing operation.
    """

    def __init__(self, encoder: TextEncoder, max_tokens: int):
        self.encoder = encoder
        self._max_tokens = max_tokens
        self._ids: dict[str, int] = {}
        self._new: list[np.ndarray] = []
        self._flat = np.zeros((0, encoder.width), np.float32)
        self._starts = np.zeros(0, np.int64)
        self._lengths = np.zeros(0, np.int64)

    def add(self, texts: Iterable[str]) -> np.ndarray:
        """The numbers of `texts`, int64 [text]; new ones are encoded."""
        numbers = []
        for text in texts:
            if text not in self._ids:
                self._new.append(self.encoder(text)[: self._max_tokens])
                self._ids[text] = len(self._ids)
            numbers.append(self._ids[text])
        if self._new:
            lengths = np.array([len(tokens) for tokens in self._new])
            self._flat = np.concatenate([self._flat, *self._new])
            self._lengths = np.concatenate([self._lengths, lengths])
            self._starts = np.cumsum(self._lengths) - self._lengths
            self._new = []
        return np.array(numbers, np.int64)

    def text(self, number: int) -> str:
        """The text of a number that `add` gave."""
        return next(islice(self._ids, number, None))

    @property
    def width(self) -> int:
        """Columns of a token."""
        return self._flat.shape[1]

    def gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Padded token vectors float32 [..., token, width] and their mask [..., token]."""
        lengths = self._lengths[numbers]
        positions = np.arange(lengths.max(initial=1))
        mask = positions < lengths[..., None]
        index = np.where(mask, self._starts[numbers][..., None] + positions, 0)
        return self._flat[index] * mask[..., None], mask
