"""QD-DETR: query-dependent video representations for moment retrieval (Moon et al., CVPR 2023).

Clips attend to the tokens of a query (text layers), then to each other and to one learned global
vector (video layers). Saliency compares each clip with that global vector; a decoder of anchored
slots proposes spans.

Departures from the published code:
  All texts of a row go through one encoder pass, and only the row's own query is decoded.
  Tokens are masked by the padding of their own text alone; the published code also hides tokens by
  the padding of other rows, so its scores depend on the batch.
  The width that divides the anchor modulation stays at or above 1e-3.
  Modules that would get no gradient (text positions, the last refinement) do not exist.
"""

import logging
import math
import re
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shine.config import QdDetrConfig
from shine.data.batch import Inputs, Outputs
from shine.models.attention import Attend, CrossAttention, SelfAttention
from shine.models.layers import Dropout, FeedForward, Mlp, Projection, xavier_linear
from shine.models.position import anchor_position, clip_position

logger = logging.getLogger(__name__)

SMALLEST = 1e-3  # of a width that divides, and of both shares of a logit


class QdDetr(nn.Module):
    """Clips and tokens in, a saliency per clip and spans with foreground logits out.

    Args:
        config: sizes.
        clip_width: columns of a clip vector, temporal end points included.
        token_width: columns of a token vector.
    """

    def __init__(self, config: QdDetrConfig, *, clip_width: int, token_width: int) -> None:
        super().__init__()
        hidden, blocks = config.hidden, config.input_projections
        layers = range(config.encoder_layers)
        self.clip_projection = Projection(clip_width, hidden, blocks, config.input_dropout)
        self.token_projection = Projection(token_width, hidden, blocks, config.input_dropout)
        self.global_content = nn.Parameter(torch.randn(hidden))
        self.global_position = nn.Parameter(torch.randn(hidden))
        self.text_layers = nn.ModuleList(TextLayer(config) for _ in layers)
        self.video_layers = nn.ModuleList(VideoLayer(config) for _ in layers)
        self.saliency_clip = nn.Linear(hidden, hidden)
        self.saliency_global = nn.Linear(hidden, hidden)
        self.decoder = Decoder(config)
        self.span_head = Mlp([hidden, hidden, hidden, 2], xavier=False)
        self.label_head = nn.Linear(hidden, 2)

    def forward(self, inputs: Inputs) -> Outputs:
        """Saliency for every text; spans and logits for text 0, one set per decoder layer."""
        clip_mask = inputs.clip_mask.index_select(0, inputs.video)  # [row, clip]
        clips = self.clip_projection(inputs.clips).index_select(0, inputs.video)
        position = clip_position(inputs.clip_mask, clips.shape[-1], clips.dtype)
        position = position.index_select(0, inputs.video)  # [row, clip, hidden]

        sequence, position = self._encode(clips, position, clip_mask, inputs)
        summary, memory = sequence[:, :, 0], sequence[:, :, 1:]
        slots, spans = self.decoder(memory[0], position[:, 1:], clip_mask)
        return Outputs(
            logits=self.label_head(slots),
            spans=(self.span_head(slots) + _logit(spans)).sigmoid(),
            saliency=self._saliency(memory, summary),
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
        clips = clips[None]  # [1, row, clip, hidden]: one for all texts until they meet a text
        for layer in self.text_layers:
            clips = layer(clips, position, tokens, inputs.token_mask)
        texts, rows = clips.shape[:2]
        sequence = torch.cat([self.global_content.expand(texts, rows, 1, -1), clips], dim=2)
        position = torch.cat([self.global_position.expand(rows, 1, -1), position], dim=1)
        mask = torch.cat([clip_mask.new_ones(rows, 1), clip_mask], dim=1)  # [row, 1 + clip]
        for layer in self.video_layers:
            sequence = layer(sequence, position, mask)
        return sequence, position

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
    branch is not normalised.
    """

    def __init__(self, config: QdDetrConfig) -> None:
        super().__init__()
        self.attention = CrossAttention(config.hidden, config.heads, config.dropout)
        self.feedforward = FeedForward(config.hidden, config.feedforward, config.dropout)
        self.norm1 = nn.LayerNorm(config.hidden)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        clips: Float[Tensor, "#text row clip hidden"],
        position: Float[Tensor, "row clip hidden"],
        tokens: Float[Tensor, "text row token hidden"],
        token_mask: Bool[Tensor, "text row token"],
    ) -> Float[Tensor, "text row clip hidden"]:
        """The clips of each row under each text."""
        clips = clips + self.dropout(self.attention(clips, position, tokens, token_mask))
        return self.norm2(clips + self.dropout(self.feedforward(self.norm1(clips))))


class VideoLayer(nn.Module):
    """Clips and the global vector look at each other: a post-norm transformer layer."""

    def __init__(self, config: QdDetrConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.hidden, config.heads, config.dropout)
        self.feedforward = FeedForward(config.hidden, config.feedforward, config.dropout)
        self.norm1 = nn.LayerNorm(config.hidden)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "text row place hidden"],
        position: Float[Tensor, "row place hidden"],
        mask: Bool[Tensor, "row place"],
    ) -> Float[Tensor, "text row place hidden"]:
        """The sequence after one layer."""
        x = self.norm1(x + self.dropout(self.attention(x, position, mask)))
        return self.norm2(x + self.dropout(self.feedforward(x)))


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
            scale = self.width_head(slots).sigmoid() / span[..., 1:].clamp(min=SMALLEST)
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
    """Slots look at each other, then at the clips, then each at itself; post-norm.

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
        self.feedforward = FeedForward(hidden, config.feedforward, dropout)
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.norm3 = nn.LayerNorm(hidden)
        self.dropout = Dropout(dropout)

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
        slots = self.norm1(slots + self.dropout(self._look_at_slots(slots, where)))
        seen = self._look_at_clips(slots, where, waves, memory, position, mask)
        slots = self.norm2(slots + self.dropout(seen))
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
                mask,
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


# Published name -> ours, applied in turn. `@n` is the place among entries that we hold as one.
_RENAMES = (
    (r"^global_rep_token", "global_content"),
    (r"^global_rep_pos", "global_position"),
    (r"^query_embed\.weight", "decoder.anchors"),
    (r"^class_embed", "label_head"),
    (r"^span_embed", "span_head"),
    (r"^saliency_proj1", "saliency_clip"),
    (r"^saliency_proj2", "saliency_global"),
    (r"^input_vid_proj", "clip_projection"),
    (r"^input_txt_proj", "token_projection"),
    (r"_projection\.(\d+)\.LayerNorm", r"_projection.norms.\1"),
    (r"_projection\.(\d+)\.net\.1", r"_projection.linears.\1"),
    (r"^transformer\.t2v_encoder\.layers", "text_layers"),
    (r"^transformer\.encoder\.layers", "video_layers"),
    (r"^transformer\.decoder", "decoder"),
    (r"^(text_layers\.\d+)\.self_attn\.query", r"\1.attention.query"),
    (r"^(text_layers\.\d+)\.self_attn\.key", r"\1.attention.key_value@0"),
    (r"^(text_layers\.\d+)\.self_attn\.value", r"\1.attention.key_value@1"),
    (r"^(video_layers\.\d+)\.self_attn\.query", r"\1.attention.query_key@0"),
    (r"^(video_layers\.\d+)\.self_attn\.key", r"\1.attention.query_key@1"),
    (r"^(video_layers\.\d+)\.self_attn\.value", r"\1.attention.value"),
    (r"^((?:text|video)_layers\.\d+)\.self_attn\.out_proj", r"\1.attention.out"),
    (r"^decoder\.ref_point_head", "decoder.anchor_head"),
    (r"^decoder\.ref_anchor_head", "decoder.width_head"),
    (r"^decoder\.query_scale", "decoder.scale_head"),
    (r"^decoder\.bbox_embed", "decoder.refine_head"),
    (r"\.sa_qcontent_proj", ".slot_content@0"),
    (r"\.sa_kcontent_proj", ".slot_content@1"),
    (r"\.sa_v_proj", ".slot_content@2"),
    (r"\.sa_qpos_proj", ".slot_place@0"),
    (r"\.sa_kpos_proj", ".slot_place@1"),
    (r"\.self_attn\.out_proj", ".slot_out"),
    (r"\.ca_qcontent_proj", ".query_content"),
    (r"\.ca_qpos_proj", ".query_place"),
    (r"\.ca_qpos_sine_proj", ".query_waves"),
    (r"\.ca_kcontent_proj", ".clip_content@0"),
    (r"\.ca_v_proj", ".clip_content@1"),
    (r"\.ca_kpos_proj", ".clip_place"),
    (r"\.cross_attn\.out_proj", ".clip_out"),
    (r"\.linear1", ".feedforward.grow"),
    (r"\.linear2", ".feedforward.shrink"),
    (r"\.activation\.weight", ".feedforward.activation.slope"),
)


def reference_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published `state_dict` of QD-DETR or SHINE under this module's parameter names.

    The result loads strictly into a `QdDetr` of the same sizes. Entries without a counterpart
    (text positions; with one decoder layer also the heads that scale and refine) are left out and
    their names are logged.
    """
    unused = [key for key in state if key.startswith("txt_position_embed.")]
    if not any(key.startswith("transformer.decoder.layers.1.") for key in state):
        unused += [key for key in state if re.search(r"\.(query_scale|bbox_embed)\.", key)]
    if unused:
        logger.info("published entries without a counterpart: %s", ", ".join(unused))

    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key in unused:
            continue
        packed = re.sub(r"in_proj_(weight|bias)$", r"{}.\1", key)
        roles = ("query", "key", "value") if packed != key else ("",)
        for role, part in zip(roles, value.chunk(len(roles)), strict=True):
            name = packed.format(role)
            for pattern, ours in _RENAMES:
                name = re.sub(pattern, ours, name)
            whole, place = re.sub(r"@\d", "", name), re.findall(r"@\d", name)
            parts.setdefault(whole, {})["".join(place)] = part
    return {
        name: torch.cat([pieces[place] for place in sorted(pieces)])
        for name, pieces in parts.items()
    }
