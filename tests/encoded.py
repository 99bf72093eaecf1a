"""Tiny text models on disk, and text stores that are written in this process."""

import json

import torch

from shine.data.text_files import file_identity, file_state, needed_texts, read_tokens, text_files
from shine.data.text_models import ModelEncoder
from shine.data.text_store import TextWriter, text_storage

LIMIT = 16  # tokens that the models read
START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz.'0123456789"


def tiny_clip(folder, *, width=8, seed=0, sizes=None):
    """A random CLIP, both towers as on the hub, with a tokenizer of letters and a few words."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    merges = [("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "o"), ("doo", "r</w>")]
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *map("".join, merges), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LIMIT, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2} | (sizes or {})
    text = {
        "vocab_size": len(words),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "max_position_embeddings": LIMIT,
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
        **sizes,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4, **sizes}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def store_texts(config):
    """The text store of `config` holds what it needs, as `shine text encode` writes it."""
    origins = needed_texts(config)
    storage = text_storage(config)
    if config.text.encoder == "precomputed":
        files = text_files(config, origins)
        writer = TextWriter(storage, file_identity(config.text))
        for text in writer.missing({text: file_state(path) for text, path in files.items()}):
            tokens = read_tokens(files[text], config.text)
            writer.add(text, tokens, source=file_state(files[text]))
    else:
        encoder = ModelEncoder.of(config)
        writer = TextWriter(storage, encoder.identity)
        missing = writer.missing(dict.fromkeys(origins, ""))
        for text, encoded in zip(missing, encoder.encode(missing), strict=True):
            writer.add(text, encoded.tokens, truncated=encoded.truncated)
    return writer.finish()
