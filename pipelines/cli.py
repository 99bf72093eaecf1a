"""The `shine` command."""

import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipelines.settings import load_settings
from shine.config import load_section
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
world = typer.Typer(no_args_is_help=True, help="Simulated data with known truth.")
negatives = typer.Typer(no_args_is_help=True, help="Hard negative queries.")
features = typer.Typer(no_args_is_help=True, help="Clip features.")
data = typer.Typer(no_args_is_help=True, help="Annotation files.")
checkpoint = typer.Typer(no_args_is_help=True, help="Checkpoints of the published programs.")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(data, name="data")
app.add_typer(world, name="world")
app.add_typer(negatives, name="negatives")
app.add_typer(features, name="features")

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


def _show(result: Any, as_json: bool, *lines: Any) -> None:
    from pipelines.console import results

    if as_json:
        print(json.dumps(result))  # noqa: T201
    else:
        for line in lines:
            results.print(line, highlight=False, soft_wrap=isinstance(line, str))


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


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: OutFolder = Path("runs/quickstart"),
    as_json: AsJson = False,
) -> None:
    """The whole story on a planted world: negatives, two trainings, a report.

    Example: shine quickstart --out runs/longer train.epochs=30 train.drop_epoch=22
    """
    from pipelines.quickstart import run_quickstart

    result = run_quickstart(out, overrides=overrides or ())
    _show(result, as_json, f"\nOpen {result['report']} in a browser.")


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: OutFolder = Path("runs/train"),
    as_json: AsJson = False,
) -> None:
    """Train a model on Ray; the same command continues a run that was stopped.

    Example: shine train --config configs/world.yaml --out runs/baseline train.num_workers=2
    """
    from pipelines.console import tracked, training_note
    from pipelines.train import train_run

    settings = load_settings(config, overrides)
    with tracked(f"training {out.name}") as tracker:
        run = train_run(
            settings,
            out,
            lambda record: tracker.update(
                record["epoch"], settings.train.epochs, training_note(record)
            ),
        )
    score = "" if run["score"] is None else f", score {run['score']:.4f}"
    _show(
        run,
        as_json,
        f"{out}: {run['status']}, best epoch {run['best_epoch']}{score} ({run['selection']})",
        f"Next: shine evaluate {out}",
    )


@app.command()
def evaluate(
    answers: Annotated[
        Path, typer.Argument(metavar="RUN|PREDICTIONS", help="Finished run, or prediction file.")
    ],
    annotations: Annotated[
        Path | None, typer.Option(help="Ground truth of the prediction file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer the test splits with a run's best checkpoint, or measure a prediction file.

    Example: shine evaluate runs/shine --json

    Example: shine evaluate hl_val_submission.jsonl --annotations highlight_val_release.jsonl
    """
    from pipelines.console import evaluation_table, file_table
    from shine.evaluation import evaluate_predictions, evaluate_run

    if answers.is_dir() and annotations is not None:
        raise InputError(
            f"{answers} is a folder; a run is evaluated on the splits of its configuration, so "
            f"leave out --annotations, or name a prediction file"
        )
    if annotations is not None:
        result = evaluate_predictions(answers, annotations)
        note = ""
        if unanswered := result["num_unanswered"]:
            note = (
                f"{unanswered} of {result['num_queries']} queries have no prediction; "
                f"recall and mIoU count them as misses, mAP as published leaves them out"
            )
        _show(result, as_json, file_table(result), note)
        return
    if answers.is_file():
        raise InputError(
            f"{answers} is a file; name its ground truth: shine evaluate {answers} --annotations "
            f"GROUND_TRUTH.jsonl"
        )
    evaluation = evaluate_run(answers)
    note = f"simulated: {evaluation['simulated']}" if evaluation["simulated"] else ""
    _show(evaluation, as_json, evaluation_table({answers.name: evaluation}), note)


@app.command()
def ablate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: OutFolder = Path("runs/ablation"),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate every part of SHINE, and every kind of negatives, with several seeds.

    Runs are trained in this process unless train.num_workers is set. The same command continues
    one that was stopped, and repeats what failed.

    Example: shine ablate --config configs/world_shine.yaml --out runs/ablation train.epochs=10
    """
    from pipelines.ablate import PAGE_FILE, run_ablation, screen_tables
    from pipelines.console import tracked

    settings = load_settings(config, overrides)
    with tracked("ablation") as tracker:
        result = run_ablation(settings, out, num_seeds=seeds, on_progress=tracker.update)
    note = f"simulated: {result['simulated']}" if result["simulated"] else ""
    _show(result, as_json, *screen_tables(result), note, f"The same as a page: {out / PAGE_FILE}")
    if failures := result["failures"]:
        first = failures[0]
        raise RuntimeError(
            f"{len(failures)} of {len(result['variants']) * seeds} runs failed, the first, "
            f"{first['variant']} with seed {first['seed']}, because: {first['error']}"
        )


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    video: Annotated[
        list[Path],
        typer.Option(
            "--video",
            help="Features of the video, npy or npz; of each source of the run, in its order.",
        ),
    ],
    query: Annotated[
        list[str] | None, typer.Option("--query", help="Sentence to find; again for more.")
    ] = None,
    tokens: Annotated[
        list[Path] | None,
        typer.Option(
            "--tokens", help="Token vectors of a query, npy or npz, instead of a sentence."
        ),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of the video; else as long as its clips.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the moments of a video that sentences describe.

    Example: shine predict runs/shine --video v1.npy --query "person opens the laptop"
    """
    from pipelines.console import answer_lines
    from shine.data.arrays import read_matrix
    from shine.retrieval import Grounder

    if not query and not tokens:
        raise InputError("name at least one sentence with --query, or token vectors with --tokens")
    grounder = Grounder.load(run)
    encoded = grounder.encode(video, duration_seconds=duration)
    names = [*(query or ()), *map(str, tokens or ())]
    vectors = [read_matrix(file, "last_hidden_state", "token, width") for file in tokens or ()]
    answers = grounder.ask_all(encoded, [*(query or ()), *vectors])
    _show(
        {
            "duration_seconds": encoded.duration_seconds,
            "simulated": grounder.simulated,
            "answers": [
                {
                    "query": name,
                    "moments": answer.moments,
                    "saliency": answer.saliency.tolist(),
                    "clip_seconds": answer.clip_seconds,
                }
                for name, answer in zip(names, answers, strict=True)
            ],
        },
        as_json,
        *(
            line
            for name, answer in zip(names, answers, strict=True)
            for line in answer_lines(name, answer, encoded.duration_seconds)
        ),
        f"simulated: {grounder.simulated}" if grounder.simulated else "",
    )


@world.command("make")
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
    _show(manifest, as_json, f"{out}: {manifest['simulated']}; rows: {rows}")


@world.command("dress")
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
    _show(manifest, as_json, f"{out}: {manifest['simulated']}")


@data.command("split")
def data_split(
    train: Annotated[Path, typer.Argument(help="Annotation file of training queries.")],
    out: OutFolder = Path("runs/split"),
    rows: Annotated[int, typer.Option(help="Queries of each validation split, about.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of pairs and videos.")] = 0,
    tagger: Annotated[str, typer.Option(help="Pipeline that reads verbs and nouns.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Carve validation splits of seen and of held-out verb-noun pairs from training videos.

    Example: shine data split charades_cg_train.jsonl --out runs/charades
    """
    from shine.data.annotations import read_annotations, to_record, write_jsonl
    from shine.data.split import Carved, carve_validation
    from shine.language.tagging import load_tagger

    targets = {name: out / f"{name}.jsonl" for name in Carved._fields}
    if train.resolve() in [target.resolve() for target in targets.values()]:
        raise InputError(f"{train} would be overwritten by its own split; name another --out")
    carved = carve_validation(read_annotations(train), load_tagger(tagger), rows=rows, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, part in carved._asdict().items():
        write_jsonl(targets[name], map(to_record, part))
        counts[name] = len(part)
    _show(counts, as_json, f"{out}: {counts}")


@features.command("pack")
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
    _show(
        manifest,
        as_json,
        f"{settings.path(settings.features.store)}: {manifest['num_videos']} videos, "
        f"{manifest['num_clips']} clips of {manifest['width']} columns",
    )
    if refused:
        raise InputError(
            f"{len(refused)} videos were left out of the store, the first because: {refused[0]}"
        )


@negatives.command("generate")
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
    _show(summary, as_json, f"{out}: {json.dumps(summary)}")


@negatives.command("estimate")
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
    _show(
        found,
        as_json,
        f"{found['rows']} queries need {found['requests']} requests ({found['answered']} more are "
        f"answered already): about {found['prompt_tokens']} tokens in and "
        f"{found['completion_tokens']} out{money}{time}; a refused answer is asked for once more",
    )


@negatives.command("audit")
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
    _show({"audits": audits}, as_json, *audit_lines(audits), page)


@negatives.command("show")
def negatives_show(
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
    _show({**asdict(row), "wrong": wrong}, as_json, *negative_lines(row, wrong))


@checkpoint.command("import")
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
    _show(
        report,
        as_json,
        f"{out}: {report['backbone']} of epoch {report['epoch']}, "
        f"{report['num_entries'] - len(unused)} entries fit",
        f"kept aside, without a counterpart: {', '.join(unused) or 'none'}",
        *report["notes"],
        f"Next: set data, features and text in {out / 'config.yaml'}, then shine evaluate {out}",
    )


@checkpoint.command("export")
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
    _show(
        written,
        as_json,
        f"{out}: {written['num_entries']} entries of {written['checkpoint']}",
        *written["notes"],
    )
