"""The commands around a run: train, evaluate, list, report, ablate, predict; the quickstart."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import AsJson, ConfigFile, OutFolder, Overrides, show
from pipelines.settings import load_settings
from shine.errors import InputError


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
    show(result, as_json, f"\nOpen {result['report']} in a browser.")


def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: OutFolder = Path("runs/train"),
    as_json: AsJson = False,
) -> None:
    """Train a model on Ray; the same command continues a run that was stopped.

    Example: shine train --config configs/world.yaml --out runs/baseline train.num_workers=2
    """
    from pipelines.console import tracked, training_note, validation_table
    from pipelines.train import train_run
    from shine.runs import read_run_folder

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
    table = validation_table(read_run_folder(out).history, run["best_epoch"])
    show(
        run,
        as_json,
        *([] if table is None else [table]),
        f"{out}: {run['status']}, best epoch {run['best_epoch']}{score} ({run['selection']})",
        f"Next: shine evaluate {out}",
    )


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
        show(result, as_json, file_table(result), note)
        return
    if answers.is_file():
        raise InputError(
            f"{answers} is a file; name its ground truth: shine evaluate {answers} --annotations "
            f"GROUND_TRUTH.jsonl"
        )
    evaluation = evaluate_run(answers)
    note = f"simulated: {evaluation['simulated']}" if evaluation["simulated"] else ""
    show(evaluation, as_json, evaluation_table({answers.name: evaluation}), note)


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Runs, or folders that hold runs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs with their state, best score and pace, the latest first.

    Example: shine runs runs/ablation
    """
    import time

    from pipelines.console import runs_lines
    from shine.runs import list_runs

    listing = list_runs(folders or [Path("runs")], time.time())
    show(listing, as_json, *runs_lines(listing))


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    out: OutFolder = Path("runs/report"),
    as_json: AsJson = False,
) -> None:
    """Compare runs on one HTML page: curves, results with intervals, and what differs.

    The first evaluated run is the one that the others are compared with. Runs that differ in
    train.seed alone share a colour and a line.

    Example: shine report runs/baseline runs/shine --out runs/report
    """
    from shine.report import compare_runs, write_report

    page = write_report(folders, out / "report.html")
    result = {"report": str(page), **compare_runs(folders)}
    show(result, as_json, f"Open {page} in a browser.")


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
    show(result, as_json, *screen_tables(result), note, f"The same as a page: {out / PAGE_FILE}")
    if failures := result["failures"]:
        first = failures[0]
        raise RuntimeError(
            f"{len(failures)} of {len(result['variants']) * seeds} runs failed, the first, "
            f"{first['variant']} with seed {first['seed']}, because: {first['error']}"
        )


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
    show(
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
