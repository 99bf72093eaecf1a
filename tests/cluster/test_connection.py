import subprocess
import sys

import pytest

CONNECT = """
{before}
from cluster.connection import connect
with connect():
    import os, ray
    print(ray.get(ray.remote(lambda: 7).remote()), len(os.environ.get("RAY_AUTH_TOKEN", "")))
print(ray.is_initialized())
"""


def run(monkeypatch, tmp_path, before=""):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    code = CONNECT.format(before=before)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.ray
def test_a_local_cluster_authenticates_with_a_token_that_no_file_holds(monkeypatch, tmp_path):
    out, err = run(monkeypatch, tmp_path)
    assert out == ["7", "64", "False"]
    assert err == ""
    assert not (tmp_path / ".ray").exists()


@pytest.mark.ray
def test_ray_may_be_imported_before_it_is_connected(monkeypatch, tmp_path):
    out, _ = run(monkeypatch, tmp_path, before="import ray")
    assert out[0] == "7"
    assert out[-1] == "False"
