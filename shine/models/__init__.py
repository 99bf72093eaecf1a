"""Grounding networks: a configuration class names its backbone."""

from collections.abc import Callable

from torch import nn

from shine.config import DetrConfig, MomentDetrConfig, QdDetrConfig
from shine.models.moment_detr import MomentDetr
from shine.models.qd_detr import QdDetr

BACKBONES: dict[type[DetrConfig], Callable[..., nn.Module]] = {
    MomentDetrConfig: MomentDetr,
    QdDetrConfig: QdDetr,
}


def build_model(config: DetrConfig, *, clip_width: int, token_width: int) -> nn.Module:
    """The freshly initialised backbone that `config` describes.

    Args:
        config: the section `model` of a run configuration.
        clip_width: columns of a clip vector, its temporal end points included.
        token_width: columns of a token vector.
    """
    return BACKBONES[type(config)](config, clip_width=clip_width, token_width=token_width)
