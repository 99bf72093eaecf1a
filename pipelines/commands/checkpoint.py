"""`shine checkpoint`."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import AsJson, ConfigFile, OutFolder, Overrides, show
from pipelines.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="Checkpoints of the published programs.")


@app.command("import")
def checkpoint_import(
    file: Annotated[Path, typer.Argument(help="Published checkpoint, .ckpt.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    out: OutFolder = Path("runs/published"),
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint of Moment-DETR, QD-DETR or SHINE into a run; nothing in it is executed.

    The checkpoint gives model, loss and training; --config and overrides say where the data are.

    Example: shine checkpoint import model_best.ckpt --out runs/published data.root=data/qvh
    """
    from shine.published.checkpoint import import_checkpoint

    report = import_checkpoint(
        file, out, lambda translated: load_settings(config, [*translated, *(overrides or ())])
    )
    unused = report["unused"]
    show(
        report,
        as_json,
        f"{out}: {report['backbone']} of epoch {report['epoch']}, "
        f"{report['num_entries'] - len(unused)} entries fit",
        f"kept aside, without a counterpart: {', '.join(unused) or 'none'}",
        *report["notes"],
        f"Next: set data, features and text in {out / 'config.yaml'}, then shine evaluate {out}",
    )


@app.command("export")
def checkpoint_export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of one of its checkpoints.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("model_best.ckpt"),
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in the layout of the published programs.

    Example: shine checkpoint export runs/shine --out shine.ckpt
    """
    from shine.published.checkpoint import export_checkpoint

    written = export_checkpoint(run, out)
    show(
        written,
        as_json,
        f"{out}: {written['num_entries']} entries of {written['checkpoint']}",
        *written["notes"],
    )
