"""Raw features as they are found: one source per extractor, each video read alone.

A source is a folder of one file per video, an hdf5 file or an lmdb of many, on this machine or at
a fsspec URL. hdf5 and lmdb elsewhere are copied once to each machine that reads them.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import IO, Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from shine.config import Config, FeaturesConfig, SourceConfig
from shine.data.arrays import MAX_BYTES, read_matrix
from shine.errors import InputError
from shine.storage import Storage, is_url

ENDINGS: Final = ("npy", "npz", "pt", "pth", "safetensors")
ABSENT: Final = "absent"  # the version of a video that a source does not hold
_HDF5: Final = b"\x89HDF\r\n\x1a\n"
_LMDB: Final = bytes.fromhex("dec0efbe")  # at byte 16
_LMDB_FILE: Final = "data.mdb"
Clips = Float[np.ndarray, "clip feature"]


class VideoRefused(InputError):  # noqa: N818
    """The features of one video cannot be used; those of others may."""


@runtime_checkable
class RawSource(Protocol):
    """Raw features by one extractor."""

    config: SourceConfig

    def read(self, vid: str, width: int | None = None) -> Clips:
        """The clips of one video, as they are stored, of `width` columns where that is known.

        Raises:
            VideoRefused: there are none, or they are not finite numbers of this shape.
            InputError: the storage failed.
        """
        ...

    def holds(self, vid: str) -> bool | None:
        """Whether there is an array of a video, which may still be refused when it is read.

        None: a file of many videos elsewhere, which would have to be copied to know.

        Raises:
            InputError: the storage failed, or a file of many videos cannot be opened.
        """
        ...

    def version(self, vid: str) -> str:
        """What changes when the file changes in which the video is, or comes or goes.

        Raises:
            InputError: the storage failed.
        """
        ...


def located(config: Config) -> FeaturesConfig:
    """The section of features with its sources and its store found from any working directory."""
    section = config.features

    def place(name: str) -> str:
        return name if is_url(name) else str(config.path(name).resolve())

    def moved(source: SourceConfig) -> SourceConfig:
        return source.model_copy(update={"path": place(source.path)})

    return section.model_copy(
        update={
            "sources": tuple(moved(source) for source in section.sources),
            "audio": section.audio and moved(section.audio),
            "store": place(section.store),
        }
    )


def open_source(config: SourceConfig) -> RawSource:
    """The source that `config` names, ready to be read; what it is is told by its content.

    Raises:
        InputError: there is none.
    """
    storage = SourceStorage(config.path, "correct features.sources")
    if storage.exists(""):
        with storage.open("") as file:
            head = file.read(32)
        if head.startswith(_HDF5):
            return _Container(config, storage, "", _open_hdf5)
        if head[16:20] == _LMDB:
            return _Container(config, storage, "", _open_lmdb)
    elif storage.exists(_LMDB_FILE):
        return _Container(config, storage, _LMDB_FILE, _open_lmdb)
    elif storage.is_folder():
        return _Folder(config, storage)
    raise InputError(
        f"no features in {storage.shown}: expected a folder of one file per video (npy, npz, pt or "
        f"safetensors), an hdf5 file or an lmdb; correct features.sources"
    )


class SourceStorage(Storage):
    """Where raw features are."""

    def is_folder(self) -> bool:
        """Whether there is such a folder."""
        with self._telling("look for", ""):
            return self._fs.isdir(self._root)

    def version(self, name: str) -> str:
        """What changes when a file changes."""
        if (path := self.local(name)) is not None:
            try:
                stat = path.stat()
            except OSError:
                return ABSENT
            return f"{stat.st_size}-{stat.st_mtime_ns}"
        with self._telling("look for", name):
            return str(self._fs.ukey(self._at(name)))


class _Folder:
    """A folder of one file per video."""

    def __init__(self, config: SourceConfig, storage: SourceStorage):
        self.config = config
        self._storage = storage

    def read(self, vid: str, width: int | None = None) -> Clips:
        """See `RawSource`."""
        _check_vid(vid)
        name = self._find(vid)
        if name is None:
            names = " or ".join(self._names(vid))
            raise VideoRefused(
                f"no features of video {vid!a}: expected {names} in {self._storage.shown}"
            )
        where = f"{self._storage.shown.rstrip('/')}/{name}"
        with contextlib.ExitStack() as stack:
            path = self._storage.local(name)
            if path is None:
                if self._storage.size(name) > MAX_BYTES:
                    raise VideoRefused(f"{where}: a file of more than {MAX_BYTES >> 20} MiB")
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / Path(name).name
                self._storage.fetch(name, path)
            try:
                clips = read_matrix(path, self.config.key, "clip, feature")
            except InputError as error:
                raise VideoRefused(str(error).replace(str(path), where)) from None
        return _of_width(clips, width, where)

    def holds(self, vid: str) -> bool:
        """See `RawSource`."""
        return not _is_unsafe(vid) and self._find(vid) is not None

    def version(self, vid: str) -> str:
        """See `RawSource`."""
        name = None if _is_unsafe(vid) else self._find(vid)
        return ABSENT if name is None else f"{name} {self._storage.version(name)}"

    def _names(self, vid: str) -> list[str]:
        if self.config.file is not None:
            return [self.config.file.replace("{vid}", vid)]
        return [f"{vid}.{ending}" for ending in ENDINGS]

    def _find(self, vid: str) -> str | None:
        names = self._names(vid)
        if self._storage.is_local:
            paths = ((name, self._storage.local(name)) for name in names)
            return next((name for name, path in paths if path is not None and path.is_file()), None)
        if any("/" in name for name in names):
            return next((name for name in names if self._storage.exists(name)), None)
        return next((name for name in names if name in self._listed), None)

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(self._storage.names())


@runtime_checkable
class _Opened(Protocol):
    """A file of many videos, opened by this process."""

    def read(self, name: str) -> Clips | None:
        """The array under `name`; None where there is none."""
        ...

    def holds(self, name: str) -> bool:
        """Whether there is an array under `name`."""
        ...


class _Container:
    """A file of many videos, which each process opens when it first reads."""

    def __init__(
        self,
        config: SourceConfig,
        storage: SourceStorage,
        name: str,
        opener: Callable[[Path, str, str], _Opened],
    ):
        self.config = config
        self._storage = storage
        self._name = name
        self._opener = opener

    def read(self, vid: str, width: int | None = None) -> Clips:
        """See `RawSource`."""
        _check_vid(vid)
        opened = self._opened
        name = self._named(vid)
        try:
            clips = opened.read(name)
        except InputError as error:
            raise VideoRefused(str(error)) from None
        where = f"{self._storage.shown}, {name!a}"
        if clips is None:
            raise VideoRefused(f"no features of video {vid!a}: expected {where}")
        return _of_width(clips, width, where)

    def holds(self, vid: str) -> bool | None:
        """See `RawSource`."""
        if self._storage.local(self._name) is None:
            return None
        return not _is_unsafe(vid) and self._opened.holds(self._named(vid))

    def version(self, vid: str) -> str:
        """See `RawSource`."""
        return self._version

    def _named(self, vid: str) -> str:
        return (self.config.file or "{vid}").replace("{vid}", vid)

    @cached_property
    def _version(self) -> str:
        return self._storage.version(self._name)

    @cached_property
    def _opened(self) -> _Opened:
        path = self._storage.local(self._name)
        if path is None:
            path, lock = copy_of_node(self._storage, self._name)
            weakref.finalize(self, lock.close)
        return self._opener(path, self._storage.shown, self.config.key)


def _open_hdf5(path: Path, where: str, key: str) -> _Opened:
    from shine.data.containers import Hdf5  # the library is for such sources alone

    return Hdf5(path, where, key)


def _open_lmdb(path: Path, where: str, key: str) -> _Opened:
    from shine.data.containers import Lmdb

    return Lmdb(path, where, key)


def _is_unsafe(vid: str) -> bool:
    return vid in ("", ".", "..") or any(c in vid for c in "/\\\0")


def _check_vid(vid: str) -> None:
    """The name of a video leads to no other place than its own.

    Raises:
        VideoRefused: it may.
    """
    if _is_unsafe(vid):
        raise VideoRefused(
            f"the name of video {vid!a} could lead to another place; names have no slashes and are "
            f"not empty"
        )


def _of_width(clips: Clips, width: int | None, where: str) -> Clips:
    if width is not None and clips.shape[1] != width:
        raise VideoRefused(
            f"{where}: expected {width} columns, got {clips.shape[1]}; check features.width and "
            f"that every file comes from the same extractor"
        )
    return clips


def copy_of_node(storage: SourceStorage, name: str) -> tuple[Path, IO[bytes]]:
    """A copy of a file elsewhere that all processes of this machine and user share.

    Returns:
        Where it is, and the open file that keeps it there while it is in use.

    Raises:
        InputError: the storage failed, or the temporary folder belongs to somebody else.
    """
    key = hashlib.sha256(f"{storage.shown}\n{name}\n{storage.version(name)}".encode()).hexdigest()
    folder = _copies()
    lock = (folder / f"{key}.lock").open("wb")
    copy = folder / key
    while True:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if copy.exists():
            return copy, lock
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait here for the first
        if not copy.exists():
            remove_copies()
            building = folder / f"{key}.part"
            storage.fetch(name, building)
            building.replace(copy)


def remove_copies() -> None:
    """No copy that `copy_of_node` made is on this machine, but for those in use."""
    for path in _copies().glob("*.lock"):
        with path.open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            for ending in ("", ".part"):
                path.with_suffix(ending).unlink(missing_ok=True)


def _copies() -> Path:
    folder = Path(tempfile.gettempdir()) / f"shine-features-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise InputError(f"{folder} belongs to somebody else; set TMPDIR to another folder")
    return folder
