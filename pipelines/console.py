"""What a person sees: bars and tables on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from shine.metrics.figures import BUCKETS
from shine.metrics.recall import METRICS

if TYPE_CHECKING:  # the package starts without torch
    from shine.audit_tables import Audit
    from shine.language.audit import Row
    from shine.retrieval import Answer

results = Console()  # what a command was asked for
console = Console(stderr=True)  # progress and mistakes

_QUIET_SECONDS = 5.0  # between two plain lines
_PACE_SECONDS = 6 * 3600.0  # the time left is estimated from these; epochs can be long
_NAME_WIDTH = 26  # of what a line of an audit counts
_STATE_STYLES = {"running": "green", "stopped": "yellow"}
_SHOWN_MOMENTS = 5  # of a query; --json has all


class Tracker:
    """Shows how far one piece of work is; `update` may be called from another thread."""

    def __init__(self, title: str, bar: Progress | None):
        self._title = title
        self._bar = bar
        self._task = None if bar is None else bar.add_task(title, total=None, note="")
        self._spoken = time.monotonic()
        self._first: tuple[float, int] | None = None  # when, and how much was done then

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps are behind us.

        Args:
            done: steps finished.
            total: steps in all.
            note: what there is to say of the latest one.
        """
        self._first = self._first or (time.monotonic(), done)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif done == total or time.monotonic() - self._spoken > _QUIET_SECONDS:
            self._spoken = time.monotonic()
            line = f"{self._title}: {done}/{total} {note}{self._left(done, total)}".rstrip()
            console.print(line, highlight=False, soft_wrap=True)

    def _left(self, done: int, total: int) -> str:
        """The time left at the pace so far, once two updates tell one."""
        assert self._first is not None
        started, before = self._first
        if not before < done < total:
            return ""
        seconds = (time.monotonic() - started) / (done - before) * (total - done)
        return f" | {ago(seconds)} left"


@contextmanager
def tracked(title: str) -> Iterator[Tracker]:
    """A bar titled `title` on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        console.print(title, highlight=False)
        yield Tracker(title, None)
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=_PACE_SECONDS) as bar:
        yield Tracker(title, bar)


def training_note(record: Mapping[str, Any]) -> str:
    """The latest line of `metrics.jsonl` in a few words."""
    parts = [f"loss {record['train']['loss/total']:.3f}"]
    parts += [
        f"{name} R1@0.5 {100 * scores['R1@0.5']:.1f}"
        for name, scores in record["validation"].items()
    ]
    parts.append(f"{record['samples_per_second']:.0f} queries/s")
    return " | ".join(parts)


def validation_table(history: Sequence[Mapping[str, Any]], best_epoch: int | None) -> Table | None:
    """What the validation splits said of the best epoch and the last, in percent.

    Args:
        history: lines of `metrics.jsonl`.
        best_epoch: of the checkpoint that counts.

    Returns:
        None for a run without validation splits.
    """
    last = history[-1]["epoch"]
    shown = [line for line in history if line["epoch"] in (best_epoch, last)]
    names = list(dict.fromkeys(name for line in shown for name in line["validation"]))
    if not names:
        return None
    metrics = (*METRICS, "mAP")
    table = Table(title="Validation, in percent")
    for heading in ("split", "epoch"):
        table.add_column(heading, no_wrap=True)
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name in names:
        for line in shown:
            epoch = f"{line['epoch']} (best)" if line["epoch"] == best_epoch else f"{line['epoch']}"
            scores = line["validation"].get(name, {})
            values = [f"{100 * scores[m]:.1f}" if m in scores else "-" for m in metrics]
            table.add_row(name, epoch, *values)
        table.add_section()
    return table


def runs_lines(listing: Mapping[str, Any]) -> list[RenderableType]:
    """Runs one below the other, and what is to be said of those that are not finished or broken."""
    lines: list[RenderableType] = []
    if runs := listing["runs"]:
        table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("run", overflow="fold", min_width=12)
        table.add_column("state", no_wrap=True)
        for heading in ("epochs", "score"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("seed", justify="right", no_wrap=True)
        table.add_column("backbone", no_wrap=True)
        table.add_column("rows/s", justify="right", no_wrap=True)
        table.add_column("last line", no_wrap=True)
        for run in runs:
            of = "" if run["epochs_of"] is None else f"/{run['epochs_of']}"
            rate = run["samples_per_second"]
            table.add_row(
                Text(printable(run["folder"])),
                Text(printable(run["state"]), _STATE_STYLES.get(run["state"], "")),
                f"{run['epochs']}{of}",
                _best(run),
                "-" if run["seed"] is None else str(run["seed"]),
                Text(printable(run["backbone"])),
                "-" if rate is None else f"{rate:.0f}",
                f"{ago(run['silent_seconds'])} ago",
            )
        lines.append(table)
    if any(run["state"] == "stopped" for run in runs):
        lines.append(
            "stopped: not finished, and silent for much longer than its epochs take; the command "
            "that began a run continues it"
        )
    lines += [Text(f"broken: {printable(one['reason'])}", style="red") for one in listing["broken"]]
    return lines or ["no runs found; `shine train` makes one"]


def _best(run: Mapping[str, Any]) -> str:
    """The score that chose the checkpoint and its epoch, or what chose it instead."""
    if run["score"] is not None:
        return f"{run['score']:.4f} @ {run['best_epoch']}"
    return {"finished": "last epoch", "imported": "published"}.get(run["state"], "-")


def ago(seconds: float) -> str:
    """A duration in its largest unit: `40 s`, `5 min`, `3 h`, `2 days`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def evaluation_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Runs side by side on every split, in percent; `evaluation.json` has more, with intervals."""
    table = Table(title="R1 at IoU 0.3 / 0.5 / 0.7, mIoU and mAP, in percent")
    for heading in ("split", "run", "queries"):
        table.add_column(heading, no_wrap=True)
    first = next(iter(evaluations.values()))
    metrics = (*METRICS, "mAP")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for split in first["splits"]:
        for name, evaluation in evaluations.items():
            summary = evaluation["splits"][split]
            values = [_percent(summary["metrics"].get(metric)) for metric in metrics]
            table.add_row(split, name, str(summary["num_queries"]), *values)
        table.add_section()
    for name, evaluation in evaluations.items():
        if gap := evaluation["composition_gap"]:
            values = [_percent(gap.get(metric)) for metric in metrics]
            table.add_row("composition gap", name, "", *values)
    return table


def answer_lines(query: str, answer: "Answer", duration_seconds: float) -> list[RenderableType]:
    """A query, its best moments, and its saliency from the first clip to the last."""
    table = Table(box=None, padding=(0, 0, 0, 2))
    for heading in ("start", "end", "score"):
        table.add_column(heading, justify="right")
    for start, end, score in answer.moments[:_SHOWN_MOMENTS]:
        table.add_row(f"{start:.1f}", f"{end:.1f}", f"{score:.2f}")
    curve = sparkline(answer.saliency.tolist(), ascii_only=results.options.ascii_only)
    return [
        Text(query, style="bold"),
        table,
        Text(f"  saliency {curve} of {duration_seconds:.1f} s"),
    ]


def sparkline(values: Sequence[float], width: int = 60, *, ascii_only: bool = False) -> str:
    """A curve in one line: the peaks of at most `width` equal parts, lowest to highest."""
    bars = ".:-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    size = math.ceil(len(values) / width)
    peaks = [max(values[start : start + size]) for start in range(0, len(values), size)]
    low, high = min(peaks), max(peaks)
    step = (high - low) / (len(bars) - 1) or 1.0
    return "".join(bars[round((peak - low) / step)] for peak in peaks)


def file_table(evaluation: Mapping[str, Any]) -> Table:
    """The usual figures of a prediction file in percent, with their intervals."""
    table = Table(title=f"{evaluation['num_queries']} queries")
    for heading in ("", "percent", "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left")
    metrics = evaluation["metrics"]
    lengths = [f"{name}-mAP" for name in BUCKETS]
    highlights = [name for name in metrics if name.startswith("HL-")]
    shown = (*METRICS, "R5@0.5", "R5@0.7", "mAP", "mAP@0.5", "mAP@0.75", *lengths, *highlights)
    for name in shown:
        if figure := metrics.get(name):
            value, low, high = (100 * figure[end] for end in ("value", "low", "high"))
            table.add_row(name, f"{value:.2f}", f"{low:.2f} to {high:.2f}")
    return table


def audit_lines(audits: Sequence["Audit"]) -> list[RenderableType]:
    """What audits of hard negatives counted, files side by side, and how."""
    from shine.audit_tables import audit_notes, audit_tables

    lines: list[RenderableType] = []
    for found in audit_tables(audits):
        table = Table(title=found.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        table.add_column("", min_width=_NAME_WIDTH)
        for heading in found.headings:
            table.add_column(heading, justify="right")
        for group in found.groups:
            if group.name:
                table.add_row(Text(group.name, style="bold"))
            for line in group.lines:
                cells = [
                    cell.text
                    if cell.share is None or "%" in cell.text
                    else f"{cell.text} ({100 * cell.share:.1f} %)"
                    for cell in line.cells
                ]
                table.add_row(Text(line.name), *map(Text, cells))
            table.add_section()
        lines += ["", table, Text(found.note, style="dim")]
    if len(audits) == 1:
        lines += _examples(audits[0])
    return [*lines, "", *(Text(note, style="dim") for note in audit_notes(audits))]


def _examples(audit: "Audit") -> Iterator[Text]:
    """The first example of each defect."""
    from shine.audit_tables import audit_examples

    yield Text("\nThe first of each", style="bold")
    for defect, (one, *_) in audit_examples(audit):
        yield Text(f"{defect} ({printable(one['qid'])}, level {one['level']}):")
        yield Text(f"  {printable(one['query'])}", style="dim")
        yield Text("  ").append_text(_marked(one["query"], one["negative"]))


def _marked(query: str, negative: str) -> Text:
    """A negative with the words that depart from its query marked."""
    from shine.pages import marked

    words = [
        Text(printable(word), "bold yellow" if new else "") for word, new in marked(query, negative)
    ]
    return Text(" ").join(words) if words else Text("(no word)", style="dim")


def printable(text: str) -> str:
    """Text of a file that cannot steer the terminal; invisible characters are seen."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def negative_lines(row: "Row", wrong: Sequence[Sequence[str]]) -> list[Text]:
    """A query and its levels: what is masked, what stands there, and the verdict.

    Args:
        row: as a file of negatives has it.
        wrong: per level, what the row alone shows to be wrong with it.
    """
    title = f"{printable(row.qid)}, video {printable(row.vid)}"
    lines = [Text(title, style="dim"), Text(printable(row.query), style="bold")]
    for level, (negative, found) in enumerate(zip(row.negatives, wrong, strict=True)):
        says = "not judged by the file"
        if row.valid:
            says = "valid" if row.valid[level] else "invalid"
        if row.reasons and row.reasons[level]:
            says += f": {printable(row.reasons[level])}"
        source = printable(row.source_of(level))
        heading = Text(f"\nlevel {level + 1}", style="bold")
        lines.append(heading.append(f", {source}, {says}", style="not bold"))
        if row.masked:
            lines.append(Text(f"  {printable(row.masked[level])}", style="dim"))
        lines.append(Text("  ").append_text(_marked(row.query, negative)))
        lines += [Text(f"  ! {sentence}", style="red") for sentence in found]
    return lines


def _percent(figure: Mapping[str, float] | None) -> str:
    """The value of a figure; a dash where no query has one."""
    return "-" if figure is None else f"{100 * figure['value']:.1f}"
