"""Who turns a query into token vectors, and a table that holds each distinct text once."""

import hashlib
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shine.config import Config
from shine.errors import InputError

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


def build_encoder(config: Config) -> TextEncoder:
    """The encoder that `config.text` names.

    Raises:
        InputError: its word table cannot be read.
    """
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
        self._encoder = encoder
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
            number = self._ids.setdefault(text, len(self._ids))
            if number == len(self._lengths) + len(self._new):
                self._new.append(self._encoder(text)[: self._max_tokens])
            numbers.append(number)
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
