"""Finished runs told on one page: a single HTML file that needs nothing beside it."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from shine import figures
from shine.errors import InputError
from shine.files import write_whole
from shine.metrics.recall import top1_iou
from shine.metrics.summary import Comparison, Evaluation, Interval, Queries, compare
from shine.pages import environment, marked

SPLITS = {
    "test_trivial": ("Test-trivial", "new videos, pairs of words seen in training"),
    "novel_composition": ("Novel composition", "every word seen in training, the pair never"),
    "novel_word": ("Novel word", "one word that no training query has"),
    "val_trivial": ("Validation, trivial", "held out of the training videos"),
    "val_composition": ("Validation, composition", "held-out pairs of words"),
}
LOSSES = {
    "loss/total": "total",
    "loss/span": "span: distance of start and end",
    "loss/giou": "generalised IoU",
    "loss/label": "label: is a slot a moment",
    "loss/aux": "the same three, earlier decoder layers",
    "loss/rank": "rank: clips inside above outside",
    "loss/negative": "negative query towards zero",
    "loss/intra": "coarse, within the video",
    "loss/inter": "coarse, against another query",
}


@dataclass(frozen=True)
class Run:
    """What a finished run folder holds."""

    folder: Path
    label: str
    state: Mapping[str, Any]  # run.json
    config: str  # config.yaml
    environment: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    evaluation: Evaluation
    examples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One number of a table with its interval, in percent; `marked` if the interval excludes 0."""

    value: float
    text: str
    interval: str
    marked: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the results: a figure of every run, then its difference from the first run."""

    name: str
    cells: Sequence[Cell | None]
    changes: Sequence[Cell | None]


@dataclass(frozen=True)
class Group:
    """Rows of the results under one heading."""

    name: str
    note: str
    rows: Sequence[Row]


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "SHINE: baseline and hard negatives compared",
    notes: Sequence[str] = (),
    commands: Sequence[str] = (),
    max_examples: int = 9,
) -> Path:
    """One HTML page about finished, evaluated runs is at `out`, and its path comes back.

    The first run is the one that the others are compared with. Equal folders give equal pages.

    Args:
        runs: run folders, at least one.
        out: the file to write; its folder is made.
        title: heading of the page.
        notes: sentences for the box at the top: what a reader must know before any number.
        commands: how to make these runs again; by default from their saved configurations.
        max_examples: queries whose saliency curves are drawn.

    Raises:
        InputError: a folder is not a finished and evaluated run.
    """
    if not runs:
        raise InputError("a report needs at least one run folder, got none")
    loaded = _label([_read_run(Path(folder)) for folder in runs])
    comparisons = [compare(loaded[0].evaluation, run.evaluation) for run in loaded[1:]]
    groups = _results(loaded, comparisons)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            notes=notes,
            runs=loaded,
            simulated=sorted({text for run in loaded if (text := run.evaluation["simulated"])}),
            groups=groups,
            num_changes=sum(len([c for c in row.changes if c]) for g in groups for row in g.rows),
            sentences=_sentences(loaded, comparisons),
            bootstrap=loaded[0].evaluation["bootstrap"],
            negatives=sorted({text for run in loaded if (text := run.evaluation["negatives"])}),
            overview=_overview(loaded),
            losses=_loss_curves(loaded),
            validation=_validation_curves(loaded),
            examples=_examples(loaded, max_examples),
            commands=commands or _commands(loaded),
            settings=_different_settings(loaded),
            environment=_environment_rows(loaded),
            changed_files=_changed_files(loaded),
            dashes=[" ".join(map(str, dashes)) for dashes in figures.DASHES],
            num_styles=figures.NUM_STYLES,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


# Reading


def _read_run(folder: Path) -> Run:
    state = _read(folder / "run.json", f"train it with `shine train --out {folder}`")
    if state.get("status") != "finished":
        raise InputError(f"{folder}: expected a finished run, got one that is {state['status']}")
    evaluation = _read(folder / "evaluation.json", f"write it with `shine evaluate {folder}`")
    missing = Evaluation.__required_keys__ - evaluation.keys()
    for split in evaluation.get("splits", {}).values():
        missing |= Queries.__required_keys__ - split["queries"].keys()
    if missing:
        raise InputError(
            f"{folder / 'evaluation.json'}: lacks {sorted(missing)}; "
            f"write it again with `shine evaluate {folder}`"
        )
    examples = folder / "examples.json"
    lines = _text(folder / "metrics.jsonl", "it is written by `shine train`").splitlines()
    return Run(
        folder=folder,
        label=state["name"],
        state=state,
        config=_text(folder / "config.yaml", "it is written by `shine train`"),
        environment=_read(folder / "environment.json", "it is written by `shine train`"),
        history=[_parse(line, folder / "metrics.jsonl") for line in lines if line.strip()],
        evaluation=evaluation,
        examples=_read(examples, "") if examples.exists() else [],
    )


def _text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: expected a file of a finished run; {remedy}") from None


def _read(path: Path, remedy: str) -> Any:
    return _parse(_text(path, remedy), path)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {error}") from None


def _label(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name are told apart by their folders."""
    names = [run.label for run in runs]
    return [
        run
        if names.count(run.label) == 1
        else Run(**{**vars(run), "label": f"{run.label} ({run.folder.name})"})
        for run in runs
    ]


# Results


def _results(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Group]:
    groups = []
    for name in _ordered(run.evaluation["splits"] for run in runs):
        splits = [run.evaluation["splits"].get(name) for run in runs]
        changes = [comparison["splits"].get(name) for comparison in comparisons]
        known = next(split for split in splits if split)
        title, note = SPLITS.get(name, (_plain(name), ""))
        size = f"{known['num_queries']:,} queries of {known['num_videos']:,} videos"
        rows = [
            _row(
                metric,
                [split and split["metrics"].get(metric) for split in splits],
                [change and change["metrics"].get(metric) for change in changes],
            )
            for metric in _first_seen(split["metrics"] for split in splits if split)
        ]
        groups.append(Group(title, f"{note}; {size}" if note else size, rows))
    gaps = [run.evaluation["composition_gap"] for run in runs]
    if any(gaps):
        rows = [
            _row(
                metric,
                [gap.get(metric) for gap in gaps],
                [comparison["composition_gap"].get(metric) for comparison in comparisons],
            )
            for metric in _first_seen(gaps)
        ]
        note = "test-trivial minus novel composition, in points: the price of a new pair of words"
        groups.append(Group("Composition gap", note, rows))
    groups += _sanity_groups(runs, comparisons)
    return groups


def _sanity_groups(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Group]:
    groups = []
    for name in _ordered(run.evaluation["splits"] for run in runs):
        sanity = [
            split["saliency_sanity"] if (split := run.evaluation["splits"].get(name)) else {}
            for run in runs
        ]
        changes = [
            split["saliency_sanity"] if (split := comparison["splits"].get(name)) else {}
            for comparison in comparisons
        ]
        rows = [
            _row(
                f"{_plain(level)} negative",
                [figures_.get(level) for figures_ in sanity],
                [figures_.get(level) for figures_ in changes],
            )
            for level in sorted({level for figures_ in sanity for level in figures_})
        ]
        if rows:
            title = SPLITS.get(name, (_plain(name), ""))[0]
            note = "how often the true sentence beats its negative inside the moment; 50 is chance"
            groups.append(Group(f"Saliency sanity, {title.lower()}", note, rows))
    return groups


def _row(name: str, values: Sequence[Interval | None], changes: Sequence[Interval | None]) -> Row:
    return Row(name, [_cell(value) for value in values], [_change(value) for value in changes])


def _cell(figure: Interval | None) -> Cell | None:
    if figure is None or not math.isfinite(figure["value"]):
        return None
    interval = ""
    if (ends := _ends(figure)) is not None:
        interval = f"{_points(ends[0])} to {_points(ends[1])}"
    return Cell(figure["value"], _points(100 * figure["value"]), interval)


def _change(figure: Interval | None) -> Cell | None:
    """A difference; marked only where its own interval leaves 0 out."""
    if figure is None or not math.isfinite(figure["value"]):
        return None
    text = _signed(100 * figure["value"])
    if (ends := _ends(figure)) is None:
        return Cell(figure["value"], text, "")
    marked = ends[0] > 0 or ends[1] < 0
    return Cell(figure["value"], text, f"{_signed(ends[0])} to {_signed(ends[1])}", marked)


def _points(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _ends(figure: Interval) -> tuple[float, float] | None:
    low, high = figure["low"], figure["high"]
    return None if low is None or high is None else (100 * low, 100 * high)


def _sentences(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    """R1@0.5 of every split in words, so that nobody reads more into the table than it holds."""
    sentences = []
    first = runs[0]
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        for name in _ordered([comparison["splits"]]):
            cell = _change(comparison["splits"][name]["metrics"]["R1@0.5"])
            if cell is None or not cell.interval:
                continue
            title = SPLITS.get(name, (_plain(name), ""))[0]
            moved = "higher" if cell.value > 0 else "lower"
            verdict = (
                f"R1@0.5 of {run.label} is {abs(100 * cell.value):.1f} points {moved} than that of "
                f"{first.label} (interval of the difference {cell.interval})."
                if cell.marked
                else f"R1@0.5 tells no difference between {run.label} and {first.label} "
                f"({cell.text}, interval {cell.interval})."
            )
            sentences.append(f"{title}: {verdict}")
    return sentences


def _overview(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    names = _ordered(run.evaluation["splits"] for run in runs)
    titles = [SPLITS.get(name, (_plain(name), ""))[0] for name in names]
    plots = []
    for metric in ("R1@0.5", "R1@0.7", "mIoU"):
        series = [
            [
                split["metrics"].get(metric)
                if (split := run.evaluation["splits"].get(name))
                else None
                for name in names
            ]
            for run in runs
        ]
        label = f"{metric} with 95 % intervals on {', '.join(titles)}; the table has the numbers"
        stacked = [title.replace(" ", "\n") for title in titles]
        plots.append((metric, Markup(figures.interval_plot(series, stacked, label))))
    return plots


# Learning curves


def _loss_curves(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    names = _ordered((line["train"] for run in runs for line in run.history), LOSSES)
    return [
        (
            LOSSES.get(name, _plain(name.removeprefix("loss/")).lower()),
            _curves(runs, lambda line, name=name: line["train"].get(name), f"{name} over epochs"),
        )
        for name in names
    ]


def _validation_curves(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    names = _first_seen(line["validation"] for run in runs for line in run.history)
    curves = [
        (
            f"{SPLITS.get(name, (_plain(name), ''))[0]}: R1@0.5",
            _curves(
                runs,
                lambda line, name=name: line["validation"].get(name, {}).get("R1@0.5"),
                f"R1@0.5 on {name} over epochs",
                percent=True,
            ),
        )
        for name in names
    ]
    if names:
        score = _curves(runs, lambda line: line["score"], "score over epochs", percent=True)
        curves.append(("Score that chooses the checkpoint", score))
    return curves


def _curves(runs: Sequence[Run], value: Any, label: str, *, percent: bool = False) -> Markup:
    series = []
    for run in runs:
        points = [(float(line["epoch"]), value(line)) for line in run.history]
        known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        series.append(([x for x, _ in known], [y for _, y in known]))
    best = [run.state.get("best_epoch") if percent else None for run in runs]
    return Markup(figures.curve_plot(series, label, best=best, percent=percent))


# Examples


def _examples(runs: Sequence[Run], limit: int) -> list[dict[str, Any]]:
    """Queries that every run with examples shows, each with one plot per run."""
    shown = [run for run in runs if run.examples]
    if not shown:
        return []
    found = [{(e["split"], str(e["qid"])): e for e in run.examples} for run in shown]
    keys = [key for key in found[0] if all(key in examples for examples in found)]
    return [_example(shown, [examples[key] for examples in found]) for key in _spread(keys)[:limit]]


def _spread(keys: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The keys with their splits in turn, so that a limit cuts every split alike."""
    turn = {key: [k for k in keys if k[0] == key[0]].index(key) for key in keys}
    return sorted(keys, key=lambda key: turn[key])


def _example(runs: Sequence[Run], versions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    one = versions[0]
    values = [
        value
        for version in versions
        for text in version["texts"]
        for value in text["saliency"]
        if math.isfinite(value)
    ]
    limits = (min(values), max(values)) if values else (0.0, 1.0)
    plots = []
    for run, version in zip(runs, versions, strict=True):
        start, end = version["predicted"][:2]
        moments = np.array(version["moments"], dtype=float)[None]
        mask = np.ones(moments.shape[:2], dtype=bool)
        iou = float(top1_iou(np.array([[start, end]], dtype=float), moments, mask)[0])
        label = (
            f"Saliency of {run.label} for query {version['qid']} of {version['split']} over time; "
            f"found {start:.1f} to {end:.1f}, IoU {iou:.2f}"
        )
        svg = figures.saliency_plot(
            [text["saliency"] for text in version["texts"]],
            label,
            clip_seconds=version["clip_seconds"],
            duration_seconds=version["duration_seconds"],
            moments=version["moments"],
            predicted=(start, end),
            limits=limits,
        )
        plots.append({"run": run.label, "iou": iou, "found": (start, end), "svg": Markup(svg)})
    return {
        "query": one["query"],
        "split": SPLITS.get(one["split"], (_plain(one["split"]), ""))[0],
        "vid": one["vid"],
        "moments": one["moments"],
        "texts": [
            {"label": text["label"], "words": marked(one["query"], text["text"])}
            for text in one["texts"]
        ],
        "plots": plots,
    }


# Reproduction


def _commands(runs: Sequence[Run]) -> list[str]:
    return [
        line
        for run in runs
        for line in (
            f"shine train --config {run.folder.name}/config.yaml --out {run.folder.name}-again",
            f"shine evaluate {run.folder.name}-again",
        )
    ]


def _different_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values are not the same in all runs."""
    flat = [dict(_flatten(yaml.safe_load(run.config) or {})) for run in runs]
    keys = _first_seen(flat)
    values = [
        (key, [_shown(settings[key]) if key in settings else "–" for settings in flat])
        for key in keys
    ]
    return [(key, row) for key, row in values if len(set(row)) > 1]


def _shown(value: Any) -> str:
    """The value as a configuration file would say it."""
    return value if isinstance(value, str) else json.dumps(value)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _environment_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    rows = [
        ("checkpoint", [run.evaluation["checkpoint"] for run in runs]),
        ("best epoch", [str(run.state.get("best_epoch")) for run in runs]),
        ("epochs", [str(run.history[-1]["epoch"]) if run.history else "0" for run in runs]),
        ("training", [_training_time(run.history) for run in runs]),
        ("seed", [str(run.environment.get("seed")) for run in runs]),
        ("shine", [str(run.environment.get("shine")) for run in runs]),
        ("git", [str(run.environment.get("git") or "–")[:12] for run in runs]),
        ("python", [str(run.environment.get("python")) for run in runs]),
    ]
    packages = [run.environment.get("packages") or {} for run in runs]
    return rows + [
        (name, [str(versions.get(name, "–")) for versions in packages])
        for name in _first_seen(packages)
    ]


def _training_time(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return "–"
    seconds = statistics.median(line["seconds"] for line in history)
    rate = statistics.median(line["samples_per_second"] for line in history)
    return f"{seconds:.1f} s per epoch, {rate:,.0f} queries/s"


def _changed_files(runs: Sequence[Run]) -> list[str]:
    """Data files that some runs share by name but not by content."""
    checksums = [run.environment.get("checksums") or {} for run in runs]
    return [
        name
        for name in _first_seen(checksums)
        if len({sums[name] for sums in checksums if name in sums}) > 1
    ]


# Small helpers


def _first_seen(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys, in the order in which they first appear."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _ordered(mappings: Iterable[Mapping[str, Any]], order: Mapping[str, Any] = SPLITS) -> list[str]:
    """All keys: those of `order` in its order, then the others as they come."""
    names = _first_seen(mappings)
    return [name for name in order if name in names] + [n for n in names if n not in order]


def _plain(name: str) -> str:
    return name.replace("_", " ").capitalize()
