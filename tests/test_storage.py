import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from s3_server import serving_s3

from shine.data.shards import map_matrix, write_matrices
from shine.errors import InputError
from shine.storage import Storage, is_url, shown

ADVICE = "set somewhere else"


@pytest.fixture(scope="module")
def bucket():
    with serving_s3() as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request, tmp_path, bucket):
    places = {"local": tmp_path / "new", "memory": f"memory://{tmp_path.name}", "s3": f"{bucket}/a"}
    return Storage(places[request.param], ADVICE)


def test_a_file_is_found_read_copied_and_removed(storage, tmp_path):
    assert storage.names() == []
    assert not storage.exists("sub/one")
    storage.write("sub/one", b"1")
    source = tmp_path / "source"
    source.write_bytes(b"22")
    storage.write("two", source)
    assert storage.names() == ["two"]
    assert storage.names("sub") == ["one"]
    assert storage.sizes() == {"two": 2}
    assert storage.sizes("sub", "o") == {"one": 1}
    assert storage.sizes("sub", "x") == storage.sizes("nothing") == {}
    assert storage.read("sub/one") == b"1"
    assert storage.size("two") == 2
    with storage.open("two") as file:
        file.seek(1)
        assert file.read() == b"2"
    storage.fetch("two", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"22"
    storage.write("two", b"3")
    assert storage.read("two") == b"3"
    storage.remove("two")
    storage.remove("two")
    assert not storage.exists("two")


def test_matrices_come_back_as_they_were(storage, tmp_path):
    parts = [np.arange(6, dtype=np.float16).reshape(3, 2), np.ones((1, 2), np.float16)]
    shard = write_matrices(storage, "shard-00000", parts)
    assert shard.name.startswith(f"shard-00000-{shard.sha256[:12]}")
    assert storage.size(shard.name) == shard.bytes
    storage.fetch(shard.name, tmp_path / "shard")
    rows = map_matrix(tmp_path / "shard")
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(rows, np.concatenate(parts))


def test_a_missing_file_is_one_sentence(storage):
    with pytest.raises(InputError, match=rf"cannot read .*/gone: .*; {ADVICE}"):
        storage.read("gone")


def test_no_password_is_shown():
    with pytest.raises(InputError) as error:
        Storage("nosuch://user:hidden@host/folder", ADVICE).read("x")
    assert "hidden" not in str(error.value)


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(403)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format, *args):
        pass


def test_no_signature_is_shown():
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/raw.h5"
        storage = Storage(f"{url}?X-Amz-Credential=hidden&X-Amz-Signature=hidden", ADVICE)
        with pytest.raises(InputError, match=rf"cannot read {url}: .*403.*url=.*{url}") as error:
            storage.read("")
        server.shutdown()
    assert "hidden" not in str(error.value)
    assert storage.shown == url


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/data/what?/a=b", "/data/what?/a=b"),
        ("https://host/a.h5?sig=hidden", "https://host/a.h5"),
        ("https://host/a.h5?hidden", "https://host/a.h5"),
        ("https://user:hidden@host/a?b=hidden", "https://...@host/a"),
        ("zip://a.npy::https://host/b.zip?sig=hidden", "zip://a.npy::https://host/b.zip"),
        ("a::https://host/b?sig=hidden::file://c", "a::https://host/b::file://c"),
        ("memory://what?/a", "memory://what"),
    ],
)
def test_places_are_shown_without_secrets(place, expected):
    assert shown(place) == expected


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("no 'https://host/a?sig=hidden' there?", "no 'https://host/a' there?"),
        ("GET /a.h5?X-Amz-Signature=hidden failed", "GET /a.h5 failed"),
        ("which one? none", "which one? none"),
        ("cannot reach //user:hidden@host", "cannot reach //...@host"),
    ],
)
def test_reasons_are_told_without_secrets(monkeypatch, reason, expected):
    storage = Storage("memory://reasons", ADVICE)

    def fails(*_, **__):
        raise OSError(reason)

    monkeypatch.setattr(storage._fs, "cat_file", fails)
    with pytest.raises(InputError) as error:
        storage.read("x")
    told = f"cannot read memory://reasons/x: OSError: {expected}; {ADVICE}"
    assert str(error.value) == told


def test_a_local_file_is_whole_or_as_before(tmp_path):
    storage = Storage(tmp_path, ADVICE)
    storage.write("one", b"before")
    with pytest.raises(InputError):
        storage.write("one", tmp_path / "no such source")
    assert storage.names() == ["one"]
    assert storage.read("one") == b"before"


def test_links_to_files_are_files(tmp_path):
    (tmp_path / "elsewhere.mp4").write_bytes(b"four")
    (tmp_path / "videos" / "folder").mkdir(parents=True)
    (tmp_path / "videos" / "a.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    (tmp_path / "videos" / "b.mp4").write_bytes(b"1")
    (tmp_path / "videos" / "gone.mp4").symlink_to(tmp_path / "nothing")
    (tmp_path / "videos" / "to_folder").symlink_to(tmp_path / "videos" / "folder")
    storage = Storage(tmp_path / "videos", ADVICE)
    assert storage.sizes() == {"a.mp4": 4, "b.mp4": 1}
    assert storage.names() == ["a.mp4", "b.mp4"]
    assert storage.names("b.mp4") == []


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/a")
    assert is_url("memory://a")
    assert not is_url("/data/a")
    assert not is_url("a/b")


def test_a_cut_shard_is_told(tmp_path):
    shard = write_matrices(Storage(tmp_path, ADVICE), "s", [np.ones((4, 3), np.float32)])
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole shard"):
        map_matrix(path)
