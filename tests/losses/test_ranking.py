import math
import re

import examples
import pytest
import recorded
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import kl_divergence

from shine.losses.ranking import fine_ranking, inter_ranking, intra_ranking, published_outside

seeds = st.integers(0, 2**32 - 1)
MARGINS = (0.1, 0.5, 0.05, 0.3)


def example(seed, texts=5):
    generator = torch.Generator().manual_seed(seed)
    clip_mask = examples.mask(4, 20, generator)
    targets = examples.targets(generator, clip_mask, texts=texts)
    scores = 2 * torch.randn(texts, 4, 20, generator=generator, dtype=torch.float64)
    return scores.requires_grad_(), clip_mask, targets


def coarse(scores, targets, *, intra_margin=1.0, inter_margin=2.0, top_divisor=3):
    intra = intra_ranking(
        scores[0],
        targets.inside,
        targets.outside,
        targets.num_outside,
        margin=intra_margin,
        top_divisor=top_divisor,
    )
    inter = inter_ranking(
        *scores[:2],
        targets.inside,
        targets.text_valid[1],
        targets.num_both[1, 1],
        margin=inter_margin,
        top_divisor=top_divisor,
    )
    return intra, inter


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
    intra = intra_ranking(scores[0], *everything, zero, margin=1.0, top_divisor=8)
    inter = inter_ranking(*scores[:2], clip_mask, nobody[1], zero, margin=2.0, top_divisor=8)
    terms = fine_ranking(
        scores, clip_mask, clip_mask, nobody, zero.expand(5, 5), margins=MARGINS, order="relative"
    )
    (intra + inter + terms.sum()).backward()
    assert [intra.item(), inter.item(), *terms.tolist()] == [0] * 6
    assert not scores.grad.any()


def published_example(name):
    values, facts = recorded.under(recorded.arrays(name), "ranking/"), recorded.facts(name)
    names = ["saliency_scores", "saliency_scores_hn1", "saliency_scores_hn2", "saliency_scores_hn3"]
    names.insert(1, "saliency_scores_neg")
    scores = torch.stack([values[name] for name in names]).requires_grad_()
    lengths = torch.tensor(facts["ranking"]["lengths"])
    clip_mask = torch.arange(scores.shape[-1]) < lengths[:, None]
    inside = (values["labels"] > 0) & clip_mask
    return scores, clip_mask, inside, values, facts["ranking"], names


def recordings(pattern):
    """Every recorded case of a loss: its fixture, its tag and the numbers in the tag."""
    return [
        pytest.param(name, tag, *match.groups(), id=f"{name}-{tag}")
        for name in recorded.UNITS
        for tag in recorded.facts(name)["ranking"]
        if (match := re.fullmatch(pattern, tag))
    ]


def assert_gradients(scores, values, tag, names):
    for text, name in enumerate(names):
        expected = values.get(f"grad/{tag}/{name}", torch.zeros_like(scores[text]))
        torch.testing.assert_close(scores.grad[text], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "tag", "divisor", "intra_margin", "inter_margin"),
    recordings(r"coarse_q(\d+)_m([\d.]+)_([\d.]+)"),
)
def test_published_coarse_ranking(name, tag, divisor, intra_margin, inter_margin):
    scores, clip_mask, inside, values, facts, names = published_example(name)
    outside = published_outside(clip_mask & ~inside)
    divisor, everyone = int(divisor), torch.tensor(float(len(inside)))
    intra = intra_ranking(
        scores[0], inside, outside, everyone, margin=float(intra_margin), top_divisor=divisor
    )
    inter = inter_ranking(
        *scores[:2], inside, torch.ones(len(inside), dtype=torch.bool), everyone,
        margin=float(inter_margin), top_divisor=divisor,
    )  # fmt: skip
    (intra + inter).backward()
    assert (intra + inter).item() == pytest.approx(facts[tag], abs=1e-5)
    assert_gradients(scores, values, tag, names)


@pytest.mark.parametrize(
    ("name", "tag", "order", "margins"), recordings(r"fine_(red|abd)_m([\d._]+)")
)
def test_published_fine_ranking(name, tag, order, margins):
    scores, clip_mask, inside, values, facts, names = published_example(name)
    rows = len(inside)
    terms = fine_ranking(
        scores,
        inside,
        clip_mask,
        torch.ones(len(scores), rows, dtype=torch.bool),
        torch.full((len(scores), len(scores)), float(rows)),
        margins=[float(margin) for margin in margins.split("_")],
        order={"red": "relative", "abd": "absolute"}[order],
    )
    terms.sum().backward()
    assert terms.sum().item() == pytest.approx(facts[tag], abs=1e-5)
    assert_gradients(scores, values, tag, names)


def test_the_published_outside_is_ours_but_where_a_moment_fills_its_video():
    outside = torch.tensor([[False, True, True], [False, False, False]])
    assert published_outside(outside).tolist() == [[False, True, True], [True, False, False]]


@given(seeds)
def test_binary_divergence_is_that_of_two_coins(seed):
    scores, clip_mask, targets = example(seed)
    everyone = torch.ones_like(targets.text_valid)
    both = torch.full((5, 5), 4.0, dtype=torch.float64)
    terms = fine_ranking(
        scores, targets.inside, clip_mask, everyone, both,
        margins=(50.0,) * 4, order="relative", divergence="kl",
    )  # fmt: skip
    label = torch.cat([targets.inside[None].double(), scores[:1].sigmoid().expand(4, -1, -1)])
    coin = torch.distributions.Bernoulli
    apart = kl_divergence(coin(label), coin(logits=scores))
    d = (apart * clip_mask).sum(dim=-1) / clip_mask.sum(dim=-1)  # [text, row]
    order = d[[0, 2, 3, 4, 1]]
    expected = (50.0 + order[:-1] - order[1:]).mean(dim=1)
    torch.testing.assert_close(terms, expected, atol=1e-9, rtol=0)


def test_equal_curves_have_no_binary_divergence():
    scores, clip_mask, targets = example(0)
    same = scores.detach()[:1].expand_as(scores)
    both = torch.full((5, 5), 4.0, dtype=torch.float64)
    terms = fine_ranking(
        same, targets.inside, clip_mask, torch.ones_like(targets.text_valid), both,
        margins=(0.0, 0.1, 0.2, 0.3), order="relative", divergence="kl",
    )  # fmt: skip
    assert terms[1:].tolist() == pytest.approx([0.1, 0.2, 0.3], abs=1e-12)
