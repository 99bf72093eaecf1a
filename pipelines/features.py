"""Ray Data around the feature store: raw files are read and packed by many workers at once."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.connection import connect
from shine.config import Config, FeaturesConfig
from shine.data.annotations import read_annotations
from shine.data.mixture import MANIFEST, read_world
from shine.data.packing import Shard, source_widths, write_manifest, write_shard
from shine.errors import InputError

_VIDEOS_PER_SHARD = 256
Progress = Callable[[int, int], None]  # done, total


def pack_shard(row: dict[str, Any]) -> dict[str, Any]:
    """The record of the shard that `row` describes, written; what a worker runs."""
    config = FeaturesConfig.model_validate_json(row["settings"])
    shard = write_shard(
        Path(row["folder"]), row["index"], list(row["vids"]), config, list(row["widths"])
    )
    return asdict(shard)


def pack(config: Config, on_progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """The features of every video that the configuration's annotations name stand in its store.

    A video whose file cannot be used is left out and named in `refused` of the result. The store is
    the same whatever the number of workers.

    Returns:
        The manifest, with `refused`: one sentence for each video left out.

    Raises:
        InputError: an annotation file is wrong, a simulated world is unfinished, or no video could
            be packed.
    """
    simulated = simulated_note(config)
    vids = annotated_videos(config)
    settings = rooted_folders(config)
    widths = source_widths(settings, vids)
    folder = config.path(config.features.store).resolve()
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    rows = [
        {
            "index": index,
            "vids": vids[start : start + _VIDEOS_PER_SHARD],
            "folder": str(building),
            "settings": settings.model_dump_json(),
            "widths": widths,
        }
        for index, start in enumerate(range(0, len(vids), _VIDEOS_PER_SHARD))
    ]
    with connect():
        shards = sorted(_write_shards(rows, len(vids), on_progress), key=lambda shard: shard.file)
    refused = sorted(sentence for shard in shards for sentence in shard.refused)
    if not any(shard.vids for shard in shards):
        raise InputError(f"no video could be packed; the first reason: {refused[0]}")
    manifest = write_manifest(building, shards, settings, widths, simulated)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return {**manifest, "refused": refused}


def _write_shards(
    rows: list[dict[str, Any]], num_videos: int, on_progress: Progress
) -> Iterator[Shard]:
    """Every shard as it is written, in any order."""
    import ray
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(pack_shard, num_cpus=1)
    done = 0
    for record in written.iter_rows():
        shard = Shard.from_record(record)
        done += len(shard.vids) + len(shard.refused)
        on_progress(done, num_videos)
        yield shard


def annotated_videos(config: Config) -> list[str]:
    """The videos that any split of the configuration names, sorted."""
    files = [config.data.train, *config.data.validation.values(), *config.data.tests.values()]
    return sorted({a.vid for file in files for a in read_annotations(config.path(file))})


def rooted_folders(config: Config) -> FeaturesConfig:
    """The section of features with the folders of its raw files found from anywhere."""
    section = config.features
    folders = [str(config.path(folder).resolve()) for folder in section.folders]
    audio = None if section.audio is None else folders[-1]
    sources = tuple(folders[: len(section.sources)])
    return section.model_copy(update={"sources": sources, "audio": audio})


def simulated_note(config: Config) -> str | None:
    """What is simulated about annotations or features, in words; None for real data.

    A simulated world may be the root of the configuration, or hold a folder of features alone.

    Raises:
        InputError: such a world is unfinished.
    """
    beside = [Path(folder).parent for folder in rooted_folders(config).folders]
    worlds = (Path(config.data.root), *beside)
    notes = [read_world(world)["simulated"] for world in worlds if (world / MANIFEST).is_file()]
    return "; ".join(dict.fromkeys(notes)) or None
