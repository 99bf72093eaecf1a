import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shine.data.annotations import MASK, read_annotations
from shine.data.grammar import (
    ADJECTIVES,
    ADVERBS,
    NOUNS,
    PLACES,
    PREPOSITIONS,
    ROLES,
    VERBS,
    Action,
    Wording,
    lexicon,
    sentence,
)
from shine.data.mixture import clip_coverage, num_clips, read_world, world_checksum
from shine.data.planted import NEGATIVES, TRUTH, Painter, WorldConfig, make_world
from shine.errors import InputError

CONFIG = WorldConfig(seed=3, train_rows=400, validation_rows=40, test_rows=100)
SMALL = CONFIG.model_copy(update={"train_rows": 300, "validation_rows": 6, "test_rows": 6})
TESTS = ("test_trivial.jsonl", "novel_composition.jsonl", "novel_word.jsonl")
AUDITED = ("val_trivial.jsonl", "val_composition.jsonl", *TESTS)
MEANING = {
    surface: (role, concept)
    for role, words in lexicon().items()
    for concept, surface in words
    if not (role == "verb" and concept == surface)  # bare verbs occur in no sentence
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    make_world(CONFIG, out)
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def word_table(world: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(world / "word_vectors.parquet")
    vectors = np.stack(table["vector"].to_numpy())
    return dict(zip(table["word"].to_pylist(), vectors, strict=True))


def parse(query: str) -> Action:
    """What a sentence states, read from its words alone."""
    assert query.endswith(".")
    found = dict(MEANING[word] for word in query[:-1].split() if word in MEANING)
    return Action(**found)


def truth(world: Path) -> dict[str, list[tuple[Action, list[float]]]]:
    return {
        video["vid"]: [
            (Action(**{role: event.get(role) for role in ROLES}), event["moment"])
            for event in video["events"]
        ]
        for video in lines(world / TRUTH)
    }


def words(queries: list[str]) -> set[str]:
    return {word for query in queries for word in parse(query).concepts().values()}


def test_the_grammar_is_rich_enough():
    assert len(VERBS) >= 20
    assert len(NOUNS) >= 30
    assert len(ADJECTIVES) >= 8
    assert len(PREPOSITIONS) >= 6
    assert len(ADVERBS) >= 6


def test_no_word_has_two_meanings():
    surfaces = Counter(surface for entries in lexicon().values() for _, surface in entries)
    assert max(surfaces.values()) == 1
    assert not set(NOUNS) & set(PLACES)


def test_files_are_what_the_field_reads(world):
    rows = {"train.jsonl": 400, "val_trivial.jsonl": 40, "val_composition.jsonl": 40}
    for name in ("train.jsonl", *AUDITED):
        annotations = read_annotations(world / name)
        assert len(annotations) == rows.get(name, 100)
        for row in annotations:
            assert row.query == row.query.lower()
            ((start, end),) = row.moments
            assert 0 <= start < end <= row.duration_seconds
            assert CONFIG.min_moment - 0.02 <= end - start <= CONFIG.max_moment + 0.02
            clips = np.load(world / "features" / f"{row.vid}.npy", mmap_mode="r")
            assert clips.dtype == np.float32
            assert clips.shape == (int(np.ceil(row.duration_seconds)), CONFIG.video_width)


def test_novel_compositions_have_known_words_and_unknown_pairs(world):
    training = [row["query"] for row in lines(world / "train.jsonl")]
    pairs = {parse(query).pair for query in training}
    for name in ("novel_composition.jsonl", "val_composition.jsonl"):
        queries = [row["query"] for row in lines(world / name)]
        assert words(queries) <= words(training)
        assert not {parse(query).pair for query in queries} & pairs


def test_trivial_splits_have_known_pairs(world):
    pairs = {parse(row["query"]).pair for row in lines(world / "train.jsonl")}
    for name in ("val_trivial.jsonl", "test_trivial.jsonl"):
        assert {parse(row["query"]).pair for row in lines(world / name)} <= pairs


def test_validation_and_novel_pairs_are_apart(world):
    validation, novel = (
        {parse(row["query"]).pair for row in lines(world / name)}
        for name in ("val_composition.jsonl", "novel_composition.jsonl")
    )
    assert validation
    assert novel
    assert not validation & novel


def test_every_novel_word_query_has_a_word_that_no_training_query_has(world):
    known = words([row["query"] for row in lines(world / "train.jsonl")])
    novel = [words([row["query"]]) - known for row in lines(world / "novel_word.jsonl")]
    assert all(novel)
    manifest = json.loads((world / "world.json").read_text())
    assert set().union(*novel) <= set(manifest["novel_words"])
    roles = {role for role, w in MEANING.values() if w in set().union(*novel)}
    assert {"verb", "noun", "adjective"} <= roles


def test_training_videos_never_show_what_is_held_out(world):
    manifest = json.loads((world / "world.json").read_text())
    held_out = {
        tuple(pair)
        for name in ("val_composition", "novel_composition")
        for pair in manifest["pairs"][name]
    }
    novel = set(manifest["novel_words"])
    events = truth(world)
    for vid in {row["vid"] for row in lines(world / "train.jsonl")}:
        for action, _ in events[vid]:
            assert action.pair not in held_out
            assert not novel & set(action.concepts().values())


def test_splits_share_no_video(world):
    vids = [{row["vid"] for row in lines(world / name)} for name in ("train.jsonl", *AUDITED)]
    assert len(set().union(*vids)) == sum(map(len, vids))


def test_every_query_is_true_of_its_moment_alone(world):
    events = truth(world)
    for name in ("train.jsonl", *AUDITED):
        for row in lines(world / name):
            stated = parse(row["query"])
            moments = [moment for action, moment in events[row["vid"]] if stated.true_of(action)]
            assert moments == row["relevant_windows"], row


def test_outside_training_each_video_has_one_query(world):
    for name in AUDITED:
        vids = [row["vid"] for row in lines(world / name)]
        assert len(set(vids)) == len(vids)
    training = Counter(row["vid"] for row in lines(world / "train.jsonl"))
    assert max(training.values()) == CONFIG.train_queries_per_video


def test_distractors_share_words_with_queries(world):
    events = truth(world)
    rows = lines(world / "test_trivial.jsonl")
    shares = Counter()
    for row in rows:
        stated = parse(row["query"])
        others = {a.pair for a, moment in events[row["vid"]] if [moment] != row["relevant_windows"]}
        shares["verb"] += any(v == stated.verb and n != stated.noun for v, n in others)
        shares["noun"] += any(n == stated.noun and v != stated.verb for v, n in others)
        shares["pair"] += stated.pair in others
    assert shares["verb"] > 0.3 * len(rows)
    assert shares["noun"] > 0.3 * len(rows)
    assert shares["pair"] > 0.1 * len(rows)


def test_moments_are_often_moved_apart_but_may_overlap(world):
    overlapping = 0
    for events in truth(world).values():
        for i, (_, (a, b)) in enumerate(events):
            for _, (c, d) in events[:i]:
                shared = min(b, d) - max(a, c)
                overlapping += shared > 0
                assert shared <= CONFIG.max_overlap * min(b - a, d - c) + 0.02
    assert overlapping


def test_grammar_negatives_are_false_well_formed_and_nested(world):
    events = truth(world)
    known = words([row["query"] for row in lines(world / "train.jsonl")])
    queries = {row["qid"]: row for name in AUDITED for row in lines(world / name)}
    negatives = lines(world / NEGATIVES)
    assert {row["qid"] for row in negatives} == set(queries)
    for row in negatives:
        assert row["source"] == "grammar"
        assert row["query"] == queries[row["qid"]]["query"]
        assert len({row["query"], *row["recomposed_queries"]}) == 4
        stated = parse(row["query"]).concepts()
        for level, text in enumerate(row["recomposed_queries"]):
            altered = parse(text)
            assert not any(altered.true_of(action) for action, _ in events[row["vid"]])
            changed = {r for r, w in altered.concepts().items() if stated[r] != w}
            assert altered.concepts().keys() == stated.keys()
            assert changed == ({"verb"}, {"verb", "noun"}, set(stated))[level]
            assert {altered.concepts()[role] for role in changed} <= known
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
            masked = row["masked_queries"][level].rstrip(".").split()
            assert masked.count(MASK) == len(changed)
            original = row["query"].rstrip(".").split()
            assert all(m in (w, MASK) for m, w in zip(masked, original, strict=True))


def test_the_word_table_answers_for_every_word(world):
    table = word_table(world)
    texts = [row["query"] for name in ("train.jsonl", *AUDITED) for row in lines(world / name)]
    texts += [text for row in lines(world / NEGATIVES) for text in row["recomposed_queries"]]
    assert {word for text in texts for word in text.rstrip(".").split()} <= set(table)
    assert {surface for entries in lexicon().values() for _, surface in entries} <= set(table)
    assert {len(vector) for vector in table.values()} == {CONFIG.text_width}


def test_forms_of_a_verb_are_closer_than_other_verbs(world):
    table = word_table(world)
    bare = np.stack([table[verb] for verb in VERBS])
    present = np.stack([table[verb.present] for verb in VERBS.values()])
    nearest = np.linalg.norm(bare[:, None] - present[None], axis=-1).argmin(axis=1)
    assert (nearest == np.arange(len(VERBS))).all()


def test_clips_show_their_events(world):
    painter = Painter(CONFIG)
    margins = []
    for vid, events in truth(world).items():
        clips = np.load(world / "features" / f"{vid}.npy")
        for action, moment in events:
            appearance = painter.appearance(action)
            scores = clips @ appearance / np.linalg.norm(appearance)
            share = clip_coverage(np.array([moment]), float(len(clips)), CONFIG.clip_seconds)[0]
            margins.append(scores[share == 1].mean() - scores[share == 0].mean())
    assert np.mean(np.array(margins) > 0) > 0.98


def test_unseen_words_can_be_grounded(world):
    """A linear map from text to video, fitted on seen words, finds the unseen ones.

    Everything comes from the files: the video view of a word is its regression coefficient.
    """
    index = {concept: i for i, (_, concept) in enumerate(sorted(set(MEANING.values())))}
    design, clips = [], []
    for vid, events in truth(world).items():
        features = np.load(world / "features" / f"{vid}.npy").astype(np.float64)
        shown = np.zeros((len(features), len(index)))
        moments = np.array([moment for _, moment in events])
        shares = clip_coverage(moments, float(len(features)), CONFIG.clip_seconds)
        for (action, _), share in zip(events, shares, strict=True):
            shown[:, [index[word] for word in action.concepts().values()]] += share[:, None]
        design.append(shown - shown.mean(axis=0))  # the scene falls out
        clips.append(features - features.mean(axis=0))
    video = np.linalg.lstsq(np.concatenate(design), np.concatenate(clips), rcond=None)[0]
    table = word_table(world)
    text = np.stack([table[concept] for concept in index])

    novel = json.loads((world / "world.json").read_text())["novel_words"]
    unseen = np.array([index[word] for word in novel])
    seen = np.setdiff1d(np.arange(len(index)), unseen)
    x = text[seen]
    ridge = np.linalg.solve(x.T @ x + 0.3 * np.eye(x.shape[1]), x.T @ video[seen])
    guess = text[unseen] @ ridge
    guess /= np.linalg.norm(guess, axis=1, keepdims=True)
    scores = guess @ (video / np.linalg.norm(video, axis=1, keepdims=True)).T  # [unseen, word]
    rank = (scores > scores[np.arange(len(unseen)), unseen][:, None]).sum(axis=1)
    assert np.median(rank) < 0.1 * len(index)  # chance: half
    among_unseen = scores[:, unseen].argmax(axis=1) == np.arange(len(unseen))
    assert among_unseen.mean() >= 0.5  # chance: a tenth


def test_a_world_is_a_function_of_its_configuration(tmp_path):
    make_world(SMALL, tmp_path / "again")
    make_world(SMALL.model_copy(update={"seed": 4}), tmp_path / "other")
    make_world(SMALL.model_copy(update={"noise": 1.21}), tmp_path / "noisier")
    make_world(SMALL, tmp_path / "small")
    checksums = [world_checksum(tmp_path / name) for name in ("other", "noisier", "small")]
    assert world_checksum(tmp_path / "again") == checksums[-1]
    assert len(set(checksums)) == 3


def test_the_checksum_sees_a_changed_feature(tmp_path):
    make_world(SMALL, tmp_path)
    before = world_checksum(tmp_path)
    path = next((tmp_path / "features").glob("*.npy"))
    clips = np.load(path)
    clips[0, 0] += 0.01
    np.save(path, clips)
    assert world_checksum(tmp_path) != before


def test_more_rows_of_one_split_leave_all_others_as_they_were(tmp_path):
    make_world(SMALL, tmp_path / "few")
    make_world(SMALL.model_copy(update={"test_rows": 9}), tmp_path / "many")
    for name in ("train.jsonl", "val_trivial.jsonl", "val_composition.jsonl"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "few" / name).read_bytes()
    for name in TESTS:
        assert lines(tmp_path / "many" / name)[:6] == lines(tmp_path / "few" / name)
    for path in (tmp_path / "few" / "features").iterdir():
        assert (tmp_path / "many" / "features" / path.name).read_bytes() == path.read_bytes()


def test_a_world_replaces_a_world_and_nothing_else(tmp_path):
    make_world(SMALL, tmp_path)
    smaller = make_world(SMALL.model_copy(update={"test_rows": 4}), tmp_path)
    assert len(list((tmp_path / "features").iterdir())) == sum(smaller["videos"].values())
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("words")
    with pytest.raises(InputError, match="holds other files"):
        make_world(SMALL, other)
    assert [path.name for path in other.iterdir()] == ["chapter.txt"]


def test_a_world_leaves_notes_beside_it_alone(tmp_path):
    make_world(SMALL, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "old.jsonl").write_text("")
    manifest = json.loads((tmp_path / "world.json").read_text())
    manifest["checksums"]["old.jsonl"] = ""  # as if an earlier world had written it
    (tmp_path / "world.json").write_text(json.dumps(manifest))
    make_world(SMALL, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "old.jsonl").exists()


def interrupted(*_, **__):
    raise KeyboardInterrupt


def stop_after(monkeypatch, saves: int) -> None:
    """So many feature files can be written; at the next one the process is interrupted."""
    save, left = np.save, iter(range(saves))

    def stopping(path, clips):
        if next(left, None) is None:
            raise KeyboardInterrupt
        save(path, clips)

    monkeypatch.setattr(np, "save", stopping)


@pytest.mark.parametrize("saves", [0, 7])
@pytest.mark.parametrize("earlier", [None, 4], ids=["new", "again"])
def test_a_world_that_was_stopped_is_refused_until_it_is_made_again(
    tmp_path, monkeypatch, saves, earlier
):
    make_world(SMALL, tmp_path / "calm")
    world = tmp_path / "world"
    if earlier is not None:
        make_world(SMALL.model_copy(update={"seed": earlier}), world)
        (world / "store").mkdir()
        (world / "store" / "manifest.json").write_text("packed")
        (world / "negatives.parquet").write_text("generated")
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(KeyboardInterrupt):
            make_world(SMALL, world)
    for read in (read_world, world_checksum):
        with pytest.raises(InputError, match="is unfinished: its making was stopped"):
            read(world)
    manifest = make_world(SMALL, world)
    assert manifest == read_world(world) == read_world(tmp_path / "calm")
    assert world_checksum(world) == world_checksum(tmp_path / "calm")
    if earlier is not None:
        assert (world / "store" / "manifest.json").read_text() == "packed"
        assert (world / "negatives.parquet").read_text() == "generated"


def test_files_of_an_earlier_world_are_known_after_a_stop(tmp_path, monkeypatch):
    """The new world has no such file; the folder must not keep it for that."""
    make_world(SMALL, tmp_path)
    manifest = json.loads((tmp_path / "world.json").read_text())
    manifest["checksums"]["old.jsonl"] = ""
    (tmp_path / "world.json").write_text(json.dumps(manifest))
    (tmp_path / "old.jsonl").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_world(SMALL, tmp_path)
    make_world(SMALL, tmp_path)
    assert not (tmp_path / "old.jsonl").exists()


def test_what_is_no_world_is_told_from_one(tmp_path):
    with pytest.raises(InputError, match="cannot read the manifest"):
        read_world(tmp_path)
    for content in ("", "[]", '{"simulated": "x"}'):
        (tmp_path / "world.json").write_text(content)
        with pytest.raises(InputError, match="expected what `shine world make`"):
            read_world(tmp_path)


def test_too_few_training_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="train_rows: 20 training queries are too few"):
        make_world(SMALL.model_copy(update={"train_rows": 20}), tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_events": 5, "max_events": 3}, "min_events must not exceed max_events"),
        ({"concept_width": 65}, "concept_width must not exceed"),
        ({"min_moment": 9.0}, "at most half of min_duration"),
        ({"novel_verbs": 20}, "at most half of the 26 verbs"),
        ({"novel_pair_share": 0.3, "validation_pair_share": 0.3}, "must leave half"),
    ],
)
def test_impossible_worlds_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        WorldConfig(**values)


def test_a_sentence_says_every_part_in_order():
    action = Action("open", "umbrella", "red", "near", "window", "slowly")
    told = Wording("a woman", "progressive", ("a", "the"), False)
    assert sentence(action, told) == "a woman is opening a red umbrella near the window slowly."
    first = Wording("person", "present", ("a", "a"), True)
    assert sentence(Action("open", "umbrella"), first) == "person opens an umbrella."
    assert sentence(action, first, ["verb", "noun"]) == (
        "person slowly <mask> a red <mask> near a window."
    )


def test_less_is_true_of_more():
    full = Action("open", "box", "red", "near", "window", "slowly")
    assert Action("open", "box", adverb="slowly").true_of(full)
    assert not full.true_of(Action("open", "box", adverb="slowly"))
    assert not Action("open", "box", place="door", preposition="near").true_of(full)


@given(
    duration=st.floats(0.3, 30),
    clip_seconds=st.sampled_from([0.5, 1.0, 2.0]),
    ends=st.tuples(st.floats(0, 35), st.floats(0, 35)).map(sorted),
)
def test_coverage_is_the_filled_share_of_each_clip(duration, clip_seconds, ends):
    start, end = ends
    coverage = clip_coverage(np.array([[start, end]]), duration, clip_seconds)
    assert coverage.shape == (1, num_clips(duration, clip_seconds))
    for i, share in enumerate(coverage[0]):
        left, right = i * clip_seconds, min((i + 1) * clip_seconds, duration)
        expected = max(min(end, right) - max(start, left), 0.0)
        assert 0 <= share <= 1 + 1e-9
        assert abs(share * (right - left) - expected) < 1e-5


def test_the_default_world_is_the_frozen_one(tmp_path):
    """Frozen on 2026-11-21, before SHINE was first run on it: see docs/world.md."""
    make_world(WorldConfig(), tmp_path)
    assert world_checksum(tmp_path) == (
        "3d795b268a8743bad1b9d0e4dc731e7d355d3eb7661517878eb7220bbe5897d2"
    )
