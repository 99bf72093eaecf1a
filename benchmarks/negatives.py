"""Hard negatives at scale: a server of our own with limits, faults and kills; a million captions.

    python -m benchmarks.negatives rate       # share of the ideal rate at 32 and 64 in flight
    python -m benchmarks.negatives limits     # requests and tokens per minute, and 429 seen
    python -m benchmarks.negatives storm      # 30 % of all answers are 429
    python -m benchmarks.negatives kills      # a hundred random kills, then what was paid twice
    python -m benchmarks.negatives million    # captions per second and peak memory of `corpus`

Captions are made up by the planted world's grammar, so everything runs offline.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from chat_server import serving_process  # pyright: ignore[reportMissingImports]

from shine.data import grammar

LATENCY_SECONDS = 0.2
_CAPTIONS_PER_VIDEO = 5


def captions(num: int, seed: int = 0) -> Iterator[str]:
    """Distinct sentences of the grammar, about nine words long."""
    rng = random.Random(seed)
    seen: set[int] = set()
    while len(seen) < num:
        verb = rng.choice([*grammar.VERBS])
        action = grammar.Action(
            verb,
            rng.choice(grammar.afforded(verb)),
            rng.choice((*grammar.ADJECTIVES, None)),
            rng.choice(grammar.PREPOSITIONS),
            rng.choice(grammar.PLACES),
            rng.choice((*grammar.ADVERBS, None)),
        )
        articles = (rng.choice(grammar.ARTICLES), rng.choice(grammar.ARTICLES))
        wording = grammar.Wording(
            rng.choice(grammar.NEUTRAL_SUBJECTS),
            rng.choice(grammar.FORMS),
            articles,
            rng.random() < 0.5,
        )
        text = grammar.sentence(action, wording)
        if (key := hash(text)) not in seen:
            seen.add(key)
            yield text


def write_annotations(path: Path, num: int) -> None:
    """`num` captions, five to a video, stand in `path`."""
    with path.open("w") as file:
        for i, query in enumerate(captions(num)):
            record = {
                "qid": i,
                "vid": f"v{i // _CAPTIONS_PER_VIDEO}",
                "query": query,
                "duration": 30,
                "relevant_windows": [[0, 10]],
            }
            file.write(json.dumps(record) + "\n")


def command(folder: Path, base_url: str, **llm: Any) -> list[str]:
    """The command line that makes negatives of `train.jsonl` in `folder`."""
    values = {"base_url": base_url, "model": "test", "segment_seconds": 1, **llm}
    return [
        *(sys.executable, "-c", "from pipelines.cli import main; main()"),
        *("negatives", "generate", "--json"),
        *(f"data.root={folder}", "data.negatives=negatives.parquet"),
        "negatives.generator=llm" if base_url else "negatives.generator=corpus",
        *(f"negatives.llm.{name}={value}" for name, value in values.items() if base_url),
    ]


@contextmanager
def prepared(num: int) -> Iterator[Path]:
    """A folder with `num` captions."""
    with tempfile.TemporaryDirectory() as folder:
        write_annotations(Path(folder) / "train.jsonl", num)
        yield Path(folder)


def run(arguments: list[str]) -> dict[str, Any]:
    """The result of a command line, which must succeed."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def rate(num: int) -> None:
    """The share of in_flight / latency that is reached while asking, steady state and whole."""
    for in_flight in (32, 64):
        with prepared(num) as folder, serving_process(1800, latency=LATENCY_SECONDS) as server:
            result = run(command(folder, server.base_url, in_flight=in_flight))
            stats = server.stats()
        ideal = in_flight / LATENCY_SECONDS
        reached = stats["answered"] / stats["seconds"]
        print(
            f"{in_flight} in flight: {reached:.0f} of {ideal:.0f} requests/s "
            f"({100 * reached / ideal:.0f} %), {stats['answered']} requests, at most "
            f"{stats['max_in_flight']} in flight, sources {result['sources']}"
        )


def limits(num: int) -> None:
    """The rate under a limit of the server that the configuration knows, and 429 seen."""
    for name, limit in (("requests_per_minute", 600), ("tokens_per_minute", 300_000)):
        with (
            prepared(num) as folder,
            serving_process(1800, latency=LATENCY_SECONDS, **{name: limit}) as server,
        ):
            run(command(folder, server.base_url, **{name: limit}))
            stats = server.stats()
        amount = stats["answered"] if name.startswith("requests") else stats["tokens"]
        share = amount / stats["seconds"] * 60 / limit
        print(f"{name}={limit}: {100 * share:.1f} % of the limit, {stats['limited']} times 429")


def storm(num: int) -> None:
    """What comes of a job of whose answers 30 % are 429."""
    for fault in ("429", "429_seconds"):
        with (
            prepared(num) as folder,
            serving_process(1800, latency=LATENCY_SECONDS, faults={fault: 0.3}) as server,
        ):
            result = run(command(folder, server.base_url))
            stats = server.stats()
        rows = result["sources"].get("llm", 0) / result["levels"]
        print(
            f"{fault}: {result['rows']} rows in the end, {100 * rows / result['rows']:.1f} % of "
            f"their levels by the model, {stats['received']} requests, {stats['answered']} answers"
        )


@dataclass(frozen=True, slots=True)
class Killed:
    """What is left of a job that was killed again and again."""

    rows: int
    from_model: int  # levels that a language model filled
    paid: int
    paid_again: int
    bound: int


def kills(num: int, times: int, latency: float = LATENCY_SECONDS) -> Killed:
    """A job killed again and again at random moments, driver and workers at once."""
    rng = random.Random(0)
    in_flight, segment = 16, 8
    llm = {"in_flight": in_flight, "segment_answers": segment}
    with prepared(num) as folder, serving_process(7200, latency=latency) as server:
        for _ in range(times):
            job = subprocess.Popen(
                command(folder, server.base_url, **llm),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            before = server.stats()["received"]
            while server.stats()["received"] == before and job.poll() is None:
                time.sleep(0.05)  # kills before the first request cost nothing and prove little
            time.sleep(rng.uniform(0, rng.choice((1.0, 6.0))))  # most while asking, some later
            kill_all(job)
        result = run(command(folder, server.base_url, **llm))
        billed = server.stats()["billed_by_key"].values()
    at_work = 4  # tables that a worker of Ray Data asks at a time
    return Killed(
        rows=result["rows"],
        from_model=result["sources"].get("llm", 0),
        paid=sum(billed),
        paid_again=sum(billed) - len(billed),
        bound=times * (in_flight + at_work * (segment - 1)),
    )


def kill_all(job: "subprocess.Popen[bytes]") -> None:
    """Every process that the job started is gone, without a word of farewell."""
    try:
        family = psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def million(num: int) -> None:
    """Captions per second through `corpus`, and the most memory that its processes held."""
    with prepared(num) as folder:
        started = time.monotonic()
        job = subprocess.Popen(command(folder, ""), stdout=subprocess.PIPE, text=True)
        watch = Memory(job.pid)
        out, _ = job.communicate()
        seconds = time.monotonic() - started
        watch.stop()
    result = json.loads(out.splitlines()[-1])
    print(
        f"{result['rows']} captions in {seconds:.0f} s: {result['rows'] / seconds:.0f} per second; "
        f"peak of the driver {watch.driver / 2**20:.0f} MiB, of all processes together "
        f"{watch.everything / 2**20:.0f} MiB (shared pages counted once)"
    )


class Memory:
    """The most memory that a process and its children have held, looked at twice a second."""

    def __init__(self, pid: int):
        self.driver = 0
        self.everything = 0
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more is looked at."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                sizes = [process.memory_full_info().pss for process in family]
            except psutil.Error:
                continue
            self.driver = max(self.driver, sizes[0])
            self.everything = max(self.everything, sum(sizes))


def main() -> None:
    """Runs one measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rate", "limits", "storm", "kills", "million"])
    parser.add_argument("--captions", type=int)
    parser.add_argument("--times", type=int, default=100, help="kills")
    options = parser.parse_args()
    if options.what == "rate":
        rate(options.captions or 4000)
    elif options.what == "limits":
        limits(options.captions or 1500)
    elif options.what == "storm":
        storm(options.captions or 2000)
    elif options.what == "kills":
        print(kills(options.captions or 3000, options.times, latency=1.0))  # most fall while asking
    else:
        million(options.captions or 1_000_000)


if __name__ == "__main__":
    main()
