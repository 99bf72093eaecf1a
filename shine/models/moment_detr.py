"""Moment-DETR: moment retrieval as set prediction (Lei et al., NeurIPS 2021, "QVHighlights").

Clips and tokens form one sequence whose places all look at each other. Saliency is read off the
clips; slots with learned positions read the whole sequence and propose spans.

Departures from the published code:
  All texts of a row go through one encoder pass, and only the row's own query is decoded.
  Where slots choose a first and a last clip (`span_clips`), the answer is the likeliest pair in
  order; the published decoding cannot run.
  Modules that no run uses (text positions where they are off) do not exist.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from shine.config import MomentDetrConfig
from shine.data.batch import Alignment, Inputs, Outputs
from shine.models.attention import CrossAttention, SelfAttention
from shine.models.layers import Dropout, FeedForward, Projection, TokenPosition
from shine.models.position import clip_position
from shine.models.published import COMMON, Names, cross_attention, layers
from shine.models.spans import SpanHead
from shine.models.transformer import EncoderLayer


class MomentDetr(nn.Module):
    """Clips and tokens in, a saliency per clip and spans with foreground logits out.

    Args:
        config: sizes and options.
        clip_width: columns of a clip vector, temporal end points included.
        token_width: columns of a token vector.
    """

    def __init__(self, config: MomentDetrConfig, *, clip_width: int, token_width: int) -> None:
        super().__init__()
        hidden, blocks = config.hidden, config.input_projections
        self.config = config
        self.clip_projection = Projection(clip_width, hidden, blocks, config.input_dropout)
        self.token_projection = Projection(token_width, hidden, blocks, config.input_dropout)
        self.token_position = (
            TokenPosition(config.text_positions, hidden, config.input_dropout)
            if config.text_positions
            else None
        )
        self.encoder_layers = nn.ModuleList(
            EncoderLayer(config, nn.ReLU()) for _ in range(config.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(hidden) if config.norm == "pre" else nn.Identity()
        self.saliency_head = nn.Linear(hidden, 1)
        self.slots = nn.Parameter(torch.randn(config.slots, hidden))  # their positions
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden)
        self.span_head = SpanHead(hidden, config.span_clips)
        self.label_head = nn.Linear(hidden, 2)
        if config.align_width is not None:
            self.align_slot = nn.Linear(hidden, config.align_width)
            self.align_token = nn.Linear(hidden, config.align_width)
            self.align_clip = nn.Linear(hidden, config.align_width)

    @property
    def published_names(self) -> Names:
        """See `shine.models.published`."""
        return PUBLISHED

    def forward(self, inputs: Inputs) -> Outputs:
        """Saliency for every text; spans and logits for text 0, one set per decoder layer."""
        return self.ground(self.clip_projection(inputs.clips), inputs)

    def ground(self, clips: Float[Tensor, "video clip hidden"], inputs: Inputs) -> Outputs:
        """What `forward` gives, from clips that were projected before."""
        num_clips = clips.shape[1]
        clip_mask = inputs.clip_mask.index_select(0, inputs.video)  # [row, clip]
        position = clip_position(inputs.clip_mask, clips.shape[-1], clips.dtype)
        clips, position = (x.index_select(0, inputs.video) for x in (clips, position))
        tokens = self.token_projection(inputs.tokens)  # [text, row, token, hidden]
        memory, place, mask = self._encode(clips, position, tokens, clip_mask, inputs.token_mask)
        slots = self._decode(memory[0], place[0], mask[0])  # [layer, row, slot, hidden]
        spans, ends = self.span_head.propose(slots, clip_mask)
        return Outputs(
            logits=self.label_head(slots),
            spans=spans,
            saliency=self.saliency_head(memory[:, :, :num_clips]).squeeze(-1),
            ends=ends,
            alignment=self._align(slots, memory[0], num_clips, inputs.token_mask[0]),
        )

    def _encode(
        self,
        clips: Float[Tensor, "row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        tokens: Float[Tensor, "text row token hidden"],
        clip_mask: Bool[Tensor, "row clip"],
        token_mask: Bool[Tensor, "text row token"],
    ) -> tuple[
        Float[Tensor, "text row place hidden"],
        Float[Tensor, "text row place hidden"],
        Bool[Tensor, "text row place"],
    ]:
        """Clips and tokens as they shape each other, their positions and their mask."""
        texts = len(tokens)
        token_position = torch.zeros_like(tokens)
        if self.token_position is not None:
            token_position = self.token_position(tokens)
        x = torch.cat([clips.expand(texts, -1, -1, -1), tokens], dim=2)
        place = torch.cat([position.expand(texts, -1, -1, -1), token_position], dim=2)
        mask = torch.cat([clip_mask.expand(texts, -1, -1), token_mask], dim=2)
        for layer in self.encoder_layers:
            x = layer(x, place, mask)
        return self.encoder_norm(x), place, mask

    def _decode(
        self,
        memory: Float[Tensor, "row place hidden"],
        place: Float[Tensor, "row place hidden"],
        mask: Bool[Tensor, "row place"],
    ) -> Float[Tensor, "layer row slot hidden"]:
        """The normalised content of the slots after each layer."""
        slots = memory.new_zeros(len(memory), *self.slots.shape)
        contents = []
        for layer in self.decoder_layers:
            slots = layer(slots, self.slots, memory, place, mask)
            contents.append(slots)
        return self.decoder_norm(torch.stack(contents))

    def _align(
        self,
        slots: Float[Tensor, "layer row slot hidden"],
        memory: Float[Tensor, "row place hidden"],
        num_clips: int,
        token_mask: Bool[Tensor, "row token"],
    ) -> Alignment | None:
        if self.config.align_width is None:
            return None
        wide = torch.promote_types(memory.dtype, torch.float32)  # unit vectors are sensitive
        return Alignment(
            slots=F.normalize(self.align_slot(slots).to(wide), dim=-1),
            tokens=F.normalize(self.align_token(memory[:, num_clips:]).to(wide), dim=-1),
            clips=F.normalize(self.align_clip(memory[:, :num_clips]).to(wide), dim=-1),
            token_mask=token_mask,
        )


class DecoderLayer(nn.Module):
    """Slots look at each other, then at the sequence, then each at itself."""

    def __init__(self, config: MomentDetrConfig) -> None:
        super().__init__()
        hidden, heads, dropout = config.hidden, config.heads, config.dropout
        self.attention = SelfAttention(hidden, heads, dropout)
        self.memory_attention = CrossAttention(hidden, heads, dropout)
        self.feedforward = FeedForward(hidden, config.feedforward, dropout, nn.ReLU())
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.norm3 = nn.LayerNorm(hidden)
        self.dropout = Dropout(dropout)
        self.norm_first = config.norm == "pre"

    def forward(
        self,
        slots: Float[Tensor, "row slot hidden"],
        position: Float[Tensor, "slot hidden"],
        memory: Float[Tensor, "row place hidden"],
        place: Float[Tensor, "row place hidden"],
        mask: Bool[Tensor, "row place"],
    ) -> Float[Tensor, "row slot hidden"]:
        """The content of the slots after one layer.

        Args:
            slots: their content.
            position: their positions, the same for every row.
            memory: encoded clips and tokens.
            place: positions of the memory.
            mask: True on real places of the memory.
        """
        reading = (memory, place, mask[:, None, None])
        if self.norm_first:
            slots = slots + self.dropout(self.attention(self.norm1(slots), position))
            seen = self.memory_attention(self.norm2(slots), position, *reading)
            slots = slots + self.dropout(seen)
            return slots + self.dropout(self.feedforward(self.norm3(slots)))
        slots = self.norm1(slots + self.dropout(self.attention(slots, position)))
        seen = self.memory_attention(slots, position, *reading)
        slots = self.norm2(slots + self.dropout(seen))
        return self.norm3(slots + self.dropout(self.feedforward(slots)))


# The published names of Moment-DETR (shine.models.published).
PUBLISHED: Names = (
    *COMMON,
    (r"saliency_head\.(\w+)", (r"saliency_proj.\1",)),
    ("slots", ("query_embed.weight",)),
    (r"align_slot\.(\w+)", (r"contrastive_align_projection_query.\1",)),
    (r"align_token\.(\w+)", (r"contrastive_align_projection_txt.\1",)),
    (r"align_clip\.(\w+)", (r"contrastive_align_projection_vid.\1",)),
    (r"encoder_norm\.(\w+)", (r"transformer.encoder.norm.\1",)),
    (r"decoder_norm\.(\w+)", (r"transformer.decoder.norm.\1",)),
    *cross_attention(
        r"decoder_layers\.(\d+)\.memory_attention",
        r"transformer.decoder.layers.\1.multihead_attn",
    ),
    *layers("encoder_layers", "transformer.encoder.layers"),
    *layers("decoder_layers", "transformer.decoder.layers"),
)
