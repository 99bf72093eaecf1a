"""Whole files: written at once or not at all, and known by their checksum."""

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """`path` holds `content`, text as UTF-8; a process stopped at any time leaves what was there.

    The folder must exist. The content is written beside `path` and renamed over it.
    """
    data = content.encode() if isinstance(content, str) else content
    building = path.with_name(path.name + ".part")
    try:
        building.write_bytes(data)
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of the bytes of `path`, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
