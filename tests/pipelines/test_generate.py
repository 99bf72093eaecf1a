import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tagged import GRID, counted, plain

from pipelines.negatives import ProposeNegatives, TagVideos, generate, video_tables
from shine.config import Config, LlmConfig, NegativesConfig
from shine.data.annotations import (
    VideoIndex,
    normalized,
    read_annotations,
    to_record,
    write_jsonl,
)
from shine.errors import InputError
from shine.files import sha256
from shine.language.negatives import read_negatives
from shine.language.validation import overlap
from shine.language.words import Word

CHARADES = Path(os.environ.get("SHINE_SHARED", "../shared")) / (
    "data/charades_cg/charades_cg_gpt_train.jsonl"
)
SETTINGS = NegativesConfig().model_dump(mode="json")


def annotation_file(path, captions, per_video=3):
    """Videos of three captions, the captions of a video scattered over the file."""
    num_videos = max(1, len(captions) // per_video)
    rows = [
        {
            "qid": f"q{i}",
            "vid": f"v{i % num_videos}",
            "query": caption,
            "duration": 30.0,
            "relevant_windows": [[1.0, 9.0]],
        }
        for i, caption in enumerate(captions)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def videos(captions):
    """Tagged videos of three captions, as the second stage gets them."""
    rows = []
    for start in range(0, len(captions), 3):
        group = captions[start : start + 3]
        numbers = list(range(start, start + len(group)))
        words = [
            [{name: getattr(word, name) for name in word.__slots__} for word in caption]
            for caption in group
        ]
        rows.append(
            {
                "vid": f"v{start}",
                "rows": numbers,
                "qids": [f"q{n}" for n in numbers],
                "queries": [plain(caption) for caption in group],
                "words": words,
            }
        )
    return pa.Table.from_pylist(rows)


def test_a_query_is_tagged_alike_in_any_table():
    captions = [plain(words) for words in GRID[:12]]
    whole = pa.table({"vid": ["a", "b"], "queries": [captions[:6], captions[6:]]})
    tag = TagVideos("shine")
    together = tag(whole)["words"].to_pylist()
    apart = [tag(whole.slice(i, 1))["words"].to_pylist()[0] for i in range(2)]
    assert together == apart
    joined = ["".join(w["text"] + w["space"] for w in words) for v in together for words in v]
    assert joined == captions


@pytest.mark.parametrize("generator", ["corpus", "random"])
def test_results_do_not_depend_on_how_videos_are_dealt_to_workers(generator):
    settings = SETTINGS | {"generator": generator}
    table = videos(GRID)

    def worker():
        return ProposeNegatives(*counted(GRID), settings, "tagger 1")

    whole = worker()(table).to_pylist()
    one = worker()
    for size in (1, 7):
        starts = range(0, len(table), size)
        parts = [one(table.slice(start, size)).to_pylist() for start in reversed(starts)]
        rows = sorted((row for part in parts for row in part), key=lambda row: row["row"])
        assert rows == whole
    assert [row["row"] for row in whole] == list(range(len(GRID)))
    assert all(row["source"] == [generator] * 3 for row in whole)
    assert all(row["tagger"] == "tagger 1" and row["seed"] == 0 for row in whole)


def test_levels_are_recorded_with_their_masks_and_reasons():
    table = videos(GRID[:1])
    full = ProposeNegatives(*counted(GRID), SETTINGS, "t")(table).to_pylist()[0]
    assert full["masked_queries"] == [
        "the person <mask> a door on the table.",
        "the person <mask> a <mask> on the table.",
        "the person <mask> a <mask> on the <mask>.",
    ]
    assert full["valid"] == [True] * 3
    assert full["reasons"] == [""] * 3
    five = SETTINGS | {"ratios": [0.2, 0.4, 0.6, 0.8, 1.0]}
    longer = ProposeNegatives(*counted(GRID), five, "t")(table).to_pylist()[0]
    assert longer["valid"] == [True] * 5
    assert longer["masked_queries"][4].count("<mask>") == 5
    six = SETTINGS | {"ratios": [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]}
    short = ProposeNegatives(*counted(GRID), six, "t")(table).to_pylist()[0]
    assert short["valid"] == [True] * 5 + [False]
    assert short["reasons"][5] == "too few words to replace"


@pytest.mark.ray
def test_generate_writes_the_same_bytes_with_one_worker_and_with_two(ray_cluster, tmp_path):
    captions = [plain(words) for words in GRID]
    source = annotation_file(tmp_path / "train.jsonl", captions)
    seen = []
    outs = [tmp_path / "one" / "n.parquet", tmp_path / "two" / "n.parquet"]
    for workers, out in enumerate(outs, start=1):
        summary = generate(
            Config(),
            source=source,
            out=out,
            num_workers=workers,
            on_progress=lambda *step: seen.append(step),
        )
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert (len(GRID), len(GRID), "tagging") in seen
    assert seen[-1] == (len(GRID), len(GRID), "proposing")
    assert summary["rows"] == len(GRID)
    assert summary["levels"] == 3
    assert summary["sources"] == {"corpus": 3 * len(GRID)}
    assert summary["dollars"] == 0
    found = read_negatives(outs[1])
    assert list(found) == [f"q{i}" for i in range(len(GRID))]
    invalid = [sum(not n.valid[level] for n in found.values()) for level in range(3)]
    assert invalid == summary["invalid"]
    metadata = json.loads(pq.read_schema(outs[1]).metadata[b"shine"])
    vocabulary = json.loads((tmp_path / "two" / "n.vocabulary.json").read_text())
    assert metadata["vocabulary_sha256"] == vocabulary["sha256"] == summary["vocabulary_sha256"]
    assert metadata["source_sha256"] == sha256(source) == summary["source_sha256"]
    assert metadata["tagger"].startswith("shine ")
    told = {}
    for i, caption in enumerate(captions):
        told.setdefault(i % (len(GRID) // 3), set()).add(normalized(caption))
    for i, negatives in enumerate(found.values()):
        for query, valid in zip(negatives.queries, negatives.valid, strict=True):
            assert not valid or normalized(query) not in told[i % (len(GRID) // 3)]


def test_counts_of_parts_add_up_to_those_of_the_whole():
    captions = [plain(words) for words in GRID[:12]]
    whole = pa.table(
        {"vid": ["a", "b", "c"], "queries": [captions[:4], captions[4:5], captions[5:]]}
    )
    tag = TagVideos("shine")

    def counts(table):
        told = json.loads(tag(table)["counts"][0].as_py())
        return [Counter({tuple(key): n for *key, n in rows}) for rows in told]

    parts = [counts(whole.slice(i, 1)) for i in range(3)]
    words, contexts = (sum(counters, Counter()) for counters in zip(*parts, strict=True))
    assert [words, contexts] == counts(whole)
    assert words["VERB", "VBZ", "opens", "open"] > 0


@pytest.mark.ray
def test_the_fields_jsonl_is_written_where_the_name_asks_for_it(ray_cluster, tmp_path):
    source = annotation_file(tmp_path / "train.jsonl", [plain(words) for words in GRID])
    generate(Config(), source=source, out=tmp_path / "n.parquet")
    generate(Config(), source=source, out=tmp_path / "n.jsonl")
    assert read_negatives(tmp_path / "n.jsonl") == read_negatives(tmp_path / "n.parquet")
    first = json.loads((tmp_path / "n.jsonl").read_text().splitlines()[0])
    assert first["relevant_windows"] == [[1.0, 9.0]]


@pytest.mark.ray
def test_negatives_of_a_file_are_judged_and_mended(ray_cluster, tmp_path):
    captions = [plain(words) for words in GRID]
    source = annotation_file(tmp_path / "train.jsonl", captions)
    generate(Config(), source=source, out=tmp_path / "mine.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    lines[0]["recomposed_queries"][0] = lines[0]["query"]  # no negative at all
    del lines[1]["recomposed_queries"]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("\n".join(map(json.dumps, lines)))
    config = Config(negatives=NegativesConfig(generator="file", file=str(theirs)))
    summary = generate(config, source=source, out=tmp_path / "n.parquet")
    assert summary["sources"] == {"corpus": 4, "file": 3 * len(GRID) - 4}
    assert summary["invalid"] == [0, 0, 0]
    rows = pq.read_table(tmp_path / "n.parquet").to_pylist()
    assert rows[0]["source"] == ["corpus", "file", "file"]
    assert rows[0]["refused"][0] == "a slot is unchanged, equal to the query"
    assert rows[0]["attempts"] == [2, 1, 1]
    assert rows[1]["source"] == ["corpus"] * 3
    assert rows[2]["recomposed_queries"] == lines[2]["recomposed_queries"]


@pytest.mark.ray
def test_one_caption_alone_is_no_error(ray_cluster, tmp_path):
    source = annotation_file(tmp_path / "train.jsonl", ["a person opens a door."])
    out = tmp_path / "n.parquet"
    summary = generate(Config(), source=source, out=out)
    assert summary["invalid"] == [1, 1, 1]
    assert read_negatives(out)["q0"].valid == (False,) * 3


def test_wrong_input_is_told_before_a_cluster_starts(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    out = tmp_path / "n.parquet"
    with pytest.raises(InputError, match="the file is empty"):
        generate(Config(), source=tmp_path / "empty.jsonl", out=out)
    source = annotation_file(tmp_path / "train.jsonl", ["a person sits."])
    with pytest.raises(InputError, match=r"name a file \.parquet or \.jsonl"):
        generate(Config(), source=source, out=tmp_path / "n.csv")
    with pytest.raises(InputError, match="cannot write negatives"):
        generate(Config(), source=source, out=source / "n.parquet")
    with pytest.raises(InputError, match="is read to make negatives and would be overwritten"):
        generate(Config(), source=source, out=source)
    published = Config(negatives=NegativesConfig(generator="file", file=str(out)))
    with pytest.raises(InputError, match="is read to make negatives and would be overwritten"):
        generate(published, source=source, out=out)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InputError, match="folder.parquet: it is a folder"):
        generate(Config(), source=source, out=tmp_path / "folder.parquet")
    with pytest.raises(InputError, match="--batch asks a language model; .* is corpus"):
        generate(Config(), source=source, out=out, batch=True)
    llm = LlmConfig(model="m", prompt="none")
    with pytest.raises(InputError, match="negatives.llm.prompt is 'none'"):
        generate(
            Config(negatives=NegativesConfig(generator="llm", llm=llm)), source=source, out=out
        )
    missing = Config(negatives=NegativesConfig(tagger="en_core_web_none"))
    with pytest.raises(InputError, match="en_core_web_none"):
        generate(missing, source=source, out=out)
    assert not out.exists()


@pytest.mark.skipif(not CHARADES.is_file(), reason="needs the published Charades-CG files")
def test_real_captions_get_negatives_free_of_the_published_defects(tmp_path):
    annotations = read_annotations(CHARADES)[:2000]
    part = tmp_path / "part.jsonl"
    write_jsonl(part, map(to_record, annotations))
    tag = TagVideos("shine")
    tables = [tag(table) for table in video_tables(VideoIndex(part))]
    captions = [
        tuple(Word(**word) for word in caption)
        for table in tables
        for video in table["words"].to_pylist()
        for caption in video
    ]
    worker = ProposeNegatives(*counted(captions), SETTINGS, "shine")
    found = {row["qid"]: row for table in tables for row in worker(table).to_pylist()}
    told = {}
    for a in annotations:
        told.setdefault(a.vid, set()).add(normalized(a.query))
    words = {word for texts in told.values() for text in texts for word in text.split()}

    assert len(found) == 2000
    reasons = [Counter(row["reasons"][level] for row in found.values()) for level in range(3)]
    # Some captions hold two words that can be replaced ("person eats it"): no third level.
    short = reasons[2].pop("too few words to replace")
    assert short <= 120
    assert [sum(r.values()) - r[""] for r in reasons] <= [5, 10, 15]

    faults = Counter()
    for a in annotations:
        row = found[a.qid]
        known = [normalized(a.query)]
        for query, valid in zip(row["recomposed_queries"], row["valid"], strict=True):
            if valid:
                known.append(normalized(query))
        faults["nearer"] += any(
            overlap(known[0], above) >= overlap(known[0], below) for below, above in pairwise(known)
        )
        for text in known[1:]:
            faults["true"] += text in told[a.vid]
            faults["length"] += len(text.split()) != len(known[0].split())
            faults["leak"] += not words.issuperset(text.split())
        faults["repeated"] += len(known) - len(set(known))
    assert not any(faults.values()), faults
