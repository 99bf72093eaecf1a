"""What `shine data check`, `shine data convert` and `shine doctor` show on the screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.console import printable

_STYLES = {"refused": "bold red", "warning": "yellow", "note": "dim"}
_MARKS = {
    "ok": "green",
    "missing": "bold red",
    "mismatched": "bold red",
    "unknown": "yellow",
    "not needed": "dim",
}
_SHOWN = 3  # examples of a defect


def check_lines(report: Mapping[str, Any]) -> list[RenderableType]:
    """The report of `shine.data.check.check`: files, defects, what is done, and examples."""
    found = [*report["defects"], *map(_as_defect, report["overlaps"])]
    lines: list[RenderableType] = [_file_table(report["files"])]
    if found:
        lines.append(_defect_table(found))
        lines.append(Text("The first of each", style="bold"))
    for defect in found:
        if defect["examples"]:
            lines.append(Text(f"{defect['title']}:"))
            lines += [_example(example) for example in defect["examples"][:_SHOWN]]
    if features := report["features"]:
        lines += ["", *_feature_lines(features)]
    if refused := report["refused"]:
        lines.append(Text(f"\ndefects that are refused: {refused}", style="bold red"))
    else:
        lines.append(Text("\nnothing is refused", style="green"))
    return lines


def _file_table(files: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("file", overflow="fold")
    for heading in ("rows", "unusable", "videos", "queries", "moments"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file in files:
        name = Text(printable(Path(file["file"]).name))
        name.append(f"\n{printable(file['role'])}, {file['layout'] or 'unreadable'}", style="dim")
        counts = (file[name] for name in ("rows", "unusable", "videos", "queries", "moments"))
        table.add_row(name, *map(str, counts))
    return table


def _as_defect(overlap: Mapping[str, Any]) -> dict[str, Any]:
    """What two files share, as a row of the table of defects."""
    names = " and ".join(Path(file).name for file in overlap["files"])
    title = f"shared videos, shared (video, query) pairs: {overlap['pairs']}"
    if overlap["other_durations"]:
        title += f", videos of different durations: {overlap['other_durations']}"
    return {
        "count": overlap["videos"],
        "title": f"{title}; {names}",
        **{name: overlap[name] for name in ("severity", "action", "examples")},
        "files": {},
    }


def _defect_table(defects: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("what is wrong", ratio=3, overflow="fold")
    table.add_column("what is done", ratio=3, overflow="fold")
    for defect in defects:
        title = Text(printable(defect["title"]))
        if len(defect["files"]) > 1:
            shares = (f"{Path(file).name} {count}" for file, count in defect["files"].items())
            title.append("".join(f"\n{printable(share)}" for share in shares), style="dim")
        count = Text(str(defect["count"]), style=_STYLES[defect["severity"]])
        table.add_row(count, title, defect["action"])
    return table


def _example(example: Mapping[str, Any]) -> Text:
    place = ", ".join(filter(None, (Path(example["file"]).name, example["place"])))
    query = f", query {example['qid']}" if example["qid"] is not None else ""
    return Text("  " + printable(f"{place}{query}: {example['detail']}"), style="dim")


def _feature_lines(features: Mapping[str, Any]) -> list[RenderableType]:
    known = features["videos"] - features["missing"]
    found = Text(f"features of {known} of {features['videos']} videos in ", style="bold")
    lines: list[RenderableType] = [found.append(printable(features["place"]))]
    if spread := features["clip_seconds"]:
        lines.append(
            Text(
                f"  {spread['median']:.4g} s per clip (median; {spread['min']:.4g} to "
                f"{spread['max']:.4g}), stated {features['stated_clip_seconds']:g} s; "
                f"{len(features['deviating'])} videos deviate by more than a clip"
            )
        )
    return lines


def convert_lines(result: Mapping[str, Any], out: Path) -> list[RenderableType]:
    """What `shine.data.check.convert` wrote, and each row that it left out."""
    left_out = result["left_out"]
    lines: list[RenderableType] = [_example(example) for example in left_out]
    return [
        *lines,
        Text(
            f"{out}: {result['rows']} rows of {result['layout']}, {result['num_left_out']} left out"
        ),
    ]


def doctor_lines(findings: Sequence[Mapping[str, Any]], ready: bool) -> list[RenderableType]:
    """The findings of `shine.doctor`, what to do about those that are not ok, and the verdict."""
    lines: list[RenderableType] = []
    told = ""
    for finding in findings:
        head = Text(f"{finding['status']:<11}", style=_MARKS[finding["status"]])
        found = Text(printable(f"{finding['part']}: {finding['found']}"))
        lines.append(head.append_text(found))
        if finding["advice"] and finding["advice"] != told:
            lines.append(Text(f"{'':<11}{printable(finding['advice'])}", style="dim"))
        told = finding["advice"]
    verdict = "training could start" if ready else "training could not start"
    return [*lines, Text(f"\n{verdict}", style="green" if ready else "bold red")]
