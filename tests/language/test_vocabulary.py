import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tagged import GRID, counted, tagged

from shine.errors import InputError
from shine.language.vocabulary import Vocabulary, count_words
from shine.language.words import Word

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


def test_a_saved_vocabulary_holds_every_word_and_its_checksum(tmp_path):
    vocabulary = counted(GRID)[0]
    vocabulary.save(tmp_path / "v.json")
    document = json.loads((tmp_path / "v.json").read_text())
    assert document["sha256"] == vocabulary.checksum
    verbs = vocabulary.entries(("VERB", "VBZ"))
    assert len(verbs) > 1
    assert document["words"]["VERB/VBZ"] == [[v.form, v.lemma, v.count] for v in verbs]
    forms = {form for rows in document["words"].values() for form, _, _ in rows}
    assert len(forms) == len(vocabulary)


def test_a_saved_vocabulary_comes_back_whole(tmp_path):
    vocabulary = counted(GRID)[0]
    vocabulary.save(tmp_path / "v.json")
    again = Vocabulary.load(tmp_path / "v.json")
    assert again.checksum == vocabulary.checksum
    assert again.entries(("VERB", "VBZ")) == vocabulary.entries(("VERB", "VBZ"))
    assert again.kinds("opens") == vocabulary.kinds("opens")
    empty = Vocabulary({})
    empty.save(tmp_path / "e.json")
    assert len(Vocabulary.load(tmp_path / "e.json")) == 0


@given(st.lists(st.lists(words)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_any_words_come_back(tmp_path, captions):
    vocabulary = Vocabulary.from_counts(count_words(captions))
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json").checksum == vocabulary.checksum


def test_every_damage_to_a_saved_vocabulary_is_one_sentence(tmp_path):
    path = tmp_path / "v.json"
    counted(GRID)[0].save(path)
    whole = path.read_text()
    for damaged, said in [
        (whole.replace('"opens"', '"opened"'), "altered"),
        (whole.replace('"sha256": "', '"sha256": "0'), "altered"),
        (whole.replace('"words"', '"terms"'), "altered"),
        (whole.replace("VERB/VBZ", "VERB"), "altered"),
        (whole.replace("shine-vocabulary-1", "shine-vocabulary-9"), "expected a vocabulary"),
        (whole[:-40], "expected a vocabulary"),
        ("[]", "expected a vocabulary"),
        ("", "expected a vocabulary"),
        ('{"format": "shine-vocabulary-1", "words": [1]}', "altered"),
    ]:
        assert damaged != whole
        path.write_text(damaged)
        with pytest.raises(InputError, match=said) as caught:
            Vocabulary.load(path)
        assert str(path) in str(caught.value)
        assert str(caught.value).count("\n") == 0
    with pytest.raises(InputError, match="cannot read vocabulary"):
        Vocabulary.load(tmp_path / "none.json")


@given(st.lists(st.lists(words)), st.integers(0, 9))
def test_counts_of_parts_add_up_in_any_grouping(captions, cut):
    whole = count_words(captions)
    parts = count_words(captions[:cut]) + count_words(captions[cut:])
    assert parts == whole


def test_only_words_of_the_captions_are_in_the_vocabulary():
    vocabulary = counted(GRID)[0]
    forms = {word.text.lower() for words in GRID for word in words}
    kinds = {(word.pos, word.tag) for words in GRID for word in words}
    found = {e.form for kind in kinds for e in vocabulary.entries(kind)}
    assert found | {"."} == forms
    assert len(vocabulary) == len(found)


def test_the_checksum_tells_counts_apart():
    once, twice = counted(GRID)[0], counted(GRID * 2)[0]
    assert once.checksum != twice.checksum
