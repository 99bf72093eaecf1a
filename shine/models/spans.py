"""From the content of slots to the spans that they propose."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shine.models.layers import Mlp
from shine.spans import to_spans


class SpanHead(Mlp):
    """Three linear layers; then a sigmoid, or a choice of the first and the last clip.

    Args:
        hidden: width of a slot.
        span_clips: clips to choose from; None: the two numbers are (center, width).
    """

    def __init__(self, hidden: int, span_clips: int | None) -> None:
        super().__init__([hidden, hidden, hidden, 2 * (span_clips or 1)], xavier=False)
        self.chooses = span_clips is not None

    def propose(
        self,
        slots: Float[Tensor, "layer row slot hidden"],
        clip_mask: Bool[Tensor, "row clip"],
        *,
        around: Float[Tensor, "layer row slot 2"] | None = None,
    ) -> tuple[Float[Tensor, "layer row slot 2"], Float[Tensor, "layer row slot 2 choice"] | None]:
        """The spans, and the logits of both ends where they were chosen.

        Args:
            slots: their normalised content.
            clip_mask: True on real clips.
            around: logits of spans that the proposals move away from; a choice reads none.
        """
        values = self(slots)
        if self.chooses:
            ends = values.unflatten(-1, (2, -1))
            return likeliest_span(ends, clip_mask.sum(dim=1)), ends
        return (values if around is None else values + around).sigmoid(), None


@torch.no_grad()
def likeliest_span(
    ends: Float[Tensor, "layer row slot 2 choice"], num_clips: Int[Tensor, " row"]
) -> Float[Tensor, "layer row slot 2"]:
    """(center, width) in [0, 1] of the likeliest pair of a first and a last clip, in this order.

    Args:
        ends: logits of the first and of the last clip among `choice` clips.
        num_clips: real clips of each row, at most `choice`.
    """
    choice = torch.arange(ends.shape[-1], device=ends.device)
    real = choice < num_clips[:, None].clamp(min=1)  # [row, choice]
    first, last = ends.masked_fill(~real[:, None, None], -math.inf).log_softmax(dim=-1).unbind(-2)
    both = first[..., :, None] + last[..., None, :]
    both = both.masked_fill(choice[:, None] > choice, -math.inf)  # [..., first, last]
    best = both.flatten(-2).argmax(dim=-1)
    start, end = best // len(choice), best % len(choice) + 1
    moments = torch.stack([start, end], dim=-1) / num_clips[:, None, None].clamp(min=1)
    return to_spans(moments.to(ends.dtype))
