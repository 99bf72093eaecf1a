"""Runs told on one page: a single HTML file that needs nothing beside it.

Curves need `shine train` alone, results `shine evaluate`. Runs that differ in their seed alone are
one setting: they share a colour, a line in the legend, and a line in the table over seeds.
"""

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from shine import figures
from shine.errors import InputError
from shine.files import write_whole
from shine.metrics.recall import METRICS, top1_iou
from shine.metrics.summary import Comparison, Evaluation, Interval, Queries, compare
from shine.pages import environment, marked
from shine.runs import Run, flattened, read_json, read_run_folder

SPLITS = {
    "test_trivial": ("Test-trivial", "new videos, pairs of words seen in training"),
    "novel_composition": ("Novel composition", "every word seen in training, the pair never"),
    "novel_word": ("Novel word", "one word that no training query has"),
    "val_trivial": ("Validation, trivial", "held out of the training videos"),
    "val_composition": ("Validation, composition", "held-out pairs of words"),
}
GAP = "composition_gap"
TITLES = {name: title for name, (title, _) in SPLITS.items()} | {GAP: "Composition gap"}
HEADLINE = "R1@0.5"  # of what is said in words
SEED_METRICS = (*METRICS, "mAP")  # of the table over seeds
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
class Shown(Run):
    """A run as the page shows it."""

    label: str
    style: int  # number of its colour; the runs of one setting share it
    evaluation: Evaluation | None
    examples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Runs whose configuration and data differ in nothing but `train.seed`."""

    label: str
    style: int
    runs: Sequence[Shown]  # one for each seed

    @property
    def evaluations(self) -> list[Evaluation]:
        """Of the runs that have one."""
        return [run.evaluation for run in self.runs if run.evaluation is not None]


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
class SeedRow:
    """One setting in the table over seeds."""

    setting: Setting
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class SeedGroup:
    """Settings under one heading of the table over seeds."""

    name: str
    rows: Sequence[SeedRow]


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
    title: str = "SHINE: runs compared",
    notes: Sequence[str] = (),
    commands: Sequence[str] = (),
    max_examples: int = 9,
) -> Path:
    """One HTML page about runs is at `out`, and its path comes back.

    The first evaluated run is the one that the others are compared with. A run that is not
    finished or not evaluated is shown as far as it came. Equal folders give equal pages.

    Args:
        runs: run folders, at least one.
        out: the file to write; its folder is made.
        title: heading of the page.
        notes: sentences for the box at the top: what a reader must know before any number.
        commands: how to make these runs again; by default from their saved configurations.
        max_examples: queries whose saliency curves are drawn.

    Raises:
        InputError: a folder is not a run, or one of its files is damaged.
    """
    shown = _read_runs(runs)
    settings = _settings(shown)
    evaluated = [run for run in shown if run.evaluation is not None]
    trained = [run for run in shown if run.history]
    evaluations = [run.evaluation for run in evaluated if run.evaluation is not None]
    comparisons = [compare(evaluations[0], other) for other in evaluations[1:]]
    groups = _results(evaluations, comparisons)
    seeds = _seed_groups(settings)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            notes=[*notes, *_shortcomings(shown)],
            runs=shown,
            evaluated=evaluated,
            trained=trained,
            shown_settings=settings,
            simulated=_simulated(shown),
            groups=groups,
            num_changes=sum(len([c for c in row.changes if c]) for g in groups for row in g.rows),
            sentences=_seed_sentences(settings) if seeds else _sentences(evaluated, comparisons),
            seeds=seeds,
            seed_metrics=SEED_METRICS,
            bootstrap=evaluations[0]["bootstrap"] if evaluations else None,
            negatives=sorted({text for one in evaluations if (text := one["negatives"])}),
            overview=_overview(evaluated),
            losses=_loss_curves(trained),
            validation=_validation_curves(trained),
            examples=_examples(shown, max_examples),
            commands=commands or _commands(shown),
            settings=_different_settings(shown),
            environment=_environment_rows(shown),
            changed_files=_changed_files(shown),
            dashes=[" ".join(map(str, dashes)) for dashes in figures.DASHES],
            num_styles=figures.NUM_STYLES,
        )
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page)
    except OSError as error:
        raise InputError(f"cannot write the report {out}: {error.strerror}") from None
    return out


def compare_runs(runs: Sequence[Path]) -> dict[str, Any]:
    """The figures of the page as data: `runs` with those of each, `settings` with those over seeds.

    Raises:
        InputError: a folder is not a run, or one of its files is damaged.
    """
    shown = _read_runs(runs)
    return {
        "simulated": _simulated(shown),
        "runs": [
            {
                "folder": str(run.folder),
                "label": run.label,
                "status": run.status,
                "score": run.score,
                "best_epoch": run.best_epoch,
                "splits": {
                    name: split["metrics"]
                    for name, split in (run.evaluation["splits"] if run.evaluation else {}).items()
                },
            }
            for run in shown
        ],
        "settings": [
            {
                "label": setting.label,
                "seeds": [run.settings["train"]["seed"] for run in setting.runs],
                "splits": _over_seeds(setting),
            }
            for setting in _settings(shown)
        ],
    }


# Reading


def _read_runs(folders: Sequence[Path]) -> list[Shown]:
    if not folders:
        raise InputError("a report needs at least one run folder, got none")
    distinct = {folder.resolve(): folder for folder in folders}
    runs = [read_run_folder(folder) for folder in distinct.values()]
    keys = [_setting_key(run) for run in runs]
    styles = {key: style for style, key in enumerate(dict.fromkeys(keys))}
    return [
        Shown(
            **vars(run),
            label=label,
            style=styles[key],
            evaluation=_read_evaluation(run.folder),
            examples=_read_examples(run.folder),
        )
        for run, label, key in zip(runs, _labels(runs), keys, strict=True)
    ]


def _read_evaluation(folder: Path) -> Evaluation | None:
    path = folder / "evaluation.json"
    if not path.exists():
        return None
    evaluation = read_json(path, f"write it with `shine evaluate {folder}`")
    held: Any = evaluation if isinstance(evaluation, dict) else {}
    missing = Evaluation.__required_keys__ - held.keys()
    for split in held.get("splits", {}).values():
        missing |= Queries.__required_keys__ - split["queries"].keys()
    if missing:
        raise InputError(
            f"{path}: lacks {sorted(missing)}; write it again with `shine evaluate {folder}`"
        )
    return held


def _read_examples(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / "examples.json"
    return read_json(path, f"write it with `shine evaluate {folder}`") if path.exists() else []


def _labels(runs: Sequence[Run]) -> list[str]:
    """The names of the runs; where some are equal, with as much of the folders as it takes."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    parts = [run.folder.resolve().parts for run in runs]
    length = next(n for n in itertools.count(1) if len({p[-n:] for p in parts}) == len(parts))
    tails = ["/".join(p[-length:]) for p in parts]
    return [
        tail if own[-1] == name else f"{name} ({tail})"
        for name, tail, own in zip(names, tails, parts, strict=True)
    ]


def _setting_key(run: Run) -> str:
    """Equal for runs that differ in nothing but their seed; what tracks a run changes nothing."""
    train = {key: value for key, value in run.settings["train"].items() if key != "seed"}
    settings = {**run.settings, "train": train, "tracking": None}
    own = str(run.folder) if run.status == "imported" else None
    return json.dumps([settings, run.environment.get("checksums"), own], sort_keys=True)


def _settings(runs: Sequence[Shown]) -> list[Setting]:
    """The settings in the order of their first runs; a seed that comes twice counts once."""
    found = []
    for style in dict.fromkeys(run.style for run in runs):
        by_seed: dict[int, Shown] = {}
        for run in runs:
            if run.style == style:
                by_seed.setdefault(run.settings["train"]["seed"], run)
        same = list(by_seed.values())
        found.append(Setting(_shared_label(same), style, same))
    return found


def _shared_label(runs: Sequence[Shown]) -> str:
    """What the labels of the runs of one setting begin with, without the word for the seed."""
    if len(runs) == 1:
        return runs[0].label
    shared = os.path.commonprefix([run.label for run in runs])
    shared = re.sub(r"[\W_]+(seed|s)?[\W_]*$|^seed$", "", shared, flags=re.I)
    return shared or runs[0].folder.resolve().parent.name


def _simulated(runs: Sequence[Shown]) -> list[str]:
    texts = {
        run.evaluation["simulated"] if run.evaluation else run.environment.get("simulated")
        for run in runs
    }
    return sorted(text for text in texts if text)


def _shortcomings(runs: Sequence[Shown]) -> list[str]:
    """What the page cannot show of a run, and how it could."""
    sentences = []
    for run in runs:
        if run.status == "running":
            sentences.append(
                f"{run.label} is not finished: {run.epochs} of {run.settings['train']['epochs']} "
                f"epochs are written down."
            )
        elif run.evaluation is None:
            sentences.append(
                f"{run.label} is not evaluated, so that the results leave it out: "
                f"shine evaluate {run.folder.name}"
            )
        if run.status == "imported":
            sentences.append(
                f"{run.label} was not trained here ({run.state['selection']}) and has no curves."
            )
    return sentences


# Results


def _results(evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison]) -> list[Group]:
    groups = []
    for name in _ordered(one["splits"] for one in evaluations):
        splits = [one["splits"].get(name) for one in evaluations]
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
    gaps = [one["composition_gap"] for one in evaluations]
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
    groups += _sanity_groups(evaluations, comparisons)
    return groups


def _sanity_groups(
    evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison]
) -> list[Group]:
    groups = []
    for name in _ordered(one["splits"] for one in evaluations):
        sanity = [
            split["saliency_sanity"] if (split := one["splits"].get(name)) else {}
            for one in evaluations
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


def _over_seeds(setting: Setting) -> dict[str, dict[str, dict[str, Any]]]:
    """Per split and figure the values of the seeds, their mean and their standard deviation.

    The deviation (n - 1) is None for a single seed. The composition gap stands beside the splits.
    """
    tables = [
        {name: split["metrics"] for name, split in one["splits"].items()}
        | ({GAP: one["composition_gap"]} if one["composition_gap"] else {})
        for one in setting.evaluations
    ]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in _ordered(tables):
        found[name] = {}
        for metric in SEED_METRICS:
            known = [t[name][metric]["value"] for t in tables if metric in t.get(name, {})]
            values = [value for value in known if math.isfinite(value)]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                mean = statistics.fmean(values)
                found[name][metric] = {"mean": mean, "spread": spread, "values": values}
    return found


def _seed_groups(settings: Sequence[Setting]) -> list[SeedGroup]:
    """The table over seeds; none where every setting was trained with one."""
    evaluated = [setting for setting in settings if setting.evaluations]
    if all(len(setting.evaluations) < 2 for setting in evaluated):
        return []
    tables = [_over_seeds(setting) for setting in evaluated]
    return [
        SeedGroup(
            TITLES.get(name, _plain(name)),
            [
                SeedRow(setting, [_seed_cell(table.get(name, {}).get(m)) for m in SEED_METRICS])
                for setting, table in zip(evaluated, tables, strict=True)
            ],
        )
        for name in _ordered(tables)
    ]


def _seed_sentences(settings: Sequence[Setting]) -> list[str]:
    """R1@0.5 of every split in words: the mean of each setting beside that of the first."""
    first, *others = [setting for setting in settings if setting.evaluations]
    before = _over_seeds(first)
    sentences = []
    for setting in others:
        after = _over_seeds(setting)
        for name in _ordered([after]):
            own, other = (table.get(name, {}).get(HEADLINE) for table in (after, before))
            if name == GAP or own is None or other is None:
                continue
            points = 100 * (own["mean"] - other["mean"])
            moved = "higher" if points > 0 else "lower"
            told = " against ".join(_told(figure) for figure in (own, other))
            sentences.append(
                f"{TITLES.get(name, _plain(name))}: {HEADLINE} of {setting.label} is "
                f"{abs(points):.1f} points {moved} than that of {first.label} ({told})."
            )
    return sentences


def _told(figure: Mapping[str, Any]) -> str:
    mean = _points(100 * figure["mean"])
    if figure["spread"] is None:
        return f"{mean} with one seed"
    return f"{mean} ± {100 * figure['spread']:.1f} over {len(figure['values'])} seeds"


def _seed_cell(figure: Mapping[str, Any] | None) -> Cell | None:
    if figure is None:
        return None
    mean = _points(100 * figure["mean"])
    if figure["spread"] is None:
        return Cell(figure["mean"], mean, "one seed")
    low, high = (_points(100 * end) for end in (min(figure["values"]), max(figure["values"])))
    return Cell(figure["mean"], f"{mean} ± {100 * figure['spread']:.1f}", f"{low} to {high}")


def _sentences(runs: Sequence[Shown], comparisons: Sequence[Comparison]) -> list[str]:
    """R1@0.5 of every split in words, so that nobody reads more into the table than it holds."""
    sentences = []
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        for name in _ordered([comparison["splits"]]):
            cell = _change(comparison["splits"][name]["metrics"][HEADLINE])
            if cell is None or not cell.interval:
                continue
            title = SPLITS.get(name, (_plain(name), ""))[0]
            moved = "higher" if cell.value > 0 else "lower"
            verdict = (
                f"R1@0.5 of {run.label} is {abs(100 * cell.value):.1f} points {moved} than that of "
                f"{runs[0].label} (interval of the difference {cell.interval})."
                if cell.marked
                else f"R1@0.5 tells no difference between {run.label} and {runs[0].label} "
                f"({cell.text}, interval {cell.interval})."
            )
            sentences.append(f"{title}: {verdict}")
    return sentences


def _overview(runs: Sequence[Shown]) -> list[tuple[str, Markup]]:
    splits = [run.evaluation["splits"] if run.evaluation else {} for run in runs]
    names = _ordered(splits)
    if not names:
        return []
    titles = [SPLITS.get(name, (_plain(name), ""))[0] for name in names]
    styles = [run.style for run in runs]
    plots = []
    for metric in ("R1@0.5", "R1@0.7", "mIoU"):
        series = [
            [split["metrics"].get(metric) if (split := own.get(name)) else None for name in names]
            for own in splits
        ]
        label = f"{metric} with 95 % intervals on {', '.join(titles)}; the table has the numbers"
        stacked = [title.replace(" ", "\n") for title in titles]
        plots.append((metric, Markup(figures.interval_plot(series, stacked, label, styles=styles))))
    return plots


# Learning curves


def _loss_curves(runs: Sequence[Shown]) -> list[tuple[str, Markup]]:
    names = _ordered((line["train"] for run in runs for line in run.history), LOSSES)
    return [
        (
            LOSSES.get(name, _plain(name.removeprefix("loss/")).lower()),
            _curves(runs, lambda line, name=name: line["train"].get(name), f"{name} over epochs"),
        )
        for name in names
    ]


def _validation_curves(runs: Sequence[Shown]) -> list[tuple[str, Markup]]:
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


def _curves(runs: Sequence[Shown], value: Any, label: str, *, percent: bool = False) -> Markup:
    series = []
    for run in runs:
        points = [(float(line["epoch"]), value(line)) for line in run.history]
        known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        series.append(([x for x, _ in known], [y for _, y in known]))
    best = [run.best_epoch if percent else None for run in runs]
    styles = [run.style for run in runs]
    return Markup(figures.curve_plot(series, label, styles=styles, best=best, percent=percent))


# Examples


def _examples(runs: Sequence[Shown], limit: int) -> list[dict[str, Any]]:
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


def _example(runs: Sequence[Shown], versions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def _commands(runs: Sequence[Shown]) -> list[str]:
    return [
        line
        for run in runs
        if run.status != "imported"
        for line in (
            f"shine train --config {run.folder.name}/config.yaml --out {run.folder.name}-again",
            f"shine evaluate {run.folder.name}-again",
        )
    ]


def _different_settings(runs: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values are not the same in all runs."""
    flat = [flattened(run.settings) for run in runs]
    keys = _first_seen(flat)
    values = [
        (key, [_shown(settings[key]) if key in settings else "–" for settings in flat])
        for key in keys
    ]
    return [(key, row) for key, row in values if len(set(row)) > 1]


def _shown(value: Any) -> str:
    """The value as a configuration file would say it."""
    return value if isinstance(value, str) else json.dumps(value)


def _environment_rows(runs: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    rows = [
        ("state", [run.status for run in runs]),
        ("seed", [_seed(run) for run in runs]),
        ("checkpoint", [str(run.state.get("best") or "–") for run in runs]),
        ("chosen by", [str(run.state.get("selection") or "–") for run in runs]),
        ("best epoch", [str(run.best_epoch or "–") for run in runs]),
        ("epochs", [str(run.epochs) for run in runs]),
        ("training", [_training_time(run.history) for run in runs]),
        *(
            (name, [str(run.environment.get(name) or "–")[:12] for run in runs])
            for name in ("shine", "git", "python")
        ),
    ]
    packages = [run.environment.get("packages") or {} for run in runs]
    return rows + [
        (name, [str(versions.get(name, "–")) for versions in packages])
        for name in _first_seen(packages)
    ]


def _seed(run: Run) -> str:
    return "–" if run.status == "imported" else str(run.settings["train"]["seed"])


def _training_time(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return "–"
    seconds = statistics.median(line["seconds"] for line in history)
    rate = statistics.median(line["samples_per_second"] for line in history)
    return f"{seconds:.1f} s per epoch, {rate:,.0f} queries/s"


def _changed_files(runs: Sequence[Shown]) -> list[str]:
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
