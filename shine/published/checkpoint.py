"""Checkpoints of the published programs become run folders, and runs become such checkpoints.

A published file is a pickle of `model` (tensors under published names), `opt` (an argparse
namespace), `epoch` and the state of an optimiser. The first three are translated; that of the
optimiser, which only the training that it stopped can continue from, is left behind.
"""

import contextlib
import io
import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shine.checkpoints import input_widths, load_model
from shine.config import Config
from shine.data.sources import located
from shine.data.store import RangeStore, open_storage
from shine.engine import METRICS_FILE, checkpoint_name
from shine.errors import InputError
from shine.evaluation import read_run
from shine.files import sha256, write_whole
from shine.models import build_model
from shine.models.published import Fit, from_published, to_published
from shine.published.options import differences, plain_options, published_options, translate
from shine.published.pickled import StoredTensor, open_torch_file

REPORT_FILE = "published.json"
CHECKPOINT = "checkpoint_published"
UNUSED_FILE = "unused.safetensors"
_ENTRY = re.compile(r"[A-Za-z]\w*(\.\w+)*", re.ASCII)


def import_checkpoint(
    file: Path, folder: Path, configure: Callable[[list[str]], Config]
) -> dict[str, Any]:
    """`folder` is a run whose checkpoint has the parameters of a published file.

    Writes `checkpoint_published/` (parameters, and the entries that the model does not have, so
    that an export is complete), `config.yaml`, `published.json` (what the file held and what did
    not fit) and `run.json`. Nothing in `file` is executed.

    Args:
        file: a `.ckpt` of Moment-DETR, QD-DETR or SHINE.
        folder: to write; must not hold a run.
        configure: makes the configuration of the run from what was translated, as overrides.

    Returns:
        The content of `published.json`.

    Raises:
        InputError: the file is not such a checkpoint, is damaged or asks for more than data, or its
            entries do not fit the model; `published.json` then names all that do not.
    """
    if (folder / "run.json").exists():
        raise InputError(f"{folder} holds a run already; choose another --out")
    state, options, epoch = _read(file)
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    translated = translate(options, state, str(file))
    config = configure([f"{key}={json.dumps(value)}" for key, value in translated.values.items()])
    with torch.device("meta"):  # names and shapes alone
        model = build_model(
            config.model, clip_width=translated.clip_width, token_width=translated.token_width
        )
    fit = from_published(model, state)
    misshapen = fit.misshapen + _not_numbers(fit, state)
    report = {
        "file": file.name,
        "sha256": sha256(file),
        "epoch": epoch,
        "backbone": config.model.backbone,
        "num_entries": len(state),
        "missing": fit.missing,
        "misshapen": misshapen,
        "unused": fit.unused,
        "notes": [*translated.notes, *_notes(prefix, state)],
        "untranslated": translated.untranslated,
        "options": options,
    }
    checkpoint = folder / CHECKPOINT
    try:
        checkpoint.mkdir(parents=True, exist_ok=True)
        _write_json(folder / REPORT_FILE, report)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from None
    if fit.missing or misshapen:
        raise InputError(
            f"{file} does not fit {config.model.backbone}: {len(fit.missing)} entries are missing "
            f"and {len(misshapen)} are wrong, first {[*misshapen, *fit.missing][0]}; "
            f"{folder / REPORT_FILE} names all of them, and no run was written"
        )
    parameters = {name: value.float().contiguous() for name, value in fit.state.items()}
    save_file(parameters, checkpoint / "model.safetensors")
    save_file({name: state[name] for name in fit.unused}, checkpoint / UNUSED_FILE)
    config = config.rooted(Path(config.data.root))
    write_whole(folder / "config.yaml", config.to_yaml())
    run = {
        "name": folder.resolve().name,
        "status": "imported",
        "best": CHECKPOINT,
        "best_epoch": epoch,
        "score": None,
        "selection": f"published checkpoint {file.name}",
    }
    _write_json(folder / "run.json", run)
    return report


def export_checkpoint(folder: Path, file: Path) -> dict[str, Any]:
    """`file` has a checkpoint in the published layout: `model`, `epoch` and `opt`.

    Entries that the published programs hold but never read in this model are those of the imported
    file; for a run trained here they are zeros.

    Args:
        folder: a run, whose best checkpoint is taken, or one checkpoint of a run.
        file: to write.

    Returns:
        What was written, in numbers, and `notes`: what the options of the file cannot tell.

    Raises:
        InputError: `folder` is neither, or `file` cannot be written.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a run or one of its checkpoints")
    whole = (folder / "run.json").exists()
    home = folder if whole else folder.resolve().parent
    if not (home / "run.json").exists():
        raise InputError(
            f"{folder}: expected a finished run or one of its checkpoints; there is no run.json in "
            f"it or in the folder above it"
        )
    config, run = read_run(home)
    checkpoint = home / (run["best"] if whole else folder.resolve().name)
    clip_width, token_width = input_widths(checkpoint)
    model = build_model(config.model, clip_width=clip_width, token_width=token_width)
    load_model(checkpoint, model)
    state = _idle(config, clip_width, token_width) | to_published(model)
    audio_width, notes = _audio(config, clip_width)
    options = published_options(config, clip_width, token_width, audio_width)
    if (checkpoint / UNUSED_FILE).exists():
        state |= load_file(checkpoint / UNUSED_FILE)
        told = json.loads((home / REPORT_FILE).read_text())["options"]
        options |= told
        notes = [] if "a_feat_dim" in told else notes
    notes += differences(config, translate(options, state, str(checkpoint)).values)
    options["device"] = torch.device("cpu")
    epoch = run["best_epoch"] if checkpoint.name == run["best"] else _epoch(checkpoint)
    content = {"model": state, "epoch": epoch, "opt": Namespace(**options)}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, buffer.getvalue())
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from None
    return {
        "checkpoint": str(checkpoint),
        "file": str(file),
        "epoch": epoch,
        "num_entries": len(state),
        "notes": notes,
    }


def _audio(config: Config, clip_width: int) -> tuple[int | None, list[str]]:
    """Columns of audio in the clips of a run, and what is to say about them.

    The tensors and the configuration have the sum of all columns alone; the store has the parts.
    """
    if config.features.audio is None:
        return None, []
    place = located(config).store
    with contextlib.suppress(InputError):
        store = RangeStore.open(place)
        if store.clip_width == clip_width and store.manifest.get("audio_width"):
            return store.manifest["audio_width"], []
    return 0, [
        f"the store of the run is not in {open_storage(place).shown}, so a_feat_dim counts no "
        f"column of audio and v_feat_dim all of them; their sum, which the model is built with, is "
        f"right"
    ]


def _epoch(checkpoint: Path) -> int | None:
    """The epoch after which a checkpoint was taken; None where its run does not tell."""
    try:
        lines = (checkpoint.parent / METRICS_FILE).read_text().splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    epochs = {checkpoint_name(record["step"]): record["epoch"] for record in records}
    return epochs.get(checkpoint.name)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any], int | None]:
    """Tensors, options and epoch of a published file."""
    with open_torch_file(file) as opened:
        content = opened.content
        if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
            raise InputError(
                f"{file}: expected a checkpoint with the key `model`, a dictionary of tensors"
            )
        entries = content["model"]
        for name, value in entries.items():
            if not _ENTRY.fullmatch(str(name)) or not isinstance(value, StoredTensor):
                raise InputError(f"{file}: expected tensors by name in `model`, got {name!a:.80}")
        options = plain_options(content.get("opt"), str(file))
        epoch = content.get("epoch")
        state = opened.tensors(entries)
    return state, options, epoch if isinstance(epoch, int) else None


def _not_numbers(fit: Fit, state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name}: expected floating-point numbers, got {str(value.dtype).removeprefix('torch.')}"
        for name, value in state.items()
        if not value.is_floating_point() and name not in fit.unused
    ]


def _notes(prefix: str, state: Mapping[str, Tensor]) -> list[str]:
    """What is worth a sentence about the tensors themselves."""
    notes = [f"every entry began with {prefix!r}, which was dropped"] if prefix else []
    other = [n for n, v in state.items() if v.is_floating_point() and v.dtype != torch.float32]
    if other:
        notes.append(f"{len(other)} entries are converted to float32, first {other[0]}")
    broken = [n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        notes.append(f"{len(broken)} entries hold values that are not finite: {', '.join(broken)}")
    return notes


def _idle(config: Config, clip_width: int, token_width: int) -> dict[str, Tensor]:
    """Zeros for what a published model always holds, but reads under other options alone."""
    decoder_layers = config.model.decoder_layers
    every = {
        "text_positions": config.model.text_positions or config.text.max_tokens,
        "decoder_layers": max(decoder_layers, 2),  # one layer scales and refines nothing
    }
    with torch.device("meta"):
        model = build_model(
            config.model.model_copy(update=every), clip_width=clip_width, token_width=token_width
        )
    beyond = f"transformer.decoder.layers.{decoder_layers}."
    entries = {k: v for k, v in to_published(model).items() if not k.startswith(beyond)}
    return {name: torch.zeros(value.shape) for name, value in entries.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")
