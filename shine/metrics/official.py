"""The reports of the field's evaluators: their keys, their rounding, their empty buckets."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from shine.metrics.average_precision import THRESHOLDS
from shine.metrics.figures import BUCKETS
from shine.metrics.highlights import LEVELS

Evaluator = Literal["qvhighlights", "cg"]


def official_report(
    figures: Mapping[str, Float[np.ndarray, " query"]], evaluator: Evaluator
) -> dict[str, Any]:
    """What `evaluator` prints: percent with two decimals, nested under its own names.

    `cg` is the evaluator of the compositional splits: it adds mIoU, which stands as the average of
    R1, knows no highlights, and gives 0 for a length that no moment has. `qvhighlights` stops
    there; its report then holds None.

    Args:
        figures: per-query values of `moment_figures` and, with labels, `highlight_figures`.
        evaluator: whose report.
    """
    parts: dict[str, Any] = {
        name: _lengths(figures, name, evaluator) for name in ("full", *BUCKETS)
    }
    full = parts["full"]
    brief = {f"MR-full-R1@{t}": full["MR-R1"][str(t)] for t in (0.5, 0.7)}
    brief["MR-full-mAP"] = full["MR-mAP"]["average"]
    brief |= {f"MR-full-mAP@{t}": full["MR-mAP"][str(t)] for t in (0.5, 0.75)}
    if evaluator == "cg":
        brief["MR-full-mIoU"] = full["MR-R1"]["average"]
    brief |= {f"MR-{name}-mAP": parts[name]["MR-mAP"]["average"] for name in sorted(BUCKETS)}
    if evaluator == "qvhighlights" and f"HL-min-{next(iter(LEVELS))}-mAP" in figures:
        for level in (f"HL-min-{name}" for name in LEVELS):
            parts[level] = {f"HL-{m}": _percent(figures[f"{level}-{m}"]) for m in ("mAP", "Hit1")}
            brief |= {f"{level}-{m}": parts[level][f"HL-{m}"] for m in ("mAP", "Hit1")}
    return {"brief": brief, **dict(sorted(parts.items()))}


def _lengths(
    figures: Mapping[str, Float[np.ndarray, " query"]], name: str, evaluator: Evaluator
) -> dict[str, Any]:
    """Precision and R1 at every threshold over the moments of some lengths."""
    prefix = "" if name == "full" else f"{name}-"
    names = [str(threshold) for threshold in THRESHOLDS]
    recalls = [*(f"R1@{threshold}" for threshold in names), "mIoU"]
    if f"{prefix}mAP" in figures:
        columns = [figures[f"{prefix}mAP@{threshold}"] for threshold in names]
        precision = [*map(_percent, columns), _percent(np.array([*map(_mean, columns)]))]
        recall = [_percent(figures[f"{prefix}{figure}"]) for figure in recalls]
    else:
        precision = recall = [0.0 if evaluator == "cg" else None] * (len(names) + 1)
    keys = [*names, "average"]
    report = {
        "MR-mAP": dict(zip(keys, precision, strict=True)),
        "MR-R1": dict(zip(keys, recall, strict=True)),
    }
    if evaluator == "qvhighlights":
        del report["MR-R1"]["average"]
    return report


def _percent(values: Float[np.ndarray, " query"]) -> float:
    """The mean in percent as `%.2f` prints it."""
    return float(f"{100 * _mean(values):.2f}")


def _mean(values: Float[np.ndarray, " query"]) -> float:
    """Over the queries that count; 0 where none does."""
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else 0.0
