"""Parameters under the names of the published checkpoints, in both directions.

Each backbone states them once, as `published_names`: pairs of a pattern of ours and the published
entries that it is made of, joined along the first axis. `name[k/n]` is the k-th of n equal parts of
an entry, such as the query rows of a packed `in_proj_weight`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Names = Sequence[tuple[str, tuple[str, ...]]]

_PART = re.compile(r"(.+)\[(\d)/(\d)\]")


@dataclass(frozen=True)
class Fit:
    """What a published state has for a model."""

    state: dict[str, Tensor]  # our names; only entries that are whole and of the right shape
    unused: list[str]  # published names without a counterpart
    missing: list[str]  # published names that the model needs
    misshapen: list[str]  # sentences


def from_published(model: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """The entries of a published `state_dict` as parameters of `model`, and what does not fit."""
    fit = Fit({}, [], [], [])
    used: set[str] = set()
    for name, own in model.state_dict().items():
        sources = [_source(piece) for piece in _pieces(model, name)]
        used.update(key for key, _, _ in sources)
        absent = [key for key, _, _ in sources if key not in state]
        if absent:
            fit.missing.extend(key for key in absent if key not in fit.missing)
            continue
        rows = len(own) // len(sources)  # of each part
        wrong = [
            f"{key}: expected {[rows * parts, *own.shape[1:]]}, got {list(state[key].shape)}"
            for key, _, parts in sources
            if list(state[key].shape) != [rows * parts, *own.shape[1:]]
        ]
        if wrong:
            fit.misshapen.extend(sentence for sentence in wrong if sentence not in fit.misshapen)
            continue
        fit.state[name] = torch.cat(
            [state[key].chunk(parts)[place] for key, place, parts in sources]
        )
    fit.unused.extend(key for key in state if key not in used)
    return fit


def to_published(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of `model` under the published names; the inverse of `from_published`."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in model.state_dict().items():
        pieces = _pieces(model, name)
        for piece, chunk in zip(pieces, value.chunk(len(pieces)), strict=True):
            key, place, _ = _source(piece)
            parts.setdefault(key, {})[place] = chunk
    return {
        key: torch.cat([places[place] for place in sorted(places)]) for key, places in parts.items()
    }


def _pieces(model: nn.Module, name: str) -> list[str]:
    """The published entries of one parameter of ours."""
    return list(_renamed(model.published_names, name))  # pyright: ignore[reportArgumentType]


def _renamed(names: Names, name: str) -> Iterator[str]:
    for pattern, templates in names:
        if match := re.fullmatch(pattern, name):
            yield from (match.expand(template) for template in templates)
            return
    raise KeyError(f"{name} has no published name")


def _source(piece: str) -> tuple[str, int, int]:
    match = _PART.fullmatch(piece)
    return (match[1], int(match[2]), int(match[3])) if match else (piece, 0, 1)


# What both published backbones call alike.
COMMON: Names = (
    (r"clip_projection\.norms\.(\d+)\.(\w+)", (r"input_vid_proj.\1.LayerNorm.\2",)),
    (r"clip_projection\.linears\.(\d+)\.(\w+)", (r"input_vid_proj.\1.net.1.\2",)),
    (r"token_projection\.norms\.(\d+)\.(\w+)", (r"input_txt_proj.\1.LayerNorm.\2",)),
    (r"token_projection\.linears\.(\d+)\.(\w+)", (r"input_txt_proj.\1.net.1.\2",)),
    (r"token_position\.table", ("txt_position_embed.position_embeddings.weight",)),
    (r"token_position\.norm\.(\w+)", (r"txt_position_embed.LayerNorm.\1",)),
    (r"span_head\.(.+)", (r"span_embed.\1",)),
    (r"label_head\.(\w+)", (r"class_embed.\1",)),
)


def layers(ours: str, theirs: str) -> Names:
    """The names inside the transformer layers of a stack that is called `ours` here.

    Self-attention is packed as query, key, value in one published entry; so is cross-attention,
    under the name that `theirs` is followed by.
    """
    own = rf"{ours}\.(\d+)\."
    layer = rf"{theirs}.\1."
    return (
        (own + r"attention\.query_key\.(\w+)", _packed(layer, "self_attn", 0, 1)),
        (own + r"attention\.value\.(\w+)", _packed(layer, "self_attn", 2)),
        (own + r"attention\.out\.(\w+)", (layer + r"self_attn.out_proj.\2",)),
        (own + r"feedforward\.grow\.(\w+)", (layer + r"linear1.\2",)),
        (own + r"feedforward\.shrink\.(\w+)", (layer + r"linear2.\2",)),
        (own + r"feedforward\.activation\.slope", (layer + "activation.weight",)),
        (own + r"(norm\d\.\w+)", (layer + r"\2",)),
    )


def cross_attention(ours: str, theirs: str) -> Names:
    """The names inside a cross-attention; group 1 of both arguments is the number of the layer."""
    return (
        (ours + r"\.query\.(\w+)", _packed("", theirs, 0)),
        (ours + r"\.key_value\.(\w+)", _packed("", theirs, 1, 2)),
        (ours + r"\.out\.(\w+)", (theirs + r".out_proj.\2",)),
    )


def _packed(layer: str, attention: str, *places: int) -> tuple[str, ...]:
    return tuple(f"{layer}{attention}.in_proj_\\2[{place}/3]" for place in places)
