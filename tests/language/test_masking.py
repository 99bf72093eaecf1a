from dataclasses import replace
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tagged import GRID, KINDS, OPENS, plain, tagged

from shine.data.annotations import MASK
from shine.language.masking import (
    article,
    level_sizes,
    mask_levels,
    maskable,
    masked_query,
    masked_slots,
    recompose,
    released_sizes,
)
from shine.language.tagging import Word, load_tagger

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


def texts(words, slots):
    return [words[slot].text for slot in slots]


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


@pytest.mark.parametrize(
    ("num_words", "expected"),
    [
        (0, (0, 0, 0)),
        (1, (1, 1, 1)),
        (2, (1, 1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 3, 4)),
        (5, (1, 3, 5)),
        (6, (2, 4, 6)),
        (7, (2, 5, 7)),
    ],
)
def test_released_sizes_are_the_counts_of_the_published_file(num_words, expected):
    """The seven rows of the specification are all that occur there."""
    assert released_sizes(num_words) == expected
    words = tagged("opens/VBZ=open " + "box/NN " * (num_words - 1)) if num_words else ()
    assert tuple(map(len, mask_levels(words, "released"))) == expected


def test_only_the_parts_that_are_asked_for_are_masked():
    words = tagged("the/DT person/NN slowly/RB puts/VBZ=put a/DT red/JJ book/NN on/IN it/DT ./.")
    assert texts(words, maskable(words, parts=("verb", "noun"))) == ["puts", "book"]
    assert texts(words, maskable(words, parts=("adverb", "preposition"))) == ["on", "slowly"]
    # A person is a noun: without nouns it cannot help a short caption.
    assert texts(words, maskable(words, 9, parts=("verb",))) == ["puts"]
    assert texts(words, maskable(words, 9, parts=("verb", "noun"))) == ["puts", "book", "person"]


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


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # What a person starts to do tells more than that it is started.
        ("person/NN starts/VBZ=start eating/VBG=eat food/NN", "eating starts food"),
        ("person/NN starts/VBZ=start to/TO eat/VBG=eat food/NN", "eat starts food"),
        ("person/NN goes/VBZ=go to/IN the/DT door/NN", "goes door to"),
        ("person/NN starts/VBZ=start the/DT car/NN", "starts car"),
        # What helps another verb is no slot, whatever its tag.
        ("person/NN is/VBZ=be holding/VBG=hold it/DT", "holding"),
        ("person/NN is/VBZ=be in/IN bed/NN", "bed in"),
        ("person/NN has/VBZ=have opened/VBN=open it/DT", "opened"),
        ("person/NN has/VBZ=have a/DT towel/NN", "has towel"),
        ("person/NN does/VBZ=do not/CC open/VBZ=open it/DT", "open"),
        ("person/NN does/VBZ=do laundry/NN", "does laundry"),
        ("person/NN gets/VBZ=get dressed/VBN=dress", "dressed"),
        ("person/NN is/AUX=be seen/VBN=see opening/VBG=open it/DT", "opening"),
        ("a/DT 2/NN opens/VBZ=open 👋/NN", "opens"),
    ],
)
def test_verbs_that_say_little_are_last_or_stay(caption, expected):
    words = [
        replace(word, tag="VBN" if word.text in ("opened", "dressed", "seen") else word.tag)
        for word in tagged(caption.replace("/VBN", "/VBZ"))
    ]
    assert texts(words, maskable(words)) == expected.split()


def test_a_caption_that_holds_a_mask_has_no_slots():
    words = load_tagger()(["person <mask> the door of a red car."])[0]
    assert mask_levels(words, RATIOS) == ((), (), ())


@pytest.mark.parametrize(
    ("caption", "masked"),
    [
        ("a person turns on the light.", "a person <mask> <mask> the <mask>."),
        ("person puts down the book/laptop.", "<mask> <mask> <mask> the book/laptop."),
        ("a man eats a half-eaten sandwich.", "a <mask> <mask> a half-eaten <mask>."),
        ("a man in a t-shirt sits.", "a <mask> <mask> a t-shirt <mask>."),
        ("person enters the living room.", "person <mask> the <mask> <mask>."),
        ("a cell phone rings.", "a <mask> <mask> <mask>."),
        ("a person doesn't open the person's bag.", "a <mask> doesn't <mask> the person's <mask>."),
        ("they're eating food.", "they're <mask> <mask>."),
        ("she's gonna eat food.", "she's gonna <mask> <mask>."),
        ("A person can OPEN 2 boxes.", "A <mask> can <mask> 2 <mask>."),
        ("person\u00a0opens\u200b the\u3000door.", "<mask>\u00a0<mask>\u200b the\u3000<mask>."),
        ("\u200fperson opens the door\u200f.", "\u200f<mask> <mask> the <mask>\u200f."),
        ("person 👋🏽 opens the cafe\u0301 door.", "person 👋🏽 <mask> the <mask> <mask>."),
        ("", ""),
        ("...!?", "...!?"),
        (" \n", " \n"),
    ],
)
def test_captions_of_every_kind_are_masked_at_whole_words(caption, masked):
    words = load_tagger("shine")([caption])[0]
    levels = mask_levels(words, (0.2, 0.6, 1.0))
    assert masked_query(words, levels[-1]) == masked
    assert masked_slots(words, masked) == levels[-1]


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


@pytest.mark.parametrize("caption", [OPENS, tagged("door/NN"), tagged("starts/VBZ=start"), ()])
def test_time_grows_with_the_length_of_a_caption_and_not_with_its_square(caption):
    def seconds(copies):
        words = tuple(replace(word, space=" ") for word in caption) * copies
        start = process_time()
        levels = mask_levels(words, RATIOS)
        masked_slots(words, masked_query(words, levels[-1]))
        return process_time() - start

    once, eightfold = seconds(500), seconds(4000)
    assert eightfold < 32 * once + 0.2


def test_the_grid_masks_verb_then_thing_then_place():
    for words in GRID:
        assert [words[slot].pos for slot in mask_levels(words, RATIOS)[2]] == [
            "VERB",
            "NOUN",
            "NOUN",
        ]
