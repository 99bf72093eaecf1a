"""Recorded numbers of the published implementations (golden/README.md) in our types."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from shine.config import QdDetrConfig
from shine.data.batch import Inputs, Targets

FOLDER = Path(os.environ.get("SHINE_GOLDEN", Path(__file__).parent / "golden"))


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def facts(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def under(values, prefix):
    return {key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)}


def model_config(facts):
    options = facts["config"]
    return QdDetrConfig(
        hidden=options["hidden_dim"],
        heads=options["nheads"],
        feedforward=options["dim_feedforward"],
        input_projections=options["n_input_proj"],
        encoder_layers=options["enc_layers"],
        decoder_layers=options["dec_layers"],
        slots=options["num_queries"],
        dropout=0,
        input_dropout=0,
    )


def inputs(values):
    """The published partner of a row is the next row's query, of the last row the first one's."""
    tokens, token_mask = values["src_txt"], values["src_txt_mask"].bool()
    texts, masks = [tokens, tokens.roll(-1, 0)], [token_mask, token_mask.roll(-1, 0)]
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
    """Every row has every text."""
    rows = len(clip_mask)
    labels = [values[f"span_labels/{row}"] for row in range(rows)]
    spans = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    moment_mask = torch.arange(spans.shape[1]) < torch.tensor([[len(v)] for v in labels])
    inside = (values["saliency_all_labels"] > 0) & clip_mask
    outside = ~inside & clip_mask
    return Targets(
        spans=spans,
        moment_mask=moment_mask,
        span_clips=torch.zeros(*moment_mask.shape, 2, dtype=torch.long),
        relevance=values["saliency_all_labels"].float(),
        inside=inside,
        outside=outside,
        pairs=torch.stack([values["saliency_pos_labels"], values["saliency_neg_labels"]], -1),
        has_pairs=torch.ones(rows, dtype=torch.bool),
        text_valid=torch.ones(num_texts, rows, dtype=torch.bool),
        num_rows=torch.tensor(float(rows)),
        num_moments=moment_mask.sum().float(),
        num_outside=outside.any(dim=1).sum().float(),
        num_pairs=torch.tensor(float(values["saliency_pos_labels"].numel())),
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
