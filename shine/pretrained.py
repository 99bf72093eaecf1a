"""Checkpoints of transformers: their errors in one sentence, and what they are by their content."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError  # what torch raises; nothing is unpickled here
from typing import Final

from safetensors import SafetensorError

from shine.errors import InputError
from shine.files import sha256

_WEIGHTS: Final = (".safetensors", ".bin", ".index.json")
_SETTINGS: Final = ("config.json", "preprocessor_config.json", "processor_config.json")
_MAX_REASON: Final = 300  # characters


@contextlib.contextmanager
def told(where: str, fault: str, advice: str) -> Iterator[None]:
    """Whatever libraries raise at the files of a checkpoint is an `InputError` of one sentence.

    Args:
        where: the checkpoint, and where it was named.
        fault: what cannot be done.
        advice: what to do.
    """
    try:
        yield
    except InputError:
        raise
    except (UnpicklingError, SafetensorError):
        # The message of torch may advise to execute the file.
        raise InputError(
            f"{where}: its weights are damaged or no plain numbers; get the checkpoint again"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:_MAX_REASON].rstrip(". ") or type(error).__name__
        raise InputError(f"{where}: {fault}: {reason}; {advice}") from None


def folder_digest(folder: Path) -> str:
    """SHA-256 of what a model in a folder computes with: its weights and settings, not its words.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if path.name.endswith(_WEIGHTS) or path.name in _SETTINGS:
                digest.update(f"{path.name} {sha256(path)}\n".encode())
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read as a model: {error.strerror}; make it readable"
        ) from None
    return digest.hexdigest()
