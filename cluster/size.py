"""What the connected cluster has, and what fits on it."""

import os

from shine.errors import InputError


def training_cpus(num_workers: int, *, streamed: bool) -> int:
    """CPUs of a training: one per worker, and one more for its reader of streamed features."""
    return num_workers * (2 if streamed else 1)


def check_workers(num_workers: int, *, gpu: bool, streamed: bool = False) -> None:
    """Training workers of one CPU (and one GPU) each can be placed on the local cluster.

    One that `RAY_ADDRESS` names may grow when work waits, so nothing is refused there.

    Args:
        num_workers: of the training.
        gpu: whether each has one.
        streamed: whether each has a reader, with a CPU, beside it.

    Raises:
        InputError: they cannot; the sentence has the arithmetic.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    total = ray.cluster_resources()
    cpus = training_cpus(num_workers, streamed=streamed)
    for kind, wanted in (("CPU", cpus), ("GPU", num_workers if gpu else 0)):
        has = int(total.get(kind, 0))
        if wanted > has:
            each = wanted // num_workers
            raise InputError(
                f"train.num_workers={num_workers} needs {wanted} {kind}s, "
                f"{'one per worker' if each == 1 else 'two per worker, one of them to stream'}; "
                f"the cluster has {has}; set train.num_workers={has // each}"
                + (" or train.gpu=false" if kind == "GPU" else "")
                + (" or features.feed=mapped" if each > 1 else "")
            )


def data_workers(*, gpu: bool = False) -> int:
    """Workers for a data pipeline that has the connected cluster to itself, at least one.

    Args:
        gpu: whether each needs a GPU; one CPU otherwise.

    Raises:
        InputError: the local cluster has no GPU.
    """
    import ray

    has = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
    if gpu and not has and not os.environ.get("RAY_ADDRESS"):
        raise InputError(
            "workers with a GPU were asked for and this machine has none; set gpu=false"
        )
    return max(1, has)
