import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from s3_server import serving_s3
from videos import SIZE, steady, write_sound, write_video
from vision import WIDTHS, save_model

from pipelines.extract import ExtractVideos, extract, found_videos
from pipelines.features import pack
from shine.config import Config
from shine.data.store import FeatureStore
from shine.errors import InputError
from shine.pretrained import folder_digest
from shine.storage import Storage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def root(tmp_path):
    """Three videos, and three files that are none."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "steady.mp4", steady(25, 3.4))
    write_video(videos / "slides.mkv", [0, 100, 2500, 4000])
    write_video(videos / "phone.MOV", steady(10, 2), codec="mpeg4", rotation=90)
    write_sound(videos / "sound.mp4")
    (videos / "empty.avi").write_bytes(b"")
    (videos / "notes.txt").write_text("no video")
    return tmp_path


def config(root, model, annotations="", **changes):
    (root / "train.jsonl").write_text(annotations)
    section = {"model": str(model), "batch_size": 4, "workers": 1, **changes}
    data = {"root": str(root)}
    features = {"sources": [{"path": "features"}], "dtype": "float32", "normalize": False}
    return Config.model_validate({"data": data, "extract": section, "features": features})


def lines(root):
    text = (root / "features" / "extract.jsonl").read_text()
    return {record["vid"]: record for record in map(json.loads, text.splitlines())}


def annotation(vid, seconds):
    row = {"qid": vid, "query": "a person", "vid": vid, "duration": seconds}
    return json.dumps({**row, "relevant_windows": [[0, seconds]]}) + "\n"


@pytest.mark.ray
def test_videos_become_a_store_and_are_read_once(ray_cluster, root, model, shine):
    arguments = [f"data.root={root}", f"extract.model={model}", "extract.workers=2"]
    status, out, err = shine("features", "extract", "--json", *arguments)
    result = json.loads(out)
    assert status == 2
    assert "2 videos were left out, the first because:" in err
    assert [refusal["vid"] for refusal in result["refused"]] == ["empty", "sound"]
    assert (result["num_videos"], result["num_read"], result["width"]) == (3, 5, WIDTHS["clip"])

    found = lines(root)
    assert sorted(found) == ["empty", "phone", "slides", "sound", "steady"]
    assert found["steady"]["duration_seconds"] == pytest.approx(3.4)
    assert {vid: r["num_clips"] for vid, r in found.items() if "refused" not in r} == {
        "steady": 4,
        "slides": 5,
        "phone": 2,
    }
    assert (found["phone"]["width"], found["phone"]["height"]) == SIZE[::-1]
    assert not list((root / "features").glob("extract.records/*"))
    recorded = json.loads((root / "features" / "extract.json").read_text())
    assert recorded["weights"] == folder_digest(model)

    before = {path.name: path.stat().st_mtime_ns for path in (root / "features").glob("*.npy")}
    assert sorted(before) == ["phone.npy", "slides.npy", "steady.npy"]
    (root / "features" / "slides.npy").unlink()
    (root / "videos" / "empty.avi").unlink()
    (root / "videos" / "sound.mp4").unlink()
    write_video(root / "videos" / "phone.MOV", steady(10, 5), codec="mpeg4")
    settings = config(root, model)
    again = extract(settings)
    assert (again["num_videos"], again["num_read"], again["refused"]) == (3, 2, [])
    after = {path.name: path.stat().st_mtime_ns for path in (root / "features").glob("*.npy")}
    assert {name for name in before if before[name] != after[name]} == {"phone.npy", "slides.npy"}
    assert lines(root)["phone"]["num_clips"] == 5

    rows = [annotation(vid, lines(root)[vid]["duration_seconds"]) for vid in ("steady", "slides")]
    packed = pack(config(root, model, "".join(rows)))
    assert packed["refused"] == []
    store = FeatureStore.open(root / "store")
    for vid in ("steady", "slides"):
        np.testing.assert_array_equal(store.clips(vid), np.load(root / "features" / f"{vid}.npy"))


@pytest.mark.ray
def test_a_model_that_cannot_be_loaded_is_one_sentence_and_leaves_no_trace(
    ray_cluster, root, model, shine
):
    status, _, err = shine(
        "features", "extract", f"data.root={root}", "extract.model=./nothing", "extract.workers=1"
    )
    assert status == 2
    assert err.startswith("extracting features shine: extract.model=./nothing: cannot be loaded:")
    assert "set gpu=false" in refused(config(root, model, gpu=True))
    assert extract(config(root, model))["num_videos"] == 3  # of settings that differ


def worker(config, clip_seconds=1.0):
    return ExtractVideos(config.model_dump_json(), clip_seconds)


def section(videos, out, model, **changes):
    settings = {"videos": str(videos), "out": str(out), "model": str(model), **changes}
    return Config.model_validate({"extract": settings}).extract


def extracted(worker, *files):
    rows = [{"vid": file.rpartition(".")[0], "file": file, "bytes": 1} for file in files]
    table = worker(pa.Table.from_pylist(rows))
    return [json.loads(text) for text in table["record"].to_pylist()]


def test_the_clips_do_not_depend_on_where_videos_lie(root, model):
    here = worker(section(root / "videos", root / "here", model))
    extracted(here, "steady.mp4")
    expected = np.load(root / "here" / "steady.npy")
    with serving_s3() as bucket:
        there = Storage(f"{bucket}/videos", "")
        for path in (root / "videos").iterdir():
            there.write(path.name, path)
        remote = worker(section(f"{bucket}/videos", f"{bucket}/out", model))
        good, bad = extracted(remote, "steady.mp4", "sound.mp4")
        out = Storage(f"{bucket}/out", "")
        found = np.load(io.BytesIO(out.read("steady.npy")))
        np.testing.assert_array_equal(found, expected)
        assert out.names() == ["steady.npy"]
        assert out.names("extract.records") == ["sound.json", "steady.json"]
    assert good["num_clips"] == len(expected) == 4
    assert "holds no video" in bad["refused"]


def test_a_video_that_is_gone_is_refused_and_its_old_features_with_it(root, model):
    one = worker(section(root / "videos", root / "out", model))
    assert extracted(one, "steady.mp4")[0]["columns"] == WIDTHS["clip"]
    (root / "videos" / "steady.mp4").unlink()
    (record,) = extracted(one, "steady.mp4")
    assert "cannot read" in record["refused"]
    assert not (root / "out" / "steady.npy").exists()


def test_half_precision_is_that_of_single(root, model):
    single = worker(section(root / "videos", root / "single", model))
    half = worker(section(root / "videos", root / "half", model, dtype="float16"))
    extracted(single, "steady.mp4")
    extracted(half, "steady.mp4")
    found = np.load(root / "half" / "steady.npy")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.load(root / "single" / "steady.npy").astype(np.float16))


def refused(config):
    with pytest.raises(InputError) as error:
        extract(config)
    return str(error.value)


def test_a_folder_of_other_settings_or_of_other_files_is_not_mixed(root, model):
    out = root / "features"
    out.mkdir()
    np.save(out / "v.npy", np.zeros((2, 3)))
    assert "1 npy files that this command did not write" in refused(config(root, model))
    settings = {
        "model": "another",
        "weights": None,
        "revision": "main",
        "frames_per_clip": 2,
        "dtype": "float32",
    }
    (out / "extract.json").write_text(json.dumps({**settings, "clip_seconds": 2.0}))
    sentence = refused(config(root, model))
    assert "model another, not" in sentence
    assert "clip_seconds 2.0, not 1.0" in sentence
    assert "revision" not in sentence
    (out / "extract.json").write_text("{")
    assert "is not as this command wrote it" in refused(config(root, model))


def test_a_folder_without_videos_is_told(tmp_path, model):
    assert "no video in" in refused(config(tmp_path, model))


def test_a_file_in_the_place_of_the_folder_of_videos_is_told(root, model):
    sentence = refused(config(root, model, videos="videos/steady.mp4"))
    assert sentence.endswith("steady.mp4 is a file; set extract.videos to the folder that holds it")


def test_parts_of_clips_are_not_shorter_than_the_clock(root, model):
    assert "has no room for extract.frames_per_clip=101" in refused(
        config(root, model, frames_per_clip=101)
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [("..mp4", "no name"), ("a\nb.mp4", "no name"), ("x" * 210 + ".mp4", "too long")],
)
def test_names_that_cannot_be_files_of_features_are_refused(tmp_path, name, says):
    write_video(tmp_path / "good.mp4", [0, 40])
    (tmp_path / name).write_bytes(b"")
    rows, wrong = found_videos(Storage(tmp_path, ""))
    assert [row["vid"] for row in rows] == ["good"]
    (record,) = wrong
    assert says in record["refused"]


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("v.mp4", "v.mkv", "w.mp4"):
        (tmp_path / name).write_bytes(b"")
    rows, (record,) = found_videos(Storage(tmp_path, ""))
    assert [row["vid"] for row in rows] == ["w"]
    assert "is the name of 2 files (v.mkv, v.mp4); rename" in record["refused"]


def stopped(root, model):
    """The configuration of a job that stopped when its workers had read the three videos."""
    settings = config(root, model)
    videos, out = root / "videos", root / "features"
    for bad in ("sound.mp4", "empty.avi"):
        (videos / bad).unlink()
    files = sorted(path.name for path in videos.iterdir() if path.suffix != ".txt")
    rows = [
        {"vid": name.rpartition(".")[0], "file": name, "bytes": (videos / name).stat().st_size}
        for name in files
    ]
    worker(section(videos, out, model))(pa.Table.from_pylist(rows))
    assert not (out / "extract.jsonl").exists()
    asked = settings.extract.model_dump(include={"model", "revision", "frames_per_clip", "dtype"})
    recorded = {**asked, "weights": folder_digest(model), "clip_seconds": 1.0}
    (out / "extract.json").write_text(json.dumps(recorded))
    return settings


def test_what_workers_did_before_a_stop_is_not_done_again(root, model):
    """A stopped job leaves files and their records; the lines are written from these."""
    settings, out = stopped(root, model), root / "features"
    found = extract(settings)
    assert (found["num_videos"], found["num_read"]) == (3, 0)
    assert sorted(lines(root)) == ["phone", "slides", "steady"]
    assert not list((out / "extract.records").iterdir())
    assert extract(settings) == found


def test_a_model_that_was_replaced_in_its_folder_is_refused(root, tmp_path):
    folder = save_model(tmp_path / "own")
    settings = stopped(root, folder)
    (folder / "vocab.json").write_text("{}")  # words make no clips
    assert extract(settings)["num_read"] == 0
    preparation = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(preparation.replace("0.48", "0.47"))
    says = r"are of weights [0-9a-f]{64}, not [0-9a-f]{64}; set extract\.out"
    assert re.search(says, refused(settings))
    (folder / "preprocessor_config.json").write_text(preparation)
    assert extract(settings)["num_read"] == 0
    save_model(folder, seed=1)
    assert re.search(says, refused(settings))
