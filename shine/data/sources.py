"""Raw features as they are found: one source per extractor, each video read alone."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from shine.config import Config, FeaturesConfig, SourceConfig
from shine.data.arrays import read_matrix
from shine.errors import InputError
from shine.storage import is_url


class VideoRefused(InputError):  # noqa: N818
    """The features of one video cannot be used; those of others may."""


@runtime_checkable
class Source(Protocol):
    """Raw features by one extractor."""

    config: SourceConfig

    def read(self, vid: str, width: int | None = None) -> Float[np.ndarray, "clip feature"]:
        """The clips of one video, as they are stored, of `width` columns where that is known.

        Raises:
            VideoRefused: there are none, or they are not finite numbers of this shape.
            InputError: the storage failed.
        """
        ...


def located(config: Config) -> FeaturesConfig:
    """The section of features with its sources and its store found from any working directory."""
    section = config.features

    def place(name: str) -> str:
        return name if is_url(name) else str(config.path(name).resolve())

    def moved(source: SourceConfig) -> SourceConfig:
        return source.model_copy(update={"path": place(source.path)})

    return section.model_copy(
        update={
            "sources": tuple(moved(source) for source in section.sources),
            "audio": section.audio and moved(section.audio),
            "store": place(section.store),
        }
    )


def open_source(config: SourceConfig) -> Source:
    """The source that `config` names, ready to be read.

    Raises:
        InputError: there is none.
    """
    if not Path(config.path).is_dir():
        raise InputError(
            f"no folder of features {config.path}: set features.sources to folders with one "
            f"{{vid}}.npy or {{vid}}.npz per video"
        )
    return _Folder(config)


class _Folder:
    """A folder of one file per video."""

    def __init__(self, config: SourceConfig):
        self.config = config
        self._folder = Path(config.path)

    def read(self, vid: str, width: int | None = None) -> Float[np.ndarray, "clip feature"]:
        """See `Source`."""
        paths = (self._folder / f"{vid}.{ending}" for ending in ("npy", "npz"))
        path = next(filter(Path.is_file, paths), None)
        if path is None:
            raise VideoRefused(
                f"no features of video {vid}: expected {self._folder / vid}.npy or .npz"
            )
        try:
            clips = read_matrix(path, self.config.key, "clip, feature")
        except InputError as error:
            raise VideoRefused(str(error)) from None
        if width is not None and clips.shape[1] != width:
            raise VideoRefused(
                f"{path}: expected {width} columns, got {clips.shape[1]}; check features.width and "
                f"that every file comes from the same extractor"
            )
        return clips
