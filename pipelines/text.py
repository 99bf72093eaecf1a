"""Ray Data around the text store: every distinct text of a configuration is encoded once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from cluster.connection import connect
from cluster.size import data_workers
from pipelines.stage import run_stage
from shine.config import Config, TextConfig
from shine.data.text_files import file_identity, file_state, needed_texts, read_tokens, text_files
from shine.data.text_models import EncodedText, ModelEncoder, model_place
from shine.data.text_store import Identity, TextWriter, encoder_digest, text_storage
from shine.errors import InputError

_TABLE_TEXTS: Final = 1024  # of one table for a worker,
_TABLE_CHARACTERS: Final = 2**15  # and of all of its texts
Progress = Callable[[int, int], None]  # done, total


class ModelWorker:
    """Encodes the texts of a table; a worker of Ray Data.

    Args:
        place: of the model.
        settings: the values of a `TextConfig`.
        digest: of the encoder that the store is made with.

    Raises:
        InputError: the model of this node cannot be loaded, or is another one.
    """

    def __init__(self, place: str, settings: dict[str, Any], digest: str):
        config = TextConfig.model_validate(settings)
        self._encoder = ModelEncoder(place, config, "cuda" if config.gpu else "cpu")
        if encoder_digest(self._encoder.identity) != digest:
            raise InputError(
                f"the nodes of the cluster have different weights of {config.model}; give each the "
                f"same, such as by a folder that all see (text.model)"
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        """The tokens of the texts of `table`."""
        return _encoded(self._encoder.encode(table["text"].to_pylist()))


class FileWorker:
    """Reads the files of a table; a worker of Ray Data.

    Args:
        settings: the values of a `TextConfig`.
    """

    def __init__(self, settings: dict[str, Any]):
        self._config = TextConfig.model_validate(settings)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The tokens in the files of `table`."""
        paths = map(Path, table["file"].to_pylist())
        return _encoded([EncodedText(read_tokens(path, self._config), False) for path in paths])


def encode(config: Config, on_progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Every text that a run of the configuration reads is in its text store.

    What the store has is not encoded again. One that is made anew is the same whatever the number
    of workers.

    Returns:
        Of the store: `store`, `texts`, `tokens`, `width`, `truncated` (texts of which the model
        reads no more); and how many texts of the configuration there are (`needed`), were encoded
        now (`encoded`) and have more than `text.max_tokens` tokens (`cut`).

    Raises:
        InputError: the encoder is lexical, a file is missing or wrong, the store is another
            encoder's, or a text cannot be encoded.
    """
    section = config.text
    if section.encoder == "lexical":
        raise InputError(
            "text.encoder=lexical encodes in memory and needs no store; set "
            "text.encoder=hugging_face or text.encoder=precomputed"
        )
    origins = needed_texts(config)
    storage = text_storage(config)
    settings = section.model_dump()
    if section.encoder == "precomputed":
        files = text_files(config, origins)
        sources = {text: file_state(path) for text, path in files.items()}
        identity, worker, arguments = file_identity(section), FileWorker, (settings,)
    else:
        files = {}
        sources = dict.fromkeys(origins, "")
        identity = _model_identity(config)
        worker = ModelWorker
        arguments = (model_place(config), settings, encoder_digest(identity))
    writer = TextWriter(storage, identity)
    missing = sorted(writer.missing(sources), key=lambda text: (len(text), text))
    if missing:
        tables = list(_tables(missing, files))
        with connect():
            import ray

            gpu = section.gpu and section.encoder == "hugging_face"
            made = run_stage(
                [ray.put(table) for table in tables],
                worker,
                arguments,
                data_workers(gpu=gpu),
                gpu=gpu,
            )
            done = 0
            for table, encoded in zip(tables, made, strict=True):
                for text, tokens, truncated in _rows(table, encoded, identity):
                    writer.add(text, tokens, source=sources[text], truncated=truncated)
                done += table.num_rows
                on_progress(done, len(missing))
    manifest = writer.finish()
    return {
        "store": storage.shown,
        "needed": len(origins),
        "encoded": len(missing),
        "cut": sum(length > section.max_tokens for length in writer.lengths(origins)),
        "texts": manifest["num_texts"],
        "tokens": manifest["num_tokens"],
        "truncated": manifest["num_truncated"],
        "width": identity["width"],
    }


def _model_identity(config: Config) -> Identity:
    """Of the model, which is not kept."""
    return ModelEncoder.of(config).identity


def _tables(texts: Sequence[str], files: dict[str, Path]) -> Iterator[pa.Table]:
    """The texts and their files, some at a time."""
    part: list[str] = []
    characters = 0
    for text in texts:
        if part and (len(part) == _TABLE_TEXTS or characters + len(text) > _TABLE_CHARACTERS):
            yield _table(part, files)
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    yield _table(part, files)


def _table(texts: Sequence[str], files: dict[str, Path]) -> pa.Table:
    columns = {"text": pa.array(texts, pa.large_string())}
    if files:
        columns["file"] = pa.array([str(files[text].resolve()) for text in texts], pa.string())
    return pa.table(columns)


def _encoded(texts: Sequence[EncodedText]) -> pa.Table:
    tokens = [text.tokens.tobytes() for text in texts]
    truncated = [text.truncated for text in texts]
    return pa.table({"tokens": pa.array(tokens, pa.large_binary()), "truncated": truncated})


def _rows(
    table: pa.Table, encoded: pa.Table, identity: Identity
) -> Iterator[tuple[str, np.ndarray, bool]]:
    columns = (table["text"], encoded["tokens"], encoded["truncated"])
    for text, tokens, truncated in zip(*columns, strict=True):
        vectors = np.frombuffer(tokens.as_buffer(), identity["dtype"])
        yield text.as_py(), vectors.reshape(-1, identity["width"]), truncated.as_py()
