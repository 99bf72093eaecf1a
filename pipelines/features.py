"""Ray Data around the feature store: raw features are read and packed by many workers at once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.connection import connect
from cluster.size import data_workers
from pipelines.stage import run_stage
from shine.config import Config, FeaturesConfig
from shine.data.annotations import read_annotations
from shine.data.mixture import MANIFEST, read_world
from shine.data.packing import Packed, Packer, Unit, pack_store
from shine.data.sources import located, remove_copies
from shine.storage import is_url

Progress = Callable[[int, int], None]  # done, total


class PackUnits:
    """Packs the units of tables; what a worker runs.

    Args:
        settings: a section of features as JSON, with absolute places.
        widths: columns of the clips of each source.
    """

    def __init__(self, settings: str, widths: Sequence[int]):
        self._packer = Packer(FeaturesConfig.model_validate_json(settings), widths)

    def __call__(self, table: pa.Table) -> pa.Table:
        """What became of each unit, as JSON."""
        packed = [self._packer.pack(Unit(r["index"], tuple(r["vids"]))) for r in table.to_pylist()]
        return pa.table({"packed": [part.to_json() for part in packed]})


def pack(config: Config, on_progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """The features of every video that the configuration's annotations name stand in its store.

    A video whose features cannot be used is left out and named in `refused` of the result. The
    store is the same whatever the number of workers.

    Returns:
        The manifest, with `refused`: `vid` and `reason` of each video left out.

    Raises:
        InputError: an annotation file is wrong, a simulated world is unfinished, no video could be
            packed, or a storage failed.
    """
    simulated = simulated_note(config)
    vids = annotated_videos(config)

    def by_workers(
        settings: FeaturesConfig, widths: Sequence[int], units: Sequence[Unit]
    ) -> Iterator[Packed]:
        import ray

        done = 0
        with connect():
            tables = [
                ray.put(pa.table({"index": [unit.index], "vids": [list(unit.vids)]}))
                for unit in units
            ]
            arguments = (settings.model_dump_json(), widths)
            for table in run_stage(tables, PackUnits, arguments, data_workers()):
                for text in table["packed"].to_pylist():
                    packed = Packed.from_json(text)
                    done += sum(len(shard.vids) for shard in packed.shards) + len(packed.refused)
                    on_progress(done, len(vids))
                    yield packed
        remove_copies()

    places = located(config)
    if any(name.startswith("memory:") for name in (places.store, *(p.path for p in places.parts))):
        return pack_store(config, vids, simulated)  # no other process sees this memory
    return pack_store(config, vids, simulated, run=by_workers)


def annotated_videos(config: Config) -> list[str]:
    """The videos that any split of the configuration names, sorted."""
    files = [config.data.train, *config.data.validation.values(), *config.data.tests.values()]
    return sorted({a.vid for file in files for a in read_annotations(config.path(file))})


def simulated_note(config: Config) -> str | None:
    """What is simulated about annotations or features, in words; None for real data.

    A simulated world may be the root of the configuration, or hold a folder of features alone.

    Raises:
        InputError: such a world is unfinished.
    """
    places = [part.path for part in located(config).parts]
    beside = [Path(place).parent for place in places if not is_url(place)]
    worlds = (Path(config.data.root), *beside)
    notes = [read_world(world)["simulated"] for world in worlds if (world / MANIFEST).is_file()]
    return "; ".join(dict.fromkeys(notes)) or None
