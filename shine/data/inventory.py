"""How many clips each video has, as a packed store says, or raw features that would be packed."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from shine.config import Config
from shine.data.loading import check_store
from shine.data.packing import source_widths, stored_clips
from shine.data.sources import VideoRefused, located, open_source
from shine.data.store import MANIFEST, FeatureStore, RangeStore, open_storage
from shine.errors import InputError
from shine.storage import is_url, shown


@dataclass(frozen=True)
class ClipCounts:
    """How many clips each video has."""

    place: str  # the store or the sources
    num_clips: Mapping[str, int]  # of the videos that can be used
    reasons: Mapping[str, str]  # why others cannot be used, where more is known than their absence


def has_store(config: Config) -> bool:
    """Whether the features of a configuration are packed.

    Raises:
        InputError: the storage failed.
    """
    return open_storage(located(config).store).exists(MANIFEST)


def count_clips(config: Config, vids: Iterable[str]) -> ClipCounts:
    """The clips of the videos, of the store of a configuration; without one, of its sources.

    Raw features are read as packing reads them, one video after the other.

    Args:
        config: of a run.
        vids: the videos that are asked for.

    Raises:
        InputError: the store is not as configured, or no source can be read.
    """
    features = located(config)
    if has_store(config):
        store = open_listed(config)
        return ClipCounts(shown(features.store), dict(_held(store, vids)), {})
    names = list(vids)
    widths = source_widths(features, names)
    sources = [open_source(part) for part in features.parts]
    num_clips: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for vid in names:
        try:
            parts = [source.read(vid, width) for source, width in zip(sources, widths, strict=True)]
        except VideoRefused as error:
            reasons[vid] = str(error)
            continue
        try:
            num_clips[vid] = len(stored_clips(parts, features, f"features of video {vid}"))
        except InputError as error:
            reasons[vid] = str(error)
    place = ", ".join(shown(part.path) for part in features.parts)
    return ClipCounts(place, num_clips, reasons)


def open_listed(config: Config) -> FeatureStore:
    """The packed store of a configuration; of one elsewhere, only where its videos lie is read.

    Raises:
        InputError: there is none, it is not whole, or it was packed with other settings.
    """
    place = located(config).store
    store = RangeStore.open(place) if is_url(place) else FeatureStore.open(place)
    check_store(store, config.features)
    return store


def _held(store: FeatureStore, vids: Iterable[str]) -> Iterator[tuple[str, int]]:
    for vid in vids:
        with contextlib.suppress(InputError):
            yield vid, store.num_clips(vid)
