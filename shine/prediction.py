"""What a model answers to the rows of a dataset: ranked moments and saliency."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from shine.config import EvaluateConfig
from shine.data.dataset import Dataset, collate_inputs
from shine.data.feeding import ahead
from shine.postprocess import finish
from shine.spans import to_moments


@dataclass(frozen=True)
class Predictions:
    """What a model answers to the rows of a dataset it was asked."""

    rows: Int[np.ndarray, " row"]
    moments: Float[np.ndarray, "row slot 2"]  # seconds, best first; NaN after the last
    scores: Float[np.ndarray, "row slot"]  # in [0, 1], descending; NaN after the last
    saliency: Float[np.ndarray, "row text clip"]  # logits; NaN on padding


@torch.inference_mode()
def predict(
    model: nn.Module,
    dataset: Dataset,
    rows: Int[np.ndarray, " row"],
    settings: EvaluateConfig,
    *,
    device: torch.device,
) -> Predictions:
    """Moments and saliency of `rows`, for every text of a row one saliency curve.

    Rows are batched by video, so that each is encoded about once, and come back in their order.
    As published (`compat: reference`), a span covers the duration instead of all clips, and
    saliency has the precision of float16.
    """
    model.eval()
    size = settings.batch_size
    order = np.lexsort((dataset.video[rows], dataset.num_clips[rows]))
    longest = int(dataset.num_clips[rows].max(initial=1))
    moments, scores, curves = [], [], []
    parts = np.split(rows[order], range(size, len(rows), size))
    read = (collate_inputs(dataset, part, dataset.text[part]).bound_for(device) for part in parts)
    for waiting in ahead(read):
        inputs = waiting.to(device)
        outputs = model(inputs)
        score = outputs.logits[-1].softmax(dim=-1)[..., 0]
        spans = to_moments(outputs.spans[-1])
        score, ranked = score.sort(dim=1, descending=True, stable=True)
        spans = spans.gather(1, ranked[..., None].expand_as(spans))
        saliency = outputs.saliency.masked_fill(~inputs.clip_mask[inputs.video], torch.nan)
        missing = longest - saliency.shape[-1]
        saliency = nn.functional.pad(saliency, (0, missing), value=torch.nan)
        moments.append(spans.float().cpu().numpy())
        scores.append(score.float().cpu().numpy())
        curves.append(saliency.transpose(0, 1).float().cpu().numpy())
    back = np.argsort(order)
    durations = np.array([dataset.annotations[row].duration_seconds for row in rows])
    saliency = np.concatenate(curves)[back]
    extent = dataset.extent_seconds[rows]
    if settings.compat == "reference":
        extent = durations.astype(np.float32)
        saliency = saliency.astype(np.float16).astype(np.float32)
    ranked = finish(
        (np.concatenate(moments)[back] * extent[:, None, None]).astype(np.float64),
        np.concatenate(scores)[back].astype(np.float64),
        durations,
        settings,
    )
    return Predictions(rows, ranked.moments, ranked.scores, saliency)
