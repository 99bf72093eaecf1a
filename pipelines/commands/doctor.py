"""`shine doctor`."""

from dataclasses import asdict

import typer

from pipelines.commands.common import AsJson, ConfigFile, Overrides, show
from pipelines.settings import load_settings


def doctor(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what of a configuration's needs is present, missing or mismatched, and where to get it.

    Starts nothing. Exits with 2 where training could not start.

    Example: shine doctor --config configs/charades_cg_shine.yaml data.root=/data/charades_cg
    """
    from pipelines.data_tables import doctor_lines
    from shine.doctor import could_train, examine

    findings = examine(load_settings(config, overrides))
    ready = could_train(findings)
    told = [asdict(finding) for finding in findings]
    show({"ready": ready, "findings": told}, as_json, *doctor_lines(told, ready))
    if not ready:
        raise typer.Exit(2)
