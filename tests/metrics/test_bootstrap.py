import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.metrics import bootstrap
from shine.metrics.bootstrap import difference_interval, mean_interval

queries = st.lists(
    st.tuples(st.floats(-1, 1, width=32), st.sampled_from("abcdef")), min_size=1, max_size=20
)


def draws(names, resamples, seed):
    """The resampled videos, spelt out: how often each one is drawn."""
    rng = np.random.default_rng(seed)
    return [
        dict(zip(names, rng.multinomial(len(names), [1 / len(names)] * len(names)), strict=True))
        for _ in range(resamples)
    ]


def slow_mean(values, videos, drawn):
    taken = [
        value
        for value, video in zip(values, videos, strict=True)
        for _ in range(drawn.get(video, 0))
    ]
    return np.mean(taken) if taken else np.nan


@settings(deadline=None, max_examples=30)
@given(queries, st.integers(0, 5))
def test_interval_of_a_mean_equals_its_spelt_out_form(rows, seed):
    values, videos = np.array([value for value, _ in rows]), [video for _, video in rows]
    means = [slow_mean(values, videos, d) for d in draws(sorted(set(videos)), 40, seed)]
    expected = np.quantile(means, [0.05, 0.95])
    found = mean_interval(values, videos, resamples=40, seed=seed, level=0.9)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(queries, queries, st.integers(0, 5))
def test_interval_of_a_difference_equals_its_spelt_out_form(one, other, seed):
    first, first_videos = np.array([value for value, _ in one]), [video for _, video in one]
    second, second_videos = np.array([value for value, _ in other]), [video for _, video in other]
    names = sorted({*first_videos, *second_videos})
    differences = np.array(
        [
            slow_mean(first, first_videos, d) - slow_mean(second, second_videos, d)
            for d in draws(names, 60, seed)
        ]
    )
    expected = np.quantile(differences[np.isfinite(differences)], [0.025, 0.975])
    found = difference_interval(first, second, first_videos, second_videos, resamples=60, seed=seed)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_columns_share_resamples_and_equal_their_own_intervals():
    rng = np.random.default_rng(0)
    values, videos = rng.random((50, 3)), [f"v{i % 9}" for i in range(50)]
    together = mean_interval(values, videos)
    for column in range(3):
        np.testing.assert_allclose(together[:, column], mean_interval(values[:, column], videos))


def test_chunks_change_no_number(monkeypatch):
    rng = np.random.default_rng(1)
    values, videos = rng.random(60), [f"v{i % 13}" for i in range(60)]
    whole = mean_interval(values, videos, resamples=100)
    monkeypatch.setattr(bootstrap, "_CHUNK_NUMBERS", 13 * 7)
    np.testing.assert_array_equal(mean_interval(values, videos, resamples=100), whole)


def test_seed_decides_the_resamples():
    rng = np.random.default_rng(2)
    values, videos = rng.random(40), [f"v{i}" for i in range(40)]
    again = [mean_interval(values, videos, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])


def test_queries_that_repeat_a_video_narrow_nothing():
    rng = np.random.default_rng(3)
    values, videos = rng.random(30), [f"v{i}" for i in range(30)]
    once = mean_interval(values, videos)
    copied = mean_interval(np.repeat(values, 10), [video for video in videos for _ in range(10)])
    np.testing.assert_allclose(copied, once, atol=1e-12)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(4)
    videos = [f"v{i // 4}" for i in range(240)]
    hits = 0
    for _ in range(200):
        video_effect = rng.normal(size=60)
        values = np.repeat(video_effect, 4) + rng.normal(size=240)
        low, high = mean_interval(values, videos, resamples=300)
        hits += low <= 0 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_set_compared_with_itself_differs_by_nothing():
    values, videos = np.linspace(0, 1, 20), [f"v{i % 7}" for i in range(20)]
    assert difference_interval(values, values, videos, videos) == pytest.approx([0, 0])
