import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shine.config import Config, FeaturesConfig, SourceConfig
from shine.data.dataset import gather_clips
from shine.data.packing import pack_store, source_widths
from shine.data.sources import open_source
from shine.data.store import FeatureStore
from shine.errors import InputError


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
