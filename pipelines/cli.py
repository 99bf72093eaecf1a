"""The `shine` command."""

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from pipelines.commands import checkpoint, data, doctor, features, negatives, runs, text, world
from shine.errors import InputError, Stopped

app = typer.Typer(
    name="shine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Find moments in video by sentences never heard before.

[bold]Try it[/bold] (five minutes, two cores, no GPU, no network):

    shine quickstart

[bold]The same, step by step[/bold]:

    shine world make --out runs/world
    shine features pack --config configs/world_shine.yaml
    shine negatives generate --config configs/world_shine.yaml
    shine train --config configs/world_shine.yaml --out runs/shine train.epochs=3
    shine evaluate runs/shine

Settings live in the file that --config names; any of them can be overridden with section.key=value.
""",
)
for command in (
    runs.quickstart,
    runs.train,
    runs.evaluate,
    runs.runs,
    runs.report,
    runs.ablate,
    runs.predict,
):
    app.command()(command)
app.command()(doctor.doctor)
for name, group in {
    "data": data,
    "features": features,
    "text": text,
    "negatives": negatives,
    "world": world,
    "checkpoint": checkpoint,
}.items():
    app.add_typer(group.app, name=name)


_INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Runs the command line; exits with 0 done, 1 failed, 2 wrong input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("shine", "pipelines", "cluster"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        app()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _stop("stopped; run the same command again to continue", _INTERRUPTED)
        raise
    except InputError as error:
        _stop(str(error), 2)
    except Stopped as error:
        _stop(str(error), 1)
    except Exception as error:
        if os.environ.get("SHINE_DEBUG"):
            raise
        _stop(f"{type(error).__name__}: {error} (SHINE_DEBUG=1 shows where)", 1)


def _stop(sentence: str, status: int) -> NoReturn:
    from pipelines.console import console

    console.print(
        f"shine: {sentence}", style="bold red", markup=False, highlight=False, soft_wrap=True
    )
    sys.exit(status)


def _version(asked: bool) -> None:
    if asked:
        print(f"shine {version('shine-grounding')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
