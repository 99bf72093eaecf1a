import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from tiny import tiny_config, tiny_data

from shine.data.annotations import write_jsonl


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def config(root, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(tiny_config(root).to_yaml())
    return path


def test_version_and_help_answer(shine):
    assert shine("--version")[1].startswith("shine 0.")
    status, out, _ = shine("--help")
    assert status == 0
    assert "shine negatives generate --config" in out


def test_train_and_evaluate_end_to_end_with_json(shine, config, tmp_path):
    run = tmp_path / "runs" / "tiny"
    status, out, _ = shine("train", "--config", config, "--out", run, "--json")
    assert status == 0
    assert json.loads(out)["status"] == "finished"
    status, out, _ = shine("evaluate", run, "--json")
    assert status == 0
    assert json.loads(out)["splits"]["test_trivial"]["num_queries"] == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train.epoch=3"], "unknown key 'train.epoch'; the nearest is 'train.epochs'"),
        (["data.train=none.jsonl"], "cannot read annotations"),
        (["features.store=none"], "no feature store in"),
        (["features.width=9"], "expected clips of 9 columns"),
        (["epochs"], "section.key=value"),
        (["data.negatives=none.parquet"], "cannot read negatives"),
        (["loss.fine_weights=[1,1,1,1,1]", "loss.fine_margins=[1,1,1,1,1]"], "expected 4 levels"),
        (["train.seed=-1"], "train.seed"),
        (["train.gpu=true"], "PyTorch finds no GPU"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(shine, config, tmp_path, arguments, says):
    status, _, err = shine("train", "--config", config, "--out", tmp_path / "r", *arguments)
    assert status == 2
    assert says in err


BAD = {"qid": "bad", "vid": "v0", "query": "a", "duration": 8, "relevant_windows": [[1, 2]],
       "recomposed_queries": ["b", "c", "d"]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"relevant_windows": [[3, 3]]}, "line 1, query bad: the moment [3.0, 3.0] is empty"),
        ({"relevant_windows": [[3, 1]]}, "is reversed"),
        ({"relevant_windows": [[8, 9]]}, "starts at or after the end of its video"),
        ({"vid": "gone"}, "does not hold video gone"),
    ],
)
def test_a_wrong_annotation_is_told(shine, config, tmp_path, change, says):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [BAD | change])
    status, _, err = shine("train", "--config", config, "--out", tmp_path / "r",
                           f"data.train={path}", "train.num_workers=2")  # fmt: skip
    assert status == 2
    assert says in err


def test_mistakes_in_the_data_are_found_without_ray(config, tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [BAD | {"vid": "gone"}])
    code = f"""
import sys
from pipelines.cli import main
sys.argv = ["shine", "train", "--config", {str(config)!r}, "--out", {str(tmp_path / "r")!r},
            "data.train={path}", "train.num_workers=2"]
try:
    main()
finally:
    print("ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (2, "False")
    assert "does not hold video gone" in done.stderr


def test_an_empty_split_is_wrong_input(shine, config, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("")
    status, _, err = shine("train", "--config", config, "--out", tmp_path / "r",
                           f"data.train={path}")  # fmt: skip
    assert (status, "the file is empty" in err) == (2, True)


@pytest.mark.parametrize("arguments", [["frobnicate"], ["train", "--frobnicate"], ["evaluate"]])
def test_a_command_that_is_none_is_wrong_input(shine, arguments):
    status, _, err = shine(*arguments)
    assert status == 2
    assert "Usage:" in err


def test_evaluating_what_is_no_run_is_wrong_input(shine, tmp_path):
    status, _, err = shine("evaluate", tmp_path)
    assert (status, "expected a finished run" in err) == (2, True)


def test_a_failed_training_is_status_1(shine, config, tmp_path):
    status, _, err = shine("train", "--config", config, "--out", tmp_path / "r",
                           "train.learning_rate=1e30", "train.epochs=5")  # fmt: skip
    assert status == 1
    assert "FloatingPointError: the loss is" in err


def test_interrupted_is_told_with_status_130(shine, config, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.train.train_run", interrupted)
    status, _, err = shine("train", "--config", config, "--out", tmp_path / "r")
    assert (status, "run the same command again" in err) == (130, True)


def test_a_run_on_changed_data_is_refused(shine, root, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(root, data)
    config = tmp_path / "run.yaml"
    config.write_text(tiny_config(data).to_yaml())
    command = ("train", "--config", config, "--out", tmp_path / "r")
    assert shine(*command)[0] == 0
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    status, _, err = shine(*command)
    assert status == 2
    assert "holds a run on other data: train.jsonl changed since it began" in err


def test_a_folder_is_no_run_before_its_data_were_found_good(shine, config, tmp_path):
    command = ("train", "--config", config, "--out", tmp_path / "r")
    assert shine(*command, "data.train=none.jsonl")[0] == 2
    assert shine(*command)[0] == 0


def test_a_split_never_overwrites_its_source(shine, root, tmp_path):
    source = tmp_path / "train.jsonl"
    shutil.copy(root / "train.jsonl", source)
    before = source.read_bytes()
    status, _, err = shine("data", "split", source, "--out", tmp_path)
    assert (status, "would be overwritten" in err) == (2, True)
    assert source.read_bytes() == before


def test_a_shipped_configuration_is_found_by_name(shine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = shine("train", "--config", "world.yaml", "--out", "r")
    assert status == 2
    assert "no feature store in" in err


def test_worlds_are_made_and_dressed(shine, tmp_path):
    made, dressed = tmp_path / "made", tmp_path / "dressed"
    status, out, _ = shine("world", "make", "--out", made, "train_rows=300", "validation_rows=5",
                           "test_rows=5", "--json")  # fmt: skip
    assert (status, json.loads(out)["rows"]["train.jsonl"]) == (0, 300)
    files = [made / "train.jsonl", made / "novel_word.jsonl"]
    status, out, _ = shine("world", "dress", *files, "--out", dressed, "seed=3", "--json")
    assert status == 0
    assert "simulated" in json.loads(out)["simulated"]
    status, out, _ = shine("data", "split", files[0], "--out", tmp_path / "split", "--rows", 20,
                           "--json")  # fmt: skip
    assert status == 0
    assert all(count > 0 for count in json.loads(out).values())


def test_a_world_that_is_misspelt_is_told(shine, tmp_path):
    status, _, err = shine("world", "make", "--out", tmp_path / "w", "sead=1")
    assert (status, "unknown key 'sead'; the nearest is 'seed'" in err) == (2, True)


@pytest.mark.ray
def test_packing_leaves_unusable_videos_out_and_says_which(ray_cluster, shine, root, tmp_path):
    vids = ["v0", "v1", "v2"]
    (tmp_path / "features").mkdir()
    for vid in vids:
        clips = np.load(root / "features" / f"{vid}.npy")
        if vid == "v1":
            clips[3] = np.nan
        np.save(tmp_path / "features" / f"{vid}.npy", clips)
    write_jsonl(
        tmp_path / "train.jsonl",
        [{"qid": v, "vid": v, "query": "a", "duration": 8, "relevant_windows": [[1, 2]]}
         for v in vids],
    )  # fmt: skip
    status, out, err = shine("features", "pack", f"data.root={tmp_path}")
    assert status == 2
    assert "2 videos" in out
    assert "1 videos were left out" in err
    assert "v1.npy: NaN or infinity in clip 3" in err


def test_shine_imports_without_ray():
    code = """
import pkgutil, importlib, sys
sys.modules["ray"] = None
import shine
for module in pkgutil.walk_packages(shine.__path__, "shine."):
    importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_configuration_is_read_without_torch_and_ray():
    code = "import shine.config, sys; assert not {'torch', 'ray', 'spacy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_that_was_exported_and_imported_again_answers_as_it_did(shine, config, tmp_path):
    trained, again, file = tmp_path / "trained", tmp_path / "again", tmp_path / "model.ckpt"
    assert shine("train", "--config", config, "--out", trained)[0] == 0
    assert "entries of" in shine("checkpoint", "export", trained, "--out", file)[1]
    sections = [f"{name}.compat=corrected" for name in ("model", "data", "evaluate")]
    status, out, err = shine(
        *("checkpoint", "import", file, "--out", again, "--config", config),
        *("text.encoder=lexical", *sections),
    )
    assert status == 0, err
    assert f"Next: set data, features and text in {again / 'config.yaml'}" in " ".join(out.split())
    first, second = (json.loads(shine("evaluate", run, "--json")[1]) for run in (trained, again))
    assert first.pop("checkpoint") != second.pop("checkpoint")
    assert first == second


def test_a_hostile_checkpoint_is_refused_in_one_sentence(shine, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    torch.save({"model": {}, "opt": Hostile()}, tmp_path / "a.ckpt")
    status, _, err = shine("checkpoint", "import", tmp_path / "a.ckpt", "--out", tmp_path / "run")
    assert status == 2
    assert "refused, since it asks for posix.mkdir" in err
    assert not (tmp_path / "canary").exists()
