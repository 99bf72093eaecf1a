"""The sentences judged by hand: their file is whole, and the documents say what it says."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LABELS = ROOT / "benchmarks" / "labels"
VERDICTS = ("same", "different", "nonsense")
DRAWN = {"corpus": 200, "published": 200, "random": 100}


def rows():
    return [json.loads(line) for line in (LABELS / "verdicts.jsonl").read_text().splitlines()]


def interval(hits, number, z=1.96):
    """Wilson's 95 % interval of a share."""
    share, scale = hits / number, 1 + z * z / number
    center = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return (center - half) / scale, (center + half) / scale


def cell(hits, number):
    low, high = interval(hits, number)
    return f"{hits / number:.1%} ({low:.1%}-{high:.1%})".replace("%", " %")


def test_every_drawn_word_has_one_verdict_and_no_caption():
    found = rows()
    assert Counter(row["source"] for row in found) == DRAWN
    for row in found:
        assert set(row) == {"source", "qid", "level", "slot", "verdict"}
        assert row["verdict"] in VERDICTS
        assert row["level"] in (0, 1, 2)
        assert isinstance(row["slot"], int)
        assert row["slot"] >= 0
        assert isinstance(row["qid"], str)
        assert " " not in row["qid"]
    assert len({(row["source"], row["qid"], row["level"]) for row in found}) == len(found)


def test_the_note_names_the_seed_and_the_files_that_were_drawn_from():
    note = json.loads((LABELS / "verdicts.json").read_text())
    assert isinstance(note["seed"], int)
    assert set(note["negatives_sha256"]) == set(DRAWN)
    assert all(len(checksum) == 64 for checksum in note["negatives_sha256"].values())


def test_the_interval_is_wilsons():
    assert interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_the_documents_give_the_shares_of_the_labels():
    text = (ROOT / "docs" / "negatives.md").read_text()
    for source in DRAWN:
        mine = [row for row in rows() if row["source"] == source]
        counts = Counter(row["verdict"] for row in mine)
        line = " | ".join(cell(counts[verdict], len(mine)) for verdict in VERDICTS)
        levels = [[row["verdict"] for row in mine if row["level"] == level] for level in range(3)]
        by_level = ", ".join(f"{level.count('same')}/{len(level)}" for level in levels)
        name = "published" if source == "published" else f"`{source}`"
        assert f"| {name} | {len(mine)} | {line} | {by_level} |" in text
