"""Matched slots should lie near the tokens of their query, in a space of their own."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shine.losses.count import per


def align_loss(
    slots: Float[Tensor, "layer row slot align"],
    tokens: Float[Tensor, "row token align"],
    token_mask: Bool[Tensor, "row token"],
    matched: Bool[Tensor, "layer row slot"],
    num_rows: Float[Tensor, ""],
    *,
    temperature: float,
) -> Float[Tensor, " layer"]:
    """Matched slots meet their query; the contrastive alignment of Moment-DETR.

    Mean over rows, with i over slots and k over tokens, of

        log sum_i exp(l_i) - mean_{i matched} l_i,   l_i = sum_k <q_i, t_k> / temperature

    The published code sums over padding tokens as well.

    Args:
        slots: unit vectors q.
        tokens: unit vectors t.
        token_mask: True on the tokens that count.
        matched: slots that answer for a moment.
        num_rows: what the sum over rows is divided by.
        temperature: divides the similarities.
    """
    query = (tokens * token_mask[..., None]).sum(dim=1)  # [row, align]
    logits = torch.einsum("lrsa,ra->lrs", slots, query) / temperature
    own = logits.masked_fill(~matched, 0).sum(dim=-1) / matched.sum(dim=-1).clamp(min=1)
    return per((logits.logsumexp(dim=-1) - own).sum(dim=-1), num_rows)
