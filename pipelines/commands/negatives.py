"""`shine negatives`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import AsJson, ConfigFile, Overrides, show
from pipelines.settings import load_settings
from shine.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Hard negative queries.")


@app.command("generate")
def negatives_generate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Ask through the provider's Batch API (generator llm).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make hard negatives of the training queries with the configured generator.

    The same command continues a run that was stopped; no answer is paid for twice.

    Example: shine negatives generate --config configs/world_shine.yaml negatives.seed=1
    """
    from pipelines.console import tracked
    from pipelines.negatives import generate

    settings = load_settings(config, overrides)
    if settings.data.negatives is None:
        raise InputError("set data.negatives to the file that the negatives go to")
    out = settings.path(settings.data.negatives)
    with tracked("hard negatives") as tracker:
        summary = generate(
            settings,
            source=settings.path(settings.data.train),
            out=out,
            batch=batch,
            on_progress=tracker.update,
        )
    show(summary, as_json, f"{out}: {json.dumps(summary)}")


@app.command("estimate")
def negatives_estimate(
    config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Tell what asking a language model will take, before anything is asked.

    Example: shine negatives estimate --config my.yaml negatives.generator=llm \
negatives.llm.model=gpt-4o-mini negatives.llm.prompt_price=0.15 negatives.llm.completion_price=0.6
    """
    from pipelines.console import tracked
    from pipelines.negatives import estimate

    settings = load_settings(config, overrides)
    with tracked("hard negatives") as tracker:
        found = estimate(
            settings, source=settings.path(settings.data.train), on_progress=tracker.update
        )
    money = "" if found["dollars"] is None else f", about ${found['dollars']:.2f}"
    time = "" if found["minutes"] is None else f", at least {found['minutes']:.0f} minutes"
    show(
        found,
        as_json,
        f"{found['rows']} queries need {found['requests']} requests ({found['answered']} more are "
        f"answered already): about {found['prompt_tokens']} tokens in and "
        f"{found['completion_tokens']} out{money}{time}; a refused answer is asked for once more",
    )


@app.command("audit")
def negatives_audit(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Negatives, JSON Lines or Parquet.")
    ],
    train: Annotated[
        list[Path] | None,
        typer.Option(help="Training captions; without any, each file's own queries."),
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(help="Test queries, to see what the negatives show of them."),
    ] = None,
    tagger: Annotated[str, typer.Option(help="Pipeline that reads verbs and nouns.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for a page and JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count what is wrong with hard negatives, ours or anyone's; several files side by side.

    Example: shine negatives audit negatives.parquet --train train.jsonl --test novel_word.jsonl
    """
    from pipelines.console import audit_lines, tracked
    from shine.audit_page import write_audit
    from shine.language.audit import Models, audit
    from shine.language.tagging import load_tagger

    pairs = load_tagger(tagger) if test else None
    models, audits = Models(), []
    with tracked("audit") as tracker:
        for number, file in enumerate(files):
            audits.append(
                audit(
                    file,
                    train=train or (),
                    tests=test or (),
                    tagger=pairs,
                    models=models,
                    on_progress=lambda note, number=number, file=file: tracker.update(
                        number, len(files), f"{file.name}: {note}"
                    ),
                )
            )
        tracker.update(len(files), len(files))
    page = "" if out is None else f"Open {write_audit(audits, out)} in a browser."
    show({"audits": audits}, as_json, *audit_lines(audits), page)


@app.command("show")
def negativesshow(
    file: Annotated[Path, typer.Argument(help="Negatives, JSON Lines or Parquet.")],
    qid: Annotated[str, typer.Argument(help="Id of the query.")],
    as_json: AsJson = False,
) -> None:
    """Print a query with its levels: what was masked, what stands there, and the verdicts.

    Example: shine negatives show negatives.parquet IGDIE_train_0
    """
    from dataclasses import asdict

    from pipelines.console import negative_lines
    from shine.language.audit import DEFECTS, find_row, row_defects

    row = find_row(file, qid)
    wrong = [[d.text for d in DEFECTS if d.key in keys] for keys in row_defects(row)]
    show({**asdict(row), "wrong": wrong}, as_json, *negative_lines(row, wrong))
