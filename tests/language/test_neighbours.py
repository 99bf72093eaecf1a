import pytest
from tagged import GRID, OPENS, counted, tagged

from shine.language.neighbours import contexts, count_contexts

PUTS = tagged(
    "a/DT person/NN puts/VBZ=put his/PRP$ book/NN quickly/RB "
    "on/IN the/DT red/JJ closet/NN shelf/NN ./."
)


def told(words, text, **options):
    index = next(i for i, word in enumerate(words) if word.text == text)
    return dict(contexts(words, index, **options))


def test_a_verb_is_told_its_pattern_and_its_nouns():
    found = told(PUTS, "puts")
    assert found["frame"] == "noun on noun"
    assert found["object"] == "/book"
    assert found["second"] == "on/shelf"
    assert found["after"] == "phrase"
    assert found["left"] == "person"


def test_a_noun_is_told_its_verb_and_preposition():
    assert told(PUTS, "book")["verb"] == "put/"
    assert told(PUTS, "book")["before"] == "poss"
    assert told(PUTS, "shelf")["verb"] == "put/on"
    assert told(PUTS, "shelf")["modifier"] == "closet"
    assert told(PUTS, "closet")["head"] == "shelf"
    assert "verb" not in told(PUTS, "closet")


def test_modifiers_are_told_what_they_modify():
    assert told(PUTS, "red")["head"] == "shelf"
    assert told(PUTS, "quickly")["verb"] == "put/"
    assert told(PUTS, "on")["right"] == "shelf"


def test_an_article_before_a_vowel_is_the_same_article():
    assert told(tagged("an/DT apple/NN"), "apple") == told(tagged("a/DT apple/NN"), "apple")


@pytest.mark.parametrize("text", [word.text for word in PUTS if word.pos != "PUNCT"])
def test_what_is_unknown_is_told_to_nobody(text):
    """Another word in an unknown place changes nothing of what is said."""
    for unknown, word in enumerate(PUTS):
        if word.pos in ("VERB", "NOUN", "ADP") and word.text != text:
            other = list(PUTS)
            other[unknown] = type(word)("xyzzy", word.space, word.pos, word.tag, "xyzzy")
            hidden = frozenset([unknown])
            assert told(PUTS, text, unknown=hidden) == told(other, text, unknown=hidden)
            assert "xyzzy" not in str(told(other, text, unknown=hidden))


def test_counts_are_those_of_a_plain_loop():
    _, neighbours = counted(GRID)
    held = {}
    for words in GRID:
        held[words[2].lemma] = held.get(words[2].lemma, 0) + (words[4].lemma == "window")
    assert neighbours.held("VERB", ("object", "/window")) == held
    assert neighbours.occurrences("VERB", "object", "fix") == sum(
        words[2].lemma == "fix" for words in GRID
    )
    assert neighbours.share("VERB", ("object", "/window")) == pytest.approx(1 / 5)
    assert neighbours.held("VERB", ("object", "/sofa")) == {}
    assert neighbours.share("ADV", ("verb", "open/")) == 0.0


def test_parts_of_a_corpus_add_up():
    assert count_contexts(GRID[:40]) + count_contexts(GRID[40:]) == count_contexts(GRID)
    assert count_contexts([OPENS])["VERB", "open", "object", "/door"] == 1
