import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from s3_server import serving_s3
from stores import LENGTHS, copied, write_store

from shine.data.local_copy import verify_once
from shine.data.resident import ResidentStore
from shine.data.store import FeatureStore, RangeStore, padded
from shine.errors import InputError
from shine.files import sha256
from shine.storage import Storage


@pytest.fixture(scope="module")
def bucket():
    with serving_s3() as url:
        yield url


def shard_of(folder, number=0):
    return sorted(folder.glob("shard-*.arrow"))[number]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("audio_width", [0, 2])
def test_every_kind_of_store_gives_the_clips_that_were_written(tmp_path, dtype, audio_width):
    clips = write_store(tmp_path, dtype=dtype, audio_width=audio_width)
    mapped = FeatureStore.open(tmp_path)
    ranges = RangeStore.open(tmp_path)
    resident = ResidentStore.load(mapped, torch.device("cpu"))
    vids, lengths = ["d", "c", "a", "e"], np.array([2, 5, 3, 5])
    parts = (4, 2) if audio_width else (6,)
    expected = padded([clips[vid] for vid in vids], lengths, parts)
    for store in (mapped, ranges, resident):
        for vid in LENGTHS:
            assert store.num_clips(vid) == LENGTHS[vid]
            np.testing.assert_array_equal(store.clips(vid), clips[vid], strict=True)
        found = store.gather(vids, lengths)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected, strict=True)
        assert store.clip_width == expected.shape[2]
        store.verify()
    assert ranges.read([], []) == []


def test_padding_and_end_points_are_those_of_a_loop_over_clips(tmp_path):
    clips = write_store(tmp_path, audio_width=2)
    vids, lengths = ["c", "b", "e"], np.array([6, 1, 5])
    expected = np.zeros((3, 6, 6 + 4), np.float32)
    for i, (vid, length) in enumerate(zip(vids, lengths, strict=True)):
        for clip in range(length):
            start = np.float32(clip) / np.float32(length)
            ends = [start, start + np.float32(1) / np.float32(length)]
            expected[i, clip] = [*clips[vid][clip, :4], *ends, *clips[vid][clip, 4:], *ends]
    found = FeatureStore.open(tmp_path).gather(vids, lengths)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert not np.signbit(found.numpy()[1, 1:]).any()


def test_a_store_on_s3_is_copied_or_read_by_ranges_alike(bucket, tmp_path):
    clips = write_store(f"{bucket}/alike")
    mapped = FeatureStore.open(f"{bucket}/alike", tmp_path)
    assert str(mapped.folder).startswith(str(tmp_path))
    ranges = RangeStore.open(f"{bucket}/alike")
    for vid, expected in clips.items():
        np.testing.assert_array_equal(mapped.clips(vid), expected)
        np.testing.assert_array_equal(ranges.clips(vid), expected)
    ranges.verify()
    with pytest.raises(InputError, match="no feature store in s3://"):
        FeatureStore.open(f"{bucket}/nothing", tmp_path)


OPENING = """
import pathlib, sys, time
from shine.data.store import FeatureStore
from shine.storage import Storage
opened, whole = [], Storage.open
Storage.open = lambda self, name: opened.append(name) or whole(self, name)
time.sleep(max(0, float(sys.argv[3]) - time.time()))
store = FeatureStore.open(sys.argv[1], pathlib.Path(sys.argv[2]))
print(len(opened), float(store.clips("c").sum()))
"""


def test_two_processes_that_start_together_copy_a_store_once(bucket, tmp_path):
    clips = write_store(f"{bucket}/once")
    together = str(time.time() + 6)
    arguments = [sys.executable, "-c", OPENING, f"{bucket}/once", str(tmp_path), together]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [float(total) for _, total in answers] == [float(clips["c"].sum())] * 2
    assert sorted(int(opened) for opened, _ in answers) == [0, 2]


def test_another_store_at_the_same_url_gets_a_copy_of_its_own(tmp_path):
    url = "memory://renewed"
    write_store(url)
    old = FeatureStore.open(url, tmp_path)
    clips = write_store(url, dtype="float32")
    assert FeatureStore.open(url, tmp_path).clips("a").dtype == np.float32
    assert old.clips("a").dtype == np.float16
    np.testing.assert_array_equal(FeatureStore.open(url, tmp_path).clips("a"), clips["a"])


def test_a_copy_that_was_cut_is_made_anew(tmp_path):
    url = "memory://cut"
    clips = write_store(url)
    store = FeatureStore.open(url, tmp_path)
    shard = shard_of(store.folder)
    shard.write_bytes(shard.read_bytes()[:-8])
    np.testing.assert_array_equal(FeatureStore.open(url, tmp_path).clips("c"), clips["c"])


def test_what_is_not_a_store_of_this_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="no feature store in .*shine features pack"):
        RangeStore.open(tmp_path)
    write_store(tmp_path, format=1)
    for kind in (FeatureStore, RangeStore):
        with pytest.raises(InputError, match="format 2, got 1; pack the features again"):
            kind.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="format 2, got None"):
        FeatureStore.open(tmp_path)


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    folder = tmp_path / "store"
    write_store(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../shard.arrow"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="names files outside its folder"):
        FeatureStore.open(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shards": None}, "shards: Input should be a valid"),
        ({"shards": {"shard-00000.arrow": "0"}}, "shards: Input should be a valid"),
        ({"shards": [{"name": "a", "sha256": "b"}]}, "shards.0.bytes: Field required"),
        ({"shards": [{"name": "a", "sha256": "b", "bytes": "9"}]}, "shards.0.bytes: Input should"),
        ({"videos": "videos.parquet"}, "videos: Input should be"),
        ({"width": "6"}, "width: Input should be a valid integer"),
        ({"width": 0}, "width: Input should be greater"),
        ({"dtype": "object"}, "dtype: Input should be 'float16' or 'float32'"),
        ({"clip_seconds": None}, "clip_seconds: Input should be a valid number"),
        ({"normalize": None}, "normalize: Input should be a valid boolean"),
        ({"simulated": []}, "simulated: Input should be a valid string"),
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path, change, says):
    write_store(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    for kind in (FeatureStore, RangeStore):
        with pytest.raises(
            InputError, match=rf"manifest.json is not as packing .* \({says}.*\); p"
        ):
            kind.open(tmp_path)


@pytest.mark.parametrize("key", ["width", "clip_seconds", "normalize", "dtype", "simulated",
                                 "num_videos", "num_clips", "videos", "shards"])  # fmt: skip
def test_a_manifest_without_a_key_is_refused(tmp_path, key):
    write_store(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest[key]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"is not as packing writes it \({key}: Field required"):
        RangeStore.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop(["offset"]),
        lambda table: table.set_column(2, "offset", pa.array([None] * 5, pa.int64())),
        lambda table: table.set_column(2, "offset", pa.array(["x"] * 5)),
        None,
    ],
)
def test_places_of_another_form_are_refused(tmp_path, change):
    write_store(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    path = tmp_path / manifest["videos"]["name"]
    if change is None:
        path.write_bytes(b"no table")
    else:
        pq.write_table(change(pq.read_table(path)), path)
    manifest["videos"]["sha256"] = sha256(path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"videos-\w+\.parquet is not as packing writes it \("):
        RangeStore.open(tmp_path)


def test_videos_that_do_not_lie_within_their_shard_are_refused(tmp_path):
    write_store(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change in ({"width": 5}, {"shards": manifest["shards"][:1]}):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(InputError, match="does not lie within shard-"):
            FeatureStore.open(tmp_path)


def test_a_shard_that_is_cut_lost_or_another_file_is_told(tmp_path):
    write_store(tmp_path)
    shard = shard_of(tmp_path)
    content = shard.read_bytes()
    shard.write_bytes(content[:400])
    with pytest.raises(InputError, match=rf"not a whole shard, expected {len(content)} bytes"):
        FeatureStore.open(tmp_path)
    with pytest.raises(InputError, match=rf"not a whole shard, expected {len(content)} bytes"):
        RangeStore.open(tmp_path)
    shard.write_bytes(content)
    ranges = RangeStore.open(tmp_path)
    shard.write_bytes(content[:400])
    with pytest.raises(InputError, match="is cut short; pack the features again"):
        ranges.clips("c")
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(InputError, match="not a whole shard"):
        RangeStore.open(tmp_path).clips("c")
    with pytest.raises(InputError, match="was changed after packing"):
        RangeStore.open(tmp_path).verify()
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00000-\w+\.arrow is missing"):
        RangeStore.open(tmp_path)
    with pytest.raises(InputError, match="not a whole shard"):
        FeatureStore.open(tmp_path)


def test_a_shard_that_is_cut_elsewhere_is_told_before_anything_is_read(bucket):
    write_store(f"{bucket}/short")
    storage = Storage(f"{bucket}/short", "")
    name = storage.names(prefix="shard-00001")[0]
    content = storage.read(name)
    storage.write(name, content[:-8])
    with pytest.raises(InputError, match=rf"{name}: not a whole shard, expected {len(content)} by"):
        RangeStore.open(f"{bucket}/short")


def test_a_store_of_links_is_read(tmp_path):
    clips = write_store(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    for kind in (FeatureStore, RangeStore):
        store = kind.open(tmp_path / "linked")
        store.verify()
        for vid, expected in clips.items():
            np.testing.assert_array_equal(store.clips(vid), expected)


def test_a_store_is_checked_in_full_once_and_again_when_a_file_changed(tmp_path):
    write_store(tmp_path / "store")
    store, cache = FeatureStore.open(tmp_path / "store"), tmp_path / "cache"
    verify_once(store, cache)
    shard = shard_of(tmp_path / "store")
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    content[-300] ^= 1
    with shard.open("r+b") as file:
        file.write(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    verify_once(store, cache)  # by what the file system tells, nothing changed
    os.utime(shard)
    for _ in range(2):
        with pytest.raises(InputError, match="was changed after packing"):
            verify_once(store, cache)


def test_a_password_in_a_url_is_not_told():
    with pytest.raises(InputError) as error:
        FeatureStore.open("ftp://user:hunter2@127.0.0.1:1/store")
    assert "hunter2" not in str(error.value)


def test_the_files_of_a_store_are_all_that_it_needs(tmp_path):
    clips = write_store(tmp_path)
    url = copied(tmp_path, "memory://moved")
    for vid, expected in clips.items():
        np.testing.assert_array_equal(RangeStore.open(url).clips(vid), expected)
    assert Storage(url, "").names() == sorted(path.name for path in tmp_path.iterdir())
