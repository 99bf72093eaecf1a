"""Run folders as data, whatever state they are in: what was asked for, how far it came, its curves.

Reads files alone, so that a listing starts at once and never disturbs a training.
"""

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml

from shine.errors import InputError

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
_TRAINS = "it is written by `shine train`"
_STATES = ("running", "finished", "imported")
_LINE = {"epoch", "seconds", "train", "validation", "score", "samples_per_second"}
_SILENT_LINES = 5  # times the usual pause between two lines, after which a run counts as stopped,
_SILENT_SECONDS = 600.0  # but not sooner than this,
_SILENT_START_SECONDS = 3600.0  # nor than this before the first line


@dataclass(frozen=True)
class Run:
    """What the files of a run say."""

    folder: Path
    state: Mapping[str, Any]  # run.json
    config: str  # config.yaml
    settings: Mapping[str, Any]  # its values, section by section
    environment: Mapping[str, Any]  # environment.json; empty for an imported run
    history: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl; none for an imported run
    written: float  # when the folder last changed, in seconds since 1970

    @property
    def name(self) -> str:
        """Of the folder when the run began."""
        return self.state["name"]

    @property
    def status(self) -> str:
        """What `run.json` says: `running` (or stopped meanwhile), `finished` or `imported`."""
        return self.state["status"]

    @property
    def epochs(self) -> int:
        """Those done as far as a line tells; of an imported run, those of its checkpoint."""
        if self.history:
            return self.history[-1]["epoch"]
        return self.state.get("best_epoch") or 0

    @property
    def best_epoch(self) -> int | None:
        """Of the checkpoint that counts; of an unfinished run, of the best line so far."""
        if self.state.get("best_epoch") is not None:
            return self.state["best_epoch"]
        scored = [line for line in self.history if line["score"] is not None]
        return max(scored, key=lambda line: line["score"])["epoch"] if scored else None

    @property
    def score(self) -> float | None:
        """Of the best epoch on the validation splits; None without such a split."""
        if self.status == "running":
            return max(
                (s for line in self.history if (s := line["score"]) is not None), default=None
            )
        return self.state.get("score")

    @property
    def samples_per_second(self) -> float | None:
        """The median over the epochs that have a line."""
        rates = [line["samples_per_second"] for line in self.history]
        return float(statistics.median(rates)) if rates else None

    @property
    def patience_seconds(self) -> float:
        """How long a run that goes on may be silent."""
        if not self.history:
            return _SILENT_START_SECONDS
        pause = statistics.median(line["seconds"] for line in self.history)
        pause *= self.settings["train"].get("evaluate_every", 1)
        return float(max(_SILENT_SECONDS, _SILENT_LINES * pause))


class Summary(TypedDict):
    """A run in one line."""

    folder: str
    name: str
    state: str  # running, stopped, finished or imported
    epochs: int
    epochs_of: int | None  # None: not trained here
    score: float | None
    best_epoch: int | None
    selection: str
    seed: int | None
    backbone: str
    samples_per_second: float | None
    written: str  # local time, to the second
    silent_seconds: int


def summarize(run: Run, now: float) -> Summary:
    """The run in one line.

    Whether the process of an unfinished run still lives is not known here: it counts as stopped
    when it has been silent for much longer than its epochs take.

    Args:
        run: as `read_run_folder` gives it.
        now: seconds since 1970.
    """
    silent = max(0.0, now - run.written)
    status = run.status
    if status == "running" and silent > run.patience_seconds:
        status = "stopped"
    imported = status == "imported"
    train = run.settings["train"]
    chosen = "validation" if run.settings.get("data", {}).get("validation") else "the last epoch"
    return {
        "folder": str(run.folder),
        "name": run.name,
        "state": status,
        "epochs": run.epochs,
        "epochs_of": None if imported else train["epochs"],
        "score": run.score,
        "best_epoch": run.best_epoch,
        "selection": run.state.get("selection", chosen),
        "seed": None if imported else train["seed"],
        "backbone": run.settings["model"]["backbone"],
        "samples_per_second": run.samples_per_second,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(run.written)),
        "silent_seconds": round(silent),
    }


def list_runs(folders: Sequence[Path], now: float) -> dict[str, Any]:
    """The runs under `folders`, the latest first, and the run folders that cannot be read.

    Args:
        folders: each is a run, or is searched for runs at any depth.
        now: seconds since 1970.

    Returns:
        `runs`: their summaries; `broken`: `folder` and `reason` of each that has none.

    Raises:
        InputError: a folder does not exist.
    """
    runs: list[Summary] = []
    broken: list[dict[str, str]] = []
    for folder in dict.fromkeys(found for top in folders for found in find_runs(top)):
        try:
            runs.append(summarize(read_run_folder(folder), now))
        except InputError as error:
            broken.append({"folder": str(folder), "reason": str(error)})
    runs.sort(key=lambda run: (run["silent_seconds"], run["folder"]))
    return {"runs": runs, "broken": broken}


def find_runs(top: Path) -> Iterator[Path]:
    """The run folders at `top` and under it; what lies inside a run is not searched.

    Raises:
        InputError: `top` is no folder.
    """
    if not top.is_dir():
        raise InputError(f"{top}: no such folder; name a run, or a folder that holds runs")
    for folder, inner, files in os.walk(top):
        if RUN_FILE in files:
            inner.clear()
            yield Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def read_run_folder(folder: Path) -> Run:
    """What the files of `folder` say; one that is being written is read up to its last whole line.

    Raises:
        InputError: it is not a run, or one of its files is damaged.
    """
    state = read_json(folder / RUN_FILE, f"train it with `shine train --out {folder}`")
    config = read_text(folder / CONFIG_FILE, _TRAINS)
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("name"), str)
        or state.get("status") not in _STATES
    ):
        raise InputError(
            f"{folder / RUN_FILE}: expected the name and the status ({', '.join(_STATES)}) of a "
            f"run, got {json.dumps(state)[:100]}; {_TRAINS}"
        )
    settings = _settings(config, folder / CONFIG_FILE)
    environment, history = {}, []
    if state["status"] != "imported":
        environment = read_json(folder / ENVIRONMENT_FILE, _TRAINS)
        if not isinstance(environment, dict):
            raise InputError(f"{folder / ENVIRONMENT_FILE}: expected a JSON object; {_TRAINS}")
        metrics = folder / METRICS_FILE
        lines = read_text(metrics, _TRAINS).split("\n")[:-1] if metrics.exists() else []
        history = [parse_json(line, metrics) for line in lines if line.strip()]
        if not all(isinstance(line, dict) and line.keys() >= _LINE for line in history):
            raise InputError(f"{metrics}: expected lines with {sorted(_LINE)}; {_TRAINS}")
        if state["status"] == "finished" and not history:
            raise InputError(f"{metrics}: expected the curves of a finished run; {_TRAINS}")
    known = (RUN_FILE, METRICS_FILE, ENVIRONMENT_FILE)
    written = max((folder / name).stat().st_mtime for name in known if (folder / name).exists())
    return Run(folder, state, config, settings, environment, history, written)


def _settings(config: str, path: Path) -> dict[str, Any]:
    """The values of `config.yaml`, of this version or an earlier one."""
    try:
        read = yaml.safe_load(config)
    except yaml.YAMLError:
        read = None
    values = read if isinstance(read, dict) else {}
    for section, key in (("train", "epochs"), ("train", "seed"), ("model", "backbone")):
        part = values.get(section)
        if not isinstance(part, dict) or key not in part:
            raise InputError(f"{path}: expected a configuration with {section}.{key}; {_TRAINS}")
    return values


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The innermost values by their dotted keys, as overrides name them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_json(path: Path, remedy: str) -> Any:
    """The JSON of a file of a run.

    Raises:
        InputError: there is none; the sentence ends with `remedy`.
    """
    return parse_json(read_text(path, remedy), path)


def read_text(path: Path, remedy: str) -> str:
    """The text of a file of a run.

    Raises:
        InputError: there is none; the sentence ends with `remedy`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: expected a file of a run; {remedy}") from None


def parse_json(text: str, path: Path) -> Any:
    """The value that `text`, of the file `path`, says.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {error}") from None
