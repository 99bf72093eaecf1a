"""Features streamed to a worker of a training, by a Ray Data pipeline over its batches in order.

Each worker has pipelines of its own, one after the other: nothing is split between workers, so no
row is dropped. One plans thousands of batches, whatever an epoch has, so that few are started.
"""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from shine.data.batch import Batch
from shine.data.dataset import Dataset, collate, dealt, wanted_clips
from shine.data.feeding import ahead
from shine.data.sampler import GlobalBatch
from shine.data.store import RangeStore
from shine.errors import InputError

_PLANNED: Final = 2**13  # batches of a pipeline
_AT_A_TIME: Final = 32  # batches that a reader is told of
_BLOCK_BYTES: Final = 2**22  # of clips that travel together, where a batch is not larger
_STORE_BYTES: Final = 2**27  # of clips of one worker in Ray's object store at a time
_SHARE: Final = 0.5  # of the object store for the clips of all workers
_PATIENCE_SECONDS: Final = 300  # for a reader to start
_PLACES: Final = pa.schema(
    [(name, pa.list_(pa.int64())) for name in ("shard", "offset", "length")]  # of each video
)
_CLIPS: Final = pa.schema([("clips", pa.large_binary()), ("wrong", pa.string())])


@dataclass(frozen=True)
class StreamedFeed:
    """See `shine.data.feeding.Feed`: clips are read elsewhere on the cluster, ahead of the step."""

    place: str  # of the store

    def __call__(
        self,
        dataset: Dataset,
        batches: Iterable[GlobalBatch],
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> Generator[Batch]:
        """See `shine.data.feeding.Feed`."""
        share = {"rank": rank, "world_size": world_size}

        def collated() -> Iterator[Batch]:
            remaining = iter(batches)
            while planned := list(islice(remaining, _PLANNED)):
                rows = [dealt(batch, **share) for batch in planned]
                streamed = _stream(self.place, dataset, rows, world_size)
                for batch, stored in zip(planned, streamed, strict=True):
                    yield collate(dataset, batch, **share, stored=stored).bound_for(device)

        yield from ahead(collated())


class Reader:
    """Reads the clips of batches.

    Args:
        place: of the store.
        manifest: of the store.
    """

    def __init__(self, place: str, manifest: dict[str, Any]):
        self._store = RangeStore.of(place, manifest)
        self._shards = [shard["name"] for shard in manifest["shards"]]

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Of each row of `table`, the clips that lie at its places, end to end."""
        for row in table.to_pylist():
            columns = (row[name] for name in _PLACES.names)
            places = [(self._shards[s], *place) for s, *place in zip(*columns, strict=True)]
            clips, wrong = b"", None
            try:
                clips = b"".join(part.data for part in self._store.read_places(places))
            except InputError as error:
                wrong = str(error)
            yield pa.table([[clips], [wrong]], schema=_CLIPS)


def _stream(
    place: str, dataset: Dataset, shares: Sequence[np.ndarray], world_size: int
) -> Iterator[list[np.ndarray]]:
    """The stored clips of the videos of each share, in order, one array for each video.

    Raises:
        InputError: the storage failed, or the cluster has no processor for a reader.
    """
    import ray
    import ray.data
    from ray.exceptions import GetTimeoutError

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    manifest = dataset.store.manifest
    options = ray.data.ExecutionOptions(preserve_order=True)
    budget = ray.cluster_resources().get("object_store_memory", 0) * _SHARE / world_size
    options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=min(_STORE_BYTES, int(budget))
    )
    tables: list[Any] = [ray.put(table) for table in _tables(dataset, shares)]
    source = ray.data.from_arrow_refs(tables)
    source.context.execution_options = options
    source.context.enable_progress_bars = False
    source.context.target_max_block_size = _BLOCK_BYTES
    source.context.wait_for_min_actors_s = _PATIENCE_SECONDS
    read = source.map_batches(
        Reader,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(place, manifest),
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
    )
    dtype = np.dtype(manifest["dtype"])
    remaining = iter(shares)
    try:
        found: Iterable[Any] = read.iter_batches(batch_size=None, batch_format="pyarrow")
        for table in found:
            for row, rows in zip(range(len(table)), islice(remaining, len(table)), strict=True):
                if wrong := table["wrong"][row].as_py():
                    raise InputError(wrong)
                flat = np.frombuffer(table["clips"][row].as_buffer(), dtype)
                clips = flat.reshape(-1, dataset.store.width)
                _, lengths, _ = wanted_clips(dataset, rows)
                yield np.split(clips, np.cumsum(lengths))[: len(lengths)]
    except GetTimeoutError:
        raise InputError(
            f"no processor became free in {_PATIENCE_SECONDS} s for the reader of streamed "
            f"features, one next to each of the {world_size} training workers; lower "
            f"train.num_workers, or set features.feed=mapped"
        ) from None


def _tables(dataset: Dataset, shares: Sequence[np.ndarray]) -> Iterator[pa.Table]:
    """Where the clips of the videos of each share lie, one row for each share."""
    numbers = {
        shard["name"]: number for number, shard in enumerate(dataset.store.manifest["shards"])
    }
    remaining = iter(shares)
    while group := list(islice(remaining, _AT_A_TIME)):
        rows = []
        for share in group:
            vids, lengths, _ = wanted_clips(dataset, share)
            places = [dataset.store.place(vid) for vid in vids]
            rows.append(
                {
                    "shard": [numbers[shard] for shard, _, _ in places],
                    "offset": [offset for _, offset, _ in places],
                    "length": lengths.tolist(),
                }
            )
        yield pa.Table.from_pylist(rows, schema=_PLACES)
