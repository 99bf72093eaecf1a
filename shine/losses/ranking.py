"""SHINE's ranking of saliency: between clips and queries (coarse), between negatives (fine)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import relu

from shine.losses.count import per


def coarse_ranking(
    saliency: Float[Tensor, "row clip"],
    partner_saliency: Float[Tensor, "row clip"],
    inside: Bool[Tensor, "row clip"],
    outside: Bool[Tensor, "row clip"],
    has_partner: Bool[Tensor, " row"],
    num_outside: Float[Tensor, ""],
    num_partners: Float[Tensor, ""],
    *,
    intra_margin: float,
    inter_margin: float,
    top_divisor: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Rank a moment above the rest of its video, and above itself under another query.

    Per row, with s the mean of the k best scores inside the moment, s' the same mean of
    `partner_saliency` and `k = max(1, floor(num_inside / top_divisor))`:

        intra = relu(intra_margin + max_outside - s)      0 where a moment fills its video
        inter = relu(inter_margin + s' - s)               0 where a row has no partner

    Where a moment fills its video the published code compares with the score of clip 0, which
    lies inside.

    Args:
        saliency: logit of each clip for the row's query.
        partner_saliency: the same for the query of another video.
        inside: True on the clips of the moments, at least one per row.
        outside: True on the other real clips.
        has_partner: False where the row has no partner.
        num_outside: what the sum of the first term is divided by.
        num_partners: what the sum of the second term is divided by.
        intra_margin: required lead over the best outside clip, in logits.
        inter_margin: required lead over the other query, in logits.
        top_divisor: larger values average fewer of the best clips.
    """
    k = (inside.sum(dim=1) // top_divisor).clamp(min=1)  # [row]
    best = _top_mean(saliency, inside, k)
    partner_best = _top_mean(partner_saliency, inside & has_partner[:, None], k)
    rest, has_rest = saliency.masked_fill(~outside, -math.inf).amax(dim=1), outside.any(dim=1)
    intra = relu(intra_margin + rest.masked_fill(~has_rest, 0) - best).masked_fill(~has_rest, 0)
    inter = relu(inter_margin + partner_best - best).masked_fill(~has_partner, 0)
    return per(intra.sum(), num_outside), per(inter.sum(), num_partners)


def fine_ranking(
    saliency: Float[Tensor, "text row clip"],
    inside: Bool[Tensor, "row clip"],
    clip_mask: Bool[Tensor, "row clip"],
    text_valid: Bool[Tensor, "text row"],
    num_both: Float[Tensor, "text text"],
    *,
    margins: Sequence[float],
    order: Literal["relative", "absolute"],
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
    no gradient, so s_0 learns from d_0 alone.

    Args:
        saliency: of text 0 (the row's query), 1 (the partner), 2.. (hard negatives, least altered
            first); anything where the text is not valid.
        inside: True on the clips of the moments.
        clip_mask: True on real clips.
        text_valid: a term counts the rows that have both of its texts.
        num_both: rows that have both texts; what the sums are divided by.
        margins: of each term; one more than there are hard negatives.
        order: compare with the text before, or always with the least altered one.
    """
    assert len(saliency) == len(margins) + 1, "one margin per negative text"
    counted = clip_mask & text_valid[..., None]  # [text, row, clip]
    scores = saliency.masked_fill(~counted, 0)
    surprise = -(scores.sigmoid() + 1e-9).log().masked_fill(~counted, 0)
    label = scores[0].detach().sigmoid()
    divergence = torch.cat([inside * surprise[:1], label * surprise[1:]]).sum(dim=-1)
    divergence = divergence / clip_mask.sum(dim=-1).clamp(min=1)  # [text, row]

    # The partner is text 1 and the last of the order: [hard negatives, partner].
    later, later_valid = divergence[1:].roll(-1, 0), text_valid[1:].roll(-1, 0)  # [term, row]
    both = num_both[1:, 1:].roll((-1, -1), (0, 1))  # [term, term]
    if order == "relative":
        earlier, earlier_valid = later[:-1], later_valid[:-1]
        count = torch.cat([both[0, :1], both.diagonal(offset=1)])
    else:
        earlier = later[:1].expand_as(later[1:])
        earlier_valid = later_valid[:1].expand_as(later_valid[1:])
        count = both[0]
    gap = torch.cat([divergence[:1], earlier]) - later
    valid = torch.cat([text_valid[:1], earlier_valid]) & later_valid
    terms = [relu(margin + row) for margin, row in zip(margins, gap.unbind(), strict=True)]
    return per(torch.stack(terms).masked_fill(~valid, 0).sum(dim=1), count)


def _top_mean(
    scores: Float[Tensor, "row clip"], mask: Bool[Tensor, "row clip"], k: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Mean of the k best scores under the mask; 0 where the mask is empty."""
    ranked = scores.masked_fill(~mask, -math.inf).sort(dim=1, descending=True).values
    taken = torch.arange(ranked.shape[1], device=k.device) < k[:, None]  # [row, clip]
    return ranked.masked_fill(~taken | ~mask.any(dim=1, keepdim=True), 0).sum(dim=1) / k
