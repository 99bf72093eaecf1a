"""Small building blocks: dropout, perceptrons, the projection of features."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def xavier_linear(
    inputs: int, outputs: int, *, fan_out: int | None = None, zero_bias: bool = False
) -> nn.Linear:
    """A linear layer with Xavier-uniform weights.

    Args:
        inputs: columns of the weight.
        outputs: rows of the weight.
        fan_out: rows of the matrix whose bound is used. Several maps of one input are one layer
            here; each keeps the bound that the method gives it.
        zero_bias: start the bias at 0 instead of PyTorch's uniform.
    """
    layer = nn.Linear(inputs, outputs)
    bound = math.sqrt(6 / (inputs + (fan_out or outputs)))
    nn.init.uniform_(layer.weight, -bound, bound)
    if zero_bias:
        nn.init.zeros_(layer.bias)
    return layer


_DRAWS = 2**16  # values of the number that decides whether an element is dropped


class Dropout(nn.Module):
    """In training, each element is 0 with the given rate and the others grow to keep the mean.

    On a CPU PyTorch draws one Bernoulli number per element, which costs more than the matrix
    products around it. Here every 64-bit draw decides four elements, so the rate is rounded to a
    multiple of 2^-16, and the growth follows the rounded rate. The draws come from a generator
    twice as fast as PyTorch's, which seeds it.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` with dropout in training, `x` itself otherwise."""
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        dropped = round(self.rate * _DRAWS)
        return _Dropped.apply(x, dropped) if dropped else x  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate}"


class _Dropped(torch.autograd.Function):
    """Keeps which elements survive as one byte each until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        generator = np.random.SFC64(int(torch.randint(2**62, ())))
        draws = generator.random_raw(-(-x.numel() // 4)).view(np.int16)
        last = dropped - 1 - _DRAWS // 2  # of the draws that drop an element
        kept = torch.from_numpy(draws).clamp_(last, last + 1).sub_(last).to(torch.int8)
        kept = kept[: x.numel()].view(x.shape)  # 0 or 1; a comparison takes twice as long
        ctx.save_for_backward(kept)
        ctx.growth = _DRAWS / (_DRAWS - dropped)
        return kept.to(x.dtype).mul_(ctx.growth).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(ctx.growth).mul_(grad), None


class PReLU(nn.Module):
    """`max(0, x) + slope min(0, x)`, one learned slope for all channels.

    The value is PyTorch's. Its gradient on a CPU takes three times as long as the formula here,
    since it makes a gradient of the slope for every element before it sums them. The formula reads
    the slope as a number, which a GPU would have to wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.25]))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rectified input."""
        if x.device.type != "cpu":
            return F.prelu(x, self.slope.to(x.dtype))
        return _PReLU.apply(x, self.slope)  # pyright: ignore[reportReturnType]


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.leaky_relu(x, slope.item())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, slope = ctx.saved_tensors
        slope_grad = x.clamp(max=0).mul_(grad).sum(dim=-1).sum(dtype=slope.dtype)
        return torch.ops.aten.leaky_relu_backward(grad, x, slope.item(), False), slope_grad[None]


class Mlp(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: input width, hidden widths, output width.
        xavier: Xavier-uniform weights instead of PyTorch's default.
    """

    def __init__(self, widths: Sequence[int], *, xavier: bool) -> None:
        super().__init__()
        make = xavier_linear if xavier else nn.Linear
        self.layers = nn.ModuleList(make(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """`W_n relu(... relu(W_1 x))`."""
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(F.relu(x))
        return x


class FeedForward(nn.Module):
    """`W_2 dropout(activation(W_1 x))`."""

    def __init__(
        self, hidden: int, feedforward: int, dropout: float, activation: nn.Module
    ) -> None:
        super().__init__()
        self.grow = xavier_linear(hidden, feedforward)
        self.activation = activation
        self.dropout = Dropout(dropout)
        self.shrink = xavier_linear(feedforward, hidden)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The branch alone, without residual or norm."""
        return self.shrink(self.dropout(self.activation(self.grow(x))))


class Projection(nn.Module):
    """Features of any width to hidden vectors: blocks of LayerNorm, dropout, linear, ReLU.

    The last block has no ReLU.
    """

    def __init__(self, width: int, hidden: int, blocks: int, dropout: float) -> None:
        super().__init__()
        widths = [width] + [hidden] * (blocks - 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.linears = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows hidden"]:
        """Hidden vectors of the features."""
        for i, (norm, linear) in enumerate(zip(self.norms, self.linears, strict=True)):
            x = linear(self.dropout(norm(F.relu(x) if i else x)))
        return x


class TokenPosition(nn.Module):
    """`dropout(LN(x + E_place))`, E a learned table: a position that knows its token as well."""

    def __init__(self, places: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(places, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.dropout = Dropout(dropout)

    def forward(
        self, tokens: Float[Tensor, "*rows token hidden"]
    ) -> Float[Tensor, "*rows token hidden"]:
        """Positions of projected tokens; no more of them than the table has places."""
        return self.dropout(self.norm(tokens + self.table[: tokens.shape[-2]]))
