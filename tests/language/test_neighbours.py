from dataclasses import replace
from time import process_time

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
    assert told(PUTS, "book")["determiner"] == "poss"
    assert told(PUTS, "shelf")["verb"] == "put/on"
    assert told(PUTS, "shelf")["modifier"] == "closet"
    assert told(PUTS, "closet")["head"] == "shelf"
    assert "verb" not in told(PUTS, "closet")


def test_modifiers_are_told_what_they_modify():
    assert told(PUTS, "red")["head"] == "shelf"
    assert told(PUTS, "quickly")["verb"] == "put/"
    assert told(PUTS, "on")["right"] == "shelf"


def test_particles_are_told_apart_from_prepositions():
    turns = tagged("person/NN turns/VBZ=turn on/RP the/DT light/NN")
    assert told(turns, "turns")["frame"] == "on! noun"
    assert told(turns, "turns")["after"] == "on!"
    assert told(turns, "on")["particle"] == "turn/noun"
    assert not {"verb", "phrase"} & told(turns, "on").keys()
    stands = tagged("person/NN stands/VBZ=stand up/RP on/IN a/DT chair/NN")
    assert told(stands, "up")["particle"] == "stand/"
    assert told(stands, "on")["phrase"] == "chair"


def test_nouns_that_of_binds_are_told_each_other():
    cup = tagged("drinks/VBZ=drink a/DT cup/NN of/IN hot/JJ tea/NN leaves/NNS=leaf in/IN bed/NN")
    assert told(cup, "cup")["whole"] == "leaf"
    assert told(cup, "leaves")["of"] == "cup"
    assert "of" not in told(cup, "tea")
    assert not {"of", "whole"} & told(cup, "bed").keys()


def test_words_far_away_play_no_part():
    far = tagged("opens/VBZ=open " + "red/JJ " * 40 + "door/NN " + "red/JJ " * 40 + "box/NN")
    near = tagged("red/JJ " * 32 + "door/NN " + "red/JJ " * 32)
    found = dict(contexts(far, 41, frozenset([0, 81])))
    assert found == told(near, "door")


@pytest.mark.parametrize("caption", ["door/NN", "opens/VBZ=open", "on/IN", "door/NN of/IN", "a/DT"])
def test_time_grows_with_the_length_of_a_caption_and_not_with_its_square(caption):
    def seconds(copies):
        words = tagged(caption) * copies
        words = tuple(replace(word, space=" ") for word in words)
        start = process_time()
        count_contexts([words])
        return process_time() - start

    once, eightfold = seconds(150), seconds(1200)
    assert eightfold < 32 * once + 0.2


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
