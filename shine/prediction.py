"""What a model answers to the rows of a dataset: ranked moments and saliency."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from shine.data.dataset import Dataset, collate_inputs
from shine.spans import temporal_nms, to_moments


@dataclass(frozen=True)
class Predictions:
    """What a model answers to the rows of a dataset it was asked."""

    rows: Int[np.ndarray, " row"]
    moments: Float[np.ndarray, "row slot 2"]  # seconds, best first, within the video
    scores: Float[np.ndarray, "row slot"]  # in [0, 1], descending; 0 where NMS removed a slot
    saliency: Float[np.ndarray, "row text clip"]  # logits; NaN on padding


@torch.inference_mode()
def predict(
    model: nn.Module,
    dataset: Dataset,
    rows: Int[np.ndarray, " row"],
    *,
    batch_size: int,
    device: torch.device,
    nms_threshold: float | None = None,
) -> Predictions:
    """Moments and saliency of `rows`, for every text of a row one saliency curve.

    Rows are batched by video, so that each is encoded about once, and come back in their order.
    """
    model.eval()
    order = np.lexsort((dataset.video[rows], dataset.num_clips[rows]))
    longest = int(dataset.num_clips[rows].max(initial=1))
    moments, scores, curves = [], [], []
    for part in np.split(rows[order], range(batch_size, len(rows), batch_size)):
        inputs = collate_inputs(dataset, part, dataset.text[part]).to(device)
        outputs = model(inputs)
        score = outputs.logits[-1].softmax(dim=-1)[..., 0]
        spans = to_moments(outputs.spans[-1])
        score, ranked = score.sort(dim=1, descending=True, stable=True)
        spans = spans.gather(1, ranked[..., None].expand_as(spans))
        if nms_threshold is not None:
            keep = temporal_nms(spans, score, nms_threshold)
            score, ranked = (score * keep).sort(dim=1, descending=True, stable=True)
            spans = spans.gather(1, ranked[..., None].expand_as(spans))
        saliency = outputs.saliency.masked_fill(~inputs.clip_mask[inputs.video], torch.nan)
        missing = longest - saliency.shape[-1]
        saliency = nn.functional.pad(saliency, (0, missing), value=torch.nan)
        moments.append(spans.double().cpu().numpy())
        scores.append(score.double().cpu().numpy())
        curves.append(saliency.transpose(0, 1).float().cpu().numpy())
    back = np.argsort(order)
    ends = np.array([dataset.annotations[row].duration_seconds for row in rows])
    seconds = np.concatenate(moments)[back] * dataset.extent_seconds[rows, None, None]
    return Predictions(
        rows=rows,
        moments=np.clip(seconds, 0.0, ends[:, None, None]),
        scores=np.concatenate(scores)[back],
        saliency=np.concatenate(curves)[back],
    )
