"""Saliency should rise with relevance, and stay low under the query of another video."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import relu, softplus

from shine.losses.count import per

TEMPERATURE = 0.5
GRADES = 12  # of the relevance scale: three annotators, up to 4 points each


def rank_loss(
    saliency: Float[Tensor, "row clip"],
    partner_saliency: Float[Tensor, "row clip"],
    relevance: Float[Tensor, "row clip"],
    clip_mask: Bool[Tensor, "row clip"],
    has_partner: Bool[Tensor, " row"],
    num_rows: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Relevant clips stand out of all clips of the row, under its query and under its partner's.

    The rank-aware contrast of QD-DETR. With the clips of both queries as candidates S, of which
    those under the partner have relevance 0, and `P_r = {t : relevance_t >= r}`, per row:

        1/12 sum_{r=1..11}  mean_{t in P_r}  -log( exp(s_t / 0.5) / sum_{u in S} exp(s_u / 0.5) )

    A grade without clips adds nothing. The divisor is 12 whatever grades occur, as published: with
    labels of 0 and 1 the term is one twelfth of a single contrast. A row without partner keeps its
    own clips as candidates.

    Args:
        saliency: logit of each clip for the row's query.
        partner_saliency: the same for the query of another video; any finite or infinite value
            where the row has none.
        relevance: graded label of each clip.
        clip_mask: True on real clips; a row without any adds nothing.
        has_partner: False where the row has no partner.
        num_rows: what the sum over rows is divided by.
    """
    grade = torch.arange(1, GRADES, device=relevance.device)
    reached = (relevance[..., None] >= grade) & clip_mask[..., None]  # [row, clip, grade]
    share = reached.to(saliency.dtype) / reached.sum(dim=1, keepdim=True).clamp(min=1)
    weight = share.sum(dim=-1) / GRADES  # [row, clip]

    none = ~clip_mask.any(dim=1, keepdim=True)  # a sum over nothing would be NaN
    own = saliency.masked_fill(~clip_mask, -math.inf).masked_fill(none, 0)
    other = partner_saliency.masked_fill(~(clip_mask & has_partner[:, None]), -math.inf)
    total = (torch.cat([own, other], dim=1) / TEMPERATURE).logsumexp(dim=1, keepdim=True)
    log_share = (saliency.masked_fill(~clip_mask, 0) / TEMPERATURE) - total
    return per(-(weight * log_share).sum(), num_rows)


def negative_loss(
    partner_saliency: Float[Tensor, "row clip"],
    clip_mask: Bool[Tensor, "row clip"],
    has_partner: Bool[Tensor, " row"],
    num_partners: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """No clip is salient for the query of another video: mean over rows of `sum_t -log(1 - p_t)`.

    `p = sigmoid(s)`, so the summand is `softplus(s)`, which does not overflow.
    """
    counted = clip_mask & has_partner[:, None]
    return per(softplus(partner_saliency.masked_fill(~counted, -math.inf)).sum(), num_partners)


def hinge_loss(
    saliency: Float[Tensor, "row clip"],
    pairs: Int[Tensor, "row pair 2"],
    has_pairs: Bool[Tensor, " row"],
    num_pairs: Float[Tensor, ""],
    *,
    margin: float,
) -> Float[Tensor, ""]:
    """Sampled relevant clips lead sampled others: mean over pairs of `2 relu(margin + s_b - s_a)`.

    The saliency loss of Moment-DETR, its factor 2 included.

    Args:
        saliency: logit of each clip for the row's query.
        pairs: clips (a, b) of which a is the more relevant one; any clip where a row has no pairs.
        has_pairs: False where the row has none.
        num_pairs: what the sum is divided by.
        margin: required lead, in logits.
    """
    above, below = saliency.gather(1, pairs.flatten(1)).unflatten(1, pairs.shape[1:]).unbind(-1)
    lead = 2 * relu(margin + below - above)  # [row, pair]
    return per(lead.masked_fill(~has_pairs[:, None], 0).sum(), num_pairs)
