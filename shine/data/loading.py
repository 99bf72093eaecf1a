"""From a configuration to datasets, with every mistake found before a cluster is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shine.config import Config, FeaturesConfig
from shine.data.annotations import Annotation, read_annotations
from shine.data.dataset import Dataset
from shine.data.local_copy import default_cache, verify_once
from shine.data.resident import ResidentStore
from shine.data.sources import located
from shine.data.store import FeatureStore, RangeStore
from shine.data.text import TextTable, open_texts
from shine.data.text_store import TextStore
from shine.errors import InputError
from shine.language.negatives import HardNegatives, read_negatives
from shine.storage import is_url, shown


@dataclass(frozen=True)
class Source:
    """What the splits of a run share: the features and the encoded texts."""

    config: Config
    store: FeatureStore
    texts: TextTable

    @classmethod
    def open(cls, config: Config, device: torch.device | None = None) -> "Source":
        """The features and the text encoder of `config`.

        Args:
            config: of a run.
            device: that resident features are held on; None: they are mapped instead.

        Raises:
            InputError: the store or a word table is missing or not as configured, or there is no
                room for a copy of the store.
        """
        features = located(config)
        if features.feed == "streamed":
            return cls.listed(config)
        store = FeatureStore.open(features.store, cache_folder(config))
        check_store(store, config.features)
        if features.feed == "resident" and device is not None:
            store = ResidentStore.load(store, device)
        return cls(config, store, open_texts(config, cache_folder(config)))

    @classmethod
    def listed(cls, config: Config) -> "Source":
        """The same with a store of which no copy is made: a video is read where it lies.

        Raises:
            InputError: see `open`.
        """
        store = RangeStore.open(located(config).store)
        check_store(store, config.features)
        return cls(config, store, open_texts(config, cache_folder(config)))

    def training(self) -> Dataset:
        """The training split, with the hard negatives that the loss asks for.

        Raises:
            InputError: a file is missing or wrong, or the cut of `data.max_clips` leaves a row
                without a moment.
        """
        config = self.config
        annotations = read_annotations(config.path(config.data.train))
        levels = config.loss.num_hard_negatives
        negatives = self._training_negatives(annotations) if levels else None
        dataset = self.dataset(annotations, negatives, levels)
        _check_moments(dataset, config.path(config.data.train))
        return dataset

    def validation(self) -> dict[str, Dataset]:
        """The splits that choose the checkpoint, by name."""
        return {name: self.evaluation(file) for name, file in self.config.data.validation.items()}

    def evaluation(
        self, file: str, negatives: dict[str, HardNegatives] | None = None, levels: int = 0
    ) -> Dataset:
        """One split for evaluation, with the first `levels` hard negatives of its queries."""
        return self.dataset(read_annotations(self.config.path(file)), negatives, levels)

    def dataset(
        self,
        annotations: Sequence[Annotation],
        negatives: Mapping[str, HardNegatives] | None = None,
        levels: int = 0,
    ) -> Dataset:
        """The rows of `annotations`, with the first `levels` hard negatives of each.

        Raises:
            InputError: features or text of a row are missing or wrong.
        """
        data = self.config.data
        return Dataset.build(
            annotations,
            self.store,
            self.texts,
            max_moments=data.max_moments,
            negatives=negatives,
            num_levels=levels,
            max_clips=data.max_clips,
            reference=data.compat == "reference",
            with_partner=self.config.loss.with_partner,
        )

    def _training_negatives(self, annotations: list[Annotation]) -> dict[str, HardNegatives]:
        data = self.config.data
        path = self.config.path(data.negatives or data.train)
        negatives = read_negatives(path)
        wanted = self.config.loss.num_hard_negatives
        rows = [negatives[a.qid] for a in annotations if a.qid in negatives]
        levels = max((len(row.queries) for row in rows), default=0)
        if levels < wanted:
            raise InputError(
                f"{path}: expected {wanted} levels of hard negatives of the queries in "
                f"{data.train}, one less than loss.fine_weights has values; found {levels}; make "
                f"them with `shine negatives generate --config ...`"
            )
        return negatives


def check_files(config: Config) -> None:
    """The stores on this machine hold what was packed and encoded; read in full but once.

    Of one elsewhere, a copy is checked while it is made. A streamed store is not read in full.

    Raises:
        InputError: a file was changed after packing.
    """
    features = located(config)
    if features.feed != "streamed" and not is_url(features.store):
        verify_once(FeatureStore.open(features.store), cache_folder(config))
    if config.text.encoder != "lexical" and not is_url(config.text.store):
        verify_once(TextStore.open(config, cache_folder(config)), cache_folder(config))


def cache_folder(config: Config) -> Path:
    """The folder of this machine for copies of what lies elsewhere."""
    cache = config.features.cache
    return default_cache() if cache is None else config.path(cache)


def check_store(store: FeatureStore, features: FeaturesConfig) -> None:
    """The store is as the configuration says.

    Raises:
        InputError: it was packed with other settings.
    """
    manifest = store.manifest
    audio = manifest.get("audio_width", 0)
    wrong = None
    if features.width is not None and store.width != features.width:
        wrong = f"clips of {features.width} columns (features.width), got {store.width}"
    elif bool(audio) != (features.audio is not None):
        name = features.audio and shown(features.audio.path)
        wrong = f"features.audio={name}, got {audio} columns of audio"
    elif manifest["clip_seconds"] != features.clip_seconds:
        wrong = f"features.clip_seconds={features.clip_seconds}, got {manifest['clip_seconds']}"
    elif manifest["normalize"] != features.normalize:
        wrong = f"features.normalize={features.normalize}, got {manifest['normalize']}"
    elif manifest["dtype"] != features.dtype:
        wrong = f"features.dtype={features.dtype}, got {manifest['dtype']}"
    if wrong:
        raise InputError(
            f"{store.folder}: expected {wrong}; pack the features again or correct the "
            f"configuration"
        )


def _check_moments(dataset: Dataset, path: Path) -> None:
    """Every row has a moment to learn.

    Raises:
        InputError: `data.max_clips` leaves a row without one.
    """
    lost = np.flatnonzero(~dataset.in_reach.any(axis=1))
    if len(lost):
        raise InputError(
            f"{path}: {len(lost)} of {len(dataset)} rows have no moment in the clips that "
            f"data.max_clips keeps, the first is query {dataset.annotations[lost[0]].qid}; raise "
            f"data.max_clips or leave these rows out"
        )
