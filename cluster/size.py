"""What the connected cluster has, and what fits on it."""

import os

from shine.errors import InputError


def check_workers(num_workers: int, *, gpu: bool) -> None:
    """Training workers of one CPU (and one GPU) each can be placed on the local cluster.

    One that `RAY_ADDRESS` names may grow when work waits, so nothing is refused there.

    Raises:
        InputError: they cannot; the sentence has the arithmetic.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    total = ray.cluster_resources()
    for kind, wanted in (("CPU", num_workers), ("GPU", num_workers if gpu else 0)):
        has = int(total.get(kind, 0))
        if wanted > has:
            raise InputError(
                f"train.num_workers={num_workers} needs {wanted} {kind}s, one per worker; the "
                f"cluster has {has}; set train.num_workers={has}"
                + (" or train.gpu=false" if kind == "GPU" else "")
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
