"""Ray Train around `shine.engine`: the same run on any number of workers."""

import hashlib
import json
import logging
import platform
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.connection import connect
from cluster.size import check_workers, training_cpus
from pipelines.feeding import StreamedFeed
from shine.config import Config, FeaturesConfig, TrackingConfig, load_config
from shine.data.feeding import collated_ahead
from shine.data.loading import Source, check_files
from shine.data.sources import located
from shine.data.store import MANIFEST, open_storage
from shine.data.text_store import encoder_checksum
from shine.engine import METRICS_FILE, LocalBackend, checkpoint_name, local_device, train
from shine.errors import InputError
from shine.files import sha256, write_whole
from shine.runs import CONFIG_FILE, ENVIRONMENT_FILE, RUN_FILE
from shine.tracking import check_trackers

logger = logging.getLogger(__name__)

OnRecord = Callable[[Mapping[str, Any]], None]  # one line of metrics.jsonl
_PACKAGES = ("torch", "ray", "numpy", "spacy", "pyarrow", "safetensors")


class RayBackend:
    """One worker of a Ray Train run."""

    def __init__(self) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()

    def wrap(self, model: nn.Module) -> nn.Module:
        """See `shine.engine.Backend`."""
        if self.world_size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    def sum(self, tensor: Tensor) -> Tensor:
        """See `shine.engine.Backend`."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def report(self, record: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """See `shine.engine.Backend`."""
        import ray.train

        metrics = {"step": record["step"], "epoch": record["epoch"], "score": record["score"]}
        name = checkpoint_name(record["step"])
        if self.rank:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)

    def latest_checkpoint(self) -> Path | None:
        """See `shine.engine.Backend`."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.path)


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    config = Config.model_validate(settings["config"])
    feed = StreamedFeed(located(config).store) if _streams(config) else collated_ahead
    train(config, Path(settings["folder"]), RayBackend(), feed)


def train_run(config: Config, folder: Path, on_record: OnRecord = lambda record: None) -> dict:
    """The run in `folder` is trained to its end; continues where it was stopped.

    Writes `config.yaml`, `environment.json`, `metrics.jsonl`, checkpoints and `run.json`. All data
    are read once here, so that a mistake in them is told before Ray starts.

    Args:
        config: of the run; must be that of the folder where it holds a run already.
        folder: of the run.
        on_record: called with every new line of `metrics.jsonl` while training goes on.

    Returns:
        The content of `run.json`.

    Raises:
        InputError: data or configuration are wrong; found before a worker starts where possible.
        RuntimeError: a worker failed more often than `train.max_failures` allows.
    """
    config = config.rooted(Path(config.data.root))
    folder = folder.resolve()
    check_trackers(config.tracking)
    checksums = _checksums(config)
    run = _begin(config, folder, checksums)
    if run.get("status") == "finished":
        return run
    source = Source.listed(config)  # a copy is for the workers to make
    dataset, validation = source.training(), source.validation()
    if dataset.num_clamped:
        logger.info(
            "%d of %d training moments end after their video and were clamped to it",
            dataset.num_clamped,
            len(dataset),
        )
    if dataset.num_derived:
        logger.info(
            "%d training videos do not fit features.clip_seconds; theirs were derived from the "
            "duration",
            dataset.num_derived,
        )
    if not run:  # `run.json` comes last: a folder without it is not a run yet
        check_files(config)
        write_whole(folder / CONFIG_FILE, config.to_yaml())
        environment = _environment(config, checksums, source.store.simulated)
        _write_json(folder / ENVIRONMENT_FILE, environment)
        _write_json(folder / RUN_FILE, {"name": folder.name, "status": "running", "best": None})
    with _follow(folder / METRICS_FILE, on_record):
        if config.train.num_workers == 0:
            kept = _train_here(config, folder)
        else:
            with connect(
                min_cpus=training_cpus(config.train.num_workers, streamed=_streams(config))
            ):
                kept = _train_on_ray(config, folder)
    best = max(kept, key=lambda entry: entry["score"]) if validation else kept[-1]
    run = {
        "name": folder.name,
        "status": "finished",
        "best": best["name"],
        "best_epoch": best["epoch"],
        "score": best["score"],
        "num_rows": len(dataset),
        "num_clamped": dataset.num_clamped,
        "selection": "validation" if validation else "published protocol: the last epoch",
    }
    _write_json(folder / RUN_FILE, run)
    return run


def _streams(config: Config) -> bool:
    return config.features.feed == "streamed"


def _train_here(config: Config, folder: Path) -> list[dict[str, Any]]:
    backend = LocalBackend(folder, local_device(config.train))
    train(config, folder, backend)
    return backend.checkpoints()


def _train_on_ray(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Runs the workers; returns the kept checkpoints, oldest first."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = config.train
    check_workers(settings.num_workers, gpu=settings.gpu, streamed=_streams(config))
    score = "score" if config.data.validation else None
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config.model_dump(mode="json"), "folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers, use_gpu=settings.gpu
        ),
        torch_config=TorchConfig(backend="nccl" if settings.gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=score, checkpoint_score_order="max"
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise _translated(error.worker_failures) from None
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(f"the training could not run: {error}") from None
    kept = [
        {"name": Path(checkpoint.path).name, "score": metrics["score"], "epoch": metrics["epoch"]}
        for checkpoint, metrics in result.best_checkpoints or ()
    ]
    return sorted(kept, key=lambda entry: entry["name"])


def _translated(failures: Mapping[int, Exception]) -> Exception:
    """What went wrong on the lowest rank that failed, as one exception of ours."""
    rank, error = min(failures.items())
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, InputError):
        return InputError(str(cause))
    return RuntimeError(f"worker {rank} failed: {type(cause).__name__}: {cause}")


def _begin(config: Config, folder: Path, checksums: Mapping[str, str]) -> dict[str, Any]:
    """The folder belongs to this configuration and data; returns its `run.json`, empty at first.

    Raises:
        InputError: it holds a run of another configuration or of other data, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = folder / RUN_FILE
        if not run.exists():
            return {}
        if _decides(load_config(folder / CONFIG_FILE)) != _decides(config):
            raise InputError(
                f"{folder} holds a run of another configuration (see its {CONFIG_FILE}); choose "
                f"another --out"
            )
        before = json.loads((folder / ENVIRONMENT_FILE).read_text())["checksums"]
    except OSError as error:
        raise InputError(f"cannot use the run folder {folder}: {error.strerror}") from None
    changed = sorted(
        n for n in before.keys() | checksums.keys() if before.get(n) != checksums.get(n)
    )
    if changed:
        raise InputError(
            f"{folder} holds a run on other data: {', '.join(changed)} changed since it began; "
            f"restore the data or choose another --out"
        )
    return json.loads(run.read_text())


def _decides(config: Config) -> Config:
    """What of a configuration decides a run: not who watches it, or how features reach it."""
    reach = {name: FeaturesConfig.model_fields[name].default for name in ("feed", "cache")}
    features = config.features.model_copy(update=reach)
    return config.model_copy(update={"tracking": TrackingConfig(), "features": features})


def _checksums(config: Config) -> dict[str, str]:
    """SHA-256 of every file that the run and its evaluation read, by configured name."""
    data = config.data
    names = [data.train, *data.validation.values(), *data.tests.values()]
    names += [data.negatives if config.loss.num_hard_negatives else None]
    names += [config.text.word_vectors]
    found = {name: sha256(path) for name in names if name and (path := config.path(name)).is_file()}
    store = open_storage(located(config).store)
    if store.exists(MANIFEST):
        digest = hashlib.sha256(store.read(MANIFEST)).hexdigest()
        found[f"{config.features.store}/{MANIFEST}"] = digest
    return found | encoder_checksum(config)


def _environment(
    config: Config, checksums: Mapping[str, str], simulated: str | None
) -> dict[str, Any]:
    return {
        "shine": version("shine-grounding"),
        "git": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in _PACKAGES},
        "seed": config.train.seed,
        "checksums": dict(checksums),
        "simulated": simulated,
    }


def _git_commit() -> str | None:
    """The commit of the source tree this runs from; None for an installed package."""
    tree = Path(__file__).parents[1]
    if not (tree / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def _follow(path: Path, on_record: OnRecord) -> Iterator[None]:
    """Inside, `on_record` is called with every line that is added to `path`."""
    done = threading.Event()
    seen = len(_whole_lines(path))

    def read(seen: int) -> int:
        lines = _whole_lines(path)
        start = min(seen, len(lines))  # a run that continues cuts lines of epochs it repeats
        for line in lines[start:]:
            on_record(json.loads(line))
        return len(lines)

    def poll() -> None:
        nonlocal seen
        while not done.wait(0.3):
            seen = read(seen)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        read(seen)


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []
