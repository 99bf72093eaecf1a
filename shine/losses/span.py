"""Matched slots should name the moment: distance of the spans and overlap of the intervals."""

from jaxtyping import Bool, Float
from torch import Tensor

from shine.losses.count import per


def span_loss(
    distance: Float[Tensor, "layer row slot moment"],
    match: Bool[Tensor, "layer row slot moment"],
    num_moments: Float[Tensor, ""],
) -> Float[Tensor, " layer"]:
    """Mean over matched pairs of half their distance: the mean over the two numbers of a span.

    Args:
        distance: of every pair: `|span - moment|_1` for (center, width) in [0, 1], or the sum of
            `-log p` of the moment's first and of its last clip.
        match: the pairs.
        num_moments: what the sum is divided by.
    """
    return per(_matched_sum(distance, match) / 2, num_moments)


def giou_loss(
    overlap: Float[Tensor, "layer row slot moment"],
    match: Bool[Tensor, "layer row slot moment"],
    num_moments: Float[Tensor, ""],
) -> Float[Tensor, " layer"]:
    """Mean over matched pairs of `1 - generalised IoU`.

    Args:
        overlap: the generalised IoU of every pair.
        match: the pairs.
        num_moments: what the sum is divided by.
    """
    return per(_matched_sum(1 - overlap, match), num_moments)


def _matched_sum(values: Tensor, match: Tensor) -> Tensor:
    return values.masked_fill(~match, 0).sum(dim=(1, 2, 3))
