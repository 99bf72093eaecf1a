"""How fast one training step is, against the plain implementation, in one run.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --lengths real --annotations charades_cg_gpt_train.jsonl

Both sides take the same rows (`benchmarks/examples.py`), the same dropout and the same loss. Each
has a process of its own, set up as its training is (ours keeps freed memory), and they alternate,
so that a change of the machine's speed meets both. What is compared is the step on batches that are
collated and on the device; collation is measured apart, since a loader can do it meanwhile. With
`--lengths real` both go through one bucketing window of 512 rows: the plain side pads random
batches to their longest row, ours takes the batches of its sampler.

The plain side is timed for what was published: Moment-DETR and QD-DETR, and SHINE on QD-DETR.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import nn

from benchmarks import plain
from benchmarks.examples import (
    BATCH_SIZE,
    CLIP_WIDTH,
    LEVELS,
    TOKEN_WIDTH,
    Examples,
    Lengths,
    bucketed,
    examples,
    shuffled,
)
from benchmarks.measure import Stopwatch, flops, peak_memory, product_rate, seconds
from shine import engine
from shine.config import LossConfig, TrainConfig
from shine.data.batch import Batch
from shine.data.dataset import collate
from shine.errors import InputError
from shine.losses import criterion
from shine.models import BACKBONES, build_model

Method = Literal["baseline", "shine"]
Precision = Literal["float32", "bfloat16"]
SIDES = ("ours", "plain")
PARTS = ("data", "forward", "losses", "matching", "backward", "optimiser", "rest")
CONFIGS = {config.model_fields["backbone"].default: config for config in BACKBONES}
TRAIN = TrainConfig()


@dataclass(frozen=True)
class Case:
    """What is measured."""

    backbone: str
    method: Method
    precision: Precision
    lengths: Lengths
    device: str
    threads: int
    annotations: Path | None

    @property
    def published(self) -> bool:
        """Whether there is a plain side."""
        return self.backbone == "qd_detr" or (self.backbone, self.method) == (
            "moment_detr",
            "baseline",
        )

    @property
    def bfloat16(self) -> bool:
        """Whether matrix products are in half precision."""
        return self.precision == "bfloat16"


class Side(Protocol):
    """One way to train on the examples."""

    case: Case
    batches: Sequence[Any]  # the rows of each
    num_rows: int  # of all batches
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def collate(self, number: int) -> Any:
        """Batch `number` on the device."""
        ...

    def step(self, batch: Any) -> None:
        """One optimiser step."""
        ...

    def num_clips(self, batch: Any) -> int:
        """Clips that each row of a batch is padded to."""
        ...

    def watch(self, stack: ExitStack, watch: Stopwatch) -> None:
        """Until `stack` closes, losses and matching are timed."""
        ...


class Ours(Side):
    """Training with `shine`."""

    def __init__(self, case: Case, given: Examples):
        self.case, self.dataset, self.num_rows = case, given.dataset, len(given.dataset)
        self.batches = bucketed(given.dataset)
        config = CONFIGS[case.backbone]()
        width = {"clip_width": CLIP_WIDTH + 2, "token_width": TOKEN_WIDTH}
        self.model = build_model(config, **width).to(case.device).train()
        self.criterion = criterion.Criterion(_loss(case))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if case.device == "cpu":
            engine.keep_freed_memory()

    def collate(self, number: int) -> Batch:
        """See `Side`."""
        batch = collate(self.dataset, self.batches[number], rank=0, world_size=1)
        return batch.to(self.case.device)

    def step(self, batch: Batch) -> None:
        """See `Side`."""
        engine.train_step(
            self.model,
            self.criterion,
            self.optimizer,
            batch,
            TRAIN.clip_norm,
            self.case.precision,
        )

    def num_clips(self, batch: Batch) -> int:
        """See `Side`."""
        return batch.inputs.clips.shape[1]

    def watch(self, stack: ExitStack, watch: Stopwatch) -> None:
        """See `Side`."""
        watch.around(stack, criterion, "assign", "matching")
        watch.around(stack, criterion.Criterion, "__call__", "losses")


class Plain(Side):
    """Training as the published code does it."""

    def __init__(self, case: Case, given: Examples):
        self.case, self.rows, self.num_rows = case, given.rows, len(given.rows)
        self.batches = shuffled(len(given.rows))
        self.random = np.random.default_rng(0)
        options = plain.Options(video_width=CLIP_WIDTH + 2, text_width=TOKEN_WIDTH)
        network = plain.MomentDetr if case.backbone == "moment_detr" else plain.QdDetr
        self.model = network(options).to(case.device).train()
        self.criterion = plain.Criterion(
            plain.LossOptions(
                hinge=case.backbone == "moment_detr",
                negatives=case.backbone != "moment_detr",
                ranking="red" if case.method == "shine" else None,
            )
        )
        self.optimizer, _ = plain.build_optimizer(self.model, drop_epochs=150)

    def collate(self, number: int) -> tuple[dict, dict]:
        """See `Side`."""
        rows = [self.rows[row] for row in self.batches[number]]
        inputs, targets = plain.collate(rows, self.random)
        return plain.to_device(inputs, self.case.device), plain.to_device(targets, self.case.device)

    def step(self, batch: tuple[dict, dict]) -> None:
        """See `Side`."""
        plain.train_step(
            self.model, self.criterion, self.optimizer, *batch, bfloat16=self.case.bfloat16
        )

    def num_clips(self, batch: tuple[dict, dict]) -> int:
        """See `Side`."""
        return batch[0]["src_vid"].shape[1]

    def watch(self, stack: ExitStack, watch: Stopwatch) -> None:
        """See `Side`."""
        watch.around(stack, plain.HungarianMatcher, "forward", "matching")
        watch.around(stack, plain.Criterion, "forward", "losses")


def _loss(case: Case) -> LossConfig:
    """The loss of a method; Moment-DETR's own has the hinge in place of rank and negative terms."""
    values: dict[str, Any] = {}
    if case.backbone == "moment_detr" and case.method == "baseline":
        values = {"hinge_weight": 1, "rank_weight": 0, "negative_weight": 0}
    if case.method == "shine":
        values |= {
            "intra_weight": 1,
            "inter_weight": 1,
            "fine_weights": (1,) * (LEVELS + 1),
            "fine_margins": (0.25,) * (LEVELS + 1),
        }
    return LossConfig(**values)


def build(case: Case, name: str) -> Side:
    """One side of a case, freshly initialised."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    given = examples(case.lengths, case.annotations, _loss(case))
    return Ours(case, given) if name == "ours" else Plain(case, given)


@dataclass
class Opened:
    """What the process of a side holds."""

    side: Side
    blocks: list[list[Any]]  # batches that are stepped back to back

    def step(self, block: int) -> None:
        """The steps of a block."""
        for batch in self.blocks[block]:
            self.side.step(batch)


_opened: Opened | None = None


def open_side(case: Case, name: str, steps: int) -> list[int]:
    """This process holds a side that has met every shape; the number of steps of each block."""
    global _opened
    side = build(case, name)
    batches = [side.collate(number) for number in range(len(side.batches))]
    for batch in batches:
        side.step(batch)
    if torch.device(case.device).type != "cuda":
        blocks = [[batch] for batch in batches]
    else:
        blocks = [batches * steps if case.lengths == "equal" else batches]
    _opened = Opened(side, blocks)
    return [len(block) for block in blocks]


def time_block(block: int) -> float:
    """Seconds of the steps of a block of this process's side."""
    assert _opened is not None
    return seconds(torch.device(_opened.side.case.device), partial(_opened.step, block))


def describe() -> tuple[int, float, dict[str, float]]:
    """Rows and operations of all blocks of this process's side, and the parts of a step."""
    assert _opened is not None
    side, blocks = _opened.side, range(len(_opened.blocks))
    rows = side.num_rows * sum(map(len, _opened.blocks)) // len(side.batches)
    operations = sum(flops(partial(_opened.step, block)) for block in blocks)
    return rows, operations / rows, _parts(side, max(4, min(len(side.batches), 16)))


def compare(case: Case, repeats: int, steps: int) -> dict[str, Any]:
    """Every figure of a case: per side, and the ratio of the two.

    On a GPU a side takes its steps back to back. On a CPU the sides alternate after every step (and
    for every batch the median of the repeats counts), since other work on the machine comes and
    goes within seconds.

    Args:
        case: what is measured.
        repeats: alternations of the two sides over the same batches.
        steps: back to back on one batch, with equal lengths on a GPU.
    """
    device = torch.device(case.device)
    torch.set_num_threads(case.threads)
    names = [name for name in SIDES if name == "ours" or case.published]
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for name in names
        }
        blocks = {name: pools[name].submit(open_side, case, name, steps).result() for name in names}
        times = {name: np.zeros((repeats, len(blocks[name]))) for name in names}
        rates = []
        dtype = torch.bfloat16 if case.bfloat16 else torch.float32
        for repeat in range(repeats):
            rates.append(product_rate(device, dtype))
            for block in range(len(blocks["ours"])):
                for name in names[:: 1 if (repeat + block) % 2 == 0 else -1]:
                    times[name][repeat, block] = pools[name].submit(time_block, block).result()
        described = {name: pools[name].submit(describe).result() for name in names}

    found: dict[str, Any] = {"case": asdict(case), "product_rate": median(rates)}
    spent = {name: float(np.median(values, axis=0).sum()) for name, values in times.items()}
    for name, (rows, per_row, parts) in described.items():
        found[name] = {
            "samples_per_second": rows / spent[name],
            "all_samples_per_second": (rows / times[name].sum(axis=1)).tolist(),
            "flops_per_sample": per_row,
            "share_of_product_rate": per_row * rows / spent[name] / median(rates),
            "parts": parts,
            "peak_mebibytes": _memory(case, name),
        }
    if "plain" in names:
        found["ratio"] = spent["plain"] / spent["ours"]
        sums = [times[name].sum(axis=1) for name in ("plain", "ours")]
        found["all_ratios"] = (sums[0] / sums[1]).tolist()
    return found


def _parts(side: Side, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step, collation included, means of some steps."""
    watch = Stopwatch(torch.device(side.case.device))
    with ExitStack() as stack:
        watch.around(stack, side.model, "forward", "forward")
        side.watch(stack, watch)
        watch.around(stack, torch.Tensor, "backward", "backward")
        watch.around(stack, nn.utils, "clip_grad_norm_", "optimiser")
        watch.around(stack, side.optimizer, "step", "optimiser")
        for number in range(steps):
            with watch.of("data"):
                batch = side.collate(number % len(side.batches))
            with watch.of("rest"):
                side.step(batch)
    return {part: 1000 * watch.seconds[part] / steps for part in PARTS}


def _memory(case: Case, name: str) -> float | None:
    """MiB of a step, in a process of its own, since a peak is never forgotten."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(memory, case, name).result()


def memory(case: Case, name: str) -> float | None:
    """MiB that three steps on the largest batch need on top of network and batch."""
    side = build(case, name)
    batches = [side.collate(number) for number in range(len(side.batches))]
    batch = max(batches, key=side.num_clips)

    def work() -> None:
        for _ in range(3):
            side.step(batch)

    return peak_memory(torch.device(case.device), work)


def profile(case: Case, name: str, steps: int) -> str:
    """The costliest operations of a side's steps, as a table."""
    side = build(case, name)
    batch = side.collate(0)
    side.step(batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.device(case.device).type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(steps):
            side.step(batch)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=40)


def prove_no_sync(case: Case) -> str:
    """Says whether our step ever waits for the GPU; such a wait would raise."""
    if torch.device(case.device).type != "cuda":
        return "no GPU here: whether a step waits for one was not tried"
    side = build(case, "ours")
    batch = side.collate(0)
    side.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            side.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no step waits for the GPU"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The results for people."""
    head = "backbone     method   precision lengths | side  samples/s  ratio (range)      "
    head += "GFLOP/sample  of products  MiB"
    lines = [head, "-" * len(head)]
    for result in found:
        case = result["case"]
        label = (
            f"{case['backbone']:12} {case['method']:8} {case['precision']:9} {case['lengths']:7}"
        )
        for name in SIDES:
            if name not in result:
                continue
            side = result[name]
            ratio = ""
            if name == "ours" and "ratio" in result:
                low, high = min(result["all_ratios"]), max(result["all_ratios"])
                ratio = f"{result['ratio']:.2f} ({low:.2f}-{high:.2f})"
            peak = side["peak_mebibytes"]
            lines.append(
                f"{label} | {name:5} {side['samples_per_second']:9.1f}  {ratio:18} "
                f"{side['flops_per_sample'] / 1e9:12.2f}  {side['share_of_product_rate']:10.1%}  "
                f"{'-' if peak is None else round(peak)}"
            )
            label = " " * len(label)
        rate = result["product_rate"]
        lines.append(f"{label} | large {case['precision']} products: {rate / 1e9:.0f} GFLOP/s")
    lines += ["", f"{'share of a step':39} | side  " + "".join(f"{part:>11}" for part in PARTS)]
    for result in found:
        case = result["case"]
        label = (
            f"{case['backbone']:12} {case['method']:8} {case['precision']:9} {case['lengths']:7}"
        )
        for name in SIDES:
            if name in result:
                parts = result[name]["parts"]
                total = sum(parts.values())
                shares = "".join(f"{parts[part] / total:11.1%}" for part in PARTS)
                lines.append(f"{label} | {name:5} {shares}   {total:.0f} ms")
                label = " " * len(label)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--backbones", choices=CONFIGS, default=list(CONFIGS), **several)
    for name, kind in (("methods", Method), ("precisions", Precision), ("lengths", Lengths)):
        choices = get_args(kind)
        parser.add_argument(f"--{name}", choices=choices, default=list(choices), **several)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--annotations", type=Path, help="a training file of Charades-CG")
    parser.add_argument("--repeats", type=int, default=9, help="alternations of the two sides")
    parser.add_argument(
        "--steps", type=int, default=50, help="back to back on a GPU, with equal lengths"
    )
    parser.add_argument("--profile", action="store_true", help="show the costliest operations too")
    parser.add_argument("--prove-no-sync", action="store_true", help="fail where a step waits")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not gpu:
        sys.exit("--device cuda: PyTorch finds no GPU here")
    cases = [
        Case(
            backbone,
            method,
            precision,
            lengths,
            options.device,
            options.threads,
            options.annotations,
        )
        for lengths in options.lengths
        for backbone in options.backbones
        for method in options.methods
        for precision in options.precisions
    ]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    facts = {
        "machine": machine or platform.machine(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "batch_size": BATCH_SIZE,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    found = []
    try:
        for case in cases:
            print(f"{case.backbone} {case.method} {case.precision} {case.lengths} ...", flush=True)
            if options.prove_no_sync:
                print(prove_no_sync(case))
            found.append(compare(case, options.repeats, options.steps))
            for name in SIDES:
                if options.profile and name in found[-1]:
                    print(f"{name}:\n{profile(case, name, 3)}")
    except InputError as error:
        sys.exit(str(error))
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "cases": found}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
