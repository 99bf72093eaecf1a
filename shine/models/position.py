"""Where a clip or a slot is, as a vector of sines and cosines."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
