import pytest
import recorded
import torch
from hypothesis import given
from hypothesis import strategies as st

from shine.spans import generalised_iou, iou, temporal_nms, to_moments, to_spans

seeds = st.integers(0, 2**32 - 1)


def moments(seed, *shape):
    """Float64 moments on a grid of tenths, so that many touch, coincide or have no length."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, 11, (*shape, 2), generator=generator).sort(dim=-1).values
    return ends.double() / 10


@given(seeds)
def test_a_moment_survives_moment_to_span_to_moment(seed):
    pairs = moments(seed, 5)
    torch.testing.assert_close(to_moments(to_spans(pairs)), pairs, atol=1e-12, rtol=0)


@given(seeds)
def test_pairwise_overlaps_are_those_of_a_loop(seed):
    first, second = moments(seed, 4), moments(seed + 1, 3)
    for i, (a, b) in enumerate(first.tolist()):
        for j, (c, d) in enumerate(second.tolist()):
            shared = max(0.0, min(b, d) - max(a, c))
            union, hull = (b - a) + (d - c) - shared, max(b, d) - min(a, c)
            expected = shared / union if union else 0.0
            assert iou(first, second)[i, j].item() == pytest.approx(expected, abs=1e-12)
            expected -= (hull - union) / hull if hull else 0.0
            assert generalised_iou(first, second)[i, j].item() == pytest.approx(expected, abs=1e-12)


@given(seeds)
def test_overlap_is_symmetric_bounded_and_one_only_for_equal_moments(seed):
    first, second = moments(seed, 6), moments(seed + 1, 5)
    overlap, general = iou(first, second), generalised_iou(first, second)
    assert torch.equal(overlap, iou(second, first).T)
    assert torch.equal(general, generalised_iou(second, first).T)
    assert ((overlap >= 0) & (overlap <= 1 + 1e-12)).all()
    assert ((general >= -1 - 1e-12) & (general <= overlap + 1e-12)).all()
    equal = (first[:, None] == second).all(dim=-1) & (first[:, 1] > first[:, 0])[:, None]
    assert torch.equal(overlap > 1 - 1e-9, equal)


def test_leading_axes_broadcast():
    first, second = moments(0, 2, 3, 4), moments(1, 3, 5)
    assert torch.equal(iou(first, second)[1, 2], iou(first[1, 2], second[2]))


@pytest.mark.parametrize("width", [0.0, 1e-12, 1e-6])
def test_moments_without_length_have_finite_overlap_and_gradient(width):
    spans = torch.tensor([[0.5, width], [0.2, width]], requires_grad=True)
    value = generalised_iou(to_moments(spans), to_moments(spans.detach().clone()))
    value.sum().backward()
    assert value.isfinite().all()
    assert spans.grad.isfinite().all()


@pytest.mark.parametrize("name", recorded.UNITS)
def test_published_overlaps(name):
    units = recorded.arrays(name)
    first, second = units["spans/a_cxw"], units["spans/b_cxw"]
    a, b = to_moments(first), to_moments(second)
    torch.testing.assert_close(a, units["spans/a_xx"], atol=1e-6, rtol=0)
    torch.testing.assert_close(to_spans(a), units["spans/a_back_cxw"], atol=1e-6, rtol=0)
    torch.testing.assert_close(iou(a, b), units["spans/iou"], atol=1e-6, rtol=0)
    torch.testing.assert_close(generalised_iou(a, b), units["spans/giou"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", recorded.UNITS)
def test_published_gradient_of_generalised_iou(name):
    units = recorded.arrays(name)
    first = units["spans/a_cxw"].clone().requires_grad_()
    overlap = generalised_iou(to_moments(first)[:5], to_moments(units["spans/b_cxw"]))
    (1 - overlap.diagonal()).mean().backward()
    expected = units["spans/grad_mean_one_minus_diag_giou_wrt_a_cxw"]
    torch.testing.assert_close(first.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", recorded.UNITS)
def test_published_suppression(name):
    for case in recorded.facts(name)["nms"]:
        rows = torch.tensor(case["predictions"], dtype=torch.float64)
        kept = rows[temporal_nms(rows[:, :2], rows[:, 2], case["nms_thd"])]
        best = kept[kept[:, 2].argsort(descending=True, stable=True)][: case["max_after_nms"]]
        expected = torch.tensor(case["result"], dtype=torch.float64)
        torch.testing.assert_close(best, expected)


@given(seeds, st.sampled_from([0.1, 0.5, 1.0]))
def test_suppression_is_the_greedy_loop(seed, threshold):
    pairs = moments(seed, 3, 6)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (3, 6), generator=generator) / 4  # ties are common
    kept = temporal_nms(pairs, scores, threshold)
    for row in range(3):
        survivors = []
        for slot in sorted(range(6), key=lambda slot: -scores[row, slot].item()):
            overlap = iou(pairs[row, [slot]], pairs[row, survivors]) if survivors else None
            if overlap is None or not (overlap > threshold).any():
                survivors.append(slot)
        assert sorted(survivors) == kept[row].nonzero().flatten().tolist()


def test_an_overlap_of_exactly_the_threshold_survives():
    pairs = torch.tensor([[0.0, 1.0], [0.0, 0.5]])
    scores = torch.tensor([0.9, 0.8])
    assert temporal_nms(pairs, scores, 0.5).tolist() == [True, True]
    assert temporal_nms(pairs, scores, 0.49).tolist() == [True, False]
