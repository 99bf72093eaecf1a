import os

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

from cluster.connection import prepare_environment

prepare_environment()  # before any test imports ray

# Every annotated shape and type of the package is checked while the tests run.
install_import_hook("shine", "shape_check.check")
torch.set_num_threads(1)
hypothesis.settings.register_profile("shine", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("shine")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What a run keeps for the next one stays out of the user's folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
