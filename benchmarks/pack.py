"""Packing speed beside a plain loop of `np.load` and `np.save`, and what kills cost.

    python -m benchmarks.pack speed    # megabytes of raw features per second
    python -m benchmarks.pack kills    # kills of a whole job, then the store of a calm one

Features are random numbers of the shape of I3D on ActivityNet, written to a temporary folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cluster.connection import connect, prepare_environment  # noqa: TID251
from pipelines.features import pack  # noqa: TID251
from shine.config import Config
from shine.data.packing import pack_store

CLIPS, WIDTH = 120, 1024


def make(root: Path, num_videos: int) -> None:
    """`root` holds features of videos and annotations that name them."""
    (root / "features").mkdir()
    random = np.random.default_rng(0)
    block = random.standard_normal((CLIPS + num_videos, WIDTH), np.float32)
    with (root / "train.jsonl").open("w") as file:
        for number in range(num_videos):
            vid = f"v{number:05d}"
            np.save(root / "features" / f"{vid}.npy", block[number : number + CLIPS])
            row = {"qid": vid, "vid": vid, "query": "a", "duration": CLIPS}
            file.write(json.dumps({**row, "relevant_windows": [[0, 1]]}) + "\n")


def settings(root: Path, store: str) -> Config:
    """The configuration that packs `root`."""
    return Config.model_validate(
        {"data": {"root": str(root)}, "features": {"store": store, "normalize": False}}
    )


def plain(root: Path, out: Path) -> None:
    """Every file is loaded, cast and saved in a loop."""
    out.mkdir()
    for path in sorted((root / "features").iterdir()):
        np.save(out / path.name, np.load(path).astype(np.float16))


def speed(root: Path, num_videos: int, repeats: int) -> None:
    """Prints megabytes per second of each way, best and all."""
    megabytes = num_videos * CLIPS * WIDTH * 4 / 1e6
    vids = [f"v{number:05d}" for number in range(num_videos)]
    print(f"{num_videos} videos, {megabytes:.0f} MB of float32, {os.cpu_count()} CPUs")
    rates: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        rates.setdefault(name, []).append(megabytes / (time.perf_counter() - start))

    for repeat in range(repeats):
        timed("plain loop", lambda r=repeat: plain(root, root / f"plain{r}"))
        store = settings(root, f"alone{repeat}")
        timed("packing in this process", lambda s=store: pack_store(s, vids))
    import ray  # noqa: TID251

    for num_workers in (1, 2):
        ray.init(
            address="local", num_cpus=num_workers, include_dashboard=False, log_to_driver=False
        )
        pack(settings(root, f"warm{num_workers}"))
        for repeat in range(repeats):
            beats: list[tuple[float, int]] = []
            store = settings(root, f"workers{num_workers}-{repeat}")
            timed(
                f"{num_workers} workers, with their start",
                lambda s=store, b=beats: pack(s, lambda n, _: b.append((time.perf_counter(), n))),
            )
            (start, first), (end, last) = beats[0], beats[-1]
            steady = megabytes * (last - first) / num_videos / (end - start)
            rates.setdefault(f"{num_workers} workers, once they work", []).append(steady)
        ray.shutdown()
    for name, found in rates.items():
        shown = " ".join(f"{rate:.0f}" for rate in found)
        print(f"{name:<28} {max(found):6.0f} MB/s   ({shown})")


def kills(root: Path, num_videos: int, repeats: int) -> None:
    """Kills a job of its own again and again, and compares the store that it ends with."""
    pack_store(settings(root, "calm"), [f"v{number:05d}" for number in range(num_videos)])
    arguments = [sys.executable, "-m", "benchmarks.pack", "job", "--root", str(root)]
    for kill in range(repeats):
        job = subprocess.Popen(arguments, start_new_session=True)
        while not (count := len(list((root / "store").glob("building-*")))) > kill:
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        print(
            f"killed with {count} units done; manifest: {(root / 'store/manifest.json').exists()}"
        )
    start = time.perf_counter()
    subprocess.run(arguments, check=True)
    print(f"finished in {time.perf_counter() - start:.1f} s")
    calm, store = (
        {path.name: path.read_bytes() for path in (root / name).iterdir()}
        for name in ("calm", "store")
    )
    print(f"{len(store)} files, the same as those of a calm job: {calm == store}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "kills", "job"])
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    if options.what == "job":
        with connect():
            pack(settings(options.root, "store"))
        return
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.videos)
        work = speed if options.what == "speed" else kills
        work(Path(folder), options.videos, options.repeats)


if __name__ == "__main__":
    main()
