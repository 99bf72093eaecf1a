"""Transformer layers that the backbones share."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from shine.config import DetrConfig
from shine.models.attention import SelfAttention
from shine.models.layers import Dropout, FeedForward


class EncoderLayer(nn.Module):
    """The places of a sequence look at each other, then each at itself.

    Norm after each sum: `a = LN1(x + attention(x)); LN2(a + FFN(a))`. Norm before each branch:
    `a = x + attention(LN1(x)); a + FFN(LN2(a))`.
    """

    def __init__(self, config: DetrConfig, activation: nn.Module) -> None:
        super().__init__()
        self.attention = SelfAttention(config.hidden, config.heads, config.dropout)
        self.feedforward = FeedForward(
            config.hidden, config.feedforward, config.dropout, activation
        )
        self.norm1 = nn.LayerNorm(config.hidden)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.dropout = Dropout(config.dropout)
        self.norm_first = config.norm == "pre"

    def forward(
        self,
        x: Float[Tensor, "*rows place hidden"],
        position: Float[Tensor, "*#rows place hidden"],
        mask: Bool[Tensor, "*#rows place"],
    ) -> Float[Tensor, "*rows place hidden"]:
        """The sequence after one layer; the mask is True on real places."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), position, mask))
            return x + self.dropout(self.feedforward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, position, mask)))
        return self.norm2(x + self.dropout(self.feedforward(x)))
