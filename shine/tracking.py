"""Curves of a run for the tools people watch them in; `metrics.jsonl` stays the record.

TensorBoard is a file of the run folder, written as `metrics.jsonl` is. MLflow and W&B are services:
their own environment variables say where they are and with which key, a thread of its own speaks to
each, and what goes wrong there is told once while the training goes on.
"""

import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from shine.config import Config, TrackingConfig
from shine.errors import InputError
from shine.files import write_whole
from shine.runs import flattened

logger = logging.getLogger(__name__)

EVENTS_FOLDER = "tensorboard"
IDS_FOLDER = "tracking"  # the names of this run at the services, by which it is continued
_PATIENCE_SECONDS = 30.0  # at the end of a run, for what a service has not taken yet
_MLFLOW_BATCH = 100  # parameters of one request
_MLFLOW_VALUE = 500  # characters of a parameter
Track = Callable[[Mapping[str, Any]], None]  # one line of metrics.jsonl


class Tracker(Protocol):
    """A tool that shows curves."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """The curves have a further point."""
        ...

    def close(self, finished: bool) -> None:
        """Nothing more comes; the run was trained to its end, or stopped."""
        ...


def check_trackers(settings: TrackingConfig) -> None:
    """The packages of the configured services are installed.

    Raises:
        InputError: one is not.
    """
    for name in ("mlflow", "wandb"):
        if getattr(settings, name) is not None and find_spec(name) is None:
            raise InputError(
                f"tracking.{name}={getattr(settings, name)} needs the package {name}, which is not "
                f"installed; pip install {name}, or set tracking.{name}=null"
            )


@contextmanager
def tracking(config: Config, folder: Path, step: int, *, rank: int) -> Iterator[Track]:
    """Inside, each record handed over is a point of every curve of the configured trackers.

    Args:
        config: of the run.
        folder: of the run.
        step: from which the run goes on; what trackers have of later ones is of no account.
        rank: of this worker; those other than 0 track nothing.
    """
    settings, trackers = config.tracking, list[Tracker]()
    if rank == 0 and settings.tensorboard:
        trackers.append(_Guarded("TensorBoard", lambda: TensorBoard(folder, step)))
    if rank == 0 and (experiment := settings.mlflow) is not None:
        trackers.append(Sender("MLflow", lambda: MLflow(experiment, config, folder)))
    if rank == 0 and (project := settings.wandb) is not None:
        trackers.append(Sender("W&B", lambda: WandB(project, config, folder)))

    def track(record: Mapping[str, Any]) -> None:
        values = curves(record)
        for tracker in trackers:
            tracker.add(record["step"], values)

    with ExitStack() as ends:
        for tracker in trackers:
            ends.push(lambda kind, error, trace, t=tracker: t.close(finished=kind is None))
        yield track


def curves(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a line of `metrics.jsonl`, by its place in it: `train/loss/total`."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= curves(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "step":
            found[prefix + name] = float(value)
    return found


class TensorBoard:
    """Event files in the folder `tensorboard` of a run.

    A run that goes on writes a further file, which begins by voiding what earlier ones hold of the
    steps that are repeated.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        (folder / EVENTS_FOLDER).mkdir(exist_ok=True)
        prefix = str(folder / EVENTS_FOLDER / "events")
        self._event: Any = event_pb2  # generated, so that no type checker knows what it holds
        self._writer = EventsWriter(prefix, filename_suffix=f".{step:08d}.{uuid.uuid4().hex[:6]}")
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(step + 1, session_log=start)
        self._writer.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; the point is in the file when this returns."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(_plain(name), value))
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event.Event(wall_time=time.time(), step=step, **content))


class MLflow:
    """A run of an MLflow experiment; `MLFLOW_TRACKING_URI` and its like say where."""

    def __init__(self, experiment: str, config: Config, folder: Path):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._client = mlflow.MlflowClient()
        self._run = _read_id(folder, "mlflow")
        self._last = -1  # step that the server has
        if self._run is not None:
            self._client.update_run(self._run, status="RUNNING")
            history = self._client.get_metric_history(self._run, "epoch")
            self._last = max((metric.step for metric in history), default=-1)
            return
        known = self._client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run = self._client.create_run(place, run_name=folder.name).info.run_id
        _write_id(folder, "mlflow", self._run)
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        settings = [
            Param(_plain(name), str(value)[:_MLFLOW_VALUE])
            for name, value in flattened(config.model_dump(mode="json")).items()
        ]
        for start in range(0, len(settings), _MLFLOW_BATCH):
            self._client.log_batch(self._run, params=settings[start : start + _MLFLOW_BATCH])

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; a step that the server has already is not sent again."""
        if step <= self._last:
            return
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        points = [Metric(_plain(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=points)
        self._last = step

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run, status="FINISHED" if finished else "KILLED")


class WandB:
    """A run of a W&B project; `WANDB_API_KEY`, `WANDB_MODE` and their like say how."""

    def __init__(self, project: str, config: Config, folder: Path):
        import wandb  # pyright: ignore[reportMissingImports]

        name = _read_id(folder, "wandb")
        if name is None:
            name = uuid.uuid4().hex[:12]
            _write_id(folder, "wandb", name)
        self._run = wandb.init(
            project=project,
            id=name,
            name=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            resume="allow",
            settings=wandb.Settings(console="off"),  # our progress is not for its log
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; the library itself leaves out steps that it has already."""
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)


class _Guarded:
    """A tracker whose first failure is told and its last."""

    def __init__(self, title: str, connect: Callable[[], Tracker]):
        self._title = title
        self._tracker: Tracker | None = None
        with self._told():
            self._tracker = connect()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        with self._told():
            if self._tracker is not None:
                self._tracker.add(step, values)

    def close(self, finished: bool) -> None:
        with self._told():
            if self._tracker is not None:
                self._tracker.close(finished)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            logger.warning(
                "%s shows no more of this run, which goes on: %s", self._title, _reason(error)
            )


class Sender:
    """Hands points to a service from a thread of its own: a step never waits for it.

    What a service does not take is offered again with the next point; the first failure is told.
    """

    def __init__(self, title: str, connect: Callable[[], Tracker], patience: float | None = None):
        self._title = title
        self._connect = connect
        self._patience = _PATIENCE_SECONDS if patience is None else patience
        self._points: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None]
        self._points = queue.SimpleQueue()
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._finished = self._told = False
        self._thread = threading.Thread(target=self._send, name=title, daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; returns at once."""
        self._points.put((step, values))

    def close(self, finished: bool) -> None:
        """See `Tracker`; the service has some seconds for what it has not taken yet."""
        self._finished = finished
        self._points.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive() or self._waiting:
            logger.warning(
                "%s has not taken all points of this run; metrics.jsonl has them", self._title
            )

    def _send(self) -> None:
        tracker: Tracker | None = None
        more = True
        while more:
            point = self._points.get()
            if point is None:
                more = False
            else:
                self._waiting.append(point)
            try:
                tracker = tracker or self._connect()
                while self._waiting:
                    tracker.add(*self._waiting[0])
                    self._waiting.pop(0)
                if not more:
                    tracker.close(self._finished)
            except Exception as error:
                if not self._told:
                    self._told = True
                    logger.warning(
                        "%s does not answer; the training goes on and its points are offered "
                        "again: %s",
                        self._title,
                        _reason(error),
                    )


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-./]", "_", name)  # R1@0.5 is no name for MLflow, nor for TensorBoard


def _read_id(folder: Path, tracker: str) -> str | None:
    path = folder / IDS_FOLDER / f"{tracker}.txt"
    return path.read_text().strip() if path.exists() else None


def _write_id(folder: Path, tracker: str, name: str) -> None:
    (folder / IDS_FOLDER).mkdir(exist_ok=True)
    write_whole(folder / IDS_FOLDER / f"{tracker}.txt", name + "\n")


def _reason(error: Exception) -> str:
    """One line, without the password of a URL."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"//[^/\s]*@", "//...@", text)[:300]
