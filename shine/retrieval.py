"""A finished run as a tool: a video is encoded once and asked any number of queries.

    grounder = Grounder.load("runs/shine")
    video = grounder.encode("features/v1.npy", duration_seconds=30.2)
    answer = grounder.ask(video, "person opens the laptop")
    answer.moments[0]  # Scored(start_seconds=4.1, end_seconds=9.7, score=0.93)

The folder of the run is all it needs, with its table of word vectors where it has one. A video and
its queries become a data set of their own, so they are read and answered exactly as in training.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from shine.checkpoints import input_widths, load_model
from shine.config import Config
from shine.data.annotations import Annotation
from shine.data.arrays import checked_matrix, read_matrix
from shine.data.batch import Inputs, Outputs
from shine.data.dataset import Dataset, collate_inputs
from shine.data.loading import Source
from shine.data.packing import stored_clips
from shine.data.sources import ENDINGS
from shine.data.store import FeatureStore
from shine.data.text import TextEncoder, TextTable, build_encoder
from shine.data.text_files import as_tokens
from shine.data.text_models import ModelEncoder
from shine.data.text_store import encoder_digest, encoder_name
from shine.errors import InputError
from shine.evaluation import read_run
from shine.files import sha256
from shine.models import build_model
from shine.prediction import predict

Array = np.ndarray | Tensor
Features = Array | str | Path  # an array, or the file of one
Query = str | Array  # a sentence, or its token vectors

_VID = "video"


class Scored(NamedTuple):
    """A moment that was found."""

    start_seconds: float
    end_seconds: float
    score: float  # in [0, 1]


@dataclass(frozen=True)
class Answer:
    """What a model says to one query of a video."""

    moments: tuple[Scored, ...]  # best first, within the video
    saliency: Float[np.ndarray, " clip"]  # logits, of every clip that the run keeps
    clip_seconds: float


@dataclass(frozen=True)
class EncodedVideo:
    """A video as `Grounder.encode` leaves it: read and projected, with no query involved yet."""

    store: FeatureStore  # of this video alone
    duration_seconds: float
    hidden: Float[Tensor, "1 clip hidden"]  # its clips, projected


class Grounder:
    """Answers queries about videos with the best checkpoint of a run."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        widths: tuple[int, int],
        encoder: TextEncoder | None,
        simulated: str | None,
    ):
        self.simulated = simulated  # what was simulated in the data of the run, if anything was
        self._config = config
        self._model = model.eval()
        self._clip_width, self._token_width = widths
        self._encoder = encoder  # None: the text of the run was precomputed

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> "Grounder":
        """The best checkpoint of the run in `folder`, on `device`.

        Raises:
            InputError: the run is not finished, or its word vectors or its text model are gone or
                others.
        """
        folder = Path(folder)
        config, run = read_run(folder)
        checkpoint = folder / run["best"]
        clip_width, token_width = widths = input_widths(checkpoint)
        environment = _environment(folder)
        encoder = None
        if config.text.encoder != "precomputed":
            checksums = environment.get("checksums", {})
            _check_word_vectors(folder, config, checksums)
            encoder = build_encoder(config)
            _check_encoder(folder, config, encoder, checksums)
        model = build_model(config.model, clip_width=clip_width, token_width=token_width)
        load_model(checkpoint, model)
        return cls(config, model.to(device), widths, encoder, environment.get("simulated"))

    def encode(
        self, features: Features | Sequence[Features], *, duration_seconds: float | None = None
    ) -> EncodedVideo:
        """A video, ready to be asked about.

        Args:
            features: one array [clip, feature], or a file of one (npy, npz, pt, safetensors), by
                the extractor that the run was trained with; several, in the order of
                `features.sources` and audio last, where the run joins them.
            duration_seconds: of the video; None: as long as its clips.

        Raises:
            InputError: these are not the features of one video as the run needs them.
        """
        single = isinstance(features, Features)
        store = self._store([features] if single else features)
        if duration_seconds is None:
            duration_seconds = store.num_clips(_VID) * self._config.features.clip_seconds
        if not 0 < duration_seconds < math.inf:
            raise InputError(f"expected a duration in seconds above 0, got {duration_seconds}")
        no_query = np.zeros((1, self._token_width), np.float32)
        dataset = self._dataset(store, duration_seconds, [no_query])
        clips = collate_inputs(dataset, np.zeros(1, np.int64), dataset.text).clips
        with torch.inference_mode():
            hidden = self._model.get_submodule("clip_projection")(clips.to(self._device))
        return EncodedVideo(store, duration_seconds, hidden)

    def ask(self, video: EncodedVideo, query: Query) -> Answer:
        """What the model says to one query; see `ask_all`."""
        return self.ask_all(video, [query])[0]

    def ask_all(self, video: EncodedVideo, queries: Sequence[Query]) -> list[Answer]:
        """One answer per query, the same whatever is asked beside it.

        Args:
            video: from `encode`.
            queries: sentences, or token vectors [token, width] by the text encoder of the run.

        Raises:
            InputError: a query is empty or has wrong vectors, or it is a sentence and the run knows
                precomputed text alone.
        """
        if not queries:
            return []
        tokens = [self._tokens(query) for query in queries]
        dataset = self._dataset(video.store, video.duration_seconds, tokens)
        found = predict(
            _Projected(self._model, video.hidden),
            dataset,
            np.arange(len(queries)),
            self._config.evaluate,
            device=self._device,
        )
        return [
            Answer(
                tuple(
                    Scored(start, end, score)
                    for (start, end), score in zip(moments, scores, strict=True)
                    if not math.isnan(score)  # fewer are left than there are slots
                ),
                curve,
                float(dataset.clip_seconds[0]),
            )
            for moments, scores, curve in zip(
                found.moments.tolist(), found.scores.tolist(), found.saliency[:, 0], strict=True
            )
        ]

    def _dataset(
        self, store: FeatureStore, duration_seconds: float, tokens: Sequence[np.ndarray]
    ) -> Dataset:
        """One row for each query of a video; its moment, the whole video, is of no consequence."""
        vectors = {str(number): vector for number, vector in enumerate(tokens)}
        texts = TextTable(_Known(vectors, self._token_width), self._config.text.max_tokens)
        whole = ((0.0, duration_seconds),)
        rows = [Annotation(name, _VID, name, duration_seconds, whole) for name in vectors]
        return Source(self._config, store, texts).dataset(rows)

    def _store(self, parts: Sequence[Features]) -> FeatureStore:
        """The store of one video."""
        settings = self._config.features
        if len(parts) != len(settings.parts):
            raise InputError(
                f"expected the features of {len(settings.parts)} extractors, one file or array "
                f"for each of {', '.join(part.path for part in settings.parts)} in this order, got "
                f"{len(parts)}"
            )
        read = [_matrix(part, s.key) for part, s in zip(parts, settings.parts, strict=True)]
        widths = [part.shape[1] for part in read]
        audio_width = 0 if settings.audio is None else widths[-1]
        expected = self._clip_width - (2 if settings.audio is None else 4)  # without end points
        if sum(widths) != expected:
            raise InputError(
                f"expected features of {expected} columns, as the run was trained with, got "
                f"{' + '.join(map(str, widths))}; use the same extractor"
            )
        clips = stored_clips(read, settings)
        limit = self._config.data.max_clips
        if limit is not None and len(clips) > limit:
            raise InputError(
                f"the run reads at most {limit} clips of a video (data.max_clips), got "
                f"{len(clips)}; give a part of them, with the duration of that part"
            )
        manifest = {
            "width": expected,
            "audio_width": audio_width,
            "clip_seconds": settings.clip_seconds,
        }
        return FeatureStore(Path(), manifest, {_VID: ("", 0, len(clips))}, {"": clips})

    def _tokens(self, query: Query) -> Float[np.ndarray, "token width"]:
        """The token vectors of a query, as training has them."""
        if not isinstance(query, str):
            tokens = checked_matrix(_numpy(query), "the query", "token, width")
            if tokens.shape[1] != self._token_width:
                raise InputError(
                    f"expected token vectors of {self._token_width} columns, as the run was "
                    f"trained with, got {tokens.shape[1]}; use the same text encoder"
                )
            return as_tokens(tokens, self._config.text) if self._encoder is None else tokens
        if not query.strip():
            raise InputError("a query is empty; write a sentence")
        if self._encoder is None:
            raise InputError(
                f"this run was trained on precomputed text (text.encoder) and cannot read the "
                f"sentence {query!r}; give its token vectors [token, {self._token_width}], made by "
                f"the same text encoder (`--tokens FILE.npz`)"
            )
        return self._encoder(query)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


class _Projected(nn.Module):
    """A model whose one video was projected before."""

    def __init__(self, model: nn.Module, hidden: Float[Tensor, "1 clip hidden"]):
        super().__init__()
        self._model = model
        self._hidden = hidden

    def forward(self, inputs: Inputs) -> Outputs:
        """What the model gives."""
        return self._model.ground(self._hidden, inputs)  # pyright: ignore[reportCallIssue]


class _Known:
    """A text encoder that was asked before."""

    def __init__(self, vectors: Mapping[str, np.ndarray], width: int):
        self.width = width
        self._vectors = vectors

    def __call__(self, text: str) -> np.ndarray:
        """See `TextEncoder`."""
        return self._vectors[text]


def _matrix(source: Features, key: str) -> Float[np.ndarray, "clip feature"]:
    """The features in an array or in the file of one."""
    if isinstance(source, Array):
        return checked_matrix(_numpy(source), "the features", "clip, feature")
    path = Path(source)
    if path.suffix.removeprefix(".") not in ENDINGS:
        raise InputError(
            f"{path}: expected the features of a video in a file of {', '.join(ENDINGS)}, made "
            f"by the extractor that the run was trained with"
        )
    if not path.is_file():
        raise InputError(f"no file of features {path}")
    return read_matrix(path, key, "clip, feature")


def _numpy(values: Array) -> np.ndarray:
    return values.float().numpy(force=True) if isinstance(values, Tensor) else values


def _environment(folder: Path) -> dict[str, Any]:
    """What is recorded of the training; nothing for an imported run."""
    path = folder / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _check_word_vectors(folder: Path, config: Config, checksums: Mapping[str, str]) -> None:
    """The word vectors of the text encoder are those that the run was trained with.

    Raises:
        InputError: their file is gone or another.
    """
    name = config.text.word_vectors
    if name is None:
        return
    path = config.path(name)
    if not path.is_file():
        raise InputError(
            f"the run {folder} reads words by the table {path} (text.word_vectors), which is gone; "
            f"put it back, or set data.root in {folder / 'config.yaml'} to where it is now"
        )
    if name in checksums and sha256(path) != checksums[name]:
        raise InputError(
            f"{path} is not the table that the run {folder} was trained with; put that one back"
        )


def _check_encoder(
    folder: Path, config: Config, encoder: TextEncoder, checksums: Mapping[str, str]
) -> None:
    """The text model is the one that the run was trained with.

    Raises:
        InputError: it is another.
    """
    trained = checksums.get(encoder_name(config))
    if not trained or not isinstance(encoder, ModelEncoder):
        return
    if encoder_digest(encoder.identity) != trained:
        raise InputError(
            f"the text model {config.text.model} (text.model) is not the one that the run {folder} "
            f"was trained with; put that one back"
        )
