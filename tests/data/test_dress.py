import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shine.data.annotations import read_annotations
from shine.data.dress import DressConfig, dress
from shine.data.mixture import clip_coverage, read_world, world_checksum
from shine.errors import InputError

CHARADES = Path(os.environ.get("SHINE_SHARED", "../shared")) / "data" / "charades_cg"
QUIET = DressConfig(
    distractors=0, noise=0.0, clutter=0.0, scene=0.0, clip_seconds=0.5, tagger="shine"
)
TRAIN = [
    ("a", "person opens the red box.", 20.0, [2.0, 8.0]),
    ("a", "a person is holding a towel near the sofa.", 20.0, [6.0, 12.0]),
    ("b", "someone is opening a box.", 10.2, [0.0, 12.0]),
    ("c", "person washes a t-shirt.", 30.0, [10.0, 15.0]),
]
TEST = [
    ("d", "person closes the window.", 15.0, [3.0, 9.0]),
    ("d", "person throws a cup.", 15.0, [9.5, 13.0]),
]


def write(path: Path, rows: list, **further) -> Path:
    records = [
        {"qid": f"{vid}_{n}", "query": query, "duration": duration, "vid": vid}
        | {"relevant_windows": [moment], **further}
        for n, (vid, query, duration, moment) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def dressed(folder: Path, config: DressConfig, train: list = TRAIN) -> Path:
    folder.mkdir(exist_ok=True)
    files = [write(folder / "train.jsonl", train), write(folder / "test.jsonl", TEST)]
    dress(files, folder / "world", config)
    return folder / "world"


def clips(world: Path, vid: str) -> np.ndarray:
    return np.load(world / "features" / f"{vid}.npy")


def table(world: Path) -> dict[str, np.ndarray]:
    read = pq.read_table(world / "word_vectors.parquet")
    return dict(zip(read["word"].to_pylist(), np.stack(read["vector"].to_numpy()), strict=True))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_copies_are_identical_and_the_result_is_marked(tmp_path):
    world = dressed(tmp_path, QUIET)
    for name in ("train.jsonl", "test.jsonl"):
        assert (world / name).read_bytes() == (tmp_path / name).read_bytes()
    manifest = json.loads((world / "world.json").read_text())
    assert manifest["simulated"] == "features simulated from the captions, seed 0"
    assert manifest["rows"] == {"train.jsonl": 4, "test.jsonl": 2}
    assert manifest["moments_past_the_end"] == 1
    assert manifest["config"]["clip_seconds"] == 0.5


def test_captions_show_at_their_moments_and_overlap_where_those_do(tmp_path):
    video = clips(dressed(tmp_path, QUIET), "a")
    assert video.shape == (40, 64)
    first, second = video[6], video[20]
    assert np.abs(video[:4]).max() == 0
    assert np.abs(video[24:]).max() == 0
    np.testing.assert_allclose(video[4:12], np.tile(first, (8, 1)), atol=1e-4)
    np.testing.assert_allclose(video[12:16], np.tile(first + second, (4, 1)), atol=3e-4)
    np.testing.assert_allclose(video[16:24], np.tile(second, (8, 1)), atol=1e-4)


def test_a_moment_past_the_end_is_cut(tmp_path):
    video = clips(dressed(tmp_path, QUIET), "b")
    assert video.shape == (21, 64)  # 10.2 s: the last clip is partial, and filled
    np.testing.assert_allclose(video, np.tile(video[0], (21, 1)), atol=1e-4)


def test_the_same_words_look_alike_in_every_video(tmp_path):
    world = dressed(tmp_path, QUIET)
    red_box, box = clips(world, "a")[5], clips(world, "b")[5]
    assert cosine(red_box, box) > 0.8
    assert abs(cosine(box, clips(world, "c")[22])) < 0.5


def test_a_caption_is_an_event_once_however_many_files_hold_it(tmp_path):
    one = dressed(tmp_path / "one", QUIET)
    two = dressed(tmp_path / "two", QUIET, [*TRAIN, TEST[0]])
    np.testing.assert_array_equal(clips(one, "d"), clips(two, "d"))


def test_every_word_of_captions_and_negatives_has_a_vector(tmp_path):
    negatives = ["person drops the box.", "person drops the lamp.", "person drops it quietly."]
    path = write(tmp_path / "train.jsonl", TRAIN, recomposed_queries=negatives)
    dress([path], tmp_path / "world", QUIET)
    vectors = table(tmp_path / "world")
    assert {"person", "the", "is", "opening", "t-shirt", "towel", "drops", "lamp"} <= set(vectors)
    assert {"quietly"} <= set(vectors)
    assert "." not in vectors
    assert cosine(vectors["opens"], vectors["opening"]) > 0.8
    assert abs(cosine(vectors["opens"], vectors["drops"])) < 0.6


def test_a_word_does_not_depend_on_the_other_captions(tmp_path):
    full = table(dressed(tmp_path / "full", QUIET))
    part = table(dressed(tmp_path / "part", QUIET, TRAIN[:1]))
    assert len(part) < len(full)
    for word, vector in part.items():
        np.testing.assert_array_equal(vector, full[word])


def test_training_videos_show_nothing_that_only_test_captions_say(tmp_path):
    loud = QUIET.model_copy(update={"distractors": 2, "clutter": 1.0})
    with_test = dressed(tmp_path / "with", loud)
    path = write(tmp_path / "train.jsonl", TRAIN)
    dress([path], tmp_path / "without", loud)
    for vid in "abc":
        np.testing.assert_array_equal(clips(with_test, vid), clips(tmp_path / "without", vid))


def test_distractors_share_no_word_with_the_captions_of_the_video(tmp_path):
    quiet = clips(dressed(tmp_path / "quiet", QUIET), "c")
    loud = QUIET.model_copy(update={"distractors": 3})
    added = clips(dressed(tmp_path / "loud", loud), "c") - quiet
    kinds = np.unique(np.round(added[np.abs(added).max(axis=1) > 0.05], 1), axis=0)
    assert len(kinds) > 1
    wash = quiet[22]
    whole = [kind for kind in kinds if np.linalg.norm(kind) > 1.0]
    assert whole
    assert all(abs(cosine(kind, wash)) < 0.6 for kind in whole)


def test_dressing_is_a_function_of_its_configuration(tmp_path):
    config = DressConfig(tagger="shine")
    checksums = [
        world_checksum(dressed(tmp_path / name, config.model_copy(update=update)))
        for name, update in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"noise": 0.5}))
    ]
    assert checksums[0] == checksums[1]
    assert len(set(checksums)) == 3


def test_half_precision_is_half_the_size(tmp_path):
    half = clips(dressed(tmp_path / "h", QUIET.model_copy(update={"dtype": "float16"})), "a")
    full = clips(dressed(tmp_path / "f", QUIET), "a")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, full, atol=2e-3)


def test_dressing_that_was_stopped_can_be_begun_again(tmp_path, monkeypatch):
    calm = dressed(tmp_path / "calm", QUIET)
    save = np.save

    def stopping(path, clips):
        if path.stem == "c":
            raise KeyboardInterrupt
        save(path, clips)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            dressed(tmp_path / "world", QUIET)
    with pytest.raises(InputError, match="is unfinished: its making was stopped"):
        world_checksum(tmp_path / "world" / "world")
    again = dressed(tmp_path / "world", QUIET)
    assert read_world(again) == read_world(calm)
    assert world_checksum(again) == world_checksum(calm)


def test_impossible_requests_are_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", TRAIN)
    (tmp_path / "other").mkdir()
    twin = write(tmp_path / "other" / "train.jsonl", TEST)
    with pytest.raises(InputError, match=r"got train.jsonl twice"):
        dress([path, twin], tmp_path / "world", QUIET)
    with pytest.raises(InputError, match="at least one annotation file"):
        dress([], tmp_path / "world", QUIET)
    with pytest.raises(InputError, match="will be replaced"):
        dress([path], tmp_path, QUIET)
    with pytest.raises(InputError, match="holds other files"):
        dress([path], tmp_path / "other", QUIET)
    assert twin.exists()


@pytest.mark.skipif(not CHARADES.is_dir(), reason="needs the real annotations (SHINE_SHARED)")
def test_real_captions_are_visible_in_their_videos(tmp_path):
    source = CHARADES / "charades_cg_novel_word.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()[:150]
    path = tmp_path / "novel_word.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = DressConfig(tagger="shine")
    dress([path], tmp_path / "world", config)
    found = []
    for row in read_annotations(path):
        video = clips(tmp_path / "world", row.vid)
        share = clip_coverage(np.array(row.moments[:1]), row.duration_seconds, config.clip_seconds)
        assert video.shape == (share.shape[1], config.video_width)
        within, without = np.flatnonzero(share[0] == 1), np.flatnonzero(share[0] == 0)
        if len(within) < 2 or not len(without):
            continue
        centered = video - video[without].mean(axis=0)
        scores = centered @ centered[within[::2]].mean(axis=0)  # the other clips are the judge
        found.append(scores[within[1::2]].mean() > scores[without].max())
    assert len(found) > 100
    assert np.mean(found) > 0.7  # noise alone: 0.02
