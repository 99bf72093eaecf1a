"""`shine world`."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import AsJson, OutFolder, WorldOverrides, show
from shine.config import load_section
from shine.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Simulated data with known truth.")


@app.command("make")
def world_make(
    overrides: WorldOverrides = None,
    out: OutFolder = Path("runs/world"),
    as_json: AsJson = False,
) -> None:
    """Plant a world: videos, queries and splits whose truth is known.

    Example: shine world make --out runs/world seed=1
    """
    from shine.data.planted import WorldConfig, make_world

    manifest = make_world(load_section(WorldConfig, overrides or ()), out)
    rows = ", ".join(f"{name} {count}" for name, count in manifest["rows"].items())
    show(manifest, as_json, f"{out}: {manifest['simulated']}; rows: {rows}")


@app.command("dress")
def world_dress(
    arguments: Annotated[list[str], typer.Argument(metavar="FILE... [KEY=VALUE]...")],
    out: OutFolder = Path("runs/dressed"),
    as_json: AsJson = False,
) -> None:
    """Give the videos of real annotation files simulated features that fit their captions.

    Example: shine world dress train.jsonl test.jsonl --out runs/dressed seed=1
    """
    from shine.data.dress import DressConfig, dress

    files = [Path(argument) for argument in arguments if "=" not in argument]
    if not files:
        raise InputError("name at least one annotation file to dress")
    settings = load_section(DressConfig, [a for a in arguments if "=" in a])
    manifest = dress(files, out, settings)
    show(manifest, as_json, f"{out}: {manifest['simulated']}")
