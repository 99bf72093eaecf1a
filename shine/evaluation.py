"""What a finished run is worth: its best checkpoint on the test splits, written beside it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from shine.checkpoints import load_model
from shine.config import Config, EvaluateConfig, load_config
from shine.data.annotations import LABEL_SECONDS, read_annotations, write_jsonl
from shine.data.dataset import Dataset
from shine.data.loading import Source
from shine.engine import local_device
from shine.errors import InputError
from shine.files import write_whole
from shine.language.negatives import HardNegatives, read_negatives
from shine.metrics.summary import (
    Answers,
    Evaluation,
    FileEvaluation,
    evaluate_file,
    evaluate_splits,
)
from shine.models import build_model
from shine.prediction import Predictions, predict
from shine.submission import Submission, answers_to, read_submission, to_records

EXAMPLES = 3  # queries of each split whose saliency curves are kept


def evaluate_run(folder: Path) -> Evaluation:
    """The test splits are answered by the best checkpoint of the run in `folder`.

    Writes `evaluation.json`, `predictions/{split}.jsonl` (the field's submission format) and
    `examples.json` into the folder.

    Raises:
        InputError: the run is not finished, or its data are not where its configuration says.
    """
    config, run = read_run(folder)
    if not config.data.tests:
        raise InputError(f"{folder}: its configuration names no test split; set data.tests")
    source = Source.open(config)
    device = local_device(config.train)
    model = load_run_model(folder, config, source, run["best"]).to(device)
    negatives = None
    levels = 0
    if config.evaluate.negatives is not None:
        negatives = read_negatives(config.path(config.evaluate.negatives))
        levels = max((len(row.queries) for row in negatives.values()), default=0)
    answers: dict[str, Answers] = {}
    examples: list[dict[str, Any]] = []
    (folder / "predictions").mkdir(exist_ok=True)
    for name, file in config.data.tests.items():
        dataset = source.evaluation(file, negatives, levels)
        rows = np.arange(len(dataset))
        found = predict(model, dataset, rows, config.evaluate, device=device)
        submission = _submission(found, config.evaluate)
        answers[name] = _answers(dataset, found, submission, config.path(file))
        examples += _examples(name, dataset, found)
        write_jsonl(
            folder / "predictions" / f"{name}.jsonl", to_records(dataset.annotations, submission)
        )
    evaluation = evaluate_splits(
        answers,
        checkpoint=run["best"],
        simulated=source.store.simulated,
        negatives=_made_by(negatives),
        resamples=config.evaluate.bootstrap,
    )
    write_whole(folder / "examples.json", json.dumps(examples) + "\n")
    write_whole(folder / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")
    return evaluation


def evaluate_predictions(predictions: Path, annotations: Path) -> FileEvaluation:
    """A prediction file in the field's format is measured against the ground truth.

    Raises:
        InputError: a file is missing or malformed, or they are not about the same queries.
    """
    rows = read_annotations(annotations)
    answers = answers_to(rows, read_submission(predictions, rows), annotations)
    return evaluate_file(answers, predictions=str(predictions), annotations=str(annotations))


def read_run(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and state of a finished run.

    Raises:
        InputError: `folder` is not one.
    """
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{folder}: expected a finished run (run.json); train one with `shine train --config "
            f"... --out {folder}`"
        ) from None
    if run["best"] is None:
        raise InputError(f"{folder}: the run is {run['status']} and has no checkpoint yet")
    return load_config(folder / "config.yaml"), run


def load_run_model(folder: Path, config: Config, source: Source, checkpoint: str) -> nn.Module:
    """The model of a run with the parameters of one of its checkpoints, on the CPU."""
    model = build_model(
        config.model, clip_width=source.store.clip_width, token_width=source.texts.width
    )
    load_model(folder / checkpoint, model)
    return model.eval()


def _submission(found: Predictions, settings: EvaluateConfig) -> Submission:
    """What the prediction file holds, and what is measured: numbers of four decimals.

    Saliency as published is written in float16 and not rounded further.
    """
    saliency = found.saliency[:, 0].astype(float)
    return Submission(
        moments=found.moments.round(4),
        scores=found.scores.round(4),
        saliency=saliency if settings.compat == "reference" else saliency.round(4),
    )


def _answers(dataset: Dataset, found: Predictions, submission: Submission, truth: Path) -> Answers:
    if dataset.store.manifest["clip_seconds"] != LABEL_SECONDS:  # of other clips than the labels
        submission = replace(submission, saliency=None)
    answers = answers_to(dataset.annotations, submission, truth)
    if dataset.text.shape[1] == 1:
        return answers
    longest = found.saliency.shape[-1]
    return replace(
        answers,
        saliency=found.saliency.swapaxes(0, 1),
        inside=dataset.inside[:, :longest],
        text_valid=dataset.text_valid.T,
    )


def _examples(name: str, dataset: Dataset, found: Predictions) -> list[dict[str, Any]]:
    """The first queries that have all their texts and a moment, as the report draws them."""
    shown = dataset.text_valid.all(axis=1) & ~np.isnan(found.scores[:, 0])
    rows = np.flatnonzero(shown)[:EXAMPLES].tolist()
    return [
        {
            "split": name,
            "qid": dataset.annotations[row].qid,
            "vid": dataset.annotations[row].vid,
            "query": dataset.annotations[row].query,
            "duration_seconds": dataset.annotations[row].duration_seconds,
            "clip_seconds": float(dataset.clip_seconds[row]),
            "moments": [list(moment) for moment in dataset.annotations[row].moments],
            "predicted": [*found.moments[row, 0].tolist(), float(found.scores[row, 0])],
            "texts": [
                {
                    "label": "query" if level == 0 else f"level {level}",
                    "text": dataset.texts.text(number),
                    "saliency": _curve(dataset, found, row, level),
                }
                for level, number in enumerate(dataset.text[row].tolist())
            ],
        }
        for row in rows
    ]


def _curve(dataset: Dataset, found: Predictions, row: int, text: int) -> list[float]:
    return found.saliency[row, text, : dataset.num_clips[row]].astype(float).round(4).tolist()


def _made_by(negatives: Mapping[str, HardNegatives] | None) -> str | None:
    if not negatives:
        return None
    return ", ".join(sorted({source for row in negatives.values() for source in row.source}))
