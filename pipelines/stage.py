"""One stage of work on Ray Data: tables through a pool of workers."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

MAX_RESTARTS: Final = 3  # of a worker that died


def run_stage(
    tables: Sequence[Any],
    worker: type,
    arguments: tuple[Any, ...],
    num_workers: int,
    *,
    num_cpus: float = 1.0,
) -> Iterator[pa.Table]:
    """What workers make of the tables, in their order and as they are ready.

    Args:
        tables: Ray's references to them.
        worker: called with a table at a time; an async one with several.
        arguments: of its constructor.
        num_workers: processes at a time, no more than there are tables.
        num_cpus: of a worker.

    Raises:
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
            worker,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
            num_cpus=num_cpus,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
    try:
        yield from made.iter_batches(batch_size=None, batch_format="pyarrow")
    except ActorDiedError:
        raise RuntimeError(
            f"a worker that makes hard negatives died {MAX_RESTARTS + 1} times, most often for "
            f"want of memory; free some, or run on a larger machine"
        ) from None
