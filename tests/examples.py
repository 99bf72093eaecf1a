"""Small random batches of every shape the package allows."""

import torch

from shine.config import LossConfig, MomentDetrConfig, QdDetrConfig
from shine.data.batch import Inputs, Targets
from shine.models import build_model

CLIP_WIDTH, TOKEN_WIDTH = 6, 5
SHINE_LOSS = LossConfig(
    intra_weight=0.7,
    inter_weight=0.6,
    fine_weights=(0.5, 1.5, 0.25, 2.0),
    fine_margins=(0.1, 0.5, 0.05, 0.3),
)


CONFIGS = {"qd_detr": QdDetrConfig, "moment_detr": MomentDetrConfig}
# Every option of every backbone.
VARIANTS = [
    {"backbone": "qd_detr"},
    {"backbone": "qd_detr", "norm": "pre"},
    {"backbone": "qd_detr", "text_positions": 9, "input_projections": 1},
    {"backbone": "qd_detr", "span_clips": 9, "input_projections": 3},
    {"backbone": "moment_detr"},
    {"backbone": "moment_detr", "norm": "pre"},
    {"backbone": "moment_detr", "text_positions": 9, "align_width": 3},
    {"backbone": "moment_detr", "span_clips": 9, "input_projections": 1},
]


def name_of(variant):
    return "-".join(str(value) for value in variant.values())


def network(*, backbone="qd_detr", seed=0, dtype=torch.float64, **changes):
    """A tiny model without dropout whose parameters are all far from their special values."""
    torch.manual_seed(seed)
    sizes = {"hidden": 8, "heads": 2, "feedforward": 12, "slots": 4, "encoder_layers": 2}
    config = CONFIGS[backbone](**(sizes | {"dropout": 0.0, "input_dropout": 0.0} | changes))
    model = build_model(config, clip_width=CLIP_WIDTH, token_width=TOKEN_WIDTH).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def mask(rows, longest, generator):
    """True on a random number of places from the left, at least one, in one row on all."""
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[:1] = longest
    return torch.arange(longest) < lengths[:, None]


def inputs(generator, *, rows=3, videos=None, texts=5, clips=7, tokens=4, dtype=torch.float64):
    videos = rows if videos is None else videos
    clip_mask = mask(videos, clips, generator)
    features = torch.randn(videos, clips, CLIP_WIDTH, generator=generator, dtype=dtype)
    video = torch.arange(rows) if videos == rows else torch.arange(rows) % videos
    words = torch.randn(texts, rows, tokens, TOKEN_WIDTH, generator=generator, dtype=dtype)
    return Inputs(
        clips=features * clip_mask[..., None],
        clip_mask=clip_mask,
        video=video,
        tokens=words,
        token_mask=mask(texts * rows, tokens, generator).view(texts, rows, tokens),
    )


def targets(generator, clip_mask, *, texts=5, moments=2, graded=False, dtype=torch.float64):
    """Labels with all that a row may lack: partner, negatives, an outside clip, a second moment."""
    rows, clips = clip_mask.shape

    def chance(shape, share):
        return torch.rand(shape, generator=generator) < share

    moment_mask = chance((rows, moments), 0.6)
    moment_mask[:, 0] = True
    center_width = 0.1 + 0.8 * torch.rand(rows, moments, 2, generator=generator, dtype=dtype)
    inside = chance((rows, clips), 0.4) & clip_mask
    inside[:, 0] = True
    inside |= clip_mask & chance((rows, 1), 0.25)  # the moment fills its video
    grades = torch.randint(1, 13, (rows, clips), generator=generator) if graded else 1
    text_valid = chance((texts, rows), 0.7)
    text_valid[0] = True
    outside = clip_mask & ~inside
    first = inside.int().argmax(dim=1)
    last = clips - 1 - inside.flip(1).int().argmax(dim=1)
    return Targets(
        spans=center_width,
        moment_mask=moment_mask,
        span_clips=torch.stack([first, last], dim=-1)[:, None].expand(-1, moments, -1),
        relevance=(inside * grades).to(dtype),
        inside=inside,
        outside=outside,
        pairs=torch.stack([inside.int().argmax(dim=1), outside.int().argmax(dim=1)], dim=-1)[
            :, None
        ].expand(-1, 2, -1),
        has_pairs=outside.any(dim=1),
        text_valid=text_valid,
        **counts(moment_mask, outside, text_valid, dtype),
    )


def counts(moment_mask, outside, text_valid, dtype=torch.float64):
    """The normalisers of a batch on one worker."""
    valid = text_valid.to(dtype)
    return {
        "num_rows": torch.tensor(len(moment_mask), dtype=dtype),
        "num_moments": moment_mask.sum().to(dtype),
        "num_outside": outside.any(dim=1).sum().to(dtype),
        "num_pairs": 2 * outside.any(dim=1).sum().to(dtype),
        "num_both": valid @ valid.T,
    }


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}
