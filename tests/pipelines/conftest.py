import sys

import pytest

from cluster.connection import connect
from pipelines.cli import main


@pytest.fixture
def shine(monkeypatch, capsys):
    """Runs a command line; returns exit status, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["shine", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return exit_.value.code or 0, out, " ".join(err.split())

    return run


@pytest.fixture(scope="session")
def ray_cluster():
    """A local cluster of four logical CPUs, started once, as the pipelines start theirs."""
    with connect(min_cpus=4):
        yield
