"""From a configuration to datasets, with every mistake found before a cluster is asked for."""

from dataclasses import dataclass

from shine.config import Config
from shine.data.annotations import Annotation, read_annotations
from shine.data.dataset import Dataset
from shine.data.features import FeatureStore
from shine.data.text import TextTable, build_encoder
from shine.errors import InputError
from shine.language.negatives import HardNegatives, read_negatives


@dataclass(frozen=True)
class Source:
    """What the splits of a run share: the features and the encoded texts."""

    config: Config
    store: FeatureStore
    texts: TextTable

    @classmethod
    def open(cls, config: Config) -> "Source":
        """The features and the text encoder of `config`.

        Raises:
            InputError: the store or a word table is missing or not as configured.
        """
        store = FeatureStore.open(config.path(config.features.store))
        expected = config.features.width
        if expected is not None and store.width != expected:
            raise InputError(
                f"{store.folder}: expected clips of {expected} columns (features.width), got "
                f"{store.width}; pack the features again or correct the width"
            )
        return cls(config, store, TextTable(build_encoder(config), config.text.max_tokens))

    def training(self) -> Dataset:
        """The training split, with the hard negatives that the loss asks for."""
        config = self.config
        annotations = read_annotations(config.path(config.data.train))
        levels = config.loss.num_hard_negatives
        negatives = self._training_negatives(annotations) if levels else None
        return self._build(annotations, negatives, levels, config.data.max_moments)

    def validation(self) -> dict[str, Dataset]:
        """The splits that choose the checkpoint, by name."""
        return {name: self.evaluation(file) for name, file in self.config.data.validation.items()}

    def evaluation(
        self, file: str, negatives: dict[str, HardNegatives] | None = None, levels: int = 0
    ) -> Dataset:
        """One split for evaluation, with the first `levels` hard negatives of its queries."""
        annotations = read_annotations(self.config.path(file))
        most = max(len(annotation.moments) for annotation in annotations)
        return self._build(annotations, negatives, levels, most)

    def _build(
        self,
        annotations: list[Annotation],
        negatives: dict[str, HardNegatives] | None,
        levels: int,
        max_moments: int,
    ) -> Dataset:
        return Dataset.build(
            annotations,
            self.store,
            self.texts,
            max_moments=max_moments,
            negatives=negatives,
            num_levels=levels,
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
