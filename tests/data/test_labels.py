"""What a model is trained towards: spans, clips and pairs, ours and as published."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import FOLDER, MODELS, UNITS, arrays, facts

from shine.data.annotations import Annotation
from shine.data.dataset import Dataset, collate
from shine.data.sampler import GlobalBatch
from shine.data.store import FeatureStore
from shine.data.text import LexicalEncoder, TextTable
from shine.errors import InputError

WINDOWS = [record for name in UNITS for record in facts(name)["labels"]]


def store(lengths, clip_seconds):
    """Features in memory, one video `v{i}` per length."""
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    place = {f"v{i}": ("", starts[i], length) for i, length in enumerate(lengths)}
    clips = np.ones((sum(lengths), 3), np.float32)
    manifest = {"width": 3, "clip_seconds": clip_seconds}
    return FeatureStore(FOLDER, manifest, place, {"": clips})


def build(windows, lengths, clip_seconds=1.0, grades=None, durations=None, **options):
    """One row per list of windows; `grades` of each clip, 0 where it has no label."""
    grades = grades or [()] * len(windows)
    rows = [
        Annotation(
            qid=f"q{i}",
            vid=f"v{i}",
            query=f"word{i}",
            duration_seconds=float(durations[i] if durations else lengths[i] * clip_seconds),
            moments=tuple((float(a), float(b)) for a, b in row),
            clip_ids=tuple(np.flatnonzero(grade).tolist()),
            clip_scores=tuple((int(g),) for g in np.array(grade)[np.flatnonzero(grade)]),
        )
        for i, (row, grade) in enumerate(zip(windows, grades, strict=True))
    ]
    texts = TextTable(LexicalEncoder(4), 8)
    return Dataset.build(
        rows, store(lengths, clip_seconds), texts, **({"max_moments": 5} | options)
    )


def targets(dataset, draws=None, rows=None):
    rows = np.arange(len(dataset)) if rows is None else np.array(rows)
    draws = np.random.default_rng(0).random((len(rows), 4)) if draws is None else draws
    return collate(dataset, GlobalBatch(rows, np.roll(rows, -1), draws), rank=0, world_size=1)


def published(lengths, clip_seconds, windows, **options):
    longer = [length + 1 for length in lengths]  # the last clip of a file is cut
    return build(windows, longer, clip_seconds, reference=True, **options)


@pytest.mark.parametrize("record", WINDOWS)
def test_published_labels_of_a_window_are_the_recorded_ones(record):
    if record["error"] is not None:
        pytest.skip("the published program fails on this window")
    length, window = record["num_clips"], record["window"]
    batch = targets(published([length], record["clip_length"], [[window]]))
    assert batch.inputs.clip_mask.sum() == length
    assert batch.targets.inside[0].nonzero()[:, 0].tolist() == record["in_window_clips"]
    expected = torch.tensor(record["span_label_center_width"])
    torch.testing.assert_close(batch.targets.spans[0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_published_labels_of_a_batch_are_the_recorded_ones(name):
    record, values = facts(name), arrays(name)
    lengths, windows = record["video_lengths"], record["windows_seconds"]
    labels = values.get("target/saliency_all_labels")
    graded = labels is not None and bool((labels > 1).any())
    grades = labels.long().tolist() if graded else None
    found = targets(published(lengths, record["clip_length"], windows, grades=grades)).targets
    for row in range(len(lengths)):
        spans = found.spans[row][found.moment_mask[row]]
        torch.testing.assert_close(spans, values[f"target/span_labels/{row}"], rtol=0, atol=1e-6)
    if labels is None:
        return
    torch.testing.assert_close(found.relevance, labels.float())
    torch.testing.assert_close(found.inside, labels > 0)
    above, below = values["target/saliency_pos_labels"], values["target/saliency_neg_labels"]
    recorded = torch.stack([above, below], dim=-1)
    few = (found.outside.sum(dim=1) < 2) & torch.tensor(not graded)
    filled = ~found.outside.any(dim=1)
    torch.testing.assert_close(found.pairs[few][..., 1], recorded[few][..., 1])
    if graded:
        torch.testing.assert_close(found.pairs[:, 0], recorded[:, 0])
        torch.testing.assert_close(found.pairs[filled], recorded[filled])
    assert_kinds_agree(found, recorded, few)
    assert found.has_pairs.all()


def assert_kinds_agree(found, recorded, few):
    """Our pairs and the recorded ones are drawn from the same clips, with or without repeats."""
    for pairs in (found.pairs, recorded):
        assert found.inside.gather(1, pairs[..., 0]).all()
        lie_outside = found.outside.gather(1, pairs[..., 1])[:, 1]
        assert (lie_outside | few | ~found.outside.any(dim=1)).all()
    same = [pairs[..., 0].diff().eq(0) for pairs in (found.pairs, recorded)]
    if not (found.relevance > 1).any():
        torch.testing.assert_close(same[0], same[1])


def slow_published(window, length, clip):
    first, last = int(window[0] / clip), max(0, min(int(window[1] / clip), length) - 1)
    first = last if first > last else first
    center, width = sum(window) / 2 / (length * clip), (window[1] - window[0]) / (length * clip)
    return list(range(first, last + 1)), [center, width]


@given(
    st.integers(1, 30),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.lists(st.tuples(st.floats(0, 70), st.floats(0.1, 40)), min_size=1, max_size=4),
)
def test_published_labels_equal_the_rule_row_by_row(length, clip, drawn):
    windows = [[(start, start + width)] for start, width in drawn]
    dataset = build(windows, [length] * len(windows), clip, reference=True, max_clips=10_000)
    found = targets(dataset).targets
    for row, (window,) in enumerate(windows):
        clips, span = slow_published(window, length, clip)
        assert found.inside[row].nonzero()[:, 0].tolist() == clips
        torch.testing.assert_close(found.spans[row, 0], torch.tensor(span), rtol=1e-5, atol=1e-5)
        assert found.span_clips[row, 0].tolist() == [clips[0], clips[-1]]


def test_published_predictions_cover_the_duration_and_ours_what_the_labels_cover():
    windows, lengths, durations = [[(1, 2)]], [31], [30.2]
    ours = build(windows, lengths, durations=durations)
    theirs = build(windows, lengths, durations=durations, reference=True)
    assert (ours.extent_seconds[0], ours.label_seconds[0]) == (31, 31)
    assert (theirs.extent_seconds[0], theirs.label_seconds[0]) == (30.2, 30)


def test_a_video_of_one_clip_has_none_left_where_the_last_is_cut():
    with pytest.raises(InputError, match="video v1 has one clip"):
        build([[(0, 1)]] * 2, [4, 1], reference=True)
    assert build([[(0, 1)]] * 2, [4, 1], reference=True, max_clips=9).num_clips.tolist() == [4, 1]


@pytest.mark.parametrize("reference", [False, True])
def test_clips_beyond_the_most_are_cut(reference):
    dataset = build([[(0, 3)], [(1, 9)]], [3, 9], reference=reference, max_clips=4)
    batch = targets(dataset)
    assert batch.inputs.clip_mask.sum(dim=1).tolist() == [3, 4]
    assert batch.targets.inside[1].tolist() == [False, True, True, True]
    times = batch.inputs.clips[1, :, -2:]
    torch.testing.assert_close(times[:, 0], torch.arange(4) / 4)
    end = batch.targets.spans[1, 0].sum() - batch.targets.spans[1, 0, 1] / 2
    assert end == pytest.approx(9 / 4 if reference else 1)


def test_a_moment_beyond_the_kept_clips_is_no_label():
    dataset = build([[(6, 8)], [(6, 8), (0, 1)]], [9, 9], max_clips=4)
    assert dataset.in_reach.any(axis=1).tolist() == [False, True]
    found = targets(dataset, rows=[1]).targets
    assert found.inside[0].tolist() == [True, False, False, False]
    assert (found.moment_mask.sum(), found.num_moments) == (1, 1)
    torch.testing.assert_close(found.spans[0, 0], torch.tensor([0.125, 0.25]))


def test_a_moment_in_the_rest_after_the_last_clip_is_that_of_the_last_clip():
    found = targets(build([[(8.2, 8.7)]], [8], durations=[8.8])).targets
    assert found.inside[0].nonzero().tolist() == [[7]]
    torch.testing.assert_close(found.spans[0, 0], torch.tensor([7.5 / 8, 1 / 8]))


@given(st.integers(0, 10**6))
def test_of_too_many_moments_some_are_drawn_by_the_row_alone(seed):
    windows = [[(2 * i, 2 * i + 1) for i in range(n)] for n in (9, 3, 7)]
    dataset = build(windows, [20] * 3)
    draws = np.random.default_rng(seed).random((3, 4))
    found = targets(dataset, draws).targets
    assert found.moment_mask.sum(dim=1).tolist() == [5, 3, 5]
    assert found.num_moments == 13
    for row in range(3):
        starts = 20 * (found.spans[row, :, 0] - found.spans[row, :, 1] / 2)
        starts = starts[found.moment_mask[row]].round().int().tolist()
        assert starts == sorted(set(starts))
        assert set(starts) <= {start for start, _ in windows[row]}
        assert found.span_clips[row, : len(starts), 0].tolist() == starts
    alone = targets(dataset, draws[2:], rows=[2]).targets
    torch.testing.assert_close(alone.spans[0], found.spans[2])


def test_every_moment_is_drawn_in_some_epoch():
    dataset = build([[(2 * i, 2 * i + 1) for i in range(8)]], [20])
    random, seen = np.random.default_rng(0), set()
    for _ in range(30):
        seen |= set(targets(dataset, random.random((1, 4))).targets.span_clips[0, :, 0].tolist())
    assert seen == set(range(0, 16, 2))


def test_relevance_is_the_sum_of_the_annotators_and_inside_follows_the_moments():
    dataset = build([[(2, 8)], [(0, 4)]], [6, 6], 2.0, grades=[[0, 3, 12, 5, 0, 0], ()])
    found = targets(dataset).targets
    assert found.relevance.tolist() == [[0, 3, 12, 5, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert found.inside[0].nonzero()[:, 0].tolist() == [1, 2, 3]
    assert found.pairs[0, 0].tolist() == [2, 1]


def test_grades_are_found_by_time_where_clips_are_not_those_of_the_labels():
    dataset = build([[(2, 6)]], [12], 1.0, grades=[[0, 3, 12, 0, 0, 0]])
    assert dataset.relevance[0].tolist() == [0, 0, 3, 3, 12, 12, 0, 0, 0, 0, 0, 0]
    assert dataset.contrast[0].tolist() == [4, 2]


GRADES = st.lists(st.integers(0, 3), min_size=1, max_size=9).filter(any)


@given(st.lists(GRADES, min_size=1, max_size=4), st.booleans(), st.integers(0, 10**6))
def test_pairs_are_of_the_right_clips(rows, reference, seed):
    windows = [[(2 * i, 2 * i + 2) for i in np.flatnonzero(row).tolist()] for row in rows]
    lengths = [len(row) for row in rows]
    options = {"max_clips": 99, "reference": reference}
    dataset = build(windows, lengths, 2.0, grades=rows, **options)
    draws = np.random.default_rng(seed).random((len(rows), 4))
    found = targets(dataset, draws).targets
    assert found.num_pairs == 2 * found.has_pairs.sum()
    for row, grades in enumerate(rows):
        labelled = [grade for grade in grades if grade]
        differ, filled = len(set(labelled)) > 1, all(grades)
        assert found.has_pairs[row] == (reference or differ or not filled)
        pairs = [[grades[clip] for clip in pair] for pair in found.pairs[row].tolist()]
        if differ or reference:
            assert pairs[0] == [max(labelled), min(labelled)]
        elif not filled:
            assert pairs[0][0] > 0 == pairs[0][1]
        if not filled:
            assert pairs[1][0] > 0 == pairs[1][1]
        elif differ or reference:
            assert pairs[1] == pairs[0]


@given(st.integers(1, 9), st.integers(0, 8), st.integers(1, 9), st.integers(0, 10**6))
def test_published_pairs_of_plain_moments_hold_different_clips(length, start, width, seed):
    start = min(start, length - 1)
    end = min(start + width, length)
    options = {"max_clips": 99, "reference": True}
    draws = np.random.default_rng(seed).random((1, 4))
    found = targets(build([[(start, end)]], [length], **options), draws).targets
    (above, other_above), (below, other_below) = found.pairs[0].T.tolist()
    assert {above, other_above} <= set(range(start, end))
    assert (above != other_above) == (end - start > 1)
    outside = set(range(length)) - set(range(start, end))
    if len(outside) > 1:
        assert {below, other_below} <= outside
        assert below != other_below
    else:
        assert {below, other_below} == {0, min(1, length - 1)}


def test_every_clip_of_a_kind_is_drawn_about_equally_often():
    dataset = build([[(2, 5)]] * 3000, [7] * 3000)
    draws = np.random.default_rng(1).random((3000, 4))
    pairs = targets(dataset, draws).targets.pairs
    for side, clips in enumerate(([2, 3, 4], [0, 1, 5, 6])):
        for pair in range(2):
            found = torch.bincount(pairs[:, pair, side], minlength=7) / 3000
            assert found[clips].sum() == pytest.approx(1)
            torch.testing.assert_close(
                found[clips], torch.full((len(clips),), 1 / len(clips)), rtol=0, atol=0.04
            )


@pytest.mark.parametrize("world_size", [2, 3])
def test_pairs_and_moments_do_not_depend_on_the_workers(world_size):
    windows = [[(2 * i, 2 * i + 1) for i in range(n)] for n in (9, 3, 7, 1, 6)]
    dataset = build(windows, [20] * 5)
    rows, draws = np.array([4, 0, 2, 3, 1]), np.random.default_rng(3).random((5, 4))
    batch = GlobalBatch(rows, np.roll(rows, -1), draws)
    whole = collate(dataset, batch, rank=0, world_size=1).targets
    for rank in range(world_size):
        share = collate(dataset, batch, rank=rank, world_size=world_size).targets
        for name in ("pairs", "spans", "span_clips", "has_pairs"):
            torch.testing.assert_close(getattr(share, name), getattr(whole, name)[rank::world_size])


def test_a_window_that_fills_its_video_and_a_video_of_one_clip_have_no_pairs():
    dataset = build([[(0, 5)], [(0, 1)], [(0, 2)]], [5, 1, 5])
    found = targets(dataset).targets
    assert found.has_pairs.tolist() == [False, False, True]
    assert (found.num_pairs, found.num_outside) == (2, 1)


def test_without_partners_only_the_query_is_collated():
    batch = targets(build([[(0, 2)]] * 3, [5] * 3, with_partner=False))
    assert batch.inputs.tokens.shape[:2] == (1, 3)
    assert batch.targets.text_valid.tolist() == [[True] * 3]
    assert batch.targets.num_both.tolist() == [[3]]


def test_a_batch_of_one_row_has_no_partner_and_the_published_one_itself():
    dataset = build([[(0, 2)]] * 2, [5] * 2)
    draws = np.zeros((1, 4))
    alone = GlobalBatch(np.array([1]), np.array([-1]), draws)
    batch = collate(dataset, alone, rank=0, world_size=1)
    assert batch.targets.text_valid[:, 0].tolist() == [True, False]
    itself = collate(
        dataset, GlobalBatch(np.array([1]), np.array([1]), draws), rank=0, world_size=1
    )
    assert itself.targets.text_valid[:, 0].tolist() == [True, True]
    torch.testing.assert_close(itself.inputs.tokens[0], itself.inputs.tokens[1])
