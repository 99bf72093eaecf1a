import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tagged import KINDS, counted, plain, tagged

from shine.language.masking import recompose
from shine.language.validation import (
    TOO_SHORT,
    Judge,
    overlap,
    read_fills,
)
from shine.language.words import Word

QUERY = tagged("a/DT person/NN opens/VBZ=open a/DT door/NN ./.")
MORE = [
    tagged("a/DT person/NN closes/VBZ=close the/DT window/NN ./."),
    tagged("a/DT man/NN washes/VBZ=wash an/DT apple/NN ./."),
    tagged("a/DT man/NN unlocks/VBZ=unlock an/DT entrance/NN ./."),
    tagged("the/DT person/NN opening/VBG=open doors/NNS=door ./."),
    tagged("fixes/VBZ=fix"),
]
VOCABULARY, _ = counted([QUERY, *MORE])
LEVELS = ((2,), (2, 4), (2, 4, 1))
GOOD = (
    "a person closes a door.",
    "a person closes a window.",
    "a man closes a window.",
)


def judged(*sentences, truths=(QUERY,), levels=LEVELS):
    return Judge(VOCABULARY)(QUERY, levels[: len(sentences)], sentences, truths)


def test_good_levels_have_no_reason_against_them():
    assert judged(*GOOD) == ((), (), ())


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        (None, "no word fits a slot"),
        ("a person <mask> a door.", "a slot is not filled"),
        ("a person closes the door.", "a word outside the slots changed"),
        ("a person closes a door", "a word outside the slots changed"),
        ("a person closes up a door.", "the number of words changed"),
        ("a person a door.", "the number of words changed"),
        ("", "the number of words changed"),
        ("a person Opens a door.", "a slot is unchanged; equal to the query"),
        ("a person slams a door.", "a word outside the vocabulary"),
        ("a person closing a door.", "a word outside the vocabulary"),
        ("a person opening a door.", "another inflection"),
        ("a person window a door.", "another inflection"),
        ("a person unlocks a door.", "a near synonym"),
    ],
)
def test_every_fault_of_one_level_is_named(sentence, reason):
    assert "; ".join(judged(sentence)[0]) == reason


def test_a_person_may_stand_in_for_a_person():
    assert judged(None, None, GOOD[2])[2] == ()


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        ("A/DT person/NN closes/VBZ=close a/DT door/NN", "a true caption of the video"),
        # The same said with a near synonym, or as part of a longer caption.
        ("a/DT man/NN shuts/VBZ=shut the/DT entrance/NN", "a paraphrase of a true caption"),
        ("a/DT man/NN sits/VBZ=sit and/CC closes/VBZ=close the/DT door/NN", "a paraphrase"),
    ],
)
def test_what_is_true_elsewhere_in_the_video_is_refused(truth, reason):
    verdict = judged(GOOD[0], truths=(QUERY, tagged(truth)))[0]
    assert reason in "; ".join(verdict)


@pytest.mark.parametrize(
    "truth",
    [
        "a/DT person/NN closes/VBZ=close",  # says less than the negative
        "a/DT door/NN closes/VBZ=close",  # in another order
        "a/DT person/NN opens/VBZ=open a/DT window/NN",
    ],
)
def test_what_is_not_said_of_the_video_is_allowed(truth):
    assert judged(GOOD[0], truths=(QUERY, tagged(truth))) == ((),)


def test_a_level_that_repeats_the_one_below_is_refused():
    assert judged(GOOD[0], GOOD[0])[1] == ("a slot is unchanged", "equal to a lower level")


def test_overlap_that_does_not_shrink_is_refused():
    words = tagged("door/NN window/NN man/NN")
    verdict = Judge(VOCABULARY)(words, ((0,), (0, 1)), ("apple window man", "window door man"), ())
    assert verdict == ((), ("no further from the query than the level below",))


def test_an_invalid_level_below_is_no_measure():
    assert judged("a person slams a door.", GOOD[1])[1] == ()


def test_a_level_without_words_of_its_own_is_too_short():
    levels = ((2,), (2, 4), (2, 4))
    assert judged(*GOOD[:2], GOOD[1], levels=levels) == ((), (), (TOO_SHORT,))
    assert judged("", "", "", levels=((), (), ())) == ((TOO_SHORT,),) * 3


def test_an_open_vocabulary_takes_words_in_the_right_inflection():
    judge = Judge(VOCABULARY, open_vocabulary=True)
    levels = ((2,),)

    def reasons(sentence):
        return judge(QUERY, levels, (sentence,), (QUERY,))[0]

    assert reasons("a person paints a door.") == ()
    assert reasons("a person painting a door.") == ("another inflection",)
    assert reasons("a person window a door.") == ("another inflection",)


spans = st.sampled_from(["sofa", "a", "an", "n't", "x/y", "Über", "?", "(", "."])


@given(
    st.lists(st.tuples(spans, st.sampled_from(["", " ", "  "])), min_size=1, max_size=12),
    st.data(),
)
@settings(max_examples=200)
def test_fills_read_back_what_was_put_in(parts, data):
    """Where slots are set off by blanks, as words of captions are."""
    words = tuple(Word(text, space, KINDS["NN"], "NN", text) for text, space in parts)
    apart = [
        i
        for i in range(len(words))
        if (i == 0 or words[i - 1].space) and (words[i].space or i + 1 == len(words))
    ]
    slots = data.draw(st.lists(st.sampled_from(apart), unique=True)) if apart else []
    fills = {slot: data.draw(st.sampled_from(["lamp", "apple", "ice-box"])) for slot in slots}
    read = read_fills(words, slots, recompose(words, fills))
    assert {slot: fill.lower() for slot, fill in read.items()} == fills


@pytest.mark.parametrize("fill", ["\u0441loses", "clo-ses", "clos'es", "close\u00adses", "cl0ses"])
def test_an_open_vocabulary_is_one_of_plain_letters(fill):
    judge = Judge(VOCABULARY, open_vocabulary=True)
    (reasons,) = judge(QUERY, ((2,),), (f"a person {fill} a door.",), (QUERY,))
    assert reasons == ("a word with other characters than letters",)


def test_a_glued_slot_ends_where_its_caption_goes_on():
    assert read_fills(QUERY, (4,), "a person opens an apple.") == {4: "apple"}
    assert read_fills(QUERY, (4,), "a person opens an apple tree.") is None
    assert read_fills(QUERY, (4,), "a person opens one apple.") is None
    assert read_fills(QUERY, (4,), "a person opens an apple") is None
    assert read_fills(QUERY, (), plain(QUERY)) == {}


@pytest.mark.parametrize(
    ("other", "expected"),
    [("a b", 1.0), ("b a a", 1.0), ("a c", 1 / 3), ("c", 0.0), ("a b c", 2 / 3)],
)
def test_overlap_counts_shared_words(other, expected):
    assert overlap("a b", other) == pytest.approx(expected)
