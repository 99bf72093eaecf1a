"""`shine features`."""

import typer

from pipelines.commands.common import AsJson, ConfigFile, Overrides, show
from pipelines.settings import load_settings
from shine.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Clip features.")
_SHOWN = 10  # videos that were left out; --json has all


@app.command("pack")
def features_pack(
    config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Pack the features of every video into the store that training reads; stopped, it goes on.

    Example: shine features pack --config configs/world.yaml
    """
    from pipelines.console import tracked
    from pipelines.features import pack
    from shine.data.sources import located

    settings = load_settings(config, overrides)
    with tracked("packing features") as tracker:
        manifest = pack(settings, tracker.update)
    refused = manifest["refused"]
    show(
        manifest,
        as_json,
        f"{located(settings).store}: {manifest['num_videos']} videos, "
        f"{manifest['num_clips']} clips of {manifest['width']} columns",
        *(f"left out: {refusal['reason']}" for refusal in refused[:_SHOWN]),
        *([f"and {len(refused) - _SHOWN} more, which --json names"] * (len(refused) > _SHOWN)),
    )
    if refused:
        raise InputError(
            f"{len(refused)} videos were left out of the store, the first because: "
            f"{refused[0]['reason']}"
        )


@app.command("extract")
def features_extract(
    config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Make clip features of videos with a vision model; the same command continues.

    Example: shine features extract --config configs/own_videos.yaml
    """
    from pipelines.console import tracked
    from pipelines.extract import LINES, extract

    settings = load_settings(config, overrides)
    with tracked("extracting features") as tracker:
        result = extract(settings, tracker.update)
    show(
        result,
        as_json,
        f"{result['out']}: {result['num_videos']} videos ({result['num_read']} read now), "
        f"{result['num_clips']} clips of {result['width']} columns; {LINES} has their durations",
        *(f"{video['vid']}: {video['reason']}" for video in result["damaged"]),
    )
    if refused := result["refused"]:
        raise InputError(
            f"{len(refused)} videos were left out, the first because: {refused[0]['reason']}"
        )
