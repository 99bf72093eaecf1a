"""`shine features`."""

import typer

from pipelines.commands.common import AsJson, ConfigFile, Overrides, show
from pipelines.settings import load_settings
from shine.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Clip features.")


@app.command("pack")
def features_pack(
    config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Pack one feature file per video into the store that training reads.

    Example: shine features pack --config configs/world.yaml
    """
    from pipelines.console import tracked
    from pipelines.features import pack

    settings = load_settings(config, overrides)
    with tracked("packing features") as tracker:
        manifest = pack(settings, tracker.update)
    refused = manifest["refused"]
    show(
        manifest,
        as_json,
        f"{settings.path(settings.features.store)}: {manifest['num_videos']} videos, "
        f"{manifest['num_clips']} clips of {manifest['width']} columns",
    )
    if refused:
        raise InputError(
            f"{len(refused)} videos were left out of the store, the first because: "
            f"{refused[0]['reason']}"
        )
