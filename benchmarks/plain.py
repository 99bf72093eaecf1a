"""Moment-DETR, QD-DETR and SHINE as an ordinary PyTorch author writes them: the yardstick of speed.

This is what the published code does, with its parameter names, its known faults and its cost: three
passes of the whole transformer for SHINE (query, rolled query, hard negatives) of which two decode
for nothing, PyTorch's own attention and dropout, Python loops over the rows of a batch in the
ranking losses, SciPy's assignment on the CPU, and padding to the longest row. It reproduces the
recorded numbers of the published code (`tests/benchmarks/test_plain.py`) and shares no line with
`shine/`, so it also is a second opinion on what the methods compute.

Published names are kept here: `src_*` tensors, `pred_*` outputs, parameter names. Batch first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

CLIP_NORM = 0.1
TOP_DIVISOR = 8  # an option of the published code that never reaches its loss


@dataclass(frozen=True)
class Options:
    """Sizes of a network; the defaults are the published ones."""

    video_width: int  # columns of a clip, temporal end points included
    text_width: int
    hidden: int = 256
    heads: int = 8
    feedforward: int = 1024
    input_projections: int = 2
    encoder_layers: int = 2
    decoder_layers: int = 2
    queries: int = 10
    max_tokens: int = 32
    dropout: float = 0.1
    input_dropout: float = 0.5
    text_positions: bool = False
    contrastive_width: int | None = None  # Moment-DETR's heads that align queries and tokens
    corrected_mask: bool = False  # text-to-video attention masks the row's own padding alone


class ProjectionBlock(nn.Module):
    """LayerNorm, dropout, linear and, but for the last block, ReLU."""

    def __init__(self, inputs: int, outputs: int, dropout: float, relu: bool):
        super().__init__()
        self.relu = relu
        self.LayerNorm = nn.LayerNorm(inputs)
        self.net = nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The projected features."""
        x = self.net(self.LayerNorm(x))
        return F.relu(x) if self.relu else x


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, num_layers: int):
        super().__init__()
        widths = [inputs] + [hidden] * (num_layers - 1) + [outputs]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == len(self.layers) - 1 else F.relu(layer(x))
        return x


class TextPosition(nn.Module):
    """A learned table of token positions; it adds the content and normalises."""

    def __init__(self, places: int, hidden: int, dropout: float):
        super().__init__()
        self.position_embeddings = nn.Embedding(places, hidden)
        self.LayerNorm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Positions for the projected text `x`."""
        place = torch.arange(x.shape[1], device=x.device)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(place)))


def sine_position(mask: Tensor, width: int) -> Tensor:
    """Sines and cosines of the place of each clip; [B, L] -> [B, L, width]."""
    place = mask.cumsum(1, dtype=torch.float32)
    place = place / (place[:, -1:] + 1e-6) * 2 * math.pi
    channel = torch.arange(width, dtype=torch.float32, device=mask.device)
    phase = place[:, :, None] / 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / width)
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=3).flatten(2)


def anchor_embedding(points: Tensor, width: int) -> Tensor:
    """Sines of the center, then of the width; [B, N, 2] -> [B, N, width]."""
    half = width // 2
    channel = torch.arange(half, dtype=torch.float32, device=points.device)
    scale = 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / half)
    parts = []
    for i in range(2):
        phase = points[..., i, None] * 2 * math.pi / scale
        parts.append(torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), 3).flatten(2))
    return torch.cat(parts, dim=2)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """The logit of `x`, both shares at least 1e-3."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


class EncoderLayer(nn.Module):
    """A post-norm transformer layer."""

    def __init__(self, options: Options, activation: nn.Module):
        super().__init__()
        hidden, dropout = options.hidden, options.dropout
        self.self_attn = nn.MultiheadAttention(hidden, options.heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(hidden, options.feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(options.feedforward, hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x: Tensor, padding: Tensor, pos: Tensor) -> Tensor:
        """The sequence after the layer; `padding` is True on padding."""
        q = k = x + pos
        attended = self.self_attn(q, k, value=x, key_padding_mask=padding)[0]
        x = self.norm1(x + self.dropout1(attended))
        fed = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self.norm2(x + self.dropout2(fed))


class TextToVideoLayer(EncoderLayer):
    """Video looks at text; the feed-forward branch alone sees the first norm."""

    def __init__(self, options: Options):
        super().__init__(options, nn.PReLU())
        self.heads = options.heads
        self.corrected_mask = options.corrected_mask

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        text: Tensor,
        padding: Tensor,
        text_padding: Tensor,
        pos: Tensor,
        text_pos: Tensor,
    ) -> Tensor:
        """The video after the layer."""
        mask = None
        if not self.corrected_mask:  # sample-major, though the attention wants head-minor
            mask = (padding[:, :, None] & text_padding[:, None]).repeat(self.heads, 1, 1)
        attended = self.self_attn(
            x + pos, text + text_pos, value=text, attn_mask=mask, key_padding_mask=text_padding
        )[0]
        x = x + self.dropout1(attended)
        fed = self.linear2(self.dropout(self.activation(self.linear1(self.norm1(x)))))
        return self.norm2(x + self.dropout2(fed))


class LayerStack(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The output of the last layer."""
        for layer in self.layers:
            x = layer(x, *context)
        return x


class DetrDecoderLayer(nn.Module):
    """A post-norm decoder layer with learned query positions (Moment-DETR)."""

    def __init__(self, options: Options):
        super().__init__()
        hidden, dropout = options.hidden, options.dropout
        self.self_attn = nn.MultiheadAttention(hidden, options.heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(
            hidden, options.heads, dropout, batch_first=True
        )
        self.linear1 = nn.Linear(hidden, options.feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(options.feedforward, hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.norm3 = nn.LayerNorm(hidden)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(
        self, t: Tensor, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor
    ) -> Tensor:
        """The queries after the layer."""
        q = k = t + query_pos
        t = self.norm1(t + self.dropout1(self.self_attn(q, k, value=t)[0]))
        attended = self.multihead_attn(
            t + query_pos, memory + pos, value=memory, key_padding_mask=padding
        )[0]
        t = self.norm2(t + self.dropout2(attended))
        fed = self.linear2(self.dropout(F.relu(self.linear1(t))))
        return self.norm3(t + self.dropout3(fed))


class DetrDecoder(nn.Module):
    """Layers with one norm for all their outputs (Moment-DETR)."""

    def __init__(self, options: Options):
        super().__init__()
        self.layers = nn.ModuleList(
            DetrDecoderLayer(options) for _ in range(options.decoder_layers)
        )
        self.norm = nn.LayerNorm(options.hidden)

    def forward(self, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor) -> Tensor:
        """The normalised queries after each layer, [layer, B, N, hidden]."""
        query_pos = query_pos[None].repeat(len(memory), 1, 1)
        t, outputs = torch.zeros_like(query_pos), []
        for layer in self.layers:
            t = layer(t, memory, padding, pos, query_pos)
            outputs.append(self.norm(t))
        return torch.stack(outputs)


class ProjectedAttention(nn.Module):
    """Multi-head attention on inputs that are already projected."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
        """One vector per query."""

        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

        q, k, v = split(q), split(k), split(v)
        scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(2, 3))
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        weights = self.dropout(scores.softmax(dim=-1))
        return self.out_proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class AnchorDecoderLayer(nn.Module):
    """A decoder layer with anchors (QD-DETR)."""

    def __init__(self, options: Options, first: bool):
        super().__init__()
        hidden, dropout = options.hidden, options.dropout
        self.heads = options.heads
        self.sa_qcontent_proj = nn.Linear(hidden, hidden)
        self.sa_qpos_proj = nn.Linear(hidden, hidden)
        self.sa_kcontent_proj = nn.Linear(hidden, hidden)
        self.sa_kpos_proj = nn.Linear(hidden, hidden)
        self.sa_v_proj = nn.Linear(hidden, hidden)
        self.self_attn = ProjectedAttention(hidden, options.heads, dropout)
        self.norm1 = nn.LayerNorm(hidden)
        self.ca_qcontent_proj = nn.Linear(hidden, hidden)
        self.ca_qpos_proj = nn.Linear(hidden, hidden) if first else None
        self.ca_kcontent_proj = nn.Linear(hidden, hidden)
        self.ca_kpos_proj = nn.Linear(hidden, hidden)
        self.ca_v_proj = nn.Linear(hidden, hidden)
        self.ca_qpos_sine_proj = nn.Linear(hidden, hidden)
        self.cross_attn = ProjectedAttention(hidden, options.heads, dropout)
        self.linear1 = nn.Linear(hidden, options.feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(options.feedforward, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.norm3 = nn.LayerNorm(hidden)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = nn.PReLU()

    def forward(
        self, t: Tensor, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor, sine
    ) -> Tensor:
        """The queries after the layer."""
        q = self.sa_qcontent_proj(t) + self.sa_qpos_proj(query_pos)
        k = self.sa_kcontent_proj(t) + self.sa_kpos_proj(query_pos)
        t = self.norm1(t + self.dropout1(self.self_attn(q, k, self.sa_v_proj(t))))

        q, k = self.ca_qcontent_proj(t), self.ca_kcontent_proj(memory)
        k_pos = self.ca_kpos_proj(pos)
        if self.ca_qpos_proj is not None:
            q, k = q + self.ca_qpos_proj(query_pos), k + k_pos
        q = self._join(q, self.ca_qpos_sine_proj(sine))
        k = self._join(k, k_pos)
        attended = self.cross_attn(q, k, self.ca_v_proj(memory), padding)
        t = self.norm2(t + self.dropout2(attended))
        fed = self.linear2(self.dropout(self.activation(self.linear1(t))))
        return self.norm3(t + self.dropout3(fed))

    def _join(self, content: Tensor, place: Tensor) -> Tensor:
        """`[content ; place]` in each head."""
        shape = (*content.shape[:2], self.heads, -1)
        return torch.cat([content.view(shape), place.view(shape)], dim=3).flatten(2)


class AnchorDecoder(nn.Module):
    """Queries that move their anchors layer by layer (QD-DETR)."""

    def __init__(self, options: Options):
        super().__init__()
        hidden = options.hidden
        self.layers = nn.ModuleList(
            AnchorDecoderLayer(options, first=i == 0) for i in range(options.decoder_layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.query_scale = Mlp(hidden, hidden, hidden, 2)
        self.ref_point_head = Mlp(hidden, hidden, hidden, 2)
        self.bbox_embed = Mlp(hidden, hidden, 2, 3)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)  # pyright: ignore[reportArgumentType]
        self.ref_anchor_head = Mlp(hidden, hidden, 1, 2)

    def forward(
        self, memory: Tensor, padding: Tensor, pos: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The normalised queries after each layer, and the points that entered it."""
        reference = anchors.sigmoid()[None].repeat(len(memory), 1, 1)
        t = memory.new_zeros(*reference.shape[:2], memory.shape[-1])
        outputs, references = [], [reference]
        for i, layer in enumerate(self.layers):
            sine = anchor_embedding(reference, memory.shape[-1])
            query_pos = self.ref_point_head(sine)
            if i > 0:
                sine = sine * self.query_scale(t)
            sine = sine * (self.ref_anchor_head(t).sigmoid() / reference[..., 1:])
            t = layer(t, memory, padding, pos, query_pos, sine)
            refined = (self.bbox_embed(t) + inverse_sigmoid(reference)).sigmoid()
            if i < len(self.layers) - 1:
                references.append(refined)
            reference = refined.detach()
            outputs.append(self.norm(t))
        return torch.stack(outputs), torch.stack(references)


class Grounder(nn.Module):
    """What both networks share: projections, positions and heads."""

    def __init__(self, options: Options, query_width: int):
        super().__init__()
        hidden = options.hidden
        self.options = options
        self.txt_position_embed = TextPosition(options.max_tokens, hidden, options.input_dropout)
        self.span_embed = Mlp(hidden, hidden, 2, 3)
        self.class_embed = nn.Linear(hidden, 2)
        self.query_embed = nn.Embedding(options.queries, query_width)
        self.input_txt_proj = self._projection(options.text_width)
        self.input_vid_proj = self._projection(options.video_width)

    def _projection(self, width: int) -> nn.Sequential:
        options = self.options
        count = options.input_projections
        return nn.Sequential(
            *(
                ProjectionBlock(
                    width if i == 0 else options.hidden,
                    options.hidden,
                    options.input_dropout,
                    relu=i < count - 1,
                )
                for i in range(count)
            )
        )

    def _positions(self, vid_mask: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        pos_vid = sine_position(vid_mask, self.options.hidden)
        pos_txt = self.txt_position_embed(txt) if self.options.text_positions else txt * 0
        return pos_vid, pos_txt

    def _heads(self, hs: Tensor, logits: Tensor | float) -> list[dict[str, Tensor]]:
        """Classes and spans of every layer; `logits` are added to those of the spans."""
        spans = (self.span_embed(hs) + logits).sigmoid()
        classes = self.class_embed(hs)
        return [{"pred_logits": c, "pred_spans": s} for c, s in zip(classes, spans, strict=True)]


def _xavier(transformer: nn.Module) -> None:
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class MomentDetrTransformer(nn.Module):
    """One encoder over `[video ; text]`, one decoder."""

    def __init__(self, options: Options):
        super().__init__()
        layers = range(options.encoder_layers)
        self.encoder = LayerStack([EncoderLayer(options, nn.ReLU()) for _ in layers])
        self.decoder = DetrDecoder(options)
        _xavier(self)

    def forward(
        self, src: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries after each layer, and the memory."""
        memory = self.encoder(src, padding, pos)
        return self.decoder(memory, padding, pos, query_pos), memory


class MomentDetr(Grounder):
    """Moment-DETR."""

    def __init__(self, options: Options):
        super().__init__(options, options.hidden)
        hidden, width = options.hidden, options.contrastive_width
        self.transformer = MomentDetrTransformer(options)
        self.saliency_proj = nn.Linear(hidden, 1)
        if width is not None:
            self.contrastive_align_projection_query = nn.Linear(hidden, width)
            self.contrastive_align_projection_txt = nn.Linear(hidden, width)
            self.contrastive_align_projection_vid = nn.Linear(hidden, width)

    def forward(
        self, src_txt: Tensor, src_txt_mask: Tensor, src_vid: Tensor, src_vid_mask: Tensor
    ) -> dict:
        """The published outputs."""
        txt, vid = self.input_txt_proj(src_txt), self.input_vid_proj(src_vid)
        pos = torch.cat(self._positions(src_vid_mask, txt), dim=1)
        padding = ~torch.cat([src_vid_mask, src_txt_mask], dim=1).bool()
        src = torch.cat([vid, txt], dim=1)
        hs, memory = self.transformer(src, padding, pos, self.query_embed.weight)
        layers = self._heads(hs, 0.0)
        clips = vid.shape[1]
        top = {"saliency_scores": self.saliency_proj(memory[:, :clips]).squeeze(-1)}
        if self.options.contrastive_width is not None:
            queries = F.normalize(self.contrastive_align_projection_query(hs), dim=-1)
            tokens = self.contrastive_align_projection_txt(memory[:, clips:])
            tokens = F.normalize(tokens, dim=-1)
            for layer, vectors in zip(layers, queries, strict=True):
                layer |= {"proj_queries": vectors, "proj_txt_mem": tokens}
            video = self.contrastive_align_projection_vid(memory[:, :clips])
            top["proj_vid_mem"] = F.normalize(video, dim=-1)
        return {**layers[-1], **top, "aux_outputs": layers[:-1]}


class QdDetrTransformer(nn.Module):
    """Text-to-video layers, an encoder over `[global ; video]`, and the decoder."""

    def __init__(self, options: Options):
        super().__init__()
        layers = range(options.encoder_layers)
        self.t2v_encoder = LayerStack([TextToVideoLayer(options) for _ in layers])
        self.encoder = LayerStack([EncoderLayer(options, nn.PReLU()) for _ in layers])
        self.decoder = AnchorDecoder(options)
        _xavier(self)

    def forward(
        self, src: Tensor, mask: Tensor, pos: Tensor, anchors: Tensor, clips: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and reference points per layer, the video memory and the global one.

        `src` is `[global ; video ; text]` and `mask` is True where it is real.
        """
        padding, end = ~mask, 1 + clips
        video = self.t2v_encoder(
            src[:, 1:end],
            src[:, end:],
            padding[:, 1:end],
            padding[:, end:],
            pos[:, 1:end],
            pos[:, end:],
        )
        sequence = torch.cat([src[:, :1], video], dim=1)
        memory = self.encoder(sequence, padding[:, :end], pos[:, :end])
        memory_global, memory = memory[:, 0], memory[:, 1:]
        hs, references = self.decoder(memory, padding[:, 1:end], pos[:, 1:end], anchors)
        return hs, references, memory, memory_global


class QdDetr(Grounder):
    """QD-DETR, and SHINE's network, which is the same and also encodes hard negatives."""

    def __init__(self, options: Options):
        super().__init__(options, 2)
        hidden = options.hidden
        self.transformer = QdDetrTransformer(options)
        self.global_rep_token = nn.Parameter(torch.randn(hidden))
        self.global_rep_pos = nn.Parameter(torch.randn(hidden))
        self.saliency_proj1 = nn.Linear(hidden, hidden)
        self.saliency_proj2 = nn.Linear(hidden, hidden)

    def forward(
        self,
        src_txt: Tensor,
        src_txt_mask: Tensor,
        src_vid: Tensor,
        src_vid_mask: Tensor,
        src_hn_txt: Tensor | None = None,
        src_hn_txt_mask: Tensor | None = None,
    ) -> dict:
        """The published outputs; hard negatives [level, B, L, D] count in training alone."""
        txt, vid = self.input_txt_proj(src_txt), self.input_vid_proj(src_vid)
        txt_mask, vid_mask = src_txt_mask.bool(), src_vid_mask.bool()
        rows = len(vid)
        pos = torch.cat(
            [
                self.global_rep_pos.expand(rows, 1, -1),
                *self._positions(src_vid_mask, txt),
            ],
            dim=1,
        )
        src, mask = self._sequence(vid, vid_mask, txt, txt_mask)
        hs, references, memory, memory_global = self._transform(src, mask, pos, vid.shape[1])
        layers = self._heads(hs, inverse_sigmoid(references))
        top = {
            "saliency_scores": self._saliency(memory, memory_global),
            "video_mask": src_vid_mask,
        }

        rolled = torch.cat([txt[1:], txt[:1]]), torch.cat([txt_mask[1:], txt_mask[:1]])
        src, mask = self._sequence(vid, vid_mask, *rolled)
        _, _, memory, memory_global = self._transform(src, mask, pos, vid.shape[1])
        top["saliency_scores_neg"] = self._saliency(memory, memory_global)

        if self.training and src_hn_txt is not None and src_hn_txt_mask is not None:
            sequences = [
                self._sequence(vid, vid_mask, self.input_txt_proj(text), text_mask.bool())
                for text, text_mask in zip(src_hn_txt, src_hn_txt_mask, strict=True)
            ]
            src, mask = (torch.cat(parts) for parts in zip(*sequences, strict=True))
            pos = pos.repeat(len(src_hn_txt), 1, 1)
            _, _, memory, memory_global = self._transform(src, mask, pos, vid.shape[1])
            top["saliency_scores_hn"] = self._saliency(memory, memory_global)
        return {**layers[-1], **top, "aux_outputs": layers[:-1]}

    def _sequence(
        self, vid: Tensor, vid_mask: Tensor, txt: Tensor, txt_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        token = self.global_rep_token.expand(len(vid), 1, -1)
        always = vid_mask.new_ones(len(vid), 1)
        return torch.cat([token, vid, txt], dim=1), torch.cat([always, vid_mask, txt_mask], dim=1)

    def _transform(self, src: Tensor, mask: Tensor, pos: Tensor, clips: int) -> tuple[Tensor, ...]:
        return self.transformer(src, mask, pos, self.query_embed.weight, clips)

    def _saliency(self, memory: Tensor, memory_global: Tensor) -> Tensor:
        products = self.saliency_proj1(memory) * self.saliency_proj2(memory_global)[:, None]
        return products.sum(dim=-1) / math.sqrt(memory.shape[-1])


def span_cxw_to_xx(spans: Tensor) -> Tensor:
    """(center, width) to (start, end)."""
    return torch.stack(
        [spans[..., 0] - 0.5 * spans[..., 1], spans[..., 0] + 0.5 * spans[..., 1]], dim=-1
    )


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of every pair of (start, end) intervals, [N, 2] and [M, 2] -> [N, M]."""
    a, b = a.float(), b.float()
    assert (a[:, 1] >= a[:, 0]).all()
    assert (b[:, 1] >= b[:, 0]).all()
    left, right = torch.max(a[:, None, 0], b[None, :, 0]), torch.min(a[:, None, 1], b[None, :, 1])
    shared = (right - left).clamp(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - shared
    start, end = torch.min(a[:, None, 0], b[None, :, 0]), torch.max(a[:, None, 1], b[None, :, 1])
    hull = end - start
    return shared / union - (hull - union) / hull


class HungarianMatcher(nn.Module):
    """SciPy's assignment of every row, on the CPU."""

    def __init__(self, cost_class: float = 4, cost_span: float = 10, cost_giou: float = 1):
        super().__init__()
        self.cost_class, self.cost_span, self.cost_giou = cost_class, cost_span, cost_giou

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Tensor], labels: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Per row the matched queries, ascending, and their targets."""
        rows, queries = outputs["pred_spans"].shape[:2]
        share = outputs["pred_logits"].flatten(0, 1).softmax(-1)
        spans = outputs["pred_spans"].flatten(0, 1)
        targets = torch.cat(list(labels))
        cost_span = torch.cdist(spans, targets, p=1)
        cost_giou = -generalized_iou(span_cxw_to_xx(spans), span_cxw_to_xx(targets))
        cost = self.cost_span * cost_span + self.cost_giou * cost_giou
        cost = cost - self.cost_class * share[:, :1]
        parts = cost.view(rows, queries, -1).cpu().split([len(row) for row in labels], dim=-1)
        found = [linear_sum_assignment(part[row]) for row, part in enumerate(parts)]
        return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in found]


@dataclass(frozen=True)
class LossOptions:
    """What the criterion adds up; the defaults are QD-DETR's."""

    losses: tuple[str, ...] = ("spans", "labels", "saliency")  # and "contrastive_align"
    background_weight: float = 0.1
    hinge: bool = True
    hinge_margin: float = 0.2
    negatives: bool = True  # rank and negative terms: all but Moment-DETR
    ranking: str | None = None  # SHINE's: "red" or "abd"
    coarse_weight: float = 1.0
    fine_weight: float = 1.0
    coarse_margins: tuple[float, float] = (1.0, 2.0)
    fine_margins: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    temperature: float = 0.07


WEIGHTS = {"loss_span": 10.0, "loss_giou": 1.0, "loss_label": 4.0, "loss_saliency": 1.0}


class Criterion(nn.Module):
    """The named losses of a batch and their weighted sum."""

    def __init__(self, options: LossOptions, weights: Mapping[str, float] = WEIGHTS):
        super().__init__()
        self.options = options
        self.weights = weights
        self.matcher = HungarianMatcher()
        self.class_weight = torch.tensor([1.0, options.background_weight])

    def forward(self, outputs: dict, targets: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and the unweighted losses by their published names."""
        losses = self._decoder_losses(outputs, targets)
        if "saliency" in self.options.losses:
            factors = {"coarse": self.options.coarse_weight, "fine": self.options.fine_weight}
            parts = self.saliency_parts(outputs, targets)
            terms = [factors.get(name, 1.0) * value for name, value in parts.items()]
            losses["loss_saliency"] = torch.stack(terms).sum()
        for i, layer in enumerate(outputs["aux_outputs"]):
            for name, value in self._decoder_losses(layer, targets).items():
                losses[f"{name}_{i}"] = value
        terms = [
            self.weights[base] * value
            for name, value in losses.items()
            if (base := name.rstrip("0123456789").rstrip("_")) in self.weights
        ]
        return torch.stack(terms).sum(), losses

    def _decoder_losses(self, outputs: Mapping[str, Tensor], targets: Mapping) -> dict[str, Tensor]:
        wanted = self.options.losses
        losses: dict[str, Tensor] = {}
        if set(wanted) <= {"saliency"}:
            return losses
        labels = targets["span_labels"]
        pairs = self.matcher(outputs, labels)
        row = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        if "spans" in wanted:
            found = outputs["pred_spans"][row, query]
            goal = torch.cat([v[index] for v, (_, index) in zip(labels, pairs, strict=True)])
            losses["loss_span"] = F.l1_loss(found, goal)
            giou = generalized_iou(span_cxw_to_xx(found), span_cxw_to_xx(goal))
            losses["loss_giou"] = (1 - torch.diag(giou)).mean()
        if "labels" in wanted:
            logits = outputs["pred_logits"]
            classes = torch.ones(logits.shape[:2], dtype=torch.int64, device=logits.device)
            classes[row, query] = 0
            weight = self.class_weight.to(logits)
            crossed = F.cross_entropy(logits.transpose(1, 2), classes, weight, reduction="none")
            losses["loss_label"] = crossed.mean()
            wrong = logits[row, query].argmax(dim=-1) != 0
            losses["class_error"] = 100 * wrong.float().mean()
        if "contrastive_align" in wanted:
            losses["loss_contrastive_align"] = self._contrastive_align(outputs, row, query)
        return losses

    def _contrastive_align(
        self, outputs: Mapping[str, Tensor], row: Tensor, query: Tensor
    ) -> Tensor:
        queries, tokens = outputs["proj_queries"], outputs["proj_txt_mem"]
        logits = torch.einsum("bqd,btd->bqt", queries, tokens).sum(2) / self.options.temperature
        positive = torch.zeros_like(logits, dtype=torch.bool)
        positive[row, query] = True
        matched = logits.masked_fill(~positive, 0).sum(1) / positive.sum(1)
        return (logits.logsumexp(1) - matched).mean()

    def saliency_parts(self, outputs: dict, targets: Mapping) -> dict[str, Tensor]:
        """The saliency loss in its unweighted parts."""
        options = self.options
        scores = outputs["saliency_scores"]
        parts = {}
        if options.negatives:
            mask, negative = outputs["video_mask"], outputs["saliency_scores_neg"]
            parts["neg_pair"] = (-torch.log(1 - negative.sigmoid()) * mask).sum(dim=1).mean()
            parts["rank_contrastive"] = self._rank(
                scores, negative, targets["saliency_all_labels"], mask
            )
        if options.hinge:
            parts["hinge"] = self._hinge(scores, targets)
        if options.ranking is not None:
            parts["coarse"] = self._coarse(outputs, targets)
            if "saliency_scores_hn" in outputs:
                parts["fine"] = self._fine(outputs, targets)
        return parts

    def _hinge(self, scores: Tensor, targets: Mapping) -> Tensor:
        positive, negative = targets["saliency_pos_labels"], targets["saliency_neg_labels"]
        gap = scores.gather(1, negative) - scores.gather(1, positive)
        total = (self.options.hinge_margin + gap).clamp(min=0).sum()
        return total / positive.numel() * 2

    def _rank(self, scores: Tensor, negative: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = torch.cat([scores, negative], dim=1)
        labels = torch.cat([labels, torch.zeros_like(labels)], dim=1)
        mask = torch.cat([mask, mask], dim=1)
        logits = logits * mask + (1 - mask) * -1000.0
        total = logits.new_zeros(())
        for grade in range(1, 12):
            positive = (labels >= grade).to(logits.dtype)
            if positive.sum() == 0:
                continue
            z = logits / 0.5
            z = z - z.max(dim=1, keepdim=True).values
            log_share = z - torch.log(z.exp().sum(dim=1, keepdim=True) + 1e-6)
            loss = -(positive * log_share * mask).sum(1) / (positive.sum(1) + 1e-6)
            total = total + (loss * (positive.sum(1) > 0)).mean()
        return total / 12

    def _coarse(self, outputs: dict, targets: Mapping) -> Tensor:
        intra_margin, inter_margin = self.options.coarse_margins
        losses = []
        for row, length in enumerate(targets["video_length"].flatten().tolist()):
            scores = outputs["saliency_scores"][row, :length]
            negative = outputs["saliency_scores_neg"][row, :length]
            inside = targets["saliency_all_labels"][row, :length] > 0
            k = max(1, int(inside.sum()) // TOP_DIVISOR)
            inner = scores[inside].topk(k).values.mean()
            other = negative[inside].topk(k).values.mean()
            outer = scores[~inside].max() if (~inside).any() else scores[0]
            losses.append(
                (intra_margin + outer - inner).clamp(min=0)
                + (inter_margin + other - inner).clamp(min=0)
            )
        return torch.stack(losses).mean()

    def _fine(self, outputs: dict, targets: Mapping) -> Tensor:
        def divergence(label: Tensor, score: Tensor) -> Tensor:
            return -(label.detach() * torch.log(score.sigmoid() + 1e-9)).mean()

        margins, ranking = self.options.fine_margins, self.options.ranking
        levels = outputs["saliency_scores_hn"].chunk(len(margins) - 1)
        losses = []
        for row, length in enumerate(targets["video_length"].flatten().tolist()):
            scores = outputs["saliency_scores"][row, :length]
            label = scores.sigmoid()
            others = [*levels, outputs["saliency_scores_neg"]]
            d = [divergence(targets["saliency_all_labels"][row, :length].float(), scores)]
            d += [divergence(label, other[row, :length]) for other in others]
            loss = scores.new_zeros(())
            for i, margin in enumerate(margins):
                before = d[i] if ranking == "red" or i == 0 else d[1]
                loss = loss + (margin + before - d[i + 1]).clamp(min=0)
            losses.append(loss)
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Row:
    """One query of one video as the files hold it; features are normalised already."""

    clips: np.ndarray  # float32 [clip, width]
    tokens: np.ndarray  # float32 [token, width]
    moment: tuple[float, float]  # seconds
    clip_seconds: float
    hard_negatives: tuple[np.ndarray, ...] = ()  # tokens of each level


def collate(
    rows: Sequence[Row], random: np.random.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor | list[Tensor]]]:
    """Inputs and targets of a batch, padded to its longest row; every row has its own video.

    All texts of the batch are padded alike, since the hard negatives use the query's positions.
    """
    clips, clip_mask = _pad([_with_end_points(row.clips) for row in rows])
    levels = [[row.hard_negatives[i] for row in rows] for i in range(len(rows[0].hard_negatives))]
    longest = max(len(text) for texts in [[row.tokens for row in rows], *levels] for text in texts)
    tokens, token_mask = _pad([row.tokens for row in rows], longest)
    inputs = {
        "src_txt": tokens,
        "src_txt_mask": token_mask,
        "src_vid": clips,
        "src_vid_mask": clip_mask,
    }
    if levels:
        padded = [_pad(texts, longest) for texts in levels]
        inputs["src_hn_txt"] = torch.stack([tokens for tokens, _ in padded])
        inputs["src_hn_txt_mask"] = torch.stack([mask for _, mask in padded])

    labels = torch.zeros(clip_mask.shape)
    spans, positive, negative = [], [], []
    for i, row in enumerate(rows):
        length = len(row.clips)
        last = max(0, min(int(row.moment[1] / row.clip_seconds), length) - 1)
        first = min(int(row.moment[0] / row.clip_seconds), last)
        labels[i, first : last + 1] = 1
        start, end = (second / (length * row.clip_seconds) for second in row.moment)
        spans.append(torch.tensor([[(start + end) / 2, end - start]], dtype=torch.float32))
        inside = np.arange(first, last + 1)
        outside = np.setdiff1d(np.arange(length), inside)
        positive.append(random.choice(inside, 2))
        negative.append(random.choice(outside if len(outside) else inside, 2))
    targets: dict[str, Tensor | list[Tensor]] = {
        "span_labels": spans,
        "saliency_all_labels": labels,
        "saliency_pos_labels": torch.from_numpy(np.stack(positive)),
        "saliency_neg_labels": torch.from_numpy(np.stack(negative)),
        "video_length": torch.tensor([[len(row.clips)] for row in rows]),
    }
    return inputs, targets


def _with_end_points(clips: np.ndarray) -> np.ndarray:
    """The clips with where each starts and ends, as shares of the video."""
    start = np.arange(len(clips), dtype=np.float32) / len(clips)
    return np.concatenate([clips, np.stack([start, start + 1 / len(clips)], axis=1)], axis=1)


def _pad(arrays: Sequence[np.ndarray], longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Arrays of [n, width] as float32 [B, longest, width] and their mask of 0 and 1."""
    padded = pad_sequence(
        [torch.from_numpy(np.asarray(array, np.float32)) for array in arrays], batch_first=True
    )
    if longest is not None:
        padded = F.pad(padded, (0, 0, 0, longest - padded.shape[1]))
    lengths = torch.tensor([len(array) for array in arrays])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).float()


def build_optimizer(
    model: nn.Module, drop_epochs: int, rate: float = 1e-4
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.StepLR]:
    """AdamW over all parameters, and a rate that falls to a tenth every `drop_epochs` epochs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, drop_epochs)


def to_device(values: Mapping, device: torch.device | str) -> dict:
    """The same tensors, also those in lists, on `device`."""
    return {
        key: [part.to(device) for part in value] if isinstance(value, list) else value.to(device)
        for key, value in values.items()
    }


def train_step(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    inputs: Mapping[str, Tensor],
    targets: Mapping,
    *,
    bfloat16: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The parameters after one step; returns the total and the losses before it.

    With `bfloat16` the network runs under PyTorch's autocast, and the losses take its outputs in
    float32.
    """
    with torch.autocast(inputs["src_vid"].device.type, torch.bfloat16, enabled=bfloat16):
        outputs = model(**inputs)
    if bfloat16:
        outputs = _float32(outputs)
    total, losses = criterion(outputs, targets)
    optimizer.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return total, losses


def _float32(outputs: dict) -> dict:
    return {
        key: [_float32(layer) for layer in value] if isinstance(value, list) else value.float()
        for key, value in outputs.items()
    }
