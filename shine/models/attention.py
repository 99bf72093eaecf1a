"""Multi-head attention over padded keys."""

import math

import torch
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
        mask: Bool[Tensor, "*rows #head #query key"] | None = None,
    ) -> Float[Tensor, "*rows query hidden"]:
        """One vector per query.

        Args:
            query: what asks.
            key: what is compared with it; as wide.
            value: what is averaged.
            mask: True on the keys that a query sees, at least one. None: it sees all.
        """
        lead = query.shape[:-1]
        query, key, value = self._split(query), self._split(key), self._split(value)
        if mask is not None:
            mask = mask.flatten(0, -4)
        rate = self.dropout.rate if self.training else 0.0
        if rate and query.device.type == "cpu":
            scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
            if mask is not None:
                least = torch.finfo(scores.dtype).min  # not infinity, of which 0/0 could come
                scores = scores + query.new_zeros(mask.shape).masked_fill_(~mask, least)
            # bfloat16 is widened: its softmax is twenty times slower on a CPU.
            wide = torch.promote_types(scores.dtype, torch.float32)
            weights = scores.softmax(dim=-1, dtype=wide).to(value.dtype)
            answer = self.dropout(weights) @ value
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
    """Places look at each other: queries and keys see the position, values do not."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_key = xavier_linear(hidden, 2 * hidden, fan_out=3 * hidden, zero_bias=True)
        self.value = xavier_linear(hidden, hidden, fan_out=3 * hidden, zero_bias=True)
        self.attend = Attend(heads, dropout)
        self.out = xavier_linear(hidden, hidden, zero_bias=True)

    def forward(
        self,
        x: Float[Tensor, "*rows place hidden"],
        position: Float[Tensor, "*#rows place hidden"],
        mask: Bool[Tensor, "*#rows place"] | None = None,
    ) -> Float[Tensor, "*rows place hidden"]:
        """The attention branch alone, without residual or norm."""
        query, key = self.query_key(x + position).chunk(2, dim=-1)
        if mask is not None:
            mask = mask.expand(x.shape[:-1])[..., None, None, :]
        return self.out(self.attend(query, key, self.value(x), mask))


class CrossAttention(nn.Module):
    """Places look at a memory: queries see their position, keys theirs, values none."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query = xavier_linear(hidden, hidden, fan_out=3 * hidden, zero_bias=True)
        self.key_value = xavier_linear(hidden, 2 * hidden, fan_out=3 * hidden, zero_bias=True)
        self.attend = Attend(heads, dropout)
        self.out = xavier_linear(hidden, hidden, zero_bias=True)

    def forward(
        self,
        x: Float[Tensor, "*#rows place hidden"],
        position: Float[Tensor, "*#rows place hidden"],
        memory: Float[Tensor, "*rows key hidden"],
        memory_position: Float[Tensor, "*#rows key hidden"] | None,
        mask: Bool[Tensor, "*rows #head #place key"],
    ) -> Float[Tensor, "*rows place hidden"]:
        """The attention branch alone; places that several memories share are projected once."""
        query = self.query(x + position)
        query = query.expand(*memory.shape[:-2], -1, -1)
        if memory_position is None:
            key, value = self.key_value(memory).chunk(2, dim=-1)
        else:
            weight, bias = self.key_value.weight.chunk(2), self.key_value.bias.chunk(2)
            key = F.linear(memory + memory_position, weight[0], bias[0])
            value = F.linear(memory, weight[1], bias[1])
        return self.out(self.attend(query, key, value, mask))
