import json
import random

from hypothesis import given
from hypothesis import strategies as st
from tagged import GRID, counted, tagged

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


def test_the_checksum_tells_counts_apart():
    once, twice = counted(GRID)[0], counted(GRID * 2)[0]
    assert once.checksum != twice.checksum
