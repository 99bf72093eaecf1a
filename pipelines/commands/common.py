"""What the commands share: options with one meaning everywhere, and how a result is shown."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Run configuration, YAML: a file, or the name of one that ships."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
]
WorldOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write.")]


def show(result: Any, as_json: bool, *lines: Any) -> None:
    """What a command was asked for stands on the screen: `result` as JSON, or `lines`."""
    from pipelines.console import results

    if as_json:
        print(json.dumps(result))  # noqa: T201
    else:
        for line in lines:
            results.print(line, highlight=False, soft_wrap=isinstance(line, str))
