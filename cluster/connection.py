"""Where Ray is: the cluster that `RAY_ADDRESS` names, else one started here and stopped at the end.

The local one authenticates every call with a token of its own.
"""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shine.errors import InputError

# Read by Ray at import or at start; what the user has set stays.
_QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else a line for every way a worker might have failed
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU keep their view of it
    # How often reported checkpoints are collected; the next report waits for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_LOCAL_OBJECT_STORE = 256 * 2**20  # bytes; features travel as files, not through the object store


@contextmanager
def connect(min_cpus: int = 2) -> Iterator[None]:
    """Inside, Ray is connected; a cluster that was started here is stopped on leaving.

    An existing connection of this process is used and left as it is.

    Args:
        min_cpus: logical CPUs that a local cluster has at least, however few the machine has.

    Raises:
        InputError: no cluster answers at `RAY_ADDRESS`.
    """
    prepare_environment()
    address = os.environ.get("RAY_ADDRESS")
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, AuthenticationError) as error:
            raise InputError(f"no Ray cluster at RAY_ADDRESS={address}: {error}") from None
    else:
        with _silent_stderr():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, min_cpus),
                include_dashboard=False,
                object_store_memory=_LOCAL_OBJECT_STORE,
                **options,
            )
    try:
        yield
    finally:
        ray.shutdown()


def prepare_environment() -> None:
    """What Ray reads from the environment is set, except where the user has set it.

    Ray reads the way to authenticate once, when it is imported: called after that, this leaves the
    token to Ray, which then makes a file of its own in the home folder.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        return
    if loopback := {"linux": "lo", "darwin": "lo0"}.get(sys.platform):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    known = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not known and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what native code prints on standard error, such as the log level that it was given."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
