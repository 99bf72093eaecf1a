import hashlib
import os

import pytest

from shine.files import sha256, write_whole


def test_a_file_holds_the_last_content_and_has_no_sibling(tmp_path):
    path = tmp_path / "a.json"
    for content in ("first, and longer\n", "zwölf\n", b"\x00\xff"):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_stopped_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_checksum_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a.bin"
    content = bytes(range(256)) * 5000
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()
