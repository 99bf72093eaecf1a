"""`shine text`."""

import typer

from pipelines.commands.common import AsJson, ConfigFile, Overrides, show
from pipelines.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="Token vectors of queries.")


@app.command("encode")
def text_encode(
    config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Encode every query and hard negative of a configuration, each distinct text once.

    The same command continues one that was stopped, and encodes new texts alone.

    Example: shine text encode --config configs/charades_cg_shine.yaml text.encoder=hugging_face
    """
    from pipelines.console import tracked
    from pipelines.text import encode

    settings = load_settings(config, overrides)
    with tracked("encoding texts") as tracker:
        found = encode(settings, tracker.update)
    show(
        found,
        as_json,
        f"{found['store']}: {found['texts']} texts, {found['tokens']} tokens of {found['width']} "
        f"columns; {found['encoded']} of {found['needed']} texts of this configuration were new",
        f"{found['truncated']} texts are longer than the encoder reads, {found['cut']} of this "
        f"configuration longer than text.max_tokens={settings.text.max_tokens}",
    )
