import math

import examples
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shine.losses.saliency import negative_loss, rank_loss

seeds = st.integers(0, 2**32 - 1)


def example(seed):
    generator = torch.Generator().manual_seed(seed)
    clip_mask = examples.mask(4, 6, generator)
    targets = examples.targets(generator, clip_mask, graded=True)
    scores = 3 * torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    return scores.requires_grad_(), clip_mask, targets


def rank_by_loop(scores, clip_mask, relevance, has_partner):
    total = 0.0
    for row, mask in enumerate(clip_mask):
        candidates = scores[0, row][mask].tolist()
        if has_partner[row]:
            candidates += scores[1, row][mask].tolist()
        log_sum = math.log(sum(math.exp(s / 0.5) for s in candidates))
        for grade in range(1, 12):
            reached = scores[0, row][mask & (relevance[row] >= grade)].tolist()
            if reached:
                total += sum(log_sum - s / 0.5 for s in reached) / len(reached) / 12
    return total


@given(seeds)
def test_rank_loss_is_the_loop(seed):
    scores, clip_mask, targets = example(seed)
    partner = targets.text_valid[1]
    loss = rank_loss(*scores, targets.relevance, clip_mask, partner, targets.num_rows)
    expected = rank_by_loop(scores, clip_mask, targets.relevance, partner) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@given(seeds)
def test_negative_loss_is_the_loop(seed):
    scores, clip_mask, targets = example(seed)
    partner, count = targets.text_valid[1], targets.num_both[1, 1]
    loss = negative_loss(scores[1], clip_mask, partner, count)
    real = scores[1][clip_mask & partner[:, None]]
    expected = sum(-math.log(1 - 1 / (1 + math.exp(-s))) for s in real.tolist())
    assert loss.item() == pytest.approx(expected / max(count.item(), 1), rel=1e-9)


def test_negative_loss_of_a_large_score_is_the_score():
    scores, real = torch.tensor([[500.0]]), torch.tensor([[True]])
    assert negative_loss(scores, real, real[0], torch.tensor(1.0)).item() == 500


@pytest.mark.parametrize("garbage", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_padding_and_absent_partners_give_no_gradient_whatever_they_hold(garbage):
    scores, clip_mask, targets = example(0)
    partner = torch.tensor([True, False, True, False])
    counted = torch.stack([clip_mask, clip_mask & partner[:, None]])
    dirty = scores.detach().masked_fill(~counted, garbage).requires_grad_()
    for values in (scores, dirty):
        loss = rank_loss(*values, targets.relevance, clip_mask, partner, targets.num_rows)
        (loss + negative_loss(values[1], clip_mask, partner, targets.num_rows)).backward()
    assert not dirty.grad[~counted].any()
    torch.testing.assert_close(dirty.grad[counted], scores.grad[counted])


def test_without_any_partner_the_negative_loss_is_exactly_zero():
    scores, clip_mask, _ = example(0)
    nobody = torch.zeros(4, dtype=torch.bool)
    loss = negative_loss(scores[1], clip_mask, nobody, torch.tensor(0.0).double())
    loss.backward()
    assert loss.item() == 0
    assert not scores.grad.any()
