"""One training step, and the loop around it.

The loop sees only a `Backend`: who am I among how many, sum this over all, keep this checkpoint.
Ray Train is one (`pipelines.train`), `LocalBackend` the other. What a run computes depends neither
on the backend nor on the number of workers: order and partners come from the sampler, counts from
the global batch, random numbers from (seed, step, rank). (`compat: reference` is the exception.)
"""

import contextlib
import ctypes
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from shine.checkpoints import Position, load_checkpoint, save_checkpoint
from shine.config import Config, TrainConfig
from shine.data.batch import Batch
from shine.data.dataset import Dataset, collate
from shine.data.feeding import Feed, collated_ahead
from shine.data.loading import Source
from shine.data.sampler import GlobalBatch, epoch_batches
from shine.errors import InputError
from shine.files import write_whole
from shine.losses.criterion import Criterion
from shine.metrics.average_precision import average_precision
from shine.metrics.recall import METRICS, per_query, top1_iou
from shine.models import build_model
from shine.prediction import predict
from shine.runs import METRICS_FILE
from shine.tracking import tracking

logger = logging.getLogger(__name__)


@runtime_checkable
class Backend(Protocol):
    """Who computes, and where checkpoints are kept."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` such that a backward pass leaves the mean gradient of all workers."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all workers, on each of them."""
        ...

    def report(self, record: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """The record is published and the checkpoint that `write` makes is kept.

        Every worker calls it the same number of times; one of them writes.
        """
        ...

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint to continue from; None at the start of a run."""
        ...


class LocalBackend:
    """One worker, in this process: instant, for debugging and tests."""

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, device: torch.device):
        self.device = device
        self._folder = folder
        self._index = folder / "checkpoints.json"  # the checkpoints that count, oldest first

    def wrap(self, model: nn.Module) -> nn.Module:
        """See `Backend`."""
        return model

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Backend`."""
        return tensor

    def report(self, record: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """See `Backend`; the best and the latest checkpoint stay."""
        name = checkpoint_name(record["step"])
        write(self._folder / name)
        entries = [e for e in self.checkpoints() if e["name"] != name]
        entries.append({"name": name, "score": record["score"], "epoch": record["epoch"]})
        best = max(entries, key=lambda e: -math.inf if e["score"] is None else e["score"])
        kept = [e for e in entries if e is best or e is entries[-1]]
        write_whole(self._index, json.dumps(kept) + "\n")
        for entry in entries:
            if entry not in kept:
                shutil.rmtree(self._folder / entry["name"], ignore_errors=True)

    def latest_checkpoint(self) -> Path | None:
        """See `Backend`."""
        entries = self.checkpoints()
        return self._folder / entries[-1]["name"] if entries else None

    def checkpoints(self) -> list[dict[str, Any]]:
        """The kept checkpoints: name, score and epoch, oldest first."""
        return json.loads(self._index.read_text()) if self._index.exists() else []


def local_device(settings: TrainConfig) -> torch.device:
    """Where a process of its own computes: a GPU if the run has one, else the CPU.

    Raises:
        InputError: the run has a GPU and this machine has none.
    """
    if settings.gpu and not torch.cuda.is_available():
        raise InputError("train.gpu=true, but PyTorch finds no GPU here; set train.gpu=false")
    return torch.device("cuda" if settings.gpu else "cpu")


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint taken after `step` optimiser steps."""
    return f"checkpoint_{step:08d}"


def train(config: Config, folder: Path, backend: Backend, feed: Feed = collated_ahead) -> None:
    """The run in `folder` is trained to its last epoch, from its latest checkpoint if it has one.

    After every `evaluate_every` epochs, and the last, one line goes to `metrics.jsonl` and one
    checkpoint to the backend. `data_seconds` of a line is how long this worker's steps of the epoch
    waited for their batches, of its `seconds`.

    Raises:
        InputError: data or configuration are wrong.
        FloatingPointError: the loss became NaN or infinite.
    """
    settings = config.train
    if backend.device.type == "cpu":
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
    source = Source.open(config, backend.device)
    dataset, validation = source.training(), source.validation()
    torch.manual_seed(settings.seed)
    model = build_model(
        config.model, clip_width=source.store.clip_width, token_width=source.texts.width
    ).to(backend.device)
    criterion = Criterion(config.loss)
    row = GlobalBatch(np.zeros(1, np.int64), np.full(1, -1), np.zeros((1, 4)))
    sample = collate(dataset, row, rank=0, world_size=1).to(backend.device)
    freeze_untrained(model, criterion, sample)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,  # one call for all parameters, on every device
    )
    position = Position()
    if (checkpoint := backend.latest_checkpoint()) is not None:
        position = load_checkpoint(checkpoint, model, optimizer)
    log = MetricsLog(folder / METRICS_FILE, position.step) if backend.rank == 0 else None
    wrapped = backend.wrap(model)

    order = RunOrder(dataset, config, position.step)
    steps = order.steps_of_an_epoch
    share = {"rank": backend.rank, "world_size": backend.world_size, "device": backend.device}
    with (
        contextlib.closing(feed(dataset, order, **share)) as batches,
        tracking(config, folder, position.step, rank=backend.rank) as track,
    ):
        for epoch in range(position.step // steps, settings.epochs):
            started, waited = time.monotonic(), 0.0
            rate = learning_rate(settings, epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            wrapped.train()
            totals: dict[str, Tensor] = {}
            for _ in range(steps):
                seed_step(settings.seed, position.step, backend.rank)
                asked = time.monotonic()
                batch = next(batches).to(backend.device)
                waited += time.monotonic() - asked
                parts = train_step(
                    wrapped, criterion, optimizer, batch, settings.clip_norm, settings.precision
                )
                for name, value in parts.items():
                    totals[name] = totals.get(name, 0.0) + value
                position = Position(position.step + 1)
            losses = _mean_losses(totals, steps, backend)
            if not math.isfinite(losses["loss/total"]):
                raise FloatingPointError(
                    f"the loss is {losses['loss/total']} in epoch {epoch + 1}; lower "
                    f"train.learning_rate, or look for extreme values in the features"
                )
            seconds = time.monotonic() - started
            if (epoch + 1) % settings.evaluate_every and epoch + 1 < settings.epochs:
                continue
            scores = {
                name: evaluate(model, split, config, backend) for name, split in validation.items()
            }
            score = selection_score(scores, settings.select_by)
            record = {
                "epoch": epoch + 1,
                "step": position.step,
                "seconds": round(seconds, 3),
                "data_seconds": round(waited, 3),
                "learning_rate": rate,
                "train": losses,
                "validation": scores,
                "score": score,
                "samples_per_second": round(len(dataset) / seconds, 1),
            }
            if log is not None:
                log.append(record)
            track(record)
            at = position
            backend.report(record, lambda path, at=at: save_checkpoint(path, model, optimizer, at))


@dataclass(frozen=True)
class RunOrder:
    """The batches of a run from a step on, epoch after epoch; they can be iterated again."""

    dataset: Dataset
    config: Config
    step: int

    @property
    def steps_of_an_epoch(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.dataset) / self.config.train.batch_size)

    def __iter__(self) -> Iterator[GlobalBatch]:
        settings, steps = self.config.train, self.steps_of_an_epoch
        for epoch in range(self.step // steps, settings.epochs):
            batches = epoch_batches(
                self.dataset.num_clips,
                self.dataset.video,
                self.dataset.same_text,
                batch_size=settings.batch_size,
                bucket_batches=settings.bucket_batches,
                seed=settings.seed,
                epoch=epoch,
                next_row=self.config.data.compat == "reference",
            )
            yield from batches[max(0, self.step - epoch * steps) :]


def train_step(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    clip_norm: float,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> dict[str, Tensor]:
    """The parameters after one optimiser step on `batch`; returns the named losses, detached.

    With `bfloat16` the matrix products of the network are in that precision; parameters, losses and
    the step itself stay in float32.
    """
    optimizer.zero_grad(set_to_none=True)
    half = precision == "bfloat16"
    with torch.autocast(batch.inputs.clips.device.type, torch.bfloat16, enabled=half):
        outputs = model(batch.inputs)
    total, parts = criterion(outputs.float() if half else outputs, batch.targets)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return parts


def keep_freed_memory() -> None:
    """What a step frees stays with the process, for the next step to use.

    Left alone, glibc returns every large block to the system and gets it back page by page,
    cleared: a sixth of a training step on a CPU. Another C library is left as it is.
    """
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def freeze_untrained(model: nn.Module, criterion: Criterion, batch: Batch) -> None:
    """Parameters that no term of the loss depends on stay as they are, without weight decay.

    What depends on what is the same in every batch; this one may be as small as a row.
    """
    total, _ = criterion(model(batch.inputs), batch.targets)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers from here on are those of this step on this worker, whatever came before."""
    torch.manual_seed(
        int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    )


def learning_rate(settings: TrainConfig, epoch: int) -> float:
    """The rate of an epoch counted from 0: a tenth after each `drop_epoch` epochs."""
    drops = epoch // settings.drop_epoch if settings.drop_epoch else 0
    return settings.learning_rate * 0.1**drops


def evaluate(
    model: nn.Module, dataset: Dataset, config: Config, backend: Backend
) -> dict[str, float]:
    """R1 at each threshold, mIoU and mAP of a split, as fractions; the workers share its rows."""
    values = torch.zeros(len(dataset), 2, dtype=torch.float64, device=backend.device)
    rows = np.arange(backend.rank, len(dataset), backend.world_size)
    if len(rows):
        found = predict(model, dataset, rows, config.evaluate, device=backend.device)
        moments, mask = dataset.annotated[rows], dataset.moment_mask[rows]
        iou = top1_iou(found.moments[:, 0], moments, mask)
        precision = average_precision(found.moments, found.scores, moments, mask).mean(axis=1)
        own = torch.from_numpy(np.stack([iou, np.nan_to_num(precision)], axis=1))
        values[torch.from_numpy(rows).to(values.device)] = own.to(values.device)
    iou, precision = backend.sum(values).cpu().numpy().T
    recall = dict(zip(METRICS, per_query(iou).mean(axis=0).tolist(), strict=True))
    return recall | {"mAP": float(precision.mean())}


def selection_score(
    scores: Mapping[str, Mapping[str, float]], select_by: Literal["recall", "mAP"] = "recall"
) -> float | None:
    """What chooses the checkpoint, a mean over the validation splits; None without such a split.

    Of `recall` the mean of R1@0.5, R1@0.7 and mIoU, or of average precision.
    """
    if not scores:
        return None
    names = ("R1@0.5", "R1@0.7", "mIoU") if select_by == "recall" else ("mAP",)
    means = [sum(split[name] for name in names) / len(names) for split in scores.values()]
    return sum(means) / len(means)


class MetricsLog:
    """`metrics.jsonl`: one line per evaluation, none twice after a run was resumed."""

    def __init__(self, path: Path, step: int):
        self._path = path
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # whole lines alone
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_whole(path, "".join(line + "\n" for line in kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """The record is the last line."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _mean_losses(totals: dict[str, Tensor], steps: int, backend: Backend) -> dict[str, float]:
    """Epoch means over steps and workers, in one exchange."""
    stacked = backend.sum(torch.stack(list(totals.values()))) / (steps * backend.world_size)
    return dict(zip(totals, stacked.tolist(), strict=True))
