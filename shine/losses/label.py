"""Matched slots are foreground, the others background."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shine.losses.count import per


def label_loss(
    logits: Float[Tensor, "layer row slot 2"],
    foreground: Bool[Tensor, "layer row slot"],
    num_rows: Float[Tensor, ""],
    *,
    background_weight: float,
) -> Float[Tensor, " layer"]:
    """Mean over rows and slots of `-w_y log softmax(logits)_y`.

    Class y is 0 with w = 1 for a matched slot, 1 with w = `background_weight` for the others. The
    mean is over all slots, not over the sum of the weights.
    """
    log_share = logits.log_softmax(dim=-1)
    loss = -torch.where(foreground, log_share[..., 0], background_weight * log_share[..., 1])
    return per(loss.sum(dim=(1, 2)) / logits.shape[2], num_rows)
