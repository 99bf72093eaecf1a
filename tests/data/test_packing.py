import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import serving_s3

from shine.config import Config, FeaturesConfig, SourceConfig
from shine.data import packing
from shine.data.dataset import gather_clips
from shine.data.inventory import count_clips
from shine.data.packing import pack_store, pack_units, source_widths
from shine.data.sources import VideoRefused, open_source
from shine.data.store import FeatureStore
from shine.errors import InputError
from shine.storage import Storage


def save(folder, **videos):
    folder.mkdir(exist_ok=True)
    for vid, clips in videos.items():
        np.save(folder / f"{vid}.npy", clips)


def pack(tmp_path, vids, **settings):
    store = tmp_path / "store"
    values = {"sources": [str(tmp_path / "raw")], "store": str(store)} | settings
    return store, pack_store(Config.model_validate({"features": values}), vids)


def read(folder, vid, width):
    return open_source(SourceConfig(path=str(folder))).read(vid, width)


def clips(seed, length=5, width=4):
    return np.random.default_rng(seed).standard_normal((length, width)).astype(np.float32)


def test_what_was_packed_is_what_is_read(tmp_path):
    videos = {f"v{i}": clips(i, length=3 + i) for i in range(5)}
    save(tmp_path / "raw", **videos)
    store, _ = pack(tmp_path, videos, dtype="float32", normalize=False)
    opened = FeatureStore.open(store)
    for vid, expected in videos.items():
        np.testing.assert_array_equal(opened.clips(vid), expected)
        assert opened.num_clips(vid) == len(expected)
    assert opened.width == 4
    opened.verify()


def test_clips_have_unit_length_and_fit_half_precision(tmp_path):
    save(tmp_path / "raw", v=clips(0) * 1e6)
    store, _ = pack(tmp_path, ["v"])
    stored = FeatureStore.open(store).clips("v")
    assert stored.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(stored.astype(float), axis=1), 1, rtol=2e-3)


def test_clips_whose_length_is_no_number_are_left_out_and_not_made_zeros(tmp_path):
    save(tmp_path / "raw", good=clips(0) * 1e18, large=clips(1) * 1e30)
    store, manifest = pack(tmp_path, ["good", "large"])
    stored = FeatureStore.open(store).clips("good")
    np.testing.assert_allclose(np.linalg.norm(stored.astype(float), axis=1), 1, rtol=2e-3)
    (refused,) = manifest["refused"]
    assert refused["vid"] == "large"
    assert "e+30 is too large to be normalised" in refused["reason"]


def test_packing_twice_gives_the_same_bytes(tmp_path):
    save(tmp_path / "raw", a=clips(0), b=clips(1))
    store, first = pack(tmp_path, ["a", "b"])
    before = (store / "manifest.json").read_bytes()
    _, second = pack(tmp_path, ["a", "b"])
    assert first == second
    assert (store / "manifest.json").read_bytes() == before


def test_an_npz_of_one_array_or_with_features_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", features=clips(0), other=clips(1))
    np.savez(tmp_path / "b.npz", anything=clips(2))
    np.testing.assert_array_equal(read(tmp_path, "a", 4), clips(0))
    np.testing.assert_array_equal(read(tmp_path, "b", 4), clips(2))
    np.savez(tmp_path / "c.npz", x=clips(0), y=clips(1))
    with pytest.raises(InputError, match="one array or one named features"):
        read(tmp_path, "c", 4)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (clips(0, width=3), "expected 4 columns, got 3"),
        (np.full((2, 4), np.nan), "NaN or infinity in clip 0"),
        (np.array([[0, 1, 2, 3], [0, 1, np.inf, 3]]), "NaN or infinity in clip 1"),
        (np.zeros((0, 4)), r"shape \[clip, feature\]"),
        (np.zeros(4), r"shape \[clip, feature\]"),
        (np.array([["a"] * 4]), r"shape \[clip, feature\]"),
        (np.array([[Bomb()]], dtype=object), "got object"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path, content, says):
    np.save(tmp_path / "v.npy", content, allow_pickle=True)
    with pytest.raises(InputError, match=says) as error:
        read(tmp_path, "v", 4)
    assert "v.npy" in str(error.value)


def test_a_missing_or_cut_file_is_told(tmp_path):
    with pytest.raises(InputError, match="no features of video 'v'"):
        read(tmp_path, "v", 4)
    np.save(tmp_path / "v.npy", clips(0))
    content = (tmp_path / "v.npy").read_bytes()
    for length in (0, 5, len(content) - 7):
        (tmp_path / "v.npy").write_bytes(content[:length])
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path, "v", 4)


def saved(save, array):
    content = io.BytesIO()
    save(content, array)
    return content.getvalue()


def headed(description):
    """An npy file of five clips with a header of this description."""
    plain = saved(np.save, clips(0))
    start, end = plain.index(b"{"), plain.index(b"\n")
    return plain[:start] + description.encode().ljust(end - start) + plain[end:]


def shaped(shape):
    return headed(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}")


def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


DAMAGED = {
    "no end of the header": headed("{'descr': '<f4', 'shape': (5, 4), "),
    "no numbers in the header": shaped("(05, 4)"),
    "no type": headed("{'descr': (), 'fortran_order': False, 'shape': (5, 4), }"),
    "more clips than there are": shaped("(9, 4)"),
    "more clips than memory": shaped("(10000000000000000, 4)"),
    "more clips than can be counted": shaped(f"({2**70}, 4)"),
    "no array": b"no array",
    "no array in an archive": zipped("features.npy", b"no array"),
    "a damaged array in an archive": zipped("features.npy", shaped(f"({2**70}, 4)")),
    "an archive without a member": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_packing_leaves_a_damaged_file_out_with_its_reason(tmp_path, content):
    save(tmp_path / "raw", good=clips(0))
    (tmp_path / "raw" / "bad.npy").write_bytes(content)
    _, manifest = pack(tmp_path, ["bad", "good"])
    assert manifest["num_videos"] == 1
    (refusal,) = manifest["refused"]
    assert refusal["vid"] == "bad"
    assert "bad.npy" in refusal["reason"]
    assert "pickle" not in refusal["reason"]


def test_intact_headers_of_these_files_are_read(tmp_path):
    (tmp_path / "v.npy").write_bytes(shaped("(5, 4)"))
    np.testing.assert_array_equal(read(tmp_path, "v", 4), clips(0))
    (tmp_path / "v.npy").write_bytes(zipped("features.npy", shaped("(5, 4)")))
    np.testing.assert_array_equal(read(tmp_path, "v", 4), clips(0))


def test_objects_are_refused_without_the_advice_of_numpy(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError) as error:
        read(tmp_path, "v", 4)
    assert "pickle" not in str(error.value)


def test_a_member_that_is_no_array_is_told(tmp_path):
    (tmp_path / "v.npz").write_bytes(zipped("features", b"text"))
    with pytest.raises(InputError, match=r"v.npz: cannot be read as a numeric array"):
        read(tmp_path, "v", 4)


INTACT = [saved(save, clips(0)) for save in (np.save, np.savez, np.savez_compressed)]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(INTACT), st.data())
def test_whatever_is_changed_in_a_file_it_is_read_or_told(tmp_path, intact, data):
    content = bytearray(intact)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.sampled_from(b"0579(){}[],:'<fO \n\0\xff"))
    (tmp_path / "v.npy").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with suppress(InputError):
        assert read(tmp_path, "v", None).ndim == 2


def test_a_video_that_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    save(tmp_path / "raw", good=clips(0), bad=clips(1, width=3))
    store, manifest = pack(tmp_path, ["bad", "good", "gone"], width=4)
    assert manifest["num_videos"] == 1
    bad, gone = manifest["refused"]
    assert (bad["vid"], "columns" in bad["reason"]) == ("bad", True)
    assert (gone["vid"], "no features" in gone["reason"]) == ("gone", True)
    with pytest.raises(InputError, match="does not hold video bad"):
        FeatureStore.open(store).clips("bad")


def test_values_that_do_not_fit_half_precision_are_refused(tmp_path):
    save(tmp_path / "raw", v=clips(0) * 1e6, w=clips(0))
    _, manifest = pack(tmp_path, ["v", "w"], normalize=False)
    assert [refusal["vid"] for refusal in manifest["refused"]] == ["v"]
    assert "does not fit float16" in manifest["refused"][0]["reason"]


def test_an_unfinished_changed_or_foreign_store_is_not_read(tmp_path):
    save(tmp_path / "raw", v=clips(0))
    store, packed = pack(tmp_path, ["v"])
    manifest = (store / "manifest.json").read_text()
    (store / "manifest.json").unlink()
    with pytest.raises(InputError, match="no feature store"):
        FeatureStore.open(store)
    (store / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        FeatureStore.open(store)
    (store / "manifest.json").write_text(json.dumps({**json.loads(manifest), "format": 99}))
    with pytest.raises(InputError, match="format"):
        FeatureStore.open(store)
    (store / "manifest.json").write_text(manifest)
    shard = store / packed["shards"][0]["name"]
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="changed after packing"):
        FeatureStore.open(store).verify()
    shard.write_bytes(bytes(content[:100]))
    with pytest.raises(InputError, match="not a whole shard"):
        FeatureStore.open(store)


def unit(values):
    return values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-5)


def joined(tmp_path, lengths, vid="v", audio=None, **settings):
    """A store of one video in several folders, whose arrays come back too."""
    folders = [str(tmp_path / f"part{number}") for number in range(len(lengths))]
    arrays = [clips(i, length, width=3 + i) for i, length in enumerate(lengths)]
    for folder, array in zip(folders, arrays, strict=True):
        save(Path(folder), **{vid: array})
    if audio is not None:
        save(tmp_path / "pann", **{vid: audio})
        settings["audio"] = str(tmp_path / "pann")
        arrays.append(audio)
    return pack(tmp_path, [vid], sources=folders, **settings)[0], arrays


def test_several_extractors_are_normalised_alone_cut_to_the_shortest_and_joined(tmp_path):
    store, arrays = joined(tmp_path, [6, 5, 7], dtype="float32")
    opened = FeatureStore.open(store)
    expected = np.concatenate([unit(array)[:5] for array in arrays], axis=1)
    np.testing.assert_allclose(opened.clips("v"), expected, rtol=1e-6)
    assert (opened.width, opened.clip_width) == (3 + 4 + 5, 12 + 2)


def test_audio_comes_last_and_brings_temporal_end_points_of_its_own(tmp_path):
    audio = clips(9, length=4, width=2)
    store, (video, _) = joined(tmp_path, [5], audio=audio, dtype="float32")
    opened = FeatureStore.open(store)
    assert (opened.manifest["audio_width"], opened.width, opened.clip_width) == (2, 5, 9)
    found, mask = gather_clips(opened, ["v"], np.array([4]))
    start = np.arange(4, dtype=np.float32) / 4
    times = np.stack([start, start + np.float32(0.25)], axis=1)
    expected = np.concatenate([unit(video)[:4], times, unit(audio), times], axis=1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    assert mask.all()


@given(st.lists(st.integers(1, 200), min_size=1, max_size=3))
def test_temporal_end_points_are_those_of_single_precision_divisions(lengths):
    place = {str(i): ("", 0, length) for i, length in enumerate(lengths)}
    store = FeatureStore(
        Path(), {"width": 1, "clip_seconds": 1.0}, place, {"": np.ones((200, 1), np.float32)}
    )
    found, _ = gather_clips(store, list(place), np.array(lengths))
    one = np.float32(1)
    for row, length in enumerate(lengths):
        for clip in range(length):
            start = np.float32(clip) / np.float32(length)
            assert found[row, clip].tolist() == [1, start, start + one / np.float32(length)]


def test_extractors_of_different_strides_are_not_joined(tmp_path):
    with pytest.raises(InputError, match="40 in .* 20 in .*one stride|one stride .*40 in .* 20 in"):
        joined(tmp_path, [40, 20])


def test_the_columns_of_all_folders_add_up_to_the_width(tmp_path):
    _, arrays = joined(tmp_path, [3, 3], audio=clips(1, 3, 2))
    folders = [str(tmp_path / f"part{number}") for number in range(2)]
    config = FeaturesConfig.model_validate(
        {"sources": folders, "audio": str(tmp_path / "pann"), "width": 9}
    )
    assert source_widths(config, ["gone", "v"]) == tuple(a.shape[1] for a in arrays) == (3, 4, 2)
    with pytest.raises(InputError, match=r"8 columns .* 3 \(part0\) \+ 4 .* = 9; correct"):
        source_widths(config.model_copy(update={"width": 8}), ["v"])
    with pytest.raises(InputError, match="no features in .*none: expected a folder"):
        source_widths(FeaturesConfig(sources=(SourceConfig(path="none"),)), ["v"])


def test_a_number_too_large_for_a_float32_is_refused(tmp_path):
    save(tmp_path / "raw", v=np.full((2, 4), 1e300))
    with pytest.raises(InputError, match="NaN or infinity in clip 0"):
        read(tmp_path / "raw", "v", 4)


# Stopped, repeated, elsewhere


def feature_config(tmp_path, **settings):
    values = {"sources": [str(tmp_path / "raw")], "store": str(tmp_path / "store")} | settings
    return Config.model_validate({"features": values})


def content(url):
    """Every file of a store with its bytes."""
    storage = Storage(url, "")
    return {name: storage.read(name) for name in storage.names()}


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(packing, "VIDEOS_PER_UNIT", 2)


def made(tmp_path, count=7, lengths=(3, 9, 5)):
    videos = {f"v{i}": clips(i, length=lengths[i % len(lengths)]) for i in range(count)}
    save(tmp_path / "raw", **videos)
    return videos


def killed_after(number):
    """Packs units in this process and dies."""

    def run(config, widths, units):
        for count, packed in enumerate(pack_units(config, widths, units)):
            if count == number:
                raise KeyboardInterrupt
            yield packed

    return run


def counting(packed_vids):
    """Packs units in this process and notes which videos are read."""

    def run(config, widths, units):
        packer = packing.Packer(config, widths)
        read = packer._clips
        packer._clips = lambda vid: packed_vids.append(vid) or read(vid)
        return map(packer.pack, units)

    return run


@pytest.mark.parametrize("number", range(4))
def test_packing_that_was_stopped_goes_on_with_what_is_whole(tmp_path, small_units, number):
    videos = made(tmp_path)
    expected = pack_store(feature_config(tmp_path, store=str(tmp_path / "calm")), videos)
    config = feature_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pack_store(config, videos, run=killed_after(number))
    with pytest.raises(InputError, match="no feature store"):
        FeatureStore.open(tmp_path / "store")
    read = []
    manifest = pack_store(config, videos, run=counting(read))
    assert read == sorted(videos)[2 * (number + 1) :]
    assert manifest == expected
    assert content(str(tmp_path / "store")) == content(str(tmp_path / "calm"))


def test_a_store_that_stands_is_read_until_another_is_whole(tmp_path, small_units):
    videos = made(tmp_path)
    config = feature_config(tmp_path)
    pack_store(config, videos)
    opened = FeatureStore.open(tmp_path / "store")
    before = {vid: opened.clips(vid).copy() for vid in videos}
    for vid, values in videos.items():
        save(tmp_path / "raw", **{vid: -values[:-1]})
    with pytest.raises(KeyboardInterrupt):
        pack_store(config, videos, run=killed_after(2))
    again = FeatureStore.open(tmp_path / "store")
    again.verify()
    for vid, expected in before.items():
        np.testing.assert_array_equal(again.clips(vid), expected)
    pack_store(config, videos)
    for vid, expected in before.items():
        np.testing.assert_array_equal(opened.clips(vid), expected)  # still mapped
        np.testing.assert_array_equal(
            FeatureStore.open(tmp_path / "store").clips(vid), -expected[:-1]
        )


def test_only_what_changed_or_is_not_whole_is_packed_again(tmp_path, small_units):
    videos = made(tmp_path)
    config = feature_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pack_store(config, videos, run=killed_after(3))
    save(tmp_path / "raw", v0=clips(77, length=4))
    (shard,) = (tmp_path / "store").glob("shard-00001-*")
    torn = bytearray(shard.read_bytes())
    torn[len(torn) // 2] ^= 1
    shard.write_bytes(torn)
    next((tmp_path / "store").glob("shard-00002-*")).unlink()
    read = []
    pack_store(config, videos, run=counting(read))
    assert read == ["v0", "v1", "v2", "v3", "v4", "v5"]
    store = FeatureStore.open(tmp_path / "store")
    store.verify()
    assert store.num_clips("v0") == 4


def test_other_settings_pack_everything_again(tmp_path, small_units):
    videos = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pack_store(feature_config(tmp_path), videos, run=killed_after(3))
    read = []
    pack_store(feature_config(tmp_path, dtype="float32"), videos, run=counting(read))
    assert read == sorted(videos)


def test_a_file_that_came_after_packing_was_stopped_is_packed(tmp_path, small_units):
    videos = made(tmp_path)
    gone = (tmp_path / "raw" / "v1.npy").rename(tmp_path / "v1.npy")
    with pytest.raises(KeyboardInterrupt):
        pack_store(feature_config(tmp_path), videos, run=killed_after(3))
    gone.rename(tmp_path / "raw" / "v1.npy")
    assert pack_store(feature_config(tmp_path), videos)["refused"] == []


FOREIGN = {
    "notes.txt": b"",
    "features.parquet": b"",
    "videos.parquet": b"",
    "shard-00000.arrow": b"",
    "shard-00000-0123456789ab.arrow": b"of another store",
    "videos-0123456789ab.parquet": b"",
    "building-00000-plan.json": b"{}",
    f"building-00000-{'0' * 32}.json": b'{"shards": 3}',
}


def test_files_of_others_in_the_folder_of_a_store_are_left(tmp_path):
    videos = made(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    for name, value in FOREIGN.items():
        (store / name).write_bytes(value)
    pack_store(feature_config(tmp_path), videos)
    manifest = pack_store(feature_config(tmp_path, dtype="float32"), videos)
    ours = {"manifest.json", manifest["videos"]["name"], manifest["shards"][0]["name"]}
    assert {path.name for path in store.iterdir()} == FOREIGN.keys() | ours
    for name, value in FOREIGN.items():
        assert (store / name).read_bytes() == value


def test_what_stopped_packing_of_other_settings_left_is_removed(tmp_path, small_units):
    videos = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pack_store(feature_config(tmp_path, dtype="float32"), videos, run=killed_after(2))
    assert len(list((tmp_path / "store").glob("shard-*"))) == 3
    manifest = pack_store(feature_config(tmp_path), videos)
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        "manifest.json",
        manifest["videos"]["name"],
        *(shard["name"] for shard in manifest["shards"]),
    }


def test_a_store_of_format_1_is_replaced(tmp_path):
    videos = made(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    (store / "shard-00000.arrow").write_bytes(b"")
    (store / "videos.parquet").write_bytes(b"")
    old = {"format": 1, "shards": {"shard-00000.arrow": "0"}}
    (store / "manifest.json").write_text(json.dumps(old))
    pack_store(feature_config(tmp_path), videos)
    assert FeatureStore.open(store).num_clips("v0") == 3
    assert len(list(store.iterdir())) == 3


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": "shine-texts-1", "shards": [], "texts": {"name": "texts-0.parquet"}},
        {"manifest_version": 3, "name": "an extension"},
        ["a"],
        "{",
    ],
)
def test_a_folder_with_the_manifest_of_something_else_is_refused(tmp_path, manifest):
    videos = made(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (store / "manifest.json").write_text(text)
    (store / "shard-00000-0123456789ab.arrow").write_bytes(b"")
    before = content(str(store))
    with pytest.raises(InputError, match="is not the manifest of a feature store; set features"):
        pack_store(feature_config(tmp_path), videos)
    assert content(str(store)) == before


def test_a_shard_is_no_larger_than_its_bound_unless_one_video_is(tmp_path, monkeypatch):
    videos = made(tmp_path, 9, lengths=(3, 9, 5, 60))
    whole = pack(tmp_path, videos, dtype="float32", normalize=False)[1]
    assert len(whole["shards"]) == 1
    monkeypatch.setattr(packing, "SHARD_BYTES", 320)  # of 20 clips
    store, manifest = pack(tmp_path, videos, dtype="float32", normalize=False)
    opened = FeatureStore.open(store)
    opened.verify()
    sizes = {}
    for vid, expected in videos.items():
        np.testing.assert_array_equal(opened.clips(vid), expected)
        sizes.setdefault(opened.place(vid)[0], []).append(len(expected))
    assert len(sizes) == len(manifest["shards"]) > 3
    assert all(sum(lengths) <= 20 or len(lengths) == 1 for lengths in sizes.values())


@pytest.mark.parametrize("kind", ["npz", "hdf5", "lmdb"])
def test_the_store_is_the_same_from_any_layout(tmp_path, small_units, kind):
    videos = made(tmp_path)
    expected = pack_store(feature_config(tmp_path), videos)
    source = tmp_path / kind
    if kind == "npz":
        source.mkdir()
        for vid, values in videos.items():
            np.savez(source / f"{vid}_rgb.npz", clips=values)
        settings = {"path": str(source), "file": "{vid}_rgb.npz", "key": "clips"}
    elif kind == "hdf5":
        with h5py.File(source, "w") as file:
            for vid, values in videos.items():
                file[f"{vid}/c3d"] = values
        settings = {"path": str(source), "file": "{vid}/c3d"}
    else:
        with lmdb.open(str(source)) as environment, environment.begin(write=True) as transaction:
            for vid, values in videos.items():
                transaction.put(vid.encode(), saved(np.save, values))
        settings = {"path": str(source)}
    again = feature_config(tmp_path, sources=[settings], store=str(tmp_path / "again"))
    found = pack_store(again, videos)
    assert {**found, "sources": None} == {**expected, "sources": None}
    one, two = content(str(tmp_path / "store")), content(str(tmp_path / "again"))
    assert one.pop("manifest.json") != two.pop("manifest.json")  # which names the source
    assert one == two


def test_from_and_to_an_object_store(tmp_path, small_units):
    videos = made(tmp_path)
    expected = pack_store(feature_config(tmp_path), videos)
    with serving_s3() as bucket:
        Storage(bucket, "").write("deep/raw/bad.npy", b"no array")
        for path in (tmp_path / "raw").iterdir():
            Storage(bucket, "").write(f"deep/raw/{path.name}", path)
        settings = {"sources": [f"{bucket}/deep/raw"], "store": f"{bucket}/made/store"}
        config = feature_config(tmp_path, **settings)
        with pytest.raises(KeyboardInterrupt):
            pack_store(config, [*videos, "bad", "gone"], run=killed_after(2))
        read = []
        manifest = pack_store(config, [*videos, "bad", "gone"], run=counting(read))
        assert read == ["v4", "v5", "v6"]
        assert [refusal["vid"] for refusal in manifest["refused"]] == ["bad", "gone"]
        store = FeatureStore.open(settings["store"], cache=tmp_path / "cache")
        here = FeatureStore.open(tmp_path / "store")
        for vid in videos:
            np.testing.assert_array_equal(store.clips(vid), here.clips(vid))
        assert sorted(content(settings["store"])) == sorted(
            [
                "manifest.json",
                manifest["videos"]["name"],
                *(shard["name"] for shard in manifest["shards"]),
            ]
        )
        assert manifest["num_clips"] == expected["num_clips"]


def test_a_store_in_memory_is_the_one_on_disk(tmp_path, small_units):
    videos = made(tmp_path)
    pack_store(feature_config(tmp_path), videos)
    url = f"memory://{tmp_path.name}/store"
    pack_store(feature_config(tmp_path, store=url), videos)
    assert content(url) == content(str(tmp_path / "store"))


def test_a_storage_that_fails_ends_the_work_and_leaves_no_video_out(tmp_path, monkeypatch):
    videos = made(tmp_path)
    memory = Storage(f"memory://{tmp_path.name}/raw", "")
    for path in (tmp_path / "raw").iterdir():
        memory.write(path.name, path)
    config = feature_config(tmp_path, sources=[f"memory://{tmp_path.name}/raw"], width=4)

    def fails(self, path, *_, **__):
        raise OSError(110, "Connection timed out")

    with monkeypatch.context() as context:
        context.setattr("fsspec.implementations.memory.MemoryFileSystem.get_file", fails)
        with pytest.raises(InputError, match=r"cannot read memory://.*timed out") as told:
            pack_store(config, videos)
    assert not isinstance(told.value, VideoRefused)
    assert pack_store(config, videos)["refused"] == []


def test_where_no_video_can_be_packed_the_store_is_left(tmp_path):
    videos = made(tmp_path)
    config = feature_config(tmp_path, width=4)
    pack_store(config, videos)
    before = content(str(tmp_path / "store"))
    with pytest.raises(InputError, match="no video could be packed; the first reason: .*'w'"):
        pack_store(config, ["w", "x"])
    after = content(str(tmp_path / "store"))
    assert {name: after[name] for name in before} == before


def test_a_source_of_another_stride_is_brought_to_the_clips_of_the_store(tmp_path):
    one, two = clips(1, length=10), clips(2, length=5, width=3)
    save(tmp_path / "raw", v=one)
    save(tmp_path / "other", v=two)
    sources = [{"path": str(tmp_path / "raw"), "clip_seconds": 0.5}, str(tmp_path / "other")]
    store, manifest = pack(tmp_path, ["v"], sources=sources, normalize=False, dtype="float32")
    expected = np.concatenate([one.reshape(5, 2, 4).mean(axis=1), two], axis=1)
    np.testing.assert_allclose(FeatureStore.open(store).clips("v"), expected, rtol=1e-6)
    assert manifest["sources"] == sources


def test_clips_finer_than_memory_are_refused(tmp_path):
    save(tmp_path / "raw", v=clips(0), w=clips(1))
    sources = [{"path": str(tmp_path / "raw"), "clip_seconds": 1e9}]
    with pytest.raises(InputError, match="clips of 1 s take more than 1024 MiB; correct"):
        pack(tmp_path, ["v", "w"], sources=sources)


def test_a_signed_url_is_not_repeated_in_the_manifest(tmp_path):
    made(tmp_path, 1)
    described = packing._described(SourceConfig(path="https://host/raw.h5?X-Signature=secret"))
    assert described == "https://host/raw.h5"


def test_a_signed_url_is_not_repeated_in_a_reason(tmp_path):
    signed = f"memory://{tmp_path.name}/raw?X-Signature=secret"
    config = feature_config(tmp_path, sources=[signed, str(tmp_path / "raw")]).features
    far = [clips(0, length=40), clips(1, length=20)]
    for part in (far, [np.full((2, 4), 1e6, np.float32)] * 2):
        with pytest.raises(InputError) as told:
            packing.stored_clips(part, config.model_copy(update={"normalize": False}))
        assert "secret" not in str(told.value)
    with pytest.raises(InputError, match=r"no features in memory://[^?]*/raw: expected") as told:
        pack_store(feature_config(tmp_path, sources=[signed]), ["v"])
    assert "secret" not in str(told.value)


def test_what_packing_tells_of_a_signed_source_has_no_signature(tmp_path):
    signed = f"memory://{tmp_path.name}/raw?X-Signature=secret"
    save(tmp_path / "raw", a=clips(0), bad=np.full((2, 4), np.nan))
    for path in (tmp_path / "raw").iterdir():
        Storage(signed, "").write(path.name, path)  # in memory, all of it is a name
    config = feature_config(tmp_path, sources=[signed])
    told = count_clips(config, ["a", "bad", "gone"])
    assert told.place == f"memory://{tmp_path.name}/raw"
    assert sorted(told.reasons) == ["bad", "gone"]
    assert "secret" not in str(told)
    manifest = pack_store(config, ["a", "bad", "gone"])
    assert manifest["sources"] == [f"memory://{tmp_path.name}/raw"]
    assert len(manifest["refused"]) == 2
    assert "secret" not in str(manifest)


def test_shards_that_another_job_removed_are_missed(tmp_path, small_units):
    videos = made(tmp_path)

    def run(config, widths, units):
        yield from pack_units(config, widths, units)
        next((tmp_path / "store").glob("shard-00001-*")).unlink()

    config = feature_config(tmp_path)
    with pytest.raises(InputError, match="lost shard-00001-.*another job"):
        pack_store(config, videos, run=run)
    pack_store(config, videos)
    FeatureStore.open(tmp_path / "store").verify()
