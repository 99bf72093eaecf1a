import pytest
from hypothesis import given
from hypothesis import strategies as st
from tagged import tagged

from shine.language.lexicon import OWN, Meanings, content, is_person, leads, near_synonyms, takes

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
    assert OWN.covers(one, other, pos)
    assert OWN.covers(other, one, pos)


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
    assert not OWN.covers(one, other, pos)


@pytest.mark.parametrize(
    ("act", "entailed", "pos"),
    [
        ("eat", "hold", "VERB"),
        ("close", "hold", "VERB"),
        ("awaken", "lie", "VERB"),
        ("sink", "kitchen", "NOUN"),
        ("under", "near", "ADP"),
    ],
)
def test_what_an_act_entails_does_not_replace_it_but_may_be_replaced_by_it(act, entailed, pos):
    assert OWN.covers(act, entailed, pos)
    assert not OWN.covers(entailed, act, pos)


@pytest.mark.parametrize(
    ("word", "slip", "same"),
    [
        ("sandwich", "sandwhich", True),
        ("siting", "sitting", True),
        ("start", "strat", True),
        ("cooking", "looking", False),
        ("chair", "hair", False),
        ("though", "tough", True),
        ("walk", "walks", False),
        ("bottle", "bottles", True),
        ("window", "winter", False),
    ],
)
def test_a_slip_of_the_pen_is_no_other_word(word, slip, same):
    assert OWN.covers(word, slip, "NOUN") is same
    assert OWN.covers(slip, word, "NOUN") is same


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
    assert OWN.says(CAPTION, content(tagged(query))) is expected


pairs = st.lists(
    st.tuples(st.sampled_from(["sofa", "couch", "open", "shut"]), st.sampled_from(POS))
)


@given(pairs, pairs)
def test_saying_is_reflexive_and_grows_with_the_caption(caption, more):
    assert OWN.says(caption, caption)
    assert OWN.says([*caption, *more], caption)
    assert OWN.says([*more, *caption], caption)
    if len(caption) > len(more):
        assert not OWN.says(more, caption)


def test_another_lexicon_counts_in_both_directions_and_beside_our_own():
    def near(lemma, pos):
        return frozenset(["unbar"] if (lemma, pos) == ("open", "VERB") else ())

    both = Meanings((near,))
    assert both.covers("open", "unbar", "VERB")
    assert both.covers("unbar", "open", "VERB")
    assert both.covers("sofa", "couch", "NOUN")
    assert not both.covers("open", "unbar", "NOUN")
    assert not OWN.covers("open", "unbar", "VERB")
    caption = content(tagged("a/DT man/NN opens/VBZ=open the/DT door/NN"))
    query = content(tagged("unbars/VBZ=unbar the/DT door/NN"))
    assert both.says(caption, query)
    assert not OWN.says(caption, query)


@pytest.mark.parametrize(
    ("verb", "frame", "fits"),
    [
        ("sneeze", "noun", False),
        ("sneeze", "in noun", True),
        ("laugh", "up! noun", False),
        ("put", "noun", False),
        ("put", "noun on noun", True),
        ("put", "down! noun", True),
        ("put", "in noun", False),
        ("hold", "", False),
        ("hold", "noun", True),
        ("start", "in", False),
        ("stop", "out! noun", False),
        ("go", "out!", True),
        ("start", "VBG", True),
        ("start", "to VB", True),
        ("start", "noun", True),
        ("go", "to noun", True),
        ("unheard", "noun", True),
        ("unheard", "", True),
    ],
)
def test_grammar_rules_verbs_out_before_what_they_cannot_take(verb, frame, fits):
    assert takes(verb, frame) is fits


def test_verbs_that_lead_to_others_are_no_acts_of_their_own():
    assert all(map(leads, ("start", "begin", "stop", "try")))
    assert not any(map(leads, ("open", "eat", "sit")))
