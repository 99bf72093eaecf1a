import json
import os

import pytest
from test_report import make_run

from shine.errors import InputError
from shine.runs import find_runs, list_runs, read_run_folder

NOW = 1_800_000_000.0


def written(folder, seconds_ago):
    for path in folder.iterdir():
        os.utime(path, (NOW - seconds_ago, NOW - seconds_ago))
    return folder


def unfinished(folder, *, lines, seconds_ago, seconds=4.2, **settings):
    """A run folder as it is while `shine train` works: torn last line, no best checkpoint."""
    make_run(folder, **settings)
    (folder / "evaluation.json").unlink()
    (folder / "run.json").write_text(
        json.dumps({"name": folder.name, "status": "running", "best": None})
    )
    metrics = folder / "metrics.jsonl"
    kept = [json.loads(line) for line in metrics.read_text().splitlines()[:lines]]
    text = "".join(json.dumps(line | {"seconds": seconds}) + "\n" for line in kept)
    metrics.write_text(text + '{"epoch": ')
    if not lines:
        metrics.unlink()
    return written(folder, seconds_ago)


def imported(folder):
    """What `shine checkpoint import` leaves: no curves, no environment."""
    make_run(folder)
    for name in ("metrics.jsonl", "environment.json", "evaluation.json"):
        (folder / name).unlink()
    state = {
        "name": folder.name,
        "status": "imported",
        "best": "checkpoint_published",
        "best_epoch": 55,
        "score": None,
        "selection": "published checkpoint model_best.ckpt",
    }
    (folder / "run.json").write_text(json.dumps(state))
    return folder


def states(*folders):
    listing = list_runs(folders, NOW)
    assert not listing["broken"]
    return {run["name"]: run["state"] for run in listing["runs"]}


def test_a_finished_run_is_told_by_its_files(tmp_path):
    overrides = {"train": {"seed": 3, "epochs": 12}, "data": {"validation": {"val": "val.jsonl"}}}
    written(make_run(tmp_path / "a", name="a", overrides=overrides), 90)
    (run,) = list_runs([tmp_path], NOW)["runs"]
    assert run.pop("written").startswith("20")
    assert run == {
        "folder": str(tmp_path / "a"),
        "name": "a",
        "state": "finished",
        "epochs": 12,
        "epochs_of": 12,
        "score": pytest.approx(0.3),
        "best_epoch": 12,
        "selection": "validation",
        "seed": 3,
        "backbone": "qd_detr",
        "samples_per_second": 812.0,
        "silent_seconds": 90,
    }


def test_an_unfinished_run_is_read_up_to_its_last_whole_line(tmp_path):
    unfinished(tmp_path / "a", lines=5, seconds_ago=10)
    (run,) = list_runs([tmp_path], NOW)["runs"]
    assert (run["state"], run["epochs"], run["epochs_of"]) == ("running", 5, 200)
    assert run["best_epoch"] == 5
    assert run["score"] == pytest.approx(0.3 * 5 / 12)


def test_silence_is_judged_by_the_pace_of_the_run(tmp_path):
    unfinished(tmp_path / "quick", lines=5, seconds_ago=700, seconds=4)
    unfinished(tmp_path / "slow", lines=5, seconds_ago=700, seconds=1000)
    unfinished(tmp_path / "dead", lines=5, seconds_ago=6000, seconds=1000)
    every = {"train": {"evaluate_every": 10}}
    unfinished(tmp_path / "seldom", lines=5, seconds_ago=700, seconds=20, overrides=every)
    unfinished(tmp_path / "starting", lines=0, seconds_ago=700)
    unfinished(tmp_path / "never", lines=0, seconds_ago=4000)
    assert states(tmp_path) == {
        "quick": "stopped",
        "slow": "running",
        "dead": "stopped",
        "seldom": "running",
        "starting": "running",
        "never": "stopped",
    }


def test_imported_runs_have_no_seed_and_no_curves(tmp_path):
    imported(tmp_path / "published")
    (run,) = list_runs([tmp_path], NOW)["runs"]
    assert (run["state"], run["epochs"], run["epochs_of"], run["seed"]) == (
        "imported",
        55,
        None,
        None,
    )
    assert run["selection"] == "published checkpoint model_best.ckpt"
    assert read_run_folder(tmp_path / "published").history == []


def test_runs_are_found_at_any_depth_and_once_the_latest_first(tmp_path):
    for number, name in enumerate(("a/seed0", "a/deeper/seed1", "b")):
        written(make_run(tmp_path / name, name=name), 100 - number)
    make_run(tmp_path / "b" / "checkpoint" / "inner")
    make_run(tmp_path / ".trash" / "c")
    (tmp_path / "begun").mkdir()  # a folder without run.json is not a run yet
    found = [run["folder"] for run in list_runs([tmp_path, tmp_path / "b"], NOW)["runs"]]
    assert found == [str(tmp_path / name) for name in ("b", "a/deeper/seed1", "a/seed0")]
    with pytest.raises(InputError, match="none: no such folder; name a run"):
        list(find_runs(tmp_path / "none"))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("run.json", "{", "expected JSON"),
        ("run.json", "[]", "expected the name and the status"),
        ("run.json", '{"name": "a", "status": "on"}', 'got {"name": "a", "status": "on"}'),
        ("config.yaml", "train: [", "expected a configuration with train.epochs"),
        ("config.yaml", "train: {epochs: 3}", "expected a configuration with train.seed"),
        ("config.yaml", None, "expected a file of a run; it is written by `shine train`"),
        ("metrics.jsonl", "nonsense\n", "expected JSON"),
        ("metrics.jsonl", '{"epoch": 1}\n', "expected lines with"),
        ("metrics.jsonl", "", "expected the curves of a finished run"),
        ("environment.json", None, "expected a file of a run"),
        ("environment.json", "[]", "expected a JSON object"),
    ],
)
def test_a_damaged_run_is_told_and_the_others_are_listed(tmp_path, file, content, says):
    make_run(tmp_path / "good", name="good")
    path = make_run(tmp_path / "bad") / file
    path.unlink() if content is None else path.write_text(content)
    listing = list_runs([tmp_path], NOW)
    assert [run["name"] for run in listing["runs"]] == ["good"]
    (broken,) = listing["broken"]
    assert broken["folder"] == str(tmp_path / "bad")
    assert says in broken["reason"]
    assert file in broken["reason"]
