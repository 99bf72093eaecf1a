from tagged import GRID, counted, plain, tagged

from shine.config import NegativesConfig
from shine.language.generators import Nothing, RandomGenerator
from shine.language.proposal import MAX_ATTEMPTS, propose
from shine.language.validation import TOO_SHORT, Judge

QUERY = tagged("a/DT person/NN opens/VBZ=open a/DT door/NN ./.")
MORE = tagged("a/DT man/NN closes/VBZ=close the/DT window/NN ./.")
VOCABULARY, _ = counted([QUERY, MORE, tagged("fixes/VBZ=fix")])
JUDGE = Judge(VOCABULARY)
ONE = ((2,),)
TWO = ((2,), (2, 4))
UNKNOWN = "a person slams a door."
SAME = "a person opens a door."
GOOD = "a person closes a door."
BETTER = "a person fixes a window."


class Scripted:
    """Proposes for each level the next sentence of a list, and the last one for ever."""

    def __init__(self, *levels, name="scripted"):
        self.sentences = levels
        self.name = name
        self.asked = []

    def levels(self, words, *, qid):
        raise AssertionError

    def propose(self, words, levels, *, qid, refused):
        self.asked.append(refused)
        attempts = [sum(level in r for r in refused) for level in range(len(levels))]
        return tuple(
            said[min(n, len(said) - 1)] for said, n in zip(self.sentences, attempts, strict=True)
        )


def proposed(levels, *generators, truths=(QUERY,)):
    return propose(generators, JUDGE, QUERY, levels, qid="q", truths=truths)


def test_a_refused_level_is_proposed_again_with_the_reasons():
    generator = Scripted([UNKNOWN, SAME, GOOD])
    (level,) = proposed(ONE, generator)
    assert (level.sentence, level.reasons, level.source) == (GOOD, (), "scripted")
    assert level.attempts == 3
    assert level.refused == (
        "a word outside the vocabulary",
        "a slot is unchanged, equal to the query",
    )
    last = generator.asked[-1]
    assert [round_[0].sentence for round_ in last] == [UNKNOWN, SAME]
    assert last[0][0].reasons == ("a word outside the vocabulary",)


def test_a_level_that_stays_wrong_ends_invalid_after_a_bounded_number_of_attempts():
    generator = Scripted([UNKNOWN])
    (level,) = proposed(ONE, generator)
    assert (level.sentence, level.reasons) == (UNKNOWN, ("a word outside the vocabulary",))
    assert level.attempts == len(generator.asked) == MAX_ATTEMPTS


def test_what_one_generator_fails_is_left_to_the_next():
    first, second = Scripted([UNKNOWN, None], name="first"), Scripted([SAME, GOOD], name="second")
    (level,) = proposed(ONE, first, second)
    assert (level.sentence, level.source, level.attempts) == (GOOD, "second", 3)
    assert len(level.refused) == 2
    stubborn = Scripted([UNKNOWN], name="first")
    (level,) = proposed(ONE, stubborn, Scripted([GOOD], name="second"))
    assert (level.source, level.attempts) == ("second", MAX_ATTEMPTS + 1)
    assert [len(r) for r in stubborn.asked] == [*range(MAX_ATTEMPTS)]


def test_why_a_generator_has_no_sentence_is_told_and_is_no_attempt():
    refuses = Nothing("refused: no")
    first = Scripted([UNKNOWN, refuses], name="first")
    (level,) = proposed(ONE, first, Scripted([GOOD], name="second"))
    assert (level.sentence, level.source, level.attempts) == (GOOD, "second", 2)
    assert level.refused == ("a word outside the vocabulary", "refused: no")
    (level,) = proposed(ONE, Scripted([refuses]))
    assert (level.sentence, level.attempts, level.refused) == ("", 0, ("refused: no",))
    assert level.reasons == ("no word fits a slot",)


def test_levels_fall_back_each_for_itself():
    first = Scripted([GOOD], [None], name="first")
    second = Scripted([UNKNOWN], [BETTER], name="second")
    low, high = proposed(TWO, first, second)
    assert (low.sentence, low.source, low.attempts) == (GOOD, "first", 1)
    assert (high.sentence, high.source, high.attempts) == (BETTER, "second", 1)


def test_a_level_that_was_good_may_fall_by_a_later_choice_below():
    """The second answer for level 0 equals level 1, which is then proposed again too."""
    generator = Scripted([UNKNOWN, BETTER], [BETTER, "a man closes a window."])
    levels = ((2, 4), (1, 2, 4))
    low, high = proposed(levels, generator)
    assert (low.sentence, low.reasons) == (BETTER, ())
    assert (high.sentence, high.reasons, high.attempts) == ("a man closes a window.", (), 2)


def test_nothing_is_asked_twice_where_no_answer_can_help():
    generator = Scripted([None])
    (level,) = proposed(ONE, generator)
    assert (level.sentence, level.reasons) == ("", ("no word fits a slot",))
    assert (level.attempts, len(generator.asked)) == (0, 1)
    short = Scripted([GOOD], [GOOD])
    low, high = proposed(((2,), (2,)), short)
    assert (low.reasons, high.reasons, len(short.asked)) == ((), (TOO_SHORT,), 1)


def test_a_true_caption_of_the_video_makes_the_generator_choose_another():
    vocabulary, _ = counted(GRID)
    words, levels = GRID[0], ((2,), (2, 4))
    generator = RandomGenerator(vocabulary, NegativesConfig())

    def sentences(truths):
        judge = Judge(vocabulary)
        return propose((generator,), judge, words, levels, qid="q", truths=truths)

    free = sentences(())
    taken = next(c for c in GRID if plain(c) == free[0].sentence)
    again = sentences((taken,))
    assert again[0].sentence != free[0].sentence
    assert [level.reasons for level in again] == [(), ()]


def test_random_negatives_of_the_grid_are_all_valid():
    vocabulary, _ = counted(GRID)
    generator, judge = RandomGenerator(vocabulary, NegativesConfig(seed=3)), Judge(vocabulary)
    for number, words in enumerate(GRID):
        levels = generator.levels(words, qid="q")
        found = propose((generator,), judge, words, levels, qid=str(number), truths=(words,))
        assert [level.reasons for level in found] == [(), (), ()]
