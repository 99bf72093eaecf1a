"""What an audit of hard negatives found, as tables that a terminal and a page can show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Audit = Mapping[str, Any]  # what `shine.language.audit.audit` returns


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a place of a table; with the share that it is of all, where that says more."""

    text: str
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its name and a cell for each heading."""

    name: str
    cells: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Group:
    """Lines under a heading of their own, which may be empty."""

    name: str
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Table:
    """A table with one sentence on how to read it."""

    title: str
    note: str
    headings: Sequence[str]
    groups: Sequence[Group]


def labels(audits: Sequence[Audit]) -> list[str]:
    """A short name for each file, no two alike."""
    paths = [Path(audit["file"]) for audit in audits]
    stems = [path.stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else str(path)
        for stem, path in zip(stems, paths, strict=True)
    ]


def audit_tables(audits: Sequence[Audit]) -> list[Table]:
    """Everything that was counted, files side by side.

    Args:
        audits: of one or more files.
    """
    tables = [_defects(audits), _levels(audits)]
    if any(audit["tests"] for audit in audits):
        tables.append(_tests(audits))
    if any(audit["plausibility"] for audit in audits):
        tables.append(_plausibility(audits))
    if any(audit["invalid"] for audit in audits):
        tables.append(_reasons(audits))
    return tables


def audit_notes(audits: Sequence[Audit]) -> list[str]:
    """How it was counted, and what is missing, in sentences."""
    notes = [audits[0]["rule"]]
    told: dict[str, list[str]] = {}
    for name, audit in zip(labels(audits), audits, strict=True):
        training = audit["training"]
        where = "its own queries" if audit["train"] is None else ", ".join(audit["train"])
        sentence = (
            f"the training captions are {where}: {training['captions']:,}, of which "
            f"{training['distinct_captions']:,} are distinct, of {training['words']:,} words."
        )
        told.setdefault(sentence, []).append(name)
    notes += [f"{', '.join(names)}: {sentence}" for sentence, names in told.items()]
    for name, audit in zip(labels(audits), audits, strict=True):
        if missing := audit["plausibility_missing"]:
            notes.append(f"{name}: plausibility was not judged: {missing}.")
        if (judged := audit["plausibility"]) and judged["rows"] < audit["rows"]:
            notes.append(
                f"{name}: plausibility is of a sample of {judged['rows']:,} of its "
                f"{audit['rows']:,} rows."
            )
        if len(audit["rows_by_levels"]) > 1:
            sizes = ", ".join(f"{n} ({rows:,})" for n, rows in audit["rows_by_levels"].items())
            notes.append(f"{name}: its rows have different numbers of levels (rows): {sizes}.")
    notes += dict.fromkeys(audit["pair_rule"] for audit in audits if audit["pair_rule"])
    notes += dict.fromkeys(j["model"] for audit in audits if (j := audit["plausibility"]))
    return notes


def audit_examples(audit: Audit) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Each defect that occurs, in words, with its examples, in the order of the tables."""
    found = audit["examples"]
    texts = {defect["key"]: defect["text"] for defect in audit["defects"]}
    keys = [*filter(found.__contains__, texts), *(key for key in found if key not in texts)]
    return [(texts.get(key, key), found[key]) for key in keys]


def _defects(audits: Sequence[Audit]) -> Table:
    one = audits[0] if len(audits) == 1 else None
    headings = labels(audits)
    sizes = [
        Line("rows", [Cell(f"{audit['rows']:,}") for audit in audits]),
        Line("negatives that take part", [Cell(f"{audit['negatives']:,}") for audit in audits]),
        Line("marked invalid by the file", [_count(audit["invalid"]) for audit in audits]),
    ]
    lines: dict[str, list[Line]] = {"negatives": [], "rows": []}
    for number, defect in enumerate(audits[0]["defects"]):
        found = [audit["defects"][number] for audit in audits]
        cells = [_count(entry["count"], entry["share"]) for entry in found]
        if one is not None:
            levels = defect["by_level"] or [None] * len(one["levels"])
            cells += [_count(count, dash="") for count in levels]
        lines[defect["of"]].append(Line(defect["text"], cells))
    if one is not None:
        headings = ["count", *(f"level {n + 1}" for n in range(len(one["levels"])))]
        levels = one["levels"]
        judged = one["invalid"] is not None
        by_level = [
            [Cell("")] * len(levels),
            [_count(level["negatives"]) for level in levels],
            [_count(level["invalid"] if judged else None) for level in levels],
        ]
        sizes = [
            Line(line.name, [*line.cells, *cells])
            for line, cells in zip(sizes, by_level, strict=True)
        ]
    words = [Cell(f"{audit['new_words']:,}") for audit in audits]
    if one is not None:
        words += [Cell("")] * len(one["levels"])
    return Table(
        "Defects",
        "Counts, and the share of the negatives that take part, or of the rows.",
        headings,
        [
            Group("Size", sizes),
            Group("Negatives", lines["negatives"]),
            Group("Rows", lines["rows"]),
            Group("Words", [Line("words shown that no training caption has", words)]),
        ],
    )


def _levels(audits: Sequence[Audit]) -> Table:
    groups = []
    for name, audit in zip(labels(audits), audits, strict=True):
        lines = [
            Line(
                f"level {number}",
                [
                    Cell(f"{level['negatives']:,}"),
                    Cell(_decimal(level["changed"]["mean"], 2)),
                    Cell(" to ".join(_decimal(level["changed"][end], 2) for end in ("p5", "p95"))),
                    Cell(_decimal(level["overlap"], 2)),
                ],
            )
            for number, level in enumerate(audit["levels"], start=1)
        ]
        groups.append(Group(name, lines))
    return Table(
        "Levels",
        "Share of the query's words that a level changes, mean and percentiles, and the words "
        "both have over all words (Jaccard).",
        ("negatives", "changed", "5th to 95th", "overlap"),
        groups,
    )


_TEST_LINES = (
    ("negatives equal to a query", "equal_negatives"),
    ("queries that a negative equals (distinct)", "equal_queries"),
    ("words unseen in training", "unseen_words"),
    ("of these, shown by a negative", "shown_words"),
    ("queries with a shown word", "queries_with_shown_word"),
    ("verb-noun pairs unseen in training", "unseen_pairs"),
    ("of these, shown by a negative", "shown_pairs"),
    ("negatives that show one", "negatives_with_pair"),
    ("queries with an unseen pair", "queries_with_unseen_pair"),
    ("queries with a shown pair", "queries_with_shown_pair"),
)


def _tests(audits: Sequence[Audit]) -> Table:
    groups = []
    for number, test in enumerate(audits[0]["tests"]):
        lines = [
            Line(text, [_count(audit["tests"][number][key]) for audit in audits])
            for text, key in _TEST_LINES
            if key in test
        ]
        size = f"{test['queries']:,} queries, {test['distinct_queries']:,} distinct"
        groups.append(Group(f"{Path(test['file']).stem}: {size}", lines))
    return Table(
        "What negatives show of test queries",
        "A word or a pair that only test queries should have is new no longer once a negative "
        "showed it to the model.",
        labels(audits),
        groups,
    )


def _plausibility(audits: Sequence[Audit]) -> Table:
    groups: list[Group] = []
    ends: dict[str, tuple[Line, Line]] = {}
    for name, audit in zip(labels(audits), audits, strict=True):
        if (found := audit["plausibility"]) is None:
            continue
        true = _judged("true captions", found["true"])
        shuffled = _judged("their words shuffled", found["shuffled"])
        ends.setdefault(f"{true}{shuffled}", (true, shuffled))
        lines = [
            _judged(f"level {entry['level']}{_made_by(entry)}", entry)
            for entry in found["negatives"]
        ]
        groups.append(Group(name, lines))
    bounds = [Group("For comparison", list(pair)) for pair in ends.values()]
    return Table(
        "Plausibility",
        "Mean log-probability per word in nats, by networks that know other videos alone; the "
        "share of sentences at or above the 5th and the 25th percentile of true captions; the "
        "mean of the new words alone, of those among them that the networks know, and of the old "
        "words that they replace; the share of words that the networks do not know.",
        ("per word", "> 5th", "> 25th", "new", "known", "old", "unknown"),
        [*bounds, *groups],
    )


def _made_by(entry: Mapping[str, Any]) -> str:
    return "" if entry["source"] == "file" else f", {entry['source']}"


def _judged(name: str, entry: Mapping[str, Any]) -> Line:
    shares = [entry["above_p5"], entry["above_p25"]]
    return Line(
        name,
        [
            Cell(_decimal(entry["per_word"], 2)),
            *(Cell(_percent(share), share) for share in shares),
            *(
                Cell(_decimal(entry.get(key), 2))
                for key in ("changed_words", "changed_known_words", "words_replaced")
            ),
            Cell(_percent(entry["unknown_words"])),
        ],
    )


def _reasons(audits: Sequence[Audit]) -> Table:
    names = dict.fromkeys(reason for audit in audits for reason in audit["reasons"])
    lines = [Line(name, [_count(a["reasons"].get(name, 0)) for a in audits]) for name in names]
    return Table(
        "Why levels are invalid",
        "As the files say; these levels take no part in a training, nor in the counts above.",
        labels(audits),
        [Group("", lines)],
    )


def _count(count: int | None, share: float | None = None, dash: str = "–") -> Cell:
    return Cell(dash) if count is None else Cell(f"{count:,}", share)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _decimal(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")
