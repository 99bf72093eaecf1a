"""SHINE's ranking of saliency: between clips and queries (coarse), between negatives (fine)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import relu, softplus

from shine.losses.count import per


def intra_ranking(
    saliency: Float[Tensor, "row clip"],
    inside: Bool[Tensor, "row clip"],
    outside: Bool[Tensor, "row clip"],
    num_outside: Float[Tensor, ""],
    *,
    margin: float,
    top_divisor: int,
) -> Float[Tensor, ""]:
    """Coarse ranking within a video: a moment stands above the rest of it.

    Per row, with I the mean of the k best scores inside the moment, `k = max(1, floor(num_inside /
    top_divisor))`, and X the best score outside: `relu(margin + X - I)`, 0 where a moment fills its
    video. The published code compares such a row with its clip 0 (`published_outside`).

    Args:
        saliency: logit of each clip for the row's query.
        inside: True on the clips of the moments, at least one per row.
        outside: True on the other real clips.
        num_outside: what the sum is divided by.
        margin: required lead over the best outside clip, in logits.
        top_divisor: larger values average fewer of the best clips.
    """
    best = _top_mean(saliency, inside, top_divisor)
    rest, has_rest = saliency.masked_fill(~outside, -math.inf).amax(dim=1), outside.any(dim=1)
    loss = relu(margin + rest.masked_fill(~has_rest, 0) - best).masked_fill(~has_rest, 0)
    return per(loss.sum(), num_outside)


def inter_ranking(
    saliency: Float[Tensor, "row clip"],
    partner_saliency: Float[Tensor, "row clip"],
    inside: Bool[Tensor, "row clip"],
    has_partner: Bool[Tensor, " row"],
    num_partners: Float[Tensor, ""],
    *,
    margin: float,
    top_divisor: int,
) -> Float[Tensor, ""]:
    """Coarse ranking between queries: a moment stands above itself under another video's query.

    Per row, with I and N the means of the k best scores inside the moment for the two queries (k as
    in `intra_ranking`): `relu(margin + N - I)`, 0 where a row has no partner.

    Args:
        saliency: logit of each clip for the row's query.
        partner_saliency: the same for the query of another video.
        inside: True on the clips of the moments, at least one per row.
        has_partner: False where the row has no partner.
        num_partners: what the sum is divided by.
        margin: required lead over the other query, in logits.
        top_divisor: larger values average fewer of the best clips.
    """
    best = _top_mean(saliency, inside, top_divisor)
    partner_best = _top_mean(partner_saliency, inside & has_partner[:, None], top_divisor)
    loss = relu(margin + partner_best - best).masked_fill(~has_partner, 0)
    return per(loss.sum(), num_partners)


def fine_ranking(
    saliency: Float[Tensor, "text row clip"],
    inside: Bool[Tensor, "row clip"],
    clip_mask: Bool[Tensor, "row clip"],
    text_valid: Bool[Tensor, "text row"],
    num_both: Float[Tensor, "text text"],
    *,
    margins: Sequence[float],
    order: Literal["relative", "absolute"],
    divergence: Literal["likelihood", "kl"] = "likelihood",
) -> Float[Tensor, " term"]:
    """The more a query is altered, the further its saliency lies from that of the true query.

    With T the real clips of a row, sg the stopped gradient, and labels l = 1 inside, 0 outside
    against the true query, l = sigmoid(s_0) against the others:

        D(l, s) = 1/T sum_t -sg(l_t) log(sigmoid(s_t) + 1e-9)
        d_0 = D(inside, s_0),  d_j = D(sigmoid(s_0), s of hard negative j),  j = 1..H
        d_{H+1} = D(sigmoid(s_0), s of the partner)

        relative:  term j = relu(margin_j + d_{j-1} - d_j)                       j = 1..H+1
        absolute:  term 1 the same,  term j = relu(margin_j + d_1 - d_j)         j = 2..H+1

    D is one-sided, as published: D(l, l) > 0, and it grows where all of s falls. The labels carry
    no gradient, so s_0 learns from d_0 alone. With `kl` D is the mean divergence of two coins, 0
    for equal curves only; with p = sigmoid(s):

        D(l, s) = 1/T sum_t  l_t log(l_t / p_t) + (1 - l_t) log((1 - l_t) / (1 - p_t))

    Args:
        saliency: of text 0 (the row's query), 1 (the partner), 2.. (hard negatives, least altered
            first); anything where the text is not valid.
        inside: True on the clips of the moments.
        clip_mask: True on real clips.
        text_valid: a term counts the rows that have both of its texts.
        num_both: rows that have both texts; what the sums are divided by.
        margins: of each term; one more than there are hard negatives.
        order: compare with the text before, or always with the least altered one.
        divergence: how far a curve lies from its label.
    """
    assert len(saliency) == len(margins) + 1, "one margin per negative text"
    counted = clip_mask & text_valid[..., None]  # [text, row, clip]
    scores = saliency.masked_fill(~counted, 0)
    true = scores[0].detach()
    label = torch.cat([inside[None].to(true), true.sigmoid().expand_as(scores[1:])])
    if divergence == "likelihood":
        apart = -label * (scores.sigmoid() + 1e-9).log()
    else:  # cross entropy of two coins, less the entropy of the label; a label of 0 or 1 has none
        own = torch.cat([torch.zeros_like(true)[None], _coin(true, label[1:])])
        apart = _coin(scores, label) - own
    apart = apart.masked_fill(~counted, 0).sum(dim=-1)
    apart = apart / clip_mask.sum(dim=-1).clamp(min=1)  # [text, row]

    # The partner is text 1 and the last of the order: [hard negatives, partner].
    later, later_valid = apart[1:].roll(-1, 0), text_valid[1:].roll(-1, 0)  # [term, row]
    both = num_both[1:, 1:].roll((-1, -1), (0, 1))  # [term, term]
    if order == "relative":
        earlier, earlier_valid = later[:-1], later_valid[:-1]
        count = torch.cat([both[0, :1], both.diagonal(offset=1)])
    else:
        earlier = later[:1].expand_as(later[1:])
        earlier_valid = later_valid[:1].expand_as(later_valid[1:])
        count = both[0]
    gap = torch.cat([apart[:1], earlier]) - later
    valid = torch.cat([text_valid[:1], earlier_valid]) & later_valid
    terms = [relu(margin + row) for margin, row in zip(margins, gap.unbind(), strict=True)]
    return per(torch.stack(terms).masked_fill(~valid, 0).sum(dim=1), count)


def _coin(
    scores: Float[Tensor, "*text row clip"], label: Float[Tensor, "text row clip"]
) -> Float[Tensor, "text row clip"]:
    """Cross entropy of a coin with the label's probability, `-l log p - (1 - l) log(1 - p)`."""
    return softplus(scores) - label * scores


def published_outside(
    outside: Bool[Tensor, "row clip"],
) -> Bool[Tensor, "row clip"]:
    """`outside` as the published code has it: clip 0, which is inside, where a row has none."""
    first = torch.arange(outside.shape[1], device=outside.device) == 0
    return torch.where(outside.any(dim=1, keepdim=True), outside, first)


def _top_mean(
    scores: Float[Tensor, "row clip"], mask: Bool[Tensor, "row clip"], divisor: int
) -> Float[Tensor, " row"]:
    """Mean of the best `1 / divisor` of the scores under the mask, at least one; 0 without any."""
    k = (mask.sum(dim=1) // divisor).clamp(min=1)  # [row]
    ranked = scores.masked_fill(~mask, -math.inf).sort(dim=1, descending=True).values
    taken = torch.arange(ranked.shape[1], device=k.device) < k[:, None]  # [row, clip]
    return ranked.masked_fill(~taken | ~mask.any(dim=1, keepdim=True), 0).sum(dim=1) / k
