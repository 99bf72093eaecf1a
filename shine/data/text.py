"""Who turns a query into token vectors, and a table that holds each distinct text once."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shine.config import Config
from shine.data.text_store import Places, TextStore
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


def open_texts(config: Config, cache: Path) -> "TextTable":
    """An empty table over the store of `config.text`, or over its encoder where that is `lexical`.

    Args:
        config: of the run.
        cache: the folder for a copy of a store elsewhere.

    Raises:
        InputError: the store or the word table cannot be read, or is not as configured.
    """
    lexical = config.text.encoder == "lexical"
    source = build_encoder(config) if lexical else TextStore.open(config, cache)
    return TextTable(source, config.text.max_tokens)


def build_encoder(config: Config) -> TextEncoder:
    """The encoder that `config.text` names, for any text; a model of Hugging Face is loaded.

    Raises:
        InputError: its word table or its model cannot be read, or the text is precomputed.
    """
    if config.text.encoder == "precomputed":
        raise InputError(
            "text.encoder=precomputed encodes no new text; set text.encoder=lexical or "
            "text.encoder=hugging_face"
        )
    if config.text.encoder == "hugging_face":
        from shine.data.text_models import ModelEncoder

        return ModelEncoder.of(config)
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
    """Every distinct text once; texts are then named by their number.

    The vectors of many texts lie end to end in a matrix, so a batch of ragged texts is gathered in
    one indexing operation for each matrix it touches. Those of a store stay where they are mapped;
    those of an encoder are kept in memory.
    """

    def __init__(self, source: TextEncoder | TextStore, max_tokens: int):
        self._source = source
        self._max_tokens = max_tokens
        self._ids: dict[str, int] = {}
        self._matrices: Sequence[np.ndarray] = [np.zeros((0, source.width), np.float32)]
        self._places = Places.none()

    def add(self, texts: Iterable[str]) -> np.ndarray:
        """The numbers of `texts`, int64 [text]; new ones are encoded, or found in the store.

        Raises:
            InputError: the store lacks some; the table is as it was.
        """
        texts = list(texts)
        if new := [text for text in dict.fromkeys(texts) if text not in self._ids]:
            if isinstance(self._source, TextStore):
                places, self._matrices = self._source.find(new), self._source.matrices
            else:
                places = self._encoded(self._source, new)
            self._places = self._places.then(places.cut(self._max_tokens))
            self._ids.update(
                zip(new, range(len(self._ids), len(self._ids) + len(new)), strict=True)
            )
        return np.array([self._ids[text] for text in texts], np.int64)

    def text(self, number: int) -> str:
        """The text of a number that `add` gave."""
        return next(islice(self._ids, number, None))

    @property
    def width(self) -> int:
        """Columns of a token."""
        return self._source.width

    def gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Padded token vectors float32 [..., token, width] and their mask [..., token]."""
        matrix, start, length = self._places.of(numbers)
        positions = np.arange(length.max(initial=1))
        mask = positions < length[..., None]
        rows = (start[..., None] + positions)[mask]
        holder = np.broadcast_to(matrix[..., None], mask.shape)[mask]
        found = np.empty((len(rows), self.width), np.float32)
        for number in np.unique(holder):
            here = holder == number
            found[here] = self._matrices[number][rows[here]]
        tokens = np.zeros((*mask.shape, self.width), np.float32)
        tokens[mask] = found
        return tokens, mask

    def _encoded(self, encoder: TextEncoder, texts: Sequence[str]) -> Places:
        vectors = [encoder(text)[: self._max_tokens] for text in texts]
        lengths = np.array([len(tokens) for tokens in vectors])
        (known,) = self._matrices
        self._matrices = [np.concatenate([known, *vectors])]
        starts = len(known) + np.cumsum(lengths) - lengths
        return Places(np.zeros_like(starts), starts, lengths)
