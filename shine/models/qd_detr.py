"""QD-DETR: query-dependent video representations for moment retrieval (Moon et al., CVPR 2023).

Clips attend to the tokens of a query (text layers), then to each other and to one learned global
vector (video layers). Saliency compares each clip with that global vector; a decoder of anchored
slots proposes spans.

Departures from the published code:
  All texts of a row go through one encoder pass, and only the row's own query is decoded.
  Tokens are masked by the padding of their own text alone, and their positions are those of their
  own text; `compat: reference` brings back both published rules (`tiled_mask`, `_token_position`).
  The width that divides the anchor modulation stays at or above 1e-3.
  Norm before the branches works; there the text layers read unnormalised tokens, and the clips are
  normalised once more after the video layers.
  Modules that no run uses (text positions where they are off, the last refinement) do not exist.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shine.config import QdDetrConfig
from shine.data.batch import Inputs, Outputs
from shine.models.attention import Attend, CrossAttention
from shine.models.layers import (
    Dropout,
    FeedForward,
    Mlp,
    PReLU,
    Projection,
    TokenPosition,
    xavier_linear,
)
from shine.models.position import anchor_position, clip_position
from shine.models.published import COMMON, Names, cross_attention, layers
from shine.models.spans import SpanHead
from shine.models.transformer import EncoderLayer

SMALLEST = 1e-3  # of a width that divides, and of both shares of a logit


class QdDetr(nn.Module):
    """Clips and tokens in, a saliency per clip and spans with foreground logits out.

    Args:
        config: sizes and options.
        clip_width: columns of a clip vector, temporal end points included.
        token_width: columns of a token vector.
    """

    def __init__(self, config: QdDetrConfig, *, clip_width: int, token_width: int) -> None:
        super().__init__()
        hidden, blocks = config.hidden, config.input_projections
        layers = range(config.encoder_layers)
        self.config = config
        self.clip_projection = Projection(clip_width, hidden, blocks, config.input_dropout)
        self.token_projection = Projection(token_width, hidden, blocks, config.input_dropout)
        self.token_position = (
            TokenPosition(config.text_positions, hidden, config.input_dropout)
            if config.text_positions
            else None
        )
        self.global_content = nn.Parameter(torch.randn(hidden))
        self.global_position = nn.Parameter(torch.randn(hidden))
        self.text_layers = nn.ModuleList(TextLayer(config) for _ in layers)
        self.video_layers = nn.ModuleList(EncoderLayer(config, PReLU()) for _ in layers)
        self.video_norm = nn.LayerNorm(hidden) if config.norm == "pre" else nn.Identity()
        self.saliency_clip = nn.Linear(hidden, hidden)
        self.saliency_global = nn.Linear(hidden, hidden)
        self.decoder = Decoder(config)
        self.span_head = SpanHead(hidden, config.span_clips)
        self.label_head = nn.Linear(hidden, 2)

    @property
    def published_names(self) -> Names:
        """See `shine.models.published`."""
        return PUBLISHED

    def forward(self, inputs: Inputs) -> Outputs:
        """Saliency for every text; spans and logits for text 0, one set per decoder layer."""
        return self.ground(self.clip_projection(inputs.clips), inputs)

    def ground(self, clips: Float[Tensor, "video clip hidden"], inputs: Inputs) -> Outputs:
        """What `forward` gives, from clips that were projected before."""
        clip_mask = inputs.clip_mask.index_select(0, inputs.video)  # [row, clip]
        clips = clips.index_select(0, inputs.video)
        position = clip_position(inputs.clip_mask, clips.shape[-1], clips.dtype)
        position = position.index_select(0, inputs.video)  # [row, clip, hidden]

        sequence, position = self._encode(clips, position, clip_mask, inputs)
        summary, memory = sequence[:, :, 0], sequence[:, :, 1:]
        slots, anchors = self.decoder(memory[0], position[:, 1:], clip_mask)
        spans, ends = self.span_head.propose(slots, clip_mask, around=_logit(anchors))
        return Outputs(
            logits=self.label_head(slots),
            spans=spans,
            saliency=self._saliency(memory, summary),
            ends=ends,
        )

    def _encode(
        self,
        clips: Float[Tensor, "row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        clip_mask: Bool[Tensor, "row clip"],
        inputs: Inputs,
    ) -> tuple[Float[Tensor, "text row place hidden"], Float[Tensor, "row place hidden"]]:
        """The global vector and the clips, as each text shapes them, and their positions."""
        tokens = self.token_projection(inputs.tokens)
        token_position = self._token_position(tokens)
        if self.config.compat == "reference":
            seen = tiled_mask(clip_mask, inputs.token_mask, self.config.heads)
        else:
            seen = inputs.token_mask[..., None, None, :]  # [text, row, head, clip, token]
        clips = clips[None]  # [1, row, clip, hidden]: one for all texts until they meet a text
        for layer in self.text_layers:
            clips = layer(clips, position, tokens, token_position, seen)
        texts, rows = clips.shape[:2]
        content = self.global_content.to(clips.dtype).expand(texts, rows, 1, -1)
        place = self.global_position.to(clips.dtype).expand(rows, 1, -1)
        sequence = torch.cat([content, clips], dim=2)
        position = torch.cat([place, position], dim=1)
        mask = torch.cat([clip_mask.new_ones(rows, 1), clip_mask], dim=1)  # [row, 1 + clip]
        for layer in self.video_layers:
            sequence = layer(sequence, position, mask)
        return self.video_norm(sequence), position

    def _token_position(
        self, tokens: Float[Tensor, "text row token hidden"]
    ) -> Float[Tensor, "#text row token hidden"] | None:
        """Positions of the tokens; as published, all texts of a row have those of its query."""
        if self.token_position is None:
            return None
        own = self.config.compat == "reference"
        return self.token_position(tokens[:1] if own else tokens)

    def _saliency(
        self,
        memory: Float[Tensor, "text row clip hidden"],
        summary: Float[Tensor, "text row hidden"],
    ) -> Float[Tensor, "text row clip"]:
        """`<A m_t + a, G g + b> / sqrt(hidden)`, computed as `<m_t, A^T u> + <a, u>`, u = G g + b.

        The second form maps one vector per row instead of one per clip.
        """
        goal = self.saliency_global(summary) / math.sqrt(summary.shape[-1])
        direction = goal @ self.saliency_clip.weight
        return (memory @ direction[..., None]).squeeze(-1) + goal @ self.saliency_clip.bias[:, None]


class TextLayer(nn.Module):
    """Each clip takes in the tokens of a query.

    With `a = x + attention(x, tokens)`: `LN2(a + FFN(LN1(a)))`. The residual of the feed-forward
    branch is not normalised. Norm before each branch: `a = x + attention(LN1(x), tokens)`,
    `a + FFN(LN2(a))`.
    """

    def __init__(self, config: QdDetrConfig) -> None:
        super().__init__()
        self.attention = CrossAttention(config.hidden, config.heads, config.dropout)
        self.feedforward = FeedForward(config.hidden, config.feedforward, config.dropout, PReLU())
        self.norm1 = nn.LayerNorm(config.hidden)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.dropout = Dropout(config.dropout)
        self.norm_first = config.norm == "pre"

    def forward(
        self,
        clips: Float[Tensor, "#text row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        tokens: Float[Tensor, "text row token hidden"],
        token_position: Float[Tensor, "#text row token hidden"] | None,
        seen: Bool[Tensor, "text row #head #clip token"],
    ) -> Float[Tensor, "text row clip hidden"]:
        """The clips of each row under each text; `seen` is True on tokens that a clip may see."""
        memory = (tokens, token_position, seen)
        if self.norm_first:
            clips = clips + self.dropout(self.attention(self.norm1(clips), position, *memory))
            return clips + self.dropout(self.feedforward(self.norm2(clips)))
        clips = clips + self.dropout(self.attention(clips, position, *memory))
        return self.norm2(clips + self.dropout(self.feedforward(self.norm1(clips))))


def tiled_mask(
    clip_mask: Bool[Tensor, "row clip"], token_mask: Bool[Tensor, "text row token"], heads: int
) -> Bool[Tensor, "text row head clip token"]:
    """Which tokens each clip sees in the published code, whose mask is tiled in the wrong order.

    Head h of sample b also hides, from the clips that are padding in sample `(b heads + h) mod N`,
    the tokens that are padding there. N counts the samples of a pass on one worker: the published
    code encodes queries, partners and all hard negatives (level by level) in three passes.
    """
    passes = [token_mask[:1], token_mask[1:2], token_mask[2:]]
    seen = []
    for tokens in (tokens for tokens in passes if len(tokens)):
        samples = tokens.flatten(0, 1)  # [sample, token]
        count = len(samples)
        sample = torch.arange(count * heads, device=tokens.device).view(count, heads)
        sample = sample % max(count, 1)
        padding = ~clip_mask.repeat(len(tokens), 1)[sample]  # [sample, head, clip]
        hidden = padding[..., None] & ~samples[sample][:, :, None]
        own = samples[:, None, None] & ~hidden  # [sample, head, clip, token]
        seen.append(own.unflatten(0, tokens.shape[:2]))
    return torch.cat(seen)


class Decoder(nn.Module):
    """Slots with anchor spans read the clips and move their anchors, layer by layer (DAB-DETR)."""

    def __init__(self, config: QdDetrConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.anchors = nn.Parameter(torch.randn(config.slots, 2))  # logits of (center, width)
        self.layers = nn.ModuleList(
            DecoderLayer(config, first=i == 0) for i in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.smallest = 0.0 if config.compat == "reference" else SMALLEST
        self.anchor_head = Mlp([hidden, hidden, hidden], xavier=True)
        self.width_head = Mlp([hidden, hidden, 1], xavier=True)
        if config.decoder_layers > 1:
            self.scale_head = Mlp([hidden, hidden, hidden], xavier=True)
            self.refine_head = Mlp([hidden, hidden, hidden, 2], xavier=True)
            nn.init.zeros_(self.refine_head.layers[-1].bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        memory: Float[Tensor, "row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        mask: Bool[Tensor, "row clip"],
    ) -> tuple[Float[Tensor, "layer row slot hidden"], Float[Tensor, "layer row slot 2"]]:
        """The normalised content of the slots after each layer, and the spans that entered it."""
        span = self.anchors.sigmoid()  # [slot, 2] in the first layer, [row, slot, 2] after it
        rows, (count, hidden) = len(memory), (len(self.anchors), memory.shape[-1])
        slots = memory.new_zeros(rows, count, hidden)
        contents, spans = [], [span.expand(rows, -1, -1)]
        for i, layer in enumerate(self.layers):
            waves = anchor_position(span, hidden)
            where = self.anchor_head(waves)
            scale = self.width_head(slots).sigmoid() / span[..., 1:].clamp(min=self.smallest)
            if i > 0:
                scale = scale * self.scale_head(slots)
            slots = layer(slots, where, waves * scale, memory, position, mask)
            contents.append(slots)
            if i + 1 < len(self.layers):
                refined = (self.refine_head(slots) + _logit(span)).sigmoid()
                spans.append(refined)
                span = refined.detach()
        return self.norm(torch.stack(contents)), torch.stack(spans)


class DecoderLayer(nn.Module):
    """Slots look at each other, then at the clips, then each at itself.

    In the second step every head compares content with content and place with place: its query is
    `[content ; waves of the anchor]`, its key `[content ; position of the clip]`. Only the first
    layer also adds place to content, since its slots have no content yet.
    """

    def __init__(self, config: QdDetrConfig, *, first: bool) -> None:
        super().__init__()
        hidden, heads, dropout = config.hidden, config.heads, config.dropout
        self.heads = heads
        self.slot_content = xavier_linear(hidden, 3 * hidden, fan_out=hidden)  # query, key, value
        self.slot_place = xavier_linear(hidden, 2 * hidden, fan_out=hidden)  # query, key
        self.slot_attend = Attend(heads, dropout)
        self.slot_out = xavier_linear(hidden, hidden, zero_bias=True)
        self.query_content = xavier_linear(hidden, hidden)
        self.query_place = xavier_linear(hidden, hidden) if first else None
        self.query_waves = xavier_linear(hidden, hidden)
        self.clip_content = xavier_linear(hidden, 2 * hidden, fan_out=hidden)  # key, value
        self.clip_place = xavier_linear(hidden, hidden)
        self.clip_attend = Attend(heads, dropout)
        self.clip_out = xavier_linear(hidden, hidden, zero_bias=True)
        self.feedforward = FeedForward(hidden, config.feedforward, dropout, PReLU())
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.norm3 = nn.LayerNorm(hidden)
        self.dropout = Dropout(dropout)
        self.norm_first = config.norm == "pre"

    def forward(
        self,
        slots: Float[Tensor, "row slot hidden"],
        where: Float[Tensor, "*#row slot hidden"],
        waves: Float[Tensor, "row slot hidden"],
        memory: Float[Tensor, "row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        mask: Bool[Tensor, "row clip"],
    ) -> Float[Tensor, "row slot hidden"]:
        """The content of the slots after one layer.

        Args:
            slots: their content.
            where: embedded anchors, the same for every row in the first layer.
            waves: modulated sines of the anchors.
            memory: encoded clips.
            position: their positions.
            mask: True on real clips.
        """
        clips = (where, waves, memory, position, mask)
        if self.norm_first:
            slots = slots + self.dropout(self._look_at_slots(self.norm1(slots), where))
            slots = slots + self.dropout(self._look_at_clips(self.norm2(slots), *clips))
            return slots + self.dropout(self.feedforward(self.norm3(slots)))
        slots = self.norm1(slots + self.dropout(self._look_at_slots(slots, where)))
        slots = self.norm2(slots + self.dropout(self._look_at_clips(slots, *clips)))
        return self.norm3(slots + self.dropout(self.feedforward(slots)))

    def _look_at_slots(self, slots: Tensor, where: Tensor) -> Tensor:
        query, key, value = self.slot_content(slots).chunk(3, dim=-1)
        query_place, key_place = self.slot_place(where).chunk(2, dim=-1)
        return self.slot_out(self.slot_attend(query + query_place, key + key_place, value))

    def _look_at_clips(
        self,
        slots: Tensor,
        where: Tensor,
        waves: Tensor,
        memory: Tensor,
        position: Tensor,
        mask: Tensor,
    ) -> Tensor:
        query = self.query_content(slots)
        key, value = self.clip_content(memory).chunk(2, dim=-1)
        place = self.clip_place(position)
        if self.query_place is not None:
            query, key = query + self.query_place(where), key + place
        return self.clip_out(
            self.clip_attend(
                self._per_head(query, self.query_waves(waves)),
                self._per_head(key, place),
                value,
                mask[:, None, None],
            )
        )

    def _per_head(self, content: Tensor, place: Tensor) -> Tensor:
        """`[content ; place]` within each head: [row, n, 2 hidden]."""
        size = (self.heads, content.shape[-1] // self.heads)
        both = torch.cat([content.unflatten(-1, size), place.unflatten(-1, size)], dim=-1)
        return both.flatten(-2)


def _logit(share: Tensor) -> Tensor:
    """Inverse sigmoid; a share within 1e-3 of either end counts as that far from it."""
    share = share.clamp(0, 1)
    return torch.log(share.clamp(min=SMALLEST) / (1 - share).clamp(min=SMALLEST))


def _decoder_layer(ours: str, *theirs: str) -> tuple[str, tuple[str, ...]]:
    stem = r"transformer.decoder.layers.\1."
    return rf"decoder\.layers\.(\d+)\.{ours}\.(\w+)", tuple(rf"{stem}{name}.\2" for name in theirs)


# The published names of QD-DETR and SHINE (shine.models.published).
PUBLISHED: Names = (
    *COMMON,
    ("global_content", ("global_rep_token",)),
    ("global_position", ("global_rep_pos",)),
    (r"saliency_clip\.(\w+)", (r"saliency_proj1.\1",)),
    (r"saliency_global\.(\w+)", (r"saliency_proj2.\1",)),
    *cross_attention(
        r"text_layers\.(\d+)\.attention", r"transformer.t2v_encoder.layers.\1.self_attn"
    ),
    *layers("text_layers", "transformer.t2v_encoder.layers"),
    *layers("video_layers", "transformer.encoder.layers"),
    (r"video_norm\.(\w+)", (r"transformer.encoder.norm.\1",)),
    (r"decoder\.anchors", ("query_embed.weight",)),
    (r"decoder\.norm\.(\w+)", (r"transformer.decoder.norm.\1",)),
    (r"decoder\.anchor_head\.(.+)", (r"transformer.decoder.ref_point_head.\1",)),
    (r"decoder\.width_head\.(.+)", (r"transformer.decoder.ref_anchor_head.\1",)),
    (r"decoder\.scale_head\.(.+)", (r"transformer.decoder.query_scale.\1",)),
    (r"decoder\.refine_head\.(.+)", (r"transformer.decoder.bbox_embed.\1",)),
    _decoder_layer("slot_content", "sa_qcontent_proj", "sa_kcontent_proj", "sa_v_proj"),
    _decoder_layer("slot_place", "sa_qpos_proj", "sa_kpos_proj"),
    _decoder_layer("slot_out", "self_attn.out_proj"),
    _decoder_layer("query_content", "ca_qcontent_proj"),
    _decoder_layer("query_place", "ca_qpos_proj"),
    _decoder_layer("query_waves", "ca_qpos_sine_proj"),
    _decoder_layer("clip_content", "ca_kcontent_proj", "ca_v_proj"),
    _decoder_layer("clip_place", "ca_kpos_proj"),
    _decoder_layer("clip_out", "cross_attn.out_proj"),
    *layers(r"decoder\.layers", "transformer.decoder.layers"),
)
