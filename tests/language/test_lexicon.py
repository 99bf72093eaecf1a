import pytest
from hypothesis import given
from hypothesis import strategies as st
from tagged import tagged

from shine.language.lexicon import content, is_person, near_synonyms, same_meaning, says

POS = ("VERB", "NOUN", "ADJ", "ADP", "ADV")


@pytest.mark.parametrize(
    ("one", "other", "pos"),
    [
        ("grab", "take", "VERB"),
        ("shut", "close", "VERB"),
        ("sofa", "couch", "NOUN"),
        ("laptop", "computer", "NOUN"),
        ("watch", "look", "VERB"),
        ("quickly", "fast", "ADV"),
        ("in", "into", "ADP"),
        ("man", "guy", "NOUN"),
    ],
)
def test_near_synonyms_of_the_domain_are_known_both_ways(one, other, pos):
    assert same_meaning(one, other, pos)
    assert same_meaning(other, one, pos)


@pytest.mark.parametrize(
    ("one", "other", "pos"),
    [
        ("open", "close", "VERB"),
        ("put", "take", "VERB"),
        ("sit", "stand", "VERB"),
        ("walk", "run", "VERB"),
        ("door", "window", "NOUN"),
        ("bed", "sofa", "NOUN"),
        ("man", "woman", "NOUN"),
        ("on", "under", "ADP"),
        ("in", "out", "ADP"),
        ("slowly", "quickly", "ADV"),
        ("sofa", "couch", "VERB"),
    ],
)
def test_opposites_and_different_things_are_told_apart(one, other, pos):
    assert not same_meaning(one, other, pos)


def test_the_relation_is_symmetric_and_names_no_word_its_own_synonym():
    words = ["take", "sofa", "in", "quickly", "man"]
    seen = 0
    for pos in POS:
        for word in words:
            for other in near_synonyms(word, pos):
                assert word in near_synonyms(other, pos)
                assert other != word
                seen += 1
    assert seen > 20


def test_persons_are_told_apart_from_things():
    assert is_person("person")
    assert is_person("woman")
    assert not is_person("dog")
    assert not is_person("door")


CAPTION = content(tagged("a/DT man/NN sits/VBZ=sit on/IN the/DT couch/NN and/CC laughs/VBZ=laugh"))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("the/DT person/NN laughs/VBZ=laugh", True),
        ("a/DT woman/NN sits/VBZ=sit on/IN a/DT sofa/NN", True),
        ("laughs/VBZ=laugh sits/VBZ=sit", False),
        ("sits/VBZ=sit on/IN a/DT bed/NN", False),
        ("sits/VBZ=sit near/IN a/DT couch/NN", False),
        ("sits/VBZ=sit quickly/RB", False),
    ],
)
def test_a_caption_says_what_it_holds_in_order(query, expected):
    assert says(CAPTION, content(tagged(query))) is expected


pairs = st.lists(
    st.tuples(st.sampled_from(["sofa", "couch", "open", "shut"]), st.sampled_from(POS))
)


@given(pairs, pairs)
def test_saying_is_reflexive_and_grows_with_the_caption(caption, more):
    assert says(caption, caption)
    assert says([*caption, *more], caption)
    assert says([*more, *caption], caption)
    if len(caption) > len(more):
        assert not says(more, caption)
