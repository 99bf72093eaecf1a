"""Intervals of a video: two ways to write them, how much they overlap, and suppression.

A moment is `(start, end)`, a span the same interval as `(center, width)`. The functions take
either unit, seconds or the share of the video, as long as both arguments use the same one.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def to_moments(spans: Float[Tensor, "*rows 2"]) -> Float[Tensor, "*rows 2"]:
    """`(start, end)` of each `(center, width)`; nothing is clipped."""
    center, width = spans.unbind(-1)
    return torch.stack([center - width / 2, center + width / 2], dim=-1)


def to_spans(moments: Float[Tensor, "*rows 2"]) -> Float[Tensor, "*rows 2"]:
    """`(center, width)` of each `(start, end)`."""
    start, end = moments.unbind(-1)
    return torch.stack([(start + end) / 2, end - start], dim=-1)


def iou(
    first: Float[Tensor, "*#rows n 2"], second: Float[Tensor, "*#rows m 2"]
) -> Float[Tensor, "... n m"]:
    """Intersection over union of every pair of moments, in [0, 1].

    Two moments without length have no union; their value is 0 and so is its gradient.
    """
    intersection, union, _ = _measures(first, second)
    return _ratio(intersection, union)


def generalised_iou(
    first: Float[Tensor, "*#rows n 2"], second: Float[Tensor, "*#rows m 2"]
) -> Float[Tensor, "... n m"]:
    """IoU minus the share of the hull that neither moment covers, in [-1, 1], of every pair.

        IoU - (hull - union) / hull,  hull = max end - min start

    Unlike IoU it tells near from far for moments that do not meet (Rezatofighi et al., 2019).
    A division 0/0 gives 0, with gradient 0.
    """
    intersection, union, hull = _measures(first, second)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def temporal_nms(
    moments: Float[Tensor, "*rows slot 2"], scores: Float[Tensor, "*rows slot"], threshold: float
) -> Bool[Tensor, "*rows slot"]:
    """True on the moments that survive temporal non-maximum suppression.

    In order of falling score (ties: the earlier slot first) a moment survives unless a survivor
    before it has an IoU with it strictly above `threshold`.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [*rows, slot]
    ranked = moments.gather(-2, order[..., None].expand_as(moments))
    # A moment can only be removed by one ranked before it: the strict upper triangle.
    removes = (iou(ranked, ranked) > threshold).triu(diagonal=1)  # [*rows, slot, slot]
    kept = torch.ones_like(scores, dtype=torch.bool)
    for rank in range(scores.shape[-1]):
        kept = kept & ~(kept[..., rank, None] & removes[..., rank, :])
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _measures(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, union and hull of every pair."""
    start_a, end_a = first.unsqueeze(-2).unbind(-1)  # [*rows, n, 1]
    start_b, end_b = second.unsqueeze(-3).unbind(-1)  # [*rows, 1, m]
    intersection = (torch.minimum(end_a, end_b) - torch.maximum(start_a, start_b)).clamp(min=0)
    union = (end_a - start_a) + (end_b - start_b) - intersection
    hull = torch.maximum(end_a, end_b) - torch.minimum(start_a, start_b)
    return intersection, union, hull


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, and 0 with gradient 0 where `whole` is 0."""
    empty = whole == 0
    return (part / whole.masked_fill(empty, 1)).masked_fill(empty, 0)
