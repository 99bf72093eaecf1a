import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shine.metrics.composition import (
    composition_gap,
    composition_gap_interval,
    saliency_wins,
)


def slow_wins(saliency, inside, valid):
    """Which pairs (level, query) are won, and which count."""
    wins, counted = set(), set()
    for text in range(1, len(saliency)):
        for query in range(len(inside)):
            clips = [clip for clip in range(inside.shape[1]) if inside[query, clip]]
            if not clips or not valid[0, query] or not valid[text, query]:
                continue
            own = sum(saliency[0, query, clip] for clip in clips) / len(clips)
            other = sum(saliency[text, query, clip] for clip in clips) / len(clips)
            counted.add((text - 1, query))
            if own > other:
                wins.add((text - 1, query))
    return wins, counted


@given(st.data())
def test_saliency_wins_equal_their_spelt_out_form(data):
    texts, queries, clips = (data.draw(st.integers(low, 5)) for low in (2, 1, 1))
    # quarters add up exactly, so ties are ties in both forms
    quarters = st.integers(-8, 8).map(lambda value: value / 4)
    saliency = data.draw(arrays(float, (texts, queries, clips), elements=quarters))
    inside = data.draw(arrays(bool, (queries, clips)))
    valid = data.draw(arrays(bool, (texts, queries)))
    found = saliency_wins(saliency, inside, valid)
    assert tuple(set(zip(*map(list, np.nonzero(pairs)), strict=True)) for pairs in found) == (
        slow_wins(saliency, inside, valid)
    )


def test_clips_outside_the_moment_change_nothing():
    saliency = np.array([[[1.0, 1.0, -9.0]], [[0.0, 0.0, 9.0]]])
    inside, valid = np.array([[True, True, False]]), np.ones((2, 1), dtype=bool)
    assert saliency_wins(saliency, inside, valid) == (True, True)
    saliency[:, :, 2] = np.nan
    assert saliency_wins(saliency, inside, valid) == (True, True)


def test_a_tie_or_a_broken_saliency_does_not_win():
    inside, valid = np.ones((1, 2), dtype=bool), np.ones((2, 1), dtype=bool)
    assert saliency_wins(np.zeros((2, 1, 2)), inside, valid) == (False, True)
    broken = np.zeros((2, 1, 2))
    broken[0, 0, 0] = np.nan
    assert saliency_wins(broken, inside, valid) == (False, True)


def test_queries_without_a_negative_or_an_inside_clip_do_not_count():
    saliency = np.stack([np.ones((3, 2)), np.zeros((3, 2))])
    inside = np.array([[True, False], [True, True], [False, False]])
    valid = np.array([[True, True, True], [True, False, True]])
    wins, counted = saliency_wins(saliency, inside, valid)
    np.testing.assert_array_equal(counted, [[True, False, False]])
    np.testing.assert_array_equal(wins, [[True, False, False]])


def test_gap_is_trivial_minus_novel_and_lies_in_its_interval():
    rng = np.random.default_rng(0)
    trivial, novel = rng.random((80, 2)) + [0.2, 0.0], rng.random((60, 2))
    videos = [f"v{i % 20}" for i in range(80)], [f"v{i % 15}" for i in range(60)]
    gap = composition_gap(trivial, novel)
    np.testing.assert_allclose(gap, trivial.mean(axis=0) - novel.mean(axis=0))
    low, high = composition_gap_interval(trivial, novel, *videos)
    assert (low < gap).all()
    assert (gap < high).all()
    assert low[0] > 0 > low[1]
