"""Recorded numbers of the published implementations (golden/README.md) in our types."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from shine.config import LossConfig, MomentDetrConfig, QdDetrConfig
from shine.data.batch import Inputs, Targets
from shine.models import build_model
from shine.models.published import from_published

FOLDER = Path(os.environ.get("SHINE_GOLDEN", Path(__file__).parent / "golden"))


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def facts(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def under(values, prefix):
    return {key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)}


def _described(*keys):
    """The names of the fixtures whose description has all of the keys."""
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    said = {name: facts(name) for name in names}
    return [n for n in names if isinstance(said[n], dict) and set(keys) <= said[n].keys()]


MODELS = _described("model", "config", "train_mode")
FULL_SIZE = _described("model", "config_name", "weight_probe")
STATE_KEYS = _described("model", "configs")
UNITS = _described("ranking", "nms", "labels")
MODELS, FULL_SIZE, STATE_KEYS = (
    [n for n in names if facts(n)["model"] in ("moment_detr", "qd_detr", "shine")]
    for names in (MODELS, FULL_SIZE, STATE_KEYS)
)


def system(name):
    return facts(name)["model"]


def model_config(name, options, compat):
    shared = {
        "hidden": options["hidden_dim"],
        "heads": options["nheads"],
        "feedforward": options["dim_feedforward"],
        "input_projections": options["n_input_proj"],
        "encoder_layers": options["enc_layers"],
        "decoder_layers": options["dec_layers"],
        "slots": options["num_queries"],
        "dropout": 0,
        "input_dropout": 0,
        "norm": "pre" if options["pre_norm"] else "post",
        "text_positions": options["max_q_l"] if options["use_txt_pos"] else None,
        "span_clips": options.get("max_v_l", 75) if options["span_loss_type"] == "ce" else None,
        "compat": compat,
    }
    if system(name) != "moment_detr":
        return QdDetrConfig(**shared)
    with_align = options["contrastive_align_loss"]
    return MomentDetrConfig(
        **shared, align_width=options["contrastive_hdim"] if with_align else None
    )


def model(name, options, state, compat):
    """The recorded network; its widths are those of its state."""
    built = build_model(
        model_config(name, options, compat),
        clip_width=len(state["input_vid_proj.0.LayerNorm.weight"]),
        token_width=len(state["input_txt_proj.0.LayerNorm.weight"]),
    )
    fit = from_published(built, state)
    assert not fit.missing
    assert not fit.misshapen
    built.load_state_dict(fit.state)
    return built


def loss_config(name, options, scenario):
    """The loss of a scenario; `evaluation` has no hard negatives."""
    saliency = options["lw_saliency"]
    decoded = not scenario.startswith("released")
    values = {
        "span_weight": options["span_loss_coef"] * decoded,
        "giou_weight": options["giou_loss_coef"] * decoded * (options["span_loss_type"] != "ce"),
        "label_weight": options["label_loss_coef"] * decoded,
        "aux_weight": float(options["aux_loss"]),
        "matching_weights": [options[f"set_cost_{term}"] for term in ("span", "giou", "class")],
        "background_weight": options["eos_coef"],
        "hinge_weight": saliency,
        "hinge_margin": options["saliency_margin"],
        "rank_weight": 0,
        "negative_weight": 0,
        "compat": "reference",
    }
    if system(name) == "moment_detr":
        if options["contrastive_align_loss"]:
            values["align_weight"] = options["contrastive_align_loss_coef"]
            values["align_temperature"] = options["temperature"]
        return LossConfig(**values)
    values |= {"rank_weight": saliency, "negative_weight": saliency}
    if system(name) == "shine":
        hinge = "_hinge" in scenario or (scenario == "evaluation" and options["use_saliency_loss"])
        values |= {
            "hinge_weight": saliency * hinge,
            "intra_weight": saliency * options["coarse_coef"],
            "inter_weight": saliency * options["coarse_coef"],
            "intra_margin": options["coarse_margin"][0],
            "inter_margin": options["coarse_margin"][1],
            "top_divisor": 8,  # the option is parsed but never passed on
        }
        if scenario != "evaluation":
            margins = options["fine_margin"]
            values |= {
                "fine_weights": [saliency * options["fine_coef"]] * len(margins),
                "fine_margins": margins,
                "fine_order": "absolute" if "_abd" in scenario else "relative",
            }
    return LossConfig(**values)


def inputs(values, *, partner=True):
    """The published partner of a row is the next row's query, of the last row the first one's."""
    tokens, token_mask = values["src_txt"], values["src_txt_mask"].bool()
    texts, masks = [tokens], [token_mask]
    if partner:
        texts.append(tokens.roll(-1, 0))
        masks.append(token_mask.roll(-1, 0))
    if "src_hn_txt" in values:
        texts += values["src_hn_txt"]
        masks += values["src_hn_txt_mask"].bool()
    return Inputs(
        clips=values["src_vid"],
        clip_mask=values["src_vid_mask"].bool(),
        video=torch.arange(len(tokens)),
        tokens=torch.stack(texts),
        token_mask=torch.stack(masks),
    )


def targets(values, clip_mask, num_texts):
    """Every row has every text; without labels of all clips, no term reads them."""
    rows = len(clip_mask)
    labels = [values[f"span_labels/{row}"] for row in range(rows)]
    spans = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    by_clip = not spans.is_floating_point()  # labels of `ce`: first and last clip
    moment_mask = torch.arange(spans.shape[1]) < torch.tensor([[len(v)] for v in labels])
    relevance = values.get("saliency_all_labels", torch.zeros(clip_mask.shape)).float()
    inside = (relevance > 0) & clip_mask
    outside = ~inside & clip_mask
    pairs = torch.stack([values["saliency_pos_labels"], values["saliency_neg_labels"]], dim=-1)
    return Targets(
        spans=spans.float(),
        moment_mask=moment_mask,
        span_clips=spans if by_clip else torch.zeros_like(spans, dtype=torch.long),
        relevance=relevance,
        inside=inside,
        outside=outside,
        pairs=pairs.long(),
        has_pairs=torch.ones(rows, dtype=torch.bool),
        text_valid=torch.ones(num_texts, rows, dtype=torch.bool),
        num_rows=torch.tensor(float(rows)),
        num_moments=moment_mask.sum().float(),
        num_outside=outside.any(dim=1).sum().float(),
        num_pairs=torch.tensor(float(pairs[..., 0].numel())),
        num_both=torch.full((num_texts, num_texts), float(rows)),
    )


def procedural(key, shape):
    """The tensor that the full-size fixtures derive from its name."""
    size, wrap = int(np.prod(shape)), np.uint64(2**64 - 1)
    with np.errstate(over="ignore"):
        x = np.arange(1, size + 1, dtype=np.uint64)
        x = x + np.uint64(zlib.crc32(key.encode()) * 2654435761 & int(wrap))
        x = x * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(31))
    noise = 2 * ((x >> np.uint64(11)) / 2.0**53) - 1
    if key.startswith(("input/", "global_rep_")):
        value = noise
    elif len(shape) > 1:
        value = noise * np.sqrt(6 / (shape[0] + shape[1]))
    elif key.endswith("activation.weight"):
        value = 0.25 + 0.05 * noise
    elif key.endswith("weight"):
        value = 1 + 0.1 * noise
    else:
        value = 0.1 * noise
    return torch.from_numpy(value.astype(np.float32).reshape(shape))
