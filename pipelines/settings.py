"""Configurations by name: a file of the user's, or one that ships."""

from collections.abc import Sequence
from pathlib import Path

from shine.config import Config, load_config


def load_settings(file: Path | None, overrides: Sequence[str] | None = None) -> Config:
    """The configuration that a command was given.

    A bare name such as `world.yaml` that is no file here means the one that ships.

    Raises:
        InputError: the file cannot be read, or a key or a value is wrong.
    """
    if file is not None and file.name == str(file) and not file.exists():
        shipped = config_folder() / file
        file = shipped if shipped.exists() else file
    return load_config(file, overrides or ())


def config_folder() -> Path:
    """Where `configs/` is: beside the packages in a source tree, inside this one installed."""
    here = Path(__file__).parent
    return installed if (installed := here / "configs").is_dir() else here.parent / "configs"
