import os
from functools import cache
from pathlib import Path

import pytest

from shine.data.annotations import Annotation, read_annotations
from shine.data.content import Content, read_content
from shine.data.planted import WorldConfig, make_world
from shine.data.split import Carved, carve_validation
from shine.errors import InputError
from shine.language.tagging import Tagger, load_tagger

CHARADES = Path(os.environ.get("SHINE_SHARED", "../shared")) / "data" / "charades_cg"


@cache
def tagger() -> Tagger:
    return load_tagger("shine")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> list[Annotation]:
    out = tmp_path_factory.mktemp("world")
    make_world(WorldConfig(train_rows=600, validation_rows=1, test_rows=1), out)
    return read_annotations(out / "train.jsonl")


def contents(rows: list[Annotation]) -> list[Content]:
    return [read_content(words) for words in tagger()([row.query for row in rows])]


def check(carved: Carved, annotations: list[Annotation]) -> None:
    """What carving promises, read off its result."""
    train, trivial, composition = carved
    order = {row.qid: i for i, row in enumerate(annotations)}
    for part in carved:
        numbers = [order[row.qid] for row in part]
        assert numbers == sorted(set(numbers))
        assert all(annotations[order[row.qid]] is row for row in part)
    assert not {row.qid for row in trivial} & {row.qid for row in composition}
    videos = {row.vid for row in train}
    assert not videos & {row.vid for row in trivial + composition}
    words = set().union(*(item.lemmas for item in contents(train)))
    pairs = {pair for item in contents(train) for pair in item.pairs}
    for item in contents(trivial):
        assert set(item.pairs) <= pairs
        assert item.lemmas <= words
    for item in contents(composition):
        assert not set(item.pairs) <= pairs
        assert item.lemmas <= words
    assert len({p for item in contents(composition) for p in set(item.pairs) - pairs}) >= 4


def test_validation_shares_no_video_and_no_held_out_pair_with_training(planted):
    carved = carve_validation(planted, tagger(), rows=40)
    check(carved, planted)
    for part in carved[1:]:
        assert 25 <= len(part) <= 60


def test_only_the_videos_of_validation_leave_training(planted):
    carved = carve_validation(planted, tagger(), rows=40)
    gone = {row.vid for row in planted} - {row.vid for row in carved.train}
    assert [row for row in planted if row.vid not in gone] == carved.train
    assert len(carved.train) > 0.75 * len(planted)
    assert gone >= {row.vid for row in carved.val_trivial + carved.val_composition}


def test_the_choice_is_a_function_of_the_seed(planted):
    one, same, other = (
        carve_validation(planted, tagger(), rows=30, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same
    assert one.val_composition != other.val_composition


def test_too_much_is_refused(planted):
    with pytest.raises(InputError, match="expected 1 to 100 validation rows"):
        carve_validation(planted, tagger(), rows=101)
    with pytest.raises(InputError, match="expected 6 training annotations at least .*, got 5"):
        carve_validation(planted[:5], tagger(), rows=1)


def test_annotations_without_combinations_are_refused():
    rows = [
        Annotation(f"{n}", f"v{n}", "person opens the door.", 10.0, ((1.0, 4.0),))
        for n in range(20)
    ]
    with pytest.raises(InputError, match="too few combinations"):
        carve_validation(rows, tagger(), rows=2)


@pytest.mark.skipif(not CHARADES.is_dir(), reason="needs the real annotations (SHINE_SHARED)")
def test_real_training_annotations_can_be_carved():
    annotations = read_annotations(CHARADES / "charades_cg_gpt_train.jsonl")[:2500]
    carved = carve_validation(annotations, tagger(), rows=150)
    check(carved, annotations)
    assert len(carved.val_trivial) > 90
    assert len(carved.val_composition) > 90
    assert len(carved.train) > 0.75 * len(annotations)
