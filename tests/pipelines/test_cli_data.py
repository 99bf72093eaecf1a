import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, tiny_data

from shine.data.annotations import read_annotations, write_jsonl

ROW = {"qid": "a", "vid": "v", "query": "a b", "duration": 9.0, "relevant_windows": [[1, 2]]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


def settings(tmp_path, config):
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.fixture
def config(root, tmp_path):
    return settings(tmp_path, tiny_config(root))


def test_a_check_of_files_shows_a_table_and_exits_with_what_training_would_do(shine, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [ROW, ROW | {"qid": "b", "relevant_windows": [[1, 11]]}])
    write_jsonl(tmp_path / "b.jsonl", [ROW, ROW | {"relevant_windows": [[3, 3]]}])
    status, out, _ = shine("data", "check", tmp_path / "a.jsonl")
    text = " ".join(out.split())
    assert status == 0
    assert "moment that ends after its video" in text
    assert "a.jsonl, line 2, query b: ends 2 s after its video" in text
    assert "nothing is refused" in text
    status, out, _ = shine("data", "check", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    text = " ".join(out.split())
    assert status == 2
    assert "b.jsonl, line 2, query a: the moment [3.0, 3.0] is empty" in text
    assert "shared videos, shared" in text
    assert "b.jsonl, line 1, query a: also line 1, query a of the other" in text
    assert "defects that are refused: 1" in text


def test_a_check_speaks_json_whatever_it_finds(shine, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"qid": NaN}\nnothing\n')
    status, out, _ = shine("data", "check", tmp_path / "a.jsonl", "--json")
    report = json.loads(out)
    assert status == 2
    assert {entry["kind"]: entry["count"] for entry in report["defects"]} == {
        "malformed": 1,
        "missing": 1,
        "value": 1,
    }
    assert all(entry["action"] and entry["severity"] for entry in report["defects"])


def test_a_check_cannot_be_made_to_steer_the_terminal(shine, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [ROW | {"qid": "\x1b[31m", "duration": "\x1b]0;x\x07"}])
    _, out, _ = shine("data", "check", tmp_path / "a.jsonl")
    assert "\x1b" not in out


def test_a_check_of_a_configuration_compares_with_its_features(shine, root, config, tmp_path):
    status, out, _ = shine("data", "check", "--config", config)
    text = " ".join(out.split())
    assert status == 0
    assert "features of 12 of 12 videos in" in text
    assert "1 s per clip (median; 1 to 1), stated 1 s; 0 videos deviate" in text
    status, out, _ = shine("data", "check", root / "val.jsonl", "--config", config, "--json")
    (file,) = json.loads(out)["files"]
    assert (status, file["role"]) == (0, "validation val")
    wrong = settings(tmp_path, tiny_config(root, "features.store=none", "features.sources=[none]"))
    status, out, _ = shine("data", "check", "--config", wrong)
    assert status == 2
    assert "features that cannot be used" in " ".join(out.split())


def test_a_check_takes_overrides_beside_files(shine, root, config, tmp_path):
    wrong = "data.train=none.jsonl"
    status, out, _ = shine("data", "check", "--config", config, wrong, "--json")
    assert (status, json.loads(out)["files"][0]["file"]) == (2, str(root / "none.jsonl"))
    train = root / "train.jsonl"
    named = shine("data", "check", train, "--config", config, "features.clip_seconds=2", "--json")
    (file,) = json.loads(named[1])["files"]
    assert (named[0], file["role"], file["rows"]) == (2, "train", 16)
    alone = shine("data", "check", f"data.root={root}", "--json")
    assert json.loads(alone[1])["files"][0]["file"] == str(train)
    status, _, err = shine("data", "check", "--config", config, "data.trian=x")
    assert (status, "unknown key 'data.trian'" in err) == (2, True)
    folder = tmp_path / "run=1"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [ROW])
    assert shine("data", "check", folder / "a.jsonl")[0] == 0


VERBS = ("opens", "closes", "holds", "takes", "throws", "washes", "fixes", "watches", "puts")
NOUNS = ("door", "box", "cup", "book", "bag", "window", "towel", "phone", "table", "sandwich")


def own_videos(folder):
    """Annotations of 300 videos of ten seconds, and features as `shine features extract` writes."""
    random = np.random.default_rng(0)
    (folder / "features").mkdir(parents=True)
    rows = []
    for number in range(300):
        np.save(folder / "features" / f"v{number}.npy", np.ones((10, 512), np.float16))
        for query in range(6):
            text = f"a person {random.choice(VERBS)} the {random.choice(NOUNS)}"
            changes = {"qid": f"{number}_{query}", "vid": f"v{number}", "query": text}
            rows.append(ROW | changes | {"duration": 10.0})
    write_jsonl(folder / "all.jsonl", rows)


def test_the_lines_of_the_documentation_run_as_they_stand(shine, config, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "data.md"
    lines = re.findall(r"^shine (data (?:convert|split|check) .*)", page.read_text(), re.MULTILINE)
    assert {shlex.split(line)[1] for line in lines} == {"convert", "split", "check"}
    config.rename(tmp_path / "my.yaml")
    own_videos(tmp_path / "my_videos")
    (tmp_path / "charades_sta_train.txt").write_text("V1 0.0 6.9##a person sits.\n")
    (tmp_path / "seconds.csv").write_text("V1,30.5\n")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        status, _, err = shine(*shlex.split(line, comments=True))
        assert (line, status, err) == (line, 0, "")


def test_a_check_of_nothing_is_told(shine):
    status, _, err = shine("data", "check")
    assert (status, "name annotation files, or a configuration" in err) == (2, True)


def test_text_lines_are_converted_with_durations(shine, tmp_path):
    source, out = tmp_path / "sta.txt", tmp_path / "new" / "sta.jsonl"
    source.write_text("V1 0.0 6.9##a person sits.\nV1 40 50##late\nV2 1 2##x\n")
    status, _, err = shine("data", "convert", source, "--out", out)
    assert (status, "--durations FILE" in err) == (2, True)
    (tmp_path / "s.csv").write_text("vid,seconds\nV1,30.5\nV2,4\n")
    command = ("data", "convert", source, "--durations", tmp_path / "s.csv", "--out", out)
    status, text, _ = shine(*command)
    assert status == 0
    told = " ".join(text.split())
    assert "sta.txt, line 2, query V1_1: the moment [40.0, 50.0] starts at or after" in told
    assert "2 rows of text lines, 1 left out" in told
    assert [row.qid for row in read_annotations(out)] == ["V1_0", "V2_0"]
    status, text, _ = shine(*command, "--json")
    result = json.loads(text)
    assert (result["rows"], result["num_left_out"], len(result["left_out"])) == (2, 1, 1)


def test_a_conversion_knows_clips_and_what_an_extraction_wrote(shine, tmp_path):
    source, out = tmp_path / "sta.txt", tmp_path / "sta.jsonl"
    source.write_text("V1 0.0 6.9##a person sits.\n")
    lines = [
        {"vid": "V0", "file": "V0.mp4", "refused": "no pictures"},
        {"vid": "V1", "file": "V1.mp4", "duration_seconds": 30.5, "num_clips": 31},
    ]
    write_jsonl(tmp_path / "extract.jsonl", lines)
    status, *_ = shine(
        "data", "convert", source, "--durations", tmp_path / "extract.jsonl", "--out", out
    )
    assert (status, read_annotations(out)[0].duration_seconds) == (0, 30.5)
    write_jsonl(out, [ROW, ROW | {"qid": "b", "duration": 10.5}])
    command = ("data", "convert", out, "--out", tmp_path / "again.jsonl", "--json")
    assert json.loads(shine(*command)[1])["rows"] == 1
    assert json.loads(shine(*command, "--clip-seconds", 2)[1])["rows"] == 2
    status, _, err = shine("data", "convert", out, "--out", tmp_path)
    assert (status, f"cannot write {tmp_path}: " in err) == (2, True)


def test_a_doctor_says_whether_training_could_start(shine, config, root):
    status, out, _ = shine("doctor", "--config", config)
    assert (status, "training could start" in out) == (0, True)
    status, out, _ = shine("doctor", "--config", config, "data.train=none.jsonl", "--json")
    told = json.loads(out)
    assert (status, told["ready"]) == (2, False)
    (train,) = [one for one in told["findings"] if one["part"] == "train"]
    assert (train["status"], train["found"]) == ("missing", str(root / "none.jsonl"))
