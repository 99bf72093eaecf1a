"""What a training or evaluation step works on, one annotated field per tensor.

A *row* is one query of one video. The texts of a row are stacked on a leading `text` axis: 0 is the
row's own query, 1 the query of another video (its partner), 2.. its hard negatives, least altered
first. Evaluation, and a loss that needs no other text, has text 0 alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_Moved = TypeVar("_Moved", bound="_Movable")


@dataclass(frozen=True)
class _Movable:
    """Changes every tensor of a dataclass at once."""

    def to(self: _Moved, device: torch.device | str) -> _Moved:
        """The same content on `device`; copies from pinned memory do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def bound_for(self: _Moved, device: torch.device) -> _Moved:
        """The same content where its way to `device` does not make a process wait."""
        if device.type != "cuda":
            return self
        return self._each(lambda t: t.pin_memory() if t.device.type == "cpu" else t)

    def float(self: _Moved) -> _Moved:
        """The same content with its real numbers in float32."""
        return self._each(lambda t: t.float() if t.is_floating_point() else t)

    def _each(self: _Moved, change: Callable[[Tensor], Tensor]) -> _Moved:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, _Movable):
                changed[field.name] = value._each(change)
        return replace(self, **changed)


@dataclass(frozen=True)
class Inputs(_Movable):
    """What the model sees."""

    clips: Float[Tensor, "video clip feature"]  # two temporal end points last; 0 on padding
    clip_mask: Bool[Tensor, "video clip"]  # True where a clip is real
    video: Int[Tensor, " row"]  # the video of each row: an index into the first axis of clips
    tokens: Float[Tensor, "text row token width"]
    token_mask: Bool[Tensor, "text row token"]  # at least one token, also of an absent text


@dataclass(frozen=True)
class Targets(_Movable):
    """What the losses compare with.

    The counts are those of the *global* batch divided by the number of workers: a local sum over a
    count, averaged over workers as DDP averages gradients, is the mean of the global batch.
    """

    spans: Float[Tensor, "row moment 2"]  # (center, width) in [0, 1] of the video
    moment_mask: Bool[Tensor, "row moment"]
    span_clips: Int[Tensor, "row moment 2"]  # first and last clip of the moment
    relevance: Float[Tensor, "row clip"]  # graded saliency label, 0 outside; 1 inside by default
    inside: Bool[Tensor, "row clip"]  # clips that overlap a moment
    outside: Bool[Tensor, "row clip"]  # the other real clips
    # Sampled pairs of clips for the saliency hinge: the first of a pair should score higher.
    pairs: Int[Tensor, "row pair 2"]
    has_pairs: Bool[Tensor, " row"]  # False where the row has no clip of a kind; pairs then hold 0
    text_valid: Bool[Tensor, "text row"]  # False where the row lacks that text
    num_rows: Float[Tensor, ""]
    num_moments: Float[Tensor, ""]
    num_outside: Float[Tensor, ""]  # rows with at least one outside clip
    num_pairs: Float[Tensor, ""]  # pairs of the rows that have them
    num_both: Float[
        Tensor, "text text"
    ]  # rows that have both texts; the diagonal: rows that have one


@dataclass(frozen=True)
class Batch(_Movable):
    """One step's share of one worker."""

    inputs: Inputs
    targets: Targets


@dataclass(frozen=True)
class Alignment(_Movable):
    """Unit vectors of a space where matched slots should lie near the tokens of their query."""

    slots: Float[Tensor, "layer row slot align"]
    tokens: Float[Tensor, "row token align"]
    clips: Float[Tensor, "row clip align"]  # published, but part of no loss
    token_mask: Bool[Tensor, "row token"]


@dataclass(frozen=True)
class Outputs(_Movable):
    """What the model answers."""

    logits: Float[Tensor, "layer row slot 2"]  # class 0 is foreground
    spans: Float[Tensor, "layer row slot 2"]  # (center, width); the last layer is the prediction
    saliency: Float[Tensor, "text row clip"]  # logits; padding clips hold anything
    ends: Float[Tensor, "layer row slot 2 choice"] | None = None  # logits of first and last clip
    alignment: Alignment | None = None
