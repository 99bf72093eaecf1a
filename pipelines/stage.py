"""One stage of work on Ray Data: tables through a pool of workers."""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from shine.errors import InputError

MAX_RESTARTS: Final = 3  # of a worker that died
_WRONG: Final = "wrong input"  # the one column of a table that tells of an `InputError`


class _Worker:
    """A worker of `kind` whose `InputError` comes back as a table; Ray would wrap it.

    Args:
        kind: the worker's class.
        arguments: of its constructor.
    """

    def __init__(self, kind: Callable[..., Any], arguments: tuple[Any, ...]):
        self._wrong: InputError | None = None
        try:
            self._worker = kind(*arguments)
        except InputError as error:
            self._wrong = error

    def __call__(self, table: pa.Table) -> pa.Table:
        """What the worker makes of `table`."""
        try:
            return _told(self._wrong) if self._wrong else self._worker(table)
        except InputError as error:
            return _told(error)


class _AsyncWorker(_Worker):
    """The same for a worker that works on several tables at a time."""

    async def __call__(self, table: pa.Table) -> pa.Table:
        """What the worker makes of `table`."""
        try:
            return _told(self._wrong) if self._wrong else await self._worker(table)
        except InputError as error:
            return _told(error)


def run_stage(
    tables: Sequence[Any],
    worker: type,
    arguments: tuple[Any, ...],
    num_workers: int,
    *,
    num_cpus: float = 1.0,
    gpu: bool = False,
    at_a_time: int = 1,
) -> Iterator[pa.Table]:
    """What workers make of the tables, in their order and as they are ready.

    Args:
        tables: Ray's references to them.
        worker: called with a table.
        arguments: of its constructor.
        num_workers: processes at a time, no more than there are tables.
        num_cpus: of a worker.
        gpu: whether each worker has one to itself.
        at_a_time: tables that an async worker works on at a time.

    Raises:
        InputError: a worker raised it.
        RuntimeError: a worker died again and again.
    """
    import ray.data
    from ray.exceptions import ActorDiedError
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow_refs([*tables])
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    most = min(len(tables), num_workers)
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to bound restarts; unbounded, a crashing worker would never end.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        made = dataset.map_batches(
            _AsyncWorker if inspect.iscoroutinefunction(worker.__call__) else _Worker,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(worker, arguments),
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=most,
                initial_size=most,
                max_concurrent_calls_per_actor=at_a_time,
            ),
            num_cpus=num_cpus,
            num_gpus=1 if gpu else None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
    try:
        found: Iterable[Any] = made.iter_batches(batch_size=None, batch_format="pyarrow")
        for table in found:
            if table.column_names == [_WRONG]:
                raise InputError(table[_WRONG][0].as_py())
            yield table
    except ActorDiedError as error:
        if error.actor_init_failed:
            raise
        raise RuntimeError(
            f"a worker ({worker.__name__}) died {MAX_RESTARTS + 1} times, most often for want of "
            f"memory; free some, or run on a larger machine"
        ) from None


def _told(error: InputError) -> pa.Table:
    return pa.table({_WRONG: [str(error)]})
