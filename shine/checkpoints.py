"""Checkpoints: a folder of safetensors and JSON. Nothing in it is executed to read it.

`model.safetensors` holds all parameters and buffers, `optimizer.safetensors` the moments and step
of every parameter, `state.json` the position in the run. Random numbers, learning rate and sample
order are functions of the seed and that position (see `shine.engine`): nothing else is kept.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from shine.errors import InputError
from shine.files import write_whole


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0  # optimiser steps taken


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, at: Position) -> None:
    """`folder` holds everything that continues the run; `state.json` is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "model.safetensors", model.state_dict())
    names = _names(model, optimizer)
    moments = {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    _save(folder / "optimizer.safetensors", moments)
    write_whole(folder / "state.json", json.dumps(asdict(at)) + "\n")


def load_model(folder: Path, model: nn.Module) -> None:
    """`model` has the parameters and buffers of the checkpoint in `folder`.

    Raises:
        InputError: there is no such checkpoint, or it is of another model.
    """
    state = _load(folder / "model.safetensors")
    own = model.state_dict()
    wrong = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    wrong += sorted(own.keys() ^ state.keys())
    if wrong:
        raise InputError(
            f"{folder}: not a checkpoint of the configured model; {len(wrong)} entries differ, "
            f"first {wrong[0]}; check the sections model, features and text"
        )
    model.load_state_dict(state)


def input_widths(folder: Path) -> tuple[int, int]:
    """Columns of the clip vectors, temporal end points included, and of the token vectors.

    Raises:
        InputError: there is no such checkpoint, or it is not of a grounding network.
    """
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            clip, token = (
                file.get_slice(f"{side}_projection.norms.0.weight").get_shape()[0]
                for side in ("clip", "token")
            )
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read checkpoint {folder}: {error}") from None
    return clip, token


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> Position:
    """Model and optimiser continue where the checkpoint in `folder` was taken."""
    load_model(folder, model)
    flat = _load(folder / "optimizer.safetensors")
    for parameter, name in _names(model, optimizer).items():
        optimizer.state[parameter] = {
            key.rpartition("/")[2]: value.to(parameter.device)
            for key, value in flat.items()
            if key.rpartition("/")[0] == name
        }
    return Position(**_state(folder))


def _state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a whole checkpoint: {error}") from None


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {p: name for name, p in model.named_parameters() if p in trained}


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read checkpoint {path}: {error}") from None
