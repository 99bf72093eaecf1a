"""Tiny vision models of random parameters, in folders as `save_pretrained` writes them."""

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

WIDTHS = {"clip": 12, "siglip": 16}
_LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_VISION = {**_LAYERS, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
_TEXT = {
    **_LAYERS,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def processor(kind, **changes):
    """A processor of images to 32 x 32 pixels, of the library's class `kind`."""
    sizes = {"size": {"height": 32, "width": 32}}
    if kind is CLIPImageProcessorPil:
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return kind(**(sizes | changes))


def save_model(folder, kind="clip", seed=0):
    """A tiny `clip` or `siglip` is saved; its folder."""
    torch.manual_seed(seed)
    if kind == "clip":
        config = CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=WIDTHS[kind])
        model, prepare = CLIPModel(config), processor(CLIPImageProcessorPil)
    else:
        config = SiglipConfig(text_config=_TEXT, vision_config=_VISION)
        model, prepare = SiglipModel(config), processor(SiglipImageProcessorPil)
    model.save_pretrained(folder)
    prepare.save_pretrained(folder)
    return folder
