"""Files of a store on this machine: copied once for all processes, and checked once."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from shine.data.shards import ShardFile
from shine.errors import InputError
from shine.storage import Storage

_CHUNK: Final = 2**23  # bytes read at a time
_SPARE: Final = 2**28  # bytes of a disk that a copy leaves free


def default_cache() -> Path:
    """The folder of this user for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shine"


def local_copy(storage: Storage, files: Sequence[ShardFile], cache: Path, key: str) -> Path:
    """A folder of this machine that holds `files` of `storage`, whole and with their checksums.

    Processes that ask at the same time copy once: the others wait for the first. A file has its
    name only when it is whole, so a copy that was killed goes on at the file where it stopped.

    Args:
        storage: elsewhere.
        files: of it.
        cache: the folder that holds such copies.
        key: names the copy; other contents, another key.

    Raises:
        InputError: the storage cannot be read, does not hold what its manifest says, or the disk
            has no room.
    """
    folder = cache / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            missing = [file for file in files if not is_whole(folder / file.name, file)]
            _check_room(storage, missing, folder)
            for file in missing:
                _copy(storage, file, folder)
    except OSError as error:
        raise InputError(
            f"cannot copy {storage.shown} to {folder}: {error.strerror}; set features.cache to a "
            f"folder that can be written and has room"
        ) from None
    return folder


@runtime_checkable
class Verifiable(Protocol):
    """A store whose shards are files of this machine."""

    @property
    def folder(self) -> Path | str:
        """With the shards."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Names the shards."""
        ...

    def verify(self) -> None:
        """Every shard is the one that was written, or `InputError` is raised."""
        ...


def verify_once(store: Verifiable, cache: Path) -> None:
    """As `store.verify`; files that passed before and were not changed since pass at once.

    Args:
        store: with its shards on this machine.
        cache: a folder that remembers.
    """
    stats = [Path(store.folder, shard["name"]).stat() for shard in store.manifest["shards"]]
    seen = [str(Path(store.folder).resolve()), store.manifest]
    seen += [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
    marker = cache / "verified" / hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    if marker.exists():
        return
    store.verify()
    with contextlib.suppress(OSError):  # without a cache, it is checked again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def is_whole(path: Path, file: ShardFile) -> bool:
    """Whether a file is there and as long as it should be."""
    with contextlib.suppress(OSError):
        return path.stat().st_size == file.bytes
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process is inside; the lock of one that dies is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_room(storage: Storage, files: Sequence[ShardFile], folder: Path) -> None:
    wanted = sum(file.bytes for file in files)
    free = shutil.disk_usage(folder).free
    if files and wanted + _SPARE > free:
        raise InputError(
            f"a copy of {storage.shown} needs {_gigabytes(wanted)} and the disk of {folder} has "
            f"{_gigabytes(free)} free; set features.cache to a folder with room, or "
            f"features.feed=streamed"
        )


def _copy(storage: Storage, file: ShardFile, folder: Path) -> None:
    building = folder / f"{file.name}.part"
    digest = hashlib.sha256()
    with storage.open(file.name) as source, building.open("wb") as target:
        for chunk in _chunks(source.read, f"{storage.shown}/{file.name}"):
            digest.update(chunk)
            target.write(chunk)
            if target.tell() > file.bytes:
                break
        target.flush()
        os.fsync(target.fileno())
    if building.stat().st_size != file.bytes or digest.hexdigest() != file.sha256:
        building.unlink()
        raise InputError(
            f"{storage.shown}/{file.name} is not the file that its manifest names; make the store "
            f"again"
        )
    building.replace(folder / file.name)


def _chunks(read: Callable[[int], bytes], where: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = read(_CHUNK)
        except Exception as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise InputError(f"cannot read {where}: {reason}; try again") from None
        if not chunk:
            return
        yield chunk


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
