"""Multi-head attention over padded keys."""

import math

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from shine.models.layers import Dropout, xavier_linear


class Attend(nn.Module):
    """`softmax(q k^T / sqrt(width / heads)) v` in every head, over the real keys.

    In training the attention weights are dropped with the given rate. PyTorch's fused kernel for
    the CPU has no dropout, and the path that it falls back to draws Bernoulli numbers one by one;
    so on a CPU the product is written out, with this package's dropout.
    """

    def __init__(self, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)

    def forward(
        self,
        query: Float[Tensor, "*rows query width"],
        key: Float[Tensor, "*rows key width"],
        value: Float[Tensor, "*rows key hidden"],
        mask: Bool[Tensor, "*rows key"] | None = None,
    ) -> Float[Tensor, "*rows query hidden"]:
        """One vector per query.

        Args:
            query: what asks.
            key: what is compared with it; as wide.
            value: what is averaged.
            mask: True on real keys, at least one per row. None: all are real.
        """
        lead = query.shape[:-1]
        query, key, value = self._split(query), self._split(key), self._split(value)
        if mask is not None:
            mask = mask.flatten(0, -2)[:, None, None]  # [rows, 1, 1, key]
        rate = self.dropout.rate if self.training else 0.0
        if rate and query.device.type == "cpu":
            scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
            if mask is not None:
                scores = scores + query.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
            answer = self.dropout(scores.softmax(dim=-1)) @ value
        else:
            answer = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=rate
            )
        return answer.transpose(1, 2).reshape(*lead, value.shape[1] * value.shape[3])

    def _split(self, x: Tensor) -> Tensor:
        """[*rows, n, width] -> [rows, head, n, width / heads]."""
        x = x.flatten(0, -3)
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Clips look at each other: queries and keys see the position, values do not."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_key = xavier_linear(hidden, 2 * hidden, fan_out=3 * hidden, zero_bias=True)
        self.value = xavier_linear(hidden, hidden, fan_out=3 * hidden, zero_bias=True)
        self.attend = Attend(heads, dropout)
        self.out = xavier_linear(hidden, hidden, zero_bias=True)

    def forward(
        self,
        x: Float[Tensor, "text row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        mask: Bool[Tensor, "row clip"],
    ) -> Float[Tensor, "text row clip hidden"]:
        """The attention branch alone, without residual or norm."""
        query, key = self.query_key(x + position).chunk(2, dim=-1)
        return self.out(self.attend(query, key, self.value(x), mask.expand(x.shape[:-1])))


class CrossAttention(nn.Module):
    """Clips look at the tokens of a query: queries see the position, keys and values do not."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query = xavier_linear(hidden, hidden, fan_out=3 * hidden, zero_bias=True)
        self.key_value = xavier_linear(hidden, 2 * hidden, fan_out=3 * hidden, zero_bias=True)
        self.attend = Attend(heads, dropout)
        self.out = xavier_linear(hidden, hidden, zero_bias=True)

    def forward(
        self,
        x: Float[Tensor, "#text row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        tokens: Float[Tensor, "text row token hidden"],
        mask: Bool[Tensor, "text row token"],
    ) -> Float[Tensor, "text row clip hidden"]:
        """The attention branch alone; clips that all texts share are projected once."""
        query = self.query(x + position).expand(len(tokens), -1, -1, -1)
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        return self.out(self.attend(query, key, value, mask))
