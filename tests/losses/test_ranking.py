import math

import examples
import pytest
import recorded
import torch
from hypothesis import given
from hypothesis import strategies as st

from shine.losses.ranking import coarse_ranking, fine_ranking

seeds = st.integers(0, 2**32 - 1)
MARGINS = (0.1, 0.5, 0.05, 0.3)


def example(seed, texts=5):
    generator = torch.Generator().manual_seed(seed)
    clip_mask = examples.mask(4, 20, generator)
    targets = examples.targets(generator, clip_mask, texts=texts)
    scores = 2 * torch.randn(texts, 4, 20, generator=generator, dtype=torch.float64)
    return scores.requires_grad_(), clip_mask, targets


def coarse(scores, targets, **changes):
    return coarse_ranking(
        *scores[:2],
        targets.inside,
        targets.outside,
        targets.text_valid[1],
        targets.num_outside,
        targets.num_both[1, 1],
        **({"intra_margin": 1.0, "inter_margin": 2.0, "top_divisor": 3} | changes),
    )


def fine(scores, clip_mask, targets, order):
    return fine_ranking(
        scores,
        targets.inside,
        clip_mask,
        targets.text_valid,
        targets.num_both,
        margins=MARGINS[: len(scores) - 1],
        order=order,
    )


def coarse_by_loop(scores, targets, divisor):
    intra, inter = [], []
    for row, inside in enumerate(targets.inside):
        k = max(1, int(inside.sum()) // divisor)
        best, partner = (
            sum(sorted(scores[text, row][inside].tolist())[-k:]) / k for text in range(2)
        )
        rest = scores[0, row][targets.outside[row]].tolist()
        if rest:
            intra.append(max(0, 1.0 + max(rest) - best))
        if targets.text_valid[1, row]:
            inter.append(max(0, 2.0 + partner - best))
    return [sum(terms) / max(len(terms), 1) for terms in (intra, inter)]


def divergence(label, scores):
    surprise = [-math.log(1 / (1 + math.exp(-s)) + 1e-9) for s in scores]
    return sum(a * b for a, b in zip(label, surprise, strict=True)) / len(scores)


def fine_by_loop(scores, clip_mask, targets, order):
    terms = []
    texts = [0, *range(2, len(scores)), 1]  # in the order of the terms
    for term, margin in enumerate(MARGINS[: len(scores) - 1]):
        later = texts[term + 1]
        earlier = texts[min(term, 1) if order == "absolute" else term]
        values = []
        for row, mask in enumerate(clip_mask):
            if targets.text_valid[earlier, row] and targets.text_valid[later, row]:
                label = scores[0, row][mask].sigmoid().tolist()
                d = {j: divergence(label, scores[j, row][mask].tolist()) for j in texts[1:]}
                label = targets.inside[row][mask].tolist()
                d[0] = divergence(label, scores[0, row][mask].tolist())
                values.append(max(0, margin + d[earlier] - d[later]))
        terms.append(sum(values) / max(len(values), 1))
    return terms


@given(seeds, st.sampled_from([1, 3, 8]))
def test_coarse_ranking_is_the_loop(seed, divisor):
    scores, _, targets = example(seed)
    terms = coarse(scores, targets, top_divisor=divisor)
    expected = coarse_by_loop(scores, targets, divisor)
    assert [term.item() for term in terms] == pytest.approx(expected, abs=1e-9)


@given(seeds, st.sampled_from(["relative", "absolute"]), st.integers(3, 5))
def test_fine_ranking_is_the_loop(seed, order, texts):
    scores, clip_mask, targets = example(seed, texts)
    terms = fine(scores, clip_mask, targets, order)
    expected = fine_by_loop(scores, clip_mask, targets, order)
    assert terms.tolist() == pytest.approx(expected, abs=1e-9)


@given(seeds, st.integers(0, 3), st.floats(0.01, 5))
def test_raising_a_score_inside_never_raises_the_coarse_loss(seed, row, rise):
    scores, _, targets = example(seed)
    clip = int(torch.nonzero(targets.inside[row])[seed % int(targets.inside[row].sum())])
    raised = scores.detach().clone()
    raised[0, row, clip] += rise
    before, after = coarse(scores, targets), coarse(raised, targets)
    assert all(b <= a + 1e-12 for a, b in zip(before, after, strict=True))


@given(seeds)
def test_fine_labels_carry_no_gradient(seed):
    scores, clip_mask, targets = example(seed)
    fine(scores, clip_mask, targets, "relative")[1:].sum().backward()
    assert not scores.grad[0].any()


@pytest.mark.parametrize("order", ["relative", "absolute"])
@pytest.mark.parametrize("garbage", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_absent_texts_and_padding_give_no_gradient_whatever_they_hold(order, garbage):
    scores, clip_mask, targets = example(1)
    counted = clip_mask & targets.text_valid[..., None]
    assert not targets.text_valid.all()
    dirty = scores.detach().masked_fill(~counted, garbage).requires_grad_()
    for values in (scores, dirty):
        terms = [*coarse(values, targets), *fine(values, clip_mask, targets, order)]
        sum(terms).backward()
    assert not dirty.grad[~counted].any()
    torch.testing.assert_close(dirty.grad[counted], scores.grad[counted])


def test_terms_that_no_row_has_are_exactly_zero():
    scores, clip_mask, targets = example(2)
    nobody = torch.zeros_like(targets.text_valid)
    nobody[0] = True
    everything = clip_mask, torch.zeros_like(clip_mask)
    zero = torch.tensor(0.0).double()
    intra, inter = coarse_ranking(
        *scores[:2], *everything, nobody[1], zero, zero,
        intra_margin=1.0, inter_margin=2.0, top_divisor=8,
    )  # fmt: skip
    terms = fine_ranking(
        scores, clip_mask, clip_mask, nobody, zero.expand(5, 5), margins=MARGINS, order="relative"
    )
    (intra + inter + terms.sum()).backward()
    assert [intra.item(), inter.item(), *terms.tolist()] == [0] * 6
    assert not scores.grad.any()


def published_example():
    values = recorded.under(recorded.arrays("units"), "ranking/")
    facts = recorded.facts("units")["ranking"]
    names = ["", "_neg", "_hn1", "_hn2", "_hn3"]
    scores = torch.stack([values[f"saliency_scores{name}"] for name in names])
    clip_mask = torch.arange(40) < torch.tensor(facts["lengths"])[:, None]
    inside = (values["labels"] > 0) & clip_mask
    return scores.requires_grad_(), clip_mask, inside, values, facts, names


@pytest.mark.parametrize("divisor", [8, 4, 2])
@pytest.mark.parametrize("margins", [(1.0, 2.0), (0.3, 0.8)])
def test_published_coarse_ranking(divisor, margins):
    scores, clip_mask, inside, values, facts, names = published_example()
    outside = clip_mask & ~inside
    five = torch.tensor(5.0)
    intra, inter = coarse_ranking(
        *scores[:2], inside, outside, torch.ones(5, dtype=torch.bool), five, five,
        intra_margin=margins[0], inter_margin=margins[1], top_divisor=divisor,
    )  # fmt: skip
    (intra + inter).backward()
    # Where the moment fills the video the published code compares with clip 0; we compare nothing.
    fills = ~outside.any(dim=1)
    assert fills.tolist() == [False, True, False, False, True]
    against_clip_0 = 0.0
    for row in fills.nonzero().flatten().tolist():
        own = scores[0, row][inside[row]].detach()
        best = own.topk(max(1, len(own) // divisor)).values.mean()
        against_clip_0 += max(0.0, (margins[0] + own[0] - best).item()) / 5
    tag = f"coarse_q{divisor}_m{margins[0]}_{margins[1]}"
    assert (intra + inter).item() + against_clip_0 == pytest.approx(facts[tag], abs=1e-5)
    for text, rows in ((0, ~fills), (1, torch.ones(5, dtype=torch.bool))):
        expected = values[f"grad/{tag}/saliency_scores{names[text]}"]
        torch.testing.assert_close(scores.grad[text][rows], expected[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("order", "tag"), [("relative", "red"), ("absolute", "abd")])
@pytest.mark.parametrize("margins", [(0.25, 0.25, 0.25, 0.25), (0.1, 0.5, 0.05, 0.3)])
def test_published_fine_ranking(order, tag, margins):
    scores, clip_mask, inside, values, facts, names = published_example()
    everyone = torch.ones(5, 5, dtype=torch.bool)
    terms = fine_ranking(
        scores, inside, clip_mask, everyone, torch.full((5, 5), 5.0), margins=margins, order=order
    )
    terms.sum().backward()
    tag = f"fine_{tag}_m" + "_".join(map(str, margins))
    assert terms.sum().item() == pytest.approx(facts[tag], abs=1e-5)
    for text, name in enumerate(names):
        expected = values.get(f"grad/{tag}/saliency_scores{name}")
        torch.testing.assert_close(scores.grad[text], expected, atol=1e-6, rtol=0)
