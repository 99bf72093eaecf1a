"""Where a clip or a slot is, as a vector of sines and cosines."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shine.spans import to_spans

TEMPERATURE = 10_000.0


def clip_position(
    clip_mask: Bool[Tensor, "video clip"], width: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "video clip hidden"]:
    """Sines of the place of each clip among the real clips of its video.

    Clip j of T is at `u = 2 pi j / (T + 1e-6)`, j from 1; channel k holds
    `sin(u / 10000^(2 floor(k/2) / width))` for even k and the cosine for odd k. A short `dtype`
    rounds the result alone.
    """
    place = clip_mask.cumsum(dim=1).to(torch.promote_types(dtype, torch.float32))
    angle = 2 * math.pi * place / (place[:, -1:] + 1e-6)
    return _waves(angle, width).to(dtype)


def anchor_position(spans: Float[Tensor, "*rows 2"], width: int) -> Float[Tensor, "*rows hidden"]:
    """Sines of the center in the first half of the vector, of the width in the second.

    As `clip_position` with `u = 2 pi x` and half the channels for each of the two numbers.
    """
    return _waves(2 * math.pi * spans, width // 2).flatten(-2)


def _waves(angle: Float[Tensor, "*rows"], width: int) -> Float[Tensor, "*rows hidden"]:
    """Alternating sine and cosine of the angle at `width / 2` falling frequencies."""
    power = torch.arange(0, width, 2, dtype=angle.dtype, device=angle.device) / width
    phase = angle[..., None] * TEMPERATURE**-power  # [*rows, width / 2]
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)


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
