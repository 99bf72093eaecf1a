import io
import json
import re
import shutil
import time

import pytest
from rich.console import Console
from tiny import tiny_config, tiny_data

from pipelines import console
from pipelines.train import train_run
from shine.data.annotations import write_jsonl
from shine.evaluation import evaluate_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def config(root, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(tiny_config(root).to_yaml())
    return path


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """Two evaluated runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in range(2):
        train_run(tiny_config(root, f"train.seed={seed}"), folder / f"tiny-s{seed}")
        evaluate_run(folder / f"tiny-s{seed}")
    return folder


@pytest.fixture
def two_seeds(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    return [tmp_path / "runs" / f"tiny-s{seed}" for seed in range(2)]


def test_runs_are_listed_and_compared_by_what_the_commands_left(shine, two_seeds, tmp_path):
    status, out, _ = shine("runs", tmp_path / "runs", "--json")
    assert status == 0
    listed = {run["name"]: run for run in json.loads(out)["runs"]}
    assert {(run["state"], run["epochs"], run["epochs_of"]) for run in listed.values()} == {
        ("finished", 2, 2)
    }
    for seed, run in enumerate(two_seeds):
        state = json.loads((run / "run.json").read_text())
        assert listed[run.name]["score"] == state["score"]
        assert listed[run.name]["seed"] == seed
    page = tmp_path / "page"
    status, out, _ = shine("report", *two_seeds, "--out", page, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["report"] == str(page / "report.html")
    (setting,) = result["settings"]
    assert (setting["label"], setting["seeds"]) == ("tiny", [0, 1])
    html = (page / "report.html").read_text()
    assert "These runs differ in nothing but their seed" in html
    assert "tiny (2 seeds)" in html


def test_broken_runs_are_a_line_of_the_listing(shine, two_seeds, tmp_path):
    (two_seeds[0] / "run.json").write_text("{")
    status, out, _ = shine("runs", tmp_path / "runs")
    assert status == 0
    text = " ".join(out.split())
    assert "tiny-s1" in text
    assert "broken: " in text
    assert "expected JSON" in text
    status, _, err = shine("report", *two_seeds)
    assert status == 2
    assert "run.json: expected JSON" in err
    (tmp_path / "empty").mkdir()
    assert "no runs found" in shine("runs", tmp_path / "empty")[1]
    assert shine("runs", tmp_path / "none")[0] == 2


def test_a_training_ends_with_its_validation_table(shine, config, root, tmp_path):
    status, out, err = shine("train", "--config", config, "--out", tmp_path / "run")
    assert status == 0
    assert re.search(r"training run: 2/2 loss [\d.]+ \| val R1@0.5 [\d.]+ \| \d+ queries/s", err)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    best = max(lines, key=lambda line: line["score"])
    scores = best["validation"]["val"]
    row = next(line for line in out.splitlines() if "(best)" in line)
    shown = [float(value) for value in re.findall(r"\d+\.\d", row)]
    assert shown == [
        round(100 * scores[m], 1) for m in ("R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "mAP")
    ]
    status, out, _ = shine(
        "train", "--config", config, "--out", tmp_path / "bare", "data.validation={}"
    )
    assert status == 0
    assert "Validation" not in out


def lines_of(monkeypatch, *, terminal):
    stream = io.StringIO()
    there = Console(file=stream, force_terminal=terminal, width=160)
    monkeypatch.setattr(console, "console", there)
    return stream


def test_plain_progress_tells_the_time_left(monkeypatch):
    stream = lines_of(monkeypatch, terminal=False)
    monkeypatch.setattr(console, "_QUIET_SECONDS", -1.0)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.tracked("training a") as tracker:
        for done in (51, 52, 53, 60):  # a run that goes on at epoch 51
            tracker.update(done, 60, "loss 1.000")
            now[0] += 90
    assert stream.getvalue().splitlines() == [
        "training a",
        "training a: 51/60 loss 1.000",
        "training a: 52/60 loss 1.000 | 12 min left",
        "training a: 53/60 loss 1.000 | 10 min left",
        "training a: 60/60 loss 1.000",
    ]


def test_a_bar_tells_the_time_left_of_epochs_that_take_minutes(monkeypatch):
    stream = lines_of(monkeypatch, terminal=True)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.tracked("training a") as tracker:
        assert tracker._bar is not None
        tracker._bar.get_time = lambda: now[0]
        for task in tracker._bar.tasks:
            task._get_time = lambda: now[0]
        for done in (1, 2, 3):
            tracker.update(done, 10, "loss 1.000 | 500 queries/s")
            now[0] += 120
        tracker._bar.refresh()
    assert "0:14:00" in stream.getvalue()
    assert "500 queries/s" in stream.getvalue()


def test_durations_are_told_in_their_largest_unit():
    told = {30: "30 s", 300: "5 min", 7200: "2 h", 3 * 86_400: "3 days"}
    assert {seconds: console.ago(seconds) for seconds in told} == told


def test_an_imported_run_is_listed_and_compared_without_curves(
    shine, two_seeds, tmp_path, monkeypatch
):
    published = two_seeds[0]
    for name in ("metrics.jsonl", "environment.json"):
        (published / name).unlink()
    state = json.loads((published / "run.json").read_text())
    state |= {"status": "imported", "score": None, "selection": "published checkpoint a.ckpt"}
    (published / "run.json").write_text(json.dumps(state))
    monkeypatch.chdir(tmp_path)
    status, out, _ = shine("runs")
    assert status == 0
    assert re.search(r"tiny-s0 +imported +\d +published +- +qd_detr", out)
    assert shine("report", *two_seeds, "--out", tmp_path / "page")[0] == 0


def test_a_file_is_no_folder_of_runs(shine, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [])
    status, _, err = shine("runs", tmp_path / "a.jsonl")
    assert status == 2
    assert "no such folder" in err
