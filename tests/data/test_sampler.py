import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.data.sampler import epoch_batches, partners


def make(
    num_rows=103, num_videos=20, num_texts=30, batch_size=8, window=4, seed=0, epoch=0, **options
):
    random = np.random.default_rng(5)
    videos = random.integers(num_videos, size=num_rows)
    texts = random.integers(num_texts, size=num_rows)
    lengths = random.integers(5, 80, size=num_videos)[videos]
    sizes = {"batch_size": batch_size, "bucket_batches": window}
    batches = epoch_batches(lengths, videos, texts, **sizes, seed=seed, epoch=epoch, **options)
    return batches, lengths, videos, texts


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_every_row_comes_once_an_epoch_and_one_batch_may_be_short(rows, size, window, epoch):
    batches, *_ = make(num_rows=rows, batch_size=size, window=window, epoch=epoch)
    assert sorted(np.concatenate([b.rows for b in batches])) == list(range(rows))
    sizes = sorted(len(b.rows) for b in batches)
    assert sizes[1:] == [size] * (len(batches) - 1)
    assert sizes[0] == rows - size * (len(batches) - 1)


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(**kwargs):
        return np.concatenate([np.r_[b.rows, b.partners] for b in make(**kwargs)[0]]).tolist()

    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)


def test_sorting_in_windows_cuts_padding_and_still_mixes_batches():
    def padding(window):
        batches, lengths, *_ = make(num_rows=640, batch_size=8, window=window)
        return sum(lengths[b.rows].max() * len(b.rows) - lengths[b.rows].sum() for b in batches)

    assert padding(16) < 0.5 * padding(1)
    batches, lengths, *_ = make(num_rows=640, batch_size=8, window=80)
    longest = [lengths[b.rows].max() for b in batches]
    assert longest != sorted(longest)


def test_a_partner_is_of_another_video_and_another_text():
    batches, _, videos, texts = make(num_videos=6, num_texts=5)
    for batch in batches:
        for row, partner in zip(batch.rows, batch.partners, strict=True):
            candidates = [
                other
                for other in batch.rows
                if videos[other] != videos[row] and texts[other] != texts[row]
            ]
            assert (partner in candidates) if candidates else partner == -1


def test_without_another_video_or_text_there_is_no_partner():
    rows, random = np.arange(3), np.random.default_rng(0)
    one, three = np.zeros(3, int), np.arange(3)
    assert partners(one, three, rows, random).tolist() == [-1, -1, -1]
    assert partners(three, one, rows, random).tolist() == [-1, -1, -1]
    assert partners(three[:1], three[:1], rows[:1], random).tolist() == [-1]


def test_the_published_partner_is_the_next_row_of_the_batch():
    for batch in make(num_rows=41, next_row=True)[0]:
        after = dict(zip(batch.rows.tolist(), [*batch.rows[1:], batch.rows[0]], strict=True))
        assert [after[row] for row in batch.rows.tolist()] == batch.partners.tolist()
    (alone,) = make(num_rows=1, next_row=True)[0]
    assert alone.partners.tolist() == alone.rows.tolist()


def test_partners_change_neither_the_order_nor_the_draws():
    for ours, published in zip(make()[0], make(next_row=True)[0], strict=True):
        assert ours.rows.tolist() == published.rows.tolist()
        np.testing.assert_array_equal(ours.draws, published.draws)
