import pytest

from cluster.connection import connect


@pytest.fixture(scope="session")
def ray_cluster():
    """A local cluster of four logical CPUs, started once, as the pipelines start theirs."""
    with connect(min_cpus=4):
        yield
