import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import fsspec
import pytest

from shine.data.local_copy import default_cache, local_copy
from shine.data.shards import ShardFile
from shine.errors import InputError
from shine.storage import Storage


def stored(url, **contents):
    """A storage with files, and how a manifest lists them."""
    storage = Storage(url, "check the URL")
    for name, content in contents.items():
        storage.write(name, content)
    files = [
        ShardFile(name, sha256(content).hexdigest(), len(content))
        for name, content in contents.items()
    ]
    return storage, files


class Counting(Storage):
    """Counts how often each file is opened."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.opened = []

    def open(self, name):
        self.opened.append(name)
        return super().open(name)


@pytest.fixture
def url(request):
    url = f"memory://{request.node.name}"
    yield url
    fs = fsspec.filesystem("memory")
    if fs.exists(url):
        fs.rm(url, recursive=True)


def test_a_copy_holds_the_files_and_is_made_once_however_many_ask(url, tmp_path):
    storage = Counting(url, "")
    _, files = stored(url, a=b"first" * 1000, b=b"second")
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(local_copy, storage, files, tmp_path, "k") for _ in range(8)]
        (folder,) = {future.result() for future in asked}
    assert folder == tmp_path / "k"
    assert (folder / "a").read_bytes() == b"first" * 1000
    assert (folder / "b").read_bytes() == b"second"
    assert sorted(storage.opened) == ["a", "b"]


def test_contents_that_are_not_those_of_the_manifest_leave_no_file(url, tmp_path):
    storage, (file,) = stored(url, a=b"right")
    for wrong in (b"wrong", b"right and more", b"r"):
        storage.write("a", wrong)
        with pytest.raises(InputError, match="a is not the file that its manifest names"):
            local_copy(storage, [file], tmp_path, "k")
        assert not list((tmp_path / "k").iterdir())
    storage.write("a", b"right")
    assert (local_copy(storage, [file], tmp_path, "k") / "a").read_bytes() == b"right"


def test_a_disk_without_room_is_told_before_anything_is_copied(url, tmp_path):
    storage = Counting(url, "")
    files = [ShardFile("huge", "0" * 64, 10**16)]
    with pytest.raises(InputError, match=r"needs 1e\+07 GB and the disk of .* GB free; set feat"):
        local_copy(storage, files, tmp_path, "k")
    assert not storage.opened


def test_a_folder_that_cannot_be_written_is_told(url, tmp_path):
    storage, files = stored(url, a=b"x")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot copy .*set features\.cache"):
        local_copy(storage, files, tmp_path / "cache", "k")


def test_a_storage_that_lacks_a_file_is_told_in_one_sentence(url, tmp_path):
    storage, files = stored(url, a=b"x")
    storage.remove("a")
    with pytest.raises(InputError, match=r"cannot read memory://.*/a"):
        local_copy(storage, files, tmp_path, "k")


COPY = """
import sys
from shine.data.local_copy import local_copy
from shine.data.shards import ShardFile
from shine.storage import Storage
source, target, *files = sys.argv[1:]
files = [ShardFile(n, d, int(b)) for n, d, b in (f.split(":") for f in files)]
local_copy(Storage(source, ""), files, __import__("pathlib").Path(target), "k")
"""


def test_a_copy_killed_at_any_moment_is_never_taken_for_whole_and_is_continued(tmp_path):
    contents = {f"f{i}": os.urandom(2**25) for i in range(4)}
    storage, files = stored(tmp_path / "source", **contents)
    target = tmp_path / "target"
    arguments = [sys.executable, "-c", COPY, str(tmp_path / "source"), str(target)]
    arguments += [f"{file.name}:{file.sha256}:{file.bytes}" for file in files]
    process = subprocess.Popen(arguments)
    while not list(target.glob("k/f1.part")):  # the first file is whole, the second is on its way
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in (target / "k").glob("f?"):
        assert path.read_bytes() == contents[path.name]
    assert not (target / "k" / "f3").exists()
    before = (target / "k" / "f0").stat().st_mtime_ns
    folder = local_copy(storage, files, target, "k")
    assert (folder / "f0").stat().st_mtime_ns == before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_the_cache_is_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "shine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "shine"
