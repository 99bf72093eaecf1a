import json
import logging
import struct
import sys
import threading

import pytest
import torch
from tensorboardX.proto import event_pb2
from tiny import tiny_config, tiny_data

from pipelines.train import train_run
from shine.config import TrackingConfig
from shine.engine import LocalBackend, train
from shine.errors import InputError
from shine.tracking import Sender, check_trackers, curves, tracking

RECORD = {"epoch": 1, "step": 4, "train": {"loss/total": 2.5}, "validation": {}, "score": None}

# What the documented calls of the two libraries do, as far as they are called; every call is a line
# of the file that the environment names. A server refuses names and sizes as the real one does.
MLFLOW = """
import json, os, pathlib, re
from types import SimpleNamespace as Of

def _state(): return pathlib.Path(os.environ["RECORDED"])
def _calls(): return [json.loads(line) for line in _state().read_text().splitlines()]

class MlflowClient:
    def _call(self, name, /, **arguments):
        if os.environ.get("DOWN"):
            raise ConnectionError("no answer from http://me:secret@server/api")
        with _state().open("a") as file:
            file.write(json.dumps([name, arguments]) + "\\n")
    def get_experiment_by_name(self, name):
        self._call("get_experiment_by_name", name=name)
        made = any(call == ["create_experiment", {"name": name}] for call in _calls())
        return Of(experiment_id="7") if made else None
    def create_experiment(self, name, artifact_location=None, tags=None):
        self._call("create_experiment", name=name)
        return "7"
    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        self._call("create_run", experiment_id=experiment_id, run_name=run_name)
        return Of(info=Of(run_id="r1"))
    def update_run(self, run_id, status=None, name=None):
        self._call("update_run", run_id=run_id, status=status)
    def get_metric_history(self, run_id, key):
        self._call("get_metric_history", run_id=run_id, key=key)
        return [Of(step=m["step"], value=m["value"]) for call, a in _calls()
                if call == "log_batch" for m in a["metrics"] if m["key"] == key]
    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert len(params) <= 100 and len(metrics) <= 1000
        for one in [*metrics, *params]:
            assert re.fullmatch(r"[/\\w.\\- ]+", one.key), one.key
        self._call("log_batch", run_id=run_id, metrics=[vars(m) for m in metrics],
                   params=[vars(p) for p in params])
    def set_terminated(self, run_id, status=None, end_time=None):
        self._call("set_terminated", run_id=run_id, status=status)
"""
ENTITIES = """
from types import SimpleNamespace
def Metric(key, value, timestamp, step): return SimpleNamespace(**locals())
def Param(key, value): return SimpleNamespace(**locals())
"""
WANDB = """
import json, os
from types import SimpleNamespace

def _call(name, /, **arguments):
    with open(os.environ["RECORDED"], "a") as file:
        file.write(json.dumps([name, arguments]) + "\\n")

def Settings(console): return {"console": console}

class _Run:
    def log(self, data, step=None, commit=None): _call("log", data=data, step=step)
    def finish(self, exit_code=None, quiet=None): _call("finish", exit_code=exit_code)

def init(project, id, name, dir, config, resume, settings):
    _call("init", **locals())
    return _Run()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Stand-ins of mlflow and wandb; returns a function that gives their calls so far."""
    home = tmp_path / "libraries"
    (home / "mlflow").mkdir(parents=True)
    (home / "mlflow" / "__init__.py").write_text(MLFLOW)
    (home / "mlflow" / "entities.py").write_text(ENTITIES)
    (home / "wandb.py").write_text(WANDB)
    recorded = tmp_path / "calls.jsonl"
    recorded.touch()
    monkeypatch.setenv("RECORDED", str(recorded))
    monkeypatch.syspath_prepend(home)
    yield lambda: [json.loads(line) for line in recorded.read_text().splitlines()]
    for name in ("mlflow", "mlflow.entities", "wandb"):
        sys.modules.pop(name, None)


class StoppedBackend(LocalBackend):
    """Is stopped before it keeps its second checkpoint."""

    def __init__(self, folder):
        super().__init__(folder, torch.device("cpu"))
        self._reports = 0

    def report(self, record, write):
        self._reports += 1
        if self._reports == 2:
            raise KeyboardInterrupt
        super().report(record, write)


def stopped_and_resumed(config, folder):
    """A run whose second epoch was trained twice; returns the lines of its record."""
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(config, folder, StoppedBackend(folder))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    train(config, folder, LocalBackend(folder, torch.device("cpu")))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shown(folder):
    """What TensorBoard shows of a folder: its files in order, each start voiding later steps."""
    points = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack_from("<Q", data)
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                points = [point for point in points if point[1] < event.step]
            points += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return points


def test_tensorboard_shows_each_point_of_a_resumed_run_once(root, tmp_path):
    config = tiny_config(root, "train.epochs=3")
    lines = stopped_and_resumed(config, tmp_path / "run")
    points = shown(tmp_path / "run")
    expected = {
        (name.replace("@", "_"), line["step"]): value
        for line in lines
        for name, value in curves(line).items()
    }
    assert len(points) == len(expected) > 3 * 15
    assert {(name, step) for name, step, _ in points} == set(expected)
    for name, step, value in points:
        assert value == pytest.approx(expected[name, step], rel=1e-6)


def test_events_of_a_run_that_goes_on_are_in_the_file_at_once(root, tmp_path):
    with tracking(tiny_config(root), tmp_path, 0, rank=0) as track:
        track(RECORD)
        assert ("train/loss/total", 4, 2.5) in shown(tmp_path)


def test_curves_are_all_numbers_by_their_place():
    record = RECORD | {"validation": {"val": {"R1@0.5": 0.25}}, "score": 0.5, "seconds": 2}
    assert curves(record) == {
        "epoch": 1.0,
        "train/loss/total": 2.5,
        "validation/val/R1@0.5": 0.25,
        "score": 0.5,
        "seconds": 2.0,
    }
    assert curves(RECORD) == {"epoch": 1.0, "train/loss/total": 2.5}


def test_mlflow_continues_its_run_without_repeating_a_step(root, tmp_path, libraries):
    config = tiny_config(root, "train.epochs=3", "tracking.mlflow=charades")
    lines = stopped_and_resumed(config, tmp_path / "run")
    calls = libraries()
    assert [a for name, a in calls if name == "create_run"] == [
        {"experiment_id": "7", "run_name": "run"}
    ]
    sent = [m for name, a in calls if name == "log_batch" for m in a["metrics"]]
    points = {(m["key"], m["step"]): m["value"] for m in sent}
    assert len(points) == len(sent)
    expected = {
        (name.replace("@", "_"), line["step"]): value
        for line in lines
        for name, value in curves(line).items()
        if "second" not in name  # the second epoch was sent when it was first trained
    }
    assert {k: v for k, v in points.items() if "second" not in k[0]} == expected
    params = {p["key"]: p["value"] for name, a in calls if name == "log_batch" for p in a["params"]}
    assert params["train.epochs"] == "3"
    assert [a["status"] for name, a in calls if name == "set_terminated"] == ["KILLED", "FINISHED"]


def test_wandb_continues_its_run_by_its_name(root, tmp_path, libraries):
    config = tiny_config(root, "train.epochs=3", "tracking.wandb=charades")
    lines = stopped_and_resumed(config, tmp_path / "run")
    starts = [arguments for name, arguments in libraries() if name == "init"]
    assert starts[0] == starts[1]
    assert starts[0]["project"] == "charades"
    assert starts[0]["resume"] == "allow"
    assert starts[0]["config"]["train"]["epochs"] == 3
    logged = [arguments for name, arguments in libraries() if name == "log"]
    assert [point["step"] for point in logged] == [4, 8, 8, 12]  # the library drops the second 8
    assert logged[-1]["data"] == curves(lines[-1])
    assert [a for name, a in libraries() if name == "finish"] == [
        {"exit_code": 1},
        {"exit_code": 0},
    ]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_told_before_anything_starts(root, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny_config(root, f"tracking.{name}=charades")
    with pytest.raises(InputError, match=rf"tracking.{name}=charades needs .*pip install {name}"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_trackers(TrackingConfig())


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_server_with_its_password_is_no_name_and_not_shown(root, name):
    with pytest.raises(InputError, match=rf"tracking.{name}: needs a name") as error:
        tiny_config(root, f"tracking.{name}=https://me:secret@server")
    assert "secret" not in str(error.value)


def test_a_server_that_is_down_is_told_once_and_gets_its_points_later(
    root, tmp_path, libraries, monkeypatch, caplog
):
    monkeypatch.setenv("DOWN", "1")
    config = tiny_config(root, "tracking.mlflow=charades")
    with tracking(config, tmp_path, 0, rank=0) as track:
        track(RECORD)
        track(RECORD | {"step": 8})
        wait_for(lambda: caplog.records)
        monkeypatch.delenv("DOWN")
        track(RECORD | {"step": 12})
    steps = [m["step"] for n, a in libraries() if n == "log_batch" for m in a["metrics"]]
    assert sorted(set(steps)) == [4, 8, 12]
    assert len(caplog.records) == 1
    assert "MLflow does not answer" in caplog.text
    assert "//...@server" in caplog.text
    assert "secret" not in caplog.text


def test_a_training_outlives_a_server_that_never_answers(
    root, tmp_path, libraries, monkeypatch, caplog
):
    monkeypatch.setenv("DOWN", "1")
    run = train_run(tiny_config(root, "tracking.mlflow=charades"), tmp_path / "run")
    assert run["status"] == "finished"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "has not taken all points" in warnings[1]
    assert libraries() == []


def test_a_service_that_hangs_holds_up_neither_a_step_nor_the_end(caplog):
    forever = threading.Event()
    sender = Sender("W&B", lambda: forever.wait() and None, patience=0.05)
    for step in range(100):
        sender.add(step, {"loss": 1.0})
    sender.close(finished=True)
    assert "W&B has not taken all points" in caplog.text
    forever.set()


def test_event_files_that_cannot_be_written_do_not_stop_a_training(root, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    assert train_run(tiny_config(root), tmp_path / "run")["status"] == "finished"
    assert caplog.text.count("TensorBoard shows no more of this run") == 1


def test_rank_0_alone_tracks_and_only_what_is_asked_for(root, tmp_path):
    for folder, rank, override in (
        (tmp_path / "second", 1, "tracking.tensorboard=true"),
        (tmp_path / "none", 0, "tracking.tensorboard=false"),
    ):
        folder.mkdir()
        with tracking(tiny_config(root, override), folder, 0, rank=rank) as track:
            track(RECORD)
        assert list(folder.iterdir()) == []


def wait_for(found, seconds=20.0):
    done = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if found():
            return
        done.wait(0.02)
    raise AssertionError("it did not happen")
