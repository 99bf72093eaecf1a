import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tagged import GRID, counted, plain, tagged

from shine.config import NegativesConfig
from shine.language.generators import (
    Candidates,
    CorpusGenerator,
    FileGenerator,
    RandomGenerator,
    Refusal,
)
from shine.language.masking import mask_levels
from shine.language.negatives import HardNegatives
from shine.language.neighbours import contexts
from shine.language.proposal import build_generators
from shine.language.validation import read_fills

VOCABULARY, NEIGHBOURS = counted(GRID)
RATIOS = (0.25, 0.5, 0.75)
FIRST = ()


def make(name, seed=0, vocabulary=VOCABULARY, neighbours=NEIGHBOURS):
    config = NegativesConfig(generator=name, seed=seed)
    return build_generators(config, vocabulary, neighbours, tagger="t")[0]


def refusals(*attempts):
    """Rounds after which level k was refused attempts[k] times."""
    return [
        {level: Refusal("", ("why",)) for level, n in enumerate(attempts) if n > round_}
        for round_ in range(max(attempts, default=0))
    ]


def filled(words, sentence):
    return read_fills(words, mask_levels(words, RATIOS)[2], sentence)


@pytest.mark.parametrize("name", ["corpus", "random"])
@given(
    words=st.sampled_from(GRID),
    qid=st.text(max_size=5),
    attempts=st.tuples(*[st.integers(0, 9)] * 3),
)
@settings(max_examples=60)
def test_each_level_keeps_the_words_of_the_one_below(name, words, qid, attempts):
    levels = mask_levels(words, RATIOS)
    sentences = make(name).propose(words, levels, qid=qid, refused=refusals(*attempts))
    below = {}
    for slots, sentence in zip(levels, sentences, strict=True):
        fills = read_fills(words, slots, sentence)
        assert fills.items() >= below.items()
        for slot, fill in fills.items():
            assert (words[slot].pos, words[slot].tag) in VOCABULARY.kinds(fill)
            assert fill not in plain(words)
        below = fills


@pytest.mark.parametrize("name", ["corpus", "random"])
def test_a_proposal_depends_on_seed_and_query_and_on_nothing_before(name):
    levels = [mask_levels(words, RATIOS) for words in GRID]
    rows = list(zip([f"q{i}" for i in range(len(GRID))], GRID, levels, strict=True))

    def answers(generator, rows):
        return {q: generator.propose(w, s, qid=q, refused=FIRST) for q, w, s in rows}

    forth = answers(make(name), rows)
    assert answers(make(name), rows[::-1]) == forth
    assert answers(make(name, seed=1), rows) != forth
    alone = make(name).propose(GRID[7], levels[7], qid="q7", refused=FIRST)
    assert alone == forth["q7"]
    same_caption = {make(name).propose(GRID[0], levels[0], qid=q, refused=FIRST) for q, *_ in rows}
    assert len(same_caption) > 5


@pytest.mark.parametrize("name", ["corpus", "random"])
def test_attempts_go_through_all_words_that_fit_and_repeat_none(name):
    words = GRID[0]
    levels = mask_levels(words, RATIOS)
    verbs = [
        make(name).propose(words, levels, qid="q", refused=refusals(attempt, 0, 0))[0].split()[2]
        for attempt in range(5)
    ]
    assert len(set(verbs[:3])) == 3
    # "opens" itself, and "closes", "fixes", "washes", "paints": four others, then from the start.
    assert set(verbs[:4]) == {"closes", "fixes", "washes", "paints"}
    assert verbs[4] == verbs[0]


def test_an_attempt_at_one_level_leaves_the_levels_below():
    words = GRID[0]
    levels = mask_levels(words, RATIOS)
    once = make("corpus").propose(words, levels, qid="q", refused=FIRST)
    again = make("corpus").propose(words, levels, qid="q", refused=refusals(0, 1, 0))
    assert again[0] == once[0]
    assert again[1] != once[1]


def test_near_synonyms_and_the_word_in_another_form_are_never_chosen():
    captions = [
        tagged(f"a/DT person/NN {verb}/VBZ={lemma} a/DT {noun}/NN ./.")
        for verb, lemma in (("shuts", "shut"), ("closes", "close"), ("washes", "wash"))
        for noun in ("sofa", "couch", "lamp")
        for _ in range(3)
    ]
    vocabulary, neighbours = counted(captions)
    words = tagged("a/DT person/NN shuts/VBZ=shut a/DT sofa/NN ./.")
    for generator in (
        CorpusGenerator(vocabulary, neighbours, NegativesConfig()),
        RandomGenerator(vocabulary, NegativesConfig()),
    ):
        for i in range(30):
            first, second = generator.propose(
                words, mask_levels(words, (0.5, 1.0)), qid=str(i), refused=refusals(i, i)
            )
            assert first == "a person washes a sofa."
            assert second == "a person washes a lamp."


def test_a_person_is_replaced_by_a_person_and_nothing_else_is():
    nouns = Candidates(VOCABULARY, ("NOUN", "NN"))
    forms = np.array([entry.form for entry in nouns.entries])
    assert set(forms[nouns.suits("person")]) == {"man"}
    assert not {"man", "person"} & set(forms[nouns.suits("door")])
    alone = counted([tagged("a/DT person/NN cup/NN") for _ in range(9)])[0]
    nouns = Candidates(alone, ("NOUN", "NN"))
    assert [e.form for e in np.array(nouns.entries)[nouns.suits("person")]] == ["cup"]


def test_what_the_tagger_saw_once_is_no_candidate_among_enough_others():
    nouns = [f"thing{i}" for i in range(9)]
    captions = [tagged(f"{noun}/NN") for noun in nouns for _ in range(3)]
    captions += [tagged("closes/NN"), *[tagged("closes/VBZ=close")] * 9]
    vocabulary, _ = counted(captions)
    assert [e.form for e in Candidates(vocabulary, ("NOUN", "NN")).entries] == nouns
    assert [e.form for e in Candidates(vocabulary, ("VERB", "VBZ")).entries] == ["closes"]


def test_a_form_that_ends_in_punctuation_is_no_candidate():
    vocabulary, _ = counted([tagged("a./NN box/NN") for _ in range(5)])
    assert "a." in vocabulary
    assert [e.form for e in Candidates(vocabulary, ("NOUN", "NN")).entries] == ["box"]


def test_slots_are_words_that_something_can_replace():
    words = tagged("the/DT man/NN opens/VBZ=open a/DT door/NN gladly/RB ./.")
    for name in ("corpus", "random"):
        top = make(name).levels(words, qid="q")[-1]
        assert [words[slot].text for slot in top] == ["opens", "door", "man"]


ROWS = {
    "q": HardNegatives(
        queries=(
            "the person closes a door on the table.",
            "the person closes a box on the table.",
        ),
        valid=(True, True),
        source=("file", "file"),
        masked=(
            "the person <mask> a door on the table.",
            "the person <mask> a <mask> on the table.",
        ),
    )
}


def test_a_file_is_proposed_with_its_own_masks():
    two = NegativesConfig(ratios=(0.5, 1.0))
    masks = RandomGenerator(VOCABULARY, two)
    generator = FileGenerator(ROWS, masks)
    words = GRID[0]
    levels = generator.levels(words, qid="q")
    assert levels == [(2,), (2, 4)]
    assert generator.propose(words, levels, qid="q", refused=()) == ROWS["q"].queries
    again = generator.propose(words, levels, qid="q", refused=refusals(0, 1))
    assert again == (ROWS["q"].queries[0], None)
    assert generator.levels(words, qid="other") == masks.levels(words, qid="other")
    assert generator.propose(words, levels, qid="other", refused=()) == (None, None)


def test_masks_that_do_not_fit_the_caption_are_those_of_the_configuration():
    masks = RandomGenerator(VOCABULARY, NegativesConfig(ratios=(0.5, 1.0)))
    rows = {"q": replace(ROWS["q"], masked=("a <mask>", "<mask> <mask>"))}
    generator = FileGenerator(rows, masks)
    assert generator.levels(GRID[0], qid="q") == masks.levels(GRID[0], qid="q")


def test_no_word_of_the_kind_leaves_this_and_higher_levels_empty():
    words = tagged("the/DT man/NN opens/VBZ=open a/DT door/NN gladly/RB ./.")
    levels = ((2,), (2, 5), (2, 5, 4))
    first, second, third = make("corpus").propose(words, levels, qid="q", refused=FIRST)
    assert first is not None
    assert second is None
    assert third is None


def test_articles_follow_only_where_the_vocabulary_has_both():
    words = GRID[0]
    levels = ((2,), (2, 4), (2, 4, 7))
    texts = [make("random").propose(words, levels, qid=str(i), refused=FIRST)[1] for i in range(30)]
    assert any(" an apple" in text for text in texts)
    assert not any(" a apple" in text for text in texts)
    only_a = [tuple(replace(w, text="a") if w.text == "an" else w for w in c) for c in GRID]
    vocabulary, _ = counted(only_a)
    texts = [
        RandomGenerator(vocabulary, NegativesConfig()).propose(
            words, levels, qid=str(i), refused=FIRST
        )[1]
        for i in range(30)
    ]
    assert any(" a apple" in text for text in texts)
    assert not any(" an " in text for text in texts)


# Doors are opened, closed and painted; soup is cooked and eaten.
KITCHEN = [
    tagged(f"a/DT person/NN {verb}/VBZ={verb.removesuffix('s')} the/DT {noun}/NN ./.")
    for noun, verbs in (("door", "opens closes paints"), ("gate", "opens closes paints"))
    + (("soup", "cooks eats serves"), ("rice", "cooks eats serves"))
    for verb in verbs.split()
    for _ in range(10)
]


def test_corpus_prefers_the_company_a_word_keeps():
    vocabulary, neighbours = counted(KITCHEN)
    words = KITCHEN[0]
    generator = CorpusGenerator(vocabulary, neighbours, NegativesConfig())
    drawn = Counter(
        generator.propose(words, ((2,), (2, 4)), qid=str(i), refused=FIRST) for i in range(200)
    )
    fitting = sum(n for (first, _), n in drawn.items() if first.split()[2] in ("paints", "closes"))
    assert fitting >= 190
    matching = sum(n for (_, second), n in drawn.items() if second.endswith("gate."))
    assert matching >= 190


def test_corpus_weights_are_those_of_its_equation():
    vocabulary, neighbours = counted(KITCHEN)
    generator = CorpusGenerator(vocabulary, neighbours, NegativesConfig())
    words, slot, unknown = KITCHEN[0], 2, frozenset()
    candidates = Candidates(vocabulary, ("VERB", "VBZ"))
    g = CorpusGenerator

    def log_weight(entry):
        total = g.PRIOR * math.log(entry.count)
        for context in contexts(words, slot, unknown):
            held = neighbours.held("VERB", context).get(entry.lemma, 0)
            count = neighbours.occurrences("VERB", context[0], entry.lemma)
            share = neighbours.share("VERB", context)
            fit = math.log((held + g.BACK_OFF * share) / ((count + g.BACK_OFF) * share))
            seen, half, weight = g.WEIGHTS[context[0]]
            total += seen * held / (held + half) + weight * fit
        return total

    expected = np.array([log_weight(entry) for entry in candidates.entries])
    np.testing.assert_allclose(
        generator._scores(candidates, words, slot, unknown), expected, rtol=1e-12
    )


def test_grammar_comes_before_company():
    """However often "sneezes" occurs, it takes no object as long as another verb does."""
    corpus = [tagged("a/DT man/NN sneezes/VBZ=sneeze ./.")] * 500 + [*GRID]
    vocabulary, neighbours = counted(corpus)
    generator = CorpusGenerator(vocabulary, neighbours, NegativesConfig(ratios=(0.1,)))
    for number in range(50):
        (sentence,) = generator.propose(GRID[0], ((2,),), qid=str(number), refused=())
        assert sentence is not None
        assert "sneezes" not in sentence


def test_every_context_has_a_weight():
    named = {name for words in GRID for i in range(len(words)) for name, _ in contexts(words, i)}
    more = tagged(
        "his/PRP$ old/JJ kitchen/NN table/NN slowly/RB falls/VBZ=fall on/IN the/DT cat/NN "
        "picks/VBZ=pick up/RP a/DT cup/NN of/IN tea/NN"
    )
    named |= {name for i in range(len(more)) for name, _ in contexts(more, i)}
    assert named == set(CorpusGenerator.WEIGHTS)
