import random

import numpy as np
import pytest
import torch

from shine.language.plausibility import FOLDS, LEAST_CAPTIONS, Caption, CaptionModels, rank

VERBS = {"opens": ("door", "window", "box"), "eats": ("apple", "bread", "soup")}
NOUNS = [noun for nouns in VERBS.values() for noun in nouns]


def sentence(rng, verb=None, noun=None):
    verb = verb or rng.choice(list(VERBS))
    return ("the", "person", verb, "the", noun or rng.choice(VERBS[verb]), "in", "the", "room")


def captions(count=480, seed=0):
    """Doors are opened and soups are eaten, never the other way round."""
    rng = random.Random(seed)
    return [Caption(f"v{i // 2}", sentence(rng)) for i in range(count)]


@pytest.fixture(scope="module")
def models():
    return CaptionModels(captions(), seed=0)


def mean(models, texts):
    return float(np.mean([score.mean for score in models(texts)]))


def test_shuffled_is_below_random_below_fitting_below_true(models):
    rng = random.Random(1)
    true = captions(120, seed=2)
    shuffled = [Caption(c.vid, tuple(rng.sample(c.words, len(c.words)))) for c in true]
    anything = ("the", "person", "in", *VERBS, *NOUNS)
    drawn = [
        Caption(
            c.vid, (*c.words[:2], rng.choice(anything), "the", rng.choice(anything), *c.words[5:])
        )
        for c in true
    ]
    other = {"opens": "eats", "eats": "opens"}
    fitting = [
        Caption(c.vid, sentence(rng, noun=rng.choice(VERBS[c.words[2]]), verb=other[c.words[2]]))
        for c in true
    ]
    figures = [mean(models, texts) for texts in (shuffled, drawn, fitting, true)]
    assert figures == sorted(figures)
    assert min(np.diff(figures)) > 0.1


def test_a_video_is_judged_by_a_network_that_never_saw_it():
    given = captions()
    secret = ("zebra", "zebra", "zebra")
    hidden = next(c.vid for c in given if rank(c.vid, 0) % FOLDS == 0)
    told = next(c.vid for c in given if rank(c.vid, 0) % FOLDS == 1)
    models = CaptionModels([*given, *[Caption(hidden, secret)] * 20], seed=0)
    own, others = models([Caption(hidden, secret), Caption(told, secret)])
    assert own.unknown == 3
    assert others.unknown == 0
    assert own.mean < others.mean - 2


def test_an_unknown_word_is_no_likelier_than_one_of_the_words_seen_once():
    rare = [
        Caption(f"r{i}", ("the", "person", f"word{i}s", "the", "door", "in", "the", "room"))
        for i in range(120)
    ]
    models = CaptionModels([*captions(), *rare], seed=0)
    (new,) = models([Caption("x", ("the", "person", "glimbers", "the", "door"))])
    (known,) = models([Caption("x", ("the", "person", "opens", "the", "door"))])
    assert new.unknown == 1
    assert known.unknown == 0
    # A fifth of all sentences have an unknown verb, but each is one of some 80 such words.
    assert -8 < new.words[2] < np.log(0.2 / 40)
    assert known.words[2] > np.log(0.2)


def test_equal_captions_and_seeds_give_equal_scores_in_any_order(models):
    texts = captions(40, seed=3)
    state = torch.get_rng_state()
    again = CaptionModels(reversed(captions()), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(models(texts), again(texts), strict=True):
        assert one.words == pytest.approx(other.words, abs=1e-5)


def test_odd_sentences_are_scored(models):
    empty, long = models([Caption("x", ()), Caption("x", ("door",) * 5000)])
    assert empty.words == ()
    assert np.isfinite([empty.mean, long.mean]).all()
    assert models([]) == []


def test_too_few_captions_teach_nothing():
    with pytest.raises(AssertionError, match="too few"):
        CaptionModels(captions(LEAST_CAPTIONS - 1))
