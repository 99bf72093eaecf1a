import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tagged import GRID, counted, tagged

from shine.errors import InputError
from shine.language.tagging import Word
from shine.language.vocabulary import Vocabulary, count_words

words = st.builds(
    Word,
    text=st.text(max_size=6),
    space=st.just(" "),
    pos=st.sampled_from(["VERB", "NOUN"]),
    tag=st.sampled_from(["VBZ", "NN", ""]),
    lemma=st.sampled_from(["open", "door"]),
)


def test_words_are_kept_per_kind_with_counts_most_frequent_first():
    vocabulary = Vocabulary.from_counts(
        count_words(
            [
                tagged("Door/NN door/NN opens/VBZ=open ./."),
                tagged("door/VBZ window/NN box/NN"),
            ]
        )
    )
    nouns = vocabulary.entries(("NOUN", "NN"))
    assert [(entry.form, entry.count) for entry in nouns] == [
        ("door", 2),
        ("box", 1),
        ("window", 1),
    ]
    assert set(vocabulary.kinds("DOOR")) == {("NOUN", "NN"), ("VERB", "VBZ")}
    assert vocabulary.kinds("opens")["VERB", "VBZ"].lemma == "open"
    assert vocabulary.entries(("ADJ", "JJ")) == ()
    assert "Window" in vocabulary
    assert "." not in vocabulary
    assert "sofa" not in vocabulary
    glued = [Word("box", "", "NOUN", "NN", "box"), Word("'s", " ", "PART", "POS", "'s")]
    assert "box" not in Vocabulary.from_counts(count_words([glued]))
    assert len(vocabulary) == 4


@given(st.lists(st.lists(words)), st.randoms(use_true_random=False))
def test_order_and_parts_of_a_corpus_change_nothing(captions, order):
    whole = Vocabulary.from_counts(count_words(captions))
    shuffled = random.Random(order.random()).sample(captions, len(captions))
    middle = len(captions) // 2
    parts = count_words(shuffled[:middle]) + count_words(shuffled[middle:])
    assert Vocabulary.from_counts(parts).checksum == whole.checksum


@given(captions=st.lists(st.lists(words)))
def test_a_saved_vocabulary_reads_back_equal(tmp_path_factory, captions):
    vocabulary = Vocabulary.from_counts(count_words(captions))
    path = tmp_path_factory.mktemp("vocabulary") / "v.json"
    vocabulary.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.checksum == vocabulary.checksum
    for kind in (("VERB", "VBZ"), ("NOUN", "NN"), ("NOUN", "")):
        assert loaded.entries(kind) == vocabulary.entries(kind)


def test_the_checksum_tells_counts_apart():
    once, twice = counted(GRID)[0], counted(GRID * 2)[0]
    assert once.checksum != twice.checksum


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "v.json"
    counted(GRID)[0].save(path)
    document = json.loads(path.read_text())
    document["words"]["NOUN/NN"][0][2] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="the file was changed"):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "shine-vocabulary-1", "sha256": ""}', '{"format": "other"}'],
)
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "v.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"v\.json: expected"):
        Vocabulary.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read vocabulary .*none\.json"):
        Vocabulary.load(tmp_path / "none.json")
