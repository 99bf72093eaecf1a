from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tagged import GRID, KINDS, OPENS, plain, tagged

from shine.data.annotations import MASK
from shine.language.masking import (
    article,
    level_sizes,
    mask_levels,
    masked_query,
    recompose,
)
from shine.language.tagging import Word

RATIOS = (0.25, 0.5, 0.75)


@st.composite
def captions(draw):
    """Any words with any of the tags, glued or spaced."""
    words = []
    for tag in draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=30)):
        text = draw(st.sampled_from(["person", "sofa", "a", "An", "on", "Über", "n't", "of"]))
        space = draw(st.sampled_from(["", " ", "\n"]))
        words.append(Word(text, space, KINDS[tag], tag, text.lower()))
    return tuple(words)


shares = st.lists(st.floats(0.01, 1.0, allow_nan=False), min_size=1, max_size=6, unique=True).map(
    lambda values: tuple(sorted(values))
)


@given(captions(), shares)
def test_levels_nest_and_name_each_slot_once(words, ratios):
    levels = mask_levels(words, ratios)
    assert len(levels) == len(ratios)
    for below, above in zip(((), *levels), levels, strict=False):
        assert above[: len(below)] == below
        assert len(set(above)) == len(above)
        assert all(words[slot].pos in ("VERB", "NOUN", "ADJ", "ADP", "ADV") for slot in above)


@given(st.integers(0, 60), shares)
def test_sizes_grow_as_long_as_there_are_words(num_words, ratios):
    sizes = level_sizes(num_words, ratios)
    for below, size, ratio in zip((0, *sizes), sizes, ratios, strict=False):
        assert below <= size <= num_words
        assert size > below or size == num_words
        # Never fewer than the share asks for, and more only in order to grow.
        assert size >= min(int(ratio * num_words + 0.5), num_words)
        assert size == below + 1 or size in (num_words, int(ratio * num_words + 0.5))


@pytest.mark.parametrize(
    ("num_words", "expected"),
    [
        (0, (0, 0, 0)),
        (1, (1, 1, 1)),
        (2, (1, 2, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 3)),
        (8, (2, 4, 6)),
    ],
)
def test_sizes_of_the_published_ratios(num_words, expected):
    assert level_sizes(num_words, RATIOS) == expected


def test_slots_come_in_the_order_verb_noun_adjective_preposition_adverb():
    words = tagged(
        "the/DT person/NN slowly/RB puts/VBZ=put a/DT red/JJ book/NN under/IN his/PRP$ bed/NN ./."
    )
    (everything,) = mask_levels(words, (1.0,))
    assert " ".join(words[slot].text for slot in everything) == "puts book bed red under slowly"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # A person only where too little else is left, and never before it.
        ("the/DT person/NN opens/VBZ=open the/DT door/NN ./.", "opens door person"),
        ("the/DT person/NN laughs/VBZ=laugh ./.", "laughs person"),
        ("the/DT man/NN opens/VBZ=open a/DT small/JJ door/NN ./.", "opens door small"),
        # Auxiliaries, "to", "of" and "other" stay; a particle is a preposition.
        ("she/PRP$ is/AUX=be turning/VBG=turn on/RP lights/NNS=light", "turning lights on"),
        ("eats/VBZ=eat out/IN of/IN another/JJ cup/NN", "eats cup out"),
    ],
)
def test_words_that_carry_no_action_stay(caption, expected):
    words = tagged(caption)
    assert [
        words[slot].text for slot in mask_levels(words, (0.2, 0.4, 1.0))[-1]
    ] == expected.split()


def test_words_that_nothing_can_replace_are_passed_over():
    words = tagged("the/DT person/NN opens/VBZ=open a/DT small/JJ door/NN ./.")
    slots = mask_levels(words, RATIOS, lambda word: word.text != "opens")[-1]
    assert [words[slot].text for slot in slots] == ["door", "small", "person"]


def test_words_written_together_with_others_stay():
    glued = [
        Word(text, space, pos, tag, text.lower())
        for text, space, pos, tag in (
            ('"', "", "PUNCT", "``"),
            ("box", "", "NOUN", "NN"),
            ('"', " ", "PUNCT", "''"),
            ("book", "", "NOUN", "NN"),
            ("/", "", "PUNCT", ","),
            ("cup", " ", "NOUN", "NN"),
            ("dog", "", "NOUN", "NN"),
            ("'s", " ", "PART", "POS"),
            ("bed", "", "NOUN", "NN"),
            (".", "", "PUNCT", "."),
        )
    ]
    assert mask_levels(glued, (1.0,)) == ((1, 8),)


def test_a_level_without_a_word_of_its_own_repeats_the_one_below():
    assert mask_levels(tagged("the/DT person/NN laughs/VBZ=laugh"), RATIOS) == (
        (2,),
        (2, 1),
        (2, 1),
    )
    assert mask_levels((), RATIOS) == ((), (), ())


@given(captions(), shares)
def test_masks_stand_in_the_slots_and_nowhere_else(words, ratios):
    for slots in mask_levels(words, ratios):
        expected = list(words)
        for slot in slots:
            expected[slot] = Word(MASK, words[slot].space, "X", "X", "")
        assert masked_query(words, slots) == plain(expected)


@given(captions())
def test_a_caption_refilled_with_its_own_words_is_itself(words):
    (slots,) = mask_levels(words, (1.0,))
    same = {slot: words[slot].text for slot in slots}
    assert recompose(words, same, agree=False) == plain(words)


@pytest.mark.parametrize(
    ("caption", "fill", "expected"),
    [
        ("A/DT door/NN", "apple", "An apple"),
        ("an/DT apple/NN", "door", "a door"),
        ("AN/DT APPLE/NN", "door", "A DOOR"),
        ("the/DT door/NN", "apple", "the apple"),
        ("a/DT Door/NN", "hour", "an Hour"),
    ],
)
def test_articles_and_capitals_follow(caption, fill, expected):
    assert recompose(tagged(caption), {1: fill}) == expected


def test_articles_stay_where_the_new_word_does_not_follow_them():
    words = tagged("a/DT red/JJ apple/NN")
    assert recompose(words, {2: "oven"}) == "a red oven"
    assert recompose(tagged("a/DT door/NN"), {1: "apple"}, agree=False) == "a apple"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("oven", "an"),
        ("hour", "an"),
        ("uniform", "a"),
        ("umbrella", "an"),
        ("uninteresting", "an"),
        ("used", "a"),
        ("user", "a"),
        ("house", "a"),
        ("", "a"),
    ],
)
def test_the_article_follows_the_sound(word, expected):
    assert article(word) == expected


def test_a_caption_of_100_kb_is_masked():
    words = tuple(replace(word, space=" ") for word in OPENS) * 5000
    levels = mask_levels(words, RATIOS)
    assert [len(level) for level in levels] == [2500, 5000, 7500]
    assert masked_query(words, levels[-1]).count(MASK) == 7500


def test_the_grid_masks_verb_then_thing_then_place():
    for words in GRID:
        assert [words[slot].pos for slot in mask_levels(words, RATIOS)[2]] == [
            "VERB",
            "NOUN",
            "NOUN",
        ]
