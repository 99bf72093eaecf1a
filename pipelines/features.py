"""Ray Data around the feature store: raw files are read and packed by many workers at once."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.connection import connect
from shine.config import Config, FeaturesConfig
from shine.data.annotations import read_annotations
from shine.data.features import Shard, read_feature_file, write_manifest, write_shard
from shine.data.mixture import MANIFEST, read_world
from shine.errors import InputError

_VIDEOS_PER_SHARD = 256
Progress = Callable[[int, int], None]  # done, total


def pack_shard(row: dict[str, Any]) -> dict[str, Any]:
    """The record of the shard that `row` describes, written; what a worker runs."""
    config = FeaturesConfig.model_validate_json(row["settings"])
    return asdict(write_shard(Path(row["folder"]), row["index"], list(row["vids"]), config))


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
    source = config.path(config.features.source).resolve()
    if not source.is_dir():
        raise InputError(
            f"no folder of features {source}: set features.source to the folder with one "
            f"{{vid}}.npy or {{vid}}.npz per video"
        )
    width = config.features.width or first_width(source, vids)
    settings = config.features.model_copy(update={"source": str(source), "width": width})
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
        }
        for index, start in enumerate(range(0, len(vids), _VIDEOS_PER_SHARD))
    ]
    with connect():
        shards = sorted(_write_shards(rows, len(vids), on_progress), key=lambda shard: shard.file)
    refused = sorted(sentence for shard in shards for sentence in shard.refused)
    if not any(shard.vids for shard in shards):
        raise InputError(f"no video could be packed; the first reason: {refused[0]}")
    manifest = write_manifest(building, shards, settings, simulated)
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


def simulated_note(config: Config) -> str | None:
    """What is simulated about annotations or features, in words; None for real data.

    A simulated world may be the root of the configuration, or hold `features.source` alone.

    Raises:
        InputError: such a world is unfinished.
    """
    beside = config.path(config.features.source).resolve().parent
    worlds = (Path(config.data.root), beside)
    notes = [read_world(world)["simulated"] for world in worlds if (world / MANIFEST).is_file()]
    return "; ".join(dict.fromkeys(notes)) or None


def first_width(source: Path, vids: Iterable[str]) -> int:
    """Columns of the first file of `vids` that can be read.

    Raises:
        InputError: none can.
    """
    reasons: list[str] = []
    for vid in vids:
        try:
            return read_feature_file(source, vid, None).shape[1]
        except InputError as error:
            reasons.append(str(error))
    raise InputError(f"no video could be packed; the first reason: {reasons[0]}")
