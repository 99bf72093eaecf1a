"""Features on their way into a training: rows per second, memory, and how long steps wait.

    python -m benchmarks.ingest

Each way to feed a training beside the loader of the reference programs, which opens one npz per row
with `np.load`, on a made-up data set with the sizes of Charades-CG. Every way runs in a process of
its own: first as fast as batches can be taken, then with a training step of the default model after
each (on one batch made before, so that the steps of all ways are the same work). Memory is the
proportional set size of all its processes before the steps, sampled, and of it what no file backs.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any, Final

import numpy as np
import psutil
import torch
from torch import Tensor

from shine.config import Config, load_config
from shine.data.annotations import read_annotations, write_jsonl
from shine.data.batch import Batch
from shine.data.dataset import Dataset, collate
from shine.data.feeding import Feed, collated_ahead
from shine.data.loading import Source
from shine.data.sampler import GlobalBatch
from shine.engine import RunOrder, keep_freed_memory, train_step
from shine.losses.criterion import Criterion
from shine.models import build_model

ROWS, CLIPS, CLIP_SECONDS, SENTENCES = 8281, 62, 0.5, 1000
BATCH_SIZE = 32
CPU = torch.device("cpu")
WAYS: Final = (
    "np.load",
    "np.load, 2 loaders",
    "mapped, no thread",
    "mapped",
    "resident",
    "streamed, files",
    "streamed, S3",
    "streamed by Ray, files",
    "streamed by Ray, S3",
)


def make(root: Path, videos: int, width: int, seed: int = 0) -> None:
    """Annotations, raw features (npz) and the packed store of a made-up data set."""
    from shine.data.packing import pack_store

    random = np.random.default_rng(seed)
    words = [f"word{number}" for number in range(800)]
    sentences = [" ".join(random.choice(words, 6)) for _ in range(SENTENCES)]
    (root / "features").mkdir()
    for number in range(videos):
        clips = random.standard_normal((CLIPS, width), np.float32).astype(np.float16)
        np.savez(root / "features" / f"v{number}.npz", features=clips)
    rows = []
    for number, video in enumerate(random.integers(0, videos, ROWS).tolist()):
        start = float(random.uniform(0, 22))
        query, *negatives = random.choice(sentences, 4, replace=False).tolist()
        rows.append(
            {
                "qid": f"q{number}",
                "vid": f"v{video}",
                "query": query,
                "duration": CLIPS * CLIP_SECONDS,
                "relevant_windows": [[start, start + 8]],
                "recomposed_queries": negatives,
            }
        )
    write_jsonl(root / "train.jsonl", rows)
    pack_store(configured(root), [f"v{number}" for number in range(videos)])


def configured(root: Path, *overrides: str) -> Config:
    """SHINE on QD-DETR, as published on Charades-CG, over the made-up data set."""
    return load_config(
        None,
        [
            f"data.root={root}",
            f"features.clip_seconds={CLIP_SECONDS}",
            "text.width=512",
            "loss.intra_weight=1",
            "loss.inter_weight=1",
            "loss.fine_weights=[1, 1, 1, 1]",
            "loss.fine_margins=[0.25, 0.25, 0.25, 0.25]",
            f"train.batch_size={BATCH_SIZE}",
            "train.epochs=100",
            *overrides,
        ],
    )


class PerSample(torch.utils.data.Dataset):
    """What the reference programs do for a row: its file is opened, read and normalised."""

    def __init__(self, root: Path):
        self.folder = root / "features"
        self.vids = [row.vid for row in read_annotations(root / "train.jsonl")]

    def __len__(self) -> int:
        return len(self.vids)

    def __getitem__(self, row: int) -> Tensor:
        clips = np.load(self.folder / f"{self.vids[row]}.npz")["features"].astype(np.float32)
        clips = clips / (np.linalg.norm(clips, axis=-1, keepdims=True) + 1e-5)
        start = torch.arange(0, len(clips), 1.0) / len(clips)
        ends = torch.stack([start, start + 1.0 / len(clips)], dim=1)
        return torch.cat([torch.from_numpy(clips), ends], dim=1)


def pad(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Samples as a batch with its mask."""
    padded = torch.zeros(len(samples), max(map(len, samples)), samples[0].shape[1])
    mask = torch.zeros(padded.shape[:2])
    for index, sample in enumerate(samples):
        padded[index, : len(sample)] = sample
        mask[index, : len(sample)] = 1
    return padded, mask


def per_sample(root: Path, loaders: int) -> Iterator[Any]:
    """The batches of the reference programs, epoch after epoch."""
    loader = torch.utils.data.DataLoader(
        PerSample(root), BATCH_SIZE, shuffle=True, num_workers=loaders, collate_fn=pad
    )
    while True:
        yield from loader


def in_the_step(
    dataset: Dataset,
    batches: Iterable[GlobalBatch],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Generator[Batch]:
    """See `Feed`: each batch is made when it is asked for."""
    for batch in batches:
        yield collate(dataset, batch, rank=rank, world_size=world_size).bound_for(device)


def one(way: str, root: Path, store: str, seconds: float, steps: int) -> Iterator[dict[str, float]]:
    """What is taken in so many seconds as fast as it comes; then how long `steps` wait."""
    torch.set_num_threads(1)
    keep_freed_memory()
    kind = way.split()[0].strip(",")
    began = time.monotonic()
    with ExitStack() as stack:
        if way.startswith("np.load"):
            fed: Iterator[Any] = per_sample(root, 2 if "loaders" in way else 0)
        else:
            config = configured(root, f"features.feed={kind}", f"features.store={store}")
            source = Source.open(config, CPU)
            dataset = source.training()
            feed: Feed = in_the_step if "no thread" in way else collated_ahead
            if "Ray" in way:
                from cluster.connection import connect  # noqa: TID251
                from pipelines.feeding import StreamedFeed  # noqa: TID251

                stack.enter_context(connect(min_cpus=2))
                feed = StreamedFeed(store)
            order = RunOrder(dataset, config, 0)
            fed = stack.enter_context(
                closing(feed(dataset, order, rank=0, world_size=1, device=CPU))
            )
        next(fed)
        started, rows, taken = time.monotonic(), 0, 0.0
        while taken < seconds:
            rows += _rows(next(fed))
            taken = time.monotonic() - started
        yield {"first_batch_seconds": started - began, "rows_per_second": rows / taken}
        step = _step(root)
        waited = spent = 0.0
        for _ in range(steps):
            asked = time.monotonic()
            next(fed)
            came = time.monotonic()
            step()
            waited += came - asked
            spent += time.monotonic() - asked
        yield {"step_seconds": (spent - waited) / steps, "waiting_share": waited / spent}


def _rows(batch: Any) -> int:
    return len(batch[0]) if isinstance(batch, tuple) else len(batch.inputs.video)


def _step(root: Path) -> Callable[[], object]:
    """A training step on a batch made before."""
    config = configured(root)
    source = Source.open(config)
    dataset = source.training()
    model = build_model(
        config.model, clip_width=source.store.clip_width, token_width=source.texts.width
    ).train()
    criterion = Criterion(config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = collate(dataset, next(iter(RunOrder(dataset, config, 0))), rank=0, world_size=1)
    return lambda: train_step(model, criterion, optimizer, batch, config.train.clip_norm)


class Memory:
    """The largest memory of a process and its children, sampled while this is entered."""

    def __init__(self, pid: int):
        self.peak = self.peak_anonymous = 0  # bytes
        self._root = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            try:
                pids = [self._root.pid, *(p.pid for p in self._root.children(recursive=True))]
            except psutil.Error:
                return
            found = [_set_size(pid) for pid in pids]
            self.peak = max(self.peak, sum(whole for whole, _ in found))
            self.peak_anonymous = max(self.peak_anonymous, sum(part for _, part in found))


def _set_size(pid: int) -> tuple[int, int]:
    """Bytes of a process's proportional set size, and of it what no file backs."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {
        name: int(value.split()[0]) for name, _, value in (x.partition(":") for x in lines[1:])
    }
    return 1024 * sizes["Pss"], 1024 * (sizes["Pss_Anon"] + sizes["SwapPss"])


def measure(way: str, root: Path, store: str, seconds: float, steps: int) -> dict[str, Any]:
    """The figures of one way, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--one", way, "--root", str(root)]
    command += ["--store", store, "--seconds", str(seconds), "--steps", str(steps)]
    with Popen(command, stdout=PIPE, text=True) as process, Memory(process.pid) as memory:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline() or "{}")
        peak, anonymous = memory.peak, memory.peak_anonymous  # before the steps, which need more
        found |= json.loads(process.stdout.readline() or "{}")
    if process.returncode:
        raise RuntimeError(f"{way} failed with exit status {process.returncode}")
    return found | {"peak_mib": peak / 2**20, "peak_anon_mib": anonymous / 2**20}


def serve() -> tuple[Popen, str]:
    """An S3 server in a process of its own, and its address."""
    process = Popen([sys.executable, "-c", _SERVER], stdout=PIPE, stderr=DEVNULL, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


_SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
print(f"http://{host}:{port}", flush=True)
time.sleep(10**6)
"""


def uploaded(store: Path, stack: ExitStack) -> str:
    """A URL on an S3 server of this machine, that lasts as long as `stack`, with the store."""
    from shine.storage import Storage

    server, address = serve()
    stack.callback(server.wait)
    stack.callback(server.kill)
    os.environ.update(
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",  # noqa: S105
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=address,
    )
    import fsspec

    fsspec.filesystem("s3").mkdir("features")
    there = Storage("s3://features/store", "")
    for path in sorted(store.iterdir()):
        there.write(path.name, path)
    return there.shown


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = ("way", "rows/s", "times np.load", "first batch, s", "wait of a step, ms", "step, s")
    head += ("waiting share", "peak memory, MiB", "of it anonymous")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    base = found.get("np.load", {}).get("rows_per_second")
    for way, figures in found.items():
        share, step = figures["waiting_share"], figures["step_seconds"]
        cells = (
            way,
            f"{figures['rows_per_second']:.0f}",
            f"{figures['rows_per_second'] / base:.2f}" if base else "",
            f"{figures['first_batch_seconds']:.1f}",
            f"{1000 * step * share / (1 - share):.1f}",
            f"{step:.1f}",
            f"{share:.2%}",
            f"{figures['peak_mib']:.0f}",
            f"{figures['peak_anon_mib']:.0f}",
        )
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: Iterable[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--videos", type=int, default=3600)
    parser.add_argument("--width", type=int, default=1024, help="columns of a clip")
    parser.add_argument("--seconds", type=float, default=10, help="of taking batches as they come")
    parser.add_argument("--steps", type=int, default=20, help="that train")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args(None if arguments is None else [*arguments])
    if options.one:
        given = options.root, options.store, options.seconds, options.steps
        for figures in one(options.one, *given):
            print(json.dumps(figures), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        make(root, options.videos, options.width)
        store = root / "store"
        there = uploaded(store, stack) if any("S3" in way for way in options.ways) else ""
        print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", flush=True)
        found = {}
        for way in options.ways:
            where = there if "S3" in way else str(store)
            found[way] = measure(way, root, where, options.seconds, options.steps)
            print(f"{way}: {found[way]}; load {os.getloadavg()[0]:.1f}", flush=True)
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
