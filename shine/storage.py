"""Folders at any fsspec URL: files that are whole or absent, errors in one sentence."""

import contextlib
import hashlib
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from shine.errors import InputError

_TRIES: Final = 5  # at a write to a remote storage
_PIECE: Final = 2**23  # bytes of a file read at a time
_TOGETHER: Final = 256  # small files asked for, or removed, at once


class AbsentError(InputError):
    """There is no such file."""


def is_url(name: str) -> bool:
    """Whether `name` is a URL and not a path."""
    return "://" in name or "::" in name


def shown(place: str | Path) -> str:
    """A path or URL as it is told: without a password and without parameters, such as a signature.

    Paths stay as they are.
    """
    return _without_secrets(str(place)) if is_url(str(place)) else str(place)


class Storage:
    """A folder on this machine or at a fsspec URL, which exists after the first write.

    Names of files are relative to it. Every error of a storage, of whatever library, is an
    `InputError` of one sentence without a secret.

    Args:
        url: a path or any fsspec URL.
        advice: ends the sentence of an error: what to do, such as "set features.store to ...".
        sleep: waits between the tries at a write to a remote storage.
    """

    def __init__(
        self, url: str | Path, advice: str, *, sleep: Callable[[float], None] = time.sleep
    ):
        self.shown = shown(url)
        self._advice = advice
        self._sleep = sleep
        with self._telling("open", ""):
            self._fs, self._root = fsspec.core.url_to_fs(str(url))
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def local(self, name: str = "") -> Path | None:
        """Where a file, or the folder, lies on this machine; None elsewhere."""
        return Path(self._root) / name if self.is_local else None

    def names(self, folder: str = "", prefix: str = "") -> list[str]:
        """The files in a folder, sorted, relative to it; none where there is no folder.

        Args:
            folder: relative to the storage.
            prefix: how the names begin; a remote storage lists no others.
        """
        return sorted(self.sizes(folder, prefix))

    def sizes(self, folder: str = "", prefix: str = "") -> dict[str, int | None]:
        """The bytes of each file that `names` lists; None where the storage does not tell."""
        place = self._at(folder)
        absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with self._telling("list", folder), absent:
            found = self._local_sizes(place) if self.is_local else self._remote_sizes(place, prefix)
            return {name: size for name, size in found.items() if name.startswith(prefix)}
        return {}

    def _local_sizes(self, place: str) -> dict[str, int | None]:
        sizes: dict[str, int | None] = {}
        for path in map(Path, self._fs.ls(place, detail=False) if os.path.isdir(place) else ()):
            # Another process may have removed it; or it is a link to nothing.
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if stat.S_ISREG(found.st_mode):
                    sizes[path.name] = found.st_size
        return sizes

    def _remote_sizes(self, place: str, prefix: str) -> dict[str, int | None]:
        self._fs.invalidate_cache()
        if prefix:
            entries = self._fs.find(place, maxdepth=1, prefix=prefix, detail=True).values()
        else:
            entries = self._fs.ls(place, detail=True)
        files = [entry for entry in entries if entry["type"] == "file"]
        return {PurePosixPath(file["name"]).name: file.get("size") for file in files}

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        with self._telling("look for", name):
            return self._fs.isfile(self._at(name))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._telling("read", name):
            return int(self._fs.size(self._at(name)) or 0)

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with self._telling("read", name):
            return self._fs.cat_file(self._at(name))

    def read_each(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Small files with their contents, in order; a remote storage is asked for many at once."""
        for start in range(0, len(names), _TOGETHER):
            places = {name: self._at(name) for name in names[start : start + _TOGETHER]}
            with self._telling("read", names[start]):
                if self._fs.async_impl:
                    found = self._fs.cat([*places.values()])
                else:
                    found = {place: self._fs.cat_file(place) for place in places.values()}
            yield from ((name, found[place]) for name, place in places.items())

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of files from a place up to another one, in order, all asked for at once."""
        if not ranges:
            return []
        names, starts, stops = zip(*ranges, strict=True)
        with self._telling("read", names[0]):
            places = [self._at(name) for name in names]
            found = self._fs.cat_ranges(places, [*starts], [*stops], on_error="raise")
            for content in found:
                if isinstance(content, Exception):  # asynchronous storages return them
                    raise content
            return [bytes(content) for content in found]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file to be read from any place; errors of reading are the caller's to tell."""
        with self._telling("read", name):
            file = self._fs.open(self._at(name), "rb")
        with file:
            yield file

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file, in hexadecimal, read piece by piece."""
        digest = hashlib.sha256()
        with self._telling("read", name), self._fs.open(self._at(name), "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()

    def fetch(self, name: str, path: Path) -> None:
        """`path` is a copy of a file."""
        with self._telling("read", name):
            self._fs.get_file(self._at(name), str(path))

    def write(self, name: str, content: bytes | Path) -> None:
        """A file holds `content`, bytes or those of a file here, and is durable; or it is absent.

        A remote storage is tried again a few times.
        """
        tries = 1 if isinstance(self._fs, LocalFileSystem | MemoryFileSystem) else _TRIES
        with self._telling("write", name):
            for attempt in range(tries):
                try:
                    return self._write(self._at(name), content)
                except (FileNotFoundError, PermissionError):
                    raise
                except Exception:
                    if attempt + 1 == tries:
                        raise
                    self._sleep(0.5 * 2**attempt)
        return None

    def remove(self, *names: str) -> None:
        """There are no such files."""
        step = _TOGETHER if self._fs.async_impl else 1
        for start in range(0, len(names), step):
            places = [self._at(name) for name in names[start : start + step]]
            # Another process may have removed them.
            with self._telling("remove", names[start]), contextlib.suppress(FileNotFoundError):
                if len(places) == 1:
                    self._fs.rm_file(places[0])
                else:
                    self._fs.rm(places)

    def _write(self, place: str, content: bytes | Path) -> None:
        self._fs.makedirs(place.rsplit("/", 1)[0], exist_ok=True)
        building = f"{place}.{uuid.uuid4().hex}.part" if self.is_local else place
        try:
            if isinstance(content, bytes):
                self._fs.pipe_file(building, content)
            else:
                self._fs.put_file(str(content), building)
            if self.is_local:
                _sync(building)
                os.replace(building, place)
                _sync(place.rsplit("/", 1)[0])
        except BaseException:
            if self.is_local:
                Path(building).unlink(missing_ok=True)
            raise

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    @contextlib.contextmanager
    def _telling(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except (InputError, AssertionError):
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            reason = _without_secrets(" ".join(str(reason).split()))[:300]
            place = f"{self.shown.rstrip('/')}/{name}" if name else self.shown
            kind = AbsentError if isinstance(error, FileNotFoundError) else InputError
            raise kind(f"cannot {verb} {place}: {reason}; {self._advice}") from None


def _without_secrets(text: str) -> str:
    """A text without the passwords and the parameters of the URLs in it."""
    text = re.sub(r"//[^/\s]*@", "//...@", text)
    return re.sub(r"(://[^\s?'\"]*)?\?(?(1)|(?=[\w.~%-]+=))((?!::)[^\s'\"])*", r"\1", text)


def _sync(name: str) -> None:
    """A file or folder is on the disk."""
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
