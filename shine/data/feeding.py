"""How batches reach a step: collated ahead of it, in the order that the sampler alone fixes."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar, runtime_checkable

import torch

from shine.data.batch import Batch
from shine.data.dataset import Dataset, collate
from shine.data.sampler import GlobalBatch

AHEAD: Final = 2  # batches that wait for the step, beside the one that is being made
_TRIES: Final = 1000  # at the end of a thread, of 10 ms each
_Item = TypeVar("_Item")


@runtime_checkable
class Feed(Protocol):
    """Turns the batches of a run into a worker's share of them."""

    def __call__(
        self,
        dataset: Dataset,
        batches: Iterable[GlobalBatch],
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> Generator[Batch]:
        """The worker's share of each of `batches`, in order, each time that it is asked for one.

        Args:
            dataset: of the rows.
            batches: from where the run stands; may be iterated more than once.
            rank: of the worker.
            world_size: number of workers.
            device: that the batches go to.
        """
        ...


def collated_ahead(
    dataset: Dataset,
    batches: Iterable[GlobalBatch],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Generator[Batch]:
    """See `Feed`: read from the data set's store, in a thread of this process."""
    shares = (collate(dataset, batch, rank=rank, world_size=world_size) for batch in batches)
    yield from ahead(share.bound_for(device) for share in shares)


def ahead(items: Iterable[_Item], most: int = AHEAD) -> Generator[_Item]:
    """The items in order, up to `most` of them made before they are asked for.

    They are made in a thread, one at a time. What making one raises, asking for it raises.
    """
    made: queue.Queue[_Made[_Item]] = queue.Queue(most)
    stopped = threading.Event()
    thread = threading.Thread(target=_make, args=(iter(items), made, stopped), daemon=True)
    thread.start()
    try:
        while (one := made.get()).error is None:
            yield one.item
        if not isinstance(one.error, StopIteration):
            raise one.error
    finally:
        stopped.set()
        for _ in range(_TRIES):  # it may wait for a place; one that a storage holds is left behind
            _drain(made)
            thread.join(0.01)
            if not thread.is_alive():
                break


@dataclass(frozen=True, slots=True)
class _Made(Generic[_Item]):
    item: Any = None
    error: BaseException | None = None  # `StopIteration` after the last item


def _make(items: Iterator[Any], made: queue.Queue[_Made], stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            one = _Made(next(items))
        except BaseException as error:
            made.put(_Made(error=error))
            return
        made.put(one)


def _drain(made: queue.Queue[_Made]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            made.get_nowait()
